"""Small pictures that a run keeps for its report: ``RUN/report/``."""

import io
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit5gen.system.files import atomic

FOLDER, FACTS = "report", "facts.json"  # of a run; in it, what its pictures show, versions and the command
_TILE, _WIDTH, _GAP = 64, 768, 2  # pixels: the least side of an image, the most of all, between them
_BYTES = 36_000  # of a file: fifty, as text, stay below 3 MB
_COPYRIGHT = 0x8298  # tag of Exif


def step_picture(folder: Path, step: int) -> Path:
    """Return where the samples of a step are kept."""
    return folder / f"step_{step:08d}.webp"


def sheet(images: Sequence[Tensor], columns: int) -> Image.Image:
    """Return images (3, H, W) uint8 side by side in rows of ``columns``; small ones enlarged by a whole factor."""
    height, width = images[0].shape[1:]
    zoom = max(1, -(-_TILE // height))
    across, down = zoom * width + _GAP, zoom * height + _GAP
    canvas = Image.new("RGB", (columns * across - _GAP, -(-len(images) // columns) * down - _GAP), "white")
    for i, image in enumerate(images):
        tile = Image.fromarray(np.ascontiguousarray(image.permute(1, 2, 0).cpu().numpy()))
        tile = tile.resize((zoom * width, zoom * height), Image.Resampling.NEAREST)
        canvas.paste(tile, (i % columns * across, i // columns * down))
    return canvas


def save_small(path: Path, picture: Image.Image, attribution: str | None = None) -> None:
    """Write a picture as WebP of at most 36 kB, as good as that allows, with the attribution in its Exif."""
    path.parent.mkdir(parents=True, exist_ok=True)
    exif = Image.Exif()
    if attribution:
        exif[_COPYRIGHT] = attribution.encode()  # UTF-8, which Pillow would make ASCII
    picture = picture.convert("RGB")
    picture.thumbnail((_WIDTH, 2 * _WIDTH), Image.Resampling.LANCZOS)
    for quality in (85, 60, 30) * 8:
        buffer = io.BytesIO()
        picture.save(buffer, format="WEBP", quality=quality, exif=exif)
        if buffer.tell() <= _BYTES:
            break
        if quality == 30:
            picture = picture.resize((max(1, 3 * picture.width // 4), max(1, 3 * picture.height // 4)))
    with atomic(path) as temporary:
        temporary.write_bytes(buffer.getvalue())


def rows_of(images: Tensor, labels: Sequence[int]) -> tuple[list[Tensor], int]:
    """Return images (N, 3, H, W) padded to equal rows, one for each label in order, and the length of a row."""
    rows = [[images[i] for i, own in enumerate(labels) if own == label] for label in dict.fromkeys(labels)]
    columns, blank = max(map(len, rows)), torch.full_like(images[0], 255)
    return [image for row in rows for image in [*row, *[blank] * (columns - len(row))]], columns
