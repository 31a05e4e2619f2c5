"""Labelled grids of images: a title and a row for each class, real pictures beside them, and PNGs that tell of it."""

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from PIL import Image, ImageDraw
from PIL.PngImagePlugin import PngInfo

from vit5gen.generation.fonts import plain_font, write_as
from vit5gen.system.files import atomic

GAP = 4
_TILE = 96  # smaller images are enlarged (nearest neighbour, whole factors) to at least this side
_MAX_TITLE = 28  # characters
_COLUMNS, _PAIRS = 16, 6
_SHADE = (216, 216, 216)  # behind real pictures
_LINE = 20  # pixels, of text above
_FRAME = 120  # milliseconds of a film


class Axis(NamedTuple):
    """What changes along a side of a table, and its values."""

    name: str
    titles: Sequence[str]


def with_attribution(settings: Mapping[str, Any], attribution: str | None) -> dict[str, Any]:
    """Return the settings of a PNG, with the line that the licence of the training images wants, if there is one."""
    return {**settings, **({"attribution": attribution} if attribution else {})}


def save_png(image: Image.Image, path: str | Path, settings: Mapping[str, Any]) -> None:
    """Write a PNG atomically, with ``settings`` as JSON in its text "settings"; the same input gives the same bytes."""
    info = PngInfo()
    info.add_text("settings", json.dumps(settings, default=str))
    with atomic(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=info)


def tile(image: torch.Tensor) -> Image.Image:
    """Return an image (3, H, W) uint8, enlarged by the whole factor that makes it readable."""
    zoom = max(1, -(-_TILE // image.shape[-2]))
    picture = Image.fromarray(image.permute(1, 2, 0).contiguous().cpu().numpy())
    return picture.resize((zoom * picture.width, zoom * picture.height), Image.Resampling.NEAREST)


def save_grid(
    path: str | Path,
    images: torch.Tensor,
    labels: Sequence[int],
    names: Sequence[str],
    real: Mapping[int, Sequence[torch.Tensor]] | None = None,
    caption: Sequence[str] = (),
    settings: Mapping[str, Any] | None = None,
    below: Sequence[torch.Tensor] = (),
) -> None:
    """Write a PNG with a row for each distinct label, in order of first appearance, titled at its left.

    images (N, 3, H, W) uint8, labels and names one for each image; more than 16 of a label take further rows. Of one
    image each, labels without real pictures stand side by side, as many across as down. A name that no font here can
    show gives way to its label.  real: pictures (3, H, W) uint8 of a label, which begin its row.
    caption: facts, written above in as many lines as they need.  settings: of `save_png`.
    below: a picture (3, H, W) uint8 for each image, to stand below it.
    """
    for what in (labels, names, *([below] if below else [])):
        if len(what) != len(images):
            raise ValueError(f"labels: {len(what)} given, expected one for each of {len(images)} images")
    indices: dict[int, list[int]] = {}
    for i, label in enumerate(labels):
        indices.setdefault(label, []).append(i)
    rows = [
        (label, names[row[0]], start, row[start : start + _COLUMNS])
        for label, row in indices.items()
        for start in range(0, len(row), _COLUMNS)
    ]

    # The places: titles, the columns of real pictures, those of the images.
    width, height = tile(images[0]).size
    size = max(14, height // 7)
    titles = {label: write_as(_cut(name), str(label), size) for label, name, _, _ in rows}
    margin = 2 * GAP + max(int(font.getlength(text)) + 1 for text, font in titles.values())
    before = max(map(len, (real or {}).values()), default=0)
    left = margin + before * (width + GAP) + (2 * GAP if before else 0)
    right = left + max(len(row) for *_, row in rows) * (width + GAP)
    header, step = _LINE if before else 0, height + GAP + (height if below else 0)
    across = 1 if before or len(rows) < len(images) else math.ceil(math.sqrt(len(rows)))
    canvas, draw, top = _begin(caption, across * right, header + math.ceil(len(rows) / across) * step)

    # What is written above the columns, then the rows.
    if before:
        draw.rectangle((margin - GAP, top, left - 2 * GAP - 1, canvas.height), fill=_SHADE)
        for text, x in (("real", margin), ("generated", left)):
            draw.text((x, top), text, fill="black", font=plain_font(14))
    for r, (label, _, start, row) in enumerate(rows):
        x, y = r % across * right, top + header + r // across * step
        if not start:
            text, own = titles[label]
            begin, anchor = (GAP, "lm") if across == 1 else (margin - GAP, "rm")  # close to its picture, among others
            draw.text((x + begin, y + height // 2), text, fill="black", font=own, anchor=anchor)
            for c, picture in enumerate((real or {}).get(label, ())):
                canvas.paste(tile(picture), (margin + c * (width + GAP), y))
        for c, i in enumerate(row):
            canvas.paste(tile(images[i]), (x + left + c * (width + GAP), y))
            if below:
                canvas.paste(tile(below[i]), (x + left + c * (width + GAP), y + height))
    save_png(canvas, path, settings or {})


def save_pairs(
    path: str | Path,
    pairs: Sequence[tuple[torch.Tensor, torch.Tensor]],
    titles: Sequence[tuple[str, int, str]],
    caption: Sequence[str],
    settings: Mapping[str, Any],
    stacked: bool = False,
) -> None:
    """Write a PNG of pairs of images (3, H, W) uint8 side by side, or stacked; six pairs in a row, or twelve.

    titles: name, label and a remark of each pair, written above it; caption, settings: as of `save_grid`.
    """
    width, height = tile(pairs[0][0]).size
    wide, tall = (1, 2) if stacked else (2, 1)
    across, down = wide * width + 4 * GAP, tall * height + _LINE + 2 * GAP
    columns = min(_PAIRS * tall, len(pairs))
    canvas, draw, top = _begin(caption, GAP + columns * across, -(-len(pairs) // columns) * down)
    for i, (pair, (name, label, remark)) in enumerate(zip(pairs, titles, strict=True)):
        x, y = GAP + i % columns * across, top + i // columns * down
        text, own = write_as(f"{_cut(name, 14)} {remark}", f"{label} {remark}", 13)
        draw.text((x, y), text, fill="black", font=own)
        for k, image in enumerate(pair):
            canvas.paste(tile(image), (x + k * (wide - 1) * (width + 1), y + _LINE + k * (tall - 1) * (height + 1)))
    save_png(canvas, path, settings)


def save_sheet(path: str | Path, images: torch.Tensor, columns: Axis, rows: Axis, settings: Mapping[str, Any]) -> None:
    """Write a PNG of a table of images (R, C, N, 3, H, W) uint8 with titles on both axes; settings: of `save_png`.

    The N images of a cell stand side by side and above each other, about as many.
    """
    # The places: titles, which may be wider than a cell, and the cells.
    cells, size = [[_block(cell) for cell in row] for row in images], 14
    heads, sides = (
        [write_as(_cut(title), str(i), size) for i, title in enumerate(axis.titles)] for axis in (columns, rows)
    )
    names = [write_as(_cut(axis.name), "", size) for axis in (columns, rows)]
    width, height = cells[0][0].size
    step = 2 * GAP + max(width, *(math.ceil(font.getlength(text)) for text, font in heads))
    left = 2 * GAP + max(math.ceil(font.getlength(text)) for text, font in (*sides, names[1]))
    wide = left + max(step * len(heads), math.ceil(names[0][1].getlength(names[0][0])) + GAP)
    canvas, draw, top = _begin((), wide, 2 * _LINE + len(sides) * (height + 2 * GAP))

    # The names of the axes and their values, then the cells.
    for (text, font), at in zip(names, ((left, top), (GAP, top + _LINE)), strict=True):
        draw.text(at, text, fill="black", font=font)
    for c, (text, font) in enumerate(heads):
        draw.text((left + c * step, top + _LINE), text, fill="black", font=font)
    for r, (text, font) in enumerate(sides):
        y = top + 2 * _LINE + r * (height + 2 * GAP)
        draw.text((GAP, y + height // 2), text, fill="black", font=font, anchor="lm")
        for c, cell in enumerate(cells[r]):
            canvas.paste(cell, (left + c * step, y))
    save_png(canvas, path, settings)


def save_gif(path: str | Path, images: torch.Tensor, settings: Mapping[str, Any]) -> None:
    """Write a film whose frames are blocks of images (F, N, 3, H, W) uint8, again and again; settings: a comment."""
    first, *others = (_block(frame) for frame in images)
    with atomic(path) as temporary:
        comment, shown = json.dumps(settings, default=str), {"save_all": True, "duration": _FRAME, "loop": 0}
        first.save(temporary, format="GIF", append_images=others, comment=comment.encode(), **shown)


def _block(images: torch.Tensor) -> Image.Image:
    """Return images (N, 3, H, W) uint8 in rows, about as many as there are in a row."""
    tiles, across = [tile(image) for image in images], math.ceil(math.sqrt(len(images)))
    width, height = (side + GAP for side in tiles[0].size)
    canvas = Image.new("RGB", (across * width - GAP, -(-len(tiles) // across) * height - GAP), "white")
    for i, one in enumerate(tiles):
        canvas.paste(one, (i % across * width, i // across * height))
    return canvas


def _begin(facts: Sequence[str], width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw, int]:
    """Write facts, joined to lines as far as they fit, above ``height`` pixels; return where these begin, too."""
    font, lines = plain_font(14), list(facts[:1])
    for fact in facts[1:]:
        longer = f"{lines[-1]}  ·  {fact}"
        lines[-1:] = [longer] if font.getlength(longer) <= width - 2 * GAP else [lines[-1], fact]
    top = GAP + _LINE * len(lines)
    canvas = Image.new("RGB", (width, top + height), "white")
    draw = ImageDraw.Draw(canvas)
    for i, text in enumerate(lines):
        draw.text((GAP, GAP + _LINE * i), text, fill="black", font=font)
    return canvas, draw, top


def _cut(title: str, most: int = _MAX_TITLE) -> str:
    return title if len(title) <= most else title[: most - 3] + "..."
