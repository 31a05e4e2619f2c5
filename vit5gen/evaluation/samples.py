"""Images that are scored or compared with, read in chunks: npz, folders, archives, data sections. RGB of one size."""

import io
import math
import tarfile
import zipfile
import zlib
from collections import Counter, deque
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from hashlib import blake2b, sha256
from itertools import groupby
from pathlib import Path, PurePath, PurePosixPath
from threading import Lock
from typing import IO, Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit5gen.config import DataConfig, ReadConfig, find_config, load_config
from vit5gen.data.images import centre_crop, decoding, make_source, open_images, readable
from vit5gen.data.pictures import SUFFIXES, find_images, listing_digest, print_once, tell_left_out, upright
from vit5gen.evaluation.conversion import find_conversion, quantised
from vit5gen.section import Exif
from vit5gen.system.cpu import cores
from vit5gen.system.distributed import gather_objects, is_main, rank_and_world
from vit5gen.system.errors import UserError, listed
from vit5gen.system.progress import Progress

_DATA, _AS_STORED = DataConfig(), ReadConfig()
_PACKED = (".tgz", ".tar.gz", ".tar.bz2", ".tar.xz", ".tar.zst")
_LARGEST_FILE = 2**28  # bytes, of a picture in an archive
_AHEAD = 2  # chunks that are read before they are asked for
_FILTERS = {"resize": "bicubic, antialiased (Pillow)", "crop": "halved by a box filter, then bicubic; centre square"}
_DECIDING = {"source", "split", "resolution", "exif", "rules"}  # keys of the data section


@dataclass(frozen=True)
class Samples:
    """``count`` images, of which ``chunks()`` gives this process's ``(first index, uint8 (B, 3, H, W))``.

    In place of the first index there may be all of them, ``(B,)``.
    ``identity`` says in a card which images these were, ``sampling`` how they were drawn; ``labels`` are classes:
    names, class folders, or numbers without a name.
    ``hashes`` (one tensor) are there when `watch` has ended: 64 bits (BLAKE2) of each image's pixels, as scored.
    """

    count: int
    chunks: Callable[[], Iterable[tuple[int | Tensor, Tensor]]]
    identity: dict[str, Any]
    labels: Sequence[Hashable] = ()
    sampling: dict[str, Any] | None = None
    hashes: list[Tensor] = field(default_factory=list)

    def watch(self) -> Iterator[tuple[int | Tensor, Tensor]]:
        """Yield the chunks, behind a progress bar, and keep the hashes of the images of all processes."""
        found: list[int] = []
        world, name = rank_and_world()[1], Path(self.identity["path"]).name
        with Progress(name, self.count, "image", silent=not is_main()) as progress:
            for first, images in self.chunks():
                pixels = (blake2b(image.numpy(), digest_size=8).digest() for image in images.contiguous())
                found += [int.from_bytes(digest, "little", signed=True) for digest in pixels]
                yield first, images
                progress.update(min(len(images) * world, self.count - progress.n))
        self.hashes[:] = [torch.cat(gather_objects(torch.tensor(found, dtype=torch.int64)))]

    def shuffled(self) -> "Samples":
        """Return the images in an order that depends on their number alone; they are read in the order of the file."""
        order = torch.randperm(self.count, generator=torch.Generator().manual_seed(0))
        labels = [self.labels[i] for i in order.argsort()] if self.labels else ()

        def chunks() -> Iterator[tuple[Tensor, Tensor]]:
            for first, images in self.chunks():
                yield order[indices_of(first, len(images))], images

        read = {**self.identity.get("read", {}), "shuffle": "torch.randperm, seed 0"}
        return replace(self, chunks=chunks, labels=labels, identity=self.identity | {"read": read})

    @property
    def class_names(self) -> list[str]:
        """The name of each image's class, or its number in digits where it has none."""
        return [label.name if isinstance(label, PurePath) else str(label) for label in self.labels]

    def labels_among(self, classes: Collection[str]) -> Tensor | None:
        """Return the place (N,) of each image's class among ``classes``; None where one is not there, or unknown."""
        numbers, names = {name: number for number, name in enumerate(classes)}, self.class_names
        return torch.tensor([numbers[name] for name in names]) if names and numbers.keys() >= set(names) else None

    @property
    def sorted_by_class(self) -> bool:
        """Whether all images of a class stand together, and there are several of some."""
        runs = [label for label, _ in groupby(self.labels)]
        return 1 < len(runs) == len(set(runs)) < len(self.labels)


def indices_of(first: int | Tensor, count: int) -> Tensor:
    """Return the indices ``(count,)`` of the images of a chunk."""
    return torch.arange(first, first + count) if isinstance(first, int) else first


def check_used(read: ReadConfig, identities: Iterable[dict[str, Any]]) -> None:
    """Raise `UserError` for an option that had no effect on any of these sets of images."""
    used = {name for identity in identities for name in identity.get("read", {})}
    for name in ReadConfig.model_fields:
        if getattr(read, name) not in (None, False) and name not in used:
            raise UserError(f"--{name} has no effect on any of these images; omit it")


def open_image_set(
    path: str | Path, batch_size: int, protocol: str | None = None, read: ReadConfig = _AS_STORED
) -> Samples:
    """Open an npz, a folder or archive of images, or the data section of a configuration (see `find_config`).

    Under ADM's ``protocol`` images stay as they are stored, whatever EXIF says of their orientation.
    ``identity["read"]`` holds the options of ``read`` that had an effect; `Samples.shuffled` is up to the caller.
    """
    path, as_stored = find_config(path), protocol == "adm"
    suffix, exif = path.suffix.lower(), "ignore" if as_stored else _DATA.exif
    if path.suffix in (".yaml", ".yml"):
        data = load_config(path).data
        return open_data(data.model_copy(update={"exif": "ignore"}) if as_stored else data, batch_size)
    if path.is_dir():
        return open_folder(path, batch_size, exif, read)
    if suffix == ".npz":
        return open_npz(path, batch_size, read)
    if suffix in (".zip", ".tar"):
        return open_archive(path, batch_size, exif, read)
    advice = "check the path"
    if path.name.lower().endswith(_PACKED):
        advice = "unpack it: PNG and JPEG are compressed already, and only a plain .tar can be read at any place"
    elif suffix == ".npy":
        advice = f"convert it: np.savez('converted.npz', arr_0=np.load({str(path)!r}))"
    raise UserError(f"{path}: expected an npz, a folder of images, a .zip or .tar, a configuration or a run; {advice}")


def open_npz(path: Path, batch_size: int, read: ReadConfig = _AS_STORED) -> Samples:
    """Open ADM's npz: ``arr_0 (N, H, W, 3)`` uint8 and perhaps ``arr_1 (N,)`` labels; 10 GB never lie in memory.

    ``read`` allows another array, of floats, and images of another side; ``(N, 3, H, W)`` is told by its shape.
    """
    # What the headers say; labels are small enough to be read at once.
    with broken_npz(path), zipfile.ZipFile(path) as archive:
        names = [name.removesuffix(".npy") for name in archive.namelist()]
        key = read.key if read.key in names else "arr_0"
        if key not in names:
            raise UserError(f"npz {path}: no {read.key or key}, only {listed(names)}; name the images with --key NAME")
        with archive.open(f"{key}.npy") as member:
            (shape, fortran, dtype), bounds = read_header(member), (0.0, 0.0)
            row = math.prod(shape[1:]) * dtype.itemsize
            if dtype.kind == "f" and (image := np.frombuffer(member.read(row), dtype)).size:
                bounds = float(image.min()), float(image.max())
        labels: list[Any] = []
        if label := next((name for name in ("arr_1", "labels", "label", "y") if name in names and name != key), None):
            with archive.open(f"{label}.npy") as member:
                found = np.lib.format.read_array(member, allow_pickle=False)
                labels = found.ravel().tolist() if found.size == shape[0] else []

    # What cannot be read as it is comes with the line that converts it.
    options: dict[str, Any] = {"key": key} if key == read.key else {}
    if dtype.kind == "f" and read.range is not None:
        options["range"] = read.range
    read_as = np.dtype(np.uint8) if "range" in options else dtype
    wrong, expression = find_conversion(shape, fortran, read_as, *bounds)
    if wrong:
        ranged = "give --range 0 1 or --range -1 1, or " if dtype.kind == "f" and read.range is None else ""
        line = f"a = np.load({str(path)!r})[{key!r}]; np.savez('converted.npz', arr_0={expression})"
        advice = f"{ranged}convert it: {line}" if expression else "write it again"
        raise UserError(f"npz {path}: {key} is {dtype} {shape}, not uint8 (N, H, W, 3): {wrong}; {advice}")
    turned = shape[3] != 3
    options |= _fitting(read, shape[2:] if turned else shape[1:3], f"npz {path}")
    identity: dict[str, Any] = {"kind": "npz", "path": str(path)} | ({"read": options} if options else {})
    if turned:
        identity["layout"] = "(N, 3, H, W)"
        print_once(f"note: npz {path}: {key} is {shape}, read as (N, 3, H, W)")

    # A chunk is read where it lies in the file, by the process that it falls to.
    def chunks() -> Iterator[tuple[int, Tensor]]:
        lowest = 0.0
        with broken_npz(path), zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
            read_header(member)
            start = member.tell()
            for part in _own_parts(shape[0], batch_size):
                member.seek(start + part.start * row)
                content = member.read(len(part) * row)
                if len(content) != len(part) * row:
                    raise UserError(f"npz {path}: ends within image {part.start + len(content) // row}; write it again")
                rows = np.frombuffer(content, dtype).reshape(len(part), *shape[1:])
                if "range" in options:
                    lowest = min(lowest, float(rows.min()))
                    rows = quantised(rows, options["range"], f"npz {path}: {key}, images from {part.start}")
                rows = rows.transpose(0, 2, 3, 1) if turned else rows
                if {"resize", "crop"} & options.keys():
                    fitted = [_fitted(Image.fromarray(image), read, "ignore") for image in rows]
                    yield part.start, torch.stack(fitted)
                else:
                    yield part.start, torch.from_numpy(rows.transpose(0, 3, 1, 2).copy())
        if options.get("range") == [-1, 1] and min(gather_objects(lowest)) >= 0:
            raise UserError(f"npz {path}: {key} has no values below 0, which do not fit --range -1 1; give --range 0 1")

    return Samples(shape[0], chunks, identity, labels)


def _fitting(read: ReadConfig, sides: Sequence[int] | None, what: str) -> dict[str, Any]:
    """Return what a card records of an option that changes images of ``sides`` (None: of several)."""
    for name in ("resize", "crop"):
        side = getattr(read, name)
        if side is not None and (sides is None or set(sides) != {side}):
            if name == "resize" and sides is not None and len(set(sides)) > 1:
                raise UserError(f"{what} has images of {sides[1]}x{sides[0]}, which are no squares; give --crop SIDE")
            return {name: side, "filter": _FILTERS[name]}
    return {}


def _fitted(image: Image.Image, read: ReadConfig, exif: Exif) -> Tensor:
    """Return an RGB image (3, H, W), of the side that ``read`` asks for."""
    if read.crop is not None:
        return centre_crop(image, read.crop, exif, _DATA.rules)
    image = upright(image) if exif == "apply" else image
    if read.resize is not None and image.width == image.height != read.resize:
        image = image.resize((read.resize, read.resize), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.asarray(image).transpose(2, 0, 1).copy())


def open_folder(path: Path, batch_size: int, exif: Exif, read: ReadConfig = _AS_STORED) -> Samples:
    """Open the images below ``path`` in the order of their names; class folders give the labels."""
    left_out: Counter[str] = Counter()
    files = find_images(path, left_out, _DATA.rules)
    tell_left_out(path, left_out)
    if not files:
        raise UserError(f"folder {path}: no images; expected files such as .png or .jpg")
    identity = {"kind": "folder", "path": str(path), "listing_sha256": listing_digest(path, files), "exif": exif}
    pictures = [(file, file) for file in files]
    return _open_pictures(pictures, lambda: nullcontext(((), Path)), identity, batch_size, exif, read)


def open_archive(path: Path, batch_size: int, exif: Exif, read: ReadConfig = _AS_STORED) -> Samples:
    """Open the images in a zip or a plain tar, in the order of their names; nothing is extracted to disk.

    Names order the images and, by their folders, label them; they are never used as paths.
    """
    kind = path.suffix[1:].lower()
    with _opened(path, kind) as (entries, _):
        found = sorted(((PurePosixPath(name), size, entry) for name, size, entry in entries), key=lambda one: one[0])
    files = [one for one in found if _is_picture(one[0])]
    tell_left_out(path, Counter(one[0].suffix or "without a suffix" for one in found if not _is_picture(one[0])))
    if not files:
        raise UserError(f"{kind} {path}: no images; expected files such as .png or .jpg")
    listing = "".join(f"{name} {size}\n" for name, size, _ in files).encode(errors="surrogateescape")
    identity = {"kind": kind, "path": str(path), "listing_sha256": sha256(listing).hexdigest(), "exif": exif}
    return _open_pictures(
        [(name, entry) for name, _, entry in files], lambda: _opened(path, kind), identity, batch_size, exif, read
    )


def _is_picture(name: PurePosixPath) -> bool:
    return name.suffix.lower() in SUFFIXES and not name.name.startswith(".")


@contextmanager
def _opened(path: Path, kind: str) -> Iterator[tuple[Iterable[tuple[str, int, Any]], Callable[[Any], IO[bytes]]]]:
    """Yield the name, size and entry of each regular file in an archive, and what reads an entry into memory."""
    entries: Iterable[tuple[str, int, Any]]
    open_entry: Any  # tarfile may return None, of what is no regular file
    with broken_npz(path, kind), zipfile.ZipFile(path) if kind == "zip" else tarfile.open(path, "r:") as archive:
        if isinstance(archive, zipfile.ZipFile):
            entries = ((one.filename, one.file_size, one) for one in archive.infolist() if not one.is_dir())
            open_entry = archive.open
        else:
            entries = ((one.name, one.size, one) for one in archive if one.isreg())
            open_entry = archive.extractfile

        # Whatever size the archive gives, or hides; one thread at a time, because all entries share a file's position.
        lock = Lock()

        def read_entry(entry: Any) -> IO[bytes]:
            with lock, open_entry(entry) as file:
                content = file.read(_LARGEST_FILE + 1)
            if len(content) > _LARGEST_FILE:
                raise UserError(f"{kind} {path}: a picture has over {_LARGEST_FILE} bytes; remove it")
            return io.BytesIO(content)

        yield entries, read_entry


def _open_pictures(
    files: Sequence[tuple[Path | PurePosixPath, Any]],
    opened: Callable[[], AbstractContextManager[tuple[Any, Callable[[Any], Any]]]],
    identity: dict[str, Any],
    batch_size: int,
    exif: Exif,
    read: ReadConfig,
) -> Samples:
    """Open pictures by their names and what ``opened()`` makes a file of; their sizes are told when they are read."""
    names = [name for name, _ in files]
    identity["formats"] = _formats(map(str, names))
    if options := _fitting(read, None, ""):
        identity["read"] = options

    def chunks() -> Iterator[tuple[int, Tensor]]:
        with opened() as (_, file_of):
            first_shape = _read_image(file_of(files[0][1]), names[0], exif, read).shape

            def read_one(index: int) -> Tensor:
                image = _read_image(file_of(files[index][1]), names[index], exif, read)
                if image.shape != first_shape:
                    sides = [f"{width}x{height}" for _, height, width in (image.shape, first_shape)]
                    advice = "give --crop SIDE, or resize them to one size"
                    raise UserError(f"image {names[index]} is {sides[0]}, the first one {sides[1]}; {advice}")
                return image

            yield from _stacked(read_one, len(names), batch_size, cores())

    return Samples(len(names), chunks, identity, [name.parent for name in names])


def _formats(names: Iterable[str]) -> list[str]:
    """Return the formats that the endings of files' names tell."""
    endings, kinds = {f".{name.rpartition('.')[2].lower()}" for name in names}, Image.registered_extensions()
    return sorted({kinds[ending] for ending in endings & kinds.keys()})


def open_held_out_set(path: str | Path, batch_size: int) -> Samples:
    """Open the held-out split of a configuration; raise `UserError` for what is none."""
    if (file := find_config(path)).suffix not in (".yaml", ".yml"):
        raise UserError(f"{path}: not a configuration, so it names no held-out images; give --held-out DATA")
    config = load_config(file)
    return open_data(config.data, batch_size, config.evaluation.held_out_split)


def open_data(data: DataConfig, batch_size: int, split: str | None = None) -> Samples:
    """Open the images of a configuration's data section as a training reads them; ``split`` replaces its own."""
    found = open_images(data, split)
    images = readable(found, data)
    identity = {"kind": "data", "path": data.path or data.source, **data.model_dump(include=_DECIDING)}
    identity |= {key: value for key in ("source_kwargs", "held_out") if (value := getattr(data, key))}
    identity |= {"split": split} if split else {}
    identity |= {"attribution": line} if (line := make_source(data).attribution) else {}
    count, labels = len(images), [images.class_names[label] for label in images.labels.tolist()]
    if broken := len(found) - count:
        identity["broken"] = broken
        tell_left_out(Path(identity["path"]), Counter({"broken image": broken}))
    if formats := _formats(map(images.name, range(count))):
        identity["formats"] = formats
    # By one thread: a stream, and perhaps a source of another package, gives one image at a time and in order.
    return Samples(count, lambda: _stacked(images.read, count, batch_size, threads=1), identity, labels)


def _own_parts(count: int, batch_size: int) -> Iterator[range]:
    """Return the chunks of ``count`` images that fall to this process, which reads each of them whole."""
    rank, world = rank_and_world()
    return (range(count)[i : i + batch_size] for i in range(rank * batch_size, count, world * batch_size))


def _stacked(read: Callable[[int], Tensor], count: int, batch_size: int, threads: int) -> Iterator[tuple[int, Tensor]]:
    """Yield this process's chunks in order; while one is used, so many threads read the next ones."""
    ahead: deque[tuple[int, list[Future[Tensor]]]] = deque()
    with ThreadPoolExecutor(threads) as pool:
        try:
            for part in _own_parts(count, batch_size):
                ahead.append((part.start, [pool.submit(read, index) for index in part]))
                if len(ahead) > _AHEAD:
                    yield _first_of(ahead)
            while ahead:
                yield _first_of(ahead)
        finally:
            pool.shutdown(cancel_futures=True)


def _first_of(ahead: deque[tuple[int, list[Future[Tensor]]]]) -> tuple[int, Tensor]:
    first, images = ahead.popleft()
    return first, torch.stack([image.result() for image in images])


@contextmanager
def broken_npz(path: Path, kind: str = "npz") -> Iterator[None]:
    """Turn what a broken archive raises into one line."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, EOFError, RuntimeError, zipfile.BadZipFile, tarfile.TarError, zlib.error) as error:
        raise UserError(f"{kind} {path} cannot be read ({error}); check the path or write it again") from error


def _read_image(file: Path | IO[bytes], name: Path | PurePosixPath, exif: Exif, read: ReadConfig) -> Tensor:
    with decoding(f"image {name}", "replace or remove it"), Image.open(file) as image:
        image.load()
        (width, height), mode = image.size, image.mode
        if read.crop is not None or (mode == "RGB" and (read.resize is None or width == height)):
            return _fitted(image, read, exif)
    if mode != "RGB":
        raise UserError(f"image {name} has mode {mode}; expected RGB with 8 bits per channel; convert it")
    raise UserError(f"image {name} is {width}x{height}, which is no square; give --crop SIDE")


def read_header(member: IO[bytes]) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Return shape, whether it is column-major, and type of an array in an npz."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    return read(member)
