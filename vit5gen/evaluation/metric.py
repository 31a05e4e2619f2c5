"""The plug: what a metric declares; the registry of metrics; scores, or the reason why one is not available."""

from collections.abc import Mapping, Sequence
from typing import Any, Literal

from vit5gen.evaluation.features import Extractor
from vit5gen.evaluation.reference import Reference, Scan
from vit5gen.registry import Registry, missing, name_and_options
from vit5gen.section import Plug
from vit5gen.system.errors import UserError, listed

RELIABLE_COUNT = 50_000

Score = dict[str, Any]


class Metric:
    """Scores of samples against a reference, known by a name; its options are keyword-only arguments.

    needs: what it uses besides the moments, of "rows" (pooled features of both sets), "samples' rows" (of the samples
    alone), "row_labels" (classes of the rows of both sets), "spatial" features, "others" (all further spaces of the
    extractor), "logits" and "classes" (of the samples, all among the extractor's).  least: how few samples it takes,
    and where it needs rows also how few images of the reference.
    better: "lower" or "higher", for `vit5gen compare`, which leaves out a metric that does not tell.
    by_default: whether it is computed where no metric is named.  only_with: the extractor whose features define it.
    A method ``missing()`` may return what this machine lacks for it, each with how to get it.
    """

    needs: tuple[str, ...] = ()
    least: int = 2
    better: Literal["lower", "higher"] | None = None
    by_default: bool = True
    only_with: str | None = None

    @property
    def keeps_rows(self) -> bool:
        """Whether the pooled features of all samples are kept for it."""
        return not {"rows", "samples' rows"}.isdisjoint(self.needs)

    @classmethod
    def feature_bytes(cls, num_samples: int, num_references: int, dim: int) -> int:
        """Return what it keeps of features (N, dim) and (M, dim), beside sums whose size does not grow with N and M."""
        both = "rows" in cls.needs
        return 4 * dim * (num_samples * (both or "samples' rows" in cls.needs) + num_references * both)

    def notes(self, reference: Reference) -> list[str]:
        """Return what a reader of its scores has to know, for the warnings of a card."""
        return []

    def compute(self, scan: Scan, reference: Reference, extractor: Extractor) -> dict[str, Score]:
        """Return the scores by their names in a card, each with its ``value`` and the count ``n``."""
        raise NotImplementedError


METRICS: Registry[type[Metric]] = Registry("metrics", "vit5gen.metrics")
register_metric = METRICS.register


def by_default() -> list[str]:
    """Return the metrics that are computed where none is named, in the order of a card."""
    return [name for name in METRICS.registered() if METRICS.get(name).by_default]


def available(
    wanted: Sequence[Plug] | None,
    reference: Reference,
    extractor: Extractor,
    count: int | None = None,
    *,
    labelled: bool = False,
) -> tuple[dict[str, Metric], dict[str, str]]:
    """Return the metrics that reference and extractor allow, and the reasons against the others; before a long scan.

    ``wanted``: each ``NAME`` or ``{NAME: {option: value}}``, `UserError` when one is not available; by default all of
    this package that are, but for those that one has to name, of which there must be one, none of another extractor,
    and none of classes where the extractor names none.
    ``count``: of the samples, where it is known.  ``labelled``: their classes are known.
    """
    chosen: dict[str, Mapping[str, Any]] = {}
    for name, options in map(name_and_options, wanted or by_default()):
        if chosen.setdefault(name, options) != options:
            raise UserError(f"metric {name}: given twice, with options {chosen[name]} and {options}; give it once")
    metrics: dict[str, Metric] = {
        name: METRICS.build(name, options, f"metric {name}") for name, options in chosen.items()
    }
    if not wanted:
        metrics = {name: metric for name, metric in metrics.items() if metric.only_with in (None, extractor.name)}
    if not wanted and not extractor.classes:
        metrics = {name: metric for name, metric in metrics.items() if "classes" not in metric.needs}
    obstacles = {
        name: _obstacle(metric, reference, extractor, labelled) or _shortage(metric, reference, count)
        for name, metric in metrics.items()
    }
    skipped = {name: reason for name, reason in obstacles.items() if reason is not None}
    if skipped and (wanted or len(skipped) == len(metrics)):
        raise UserError("; ".join(f"metric {name}: {reason}" for name, reason in skipped.items()))
    return {name: metric for name, metric in metrics.items() if name not in skipped}, skipped


def scores(scan: Scan, reference: Reference, extractor: Extractor, metrics: Mapping[str, Metric]) -> dict[str, Score]:
    """Return the scores of metrics that are `available`, by name.

    Raises `UserError` when there are fewer samples, or fewer images in the reference, than a metric needs.
    FID, sFID, IS, KID and other plain names are of Inception features alone; other extractors have their own.
    """
    found: dict[str, Score] = {}
    for name, metric in metrics.items():
        if shortage := _shortage(metric, reference, scan.count):
            raise UserError(f"metric {name}: {shortage}")
        for score, result in metric.compute(scan, reference, extractor).items():
            found[score] = result | ({"better": metric.better} if metric.better else {})
    return found


def _shortage(metric: Metric, reference: Reference, count: int | None) -> str | None:
    """Return of what there is too little for a metric, and how many it needs."""
    counts = {"samples": count}
    if "rows" in metric.needs and reference.rows is not None:
        counts["reference images"] = len(reference.rows)
    for what, found in counts.items():
        if found is not None and found < metric.least:
            return f"{found} {what}; needs at least {metric.least}; give more images"
    return None


def _obstacle(metric: Metric, reference: Reference, extractor: Extractor, labelled: bool) -> str | None:
    """Return what a metric needs and the machine, the samples, the reference or the extractor lack."""
    needs = metric.needs
    for what, how in missing(metric).items():
        return f"it needs {what}; {how}"
    if metric.only_with and metric.only_with != extractor.name:
        return f"it is defined for features of {metric.only_with} alone, not of {extractor.name}; change --extractor"
    if "spatial" in needs and not extractor.spatial_dim:
        return f"extractor {extractor.name} has no spatial features; use inception"
    if "spatial" in needs and "spatial" not in reference.moments:
        return "the reference has no mu_s and sigma_s; use ADM's full reference file or images"
    if "others" in needs and (absent := extractor.others.keys() - reference.moments.keys()):
        advice = "give images, or what --save-statistics made of them with this extractor"
        return f"reference {reference.identity['path']} has no features of {listed(sorted(absent))}; {advice}"
    if "logits" in needs and not extractor.num_classes:
        return f"extractor {extractor.name} has no class scores; use inception"
    if "classes" in needs and not extractor.classes:
        return f"extractor {extractor.name} names no classes; use emoji-judge or fashion-judge"
    if "classes" in needs and not labelled:
        return f"the samples' classes are unknown, or not all among {listed(extractor.classes)}"
    if "rows" in needs and reference.rows is None:
        return "the reference has no images; use one with arr_0, a statistics file of vit5gen, or images"
    if "row_labels" in needs and not reference.row_labels:
        return "the reference has no classes; use class folders, an npz with arr_1, or a configuration"
    return None
