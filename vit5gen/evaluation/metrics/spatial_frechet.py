"""The Frechet distance of spatial features."""

from vit5gen.evaluation.distances import frechet_with_error
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("sfid")
class SpatialFrechet(Metric):
    """sFID: of 7 channels of Inception's mixed_6 at every position."""

    needs = ("spatial",)
    better = "lower"

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        name = "sFID" if extractor.metric == "FID" else f"sFID-{extractor.name}"
        return {name: frechet_with_error(scan.moments["spatial"], reference.moments["spatial"])}
