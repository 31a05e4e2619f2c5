"""The Frechet distance of pooled features."""

from vit5gen.evaluation.distances import frechet_with_error
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("fid")
class Frechet(Metric):
    """FID with Inception, else the distance that the extractor names."""

    higher_is_better = False

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        score = frechet_with_error(scan.pooled, reference.pooled)
        return {extractor.metric: score | {"floor": reference.floor(scan.count)}}
