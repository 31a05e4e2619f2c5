"""Images on disk that survive a kill: a grid, a folder of PNGs, or an npz as ADM's evaluator reads it.

While it grows, an output lies in a hidden folder: the card, the pixels, and how many network evaluations each image
took (0: not there yet). An output is finished when its card is next to it; then the hidden folder is deleted.
"""

import math
import os
import shutil
import zipfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit5gen.generation.grid import save_grid, save_png, with_attribution
from vit5gen.system.errors import UserError, short
from vit5gen.system.files import atomic, read_json, write_json

COMPARED = ("settings", "checkpoint_sha256", "versions")  # the parts of a card that decide the pixels
MOST_IMAGES = 2500  # images
_BLOCK = 2**24  # bytes read at once


@dataclass(frozen=True)
class Output:
    """A file of images, ``shape`` (N, H, W, 3) uint8, made at the end of the pixels kept in the hidden folder."""

    path: Path
    shape: tuple[int, int, int, int]
    card_suffix: ClassVar[str] = ".card.json"

    @property
    def card_file(self) -> Path:
        """FOLDER/card.json, FILE.card.json of FILE.npz, FILE.png.card.json of FILE.png."""
        return self.path.with_suffix(self.card_suffix)

    @property
    def part(self) -> Path:
        """The hidden folder of an output that is not finished."""
        return self.path.with_name(f".{self.path.name}.part")

    @property
    def missing_bytes(self) -> int:
        """Bytes on the disk that are still needed: a single file is assembled next to the pixels, before these go."""
        pixels = self.part / "pixels"
        return 2 * math.prod(self.shape) - (pixels.stat().st_blocks * 512 if pixels.exists() else 0)

    @property
    def finished(self) -> bool:
        return self.card_file.is_file() and self.path.exists()

    def check(self, card: dict[str, Any]) -> None:
        """Raise `UserError` when the output has images of another card or of none, or the disk is too small."""
        cards = [file for file in (self.card_file, self.part / "card.json") if file.is_file()]
        for file in cards:
            if differing := _differences(read_json(file, "card"), card):
                found = f"output {self.path} contains images made with other settings: {differing}"
                raise UserError(f"{found}; choose another --output or delete this one")
        for file in (self.card_file, self.path):
            if file.is_dir() and file not in self.part.parents:  # a folder of images holds its part
                raise UserError(f"output {file} is a folder; choose another --output or delete it")
        # A kill may have left a hidden folder without a card.
        inside = self.path.iterdir() if self.path.is_dir() else [self.path] if self.path.exists() else []
        if not cards and any(file != self.part for file in inside):
            raise UserError(f"output {self.path} exists and has no card; choose another --output or delete it")
        path = self.path.absolute()
        existing = next(folder for folder in (path, *path.parents) if folder.exists())
        need, free = self.missing_bytes, shutil.disk_usage(existing).free
        if free < need and not self.finished:
            raise UserError(f"output {path} needs {need / 1e9:.2g} GB, {free / 1e9:.2g} GB are free; free some space")

    def create_part(self, card: dict[str, Any]) -> None:
        """Make the hidden folder, unless a killed run has left it; one process calls this."""
        evaluations = self.part / "evaluations"
        if not evaluations.exists():
            self.part.mkdir(parents=True, exist_ok=True)
            write_json(self.part / "card.json", card)
            (self.part / "pixels").touch()
            with atomic(evaluations) as temporary:
                temporary.write_bytes(bytes(4 * self.shape[0]))

    def evaluations(self) -> np.ndarray:
        """Return the network evaluations of every image, (N,) int64; 0 where it is not drawn yet."""
        return np.fromfile(self.part / "evaluations", dtype="<u4").astype(np.int64)

    def images(self) -> Tensor:
        """Return the images that were kept, (N, 3, H, W) uint8, of a single file."""
        pixels = np.fromfile(self.part / "pixels", dtype=np.uint8).reshape(self.shape)
        return torch.from_numpy(pixels).permute(0, 3, 1, 2)

    def write(self, indices: range, images: Tensor, labels: Sequence[int], evaluations: int) -> None:
        """Keep images (B, 3, H, W) uint8 of consecutive indices, and note them as drawn once they are on the disk."""
        self._keep(indices, images.permute(0, 2, 3, 1).contiguous().numpy(), labels)
        counts = np.full(len(indices), evaluations, dtype="<u4")
        _write_at(self.part / "evaluations", 4 * indices.start, counts.tobytes())

    def finish(self, card: dict[str, Any], labels: Sequence[int], titles: Sequence[str]) -> None:
        """Assemble the output of all images and, last, write its card; one process calls this."""
        self._assemble(card, labels, titles)
        counts = network_evaluations(int(self.evaluations().sum()), self.shape[0])
        with self._new_file(self.card_file) as temporary:
            write_json(temporary, {**card, "network_evaluations": counts})

    @contextmanager
    def _new_file(self, path: Path) -> Iterator[Path]:
        """Write ``path`` atomically, so that what a kill leaves of it lies in the hidden folder and goes with it."""
        with atomic(self.part / f"new_{path.name}") as temporary:
            yield temporary
        os.replace(self.part / f"new_{path.name}", path)

    def tidy(self) -> None:
        """Remove the hidden folder of an output that is finished or has no image yet; one process calls this."""
        if self.part.exists() and (self.finished or not self.evaluations().any()):
            shutil.rmtree(self.part)
            if self.path.is_dir() and not any(self.path.iterdir()):
                self.path.rmdir()

    def _keep(self, indices: range, pixels: np.ndarray, labels: Sequence[int]) -> None:
        """Put pixels (B, H, W, 3) of consecutive indices on the disk."""
        _write_at(self.part / "pixels", indices.start * pixels[0].nbytes, pixels.tobytes())

    def _assemble(self, card: dict[str, Any], labels: Sequence[int], titles: Sequence[str]) -> None:
        """Make the output of what was kept, unless it is that already."""


class NpzOutput(Output):
    """FILE.npz: ``arr_0`` (N, H, W, 3) uint8 and ``arr_1``, the labels (N,) int64; equal images give equal bytes."""

    def _assemble(self, card: dict[str, Any], labels: Sequence[int], titles: Sequence[str]) -> None:
        header = {"descr": "|u1", "fortran_order": False, "shape": self.shape}
        with self._new_file(self.path) as temporary, zipfile.ZipFile(temporary, "w") as archive:
            # ZipInfo's time is 1980 unless it is given another.
            with (
                archive.open(zipfile.ZipInfo("arr_0.npy"), "w", force_zip64=True) as array,
                (self.part / "pixels").open("rb") as pixels,
            ):
                np.lib.format.write_array_header_1_0(array, header)
                shutil.copyfileobj(pixels, array, _BLOCK)
            with archive.open(zipfile.ZipInfo("arr_1.npy"), "w") as array:
                np.lib.format.write_array(array, np.asarray(labels, dtype=np.int64))


@dataclass(frozen=True)
class GridOutput(Output):
    """FILE.png: a grid with a row for each class, in the order in which the card's settings list them.

    below: a picture (3, H, W) uint8 for each image, to stand below it.  caption: of the grid.
    """

    card_suffix: ClassVar[str] = ".png.card.json"
    below: Sequence[Tensor] = ()
    caption: Sequence[str] = ()

    def _assemble(self, card: dict[str, Any], labels: Sequence[int], titles: Sequence[str]) -> None:
        place = {label: number for number, label in enumerate(card.get("settings", {}).get("classes", ()))}
        order = np.argsort([place.get(label, label) for label in labels], kind="stable")
        with self._new_file(self.path) as temporary:
            labels, titles = [labels[i] for i in order], [titles[i] for i in order]
            images, below = self.images()[order], [self.below[i] for i in order if self.below]
            save_grid(temporary, images, labels, titles, None, self.caption, settings_of(card), below)


class FolderOutput(Output):
    """FOLDER with ``INDEX_LABEL.png``; the images need no assembly."""

    @property
    def card_file(self) -> Path:
        return self.path / "card.json"

    @property
    def part(self) -> Path:
        return self.path / ".part"

    @property
    def missing_bytes(self) -> int:
        return math.prod(self.shape)  # of PNGs, which are smaller

    def _keep(self, indices: range, pixels: np.ndarray, labels: Sequence[int]) -> None:
        settings = settings_of(read_json(self.part / "card.json", "card"))
        for index, label, image in zip(indices, labels, pixels, strict=True):
            with self._new_file(self.path / f"{index:06d}_{label}.png") as temporary:
                save_png(Image.fromarray(image), temporary, settings | {"index": index, "label": label})


def open_output(path: Path, shape: tuple[int, int, int, int]) -> Output:
    """Return the output at FILE.npz, FILE.png or a folder; raise `UserError` for another suffix or too large a grid."""
    suffix = path.suffix.lower()
    if suffix in (".jpg", ".jpeg", ".webp", ".gif", ".npy", ".zip"):
        raise UserError(f"output {path}: unknown format; expected FILE.npz, FILE.png or a folder")
    if suffix == ".png" and shape[0] > MOST_IMAGES:
        raise UserError(f"output {path}: {shape[0]} images are too many for a grid; use FILE.npz or a folder")
    return {".npz": NpzOutput, ".png": GridOutput}.get(suffix, FolderOutput)(path, shape)


def network_evaluations(total: int, num_images: int) -> dict[str, float]:
    """Return what a card records of the network evaluations of its images."""
    return {"total": total, "per_image": total / num_images}


def settings_of(card: dict[str, Any]) -> dict[str, Any]:
    """Return what a PNG records of a card: what decides its pixels, and the attribution."""
    settings = {**card.get("settings", {}), "checkpoint_sha256": card.get("checkpoint_sha256")}
    return with_attribution(settings, card.get("attribution"))


def _write_at(path: Path, offset: int, data: bytes) -> None:
    with path.open("rb+") as file:
        file.seek(offset)
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def _differences(there: dict[str, Any], here: dict[str, Any]) -> str:
    """Name up to three settings in which two cards differ, with both values; empty when none decides the pixels."""
    old, new = (_deciding(card) for card in (there, here))
    names = [name for name in new | old if old.get(name) != new.get(name)]
    return ", ".join(f"{name} is {short(old.get(name))} in the card, {short(new.get(name))} now" for name in names[:3])


def _deciding(card: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for part in COMPARED:
        flat |= value if isinstance(value := card.get(part), dict) else {part: value}
    return flat
