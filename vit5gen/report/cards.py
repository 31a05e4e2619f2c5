"""The part of a page on cards: evaluations with errors and floors, comparisons with verdicts, and what drew samples."""

import tempfile
from html import escape
from pathlib import Path
from typing import Any

import yaml
from PIL import Image

from vit5gen.report.chart import shown
from vit5gen.report.page import code, data_uri, folded, section, table
from vit5gen.report.run_facts import with_error
from vit5gen.report.runs import bullets, picture
from vit5gen.report.small_pictures import save_small
from vit5gen.system.errors import UserError

Card = dict[str, Any]
_KINDS = {"metrics": "evaluation", "verdicts": "comparison", "closest": "copies", "checkpoint_sha256": "sampling"}
_SHOWN = {"metrics", "models", "markdown", "differences", "verdicts", "summary", "warnings", "a", "b"}


def describe_card(path: Path, card: Card) -> str:
    """Return the section of a card; raise `UserError` for what is not one."""
    kind = next((kind for key, kind in _KINDS.items() if key in card), None)
    if kind is None:
        expected = "expected a card of evaluate, compare, copies or sample, a run, or the folder of a study"
        raise UserError(f"{path}: is not a card; {expected}")
    body = _scores(card) if kind == "evaluation" else _comparison(card) if kind == "comparison" else ""
    settings = yaml.safe_dump({key: value for key, value in card.items() if key not in _SHOWN}, sort_keys=False)
    warnings = bullets(map(str, card.get("warnings", ())))
    image = Path(str(path).removesuffix(".card.json")) if ".png." in path.name else path.with_suffix(".png")
    told = small_picture(image, f"picture of {path}", card.get("attribution"))
    return section(f"{kind.capitalize()}: {path}", body, warnings, told, folded("settings", code(settings)))


def _scores(card: Card) -> str:
    rows = []
    for model in card.get("models") or [{"metrics": card["metrics"], "samples": [0]}]:
        name = ", ".join(str(card["samples"][i]["path"]) for i in model["samples"])
        for metric, score in model["metrics"].items():
            first = score.get("runs", [score])[0]
            span = " to ".join(map(shown, score["interval"])) if score.get("interval") else "–"
            told = [shown(first.get("floor")), first.get("better", "–"), shown(first.get("n"))]
            rows.append([name, metric, with_error(score), span, *told])
    return table(["samples", "metric", "value ± error", "95 % (jackknife)", "floor", "better", "N"], rows)


def _comparison(card: Card) -> str:
    rows, words = [], {"better_a": "A is better", "better_b": "B is better"}
    for name, one in card["differences"].items():
        means = [shown(sum(score["value"] for score in one[side]) / len(one[side])) for side in "ab"]
        low, high = map(shown, one["interval"])
        p = "–" if one["p_holm"] is None else f"{one['p_holm']:.2g}"
        verdict = words.get(card["verdicts"][name], "undecided")
        rows.append([name, *means, f"{shown(one['difference'])} [{low}, {high}]", p, verdict])
    sides = [f"{side.upper()}: {card[side][0]['path']}" for side in "ab"]
    head = ["score", *sides, "B - A [95 %]", "p (Holm)", "verdict"]
    return f'<p class="verdict">{escape(card["summary"])}</p>{table(head, rows)}'


def small_picture(file: Path, what: str, attribution: str | None = None) -> str:
    """Return a figure of a PNG, made small; nothing where there is none."""
    if not file.is_file():
        return ""
    with tempfile.TemporaryDirectory() as folder, Image.open(file) as image:
        save_small(small := Path(folder, "small.webp"), image, attribution)
        return picture(f'<img src="{data_uri(small)}" alt="{escape(what)}">', escape(what), (), (), attribution)
