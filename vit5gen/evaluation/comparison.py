"""Is A better than B? The scores of two sets of images, what their differences are worth, and a verdict in words."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit5gen.config import load_recorded
from vit5gen.evaluation.distances import CONFIDENCE
from vit5gen.evaluation.evaluation_card import describe, drawn
from vit5gen.evaluation.features import Extractor
from vit5gen.evaluation.metric import Metric, Score, available, scores
from vit5gen.evaluation.reference import Reference, Scan, scan
from vit5gen.evaluation.samples import Samples, indices_of
from vit5gen.evaluation.significance import FEWEST_SEEDS, Estimate, holm
from vit5gen.evaluation.statistics import GROUPS
from vit5gen.generation.find_pipeline import has_begun
from vit5gen.generation.grid import save_pairs, with_attribution
from vit5gen.section import Plug
from vit5gen.system.distributed import is_main
from vit5gen.system.errors import UserError

_SHOWN = 12  # pairs in the picture
# With the number of images: noise and label of each.
_FIXES_NOISE = ("seed", "labels", "classes", "resolution", "shuffle")

# Of a hundred random subsets: slow, and a jackknife of more images than a subset has mistakes their draw for an error.
_ON_REQUEST = {"kid": "22 times its random subsets take long; name it in --metrics"}
# Each score more costs all others power in Holm's correction.
_ON_REQUEST |= {"dc": "they tell much the same as precision and recall; name it in --metrics"}

Kept = tuple[dict[str, Any], Scan]  # an evaluation card, and the scan that its groups give


@dataclass(frozen=True)
class Side:
    """A set that was scored: its entry in a card, its scores, then those without each group, and its first images."""

    entry: dict[str, Any]
    scores: list[dict[str, Score]]
    mean: Tensor
    pictures: dict[int, Tensor]
    titles: Sequence[Any]

    def values(self, name: str) -> list[float]:
        return [found[name]["value"] for found in self.scores]

    @property
    def drawn(self) -> tuple[str | None, dict[str, Any]]:
        """The hash of the checkpoint that drew it, and the settings, as far as they are known."""
        return drawn(self.entry, self.entry["sampling"])


def pairs_of_runs(*paths: str) -> dict[int, tuple[str, str]]:
    """Return the runs in two folders, or of two patterns such as 'study/runs/vit5, seed *', by shared training seed.

    Empty where neither has runs. Raises `UserError` when two runs of a side share a seed, or the sides do not.
    """
    sides: list[dict[int, str]] = []
    for path in paths:
        folder, found = Path(path), dict[int, str]()
        inside = folder.iterdir() if folder.is_dir() else folder.parent.glob(folder.name) if "*" in path else []
        for run in sorted(filter(has_begun, inside)):
            seed = load_recorded(run / "config.yaml").training.seed
            if found.setdefault(seed, str(run)) != str(run):
                raise UserError(f"{run} and {found[seed]} have the same training seed, {seed}; keep one of them")
        sides.append(found)
    shared = sorted(sides[0].keys() & sides[1].keys())
    if any(sides) and len(shared) < 2:
        seeds = " and ".join(f"{path} has runs of seeds {sorted(own)}" for path, own in zip(paths, sides, strict=True))
        raise UserError(f"{seeds}; expected at least two training seeds that both have, or one run each")
    return {seed: (sides[0][seed], sides[1][seed]) for seed in shared}


def check_alike(paths: Sequence[str], sets: Sequence[Samples | Kept]) -> None:
    """Raise `UserError` unless A and B have enough images, equally many, and one protocol."""
    counts = [one.count if isinstance(one, Samples) else one[1].count for one in sets]
    protocols = [None if isinstance(one, Samples) else one[0]["protocol"]["name"] for one in sets]
    for what, (a, b) in (("images", counts), ("as protocol", protocols)):
        if a != b:
            advice = "evaluate both alike; fewer images score worse by their bias alone"
            raise UserError(f"{paths[0]} has {a} {what}, {paths[1]} has {b}; {advice}")
    if min(counts) < 2 * GROUPS:
        raise UserError(f"{counts[0]} images in {paths[0]}; expected at least {2 * GROUPS}, two for each group")


def metrics_to_compare(
    wanted: Sequence[Plug] | None, reference: Reference, extractor: Extractor, cards: bool
) -> tuple[dict[str, Metric], dict[str, str]]:
    """Return what `available` does, less what cannot be compared. cards: a set is given by its card alone."""
    metrics, skipped = available(wanted, reference, extractor)
    reasons = {}
    for name, metric in metrics.items():
        if metric.better is None:
            reasons[name] = "it does not tell what is better; set `better` in its class"
        elif cards and metric.keeps_rows:
            reasons[name] = "a card keeps no features of single images; give the samples instead"
        elif not wanted and name in _ON_REQUEST:
            reasons[name] = _ON_REQUEST[name]
    if reasons and (wanted or len(reasons) == len(metrics)):
        raise UserError("; ".join(f"metric {name}: {reason}" for name, reason in reasons.items()))
    return {name: metric for name, metric in metrics.items() if name not in reasons}, skipped | reasons


def score_side(
    images: Samples | Kept, reference: Reference, extractor: Extractor, metrics: Mapping[str, Metric], groups: bool
) -> Side | None:
    """Score a set, also without each of its ``groups``, in one pass that all processes share; None on all but one."""
    pictures: dict[int, Tensor] = {}
    if isinstance(images, Samples):
        rows = images.count if any(metric.keeps_rows for metric in metrics.values()) else 0
        try:
            chunks = _keep_first(images.watch(), pictures)
            found = scan(chunks, images.count, extractor, rows, row_labels=images.class_names)
        except UserError as error:
            raise UserError(f"{images.identity['path']}: {error}") from error
        entry, titles = describe(images, found, reference), images.labels
    else:
        (entry,), found, titles = images[0]["samples"], images[1], ()
    if not is_main():
        return None
    parts = chain([found], found.leave_one_out() if groups else ())
    scored = [scores(part, reference, extractor, metrics) for part in parts]
    return Side(entry, scored, found.pooled.total().mean, pictures, titles)


def _keep_first(
    chunks: Iterable[tuple[int | Tensor, Tensor]], kept: dict[int, Tensor]
) -> Iterable[tuple[int | Tensor, Tensor]]:
    for first, images in chunks:
        few = images[: _SHOWN - len(kept)]
        kept.update(zip(indices_of(first, len(images)).tolist(), few, strict=False))
        yield first, images


def pairing(a: Side, b: Side) -> tuple[bool, str]:
    """Return whether image i of both was drawn from the same noise and label, as their cards say, and why.

    Raises `UserError` when A and B have images of two sizes, or the same images.
    """
    if a.entry["size"] != b.entry["size"]:
        sizes = " and ".join(f"{one.entry['path']} has images of {one.entry['size']}" for one in (a, b))
        raise UserError(f"{sizes} (height, width); compare images of one size")
    if (a.drawn[0] and a.drawn == b.drawn) or torch.allclose(a.mean, b.mean, rtol=1e-9, atol=0):
        same = f"{a.entry['path']} and {b.entry['path']} are the same images"
        raise UserError(f"{same}: there is nothing to compare; give two sets")
    settings = [side.drawn[1] | {"shuffle": "shuffle" in side.entry.get("read", {})} for side in (a, b)]
    for key in _FIXES_NOISE:
        found = [one.get(key) for one in settings]
        if found[0] != found[1] or (key == "seed" and None in found):
            return False, f"two samples: {key} is {found[0]} for A, {found[1]} for B (None: no card tells it)"
    return True, f"pairs of equal noise and label, seed {settings[0]['seed']}"


def differences(a: Sequence[Side], b: Sequence[Side], paired: bool) -> dict[str, Any]:
    """Return the part of a card that tells how far B differs from A: ``differences`` and ``verdicts`` by score.

    Of several runs each the pairs of runs, else the groups of images give the error.
    """
    # The differences, all tested as one family.
    several, first, estimates = len(a) > 1, a[0].scores[0], []
    for name in first:
        values = [[side.values(name) for side in sides] for sides in (a, b)]
        pairs = [y[0] - x[0] for x, y in zip(*values, strict=True)]
        groups = (values[0][0][1:], values[1][0][1:])
        estimates.append(Estimate.of_pairs(pairs) if several else Estimate.of_groups(pairs[0], *groups, paired))
    tested = not several or len(a) >= FEWEST_SEEDS
    ps = holm([found.p if tested else None for found in estimates])

    # What each is worth.
    entries, verdicts = {}, {}
    for (name, score), found, p in zip(first.items(), estimates, ps, strict=True):
        b_is_better = (found.difference > 0) == (score["better"] == "higher")
        decided = p is not None and p <= 1 - CONFIDENCE
        verdicts[name] = ("better_b" if b_is_better else "better_a") if decided else "undecided"
        entry = {"better": score["better"], "difference": found.difference, "standard_error": found.error}
        entry |= {"degrees_of_freedom": found.freedom, "interval": found.interval, "p": found.p, "p_holm": p}
        entry |= {side: [one.scores[0][name] for one in own] for side, own in (("a", a), ("b", b))}
        entry["detectable"], entry["images_to_decide"] = found.detectable, None
        if several:
            entry["reason"] = "the error is that of training seeds, which more images do not make smaller"
        elif not found.difference:
            entry["reason"] = "there is no difference"
        elif p is None or found.p is None:
            entry["reason"] = "the difference is the same without any group of images, so that its error is not known"
        else:
            # At the level that Holm's correction left for this score: p_holm is 0.05 there.
            rivals = sum(one.p is not None and one.p >= found.p for one in estimates)
            level = (1 - CONFIDENCE) * min(found.p / p, 1 / rivals)
            entry["images_to_decide"] = max(2 * GROUPS, found.count_to_decide(a[0].entry["count"], level))
        entries[name] = entry
    return {"differences": entries, "verdicts": verdicts}


def summary(card: Mapping[str, Any]) -> str:
    """Return the verdict of a card in words."""
    # Who is better, by which scores, and by which nobody can tell.
    shown, parts = {name: _with_interval(entry) for name, entry in card["differences"].items()}, []
    for side in "ab":
        names = [name for name, verdict in card["verdicts"].items() if verdict == f"better_{side}"]
        parts += [f"{side.upper()} is better, {', '.join(f'{name} {shown[name]}' for name in names)}"] if names else []
    names = [name for name, verdict in card["verdicts"].items() if verdict == "undecided"]
    parts += [f"cannot tell at N = {card['count']:,}{': ' + ', '.join(names) if parts else ''}"] if names else []

    # What was compared, and what the interval does not cover.
    if seeds := card["pairing"]["training_seeds"]:
        few = f"; {len(seeds)} seeds are not tested, {FEWEST_SEEDS} are" if len(seeds) < FEWEST_SEEDS else ""
        return f"these two recipes, {len(seeds)} training seeds each: {'; '.join(parts)}{few}"
    trained = all(drawn(card[side][0], card[side][0]["sampling"])[0] for side in "ab")
    what = "checkpoints" if trained else "sets of images"
    return f"these two {what}: {'; '.join(parts)}; other training seeds are not covered"


def markdown(card: Mapping[str, Any]) -> list[str]:
    """Return a Markdown table with a row for each score."""
    head = ["score", "A", "B", "B - A [95 %]", "p (Holm)", "verdict", "N that decides it"]
    lines = [head, ["---"] * len(head)]
    for name, entry in card["differences"].items():
        means = [sum(score["value"] for score in entry[side]) / len(entry[side]) for side in "ab"]
        p, count = entry["p_holm"], entry["images_to_decide"]
        verdict = card["verdicts"][name].replace("better_a", "A is better").replace("better_b", "B is better")
        numbers = ["" if p is None else f"{p:.2g}", verdict, "" if count is None else f"{float(f'{count:.2g}'):,.0f}"]
        lines.append([name, *(f"{mean:.4g}" for mean in means), _with_interval(entry), *numbers])
    return [f"| {' | '.join(line)} |" for line in lines]


def _with_interval(entry: Mapping[str, Any]) -> str:
    low, high = entry["interval"]
    return f"{entry['difference']:+.3g} [{low:+.3g}, {high:+.3g}]"


def save_picture(path: Path, a: Side, b: Side, reason: str) -> bool:
    """Write images of A above those of B with equal noise and label; return whether there are any."""
    if shared := sorted(a.pictures.keys() & b.pictures.keys()):
        names = a.titles or b.titles or range(shared[-1] + 1)
        titles = [(name.name if isinstance(name := names[i], Path) else str(name), i, "") for i in shared]
        facts = [f"above A: {a.entry['path']}", f"below B: {b.entry['path']}", reason]
        attribution = next(filter(None, ((side.entry["sampling"] or {}).get("attribution") for side in (a, b))), None)
        settings = with_attribution({"a": a.entry, "b": b.entry}, attribution)
        save_pairs(path, [(a.pictures[i], b.pictures[i]) for i in shared], titles, facts, settings, stacked=True)
    return bool(shared)
