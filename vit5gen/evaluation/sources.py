"""Sets of images that are read in chunks: ADM's npz, folders, data sources. All uint8 RGB of one size, or an error."""

import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit5gen.config import DataConfig, Exif
from vit5gen.data.images import ImageSet, open_images
from vit5gen.data.pictures import UNREADABLE, find_images, listing_digest, tell_left_out, upright
from vit5gen.system.errors import UserError

_DECIDING = {"source", "split", "resolution", "exif", "rules"}  # keys of the data section


@dataclass(frozen=True)
class ImageSource:
    """``count`` images; ``read(start, stop)`` gives uint8 ``(B, 3, H, W)``, and is called with growing ranges.

    ``labels (count,)`` or None; ``identity`` says in a card which images these were.
    """

    count: int
    read: Callable[[int, int], Tensor]
    labels: Tensor | None
    identity: dict[str, Any]

    def chunks(self, size: int, rank: int = 0, processes: int = 1) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(first index, images)`` of every ``processes``-th chunk of ``size`` images, each whole."""
        side = self.read(0, 1).shape[1:]
        for start in range(rank * size, self.count, processes * size):
            images = self.read(start, min(start + size, self.count))
            if images.shape[1:] != side:
                raise UserError(
                    f"{self.identity['path']}: images {start}... are {_size(images.shape[1:])}, the first are "
                    f"{_size(side)}; expected one size; resize them"
                )
            yield start, images

    @property
    def sorted_by_class(self) -> bool:
        """Whether all images of a class stand together, and there are several of some."""
        if self.labels is None:
            return False
        classes, runs = len(self.labels.unique()), int((self.labels.diff() != 0).sum()) + 1
        return 1 < classes == runs < len(self.labels)


def open_npz(path: Path) -> ImageSource:
    """Open ADM's npz: ``arr_0 (N, H, W, 3)`` uint8 and perhaps ``arr_1 (N,)`` labels, read row by row."""
    with broken_npz(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "arr_0.npy" not in names:
            raise UserError(f"npz {path}: no arr_0; it holds {', '.join(names)}; expected arr_0 (N, H, W, 3) uint8")
        with archive.open("arr_0.npy") as member:
            shape, dtype = _header(member)
        labels = None
        if "arr_1.npy" in names and shape:
            with archive.open("arr_1.npy") as member:
                classes = np.lib.format.read_array(member, allow_pickle=False)
            if classes.size == shape[0]:
                labels = torch.from_numpy(np.unique(classes.ravel(), return_inverse=True)[1])
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
        raise UserError(f"npz {path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3); write it again")
    return ImageSource(shape[0], _NpzReader(path, shape), labels, {"kind": "npz", "path": str(path)})


class _NpzReader:
    """Rows of ``arr_0``, read forwards through one open member, so that 10 GB never lie in memory."""

    def __init__(self, path: Path, shape: tuple[int, ...]) -> None:
        self.path, self.shape = path, shape
        self._member: IO[bytes] | None = None
        self._offset = 0
        self._next = 0

    def __call__(self, start: int, stop: int) -> Tensor:
        row = int(np.prod(self.shape[1:]))
        with broken_npz(self.path):
            if self._member is None or start < self._next:
                self._member = zipfile.ZipFile(self.path).open("arr_0.npy")  # noqa: SIM115  # open between calls
                _header(self._member)
                self._offset = self._member.tell()
            self._member.seek(self._offset + start * row)
            content = self._member.read((stop - start) * row)
        self._next = stop
        if len(content) != (stop - start) * row:
            raise UserError(f"npz {self.path}: ends within image {start + len(content) // row}; write it again")
        rows = np.frombuffer(content, np.uint8).reshape(stop - start, *self.shape[1:])
        return torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())


def open_folder(path: Path, exif: Exif = "apply") -> ImageSource:
    """Open the images below ``path`` in the order of their names; class folders give the labels."""
    left_out: Counter[str] = Counter()
    files = find_images(path, left_out)
    tell_left_out(path, left_out)
    if not files:
        raise UserError(f"folder {path}: no images; expected files such as .png or .jpg")
    parents = {parent: label for label, parent in enumerate(sorted({file.parent for file in files}))}
    labels = torch.tensor([parents[file.parent] for file in files]) if len(parents) > 1 else None
    identity = {"kind": "folder", "path": str(path), "listing_sha256": listing_digest(path, files), "exif": exif}

    def read(start: int, stop: int) -> Tensor:
        images = [_read_image(file, exif) for file in files[start:stop]]
        for file, image in zip(files[start:stop], images, strict=True):
            if image.shape != images[0].shape:
                raise UserError(
                    f"image {file} is {_size(image.shape)}, {files[start].name} is {_size(images[0].shape)}; "
                    "expected one size; resize them"
                )
        return torch.stack(images)

    return ImageSource(len(files), read, labels, identity)


def open_data(data: DataConfig) -> ImageSource:
    """Open the images of a configuration's data section, the split that it names."""
    images: ImageSet = open_images(data)

    def read(start: int, stop: int) -> Tensor:
        return torch.stack([images[index][0] for index in range(start, stop)])

    identity = {"kind": "data", "path": data.path or data.source, **data.model_dump(include=_DECIDING)}
    if data.source_kwargs:
        identity["source_kwargs"] = data.source_kwargs
    return ImageSource(len(images), read, images.labels, identity)


@contextmanager
def broken_npz(path: Path) -> Iterator[None]:
    """Turn what a broken archive raises into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error, NotImplementedError) as error:
        raise UserError(f"npz {path} cannot be read ({error}); check the path or write it again") from error


def _read_image(file: Path, exif: Exif) -> Tensor:
    try:
        with Image.open(file) as image:
            image.load()
            mode, pixels = image.mode, np.asarray(upright(image) if exif == "apply" else image)
    except UNREADABLE as error:
        raise UserError(f"image {file} does not decode ({error}); replace or remove it") from error
    if mode != "RGB":
        raise UserError(f"image {file} has mode {mode}; expected RGB with 8 bits a channel; convert it")
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _size(shape: tuple[int, ...]) -> str:
    return f"{shape[2]}x{shape[1]}"


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if fortran:
        raise ValueError("column-major array")
    return shape, dtype
