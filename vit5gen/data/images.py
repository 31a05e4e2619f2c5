"""Labelled images, and what all sources of them share: uint8 RGB squares that are read one at a time."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image

from vit5gen.config import DataConfig
from vit5gen.data.pictures import UNREADABLE, cut_strip, to_rgb
from vit5gen.data.remote import COPIED, fetch_folder, is_here, is_url
from vit5gen.registry import Registry
from vit5gen.section import Exif, Rules
from vit5gen.system.errors import UserError, choose, composed, distinct, listed


class BrokenImage(UserError):
    """An image that does not decode."""


@dataclass(frozen=True)
class ImageSet:
    """Labelled images that are read one at a time: ``set[i]`` is (uint8 (3, H, W), int label)."""

    class_names: list[str]
    labels: torch.Tensor  # (N,) int64
    read: Callable[[int], torch.Tensor]  # raises BrokenImage, which names the file
    digest: Callable[[], str]  # changes when the source's images do
    name: Callable[[int], str] = "image {}".format  # for messages
    instead: dict[str, str] = field(default_factory=dict)  # what the folders of classes without images hold
    hashes: Callable[[], list[str]] | None = None  # SHA-256 of all its files, for a source that has some

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.read(index), int(self.labels[index])

    def get(self, index: int, flip: bool) -> tuple[torch.Tensor, int]:
        """Return an image, or its mirror image, and its label, as `LatentDataset` does of latents."""
        return self.view(index, flip), int(self.labels[index])

    def view(self, index: int, flip: bool) -> torch.Tensor:
        """Return an image, or its mirror image."""
        return self.read(index).flip(-1) if flip else self.read(index)

    def stack(self, indices: Iterable[Any]) -> torch.Tensor:
        """Return these images as one batch (B, 3, H, W) uint8; raise `BrokenImage` for one that does not decode."""
        return torch.stack([self.read(int(index)) for index in indices])

    def decodes(self, index: int) -> bool:
        """Tell whether an image is not broken."""
        try:
            self.read(index)
        except BrokenImage:
            return False
        return True

    def select(self, indices: Sequence[int] | torch.Tensor) -> "ImageSet":
        """Return only these images, in this order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        read, name = partial(_of_selected, self.read, chosen), partial(_of_selected, self.name, chosen)
        return replace(self, labels=self.labels[chosen], read=read, name=name, hashes=None)


def digest_pixels(pixels: torch.Tensor) -> str:
    """Return the SHA-256 of images in memory."""
    return sha256(pixels.numpy().tobytes()).hexdigest()


class Source:
    """A kind of data set, known by a name that `data.source` gives; its options are keyword-only arguments.

    ``open(split)`` returns its images, ``missing()`` what this machine lacks for that, each with how to get it.
    """

    splits: tuple[str, ...] | None = None  # None: whatever is there
    attribution: str | None = None  # the line that its licence wants beside all that is made of the images
    reads_files = True  # whether `data.exif` and `data.rules` have a say in the pixels

    def __init__(self, data: DataConfig) -> None:
        self.data, self.path = data, data.path

    def need_folder(self, hint: str = "check the path") -> Path:
        """Return the folder at `path`, copied first from a URL; raise `UserError` when there is none."""
        if self.path is None:
            raise UserError(f"data.path: source {self.data.source!r} needs a folder of class folders; set data.path")
        if not (folder := fetch_folder(self.path)).is_dir():
            raise UserError(f"data.path {folder}: no such folder; {hint}")
        return folder

    def missing_folder(self, remedy: str) -> dict[str, str]:
        """Return `path` with the remedy unless it is a folder; what to set when none is given."""
        if self.path is None:
            return {"data.path": "set data.path to a folder of class folders or the name of a Hugging Face data set"}
        return {} if is_here(self.path) else {self.path: COPIED if is_url(self.path) else remedy}

    def open(self, split: str) -> ImageSet:
        """Open the images of a split without decoding any; raise `UserError` when they are absent."""
        raise NotImplementedError

    def has_split(self, split: str) -> bool:
        """Tell whether there is a split of this name."""
        with suppress(UserError):
            return split in self.splits if self.splits is not None else bool(self.open(split))
        return False

    def missing(self) -> dict[str, str]:
        """Return each absent path or package with how to get it."""
        return {}

    def preparation(self) -> str:
        """Return what opening does first that takes long, such as "the pictures are drawn"; empty when it is done."""
        return ""

    def image_bytes(self) -> int | None:
        """Return what the images, when they are here, take on disk or in memory; None where that takes long to tell."""
        return None


SOURCES: Registry[type[Source]] = Registry("data.source", "vit5gen.sources")
register_source = SOURCES.register


def make_source(data: DataConfig) -> Source:
    """Return the source of a configuration; raise `UserError` for an unknown one or option."""
    return SOURCES.build(data.source, data.source_kwargs, "data.source_kwargs", data)


@contextmanager
def decoding(name: str, advice: str = "replace or remove it, or set data.on_broken_image to skip") -> Iterator[None]:
    """Turn what Pillow raises for a damaged image into a `BrokenImage` that names it."""
    try:
        yield
    except UNREADABLE as error:
        raise BrokenImage(f"{name} does not decode ({error}); {advice}") from error


def read_image(file: str | Path | IO[bytes], data: DataConfig, name: str) -> torch.Tensor:
    """Decode and crop a file as a configuration says; return uint8 (3, H, W), or raise `BrokenImage` with ``name``."""
    advice = {"advice": "replace or remove it"} if data.on_broken_image == "skip" else {}
    with decoding(name, **advice), Image.open(file) as image:
        return centre_crop(image, data.resolution, data.exif, data.rules)


def open_images(data: DataConfig, split: str | None = None) -> ImageSet:
    """Open the images of a configuration without decoding any; ``split`` replaces ``data.split``.

    With `data.held_out` that part of `data.split` stands for any other split, and `data.split` for the rest.
    Raises `UserError` when the data are absent, hold no classes or not `data.classes`, or a class has no images; in
    another split than the one to train on, only when a class folder is there.
    """
    # A part that is held out takes the place of a split, beside which there must be none.
    source, wanted = make_source(data), split or data.split
    if data.held_out is not None:
        for other in sorted({"test", wanted} - {data.split}):
            if source.has_split(other):
                found = f"{data.path or data.source} has a split {other!r} already"
                raise UserError(f"data.held_out = {data.held_out}: {found}; remove data.held_out, or that split")
    part = wanted if data.held_out is None else data.split
    if source.splits is not None:
        choose("data.split", part, source.splits)

    # The images of the source, under names that are compared as `composed` has them.
    opened = source.open(part)
    names = distinct(f"data.path {data.path}, classes", opened.class_names)
    instead = {composed(name): why for name, why in opened.instead.items()}
    opened = replace(opened, class_names=names, instead=instead)

    # Only the part and the classes that are asked for.
    if data.held_out is not None:
        held_out = _hold_out(opened, data.held_out, data.classes or names)
        opened = opened.select(torch.nonzero(held_out == (wanted != data.split))[:, 0])
    if data.classes is not None:
        classes = distinct("data.classes", data.classes)
        opened = _keep_classes(opened, [choose("data.classes", name, names) for name in classes])
    if not len(opened):
        raise UserError(f"data: {data.source} {data.path or ''} split {wanted!r} has no images; add some")
    check_classes(opened, data, opened.class_names if split in (None, data.split) else opened.instead)
    return opened


def open_training_images(data: DataConfig) -> ImageSet:
    """Open the images that a run trains on; raise `UserError` when their classes are not a given `data.num_classes`."""
    images = open_images(data)
    check_num_classes(images, data)
    return images


def check_num_classes(images: ImageSet, data: DataConfig) -> None:
    """Raise `UserError` when the classes are not a given `data.num_classes`."""
    if (found := len(images.class_names)) != (data.num_classes or found):
        classes = f"data.num_classes = {data.num_classes}: the data set has {found} ({listed(images.class_names)})"
        raise UserError(f"{classes}; set data.num_classes to {found}")


def check_classes(
    images: ImageSet, data: DataConfig, among: Collection[str] | None = None, why: str = "none has this label"
) -> None:
    """Raise `UserError` that names the classes, ``among`` them or of all, which lack images: they would become noise.

    ``why`` is the reason given for a class about which the source has none.
    """
    counts = torch.bincount(images.labels, minlength=len(images.class_names)).tolist()
    looked_at = set(images.class_names if among is None else among)
    empty = [name for name, count in zip(images.class_names, counts, strict=False) if not count and name in looked_at]
    if empty and data.rules > 1:
        others = f"; nor {'do' if len(empty) > 2 else 'does'} {listed(map(repr, empty[1:]))}" if empty[1:] else ""
        found = f"class {empty[0]!r} has no images ({images.instead.get(empty[0], why)}){others}"
        advice = "add images, remove the class, or list the others in data.classes"
        raise UserError(f"data.path {data.path}: {found}; {advice}")


def open_held_out(data: DataConfig, split: str, class_names: list[str]) -> ImageSet:
    """Open ``split`` with the labels that its classes have among ``class_names``, those of the training images.

    Raises `UserError` when it is absent or has a class that the training images lack.
    """
    images = open_images(data, split)
    if unknown := [name for name in images.class_names if name not in class_names]:
        found = f"split {split!r} has classes that split {data.split!r} lacks, such as {unknown[0]!r}"
        raise UserError(f"data: {found}; expected the same classes: rename or remove them, or set data.classes")
    return _keep_classes(images, class_names)


def readable(images: ImageSet, data: DataConfig) -> ImageSet:
    """Return the images, where ``data.on_broken_image`` is ``skip`` without the broken ones.

    Raises `UserError` when none is left.
    """
    if data.on_broken_image != "skip":
        return images
    good, faults = drop_broken(images)
    if not len(good):
        raise UserError(f"data: none of {len(images)} images can be decoded; {faults[0]}")
    return good


def drop_broken(images: ImageSet) -> tuple[ImageSet, list[str]]:
    """Decode every image once; return the set without the broken ones, and what is wrong with each of those."""
    good, faults = [], []
    for index in range(len(images)):
        try:
            images.read(index)
            good.append(index)
        except BrokenImage as error:
            faults.append(str(error))
    return images.select(good), faults


def centre_crop(image: Image.Image, resolution: int, exif: Exif, rules: Rules) -> torch.Tensor:
    """Scale the short side to ``resolution`` and cut the centre square, as ADM does; return uint8 (3, H, W).

    Halves with a box filter while the short side is at least twice too long, then bicubic. Before that the image gets
    8 bits, turns upright, and white where it is transparent; see `to_rgb`. Source: preprocessing of "Diffusion Models
    Beat GANs" (arXiv 2105.05233).
    """
    image = to_rgb(image, exif, rules)
    if rules > 1:
        image = cut_strip(image)
    while min(image.size) >= 2 * resolution:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = resolution / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - resolution) // 2, (image.height - resolution) // 2
    pixels = np.asarray(image)[top : top + resolution, left : left + resolution]
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _keep_classes(images: ImageSet, classes: list[str]) -> ImageSet:
    """Return the images of ``classes`` only, labelled by their place in that list."""
    numbers = {name: number for number, name in enumerate(classes)}
    labels = torch.tensor([numbers.get(name, -1) for name in images.class_names])[images.labels]
    kept = images.select(torch.nonzero(labels >= 0)[:, 0])
    return replace(kept, class_names=classes, labels=labels[labels >= 0])


def _hold_out(images: ImageSet, fraction: float, classes: Collection[str]) -> torch.Tensor:
    """Return (N,) bool, true for the lowest ``fraction`` by hash of each of ``classes``; copies fall on one side.

    At least one of a class of two or more, and two in all where a class has three. The hash is of a file's content,
    else of class and row: neither order nor other images nor the machine have a say in it.
    """
    # The hashes of each class.
    owners = [images.class_names[label] for label in images.labels.tolist()]
    rows = (f"{name} {row}" for row, name in enumerate(owners))
    hashes = [sha256(row.encode()).hexdigest() for row in rows] if images.hashes is None else images.hashes()
    kept = set(map(composed, classes))
    of_class: dict[str, set[str]] = {}
    for name, one in zip(owners, hashes, strict=True):
        if name in kept:
            of_class.setdefault(name, set()).add(one)

    # The lowest ones of every class, but never all of it.
    ranked = [sorted(found) for found in of_class.values()]
    counts = [min(max(1, round(fraction * len(found))), len(found) - 1) for found in ranked]
    if sum(counts) == 1:
        counts = [min(2 * count, len(found) - 1) for count, found in zip(counts, ranked, strict=True)]
    held_out = {one for count, found in zip(counts, ranked, strict=True) for one in found[:count]}
    for found in ranked:  # a class whose images are all copies of another one's held-out images
        if held_out.issuperset(found):
            held_out.difference_update(found)
    return torch.tensor([one in held_out and name in kept for one, name in zip(hashes, owners, strict=True)])


def _of_selected(function: Callable[[int], Any], chosen: torch.Tensor, index: int) -> Any:
    return function(int(chosen[index]))
