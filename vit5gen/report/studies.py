"""The part of a page on a study: its tables, and the picture of the differences between its cells."""

from pathlib import Path

from vit5gen.report.cards import small_picture
from vit5gen.report.page import section, table

ROWS, _TABLE, _PICTURE = "rows.jsonl", "table.md", "differences.png"  # as `vit5gen study` writes them


def describe_study(folder: Path) -> str:
    """Return the section of a study's folder."""
    runs = len((folder / ROWS).read_text(encoding="utf-8", errors="replace").splitlines())
    told = folder / _TABLE
    text = told.read_text(encoding="utf-8", errors="replace") if told.is_file() else ""
    tables = []
    for block in filter(str.strip, text.split("\n\n")):
        head, *rows = ([cell.strip() for cell in line.strip("| ").split(" | ")] for line in block.strip().splitlines())
        tables.append(table(head, rows[1:]))
    picture = small_picture(folder / _PICTURE, f"differences between the cells of {folder}, of every seed")
    return section(f"Study: {folder}", f"<p>{runs} runs</p>", *tables, picture)
