"""A page of whatever is given: runs, cards and studies."""

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any

from vit5gen.report.cards import describe_cards
from vit5gen.report.page import build_page
from vit5gen.report.runs import RunFacts, describe_runs
from vit5gen.report.studies import describe_study


def build_report(
    runs: Sequence[RunFacts], cards: Mapping[Path, dict[str, Any]] | None = None, studies: Sequence[Path] = ()
) -> str:
    """Return the HTML of a page; raise `UserError` for a card or a study that cannot be read."""
    parts, data = describe_runs(runs) if runs else ([], {"runs": [], "charts": {}, "steps": []})
    parts = [*parts, *describe_cards(cards or {}), *map(describe_study, studies)]
    given = [*(run.path for run in runs), *(cards or {}), *studies]
    title = (given[0].resolve().name or str(given[0])) if len(given) == 1 else f"{len(given)} compared"
    told = "".join(f"<p>{escape(str(path))}</p>" for path in given)
    head = f'<header><div><h1>{escape(title)}</h1>{told}</div><button id="theme" hidden>light / dark</button></header>'
    return build_page(title, [head, "<main>", *parts, "</main>"], data)
