"""Paired differences between the cells of a study, with their uncertainty, and what they say together."""

import itertools
import math
from collections.abc import Collection
from dataclasses import dataclass, replace

import numpy as np

from vit5gen.evaluation.distances import CONFIDENCE
from vit5gen.evaluation.significance import FEWEST_SEEDS, Estimate, holm
from vit5gen.lab.study.plan import Row, StudyConfig

MEASURES = {"held_out_loss": ("held-out loss", 4), "distance": ("distance", 1)}  # name and digits in a table
SCORES = MEASURES | {"coverage": ("coverage", 3)}  # of runs that are scored at several steps
HIGHER = {"coverage"}  # is better
BUDGETS = {"steps": "steps", "training_flops": "FLOPs", "seconds": "seconds"}  # of a row, and as a table calls them
Levels = tuple[tuple[str, str], ...]  # of a cell: axis and level
Curves = dict[tuple[Levels, int], list[Row]]  # the rows of a run, by levels and seed


@dataclass(frozen=True)
class Difference:
    """What a cell has more of ``measure`` than its baseline cell, seed by seed; ``low``..``high`` is 95 % (Student).

    change: of both cells what is left without the level of `replicate`.  reference: the mean of the baseline cell over
    these seeds.
    corrected: the interval by Bonferroni over all cells that are compared with that one.
    budget, step: where runs are scored at several steps, both have spent as much as the baseline by this step.
    """

    cell: str
    baseline: str
    change: str
    measure: str
    budget: str
    step: int
    values: tuple[float, ...]
    low: float
    high: float
    corrected: tuple[float, float]
    reference: float
    p: float | None = None  # two-sided paired t-test, corrected over the study by Holm

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


def find_curves(study: StudyConfig, rows: list[Row]) -> Curves:
    """Return the runs that have all of their rows, which ``rows`` lists in the order of the steps."""
    curves: Curves = {}
    for row in rows:
        curves.setdefault((tuple(row.levels.items()), row.seed), []).append(row)
    return {key: own for key, own in curves.items() if len(own) == max(1, len(study.score_at))}


def find_pairs(study: StudyConfig, runs: Collection[tuple[Levels, int]]) -> list[tuple[Levels, Levels, list[int]]]:
    """Return the cells that are one level away from a baseline, each with that, and the seeds that both have.

    Runs without a partner are left out, and so is a cell with one pair.
    """
    found, seeds = [], sorted({seed for _, seed in runs})
    for levels in dict.fromkeys(levels for levels, _ in runs):
        for axis, level in study.baseline.items():
            reference = tuple((dict(levels) | {axis: level}).items())
            shared = [seed for seed in seeds if {(levels, seed), (reference, seed)} <= set(runs)]
            if levels != reference and len(shared) > 1:
                found.append((levels, reference, shared))
    return found


def name_of(levels: Levels, without: str | None = None) -> str:
    """Return the name of a cell, without the level of one axis."""
    return ", ".join(level for axis, level in levels if axis != without)


def find_differences(study: StudyConfig, rows: list[Row]) -> list[Difference]:
    """Return the differences of each measure; of runs scored at several steps, at each, for each budget.

    p is Holm's over all tests of one measure at one step, and None with fewer than five pairs.
    """
    curves, found, scored = find_curves(study, rows), list[Difference](), bool(study.score_at)
    measures = SCORES if scored and all(row.coverage is not None for row in rows) else MEASURES
    rivals = sum(len(study.grid[axis]) - 1 for axis in study.baseline)
    for budget, i, measure in itertools.product(BUDGETS if scored else [""], range(len(study.score_at) or 1), measures):
        family = []
        for levels, baseline, seeds in find_pairs(study, curves):
            own, base = ([curves[one, seed] for seed in seeds] for one in (levels, baseline))
            reference = [getattr(curve[i], measure) for curve in base]
            values = _spent_alike(own, base, i, budget, measure)
            pairs = [value - known for value, known in zip(values, reference, strict=True)]
            if math.isnan(sum(pairs)):
                continue
            one, what = Estimate.of_pairs(pairs), (measure, budget, base[0][i].steps)
            change = f"{name_of(levels, study.replicate)} - {name_of(baseline, study.replicate)}"
            names = name_of(levels), name_of(baseline), change
            wide, p = one.margin((1 - CONFIDENCE) / rivals), one.p if len(pairs) >= FEWEST_SEEDS else None
            corrected = one.difference - wide, one.difference + wide
            mean = float(np.mean(reference))
            family.append(Difference(*names, *what, tuple(pairs), *one.interval, corrected, mean, p))
        ps = holm([d.p for d in family])
        found += [replace(d, p=p) for d, p in zip(family, ps, strict=True)]
    return found


def _spent_alike(own: list[list[Row]], base: list[list[Row]], i: int, budget: str, measure: str) -> list[float]:
    """Return the measure of each seed of a cell when it had spent what its baseline had at score ``i``.

    What was spent is the median of the seeds, one of which may have shared its machine; it is linear between scores. A
    measure is linear in the log of the step, but NaN before the first score and after the last. Without a budget it is
    that of score ``i``.
    """
    values = [[getattr(row, measure) for row in curve] for curve in own]
    if not budget:
        return [curve[i] for curve in values]
    steps = [row.steps for row in own[0]]
    spent, limit = (np.median([[getattr(row, budget) for row in curve] for curve in one], 0) for one in (own, base))
    at = math.log(np.interp(limit[i], [0, *spent], [0, *steps], right=math.nan))
    logs = [math.log(step) for step in steps]
    return [float(np.interp(at, logs, curve, left=math.nan, right=math.nan)) for curve in values]


def find_verdicts(study: StudyConfig, found: list[Difference]) -> dict[tuple[str, str], str]:
    """Return by change and measure what the last step says at equal steps, where all levels of `replicate` agree.

    Runs that are still to come leave it open.
    """
    signs: dict[tuple[str, str], list[int]] = {}
    for d in found:
        if d.budget == "steps" and d.step == study.score_at[-1] and len(d.values) >= len(study.seeds):
            better = ((d.corrected[1] < 0) - (d.corrected[0] > 0)) * (-1 if d.measure in HIGHER else 1)
            signs.setdefault((d.change, d.measure), []).append(better)
    count = len(study.grid[study.replicate]) if study.replicate else 1
    words = {1: "recommended", -1: "worse", 0: "not shown here"}
    return {
        key: "unfinished" if len(own) < count else words[own[0] if len(set(own)) == 1 else 0]
        for key, own in signs.items()
    }
