"""Image sets: cropping, class names, sources, and what a user reads when something is wrong."""

import gzip
import os
import pickle
import shutil
import struct
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit5gen.config import DataConfig
from vit5gen.data.images import (
    BrokenImage,
    ImageSet,
    centre_crop,
    drop_broken,
    open_held_out,
    open_images,
)
from vit5gen.data.sources.folder import imagenet_names
from vit5gen.system.errors import UserError, composed


def save(path: Path, color: object = "red", mode: str = "RGB", size: tuple[int, int] = (20, 16)) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new(mode, size, color).save(path)


def folder(root: Path, **settings: object) -> DataConfig:
    return DataConfig(source="folder", path=str(root), resolution=8, **settings)


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    save(tmp_path / "dog" / "b.png", "red")
    save(tmp_path / "dog" / "deep" / "a.jpg", "blue")
    save(tmp_path / "cat" / "a.PNG", "lime")
    (tmp_path / "cat" / "notes.txt").write_text("not an image")
    return tmp_path


def test_crop_halves_by_box_then_cuts_the_centre() -> None:
    pixels = np.random.default_rng(0).integers(256, size=(96, 132, 3), dtype=np.uint8)
    expected = pixels.astype(int)
    for _ in range(2):  # 96 -> 48 -> 24, then nothing is left to scale; each mean of two is rounded up
        expected = (expected[:, 0::2] + expected[:, 1::2] + 1) // 2
        expected = (expected[0::2] + expected[1::2] + 1) // 2
    assert (
        centre_crop(Image.fromarray(pixels), 24, "apply", 2).tolist() == expected[:, 4:28].transpose(2, 0, 1).tolist()
    )


def test_crop_scales_by_bicubic() -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(30, 20, 3), dtype=np.uint8))
    expected = np.asarray(image.resize((16, 24), Image.Resampling.BICUBIC))[4:20].transpose(2, 0, 1)
    assert torch.equal(centre_crop(image, 16, "apply", 2), torch.from_numpy(expected.copy()))


def test_folder_labels_are_the_sorted_names(pets: Path) -> None:
    images = open_images(folder(pets))
    assert images.class_names == ["cat", "dog"]
    assert images.labels.tolist() == [0, 1, 1]
    pixels = torch.stack([pixels for pixels, _ in images]).float().mean((2, 3))
    assert pixels[0].tolist() == [0, 255, 0]
    assert pixels[1].tolist() == [255, 0, 0]
    assert pixels[2, 2] > 250  # a jpeg of blue
    assert [label for _, label in images] == [0, 1, 1]
    assert images[0][0].shape == (3, 8, 8)
    assert torch.equal(pickle.loads(pickle.dumps(images))[1][0], images[1][0])  # noqa: S301 - for workers that are spawned


def test_split_is_a_subfolder_when_there_is_one(tmp_path: Path) -> None:
    save(tmp_path / "train" / "a" / "1.png")
    save(tmp_path / "test" / "b" / "1.png")
    assert open_images(folder(tmp_path)).class_names == ["a"]
    assert open_images(folder(tmp_path), "test").class_names == ["b"]


def test_held_out_images_have_the_labels_of_the_training_images(tmp_path: Path) -> None:
    for name in ("circle", "square", "star"):
        save(tmp_path / "train" / name / "1.png")
    for name in ("star", "square"):
        save(tmp_path / "test" / name / "1.png")
    data = folder(tmp_path)
    names = open_images(data).class_names
    held_out = open_held_out(data, "test", names)
    assert (held_out.class_names, held_out.labels.tolist()) == (names, [1, 2])
    save(tmp_path / "test" / "moon" / "1.png")
    with pytest.raises(UserError, match="split 'test' has classes that split 'train' lacks, such as 'moon'"):
        open_held_out(data, "test", names)
    assert len(open_held_out(folder(tmp_path, classes=["star"]), "test", ["star"])) == 1


def test_a_listed_class_without_images_is_one_line(pets: Path) -> None:
    (pets / "eel").mkdir()
    with pytest.raises(UserError, match="has no images"):
        open_images(folder(pets, classes=["eel"]))


@pytest.mark.parametrize(
    ("mode", "color", "expected"),
    [
        ("L", 77, [77, 77, 77]),
        ("LA", (77, 0), [255, 255, 255]),
        ("RGBA", (0, 0, 0, 0), [255, 255, 255]),
        ("RGBA", (9, 8, 7, 255), [9, 8, 7]),
        ("P", 0, [0, 0, 0]),
        ("1", 1, [255, 255, 255]),
    ],
)
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str, color: object, expected: list[int]) -> None:
    save(tmp_path / "a" / "1.png", color, mode)
    pixels, _ = open_images(folder(tmp_path))[0]
    assert pixels[:, 4, 4].tolist() == expected


def test_classes_select_and_renumber(pets: Path) -> None:
    save(pets / "eel" / "a.png")
    images = open_images(folder(pets, classes=["eel", "cat"]))
    assert images.class_names == ["eel", "cat"]
    assert images.labels.tolist() == [1, 0]
    assert images[0][0][1, 0, 0] == 255  # still the cat's lime


def test_broken_image_is_named_or_dropped(pets: Path) -> None:
    whole = (pets / "dog" / "b.png").read_bytes()
    (pets / "dog" / "cut.png").write_bytes(whole[: len(whole) // 2])
    (pets / "dog" / "empty.png").touch()
    images = open_images(folder(pets))
    with pytest.raises(BrokenImage, match=r"cut\.png does not decode.*on_broken_image"):
        images[2]
    kept, problems = drop_broken(images)
    assert kept.labels.tolist() == [0, 1, 1]
    assert len(problems) == 2
    assert "empty.png" in problems[1]


def test_a_thousand_wordnet_ids_are_imagenet(tmp_path: Path) -> None:
    from timm.data import ImageNetInfo

    wnids = ImageNetInfo().label_names()
    for wnid in wnids:
        (tmp_path / wnid).mkdir()
        (tmp_path / wnid / "1.JPEG").touch()
    images = open_images(folder(tmp_path))
    assert images.class_names[207] == "golden retriever"
    assert images.labels.tolist() == list(range(1000))
    assert len(set(images.class_names)) == 1000
    shutil.rmtree(tmp_path / wnids[3])
    with pytest.raises(UserError, match=r"1 missing.*n01491361"):
        open_images(folder(tmp_path))
    with pytest.raises(UserError, match=r"0 missing.*1 extra.*n99999999"):
        imagenet_names([*wnids, "n99999999"])


@pytest.mark.parametrize(
    ("make", "settings", "message"),
    [
        (lambda root: None, {}, "no class folders"),
        (lambda root: (root / "cat").mkdir(), {}, "no images"),
        (lambda root: root.rmdir(), {}, "no such folder"),
        (lambda root: save(root / "cat" / "1.png"), {"classes": ["cats"]}, "Did you mean 'cat'"),
        (lambda root: save(root / "cat" / "1.png"), {"classes": ["cat", "cat"]}, "listed twice"),
    ],
)
def test_bad_folders(tmp_path: Path, make: object, settings: dict, message: str) -> None:
    make(tmp_path)
    with pytest.raises(UserError, match=message) as raised:
        open_images(folder(tmp_path, **settings))
    assert "\n" not in str(raised.value)


def test_folder_without_path() -> None:
    with pytest.raises(UserError, match=r"set data\.path"):
        open_images(DataConfig(source="folder"))


def test_huggingface_folder(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog"]))
    rows = {"picture": [Image.new("L", (9, 12), level) for level in (5, 250)], "kind": [1, 0]}
    table = datasets.Dataset.from_dict(rows, features=features)
    datasets.DatasetDict(train=table).save_to_disk(tmp_path / "set")
    data = DataConfig(source="huggingface", path=str(tmp_path / "set"), resolution=8)
    images = open_images(data)
    assert (images.class_names, images.labels.tolist()) == (["cat", "dog"], [1, 0])
    assert images[1][0].unique().tolist() == [250]
    with pytest.raises(UserError, match=r"data\.split.*'tests' is not known; expected one of train"):
        open_images(data, "tests")
    table.remove_columns("kind").save_to_disk(tmp_path / "plain")
    with pytest.raises(UserError, match="no column of class labels"):
        open_images(DataConfig(source="huggingface", path=str(tmp_path / "plain"), resolution=8))
    (tmp_path / "nothing").mkdir()
    with pytest.raises(UserError, match="no data set can be opened"):
        open_images(DataConfig(source="huggingface", path=str(tmp_path / "nothing"), resolution=8))


def write_idx(path: Path, values: np.ndarray, compress: bool) -> None:
    content = struct.pack(f">BBBB{values.ndim}i", 0, 0, 8, values.ndim, *values.shape) + values.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("compress", [True, False])
def test_fashion_mnist(tmp_path: Path, compress: bool) -> None:
    suffix = ".gz" if compress else ""
    pixels = np.random.default_rng(0).integers(256, size=(5, 28, 28), dtype=np.uint8)
    write_idx(tmp_path / f"t10k-images-idx3-ubyte{suffix}", pixels, compress)
    write_idx(tmp_path / f"t10k-labels-idx1-ubyte{suffix}", np.array([9, 0, 3, 3, 1], np.uint8), compress)
    data = DataConfig(source="fashion-mnist", path=str(tmp_path), resolution=32)
    images = open_images(data, "test")
    assert images.labels.tolist() == [9, 0, 3, 3, 1]
    assert images.class_names[9] == "ankle-boot"
    image, _ = images[2]
    assert torch.equal(image[:, 2:30, 2:30], torch.from_numpy(pixels[2]).expand(3, 28, 28))
    assert image[:, :2].max() == 0
    assert open_images(data.model_copy(update={"resolution": 16}), "test")[0][0].shape == (3, 16, 16)
    with pytest.raises(UserError, match="train-images-idx3-ubyte"):
        open_images(data)
    broken = tmp_path / f"t10k-images-idx3-ubyte{suffix}"
    broken.write_bytes(broken.read_bytes()[:100])
    with pytest.raises(UserError, match="is not an idx file"):
        open_images(data, "test")


def test_a_folder_without_splits_has_no_second_one(tmp_path: Path) -> None:
    (tmp_path / "cat").mkdir()
    Image.new("RGB", (8, 8)).save(tmp_path / "cat" / "0.png")
    data = DataConfig(source="folder", path=str(tmp_path), resolution=8)
    assert len(open_images(data)) == 1
    with pytest.raises(UserError, match="'test'"):
        open_images(data, "test")


def pictures(count: int = 2) -> list[Image.Image]:
    return [Image.new("L", (9, 12), level) for level in range(count)]


def test_huggingface_columns_are_chosen(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    label = datasets.ClassLabel(names=["cat", "dog"])
    features = {"mask": datasets.Image(), "picture": datasets.Image(), "coarse": label, "kind": label}
    rows = {"mask": [Image.new("L", (8, 8), 99)] * 2, "picture": pictures(), "coarse": [1, 0], "kind": [0, 1]}
    datasets.Dataset.from_dict(rows, features=datasets.Features(features)).save_to_disk(tmp_path / "set")

    def opened(**columns: str) -> ImageSet:
        return open_images(DataConfig(source="huggingface", path=str(tmp_path / "set"), resolution=8, **columns))

    with pytest.raises(UserError, match=r"several columns of images: mask, picture; choose one as data\.image_column"):
        opened()
    with pytest.raises(UserError, match=r"several columns of class labels: coarse, kind; .*data\.label_column"):
        opened(image_column="picture")
    images = opened(image_column="picture", label_column="kind")
    digests = {
        opened(image_column=one, label_column=two).digest() for one in ("mask", "picture") for two in ("coarse", "kind")
    }
    assert len(digests) == 4  # or latents of the one would be taken for those of another
    assert images.labels.tolist() == [0, 1]
    assert images[1][0].unique().tolist() == [1]
    for wrong in ({"image_column": "pictur"}, {"image_column": "kind"}, {"label_column": "picture"}):
        with pytest.raises(UserError, match=r"data\.\w+_column: .* is not known; expected one of \w+, \w+\."):
            opened(**{"image_column": "picture", "label_column": "kind", **wrong})


@pytest.mark.parametrize(
    ("picture", "kind", "message"),
    [
        (pictures(), [0, None], "images without a label"),
        (pictures(), [0, -1], "images without a label"),
        ([], [], "has no images"),
        ([None, *pictures(1)], [0, 1], r"image 0 of .* does not decode \(there is none\)"),
    ],
)
def test_huggingface_rows_without_image_or_label(tmp_path: Path, picture: list, kind: list, message: str) -> None:
    datasets = pytest.importorskip("datasets")
    features = datasets.Features(picture=datasets.Image(), kind=datasets.ClassLabel(names=["cat", "dog"]))
    datasets.Dataset.from_dict({"picture": picture, "kind": kind}, features=features).save_to_disk(tmp_path / "set")
    with pytest.raises(UserError, match=message):
        open_images(DataConfig(source="huggingface", path=str(tmp_path / "set"), resolution=8))[0]


def test_huggingface_images_that_are_not_decoded_yet(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    for decode in (True, False):
        features = datasets.Features(picture=datasets.Image(decode=decode), kind=datasets.ClassLabel(names=["cat"]))
        rows = {"picture": pictures(1), "kind": [0]}
        datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / f"set{decode}")
    first, second = (
        open_images(DataConfig(source="huggingface", path=str(tmp_path / f"set{decode}"), resolution=8))[0][0]
        for decode in (True, False)
    )
    assert torch.equal(first, second)
    listed = datasets.Features(picture=[datasets.Image()], kind=datasets.ClassLabel(names=["cat"]))
    datasets.Dataset.from_dict({"picture": [pictures()], "kind": [0]}, features=listed).save_to_disk(tmp_path / "list")
    with pytest.raises(UserError, match="no column of images; it has picture, kind"):
        open_images(DataConfig(source="huggingface", path=str(tmp_path / "list"), resolution=8))


def test_class_names_are_compared_composed(tmp_path: Path) -> None:
    for split, name in (("train", "cafe\u0301"), ("train", "zoo"), ("test", "caf\u00e9")):
        save(tmp_path / split / name / "1.png")
    data = folder(tmp_path, split="train", classes=["zoo", "caf\u00e9"])
    images = open_images(data)
    assert (images.class_names, images.labels.tolist()) == (["zoo", "caf\u00e9"], [1, 0])
    plain = folder(tmp_path, split="train", classes=None)
    assert open_held_out(plain, "test", open_images(plain).class_names).labels.tolist() == [0]
    assert folder(tmp_path, classes=["cafe\u0301"]).classes == ["caf\u00e9"]
    save(tmp_path / "train" / "caf\u00e9" / "1.png")
    with pytest.raises(UserError, match="'café' is listed twice"):
        open_images(plain)


def test_names_that_the_locale_cannot_read_are_read_as_utf8(monkeypatch: pytest.MonkeyPatch) -> None:
    assert composed(os.fsdecode(b"caf\xe9")) == os.fsdecode(b"caf\xe9")  # which is no UTF-8
    assert composed("zo\ud800") == "zo\ud800"
    read = "cafe\u0301".encode().decode("ascii", "surrogateescape")
    monkeypatch.setattr(os, "fsencode", lambda name: name.encode("ascii", "surrogateescape"))
    assert composed(read) == "caf\u00e9"
    assert composed(f"{read} \u00e9") == f"{read} \u00e9"
