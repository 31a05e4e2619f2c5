"""CMMD."""

from vit5gen.evaluation.distances import gaussian_discrepancy
from vit5gen.evaluation.extractors.timm_space import SPACES
from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("cmmd")
class ClipDiscrepancy(Metric):
    """CMMD: how far CLIP's features differ, by a Gaussian kernel; it assumes no Gaussian features."""

    needs = ("rows",)
    better = "lower"
    by_default = False
    only_with = SPACES["clip"].name

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        assert reference.rows is not None
        value = gaussian_discrepancy(reference.rows.to(extractor.device), scan.rows.to(extractor.device))
        return {"CMMD": {"value": value, "n": scan.count, "reference_n": len(reference.rows)}}
