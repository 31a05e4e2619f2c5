"""The Frechet distance of pooled features."""

from vit5gen.evaluation.distances import frechet_with_error
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("fid")
class Frechet(Metric):
    """FID with Inception, else the distance that the extractor names."""

    better = "lower"

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        score = frechet_with_error(scan.pooled, reference.pooled)
        # A floor takes long; of a part of a jackknife, which is one group, nobody asks for it.
        floor = reference.floor(scan.count) if len(scan.pooled.groups) > 1 else None
        return {extractor.metric: score | {"floor": floor}}
