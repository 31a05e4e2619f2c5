"""Labelled images for train_classifier.py: pictures of the package, or folders in ImageNet's layout; their checks."""

from argparse import Namespace
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from timm.data import ImageDataset, create_dataset
from torch.utils.data import Dataset, Subset

from vit5gen.config import DataConfig
from vit5gen.data.images import decoding, make_source, open_images
from vit5gen.system.errors import UserError, listed


class Pictures(Dataset[tuple[Any, int]]):
    def __init__(self, config: DataConfig) -> None:
        self.images, self.transform = open_images(config), Image.Image.copy

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        pixels, label = self.images[index]
        return self.transform(Image.fromarray(pixels.permute(1, 2, 0).numpy())), label


class HeldOut(ImageDataset):
    """Images of a folder, of which none may be replaced by the next: timm's own does so where one does not decode."""

    def __getitem__(self, index: int) -> tuple[Any, int]:
        path, label = self.reader.samples[index]
        with decoding(path, "replace or remove it"), Image.open(path) as file:
            image = file.convert("RGB")
        return self.transform(image), label


def open_data(options: Namespace) -> tuple[Any, Any, list[str], str | None]:
    """Return training and held-out images, the names of the classes by label, and the line that a licence wants.

    Raises `UserError` where either has no images, or a class is held out of which there is none to train on.
    """
    if options.data_path and options.data != "fashion-mnist":
        raise UserError(f"--data-path {options.data_path}: is for --data fashion-mnist; omit it")
    if options.data in ("emoji", "fashion-mnist"):
        config = DataConfig(source=options.data, path=options.data_path or None, resolution=options.img_size)
        data, held_out = Pictures(config), Pictures(config.model_copy(update={"split": "test"}))
        return data, held_out, data.images.class_names, make_source(config).attribution
    root = Path(options.data)
    names, tested = ([p.name for p in sorted((root / part).glob("*")) if p.is_dir()] for part in ("train", "val"))
    if not names or not (root / "val").is_dir():
        raise UserError(f"--data {root}: expected folders train/CLASS and val/CLASS in it, or emoji, or fashion-mnist")
    if unknown := sorted({*tested} - {*names}):
        raise UserError(f"--data {root}: val has {listed(unknown, 3)}, which train lacks; add to train, or remove")
    numbers = {name: number for number, name in enumerate(names)}  # timm's own order is another for "2" and "10"
    try:
        data = create_dataset("", root / "train", class_map=numbers)
        return data, HeldOut(str(root / "val"), class_map=numbers), names, None
    except RuntimeError as error:  # no images
        raise UserError(f"--data {root}: {error}; put images there") from error


def selected(data: Any, count: int, balanced: int) -> Subset[tuple[Any, int]]:
    """Return so many training images (0: all), of which those of a small class come again and again if balanced."""
    labels = data.images.labels if isinstance(data, Pictures) else torch.tensor([n for _, n in data.reader.samples])
    same = torch.Generator().manual_seed(0)  # whatever the seed of the run
    order = torch.randperm(len(data), generator=same)[: count or None]
    if balanced:
        classes = [order[labels[order] == label] for label in labels[order].unique()]
        order = torch.cat([found[torch.arange(max(map(len, classes))) % len(found)] for found in classes])
    return Subset(data, order.tolist())
