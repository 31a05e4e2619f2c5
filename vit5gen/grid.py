"""Labelled grids of images: one titled row for each class."""

from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont

from vit5gen.files import atomic

_TILE = 64  # smaller images are enlarged (nearest neighbour, whole factors) to at least this side
_GAP = 4
_MAX_TITLE = 28  # characters


def save_grid(path: str | Path, images: torch.Tensor, labels: Sequence[str]) -> None:
    """Write a PNG with one row for each distinct label, in order of first appearance, titled at its left.

    images (N, 3, H, W) uint8, labels one for each image. The same input gives the same bytes.
    """
    if len(labels) != len(images):
        raise ValueError(f"labels: {len(labels)} given, expected one for each of {len(images)} images")
    rows = {name: [i for i, label in enumerate(labels) if label == name] for name in dict.fromkeys(labels)}
    height, width = images.shape[-2:]
    zoom = max(1, -(-_TILE // height))
    height, width = zoom * height, zoom * width
    titles = [name if len(name) <= _MAX_TITLE else name[: _MAX_TITLE - 3] + "..." for name in rows]
    font = ImageFont.load_default(size=max(14, height // 6))
    margin = 2 * _GAP + max(int(font.getlength(title)) + 1 for title in titles)
    columns = max(len(row) for row in rows.values())
    size = (margin + columns * (width + _GAP), _GAP + len(rows) * (height + _GAP))
    canvas = Image.new("RGB", size, "white")
    draw = ImageDraw.Draw(canvas)
    for r, (title, row) in enumerate(zip(titles, rows.values(), strict=True)):
        top = _GAP + r * (height + _GAP)
        draw.text((_GAP, top + height // 2), title, fill="black", font=font, anchor="lm")
        for c, i in enumerate(row):
            tile = Image.fromarray(images[i].permute(1, 2, 0).contiguous().cpu().numpy())
            canvas.paste(tile.resize((width, height), Image.Resampling.NEAREST), (margin + c * (width + _GAP), top))
    with atomic(path) as temporary:
        canvas.save(temporary, format="PNG")
