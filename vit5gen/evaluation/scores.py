"""Every score of a set of samples against a reference, each with its error, or the reason why it cannot be had."""

from collections.abc import Callable, Sequence
from typing import Any

from scipy.stats import t as student_t

from vit5gen.evaluation.features import Extractor
from vit5gen.evaluation.metrics import FrechetReference, jackknife_error, kernel_distance, precision_recall
from vit5gen.evaluation.reference import Reference, Scan
from vit5gen.evaluation.statistics import FeatureStatistics, Grouped
from vit5gen.system.errors import UserError, choose

METRICS = ("fid", "sfid", "is", "pr", "kid")
NEIGHBOURS = 3
SUBSET_SIZE = 1000
_NEEDED = {"fid": 2, "sfid": 2, "is": 1, "pr": NEIGHBOURS + 1, "kid": 2}
CONFIDENCE = 0.95
RELIABLE_COUNT = 50_000

Score = dict[str, Any]


def available(
    metrics: Sequence[str] | None, reference: Reference, extractor: Extractor
) -> tuple[list[str], dict[str, str]]:
    """Return the metrics that reference and extractor allow, and the reasons against the others; before a long scan.

    ``metrics``: some of `METRICS`; `UserError` when one of these cannot be had. Default: all that can be had.
    """
    wanted = [choose("metrics", metric, METRICS) for metric in metrics or METRICS]
    skipped = {}
    for metric in wanted:
        obstacle = _obstacle(metric, reference, extractor)
        if obstacle is not None and metrics:
            raise UserError(f"metric {metric}: {obstacle}")
        if obstacle is not None:
            skipped[metric] = obstacle
    return [metric for metric in wanted if metric not in skipped], skipped


def scores(
    scan: Scan, reference: Reference, extractor: Extractor, metrics: Sequence[str], adm_fp16: bool = False
) -> dict[str, Score]:
    """Return the scores of ``metrics``, which must be `available`, by name.

    Raises `UserError` when there are fewer samples, or fewer images in the reference, than a metric needs.
    FID, sFID, IS, precision, recall and KID are names of Inception features alone; other extractors have their own.
    """
    found: dict[str, Score] = {}
    for metric in metrics:
        counts = {"samples": scan.count}
        if metric in ("pr", "kid") and reference.rows is not None:
            counts["reference images"] = len(reference.rows)
        for what, count in counts.items():
            if count < _NEEDED[metric]:
                raise UserError(f"metric {metric}: {count} {what}; needs at least {_NEEDED[metric]}; give more images")
        found |= _COMPUTE[metric](scan, reference, extractor, adm_fp16)
    return found


def frechet_report(generated: FeatureStatistics, reference: FrechetReference, floor: float | None) -> Score:
    """Return a Frechet distance with its count and its floor, the distance of as many real images, as one entry."""
    return {
        "value": reference.distance(generated.mean, generated.covariance),
        "n": generated.count,
        "floor": floor,
    }


def frechet_with_error(samples: Grouped, reference: FrechetReference) -> Score:
    """Return the Frechet distance with its jackknife standard error and interval.

    The error is that of the finite sample around the mean distance of samples of this size. It does not hold the bias
    that a finite sample has: compare distances at the same count only.
    """
    total = samples.total()
    score: Score = {"value": reference.distance(total.mean, total.covariance), "n": total.count}
    counts = [group.count for group in samples.groups if group.count]
    if len(counts) < 2 or total.count - max(counts) < 2:
        return score | {"standard_error": None, "interval": None}
    rest = samples.leave_one_out(total)
    error = jackknife_error(reference.distance(part.mean, part.covariance) for part in rest)
    margin = error * float(student_t.ppf((1 + CONFIDENCE) / 2, len(counts) - 1))
    return score | {"standard_error": error, "interval": [score["value"] - margin, score["value"] + margin]}


def _obstacle(metric: str, reference: Reference, extractor: Extractor) -> str | None:
    if metric == "sfid" and not extractor.spatial_dim:
        return f"extractor {extractor.name} has no spatial features; use inception"
    if metric == "sfid" and reference.spatial is None:
        return "the reference has no mu_s and sigma_s; use ADM's full reference file or images"
    if metric == "is" and not extractor.num_classes:
        return f"extractor {extractor.name} has no class scores; use inception"
    if metric in ("pr", "kid") and reference.rows is None:
        return "the reference has no images; use one with arr_0, a statistics file of ours or images"
    return None


def _fid(scan: Scan, reference: Reference, extractor: Extractor, adm_fp16: bool) -> dict[str, Score]:
    score = frechet_with_error(scan.pooled, reference.pooled)
    return {extractor.metric: score | {"floor": reference.floor(scan.count)}}


def _sfid(scan: Scan, reference: Reference, extractor: Extractor, adm_fp16: bool) -> dict[str, Score]:
    assert scan.spatial is not None
    assert reference.spatial is not None
    return {"sFID": frechet_with_error(scan.spatial, reference.spatial)}


def _inception_score(scan: Scan, reference: Reference, extractor: Extractor, adm_fp16: bool) -> dict[str, Score]:
    assert scan.score is not None
    return {"IS": {"value": scan.score.value(), "n": scan.count, "split_size": scan.score.split_size}}


def _precision_recall(scan: Scan, reference: Reference, extractor: Extractor, adm_fp16: bool) -> dict[str, Score]:
    assert reference.rows is not None
    rows = [part.to(extractor.device) for part in (reference.rows, scan.rows)]
    values = precision_recall(rows[0], rows[1], NEIGHBOURS, adm_fp16)
    settings = {"n": scan.count, "reference_n": len(reference.rows), "k": NEIGHBOURS, "adm_fp16": adm_fp16}
    suffix = "" if extractor.metric == "FID" else f"-{extractor.name}"
    return {
        f"{name}{suffix}": {"value": value} | settings
        for name, value in zip(("precision", "recall"), values, strict=True)
    }


def _kernel_distance(scan: Scan, reference: Reference, extractor: Extractor, adm_fp16: bool) -> dict[str, Score]:
    assert reference.rows is not None
    size = min(SUBSET_SIZE, len(reference.rows), len(scan.rows))
    value, error = kernel_distance(reference.rows, scan.rows, subset_size=size)
    name = "KID" if extractor.metric == "FID" else extractor.metric.replace("FD-", "KD-", 1)
    return {name: {"value": value, "n": scan.count, "standard_error": error, "subset_size": size}}


_COMPUTE: dict[str, Callable[[Scan, Reference, Extractor, bool], dict[str, Score]]] = {
    "fid": _fid,
    "sfid": _sfid,
    "is": _inception_score,
    "pr": _precision_recall,
    "kid": _kernel_distance,
}
