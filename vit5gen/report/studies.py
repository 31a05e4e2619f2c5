"""What a page tells of a study: every seed of every cell, the tables, and the picture of the differences."""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from vit5gen.report.cards import shown_small
from vit5gen.report.chart import shown
from vit5gen.report.page import Html, section, table
from vit5gen.system.errors import UserError

ROWS = "rows.jsonl"
_MEASURES = {"held_out_loss": "held-out loss", "distance": "distance"}
_WIDE, _HIGH = 300, 18  # of the dots of a cell


def describe_study(folder: Path) -> str:
    """Return the section of a study's folder; raise `UserError` where its rows cannot be read."""
    try:
        text = (folder / ROWS).read_text(encoding="utf-8")
        rows: list[dict[str, Any]] = [json.loads(line) for line in text.splitlines()]
        strips = [_strips(rows, measure) for measure in _MEASURES if rows and all(measure in row for row in rows)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise UserError(
            f"study {folder}: {ROWS} cannot be read ({error!r}); restore it, or run the study again"
        ) from error
    told = folder / "table.md"
    tables = _markdown_tables(told.read_text(encoding="utf-8", errors="replace")) if told.is_file() else []
    picture = shown_small(folder / "differences.png", f"differences between the cells of {folder}")
    return section(f"Study: {folder}", f"<p>{len(rows)} runs</p>", *strips, *tables, picture)


def _strips(rows: Sequence[dict[str, Any]], measure: str) -> str:
    """Return a table with the value of every seed of a cell as a dot, on one scale."""
    cells: dict[str, list[float]] = {}
    for row in rows:
        cells.setdefault(", ".join(row["levels"].values()), []).append(float(row[measure]))
    low, high = min(map(min, cells.values())), max(map(max, cells.values()))
    scale, lines = (_WIDE - 12) / ((high - low) or 1), []
    for name, values in cells.items():
        dots = "".join(f'<circle cx="{6 + (one - low) * scale:.1f}" cy="9" r="4"/>' for one in values)
        mean = f'<path d="M{6 + (fmean(values) - low) * scale:.1f} 1V17"/>'
        spread = f"{shown(fmean(values))}{f' ± {shown(stdev(values))}' if len(values) > 1 else ''}"
        label = f"{len(values)} seeds from {shown(min(values))} to {shown(max(values))}"
        drawing = (
            f'<svg class="strip c0" viewBox="0 0 {_WIDE} {_HIGH}" role="img" aria-label="{label}">{mean}{dots}</svg>'
        )
        lines.append([name, str(len(values)), spread, Html(drawing)])
    what = f"{shown(low)} to {shown(high)}, | is the mean"
    return table(
        [
            f"cell: {rows[0]['metric'] if measure == 'distance' else _MEASURES[measure]}",
            "seeds",
            "mean ± deviation",
            what,
        ],
        lines,
    )


def _markdown_tables(text: str) -> list[str]:
    blocks = [block.splitlines() for block in text.split("\n\n") if block.startswith("|")]
    cells = [[[cell.strip() for cell in line.strip("| ").split(" | ")] for line in lines] for lines in blocks]
    return [table(head, [row for row in rows if not set("".join(row)) <= set("-|: ")]) for head, *rows in cells]
