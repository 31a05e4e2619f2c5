"""Improved precision and recall."""

from typing import Annotated

from pydantic import Field

from vit5gen.evaluation.distances import NEIGHBOURS, precision_recall
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("pr")
class PrecisionRecall(Metric):
    """Precision and recall by the ``k``-th nearest neighbour; ``adm_fp16`` rounds distances as ADM does."""

    needs = ("rows",)
    better = "higher"

    def __init__(self, *, k: Annotated[int, Field(ge=1)] = NEIGHBOURS, adm_fp16: bool = False) -> None:
        self.k, self.adm_fp16, self.least = k, adm_fp16, k + 1

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        assert reference.rows is not None
        rows = [part.to(extractor.device) for part in (reference.rows, scan.rows)]
        values = precision_recall(rows[0], rows[1], self.k, self.adm_fp16)
        settings = {"n": scan.count, "reference_n": len(reference.rows), "k": self.k, "adm_fp16": self.adm_fp16}
        suffix = "" if extractor.metric == "FID" else f"-{extractor.name}"
        by_name = zip(("precision", "recall"), values, strict=True)
        return {f"{name}{suffix}": {"value": value} | settings for name, value in by_name}
