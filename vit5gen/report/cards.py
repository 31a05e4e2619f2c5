"""What a page tells of cards: evaluations with their errors and floors, comparisons with their verdicts, samplings."""

import tempfile
from collections.abc import Mapping
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vit5gen.report.chart import shown
from vit5gen.report.page import code, data_uri, folded, section, table
from vit5gen.report.pictures import save_small
from vit5gen.system.errors import UserError

Card = dict[str, Any]
_LARGE = {"metrics", "models", "markdown", "differences", "verdicts", "summary", "warnings", "closest", "a", "b"}
_KINDS = {"metrics": "evaluation", "verdicts": "comparison", "closest": "copies", "checkpoint_sha256": "sampling"}


def kind_of(path: Path, card: Card) -> str:
    """Return which command wrote a card; raise `UserError` for another file."""
    for key, kind in _KINDS.items():
        if key in card:
            return kind
    expected = "expected a card of evaluate, compare, copies or sample, a run, or the folder of a study"
    raise UserError(f"{path}: is not a card; {expected}")


def describe_cards(cards: Mapping[Path, Card]) -> list[str]:
    """Return the sections of cards; raise `UserError` for one whose values have other types."""
    scored = {path: card for path, card in cards.items() if kind_of(path, card) == "evaluation"}
    parts = [section("Evaluation cards side by side", _side_by_side(scored))] if len(scored) > 1 else []
    for path, card in cards.items():
        try:
            kind = kind_of(path, card)
            body = {"evaluation": _scores, "comparison": _comparison, "copies": _copies, "sampling": _sampling}[kind](
                card
            )
        except (LookupError, TypeError, ValueError, AttributeError) as error:
            raise UserError(f"card {path}: not as vit5gen writes it ({error!r}); make it again") from error
        warnings = "".join(f"<li>{escape(str(one))}</li>" for one in card.get("warnings", ()))
        rest = {key: value for key, value in card.items() if key not in _LARGE}
        settings = code(yaml.safe_dump(rest, sort_keys=False, allow_unicode=True))
        title = f"{kind.capitalize()}: {path}"
        listed = f'<ul class="warnings">{warnings}</ul>' if warnings else ""
        parts.append(section(title, body, listed, _picture(path, card), folded("settings", settings)))
    return parts


def _scores(card: Card) -> str:
    parts = []
    for model in card.get("models") or [{"metrics": card["metrics"]}]:
        rows = []
        for name, score in model["metrics"].items():
            first = score.get("runs", [score])[0]
            error, interval = score.get("deviation", score.get("standard_error")), score.get("interval")
            span = f"{shown(interval[0])} to {shown(interval[1])}" if interval else "–"
            told = [first.get("better", "–"), shown(first.get("n"))]
            rows.append([name, shown(score["value"]), shown(error), span, shown(first.get("floor")), *told])
        seeds = len(model.get("samples", [0]))
        what = "± deviation of seeds" if seeds > 1 else "± standard error"
        paths = [card["samples"][i]["path"] for i in model.get("samples", [0])]
        parts.append(f"<h3>{escape(', '.join(map(str, paths)))}</h3>")
        parts.append(table(["metric", "value", what, "95 % (jackknife)", "floor", "better", "N"], rows))
    return "".join(parts)


def _side_by_side(cards: Mapping[Path, Card]) -> str:
    names = dict.fromkeys(name for card in cards.values() for name in card["metrics"])
    rows = []
    for path, card in cards.items():
        cells = []
        for name in names:
            score = card["metrics"].get(name, {})
            error = score.get("deviation", score.get("standard_error"))
            cells.append(shown(score.get("value")) + (f" ± {shown(error)}" if error else ""))
        rows.append([str(path), *cells])
    return table(["card", *names], rows)


def _comparison(card: Card) -> str:
    rows = []
    for name, one in card["differences"].items():
        means = [sum(score["value"] for score in one[side]) / len(one[side]) for side in "ab"]
        low, high = one["interval"]
        span = f"{shown(one['difference'])} [{shown(low)}, {shown(high)}]"
        p, verdict = one["p_holm"], card["verdicts"][name].replace("better_", "better: ").replace(": a", ": A")
        rows.append([name, *map(shown, means), span, "–" if p is None else f"{p:.2g}", verdict.replace(": b", ": B")])
    head = ["score", "A", "B", "B - A [95 %]", "p (Holm)", "verdict"]
    sides = "".join(f"<br>{side}: {escape(str(card[side][0]['path']))}" for side in "ab" if card.get(side))
    return f'<p class="verdict">{escape(card["summary"])}{sides}</p>{table(head, rows)}'


def _copies(card: Card) -> str:
    rows = [[name, *map(shown, own.values())] for name, own in card["distances"].items()]
    told = f"{card['nearer_to_training']} samples are nearer to a training image than to a held-out one"
    chance = f"by chance {card['by_chance']:.1f}; {card['identical']} are equal to one, pixel by pixel"
    return (
        f"<p>{escape(f'{told}, {chance}.')}</p>{table(['distance to nearest', *card['distances']['training']], rows)}"
    )


def _sampling(card: Card) -> str:
    rows = [[key, str(value)] for key, value in card["settings"].items() if not isinstance(value, dict | list)]
    each = (card.get("network_evaluations") or {}).get("per_image")
    return table(["setting", "value"], [*rows, ["network evaluations per image", shown(each)]])


def _picture(path: Path, card: Card) -> str:
    """Return the picture that a card lies beside, if there is one."""
    beside = path.with_name(path.name.removesuffix(".card.json")) if path.name.endswith(".png.card.json") else None
    file = beside or path.with_suffix(".png")
    return shown_small(file, f"picture of {path}", card.get("attribution"))


def shown_small(file: Path, alt: str, attribution: str | None = None) -> str:
    """Return a figure of a PNG, made small; nothing where there is none."""
    if not file.is_file():
        return ""
    with tempfile.TemporaryDirectory() as folder, Image.open(file) as picture:
        small = Path(folder) / "small.webp"
        credit = attribution or picture.info.get("attribution")
        save_small(small, picture, credit)
        image = f'<img src="{data_uri(small)}" alt="{escape(alt)}">'
    return f'<figure class="picture"><div class="sheet">{image}</div><small>{escape(credit or "")}</small></figure>'
