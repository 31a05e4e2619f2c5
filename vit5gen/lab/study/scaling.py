"""Whether a difference grows or shrinks with size: laws of the held-out loss over the parameters."""

from dataclasses import dataclass

import numpy as np

from vit5gen.evaluation.significance import Estimate
from vit5gen.lab.study.differences import Curves, Levels, find_pairs, name_of
from vit5gen.lab.study.plan import StudyConfig


@dataclass(frozen=True)
class Trend:
    """Held-out losses (seeds, sizes) of a change and of its baseline, ``samples`` into training.

    parameters (sizes,): of the baseline.  The law of each seed is ``log loss = a + b log10 parameters``, by least
    squares; with a constant loss beside it, a law would have nearly as many numbers as there are sizes. That of the
    ratio is the difference of both. Intervals are Student's over the seeds' laws; they do not allow for laws that bend.
    """

    change: str
    baseline: str
    samples: int
    parameters: np.ndarray
    losses: np.ndarray
    reference: np.ndarray

    @property
    def ratios(self) -> np.ndarray:
        """Logarithm of the change's loss over the baseline's (seeds, sizes)."""
        return np.log(self.losses / self.reference)

    def slope(self, logs: np.ndarray) -> Estimate:
        """Return what a logarithm (seeds, sizes) gains with ten times the parameters."""
        return Estimate.of_pairs(np.polyfit(np.log10(self.parameters), logs.T, 1)[0].tolist())

    def at(self, logs: np.ndarray, parameters: float) -> Estimate:
        """Return the law of a logarithm (seeds, sizes) at any size."""
        slopes, constants = np.polyfit(np.log10(self.parameters), logs.T, 1)
        return Estimate.of_pairs((slopes * np.log10(parameters) + constants).tolist())

    @property
    def misfit(self) -> float:
        """The largest distance of a size's mean logarithm of the ratio from the law."""
        law = [self.at(self.ratios, n).difference for n in self.parameters]
        return float(np.abs(self.ratios.mean(axis=0) - law).max())


def find_trends(study: StudyConfig, curves: Curves) -> list[Trend]:
    """Return a trend for each change and step, over the two or more seeds that all sizes have."""
    if study.extrapolate_to is None:
        return []
    groups: dict[tuple[str, ...], list[tuple[Levels, Levels, list[int]]]] = {}
    for pair in find_pairs(study, curves):
        groups.setdefault(tuple(name_of(cell, study.replicate) for cell in pair[:2]), []).append(pair)
    found = []
    for (change, baseline), sizes in groups.items():
        seeds = [seed for seed in sizes[0][2] if all(seed in shared for _, _, shared in sizes)]
        if len(seeds) < 2 or len(sizes) < len(study.grid[str(study.replicate)]):  # unfinished
            continue
        sides = [levels for levels, _, _ in sizes], [baseline for _, baseline, _ in sizes]
        for i in range(len(study.score_at)):
            own, base = ([[curves[cell, seed][i] for cell in cells] for seed in seeds] for cells in sides)
            losses, reference = (
                np.array([[row.held_out_loss for row in line] for line in cells]) for cells in (own, base)
            )
            samples = base[0][0].steps * base[0][0].settings.training.global_batch_size
            parameters = np.array([row.parameters for row in base[0]])
            found.append(Trend(change, baseline, samples, parameters, losses, reference))
    return found
