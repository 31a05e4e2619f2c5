"""Pairs of an image (3, H, W) and a mask (H, W), both uint8, for segment.py: of a folder or scenes; their augmentation.

FOLDER has `images/training/NAME.jpg`, `annotations/training/NAME.png` (a class number for each pixel, 255 is ignored),
the same for `validation`, and `classes.txt`, a name a line. ADE20K's own archive has the names in `objectInfo150.txt`
instead: there 0 means "no class" and is ignored, and its 150 classes begin at 1.
"""

from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import scenes
import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from vit5gen.data.images import decoding
from vit5gen.data.pictures import eight_bits, find_images
from vit5gen.system.errors import UserError, listed
from vit5gen.training.random import data_index

IGNORED = 255
GREY = [124, 116, 104]  # ImageNet's mean, which pads


class Folder:
    """The pairs of a folder; raises `UserError` for what is absent or does not fit."""

    attribution = None

    def __init__(self, root: Path, split: str) -> None:
        table, names = root / "objectInfo150.txt", root / "classes.txt"
        self.shifted = table.is_file()  # 0 means no class
        if not self.shifted and not names.is_file():
            raise UserError(f"--data {root}: has neither classes.txt (a class name a line) nor ADE20K's {table.name}")
        lines = (table if self.shifted else names).read_text(encoding="utf-8").splitlines()
        self.names = [line.split("\t")[-1].strip() for line in lines[self.shifted :] if line.strip()]
        if not 2 <= len(self.names) <= IGNORED:
            raise UserError(f"--data {root}: names {len(self.names)} classes; expected 2 to {IGNORED}")
        folder = root / "images" / split
        self.images = find_images(folder, Counter(), 2) if folder.is_dir() else []
        masks = root / "annotations" / split
        self.masks = [masks / image.relative_to(folder).with_suffix(".png") for image in self.images]
        if not self.images:
            raise UserError(f"--data {root}: no pairs, for there are no images in {folder}; put them there")
        if absent := [str(mask) for mask in self.masks if not mask.is_file()]:
            raise UserError(f"--data {root}: images without masks; missing: {listed(absent, 3)}; add or remove")

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        path = self.masks[index]
        image = read_rgb(self.images[index])
        with decoding(str(path), "replace or remove it"), Image.open(path) as file:
            mask = np.array(file).astype(np.int64)
        if mask.shape != tuple(image.shape[1:]):
            wanted = f"a number for each pixel of its image, {tuple(image.shape[1:])} (height, width)"
            raise UserError(f"{path}: mask of shape {mask.shape}; expected {wanted}; make it again")
        if self.shifted:
            mask = np.where((mask == 0) | (mask == IGNORED), IGNORED, mask - 1)
        if (wrong := (mask != IGNORED) & ((mask < 0) | (mask >= len(self.names)))).any():
            least, most = int(self.shifted), len(self.names) - 1 + self.shifted
            expected = f"{least} to {most}, or {IGNORED}, which is ignored"
            value = int(mask[wrong][0]) + self.shifted
            raise UserError(f"{path}: mask value {value} is no class; expected {expected}; make it again")
        return image, torch.from_numpy(mask.astype(np.uint8))


def read_rgb(path: Path) -> Tensor:
    with decoding(str(path), "replace or remove it"), Image.open(path) as file:
        return torch.from_numpy(np.array(eight_bits(file).convert("RGB"))).permute(2, 0, 1)


def open_data(data: str, split: str, side: int) -> Any:
    """Return the pairs of a split, "training" or "validation", of a folder or of the scenes, which are of that side."""
    return scenes.Scenes(split, side) if data == "scenes" else Folder(Path(data), split)


def scaled(sides: Sequence[int], crop: int, ratio: float = 1.0) -> list[int]:
    """Return height and width with the shorter side `crop`, but the longer at most four times that, times `ratio`."""
    ratio *= min(crop / min(sides), 4 * crop / max(sides))
    return [max(1, round(side * ratio)) for side in sides]


def distort(image: Tensor) -> Tensor:
    """Change brightness, contrast, saturation and hue of an image (3, H, W) uint8, each in half of the images."""

    def drawn(low: float, high: float) -> float:
        return float(torch.empty(()).uniform_(low, high))

    def linear(factor: float, offset: float) -> Tensor:
        return (factor * image.float() + offset).clamp(0, 255).to(torch.uint8)

    brightness, contrast, saturation, hue, early = (torch.rand(5) < 0.5).tolist()
    image = linear(1, drawn(-32, 32)) if brightness else image
    image = linear(drawn(0.5, 1.5), 0) if contrast and early else image
    image = v2.functional.adjust_saturation(image, drawn(0.5, 1.5)) if saturation else image
    image = v2.functional.adjust_hue(image, drawn(-0.1, 0.1)) if hue else image
    return linear(drawn(0.5, 1.5), 0) if contrast and not early else image


def augment(image: Tensor, mask: Tensor, crop: int) -> tuple[Tensor, Tensor]:
    """Scale by 0.5 to 2, crop, flip and distort the colours; draws from torch's generator."""
    size = scaled(mask.shape, crop, float(torch.empty(()).uniform_(0.5, 2)))
    mask = v2.functional.resize(mask[None], size, v2.InterpolationMode.NEAREST)
    image = v2.functional.resize(image, size, antialias=True)
    room = [0, 0, max(0, crop - size[1]), max(0, crop - size[0])]
    image, mask = v2.functional.pad(image, room, GREY), v2.functional.pad(mask, room, IGNORED)
    # A crop of which one class fills more than three quarters teaches little: try again, ten times at most.
    for _ in range(10):
        top, left = (int(torch.randint(side - crop + 1, ())) for side in mask.shape[1:])
        part = mask[:, top : top + crop, left : left + crop]
        counts = part[part != IGNORED].long().bincount()
        if counts.count_nonzero() > 1 and counts.max() <= 0.75 * counts.sum():
            break
    image = image[:, top : top + crop, left : left + crop]
    if torch.rand(()) < 0.5:
        image, part = image.flip(-1), part.flip(-1)
    return distort(image), part[0].long()


def mixed(*numbers: int) -> int:
    """Return a seed of 63 bits made of several numbers."""
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> np.uint64(1))


class Augmented:
    """Sample n of a training: a function of (seed, n) alone, whoever asks for it and when."""

    def __init__(self, pairs: Any, seed: int, crop: int) -> None:
        self.pairs, self.seed, self.crop = pairs, seed, crop

    def __getitem__(self, n: int) -> tuple[Tensor, Tensor]:
        image, mask = self.pairs[data_index(self.seed, n, 0, 1, len(self.pairs))]
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(mixed(self.seed, n))
            return augment(image, mask, self.crop)
