"""The kernel distance."""

from typing import Annotated

from pydantic import Field

from vit5gen.evaluation.distances import SUBSET_SIZE, kernel_distance
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("kid")
class KernelDistance(Metric):
    """KID with Inception, else the kernel distance in the extractor's features."""

    needs = ("rows",)
    better = "lower"

    def __init__(self, *, subset_size: Annotated[int, Field(ge=2)] = SUBSET_SIZE) -> None:
        self.subset_size = subset_size

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        assert reference.rows is not None
        size = min(self.subset_size, len(reference.rows), len(scan.rows))
        value, error = kernel_distance(reference.rows, scan.rows, subset_size=size)
        name = "KID" if extractor.metric == "FID" else extractor.metric.replace("FD-", "KD-", 1)
        return {name: {"value": value, "n": scan.count, "standard_error": error, "subset_size": size}}
