"""Labelled grids of images: a title and a row for each class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from vit5gen.system.files import atomic

_TILE = 64  # smaller images are enlarged (nearest neighbour, whole factors) to at least this side
_GAP = 4
_MAX_TITLE = 28  # characters
_COLUMNS = 16


def save_grid(path: str | Path, images: torch.Tensor, labels: Sequence[str]) -> None:
    """Write a PNG with a row for each distinct label, in order of first appearance, titled at its left.

    images (N, 3, H, W) uint8, labels one for each image; more than 16 of a label take further rows. The same input
    gives the same bytes.
    """
    if len(labels) != len(images):
        raise ValueError(f"labels: {len(labels)} given, expected one for each of {len(images)} images")
    indices: dict[str, list[int]] = {}
    for i, label in enumerate(labels):
        indices.setdefault(label, []).append(i)
    rows = [
        ("" if start else _cut(label), row[start : start + _COLUMNS])
        for label, row in indices.items()
        for start in range(0, len(row), _COLUMNS)
    ]
    height, width = images.shape[-2:]
    zoom = max(1, -(-_TILE // height))
    height, width = zoom * height, zoom * width
    font = ImageFont.load_default(size=max(14, height // 6))
    margin = 2 * _GAP + max(int(font.getlength(title)) + 1 for title, _ in rows)
    columns = max(len(row) for _, row in rows)
    size = (margin + columns * (width + _GAP), _GAP + len(rows) * (height + _GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for r, (title, row) in enumerate(rows):
        top = _GAP + r * (height + _GAP)
        draw.text((_GAP, top + height // 2), title, fill="black", font=font, anchor="lm")
        for c, i in enumerate(row):
            tile = Image.fromarray(images[i].permute(1, 2, 0).contiguous().cpu().numpy())
            canvas.paste(tile.resize((width, height), Image.Resampling.NEAREST), (margin + c * (width + _GAP), top))
    with atomic(path) as temporary:
        canvas.save(temporary, format="PNG")


def _cut(title: str) -> str:
    return title if len(title) <= _MAX_TITLE else title[: _MAX_TITLE - 3] + "..."
