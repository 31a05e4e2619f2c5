"""Images that are scored or compared with, read in chunks: ADM's npz, folders, data sections. RGB of one size."""

import math
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit5gen.config import DataConfig, find_config, load_config
from vit5gen.data.images import decoding, open_images, readable
from vit5gen.data.pictures import find_images, listing_digest, tell_left_out, upright
from vit5gen.section import Exif
from vit5gen.system.distributed import rank_and_world
from vit5gen.system.errors import UserError

_DATA = DataConfig()
_DECIDING = {"source", "split", "resolution", "exif", "rules"}  # keys of the data section


@dataclass(frozen=True)
class Samples:
    """``count`` images, of which ``chunks()`` gives this process's ``(first index, uint8 (B, 3, H, W))``.

    ``identity`` says in a card which images these were, ``sampling`` how they were drawn; ``labels`` are classes:
    names, class folders, or numbers without a name.
    """

    count: int
    chunks: Callable[[], Iterable[tuple[int, Tensor]]]
    identity: dict[str, Any]
    labels: Sequence[Hashable] = ()
    sampling: dict[str, Any] | None = None

    def labels_among(self, classes: Collection[str]) -> Tensor | None:
        """Return the place (N,) of each image's class among ``classes``; None where one is not there, or unknown."""
        numbers: dict[Hashable, int] = {name: number for number, name in enumerate(classes)}
        names = [label.name if isinstance(label, Path) else label for label in self.labels]
        return torch.tensor([numbers[name] for name in names]) if names and numbers.keys() >= set(names) else None

    @property
    def sorted_by_class(self) -> bool:
        """Whether all images of a class stand together, and there are several of some."""
        runs = [label for label, _ in groupby(self.labels)]
        return 1 < len(runs) == len(set(runs)) < len(self.labels)


def open_image_set(path: str | Path, batch_size: int, protocol: str | None = None) -> Samples:
    """Open an npz, a folder of images, or the data section of a configuration (see `find_config`).

    Under ADM's ``protocol`` images stay as they are stored, whatever EXIF says of their orientation.
    """
    path, as_stored = find_config(path), protocol == "adm"
    if path.suffix in (".yaml", ".yml"):
        data = load_config(path).data
        return open_data(data.model_copy(update={"exif": "ignore"}) if as_stored else data, batch_size)
    if path.is_dir():
        return open_folder(path, batch_size, "ignore" if as_stored else _DATA.exif)
    if path.suffix == ".npz":
        return open_npz(path, batch_size)
    raise UserError(f"{path}: expected an npz, a folder of images, a configuration or a pipeline; check the path")


def open_npz(path: Path, batch_size: int) -> Samples:
    """Open ADM's npz: ``arr_0 (N, H, W, 3)`` uint8 and perhaps ``arr_1 (N,)`` labels; 10 GB never lie in memory."""
    # What the headers say; labels are small enough to be read at once.
    with broken_npz(path), zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if "arr_0.npy" not in names:
            raise UserError(f"npz {path}: no arr_0, only {', '.join(names)}; expected arr_0 (N, H, W, 3) uint8")
        with archive.open("arr_0.npy") as member:
            shape, dtype = _header(member)
        labels = []
        if "arr_1.npy" in names:
            with archive.open("arr_1.npy") as member:
                labels = np.lib.format.read_array(member, allow_pickle=False).ravel().tolist()
    if dtype != np.uint8 or len(shape) != 4 or shape[3] != 3 or not shape[0]:
        raise UserError(f"npz {path}: arr_0 is {dtype} {shape}; expected uint8 (N, H, W, 3); write it again")

    # A chunk is read where it lies in the file, by the process that it falls to.
    def chunks() -> Iterator[tuple[int, Tensor]]:
        with broken_npz(path), zipfile.ZipFile(path) as archive, archive.open("arr_0.npy") as member:
            _header(member)
            start, row = member.tell(), math.prod(shape[1:])
            for part in _own_parts(shape[0], batch_size):
                member.seek(start + part.start * row)
                content = member.read(len(part) * row)
                if len(content) != len(part) * row:
                    raise UserError(f"npz {path}: ends within image {part.start + len(content) // row}; write it again")
                rows = np.frombuffer(content, np.uint8).reshape(len(part), *shape[1:])
                yield part.start, torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())

    labels = labels if len(labels) == shape[0] else []
    return Samples(shape[0], chunks, {"kind": "npz", "path": str(path)}, labels)


def open_folder(path: Path, batch_size: int, exif: Exif) -> Samples:
    """Open the images below ``path`` in the order of their names; class folders give the labels."""
    left_out: Counter[str] = Counter()
    files = find_images(path, left_out, _DATA.rules)
    tell_left_out(path, left_out)
    if not files:
        raise UserError(f"folder {path}: no images; expected files such as .png or .jpg")
    first_shape = cache(lambda: _read_image(files[0], exif).shape)

    def read(index: int) -> Tensor:
        image = _read_image(files[index], exif)
        if image.shape != first_shape():
            sides = [f"{width}x{height}" for _, height, width in (image.shape, first_shape())]
            advice = "resize them to one size, or give the configuration of a run, which crops them"
            raise UserError(f"image {files[index]} is {sides[0]}, the first one {sides[1]}; {advice}")
        return image

    identity = {"kind": "folder", "path": str(path), "listing_sha256": listing_digest(path, files), "exif": exif}
    labels = [file.parent for file in files]
    return Samples(len(files), lambda: _stacked(read, len(files), batch_size), identity, labels)


def open_data(data: DataConfig, batch_size: int) -> Samples:
    """Open the images of a configuration's data section, the split that it names, as a training reads them."""
    found = open_images(data)
    images = readable(found, data)
    identity = {"kind": "data", "path": data.path or data.source, **data.model_dump(include=_DECIDING)}
    identity |= {key: value for key in ("source_kwargs", "held_out") if (value := getattr(data, key))}
    count, labels = len(images), [images.class_names[label] for label in images.labels.tolist()]
    if broken := len(found) - count:
        identity["broken"] = broken
        tell_left_out(Path(identity["path"]), Counter({"broken image": broken}))
    return Samples(count, lambda: _stacked(images.read, count, batch_size), identity, labels)


def _own_parts(count: int, batch_size: int) -> Iterator[range]:
    """Return the chunks of ``count`` images that fall to this process, which reads each of them whole."""
    rank, world = rank_and_world()
    return (range(count)[i : i + batch_size] for i in range(rank * batch_size, count, world * batch_size))


def _stacked(read: Callable[[int], Tensor], count: int, batch_size: int) -> Iterator[tuple[int, Tensor]]:
    return ((part.start, torch.stack(list(map(read, part)))) for part in _own_parts(count, batch_size))


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
    with decoding(f"image {file}", "replace or remove it"), Image.open(file) as image:
        image.load()
        mode, pixels = image.mode, np.asarray(upright(image) if exif == "apply" else image)
    if mode != "RGB":
        raise UserError(f"image {file} has mode {mode}; expected RGB with 8 bits per channel; convert it")
    return torch.from_numpy(pixels.transpose(2, 0, 1).copy())


def _header(member: IO[bytes]) -> tuple[tuple[int, ...], np.dtype[Any]]:
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = read(member)
    if fortran:
        raise ValueError("column-major array")
    return shape, dtype
