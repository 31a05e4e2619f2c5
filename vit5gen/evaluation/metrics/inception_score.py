"""The Inception Score."""

from vit5gen.evaluation.metric import Extractor, Metric, Reference, Scan, Score, register_metric


@register_metric("is")
class InceptionScore(Metric):
    """ADM's Inception Score, in splits of consecutive samples."""

    needs = ("logits",)
    least = 1
    better = "higher"

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        assert scan.score is not None
        name = "IS" if extractor.metric == "FID" else f"IS-{extractor.name}"
        return {name: {"value": scan.score.value(), "n": scan.count, "split_size": scan.score.split_size}}
