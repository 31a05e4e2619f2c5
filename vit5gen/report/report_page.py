"""A page of whatever is given: runs, cards and studies."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from html import escape
from pathlib import Path
from typing import Any

from vit5gen.report.cards import describe_card
from vit5gen.report.page import build_page
from vit5gen.report.run_facts import RunFacts
from vit5gen.report.runs import describe_runs
from vit5gen.report.studies import describe_study
from vit5gen.system.errors import UserError


def build_report(
    runs: Sequence[RunFacts], cards: Mapping[Path, dict[str, Any]] | None = None, studies: Sequence[Path] = ()
) -> str:
    """Return the HTML of a page; raise `UserError` for files whose values are not as this package writes them."""
    parts, data = list[str](), dict[str, Any]()
    with _as_written(" and ".join(str(run.path) for run in runs)):
        parts, data = describe_runs(runs) if runs else (parts, {"charts": {}})
    for path, card in (cards or {}).items():
        with _as_written(path):
            parts.append(describe_card(path, card))
    for path in studies:
        with _as_written(path):
            parts.append(describe_study(path))

    # The title, and the whole.
    given = [*(run.path for run in runs), *(cards or {}), *studies]
    title = (given[0].resolve().name or str(given[0])) if len(given) == 1 else f"{len(given)} compared"
    told = "".join(f"<p>{escape(str(path))}</p>" for path in given)
    head = f'<header><div><h1>{escape(title)}</h1>{told}</div><button id="theme" hidden>light / dark</button></header>'
    return build_page(title, [head, "<main>", *parts, "</main>"], data)


@contextmanager
def _as_written(path: object) -> Iterator[None]:
    try:
        yield
    except UserError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, OSError) as error:
        raise UserError(f"{path}: not as vit5gen writes it ({error!r}); restore it, or make it again") from error
