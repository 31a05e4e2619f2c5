"""A data set of the Hugging Face hub, or a folder saved by the package datasets."""

from functools import partial
from io import BytesIO
from pathlib import Path
from typing import Any

import torch
from PIL import Image

from vit5gen.config import DataConfig
from vit5gen.data.images import ImageSet, Source, centre_crop, decoding, register_source
from vit5gen.system.errors import UserError, choose


@register_source("huggingface")
class HuggingFaceSource(Source):
    """A column of images and one of class labels: the only ones, or `data.image_column` and `data.label_column`."""

    def open(self, split: str) -> ImageSet:
        # The table of the split, from the hub or from a folder.
        data = self.data
        try:
            import datasets
        except ImportError as error:
            advice = "run: pip install datasets"
            raise UserError(f"data.source 'huggingface' needs the package datasets; {advice}") from error
        if data.path is None:
            raise UserError("data.path: needs the name of a Hugging Face data set or a folder saved by datasets")
        try:
            saved = (folder := Path(data.path).expanduser()).is_dir()
            table = datasets.load_from_disk(folder) if saved else datasets.load_dataset(data.path, split=split)
        except Exception as error:  # the library raises its own, requests' and pyarrow's errors
            empty = isinstance(error, IndexError)  # of the list of its files
            detail = "it has no images" if empty else " ".join(str(error).split())
            fault = f"no data set can be opened: {detail}"
            raise UserError(f"data.path {data.path}: {fault}; check the name and the network") from error
        if isinstance(table, datasets.DatasetDict):
            table = table[choose(f"data.split of {data.path}", split, table)]
        elif saved and split != data.split:
            raise UserError(f"data.path {data.path}: has no splits; expected one called {split!r}")

        # Its columns of images and of labels, none of which may be missing.
        image = _column(data, "image_column", table.features, datasets.Image, "images")
        label = _column(data, "label_column", table.features, datasets.ClassLabel, "class labels")
        names, values = table.features[label].names, table[label][:]
        if not all(value is not None and 0 <= value < len(names) for value in values):
            found = f"split {split!r} has images without a label"
            raise UserError(f"data.path {data.path}: {found}; choose another data.split")

        # The hub's fingerprint changes with the rows; where there was a choice of columns, they count too.
        pictures = _undecoded(table, image, data)
        read = partial(_read_row, pictures, image, data)
        kinds = [type(feature) for feature in table.features.values()]
        chosen = kinds.count(datasets.Image) > 1 or kinds.count(datasets.ClassLabel) > 1
        digest = partial(" ".join, [table._fingerprint, image, label] if chosen else [table._fingerprint])
        return ImageSet(names, torch.tensor(values, dtype=torch.int64), read, digest)

    def missing(self) -> dict[str, str]:
        return self.missing_folder("data set on the Hugging Face hub: will be downloaded on first use")


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


def _read_row(table: Any, column: str, data: DataConfig, index: int) -> torch.Tensor:
    """Read a row, in whose column is a file as bytes or by its path, or what the library has decoded."""
    with decoding(f"image {index} of {data.path}"):
        image = table[index][column]
        if image is None:
            raise ValueError("there is none")
        if isinstance(image, dict):
            image = Image.open(image["path"] if image["bytes"] is None else BytesIO(image["bytes"]))
        return centre_crop(image, data.resolution, data.exif, data.rules)
