"""Every score of a set of samples against a reference, each with its error, or the reason why it cannot be had."""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from vit5gen.evaluation.features import Extractor
from vit5gen.evaluation.metric import METRICS, Metric, Score
from vit5gen.evaluation.reference import Reference, Scan
from vit5gen.system.errors import UserError, choose

RELIABLE_COUNT = 50_000


def available(
    metrics: Sequence[str] | None, reference: Reference, extractor: Extractor
) -> tuple[list[str], dict[str, str]]:
    """Return the metrics that reference and extractor allow, and the reasons against the others; before a long scan.

    ``metrics``: names of some; `UserError` when one of these cannot be had. Default: all of this package that can.
    """
    wanted = [choose("metrics", metric, METRICS.names()) for metric in metrics or METRICS.registered()]
    skipped = {}
    for metric in wanted:
        obstacle = _obstacle(METRICS.get(metric).needs, reference, extractor)
        if obstacle is not None and metrics:
            raise UserError(f"metric {metric}: {obstacle}")
        if obstacle is not None:
            skipped[metric] = obstacle
    return [metric for metric in wanted if metric not in skipped], skipped


def need_rows(metrics: Iterable[str]) -> bool:
    """Whether any of the metrics computes from rows of features, which a pass over the samples has to keep."""
    return any("rows" in METRICS.get(metric).needs for metric in metrics)


def scores(
    scan: Scan,
    reference: Reference,
    extractor: Extractor,
    metrics: Sequence[str],
    options: Mapping[str, Mapping[str, Any]] | None = None,
) -> dict[str, Score]:
    """Return the scores of ``metrics``, which must be `available`, by name; ``options`` of a metric by its name.

    Raises `UserError` when there are fewer samples, or fewer images in the reference, than a metric needs.
    FID, sFID, IS, precision, recall and KID are names of Inception features alone; other extractors have their own.
    """
    found: dict[str, Score] = {}
    for name in metrics:
        metric: Metric = METRICS.build(name, (options or {}).get(name, {}), f"metric {name}")
        counts = {"samples": scan.count}
        if "rows" in metric.needs and reference.rows is not None:
            counts["reference images"] = len(reference.rows)
        for what, count in counts.items():
            if count < metric.least:
                raise UserError(f"metric {name}: {count} {what}; needs at least {metric.least}; give more images")
        found |= metric.compute(scan, reference, extractor)
    return found


def _obstacle(needs: Iterable[str], reference: Reference, extractor: Extractor) -> str | None:
    """Return why the reference or the extractor lacks what a metric needs."""
    if "spatial" in needs and not extractor.spatial_dim:
        return f"extractor {extractor.name} has no spatial features; use inception"
    if "spatial" in needs and reference.spatial is None:
        return "the reference has no mu_s and sigma_s; use ADM's full reference file or images"
    if "logits" in needs and not extractor.num_classes:
        return f"extractor {extractor.name} has no class scores; use inception"
    if "rows" in needs and reference.rows is None:
        return "the reference has no images; use one with arr_0, a statistics file of ours or images"
    return None
