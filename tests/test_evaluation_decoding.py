"""Threads read pictures ahead of the network: in order, the same bytes, the first error, and none is left."""

import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from PIL import Image
from test_evaluation_card import write_folder
from test_evaluation_samples import archive_of, pixels
from torch import Tensor

from vit5gen.config import DataConfig
from vit5gen.evaluation import samples as sets
from vit5gen.evaluation.samples import open_data, open_image_set
from vit5gen.system import cpu
from vit5gen.system.errors import UserError

NOISE = torch.randint(256, (90, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def no_thread_is_left(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(sets, "cores", lambda: 8)
    before = set(threading.enumerate())
    yield
    assert set(threading.enumerate()) == before


def image_of(index: int) -> Tensor:
    return torch.full((3, 2, 2), index, dtype=torch.uint8)


@pytest.mark.parametrize("kind", ["folder", "zip", "tar", "data"])
def test_order_and_bytes_are_those_of_one_after_another(kind: str, tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "real" / "train" / "noise", NOISE)
    if kind == "data":
        found = open_data(DataConfig(source="folder", path=str(tmp_path / "real"), resolution=64), 16)
    else:
        found = open_image_set(folder if kind == "folder" else archive_of(folder, tmp_path / f"real.{kind}"), 16)
    for _ in range(3):  # a race of threads need not show at once
        assert [first for first, _ in found.chunks()] == list(range(0, 90, 16))
        assert torch.equal(pixels(found), NOISE)


def test_a_stream_is_read_in_order_by_one_thread(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    images = [Image.fromarray(image.permute(1, 2, 0).numpy()) for image in NOISE]
    kinds = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    columns = {"image": images, "label": [0, 1] * (len(images) // 2)}
    datasets.Dataset.from_dict(columns, features=kinds).to_parquet(tmp_path / "train-00000.parquet")
    data = DataConfig(source="huggingface", path=str(tmp_path), source_kwargs={"streaming": True}, resolution=64)
    assert torch.equal(pixels(open_data(data, 16)), NOISE)


def test_slow_images_keep_their_place() -> None:
    def read(index: int) -> Tensor:
        time.sleep(index * 7 % 5 / 1000)
        return image_of(index)

    found = list(sets._stacked(read, 40, 7, threads=4))
    assert [first for first, _ in found] == [0, 7, 14, 21, 28, 35]
    assert torch.equal(torch.cat([images for _, images in found])[:, 0, 0, 0], torch.arange(40, dtype=torch.uint8))


def test_the_next_chunks_are_read_while_one_is_used_and_no_more() -> None:
    begun: list[int] = []

    def read(index: int) -> Tensor:
        begun.append(index)
        return image_of(index)

    chunks = sets._stacked(read, 100, 5, threads=4)
    next(chunks)
    end = time.monotonic() + 30
    while len(begun) < 15:
        assert time.monotonic() < end
        time.sleep(0.01)
    time.sleep(0.05)
    assert sorted(begun) == list(range(15))
    chunks.close()
    assert len(begun) == 15


def test_of_several_broken_pictures_the_first_is_told(tmp_path: Path) -> None:
    folder = write_folder(tmp_path / "real", NOISE)
    (folder / "00071.png").write_bytes(b"no picture")  # fails at once
    Image.new("L", (64, 64)).save(folder / "00040.png")
    found = open_image_set(folder, 50)
    with pytest.raises(UserError, match=r"image .*00040.png has mode L"):
        list(found.chunks())


def test_what_is_read_in_vain_ends_with_the_one_who_asked() -> None:
    begun: list[int] = []

    def read(index: int) -> Tensor:
        begun.append(index)
        time.sleep(0.02)
        return image_of(index)

    for first, _ in sets._stacked(read, 1000, 40, threads=4):
        assert first == 0
        break
    assert len(begun) < 120  # the rest of the chunks ahead is not read any more


def test_processes_of_one_machine_share_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.os, "sched_getaffinity", lambda process: set(range(8)), raising=False)
    found = []
    for processes in ("1", "4", "16"):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", processes)
        found.append(cpu.cores())
    assert found == [8, 2, 1]
