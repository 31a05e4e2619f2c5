"""Which files are images, and what their pixels are: hidden files, links, splits, deep colours, orientation, strips."""

import os
import shutil
import socket
import struct
from collections import Counter
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from vit5gen.config import DataConfig
from vit5gen.data.images import ImageSet, centre_crop, check_classes, open_images, open_training_images
from vit5gen.data.pictures import SUFFIXES, cut_strip, eight_bits, find_images, listing_digest, to_rgb
from vit5gen.evaluation.samples import Samples, open_data, open_folder
from vit5gen.system.errors import UserError

GREY = np.arange(256, dtype=np.uint16).reshape(16, 16)
DEEP = GREY * 257  # the same levels in 16 bits


def save(path: Path, image: Image.Image | None = None, **settings: object) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    (image or Image.new("RGB", (8, 8), "red")).save(path, **settings)
    return path


def data(root: Path, **settings: object) -> DataConfig:
    return DataConfig(**{"path": str(root), "resolution": 8, **settings})


def first_chunk(samples: Samples) -> torch.Tensor:
    return next(iter(samples.chunks()))[1]


def counted(root: Path, **settings: object) -> dict[str, int]:
    images = open_images(data(root, **settings))
    return dict(zip(images.class_names, torch.bincount(images.labels).tolist(), strict=True))


@pytest.fixture
def pets(tmp_path: Path) -> Path:
    for name in ("cat/1.png", "cat/deep/2.jpg", "dog/1.PNG"):
        save(tmp_path / "pets" / name)
    return tmp_path / "pets"


@pytest.mark.parametrize(
    "name",
    [
        *("cat/.ipynb_checkpoints/1-checkpoint.png", "cat/._1.png", "cat/deep/.AppleDouble/2.jpg", ".git/1.png"),
        *("cat/@eaDir/1.png/thumb.jpg", "__MACOSX/cat/1.png", "lost+found/1.png", "$RECYCLE.BIN/1.png"),
        *("dog/#recycle/1.png", "cat/THUMBS.DB", "dog/desktop.ini", "dog/.DS_Store"),
    ],
)  # fmt: skip
def test_what_systems_leave_behind_is_no_data(pets: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    before = open_images(data(pets)).digest()
    (pets / name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(pets / "cat" / "1.png", pets / name)
    assert counted(pets) == {"cat": 2, "dog": 1}
    assert open_images(data(pets)).digest() == before
    assert open_folder(pets, 1, "apply").count == 3
    assert capsys.readouterr().err == f"note: {pets}: 1 file skipped (1 hidden)\n"


def test_a_hidden_folder_above_the_data_is_the_users_choice(pets: Path, tmp_path: Path) -> None:
    pets.rename(tmp_path / ".pets")
    assert counted(tmp_path / ".pets") == {"cat": 2, "dog": 1}


def test_what_is_no_regular_file_is_not_opened(pets: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.mkfifo(pets / "cat" / "pipe.png")
    (pets / "cat" / "link.png").symlink_to("pipe.png")
    (pets / "cat" / "zero.png").symlink_to("/dev/zero")
    with socket.socket(socket.AF_UNIX) as end:
        end.bind(os.path.relpath(pets / "dog" / "socket.png"))  # a short name: the kernel takes 107 bytes
    (pets / "dog" / "folder.png").mkdir()
    (pets / "dog" / "gone.png").symlink_to("nowhere.png")
    (pets / "dog" / "self.png").symlink_to("self.png")
    (pets / "loose.png").touch()
    assert counted(pets) == {"cat": 2, "dog": 1}
    told = capsys.readouterr().err
    assert (
        told == f"note: {pets}: 7 files skipped (4 not a regular file, 2 broken link, 1 image outside class folders)\n"
    )
    assert [pixels.shape[0] for pixels, _ in open_images(data(pets))] == [3, 3, 3]
    assert capsys.readouterr().err == ""  # told once


def test_a_folder_that_cannot_be_read_is_named(pets: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def scandir(folder: Path) -> object:
        if folder.name == "deep":
            raise PermissionError(13, "Permission denied")
        return real(folder)

    real = os.scandir
    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"cat/deep cannot be read \(Permission denied\)"):
        open_images(data(pets))


@pytest.mark.parametrize(
    "suffix", [".jfif", ".jpe", ".avif", ".jp2", ".gif", ".tif", ".ppm", ".pgm", ".pbm", ".webp", ".tga", ".JPEG"]
)
def test_every_reader_takes_the_same_suffixes(tmp_path: Path, suffix: str) -> None:
    kind = Image.registered_extensions()[suffix.lower()]
    image = Image.new("L" if suffix == ".pgm" else "1" if suffix == ".pbm" else "RGB", (8, 8), "white")
    save(tmp_path / "a" / f"1{suffix}", image, format=kind)
    assert open_images(data(tmp_path))[0][0].min() == 255
    assert open_folder(tmp_path, 1, "apply").count == 1
    assert len(_class_folders(tmp_path)) == 1


def _class_folders(root: Path) -> ImageSet:
    from vit5gen.evaluation.accuracy import _image_folder

    config = {"crop_pct": 1.0, "interpolation": "bicubic", "mean": (0, 0, 0), "std": (1, 1, 1)}
    return _image_folder(root, 16, config)


@pytest.mark.parametrize("suffix", ["avif", "jp2", "gif", "qoi", "jpg"])
def test_a_file_that_ends_early_is_named(tmp_path: Path, suffix: str) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(24, 24, 3), dtype=np.uint8)
    file = save(tmp_path / "a" / f"1.{suffix}", Image.fromarray(pixels))
    whole = file.read_bytes()
    for part in (0.2, 0.5, 0.8):
        file.write_bytes(whole[: int(part * len(whole))])
        for read in (open_images(data(tmp_path)).read, _class_folders(tmp_path).__getitem__):
            with pytest.raises(UserError, match=f"1.{suffix}"):
                read(0)


def test_a_damaged_avif_is_named(tmp_path: Path) -> None:
    file = save(tmp_path / "a" / "1.avif")
    whole, told = file.read_bytes(), set()
    read = open_images(data(tmp_path)).read
    for place in range(0, len(whole), 3):
        file.write_bytes(whole[:place] + bytes([whole[place] ^ 255]) + whole[place + 1 :])
        try:
            read(0)
        except UserError as error:
            told.add(type(error.__cause__))
    assert RuntimeError in told


def test_every_suffix_is_one_that_pillow_knows() -> None:
    assert set(SUFFIXES) <= Image.registered_extensions().keys()
    assert len(set(SUFFIXES)) == len(SUFFIXES)


def test_links_to_folders_are_followed_and_circles_cut(pets: Path, tmp_path: Path) -> None:
    save(tmp_path / "elsewhere" / "x" / "3.png")
    (pets / "dog" / "more").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "elsewhere" / "x" / "again").symlink_to(tmp_path / "elsewhere")
    (pets / "cat" / "up").symlink_to("..")
    (pets / "cat" / "root").symlink_to("/")
    (pets / "bird").symlink_to(tmp_path / "elsewhere")  # the same images under two labels are the user's to choose
    left_out: Counter[str] = Counter()
    names = [str(file.relative_to(pets)) for file in find_images(pets, left_out, 2)]
    assert names == ["bird/x/3.png", "cat/1.png", "cat/deep/2.jpg", "dog/1.PNG", "dog/more/x/3.png"]
    assert left_out == {"link to a folder above it": 4}
    assert counted(pets) == {"bird": 1, "cat": 2, "dog": 2}


def test_an_old_run_keeps_its_files(pets: Path) -> None:
    files = sorted(pets.rglob("*.*"))
    assert open_images(data(pets, rules=1)).digest() == listing_digest(pets, files) != open_images(data(pets)).digest()
    for name in ("cat/.hidden/1.png", "__MACOSX/1.png", ".git/1.png", "dog/new.avif"):
        save(pets / name, format="PNG")
    (pets / "dog" / "more").symlink_to(pets / "cat")
    (pets / "eel").mkdir()
    old = open_images(data(pets, rules=1))
    assert (old.class_names, old.labels.tolist()) == (["__MACOSX", "cat", "dog", "eel"], [0, 1, 1, 1, 2])


def test_a_listing_with_any_name_has_a_digest(pets: Path) -> None:
    files = sorted(pets.rglob("*.*"))
    lines = "".join(f"{file.relative_to(pets)} {file.stat().st_size}\n" for file in files)
    assert listing_digest(pets, files) == sha256(lines.encode()).hexdigest()
    os.rename(pets / "cat" / "1.png", os.fsencode(pets / "cat") + b"/caf\xe9 \n.png")
    assert counted(pets) == {"cat": 2, "dog": 1}
    assert len(open_images(data(pets)).digest()) == 64


@pytest.mark.parametrize(
    ("files", "told"),
    [
        ([], "its folder is empty"),
        (["a.svg", "b.svg", "c.txt", "d"], "found: 2 .svg, 1 .txt, 1 without a suffix"),
        ([".1.png", "deep/x.mp4"], "found: 1 .mp4, 1 hidden"),
    ],
)
def test_a_class_without_images_stops_with_what_is_there(pets: Path, files: list[str], told: str) -> None:
    (pets / "eel").mkdir()
    for name in files:
        (pets / "eel" / name).parent.mkdir(exist_ok=True)
        (pets / "eel" / name).touch()
    with pytest.raises(UserError, match="class 'eel' has no images") as raised:
        open_images(data(pets))
    assert told in str(raised.value)
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"class 'eel' has no images"):
        _class_folders(pets)
    assert counted(pets, classes=["dog", "cat"]) == {"dog": 1, "cat": 2}
    (pets / "newt").mkdir()
    with pytest.raises(UserError, match=r"class 'eel' has no images .*; nor does 'newt'"):
        open_images(data(pets))


def test_held_out_images_may_lack_a_class_but_not_all_of_its_files(tmp_path: Path) -> None:
    for name in ("train/a/1.png", "train/b/1.png", "test/a/1.png"):
        save(tmp_path / name)
    assert open_images(data(tmp_path), "test").class_names == ["a"]
    (tmp_path / "test" / "b").mkdir()
    (tmp_path / "test" / "b" / "1.psd").touch()
    with pytest.raises(UserError, match=r"class 'b' has no images \(found: 1 .psd\)"):
        open_images(data(tmp_path), "test")


def test_a_class_of_broken_images_alone_stops(pets: Path) -> None:
    images = open_images(data(pets))
    with pytest.raises(UserError, match=r"class 'dog' has no images \(all are broken\)"):
        check_classes(images.select([0, 1]), data(pets), why="all are broken")


def test_a_wrong_number_of_classes_lists_them(tmp_path: Path) -> None:
    for name in ("car", "plane", "train"):
        save(tmp_path / name / "1.png")
    with pytest.raises(UserError, match=r"num_classes = 1000: the data set has 3 \(car, plane, train\)"):
        open_training_images(data(tmp_path, num_classes=1000))
    for k in range(20):
        save(tmp_path / f"bus{k:02}" / "1.png")
    with pytest.raises(UserError, match=r"data set has 23 \(bus00, .*, bus09 and 13 more\)"):
        open_training_images(data(tmp_path, num_classes=1000))


@pytest.mark.parametrize(
    ("files", "split", "classes"),
    [
        (["car/1.png", "plane/1.png", "train/1.png"], None, ["car", "plane", "train"]),
        (["car/1.png", "test/1.png", "train/old/1.png", "train/1.png"], None, ["car", "test", "train"]),
        (["train/a/1.png", "val/a/1.png", "__MACOSX/1.png", ".cache/1.png"], None, ["a"]),
        (["train/a/1.png", "val/1.png", "test/1.png"], None, ["a"]),  # ImageNet's
        (["train/a/1.png", "validation/b/1.png"], "validation", ["b"]),
        (["fold1/a/1.png", "other/b/1.png"], "fold1", ["a"]),  # a name of the user's own
        (["sets/one/a/1.png", "other/b/1.png"], "sets/one", ["a"]),
    ],
)
def test_a_split_is_a_folder_among_splits(
    tmp_path: Path, files: list[str], split: str | None, classes: list[str]
) -> None:
    for name in files:
        save(tmp_path / name)
    assert open_images(data(tmp_path, **({"split": split} if split else {}))).class_names == classes


@pytest.mark.parametrize(
    ("files", "split", "message"),
    [
        (["train/a/1.png", "val/a/1.png", "meta/1.png"], None, "'train' contains folders .*not splits: meta"),
        (["val/a/1.png", "test/a/1.png"], None, "no folder 'train'"),
        (["car/1.png", "test/1.png", "train/1.png"], "test", "no folder 'test'"),
        (["Train/a/1.png", "Test/a/1.png"], None, r"no folder 'train' \(it has Test, Train\)"),
    ],
)
def test_no_class_is_dropped_where_splits_are_unclear(
    tmp_path: Path, files: list[str], split: str | None, message: str
) -> None:
    for name in files:
        save(tmp_path / name)
    with pytest.raises(UserError, match=message) as raised:
        open_images(data(tmp_path), split)
    assert "\n" not in str(raised.value)
    if split is None and (tmp_path / "train").exists():
        assert open_images(data(tmp_path, rules=1)).class_names == ["a"]


def tiff(path: Path, values: bytes, bits: int, zero_is_black: int = 1, kind: int = 1) -> Path:
    """Write 16 x 16 grey pixels as Pillow does not: with other depths, signs, or white as 0."""
    fields = {
        256: 16,
        257: 16,
        258: bits,
        259: 1,
        262: zero_is_black,
        273: 0,
        277: 1,
        278: 16,
        279: len(values),
        339: kind,
    }
    fields[273] = 8 + 2 + 12 * len(fields) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, value) for tag, value in fields.items())
    path.write_bytes(b"II*\0" + struct.pack("<IH", 8, len(fields)) + entries + bytes(4) + values)
    return path


def twelve(values: np.ndarray) -> bytes:
    first, second = values.ravel().astype(int).reshape(-1, 2).T
    return np.stack([first >> 4, (first & 15) << 4 | second >> 8, second & 255], 1).astype(np.uint8).tobytes()


def write_deep(folder: Path, case: str) -> Path:
    if case == "12 bits":
        return tiff(folder / "1.tif", twelve(np.rint(GREY * (4095 / 255))), 12)
    if case == "white is 0":
        return tiff(folder / "1.tif", (65535 - DEEP).astype("<u2").tobytes(), 16, 0)
    suffix, values = {
        "png": ("png", DEEP),
        "jp2": ("jp2", DEEP),
        "pgm": ("pgm", DEEP),
        "tiff": ("tif", DEEP),
        "big endian": ("tif", DEEP.astype(">u2")),
        "float": ("tif", (GREY / 255).astype(np.float32)),
    }[case]
    return save(folder / f"1.{suffix}", Image.fromarray(values))


@pytest.mark.parametrize("case", ["png", "jp2", "pgm", "tiff", "big endian", "float", "12 bits", "white is 0"])
def test_deep_grey_is_scaled_by_its_range(tmp_path: Path, case: str) -> None:
    (tmp_path / "a").mkdir()
    file = write_deep(tmp_path / "a", case)
    expected = torch.from_numpy(GREY.astype(np.uint8)).expand(3, 16, 16)
    assert torch.equal(open_images(data(tmp_path, resolution=16))[0][0], expected)
    assert torch.equal((_class_folders(tmp_path)[0][0] * 255).round().to(torch.uint8), expected)
    assert torch.equal(first_chunk(open_data(data(tmp_path, resolution=16), 1))[0], expected)
    with Image.open(file) as image:
        assert centre_crop(image, 16, "apply", 1).float().mean() != 127.5  # as an old run saw it


def test_a_dark_image_stays_dark() -> None:
    assert np.asarray(eight_bits(Image.fromarray(np.array([[0, 128, 129, 300]], np.uint16)))).tolist() == [[0, 0, 1, 1]]
    assert eight_bits(Image.fromarray(np.full((2, 2), 0.01, np.float32))).getpixel((0, 0)) == 3


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (DEEP.astype(np.int32), None),
        (DEEP.astype(np.float32), None),
        ((GREY / 255 - 0.1).astype(np.float32), None),
        (np.full((16, 16), np.nan, np.float32), None),
        (np.full((16, 16), np.inf, np.float32), None),
        (DEEP // 2, 2),  # signed
    ],
)
def test_numbers_without_a_known_range_are_refused(tmp_path: Path, values: np.ndarray, kind: int | None) -> None:
    (tmp_path / "a").mkdir()
    if kind is None:
        save(tmp_path / "a" / "1.tif", Image.fromarray(values))
    else:
        tiff(tmp_path / "a" / "1.tif", values.astype("<i2").tobytes(), 16, kind=kind)
    for read in (open_images(data(tmp_path, resolution=16)).read, _class_folders(tmp_path).__getitem__):
        with pytest.raises(UserError, match=r"1\.tif.* \(mode [IF] with values from .*expected 8 or 16 bits") as raised:
            read(0)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=r"1\.tif has mode [IF]"):
        first_chunk(open_folder(tmp_path, 1, "apply"))


def test_a_transparent_level_of_16_bits_turns_white(tmp_path: Path) -> None:
    file = save(tmp_path / "1.png", Image.fromarray(DEEP), transparency=257)
    with Image.open(file) as image:
        assert to_rgb(image, "apply", 2).getpixel((1, 0)) == (255, 255, 255)
        assert to_rgb(image, "apply", 2).getpixel((2, 0)) == (2, 2, 2)


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "PA", "RGB", "RGBA", "CMYK", "YCbCr", "HSV", "LAB"])
def test_images_of_8_bits_keep_their_pixels(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(256, size=(40, 90, 3), dtype=np.uint8)
    image = Image.fromarray(pixels).convert("RGB" if mode in ("PA", "LAB") else mode)
    image = {"PA": lambda: image.convert("P").convert("PA"), "LAB": lambda: Image.new("LAB", (90, 40), (99, 3, 4))}.get(
        mode, lambda: image
    )()
    assert eight_bits(image) is image
    assert torch.equal(centre_crop(image, 16, "apply", 2), centre_crop(image, 16, "ignore", 1))


@pytest.mark.parametrize("kind", ["jpeg", "png", "webp", "avif", "tiff"])
@pytest.mark.parametrize("orientation", [1, 3, 6, 7, 9])
def test_exif_orientation(tmp_path: Path, kind: str, orientation: int) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8))
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = save(tmp_path / "a" / f"1.{kind}", image, exif=exif)
    with Image.open(file) as stored, Image.open(file) as again:
        expected = ImageOps.exif_transpose(again).convert("RGB")
        assert to_rgb(stored, "apply", 2).tobytes() == expected.tobytes()
    assert torch.equal(open_images(data(tmp_path))[0][0], centre_crop(expected, 8, "apply", 2))
    turned = np.asarray(expected).transpose(2, 0, 1)
    assert first_chunk(open_folder(tmp_path, 1, "apply"))[0].tolist() == turned.tolist()
    assert open_folder(tmp_path, 1, "apply").identity["exif"] == "apply"
    if kind != "tiff":  # in which it is part of the format
        with Image.open(file) as stored:
            stays = stored.convert("RGB")
        assert torch.equal(open_images(data(tmp_path, exif="ignore"))[0][0], centre_crop(stays, 8, "ignore", 2))
        assert first_chunk(open_folder(tmp_path, 1, "ignore")).shape == (1, 3, 12, 16)
        assert _class_folders(tmp_path)[0][0].shape == (3, 16, 16)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF data", "ignore:Tag data larger")
@pytest.mark.parametrize(
    "exif",
    [b"", b"Exif\0\0junk", b"Exif\0\0II*\0\xff\xff\xff\xff", b"Exif\0\0MM\0*\0\0\0\x08\0\x09" + b"\x01\x12\0\x03" * 8],
)  # fmt: skip
def test_damaged_exif_leaves_an_image_as_it_is(tmp_path: Path, exif: bytes) -> None:
    save(tmp_path / "a" / "1.jpg", Image.new("RGB", (12, 16)), exif=exif)
    assert open_images(data(tmp_path))[0][0].shape == (3, 8, 8)
    assert first_chunk(open_folder(tmp_path, 1, "apply")).shape == (1, 3, 16, 12)


@pytest.mark.parametrize("size", [(3000, 1), (1, 3000), (2000, 4)])
def test_a_strip_takes_little_memory(size: tuple[int, int], tmp_path: Path) -> None:
    image = Image.fromarray(np.random.default_rng(0).integers(256, size=(size[1], size[0], 3), dtype=np.uint8))
    scale = 32 / min(size)
    whole = image.resize((round(size[0] * scale), round(size[1] * scale)), Image.Resampling.BICUBIC)
    left, top = (whole.width - 32) // 2, (whole.height - 32) // 2
    expected = np.asarray(whole)[top : top + 32, left : left + 32].transpose(2, 0, 1).astype(int)
    assert abs(centre_crop(image, 32, "apply", 2).numpy() - expected).max() <= 1
    cut = cut_strip(image)
    assert max(cut.size) <= 16 * min(cut.size) + 1
    save(tmp_path / "a" / "1.png", image)
    sizes: list[tuple[int, int]] = []
    real = Image.Image.resize
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            Image.Image, "resize", lambda self, to, *rest, **more: sizes.append(to) or real(self, to, *rest, **more)
        )
        centre_crop(image, 256, "apply", 2)
        _class_folders(tmp_path)[0]
    assert max(width * height for width, height in sizes) <= 18 * 256 * 256


def test_images_16_times_as_long_as_wide_are_not_cut() -> None:
    image = Image.new("RGB", (160, 10))
    assert cut_strip(image) is image


def test_huggingface_rows_are_read_by_the_same_rules(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    exif = Image.Exif()
    exif[0x0112] = 6
    phone = Image.fromarray(np.random.default_rng(0).integers(256, size=(12, 16, 3), dtype=np.uint8))
    files = [
        save(tmp_path / "1.png", Image.fromarray(DEEP)),
        save(tmp_path / "2.png", phone, exif=exif),
        save(tmp_path / "3.tif", Image.fromarray(DEEP.astype(np.int32))),
    ]
    features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(names=["a", "b"]))
    rows = {"image": [{"bytes": file.read_bytes(), "path": None} for file in files], "label": [0, 1, 1]}
    rows["image"][1] = {"bytes": None, "path": str(files[1])}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(tmp_path / "set")
    settings = data(tmp_path / "set", source="huggingface", resolution=16)
    images = open_images(settings)
    assert images[0][0].float().mean() == 127.5
    assert torch.equal(images[1][0], centre_crop(phone.transpose(Image.Transpose.ROTATE_270), 16, "apply", 2))
    with pytest.raises(UserError, match=r"image 2 of .*mode I with values"):
        images[2]
    stays = open_images(settings.model_copy(update={"exif": "ignore"}))
    assert torch.equal(stays[1][0], centre_crop(phone, 16, "apply", 2))
    assert stays.digest() == images.digest()
    old = open_images(settings.model_copy(update={"rules": 1, "exif": "ignore"}))
    assert old[0][0].float().mean() > 250
    assert old.digest() == images.digest()
    one = datasets.Dataset.from_dict({key: value[:1] for key, value in rows.items()}, features=features)
    one.save_to_disk(tmp_path / "one")
    with pytest.raises(UserError, match=r"class 'b' has no images \(none has this label\)"):
        open_images(data(tmp_path / "one", source="huggingface"))
