"""The frame of a page: one HTML file that needs no network; its style and script lie beside this module."""

import base64
import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from html import escape
from pathlib import Path
from typing import Any


def build_page(title: str, body: Iterable[str], data: Mapping[str, Any]) -> str:
    """Return the HTML of a page; ``data`` is what its script reads, once, as JSON without NaN.

    The page's own policy forbids every request, and every script but this one.
    """
    style, script = (Path(__file__).with_name(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'"
    told = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    inside = "\n".join(body)
    return (
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1"><link rel="icon" href="data:,">\n'
        f"<style>{style}</style></head>\n<body>\n{inside}\n"
        f'<script type="application/json" id="data">{told}</script>\n<script>{script}</script>\n</body></html>\n'
    )


def data_uri(picture: Path) -> str:
    """Return a picture, WebP or PNG, as a ``data:`` address."""
    return f"data:image/{picture.suffix[1:]};base64,{base64.b64encode(picture.read_bytes()).decode()}"


def section(title: str, *parts: str) -> str:
    """Return a section of what is not empty of the parts; nothing where all are."""
    return f"<section><h2>{escape(title)}</h2>{''.join(parts)}</section>" if any(parts) else ""


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table of text; a first column of names, then numbers."""
    heads = "".join(f'<th scope="col">{escape(cell)}</th>' for cell in head)
    lines = []
    for name, *cells in rows:
        inside = "".join(f"<td>{escape(cell)}</td>" for cell in cells)
        lines.append(f'<tr><th scope="row">{escape(name)}</th>{inside}</tr>')
    inside = f"<thead><tr>{heads}</tr></thead><tbody>{''.join(lines)}</tbody>"
    return f'<div class="scroll" tabindex="0"><table>{inside}</table></div>'


def folded(title: str, inside: str) -> str:
    """Return what a reader has to open."""
    return f"<details><summary>{escape(title)}</summary>{inside}</details>"


def code(text: str) -> str:
    """Return text to copy as it is."""
    return f'<div class="code"><pre tabindex="0">{escape(text)}</pre><button hidden>copy</button></div>'
