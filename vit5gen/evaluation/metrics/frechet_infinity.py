"""The Frechet distance of infinitely many samples."""

from typing import Annotated

from pydantic import Field

from vit5gen.evaluation.distances import SIZES, frechet_at_infinity
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("fd-infinity")
class FrechetInfinity(Metric):
    """The distance that 15 sizes from ``smallest`` to all samples point to, which is free of their bias."""

    needs = ("samples' rows",)
    better = "lower"
    by_default = False  # 15 distances

    def __init__(self, *, smallest: Annotated[int, Field(ge=2)] = 5000) -> None:
        self.smallest, self.least = smallest, smallest + SIZES - 1

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        value, distances = frechet_at_infinity(reference.pooled, scan.rows, self.smallest)
        settings = {"n": scan.count, "smallest": self.smallest, "distances": distances}
        return {f"{extractor.metric}-infinity": {"value": value} | settings}
