"""Fashion-MNIST from its four idx files."""

import gzip
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.nn import functional

from vit5gen.config import DataConfig
from vit5gen.data.images import ImageSet, Source, centre_crop, digest_pixels, register_source
from vit5gen.system.errors import UserError

_CLASSES = ["t-shirt", "trouser", "pullover", "dress", "coat", "sandal", "shirt", "sneaker", "bag", "ankle-boot"]
FASHION_FOLDER = "/usr/share/datasets/fashion-mnist"  # of Debian's package dataset-fashion-mnist


@register_source("fashion-mnist")
class FashionMnistSource(Source):
    """Grey pictures of clothes, of a folder with the idx files or of Debian's package."""

    splits = ("train", "test")
    reads_files = False

    def __init__(self, data: DataConfig) -> None:
        super().__init__(data)
        self.path = data.path or FASHION_FOLDER

    def open(self, split: str) -> ImageSet:
        prefix = {"train": "train", "test": "t10k"}[split]
        root = self.need_folder("install Debian's dataset-fashion-mnist or set data.path to the idx files")
        pixels = torch.from_numpy(_read_idx(root, f"{prefix}-images-idx3-ubyte"))
        labels = torch.from_numpy(_read_idx(root, f"{prefix}-labels-idx1-ubyte").astype(np.int64))
        if len(pixels) != len(labels) or labels.max() >= len(_CLASSES):
            raise UserError(f"data.path {root}: images and labels do not match; download the files again")
        read = partial(_read_grey, pixels, self.data)
        return ImageSet(_CLASSES, labels, read, partial(digest_pixels, pixels))

    def missing(self) -> dict[str, str]:
        return self.missing_folder("apt install dataset-fashion-mnist, or copy the four idx files from torchvision")

    def image_bytes(self) -> int:
        return 70_000 * 28 * 28  # both splits


def _read_idx(root: Path, name: str) -> np.ndarray:
    folders, files = (root, root / "FashionMNIST" / "raw"), (name, f"{name}.gz")
    path = next((path for folder in folders for file in files if (path := folder / file).is_file()), None)
    if path is None:
        raise UserError(f"data.path {root}: no file {name} or {name}.gz; expected the four idx files of Fashion-MNIST")
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        dimensions = content[3]
        shape = np.frombuffer(content, ">i4", dimensions, offset=4)
        return np.frombuffer(content, np.uint8, offset=4 + 4 * dimensions).reshape(shape).copy()
    except (OSError, EOFError, ValueError, IndexError) as error:
        raise UserError(f"data.path: {path} is not an idx file ({error}); download it again") from error


def _read_grey(pixels: torch.Tensor, data: DataConfig, index: int) -> torch.Tensor:
    """28x28 grey, padded to 32 with the black of the background, scaled only when another size is asked for."""
    image = functional.pad(pixels[index], (2, 2, 2, 2)).expand(3, 32, 32)
    if data.resolution == 32:
        return image
    return centre_crop(Image.fromarray(image.permute(1, 2, 0).numpy()), data.resolution, data.exif, data.rules)
