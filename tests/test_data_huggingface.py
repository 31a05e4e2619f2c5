"""Parquet files, folders of images and WebDataset tars, whole or as streams, with labels of every kind."""

import io
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from vit5gen.config import Config, DataConfig, ModelConfig, VaeConfig
from vit5gen.data import encoding
from vit5gen.data.images import ImageSet, open_images
from vit5gen.data.latents import LatentDataset
from vit5gen.system.errors import UserError

datasets = pytest.importorskip("datasets")
LABELS = [1, 0, 2, 0, 1, 2, 2]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets.disable_progress_bars()
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "hf")
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))


def picture(number: int) -> bytes:
    file = io.BytesIO()
    Image.fromarray(np.full((8, 8, 3), 10 + number, np.uint8)).save(file, "png")
    return file.getvalue()


def write_parquet(folder: Path, kind: str = "names") -> Path:
    """Write two files of seven pictures; kind: of what the labels are."""
    names = ["ant", "bee", "cat"]
    types = {"names": datasets.ClassLabel(names=names), "numbers": datasets.Value("int32")}
    values = {"strings": [names[label] for label in LABELS]}.get(kind, LABELS)
    features = {"image": datasets.Image(), "label": types.get(kind, datasets.Value("string"))}
    rows = {"image": [{"bytes": picture(i), "path": None} for i in range(len(LABELS))], "label": values}
    table = datasets.Dataset.from_dict(rows, features=datasets.Features(features))
    folder.mkdir()
    for number, part in enumerate((range(4), range(4, 7))):
        table.select(part).to_parquet(folder / f"train-{number:05d}-of-00002.parquet")
    return folder


def write_tars(folder: Path) -> Path:
    folder.mkdir()
    for number, part in enumerate((range(4), range(4, 7))):
        with tarfile.open(folder / f"train-{number}.tar", "w") as tar:
            for i in part:
                for name, content in ((f"{i:04d}.png", picture(i)), (f"{i:04d}.cls", str(LABELS[i]).encode())):
                    entry = tarfile.TarInfo(name)
                    entry.size = len(content)
                    tar.addfile(entry, io.BytesIO(content))
    return folder


def opened(path: Path | str, **options: Any) -> ImageSet:
    return open_images(DataConfig(source="huggingface", path=str(path), resolution=8, source_kwargs=options))


def levels(images: ImageSet, indices: Any) -> list[int]:
    return [int(images[i][0].max()) - 10 for i in indices]


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("kind", ["names", "numbers", "strings"])
def test_parquet_with_labels_of_every_kind(tmp_path: Path, kind: str, streaming: bool) -> None:
    images = opened(write_parquet(tmp_path / "set", kind), streaming=streaming)
    assert images.class_names == (["0", "1", "2"] if kind == "numbers" else ["ant", "bee", "cat"])
    assert images.labels.tolist() == LABELS
    assert levels(images, (0, 2, 5, 6, 1, 3)) == [0, 2, 5, 6, 1, 3]


def test_a_folder_of_images_and_tars_by_folder_or_by_file(tmp_path: Path) -> None:
    for i, label in enumerate(LABELS[:3]):
        file = tmp_path / "pictures" / "train" / "ab"[label % 2] / f"{i}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(picture(i))
    images = opened(tmp_path / "pictures")
    assert (images.class_names, sorted(levels(images, range(3)))) == (["a", "b"], [0, 1, 2])
    tars = write_tars(tmp_path / "tars")
    for images in (opened(tars, streaming=True), opened("webdataset", streaming=True, data_files=f"{tars}/*.tar")):
        assert (images.class_names, images.labels.tolist()) == (["0", "1", "2"], LABELS)
        assert levels(images, range(7)) == list(range(7))


def test_a_stream_is_read_once_in_order_and_by_workers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, iterate = [], datasets.IterableDataset.iter

    def count(self: Any, batch_size: int) -> Any:
        started.append(batch_size)
        return iterate(self, batch_size)

    monkeypatch.setattr(datasets.IterableDataset, "iter", count)
    images = opened(write_parquet(tmp_path / "set"), streaming=True)
    assert levels(images.select([0, 3, 4, 6]), range(4)) == [0, 3, 4, 6]
    assert started == [1000, 1]  # the labels, then the images
    loader = DataLoader(range(7), 2, num_workers=2, collate_fn=lambda batch: levels(images, batch))
    assert [level for batch in loader for level in batch] == list(range(7))


def test_only_the_labels_of_parquet_are_read_before_the_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    columns = []
    build = datasets.load_dataset_builder

    def record(**where: Any) -> Any:
        columns.append(where.get("columns"))
        return build(**where)

    monkeypatch.setattr(datasets, "load_dataset_builder", record)
    opened(write_parquet(tmp_path / "set"), streaming=True)
    assert columns == [None, ["label"]]


def test_latents_of_a_stream_equal_those_of_the_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "SHARD_SIZE", 3)
    source = write_parquet(tmp_path / "set")
    found = []
    for streaming in (False, True):
        kwargs = {"streaming": True} if streaming else {}
        data = DataConfig(source="huggingface", path=str(source), resolution=32, source_kwargs=kwargs)
        vae = VaeConfig(name="emoji", downsample=4)
        config = Config(model=ModelConfig(preset="S/2"), data=data, vae=vae)
        encoding.encode_images(config, tmp_path / f"latents{streaming}")
        found.append(LatentDataset(tmp_path / f"latents{streaming}"))
    assert all(torch.equal(found[0].get(i, True)[0], found[1].get(i, True)[0]) for i in range(7))
    assert found[0].labels.tolist() == found[1].labels.tolist() == LABELS
    assert found[0].manifest["images_sha256"] != found[1].manifest["images_sha256"]


def test_another_file_is_another_digest(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "set")
    before = [opened(source, streaming=True).digest() for _ in range(2)]
    source.joinpath("train-00001-of-00002.parquet").unlink()
    assert before[0] == before[1] != opened(source, streaming=True).digest()


def test_bad_input(tmp_path: Path) -> None:
    source = write_parquet(tmp_path / "set", "numbers")
    data = {"source": "huggingface", "path": str(source), "resolution": 8}
    with pytest.raises(UserError, match="streaming reads images in order"):
        open_images(DataConfig(**data, from_images=True, source_kwargs={"streaming": True}))
    with pytest.raises(UserError, match=r"streeming.*Did you mean 'streaming'"):
        opened(source, streeming=True)
    with pytest.raises(UserError, match="no data set can be opened"):
        opened(source, streaming=True, data_files="absent*.parquet")
    rows = {"image": [{"bytes": picture(0), "path": None}] * 2, "label": [0, 10**9]}
    features = datasets.Features(image=datasets.Image(), label=datasets.Value("int64"))
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "ids")
    with pytest.raises(UserError, match=r"data.label_column: a label is 1000000000"):
        opened(tmp_path / "ids")
