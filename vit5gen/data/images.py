"""Labelled images from folders, Hugging Face data sets and the embedded sets, all as uint8 RGB squares."""

import gzip
import re
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from hashlib import sha256
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from vit5gen.config import DataConfig, Exif, Rules
from vit5gen.data.emoji import CLASSES, load_emoji
from vit5gen.data.pictures import (
    UNREADABLE,
    content_digest,
    cut_strip,
    find_classes,
    folder_names,
    listing_digest,
    to_rgb,
)
from vit5gen.system.errors import UserError, choose, composed, distinct, listed

_FASHION_CLASSES = [
    "t-shirt",
    "trouser",
    "pullover",
    "dress",
    "coat",
    "sandal",
    "shirt",
    "sneaker",
    "bag",
    "ankle-boot",
]
# Names of folders that are taken for splits without being named in a configuration.
_SPLITS = ("train", "training", "val", "valid", "validation", "dev", "test", "testing", "eval", "held_out", "holdout")
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist


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

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.read(index), int(self.labels[index])

    def select(self, indices: Sequence[int] | torch.Tensor) -> "ImageSet":
        """Return the set of these images only, in this order."""
        chosen = torch.as_tensor(indices, dtype=torch.int64)
        read, name = partial(_of_selected, self.read, chosen), partial(_of_selected, self.name, chosen)
        return replace(self, labels=self.labels[chosen], read=read, name=name)


def open_images(data: DataConfig, split: str | None = None) -> ImageSet:
    """Open the images of a configuration without decoding any; ``split`` replaces ``data.split``.

    Raises `UserError` when the data are absent, hold no classes or not `data.classes`, or a class has no images; in
    another split than the one to train on, only when a class folder is there.
    """
    opened = _SOURCES[data.source](data, split or data.split)
    names = distinct(f"data.path {data.path}, classes", opened.class_names)
    instead = {composed(name): why for name, why in opened.instead.items()}
    opened = replace(opened, class_names=names, instead=instead)
    if data.classes is not None:
        opened = _keep_classes(opened, data.classes)
    if not len(opened):
        raise UserError(f"data: {data.source} {data.path or ''} split {split or data.split!r} holds no images")
    check_classes(opened, data, opened.class_names if split in (None, data.split) else opened.instead)
    return opened


def open_training_images(data: DataConfig) -> ImageSet:
    """Open the images that a run trains on; raise `UserError` when their classes are not `data.num_classes`."""
    images = open_images(data)
    if (found := len(images.class_names)) != data.num_classes:
        raise UserError(
            f"data.num_classes = {data.num_classes}: the data have {found} classes ({listed(images.class_names)}); "
            "set that"
        )
    return images


def check_classes(
    images: ImageSet, data: DataConfig, among: Collection[str] | None = None, why: str = "none has this label"
) -> None:
    """Raise `UserError` that names the classes, ``among`` them or of all, which lack images: they would become noise.

    ``why`` is said of a class of which the source tells nothing.
    """
    counts = torch.bincount(images.labels, minlength=len(images.class_names)).tolist()
    looked_at = set(images.class_names if among is None else among)
    empty = [name for name, count in zip(images.class_names, counts, strict=False) if not count and name in looked_at]
    if empty and data.rules > 1:
        others = f"; nor {'do' if len(empty) > 2 else 'does'} {listed(map(repr, empty[1:]))}" if empty[1:] else ""
        raise UserError(
            f"data.path {data.path}: class {empty[0]!r} holds no images ({images.instead.get(empty[0], why)}){others}; "
            "add images, remove the class, or list the others in data.classes"
        )


def open_held_out(data: DataConfig, split: str, class_names: list[str]) -> ImageSet:
    """Open ``split`` with the labels that its classes have among ``class_names``, those of the training images.

    Raises `UserError` when it is absent or has a class that the training images lack.
    """
    images = open_images(data, split)
    if unknown := [name for name in images.class_names if name not in class_names]:
        raise UserError(
            f"data: split {split!r} has classes that split {data.split!r} lacks, such as {unknown[0]!r}; "
            "expected the same ones: rename or remove them, or set data.classes"
        )
    if images.class_names == class_names:
        return images
    renumber = torch.tensor([class_names.index(name) for name in images.class_names])
    return replace(images, class_names=class_names, labels=renumber[images.labels])


def readable(images: ImageSet, data: DataConfig) -> ImageSet:
    """Return the images, where ``data.on_broken_image`` is ``skip`` without the broken ones."""
    return drop_broken(images)[0] if data.on_broken_image == "skip" else images


def drop_broken(images: ImageSet) -> tuple[ImageSet, list[str]]:
    """Decode every image once; return the set without the broken ones, and what is wrong with each of those."""
    good, problems = [], []
    for index in range(len(images)):
        try:
            images.read(index)
            good.append(index)
        except BrokenImage as error:
            problems.append(str(error))
    return images.select(good), problems


def centre_crop(image: Image.Image, resolution: int, exif: Exif = "apply", rules: Rules = 2) -> torch.Tensor:
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


def imagenet_names(wnids: list[str]) -> list[str]:
    """Return the English names of ImageNet-1k's 1000 sorted WordNet ids; any other list is a `UserError`."""
    from timm.data import ImageNetInfo

    info = ImageNetInfo()
    known = info.label_names()
    if wnids != known:
        missing, extra = sorted(set(known) - set(wnids)), sorted(set(wnids) - set(known))
        raise UserError(
            f"data.path: not the 1000 classes of ImageNet-1k: {len(missing)} missing {missing[:3]}, {len(extra)} extra"
            f" {extra[:3]}; complete the folders, or name them otherwise for a data set of your own"
        )
    names = [info.index_to_description(index).split(",")[0] for index in range(len(known))]
    # Two names stand for two classes each (crane, maillot): the later one gets its number, so that names identify.
    return [name if names.index(name) == index else f"{name} ({index})" for index, name in enumerate(names)]


def _open_folder(data: DataConfig, split: str) -> ImageSet:
    root = _split_folder(_path(data), data, split)
    found, instead = find_classes(root, data.rules)
    if not found:
        raise UserError(f"data.path {root}: no class folders; expected one folder of images for each class")
    names = list(found)
    # Anything close to ImageNet's thousand ids is meant to be ImageNet; ten of them are a set of one's own.
    if sum(bool(re.fullmatch(r"n\d{8}", name)) for name in found) >= 900:
        names = imagenet_names(list(found))
        instead = {name: instead[wnid] for name, wnid in zip(names, found, strict=True) if wnid in instead}
    files = [file for of_class in found.values() for file in of_class]
    labels = torch.repeat_interleave(torch.tensor([len(of_class) for of_class in found.values()]))
    read, digest = partial(_read_file, files, data), listing_digest if data.rules == 1 else content_digest
    return ImageSet(names, labels, read, partial(digest, root, files), partial(_file_name, files), instead)


def _split_folder(root: Path, data: DataConfig, split: str) -> Path:
    """Return the folder of a split, or ``root`` where its folders are the classes of the one split that there is.

    A folder with the name of a split is one when all folders beside it are, else a class; under a name of the user's
    own it is one in any case. Raises `UserError` where the split is absent, or holds folders as splits do while what
    stands beside it are none.
    """
    inside, asked = root / split, data.rules == 1 or split not in _SPLITS
    folders, _ = folder_names(root)
    others = [name for name in folders if name.lower() not in _SPLITS and name not in (data.split, split)]
    if inside.is_dir() and (asked or not others):
        return inside
    if split in folders:
        classes, images_beside = folder_names(inside)
        if classes and not images_beside:
            raise UserError(
                f"data.path {root}: {split!r} holds folders as a split does, but beside it stand {listed(others)}, "
                "which are none; move those away, or the classes out of the splits"
            )
    # Images of the whole folder are no second split.
    if split != data.split or (not asked and folders and not others):
        raise UserError(
            f"data.path {root}: no folder {split!r} (it has {listed(folders) or 'none'}); expected the images of that "
            "split there"
        )
    return root


def _open_huggingface(data: DataConfig, split: str) -> ImageSet:
    try:
        import datasets
    except ImportError as error:
        raise UserError("data.source 'huggingface' needs the package datasets; run: pip install datasets") from error
    if data.path is None:
        raise UserError("data.path: needs the name of a Hugging Face data set or a folder saved by datasets")
    try:
        if (folder := Path(data.path).expanduser()).is_dir():
            table = datasets.load_from_disk(folder)
            if isinstance(table, datasets.DatasetDict):
                table = table[choose(f"data.split of {data.path}", split, table)]
            elif split != data.split:
                raise UserError(f"data.path {data.path}: has no splits; expected one called {split!r}")
        else:
            table = datasets.load_dataset(data.path, split=split)
    except UserError:
        raise
    except Exception as error:  # the library raises its own, requests' and pyarrow's errors
        empty = isinstance(error, IndexError)  # of the list of its files
        detail = "it holds no images" if empty else " ".join(str(error).split())
        raise UserError(
            f"data.path {data.path}: no data set can be opened: {detail}; check name and network"
        ) from error
    image = _column(data, "image_column", table.features, datasets.Image, "images")
    label = _column(data, "label_column", table.features, datasets.ClassLabel, "class labels")
    names, values = table.features[label].names, table[label][:]
    if not all(value is not None and 0 <= value < len(names) for value in values):
        raise UserError(f"data.path {data.path}: split {split!r} has images without a label; choose another data.split")
    pictures = _undecoded(table, image, data)
    read = partial(_read_row, pictures, image, data)
    kinds = [type(feature) for feature in table.features.values()]
    chosen = kinds.count(datasets.Image) > 1 or kinds.count(datasets.ClassLabel) > 1
    digest = partial(" ".join, [table._fingerprint, image, label] if chosen else [table._fingerprint])
    return ImageSet(names, torch.tensor(values, dtype=torch.int64), read, digest)


def _undecoded(table: Any, column: str, data: DataConfig) -> Any:
    """Return the table with files in its column: the library would turn the images, and cut 16 bits off at 255."""
    feature = table.features[column]
    # Under the rules of an earlier version, and where the data set's author asks for grey, say, the library decodes.
    decode = data.rules == 1 or feature.mode not in (None, "RGB")
    return table.cast_column(column, type(feature)(mode=feature.mode, decode=decode))


def _column(data: DataConfig, key: str, features: dict[str, Any], kind: type, what: str) -> str:
    """Return the column that is asked for, or else the only one of its kind."""
    found, asked = [name for name, feature in features.items() if isinstance(feature, kind)], getattr(data, key)
    if found and asked is not None:
        return choose(f"data.{key}: of the columns of {what} in {data.path}", asked, found)
    if len(found) != 1:
        several = f"several columns of {what}: {', '.join(found)}; choose one as data.{key}"
        none = f"no column of {what}; it has {', '.join(features)}"
        raise UserError(f"data.path {data.path}: {several if found else none}")
    return found[0]


def _open_emoji(data: DataConfig, split: str) -> ImageSet:
    images, labels = load_emoji(data.resolution, choose("data.split", split, ["train", "test"]))
    return ImageSet(CLASSES, labels, images.__getitem__, partial(_digest, images))


def _open_fashion_mnist(data: DataConfig, split: str) -> ImageSet:
    prefix = {"train": "train", "test": "t10k"}[choose("data.split", split, ["train", "test"])]
    root = _path(data, FASHION_FOLDER, "; install Debian's dataset-fashion-mnist or set data.path to the idx files")
    pixels = torch.from_numpy(_read_idx(root, f"{prefix}-images-idx3-ubyte"))
    labels = torch.from_numpy(_read_idx(root, f"{prefix}-labels-idx1-ubyte").astype(np.int64))
    if len(pixels) != len(labels) or labels.max() >= len(_FASHION_CLASSES):
        raise UserError(f"data.path {root}: images and labels do not belong together; fetch the files again")
    read = partial(_read_grey, pixels, data.resolution)
    return ImageSet(_FASHION_CLASSES, labels, read, partial(_digest, pixels))


def _digest(pixels: torch.Tensor) -> str:
    return sha256(pixels.numpy().tobytes()).hexdigest()


def _read_idx(root: Path, name: str) -> np.ndarray:
    for folder in (root, root / "FashionMNIST" / "raw"):
        for path in (folder / name, folder / f"{name}.gz"):
            if not path.is_file():
                continue
            try:
                content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
                dimensions = content[3]
                shape = np.frombuffer(content, ">i4", dimensions, offset=4)
                return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
            except (OSError, EOFError, ValueError, IndexError) as error:
                raise UserError(f"data.path: {path} is not an idx file ({error}); fetch it again") from error
    raise UserError(f"data.path {root}: no file {name} or {name}.gz; expected the four idx files of Fashion-MNIST")


def _path(data: DataConfig, default: str | None = None, hint: str = "; check the path") -> Path:
    if data.path is None and default is None:
        raise UserError(f"data.path: source {data.source!r} needs a folder of class folders; set data.path")
    path = Path(data.path or default or "").expanduser()
    if not path.is_dir():
        raise UserError(f"data.path {path}: no such folder{hint}")
    return path


def _keep_classes(images: ImageSet, classes: list[str]) -> ImageSet:
    classes = distinct("data.classes", classes)
    wanted = [images.class_names.index(choose("data.classes", name, images.class_names)) for name in classes]
    renumber = torch.full((len(images.class_names),), -1)
    renumber[wanted] = torch.arange(len(wanted))
    labels = renumber[images.labels]
    kept = images.select(torch.nonzero(labels >= 0)[:, 0])
    return replace(kept, class_names=classes, labels=labels[labels >= 0])


def _of_selected(function: Callable[[int], Any], chosen: torch.Tensor, index: int) -> Any:
    return function(int(chosen[index]))


def _file_name(files: list[Path], index: int) -> str:
    return f"image {files[index]}"


def _read_file(files: list[Path], data: DataConfig, index: int) -> torch.Tensor:
    try:
        with Image.open(files[index]) as image:
            return centre_crop(image, data.resolution, data.exif, data.rules)
    except UNREADABLE as error:
        raise BrokenImage(
            f"image {files[index]} does not decode ({error}); replace or remove it{_SKIP_HINT}"
        ) from error


def _read_row(table: Any, column: str, data: DataConfig, index: int) -> torch.Tensor:
    """Read a row, in whose column is a file as bytes or by its path, or what the library has decoded."""
    try:
        image = table[index][column]
        if image is None:
            raise ValueError("there is none")
        if isinstance(image, dict):
            image = Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"]))
        return centre_crop(image, data.resolution, data.exif, data.rules)
    except UNREADABLE as error:
        raise BrokenImage(f"image {index} of {data.path} does not decode ({error}); replace it{_SKIP_HINT}") from error


def _read_grey(pixels: torch.Tensor, resolution: int, index: int) -> torch.Tensor:
    """28x28 grey, padded to 32 with the black of the background, scaled only when another size is asked for."""
    image = functional.pad(pixels[index], (2, 2, 2, 2)).expand(3, 32, 32)
    return image if resolution == 32 else centre_crop(Image.fromarray(image.permute(1, 2, 0).numpy()), resolution)


_SKIP_HINT = ", or set data.on_broken_image to skip"
_SOURCES: dict[str, Callable[[DataConfig, str], ImageSet]] = {
    "emoji": _open_emoji,
    "fashion-mnist": _open_fashion_mnist,
    "folder": _open_folder,
    "huggingface": _open_huggingface,
}
