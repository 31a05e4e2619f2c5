"""Density and coverage."""

from typing import Annotated

from pydantic import Field

from vit5gen.evaluation.distances import COVERAGE_NEIGHBOURS, density_coverage
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("dc")
class DensityCoverage(Metric):
    """Density and coverage by the ``k``-th nearest real neighbour; coverage grows with the number of samples."""

    needs = ("rows",)
    better = "higher"

    def __init__(self, *, k: Annotated[int, Field(ge=1)] = COVERAGE_NEIGHBOURS) -> None:
        self.k, self.least = k, k + 1

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        assert reference.rows is not None
        values = density_coverage(reference.rows.to(extractor.device), scan.rows.to(extractor.device), self.k)
        settings = {"n": scan.count, "reference_n": len(reference.rows), "k": self.k}
        suffix = "" if extractor.metric == "FID" else f"-{extractor.name}"
        by_name = zip(("density", "coverage"), values, strict=True)
        return {f"{name}{suffix}": {"value": value} | settings for name, value in by_name}
