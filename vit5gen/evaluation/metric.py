"""The plug: what a metric tells of itself, and the registry of metrics."""

from typing import Any

from vit5gen.evaluation.features import Extractor
from vit5gen.evaluation.reference import Reference, Scan
from vit5gen.registry import Registry

Score = dict[str, Any]


class Metric:
    """Scores of samples against a reference, known by a name; its options are keyword-only arguments.

    needs: what it computes from beside the moments, of "rows" (pooled features of both sets), "spatial" features and
    "logits".  least: how few samples it takes, and where it needs rows also how few images of the reference.
    """

    needs: tuple[str, ...] = ()
    least: int = 2

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        """Return the scores by their names in a card, each with its ``value`` and the count ``n``."""
        raise NotImplementedError


METRICS: Registry[type[Metric]] = Registry("metrics", "vit5gen.metrics")
register_metric = METRICS.register
