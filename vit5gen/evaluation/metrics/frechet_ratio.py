"""FDr^6: Frechet distances in six spaces, each in proportion to that of real images."""

from dataclasses import replace

import numpy as np

from vit5gen.evaluation.distances import leave_one_out_distances, with_error
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, available, register_metric
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
        distances = [leave_one_out_distances(scan.moments[one], reference.moments[one]) for one in denominators]
        ratios = np.array(distances) / np.array([*denominators.values()])[:, None]
        scores = {"FDr^6": with_error(ratios.mean(axis=0).tolist(), scan.count) | {"notes": self.notes(reference)}}
        for (space, denominator), distance, ratio in zip(denominators.items(), distances, ratios, strict=True):
            score = with_error(ratio.tolist(), scan.count) | {"distance": distance[0], "denominator": denominator}
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
