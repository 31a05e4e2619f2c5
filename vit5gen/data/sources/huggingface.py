"""A data set of the Hugging Face hub, or files that the package datasets opens."""

from functools import partial
from io import BytesIO
from typing import Any

import torch
from PIL import Image

from vit5gen.config import DataConfig
from vit5gen.data.images import ImageSet, Source, centre_crop, decoding, register_source
from vit5gen.data.remote import fetch_folder
from vit5gen.section import MOST_CLASSES, UserPath
from vit5gen.system.distributed import processes
from vit5gen.system.errors import UserError, choose

Files = UserPath | list[UserPath] | None
_PLAIN = ("int", "uint", "string", "large_string")  # types of a column that may be labels, though it names no classes


@register_source("huggingface")
class HuggingFaceSource(Source):
    """A column of images and one of labels: the only ones, or `data.image_column` and `data.label_column`.

    `data.path` is a name on the hub, a folder saved by datasets, a folder of parquet files, images or WebDataset tars,
    or the name of a format such as ``webdataset`` whose files ``data_files`` names, by path, pattern or URL.
    streaming: read the files in order without storing them, for `vit5gen encode`.
    """

    def __init__(self, data: DataConfig, *, streaming: bool = False, data_files: Files = None) -> None:
        super().__init__(data)
        if streaming and data.from_images:
            raise UserError("data.source_kwargs: streaming reads images in order; set data.from_images to false")
        self.streaming, self.data_files = streaming, data_files

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
        folder = fetch_folder(data.path)
        saved = any((folder / name).is_file() for name in ("dataset_dict.json", "state.json"))
        where: dict[str, Any] = {"path": str(folder) if folder.exists() else data.path, "data_files": self.data_files}
        builder = None
        try:
            if saved:
                table = datasets.load_from_disk(folder)
            elif self.streaming:
                builder = datasets.load_dataset_builder(**where)
                table = builder.as_streaming_dataset(split)
            else:
                table = datasets.load_dataset(**where, split=split)
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
        features = table.features
        pictures = [name for name, feature in features.items() if isinstance(feature, datasets.Image)]
        image = _column(data, "image_column", features, pictures, "images")
        classes = [name for name, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
        types = {name: feature.dtype for name, feature in features.items() if isinstance(feature, datasets.Value)}
        plain = [name for name, dtype in types.items() if dtype.startswith(_PLAIN) and not name.startswith("__")]
        asked = data.label_column is not None
        label = _column(data, "label_column", features, classes + plain * (asked or not classes), "class labels")
        labels = table[label][:] if builder is None else _stream_labels(builder, where, table, split, label)
        names, numbers = _number_labels(features[label], labels)
        if not all(value is not None and 0 <= value < len(names) for value in numbers):
            found = f"split {split!r} has images without a label"
            raise UserError(f"data.path {data.path}: {found}; choose another data.split")

        # The hub's fingerprint changes with the rows; where there was a choice of columns, they count too.
        rows = _undecoded(table, image, data)
        known = table._fingerprint if builder is None else f"{builder.config_id} {builder.hash} {split}"
        chosen = len(pictures) > 1 or len(classes) > 1 or label in plain
        digest = partial(" ".join, [known, image, label] if chosen else [known])
        read = partial(_read_row, rows if builder is None else _Stream(rows.select_columns([image])), image, data)
        return ImageSet(names, torch.tensor(numbers, dtype=torch.int64), read, digest)

    def missing(self) -> dict[str, str]:
        return self.missing_folder("data set on the Hugging Face hub: will be downloaded on first use")


class _Stream:
    """Rows of a streamed table by number: quick only in increasing order, as one that was passed is read anew."""

    def __init__(self, table: Any) -> None:
        self.table: Any = table
        self.rows: Any = iter(())
        self.next = -1  # number of the row that follows; below 0, none was read

    def __getitem__(self, index: int) -> dict[str, Any]:
        # In batches: the library's plain iterator would share out the rows among the workers of a DataLoader.
        if not 0 <= self.next <= index:
            self.rows, self.next = self.table.iter(batch_size=1), 0
        for row in self.rows:
            self.next += 1
            if self.next > index:
                return {name: values[0] for name, values in row.items()}
        raise ValueError("the stream has ended before it")

    def __getstate__(self) -> dict[str, Any]:
        return {"table": self.table, "rows": iter(()), "next": -1}


def _stream_labels(builder: Any, where: dict[str, Any], table: Any, split: str, column: str) -> list[Any]:
    """Return the labels of a streamed table, for which its files are read once; of parquet files this column alone."""
    import datasets

    processes().print(f"note: data.path {where['path']}: reading the labels of split {split!r} before the images")
    if hasattr(builder.config, "columns"):
        table = datasets.load_dataset_builder(**where, columns=[column]).as_streaming_dataset(split)
    return [value for rows in table.select_columns([column]).iter(batch_size=1000) for value in rows[column]]


def _number_labels(feature: Any, values: list[Any]) -> tuple[list[str], list[Any]]:
    """Return the names of the classes and the number of every label: strings are sorted, plain numbers are names."""
    if hasattr(feature, "names"):
        return list(feature.names), values
    given = set(values) - {None}
    if "string" in feature.dtype:
        numbers = {name: number for number, name in enumerate(sorted(given))}
        return list(numbers), [numbers.get(value) for value in values]
    if (last := max(given, default=-1)) >= MOST_CLASSES:
        raise UserError(f"data.label_column: a label is {last}; expected numbers of classes, below {MOST_CLASSES:,}")
    return [str(number) for number in range(last + 1)], values


def _undecoded(table: Any, column: str, data: DataConfig) -> Any:
    """Return the table with files in its column: the library would turn the images, and cut 16 bits off at 255."""
    feature = table.features[column]
    # Under the rules of an earlier version, and where the data set's author asks for grey, say, the library decodes.
    decode = data.rules == 1 or feature.mode not in (None, "RGB")
    return table.cast_column(column, type(feature)(mode=feature.mode, decode=decode))


def _column(data: DataConfig, key: str, features: dict[str, Any], found: list[str], what: str) -> str:
    """Return the column that is asked for, or else the only one of those ``found``."""
    asked = getattr(data, key)
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
