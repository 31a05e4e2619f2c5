"""FDr^6: Frechet distances in six spaces, each in proportion to that of real images."""

from dataclasses import replace
from itertools import chain

import torch
from scipy.stats import t as student_t
from torch import Tensor

from vit5gen.evaluation.distances import CONFIDENCE, FrechetReference, jackknife_error
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, available, register_metric
from vit5gen.evaluation.statistics import Grouped
from vit5gen.system.errors import UserError

# Distances of ImageNet's validation images to its training images at 256 x 256, by the names of moments.
PUBLISHED = {"pooled": 1.68, "ConvNeXtV2": 56.87, "DINOv2": 14.19, "MAE": 0.04, "SigLIP2": 0.60, "CLIP": 5.60}
_ROUNDING = 1e-6  # of a variance, more than the distance of a set to itself


@register_metric("fdr6")
class FrechetRatio(Metric):
    """The mean over six spaces of FD(samples, training) / FD(validation, training); see Yang et al. (2026).

    Where the reference knows no `with_denominators`, those of ImageNet are the published ones.
    """

    needs = ("others",)
    better = "lower"
    only_with = "FDr6"

    def notes(self, reference: Reference) -> list[str]:
        of_imagenet = "the published denominators hold for ImageNet's training and validation images alone"
        advice = f"{of_imagenet}, and MAE's, 0.04, has a single digit; give --denominators VALIDATION"
        return ["not verified against a published value", *([] if reference.denominators else [advice])]

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        denominators = reference.denominators or PUBLISHED
        distances = torch.stack([_distances(scan.moments[one], reference.moments[one]) for one in denominators])
        ratios = distances / torch.tensor([*denominators.values()], dtype=torch.float64)[:, None]
        scores = {"FDr^6": _score(ratios.mean(dim=0)) | {"n": scan.count, "notes": self.notes(reference)}}
        for (space, denominator), distance, ratio in zip(denominators.items(), distances, ratios, strict=True):
            score = _score(ratio) | {"n": scan.count, "distance": float(distance[0]), "denominator": denominator}
            scores[f"FDr-{_shown(space)}"] = score
        return scores


def with_denominators(reference: Reference, validation: Reference, extractor: Extractor) -> Reference:
    """Return the reference with the distances of validation images to it; its identity records them and the images.

    Raises `UserError` where either lacks a space, or where they do not differ in one.
    """
    for one in (reference, validation):
        available(["fdr6"], one, extractor)
    found = {}
    for space in PUBLISHED:
        real = validation.moments[space]
        found[space] = reference.moments[space].distance(real.mean, real.covariance)
        if not found[space] > _ROUNDING * float(real.covariance.trace()):
            problem = f"their distance to the reference in {_shown(space)} is {found[space]:.3g}, expected more"
            raise UserError(f"--denominators {validation.identity['path']}: {problem}; give other images than its own")
    record = validation.identity | {"count": validation.count, "distances": found}
    return replace(reference, denominators=found, identity=reference.identity | {"denominators": record})


def _shown(space: str) -> str:
    return "Inception" if space == "pooled" else space


def _distances(samples: Grouped, reference: FrechetReference) -> Tensor:
    """Return the distance of all samples and, where an error can be told, those without each group ``(1 + G,)``."""
    total, counts = samples.total(), [group.count for group in samples.groups if group.count]
    told = len(counts) > 1 and total.count - max(counts) > 1
    parts = chain([total], samples.leave_one_out(total) if told else ())
    return torch.tensor([reference.distance(part.mean, part.covariance) for part in parts], dtype=torch.float64)


def _score(values: Tensor) -> Score:
    """Return the first value with the jackknife error that the others, without each group, give."""
    value, *rest = values.tolist()
    if not rest:
        return {"value": value, "standard_error": None, "interval": None}
    error = jackknife_error(rest)
    margin = error * float(student_t.ppf((1 + CONFIDENCE) / 2, len(rest) - 1))
    return {"value": value, "standard_error": error, "interval": [value - margin, value + margin]}
