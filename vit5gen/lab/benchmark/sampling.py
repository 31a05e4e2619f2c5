"""The cheapest sampler that is as good as the published ones, on a model that was trained here."""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, partial

import torch

from vit5gen.config import load_recorded
from vit5gen.evaluation import load_extractor
from vit5gen.evaluation.distances import jackknife_error
from vit5gen.evaluation.statistics import Grouped
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.many import SamplingJob, generate
from vit5gen.lab.benchmark.engine import Row, Setting, race, row
from vit5gen.training.reference_moments import build_reference
from vit5gen.training.run_folder import RunFolder

PUBLISHED = ("sde-euler", "ode-euler")
# In the order of their network evaluations, of which SiT's Heun for the SDE takes one more for its last step.
CANDIDATES = [
    (sampler, evaluations // per_step)
    for evaluations in (6, 8, 10, 12, 16, 20, 24, 30, 40, 50, 100)
    for sampler, per_step in (("ode-ab2", 1), ("ode-heun", 2), ("sde-heun", 2))
]
FEWEST_IMAGES = 3  # of a run: a jackknife leaves one out, and two have a covariance


@dataclass(frozen=True)
class Score:
    """A Frechet distance, what it is without each group of images, and the network evaluations of an image."""

    distance: float
    without_group: tuple[float, ...]
    evaluations: int


def no_worse(ours: Score, theirs: Score) -> bool:
    """Tell whether our distance is not above theirs by more than one standard error of the difference.

    Images of equal index start from equal noise, so the error is a jackknife of the difference itself.
    """
    differences = [a - b for a, b in zip(ours.without_group, theirs.without_group, strict=True)]
    return ours.distance - theirs.distance <= jackknife_error(differences)


def rows(setting: Setting) -> Iterator[Row]:
    """Compare network evaluations and time of the first candidate that is `no_worse` than 250 published steps."""
    if setting.run is None:
        return
    # The model, and what its images are compared with.
    sizes, config, pipe = setting.sizes, load_recorded(RunFolder(setting.run).config), load_pipeline(setting.run)
    extractor = load_extractor(config.evaluation.extractor)
    reference = build_reference(config, extractor)
    labels = reference.labels[: sizes.drawn_images]
    if len(labels) < FEWEST_IMAGES:
        reason = f"{setting.run} scores {len(labels)} images; expected at least {FEWEST_IMAGES}"
        setting.note(f"sampling: skipped because {reason}")
        return

    # How a sampler is judged: the same images from the same noise, drawn once and remembered.
    def job(sampler: str, steps: int, count: int) -> SamplingJob:
        settings = config.sampling.model_copy(update={"sampler": sampler, "num_inference_steps": steps})
        return SamplingJob(labels[:count], config.evaluation.seed, config.evaluation.batch_size, settings)

    def draw(sampler: str, steps: int) -> None:
        list(generate(pipe, job(sampler, steps, sizes.batch)))

    @cache
    def score(sampler: str, steps: int) -> Score:
        groups = Grouped(extractor.dim)
        for indices, images in generate(pipe, job(sampler, steps, len(labels))):
            groups.update(extractor(images).pooled, torch.tensor(indices))
        parts = (total := groups.total()), *groups.leave_one_out(total)
        distance, *rest = (reference.distance.distance(part.mean, part.covariance) for part in parts)
        return Score(distance, tuple(rest), pipe.num_evaluations)

    # Against each published sampler, the cheapest of ours that is no worse: its evaluations, then its time.
    for sampler in PUBLISHED:
        peer, published = f"{sampler}-{sizes.published_steps}", (sampler, sizes.published_steps)
        theirs = score(*published)
        chosen = next((one for one in CANDIDATES if no_worse(score(*one), theirs)), None)
        if chosen is None:
            setting.note(f"sampling: no candidate is as good as {peer}, whose distance is {theirs.distance:.5g}")
            continue
        name, ours = "{}-{}".format(*chosen), score(*chosen)
        facts = {"images": len(labels), "our distance": ours.distance, "peer's distance": theirs.distance}
        yield row("evaluations", name, peer, [(ours.evaluations, theirs.evaluations)], facts, "evaluations")
        yield row("fp32", name, peer, race(partial(draw, *chosen), partial(draw, *published), sizes), facts)
