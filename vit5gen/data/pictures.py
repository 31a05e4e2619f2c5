"""Which files are images, and what their pixels are: one answer for training, evaluation and classification.

Two versions of the rules: 2 is described here; 1 keeps the choices of a run that began under an earlier version.
"""

import os
import re
import sys
import zlib
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import suppress
from functools import cache
from hashlib import sha256
from pathlib import Path, PurePath

import numpy as np
from PIL import Image
from PIL.Image import Transpose as T

from vit5gen.section import Exif, Rules
from vit5gen.system.distributed import processes
from vit5gen.system.errors import UserError, listed
from vit5gen.system.files import cache_folder, write_text
from vit5gen.system.files import sha256 as hash_file

_OLD_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".ppm", ".pgm")
# Still images that Pillow opens. A list, so that a folder holds the same images whatever Pillow was built with; layered
# files, icons, vector graphics, depth maps (.pfm) and raw numbers are not in it.
SUFFIXES = (
    *_OLD_SUFFIXES,
    *(".jpe", ".jfif", ".mpo", ".apng", ".dib", ".pbm", ".pnm", ".avif", ".avifs"),
    *(".jp2", ".j2k", ".j2c", ".jpc", ".jpf", ".jpx", ".tga", ".qoi", ".pcx", ".sgi"),
)
# What systems and archivers leave in folders, beside names that begin with a dot.
_CLUTTER = {
    *("__macosx", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information", "lost+found"),
    *("thumbs.db", "ehthumbs.db", "desktop.ini"),
}
# What Pillow raises for a file that it cannot decode; RuntimeError for an AVIF.
UNREADABLE = (OSError, RuntimeError, SyntaxError, ValueError, zlib.error, Image.DecompressionBombError)
_LONGEST = 16  # times as long as wide: more of a strip no square crop shows
# How an image turns whose EXIF orientation is 2, 3, ... 8.
_TURNS = (T.FLIP_LEFT_RIGHT, T.ROTATE_180, T.FLIP_TOP_BOTTOM, T.TRANSPOSE, T.ROTATE_270, T.TRANSVERSE, T.ROTATE_90)


def find_images(folder: Path, left_out: Counter[str], rules: Rules) -> list[Path]:
    """Return the images at any depth below a folder, sorted; add what is left out to ``left_out``, by kind.

    Links to folders are followed, but for those that lead back to a folder in which they lie.
    Raises `UserError` for a folder that cannot be read.
    """
    found: list[Path] = []
    stack = [(folder, frozenset(map(_identity, (folder, *folder.resolve().parents))))]
    while stack:
        here, above = stack.pop()
        folders, images = _list_folder(here, left_out, rules)
        found += images
        for inner in folders:
            if rules == 1 and inner.is_symlink():
                continue
            if (identity := _identity(inner)) in above:
                left_out["link to a folder above it"] += 1
            else:
                stack.append((inner, above | {identity}))
    return sorted(found)


def find_classes(root: Path, rules: Rules) -> tuple[dict[str, list[Path]], dict[str, str]]:
    """Return the images of each class folder, by name in order, and what the folders without any hold instead.

    What is left out is reported on stderr. Raises `UserError` for a folder that cannot be read.
    """
    left_out: Counter[str] = Counter()
    folders, beside = _list_folder(root, left_out, rules)
    left_out["image outside class folders"] += len(beside)
    files: dict[str, list[Path]] = {}
    instead: dict[str, str] = {}
    for name in sorted(folder.name for folder in folders):
        if rules == 1 and name.startswith("."):
            continue
        others: Counter[str] = Counter()
        files[name] = find_images(root / name, others, rules)
        if not files[name]:
            instead[name] = f"found: {_count_by_kind(others)}" if others else "its folder is empty"
        left_out += others
    tell_left_out(root, left_out)
    return files, instead


def folder_names(folder: Path) -> tuple[list[str], bool]:
    """Return the names of the folders in a folder that may hold data, sorted, and whether images are next to them."""
    folders, images = _list_folder(folder, Counter(), 2)
    return sorted(inner.name for inner in folders), bool(images)


def tell_left_out(folder: Path, left_out: Counter[str]) -> None:
    """Say once, and on the main process only, how many files of which kinds are not used."""
    if total := left_out.total():
        print_once(f"note: {folder}: {total} {'file' if total == 1 else 'files'} skipped ({_count_by_kind(left_out)})")


@cache  # a command opens its data several times
def print_once(line: str) -> None:
    """Print a line on stderr, once and on the main process only."""
    if processes().is_main_process:
        print(line, file=sys.stderr, flush=True)


def _count_by_kind(kinds: Counter[str]) -> str:
    ordered = sorted((-count, kind) for kind, count in kinds.items() if count)
    return listed(f"{-count} {kind}" for count, kind in ordered)


def _list_folder(folder: Path, left_out: Counter[str], rules: Rules) -> tuple[list[Path], list[Path]]:
    """Return the folders and the images that lie in a folder, without opening any file."""
    kinds: dict[str, list[Path]] = {"folder": [], "image": []}
    try:
        with os.scandir(folder) as entries:
            for entry in entries:
                kind = _kind(entry, rules)
                if kind in kinds:
                    kinds[kind].append(folder / entry.name)
                elif entry.name != "card.json":  # of samples; it is read
                    left_out[kind] += 1
    except OSError as error:
        raise UserError(f"folder {folder} cannot be read ({error.strerror}); make it readable or remove it") from error
    return kinds["folder"], kinds["image"]


def _kind(entry: os.DirEntry[str], rules: Rules) -> str:
    """Return folder or image, or why the entry is neither."""
    if rules > 1 and (entry.name.startswith(".") or entry.name.lower() in _CLUTTER):
        return "hidden"
    try:
        if entry.is_dir():
            return "folder"
        regular = entry.is_file()
    except OSError:  # a link to itself
        regular = False
    if not regular:
        return "not a regular file" if os.path.exists(entry.path) else "broken link"
    suffix = PurePath(entry.name).suffix.lower()
    if suffix in (SUFFIXES if rules > 1 else _OLD_SUFFIXES):
        return "image"
    if not suffix:
        return "without a suffix"
    return suffix if re.fullmatch(r"\.\w{1,12}", suffix) else "with another suffix"


def _identity(folder: Path) -> tuple[int, int]:
    status = folder.stat()
    return status.st_dev, status.st_ino


def listing_digest(root: Path, files: Sequence[Path]) -> str:
    """Return the SHA-256 of the names below ``root`` and the sizes of files."""
    return _digest(f"{file.relative_to(root).as_posix()} {file.stat().st_size}\n" for file in files)


def _digest(lines: Iterable[str]) -> str:
    return sha256("".join(lines).encode(errors="surrogateescape")).hexdigest()


def content_digest(root: Path, files: Sequence[Path]) -> str:
    """Return the SHA-256 of the names below ``root`` and the contents of files."""
    hashes = zip(files, content_hashes(root, files), strict=True)
    return _digest(f"{file.relative_to(root).as_posix()} {content}\n" for file, content in hashes)


def content_hashes(root: Path, files: Sequence[Path]) -> list[str]:
    """Return the SHA-256 of each file's content.

    They are remembered in the cache for as long as names, sizes and times of change stay: these take a moment to look
    at.
    """
    looked_at = [file.stat() for file in files]
    times = [f"{status.st_mtime_ns} {status.st_ctime_ns}\n" for status in looked_at]
    key = _digest([f"{root.resolve()}\n{listing_digest(root, files)}\n", *times])
    known = cache_folder() / f"hashes-{key}.txt"
    with suppress(OSError, ValueError):  # absent or damaged
        if re.fullmatch(r"[0-9a-f]{64}(\n[0-9a-f]{64})*", found := known.read_text(encoding="ascii")):
            return found.split("\n")
    hashes = [hash_file(file) for file in files]
    with suppress(OSError):
        write_text(known, "\n".join(hashes))
    return hashes


def to_rgb(image: Image.Image, exif: Exif, rules: Rules) -> Image.Image:
    """Return an image in RGB with 8 bits, transparent pixels white, upright where ``exif`` is ``apply``.

    Raises `ValueError` as `eight_bits` does.
    """
    pixels = eight_bits(image) if rules > 1 else image
    if pixels.has_transparency_data:
        pixels = pixels.convert("RGBA")
        pixels = Image.alpha_composite(Image.new("RGBA", pixels.size, "white"), pixels)
    pixels = pixels.convert("RGB")
    return upright(image, pixels) if exif == "apply" else pixels


def eight_bits(image: Image.Image) -> Image.Image:
    """Scale grey levels of 16 bits, and floats from 0 to 1, to 8 bits; return other images as they are.

    Pillow's own conversion cuts them off at 255. Raises `ValueError` for numbers whose range is not known.
    """
    if image.mode not in ("I", "F") and not image.mode.startswith("I;"):
        return image
    values = np.asarray(image)
    tags = getattr(image, "tag_v2", {})  # of a TIFF
    if image.mode == "F":
        top = 1.0
    elif image.mode == "I" and image.format not in ("PPM", "PNG"):  # 16 bits, for which Pillow takes 32 there
        top = 0.0
    else:
        top = 2.0 ** tags.get(258, (16,))[0] - 1  # BitsPerSample may be 12
    if not (top and values.min() >= 0 and values.max() <= top):  # nor NaN
        found = f"mode {image.mode} with values from {values.min():g} to {values.max():g}"
        raise ValueError(f"{found}; expected 8 or 16 bits, or floats from 0 to 1")
    grey = np.rint(values * (255 / top)).astype(np.uint8)
    if tags.get(262) == 0:  # of a TIFF in which 0 is white, which Pillow minds for 8 bits only
        grey = 255 - grey
    if isinstance(clear := image.info.get("transparency"), int):
        grey[values == clear] = 255
    return Image.fromarray(grey)


def upright(image: Image.Image, pixels: Image.Image | None = None) -> Image.Image:
    """Return an image, or ``pixels`` made of it, as its EXIF orientation says; of a TIFF Pillow has seen to it."""
    pixels = image if pixels is None else pixels
    try:
        image.load()  # a TIFF is turned here, and a PNG may tell after its pixels
        turn = dict(enumerate(_TURNS, start=2)).get(image.getexif().get(0x0112, 1))
    except Exception:  # damaged EXIF raises whatever its bytes lead to; the pixels are sound
        turn = None
    return pixels if turn is None else pixels.transpose(turn)


def cut_strip(image: Image.Image) -> Image.Image:
    """Cut the middle out of an image that is over 16 times as long as wide: scaled whole it would take gigabytes."""
    width, height = image.size
    left, top = (max(0, side - _LONGEST * min(image.size)) // 2 for side in (width, height))
    return image.crop((left, top, width - left, height - top)) if left or top else image
