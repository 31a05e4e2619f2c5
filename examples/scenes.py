"""Scenes composed of emoji, with the class of every pixel: data for segmentation that needs no network.

    python examples/scenes.py --output scenes.png        # a few scenes above their masks

A scene is a pure function of (seed, split, index). Objects of random classes are put one after another, of any size
from a fifth to three fifths of the scene, turned and mirrored, so that later ones cover earlier ones. A pixel belongs
to the last object that is at least half opaque there, else to the background. Training and validation share no emoji:
they are those of the package's split at 64 pixels, on which a classifier of that size was trained and tested too.
"""

from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit5gen.cli import Parser, exit_on_bad_input
from vit5gen.data import load_emoji
from vit5gen.data.sources import emoji
from vit5gen.generation.grid import save_png, with_attribution
from vit5gen.system.files import check_writable

CLASSES = ["background", *emoji.CLASSES]
SPRITE = 64  # pixels along a side of the emoji before they are scaled
COUNTS = {"training": 4000, "validation": 300}


class Placed(NamedTuple):
    """An emoji in a scene: its number among those of the split, its class, and where and how it stands, in pixels."""

    sprite: int
    label: int
    size: int
    left: int
    top: int
    angle: float
    mirrored: bool


@cache
def sprites(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Return emoji (N, 64, 64, 4) uint8 with their opacity, and their classes (N,), where 0 is the background."""
    images, labels = load_emoji(SPRITE, {"training": "train", "validation": "test"}[split], alpha=True)
    return images.permute(0, 2, 3, 1).numpy(), labels.numpy() + 1


class Scenes:
    """Scenes of one split: item i is (image (3, S, S) uint8, mask (S, S) uint8)."""

    names, attribution = CLASSES, emoji.EmojiSource.attribution

    def __init__(self, split: str, side: int, seed: int = 0) -> None:
        self.split, self.side, self.seed = split, side, seed

    def __len__(self) -> int:
        return COUNTS[self.split]

    def layout(self, index: int) -> tuple[np.ndarray, list[Placed]]:
        """Return the background (S, S, 3) uint8 and the objects from the hindmost to the foremost."""
        key = np.array([self.seed, 2 * index + (self.split == "validation")], np.uint64)
        random = np.random.Generator(np.random.Philox(key=key))
        # A texture of soft blots and a little noise.
        blots = Image.fromarray(random.integers(0, 256, (4, 4, 3), dtype=np.uint8))
        soft = np.asarray(blots.resize((self.side, self.side), Image.Resampling.BICUBIC), np.float64)
        background = np.rint(soft + random.normal(0, 8, soft.shape)).clip(0, 255).astype(np.uint8)
        # Classes are drawn alike, however many emoji they have; objects may reach beyond the edge by a quarter.
        labels, objects = sprites(self.split)[1], []
        for _ in range(random.integers(3, 8)):
            label = int(random.integers(1, len(CLASSES)))
            sprite = int(random.choice(np.flatnonzero(labels == label)))
            size = int(self.side * random.uniform(0.2, 0.6))
            left, top = (int(random.integers(-size // 4, self.side - 3 * size // 4 + 1)) for _ in range(2))
            objects.append(
                Placed(sprite, label, size, left, top, float(random.uniform(-30, 30)), bool(random.random() < 0.5))
            )
        return background, objects

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        background, objects = self.layout(index)
        canvas = Image.fromarray(background).convert("RGBA")
        mask = np.zeros((self.side, self.side), np.uint8)
        for one in objects:
            layer = Image.new("RGBA", canvas.size)
            layer.paste(draw(self.split, one), (one.left, one.top))
            canvas = Image.alpha_composite(canvas, layer)
            mask[np.asarray(layer)[..., 3] >= 128] = one.label
        return torch.from_numpy(np.array(canvas.convert("RGB"))).permute(2, 0, 1), torch.from_numpy(mask)


def draw(split: str, one: Placed) -> Image.Image:
    """Return an emoji as it stands in the scene, in RGBA."""
    picture = Image.fromarray(sprites(split)[0][one.sprite])
    if one.mirrored:
        picture = picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
    return picture.rotate(one.angle, Image.Resampling.BICUBIC).resize((one.size, one.size), Image.Resampling.LANCZOS)


def main() -> None:
    parser = Parser(description=__doc__)
    parser.add_argument("--output", type=Path, default=Path("scenes.png"))
    with exit_on_bad_input():
        output = parser.parse_args().output
        check_writable(output)
        scenes = Scenes("training", 96)
        pairs = [scenes[i] for i in range(8)]
        masks = torch.cat([mask for _, mask in pairs], 1).expand(3, -1, -1) * (255 // len(CLASSES))
        rows = [torch.cat([image for image, _ in pairs], 2), masks]
        picture = Image.fromarray(torch.cat(rows, 1).permute(1, 2, 0).numpy())
        picture = picture.resize((2 * picture.width, 2 * picture.height), Image.Resampling.NEAREST)
        save_png(picture, output, with_attribution({"split": scenes.split, "seed": scenes.seed}, scenes.attribution))


if __name__ == "__main__":
    main()
