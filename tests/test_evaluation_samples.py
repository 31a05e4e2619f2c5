import io
import json
import tarfile
import threading
import zipfile
from dataclasses import replace
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import numpy as np
import pytest
import torch
from called import call_evaluate
from PIL import Image
from test_evaluation_card import card_of, colours, pictures, write_folder, write_npz, write_sampled
from torch import Tensor

from vit5gen.cli import main
from vit5gen.config import DataConfig, DrawConfig, ReadConfig
from vit5gen.data.images import centre_crop
from vit5gen.evaluation import adm_batches, load_extractor
from vit5gen.evaluation import samples as sets
from vit5gen.evaluation.adm_batches import ADM_SHAPES, fetch_adm_batch
from vit5gen.evaluation.comparison import pairing, score_side
from vit5gen.evaluation.evaluation_card import markdown, open_samples
from vit5gen.evaluation.metric import available
from vit5gen.evaluation.reference import open_reference
from vit5gen.evaluation.samples import Samples, check_used, indices_of, open_data, open_image_set
from vit5gen.system.errors import UserError

assert colours  # registered


def pixels(images: Samples) -> Tensor:
    """All images, in the order of their indices."""
    parts = [(indices_of(first, len(part)), part) for first, part in images.chunks()]
    order = torch.cat([indices for indices, _ in parts]).argsort()
    return torch.cat([part for _, part in parts])[order]


def read(path: Path, batch_size: int = 3, **options) -> Samples:
    return open_image_set(path, batch_size, None, ReadConfig(**options))


def channels_last(images: Tensor) -> np.ndarray:
    return images.permute(0, 2, 3, 1).numpy()


def test_shuffled_sets_are_pairs_only_if_both_are(tmp_path) -> None:
    extractor = load_extractor("colours")
    real = open_reference(write_npz(tmp_path / "real.npz", pictures(30)), extractor, 8)
    sides = []
    for shuffle, name in ((False, "a"), (True, "b"), (True, "c")):
        path = write_sampled(tmp_path / f"{name}.npz", 3, checkpoint=name)
        write_npz(path, pictures(20, seed=len(sides)))
        (images,) = open_samples(str(path), DrawConfig(), 0, (), 8, read=ReadConfig(shuffle=shuffle))
        sides.append(score_side(images, real, extractor, available(["fid"], real, extractor)[0], groups=True))
    assert pairing(sides[0], sides[1]) == (
        False,
        "two samples: shuffle is False for A, True for B (None: no card tells it)",
    )
    assert pairing(sides[1], sides[2])[0]


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64])
@pytest.mark.parametrize("limits", [[0, 1], [-1, 1]])
def test_floats_of_a_given_range_are_rounded_as_adm_does(tmp_path, dtype, limits: list[int]) -> None:
    images = pictures(7)
    low, high = limits
    values = (channels_last(images) / 255 * (high - low) + low).astype(dtype)
    np.savez(tmp_path / "a.npz", arr_0=values)
    found = read(tmp_path / "a.npz", range=limits)
    assert torch.equal(pixels(found), images)
    assert found.identity["read"] == {"range": limits}
    if dtype == np.float32:  # between two levels, as trunc(127.5 x + 128) rounds
        shifted = values + (high - low) * 0.3 / 255 * (values < high - 0.1)
        np.savez(tmp_path / "b.npz", arr_0=shifted)
        assert torch.equal(pixels(read(tmp_path / "b.npz", range=limits)), images)


def test_a_range_that_does_not_fit_the_values_is_an_error(tmp_path) -> None:
    image = np.random.default_rng(0).random((5, 8, 8, 3), np.float32)
    for values, limits, message in (
        (image * 255, [0, 1], r"values from .* to 25\d.* do not fit --range 0 1"),
        (image * 2 - 1, [0, 1], "values from -.* do not fit --range 0 1; give the other range, or clip"),
        (image, [-1, 1], "no values below 0, which do not fit --range -1 1; give --range 0 1"),
        (np.where(np.arange(3) == 1, np.nan, image), [0, 1], "from nan to nan do not fit"),
    ):
        np.savez(tmp_path / "a.npz", arr_0=values)
        with pytest.raises(UserError, match=message):
            pixels(read(tmp_path / "a.npz", range=limits))
    with pytest.raises(ValueError, match="expected 0 1, or -1 1"):
        ReadConfig(range=[0, 255])


def test_a_range_is_that_of_the_images_of_all_processes(tmp_path, monkeypatch) -> None:
    np.savez(tmp_path / "a.npz", arr_0=np.linspace(-1, 1, 5)[:, None, None, None] * np.ones((8, 8, 3)))
    for rank, first in ((1, [3]), (2, [])):  # bright images alone, and none at all
        monkeypatch.setattr(sets, "rank_and_world", lambda rank=rank: (rank, 3))
        monkeypatch.setattr(sets, "gather_objects", lambda own: [-1.0, own, own])
        found = read(tmp_path / "a.npz", range=[-1, 1])
        assert [start for start, _ in found.chunks()] == first
        monkeypatch.setattr(sets, "gather_objects", lambda own: [0.0, own, own])
        with pytest.raises(UserError, match="no values below 0"):
            list(found.chunks())


def test_channels_first_is_told_apart_and_said(tmp_path, capsys) -> None:
    images = pictures(7)
    np.savez(tmp_path / "a.NPZ", images=images.numpy(), labels=np.arange(7) // 4)
    (tmp_path / "a.NPZ.npz").rename(tmp_path / "a.NPZ")
    found = read(tmp_path / "a.NPZ", key="images")
    assert torch.equal(pixels(found), images)
    assert found.identity["layout"] == "(N, 3, H, W)"
    assert found.identity["read"] == {"key": "images"}
    assert found.labels == [0, 0, 0, 0, 1, 1, 1]
    assert "images is (7, 3, 32, 32), read as (N, 3, H, W)" in capsys.readouterr().err
    with pytest.raises(UserError, match="no arr_0, only images, labels; name the images with --key NAME"):
        read(tmp_path / "a.NPZ")
    np.savez(tmp_path / "b.npz", arr_0=np.zeros(7), arr_1=images.numpy(), y=np.arange(7))
    assert read(tmp_path / "b.npz", key="arr_1").labels == list(range(7))
    np.savez(tmp_path / "thin.npz", arr_0=np.zeros((2, 3, 5, 3), np.uint8))  # three rows
    assert pixels(read(tmp_path / "thin.npz")).shape == (2, 3, 3, 5)


@pytest.mark.parametrize(
    "change",
    [
        lambda a: (a / 255).astype(np.float32),
        lambda a: (a / 127.5 - 1).astype(np.float32),
        lambda a: a.astype(np.float32),
        lambda a: a.astype(np.int64),
        lambda a: np.concatenate([a, a[..., :1]], axis=3),
        lambda a: np.concatenate([a, a[..., :1]], axis=3).transpose(0, 3, 1, 2),
        lambda a: a[None],
        lambda a: a.transpose(0, 3, 1, 2).reshape(len(a), -1),
        np.asfortranarray,
    ],
    ids=["0..1", "-1..1", "0..255", "int64", "rgba", "rgba first", "five axes", "flat", "fortran"],
)
def test_what_is_refused_comes_with_the_line_of_numpy_that_converts_it(tmp_path, monkeypatch, change) -> None:
    monkeypatch.chdir(tmp_path)
    images = pictures(4)
    images[0, 0, 0, :2] = torch.tensor([0, 255])  # both ends are in the first image
    np.savez("a.npz", arr_0=change(channels_last(images)))
    with pytest.raises(UserError, match=r"convert it: a = np.load") as refused:
        read(Path("a.npz"))
    assert "\n" not in str(refused.value)
    exec(str(refused.value).partition("convert it: ")[2], {"np": np})
    assert torch.equal(pixels(read(Path("converted.npz"))), images)


def test_grey_single_and_other_arrays(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    grey = channels_last(pictures(4))[..., 0]
    for array in (grey, grey[..., None], grey[:, None]):
        np.savez("a.npz", arr_0=array)
        with pytest.raises(UserError, match="it is grey; convert it: ") as refused:
            read(Path("a.npz"))
        exec(str(refused.value).partition("convert it: ")[2], {"np": np})
        assert torch.equal(pixels(read(Path("converted.npz"))), torch.from_numpy(grey)[:, None].expand(-1, 3, -1, -1))
    for array in (np.zeros(3), np.zeros((0, 8, 8, 3), np.uint8), np.zeros((2, 8, 8, 5), np.uint8)):
        np.savez("a.npz", arr_0=array)
        with pytest.raises(UserError, match=r"write it again$"):
            read(Path("a.npz"))
    np.save("a.npy", grey)
    with pytest.raises(UserError, match=r"convert it: np.savez\('converted.npz', arr_0=np.load\('a.npy'\)\)"):
        read(Path("a.npy"))


def archive_of(folder: Path, path: Path, more: dict[str, bytes] | None = None) -> Path:
    """Put the files below a folder, last ones first, and ``more`` into a zip or tar."""
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in sorted(folder.rglob("*.*"))}
    content = dict(reversed((files | (more or {})).items()))
    if path.suffix == ".zip":
        with zipfile.ZipFile(path, "w") as archive:
            for name, data in content.items():
                archive.writestr(name, data)
        return path
    with tarfile.open(path, "w") as archive:
        for name, data in content.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
        link = tarfile.TarInfo("00000.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    return path


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_scores_as_the_folder_that_it_was_made_of(tmp_path, kind: str, capsys) -> None:
    for number in (1, 2):
        write_folder(tmp_path / "real" / f"class{number}", pictures(20, seed=number))
    other = {"../../outside.png": b"", "__MACOSX/._a.png": b"x", "labels.json": b"{}"}
    bad = archive_of(tmp_path / "real", tmp_path / f"bad.{kind}", other)
    path = archive_of(tmp_path / "real", tmp_path / f"real.{kind}", {"labels.json": b"{}", "__MACOSX/._a.png": b"x"})
    before = sorted(tmp_path.rglob("*"))
    found, folder = read(path, 7), read(tmp_path / "real", 7)
    assert torch.equal(pixels(found), pixels(folder))
    assert [label.name for label in found.labels] == [label.name for label in folder.labels]
    assert found.identity["kind"] == kind
    assert found.identity["formats"] == ["PNG"]
    assert "2 files skipped (1 .json, 1 .png)" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"image ../../outside.png does not decode"):
        pixels(read(bad))
    assert sorted(tmp_path.rglob("*")) == before
    extractor = load_extractor("colours")
    samples = write_npz(tmp_path / "samples.npz", pictures(30, seed=5))
    assert card_of(samples, path, extractor)["metrics"] == card_of(samples, tmp_path / "real", extractor)["metrics"]


def test_archives_that_are_broken_packed_or_too_large_are_errors_of_one_line(tmp_path, monkeypatch) -> None:
    folder = write_folder(tmp_path / "real", pictures(3))
    for kind in ("zip", "tar"):
        path = archive_of(folder, tmp_path / f"real.{kind}")
        monkeypatch.setattr(sets, "_LARGEST_FILE", 100)
        with pytest.raises(UserError, match="over 100 bytes"):
            pixels(read(path))
        monkeypatch.undo()
        path.write_bytes(path.read_bytes()[:700])
        with pytest.raises(UserError, match=f"{kind} .*real.{kind}"):
            pixels(read(path))
    with tarfile.open(tmp_path / "real.tar.gz", "w:gz") as archive:
        archive.add(folder)
    (tmp_path / "gz.tar").write_bytes((tmp_path / "real.tar.gz").read_bytes())
    with pytest.raises(UserError, match=r"tar .*gz.tar cannot be read"):
        read(tmp_path / "gz.tar")
    with pytest.raises(UserError, match="unpack it"):
        read(tmp_path / "real.tar.gz")
    with zipfile.ZipFile(tmp_path / "none.zip", "w") as archive:
        archive.writestr("notes.txt", "")
    with pytest.raises(UserError, match=r"zip .*none.zip: no images"):
        read(tmp_path / "none.zip")


def test_resize_and_crop_are_the_filters_that_the_card_names(tmp_path) -> None:
    images = pictures(4, side=40)
    folder, npz = write_folder(tmp_path / "a", images), write_npz(tmp_path / "a.npz", images)
    opened = [Image.fromarray(image) for image in channels_last(images)]
    small = np.stack([np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC)) for image in opened])
    cropped = torch.stack([centre_crop(image, 16, "apply", DataConfig().rules) for image in opened])
    for path in (folder, npz):
        found = read(path, resize=16)
        assert np.array_equal(channels_last(pixels(found)), small)
        assert found.identity["read"] == {"resize": 16, "filter": "bicubic, antialiased (Pillow)"}
        assert torch.equal(pixels(read(path, crop=16)), cropped)
    assert "read" not in read(npz, resize=40).identity
    with pytest.raises(ValueError, match="resize: crop resizes already"):
        ReadConfig(resize=16, crop=16)


def test_unequal_sizes_in_a_folder_need_a_crop(tmp_path) -> None:
    folder = write_folder(tmp_path / "a", pictures(2))
    Image.fromarray(channels_last(pictures(1))[0, :20]).save(folder / "00002.png")
    with pytest.raises(UserError, match=r"00002.png is 32x20, the first one 32x32; give --crop SIDE"):
        pixels(read(folder))
    with pytest.raises(UserError, match=r"00002.png is 32x20, which is no square; give --crop SIDE"):
        pixels(read(folder, resize=16))
    assert pixels(read(folder, crop=16)).shape == (3, 3, 16, 16)
    np.savez(tmp_path / "a.npz", arr_0=np.zeros((2, 8, 9, 3), np.uint8))
    with pytest.raises(UserError, match="images of 9x8, which are no squares; give --crop SIDE"):
        read(tmp_path / "a.npz", resize=4)
    assert pixels(read(tmp_path / "a.npz", crop=4)).shape == (2, 3, 4, 4)


def test_shuffled_samples_keep_their_labels_and_the_order_depends_on_their_number_alone(tmp_path) -> None:
    images, labels = pictures(40), np.repeat(np.arange(4), 10)
    path = write_npz(tmp_path / "a.npz", images, arr_1=labels)
    shuffled = [read(path, size).shuffled() for size in (3, 40)]
    first = pixels(shuffled[0])
    assert torch.equal(first, pixels(shuffled[1]))
    assert not torch.equal(first, images)
    where = [int((images == one).flatten(1).all(dim=1).nonzero()[0, 0]) for one in first]
    assert sorted(where) == list(range(40))
    assert shuffled[0].labels == labels[where].tolist()
    assert read(path).sorted_by_class
    assert not shuffled[0].sorted_by_class
    extractor = load_extractor("colours")
    sorted_card = card_of(path, path, extractor)
    call_evaluate(path, reference=path, extractor="colours", shuffle=True, output=tmp_path / "card.json")
    card = json.loads((tmp_path / "card.json").read_text())
    assert card["samples"][0]["read"] == {"shuffle": "torch.randperm, seed 0"}
    same = card["metrics"]["FD-Colours"]["value"]
    assert same == pytest.approx(sorted_card["metrics"]["FD-Colours"]["value"], abs=1e-9)
    assert any("give --shuffle" in warning for warning in sorted_card["warnings"])
    assert not any("sorted by class" in warning for warning in card["warnings"])


def test_an_option_that_has_no_effect_is_refused(tmp_path, monkeypatch) -> None:
    path = write_npz(tmp_path / "a.npz", pictures(8))
    for option, value in {"key": "images", "range": [0, 1], "resize": 32, "crop": 32}.items():
        with pytest.raises(UserError, match=f"--{option} has no effect on any of these images"):
            call_evaluate(path, reference=path, extractor="colours", **{option: value})
    with pytest.raises(UserError, match="--shuffle has no effect"):
        call_evaluate(path, save_statistics=tmp_path / "s", extractor="colours", shuffle=True)
    large = write_npz(tmp_path / "large.npz", pictures(8, side=64))
    call_evaluate(path, reference=large, extractor="colours", resize=32)  # of the reference alone
    check_used(ReadConfig(key="a"), [{}, {"read": {"key": "a"}}])


def test_compare_reads_as_evaluate_does(tmp_path, capsys) -> None:
    images = pictures(40, seed=1)
    a = write_npz(tmp_path / "a.npz", pictures(40, seed=2, side=64))
    np.savez(tmp_path / "b.npz", arr_0=channels_last(images) / np.float32(255))
    real = write_npz(tmp_path / "real.npz", torch.cat([images[:3], pictures(40, seed=3)]))
    words = [
        "compare",
        str(a),
        str(tmp_path / "b.npz"),
        "--reference",
        str(real),
        "--output",
        str(tmp_path / "card.json"),
    ]
    words += ["--extractor", "colours", "--metrics", "fid", "--range", "0", "1", "--resize", "32"]
    with pytest.raises(SystemExit) as ended:
        main(words)
    assert ended.value.code == 0
    card = json.loads((tmp_path / "card.json").read_text())
    assert [card[side][0]["read"].keys() for side in "ab"] == [{"resize", "filter"}, {"range"}]
    assert [card[side][0]["in_reference"] for side in "ab"] == [0, 3]
    assert "b.npz: 3 of 40 images are also in the reference, pixel by pixel" in capsys.readouterr().err


def test_doubtful_sets_are_warned_of_and_a_card_lists_what_is_left_out(tmp_path, capsys) -> None:
    extractor = load_extractor("colours")
    images = pictures(40, seed=1)
    real = write_folder(tmp_path / "real", images)
    few = write_folder(tmp_path / "few", torch.cat([images[:2], pictures(1, seed=8)]))
    card = card_of(few, real, extractor)
    text = "\n".join(card["warnings"])
    assert "few: 3 images for 12 features: their covariance has no full rank" in text
    assert "few: 2 of 3 images are also in the reference, pixel by pixel" in text
    assert "precision and recall is not computed: 3 samples; needs at least 4" in text
    assert card["skipped"]["pr"] == "3 samples; needs at least 4; give more images"
    assert "FD-Colours" in card["metrics"]
    with pytest.raises(UserError, match="metric pr: 3 samples; needs at least 4"):
        card_of(few, real, extractor, metrics=["fid", "pr"])
    # A statistics file knows sizes, formats and hashes too.
    call_evaluate(few, save_statistics=tmp_path / "few.statistics", extractor="colours")
    lossy = tmp_path / "data" / "train" / "lossy"
    lossy.mkdir(parents=True)
    for i, image in enumerate(channels_last(pictures(20, side=24))):
        Image.fromarray(image).save(lossy / f"{i}.jpg")
    text = "\n".join(card_of(lossy, tmp_path / "few.statistics", extractor)["warnings"])
    assert "lossy has images of 24x24, the reference of 32x32" in text
    assert "lossy has files of JPEG, the reference of PNG" in text
    of_a_source = open_data(DataConfig(source="folder", path=str(tmp_path / "data"), resolution=24), 8)
    assert of_a_source.identity["formats"] == ["JPEG"]
    assert f"reference {tmp_path}/few.statistics: 3 images for 12 features" in text
    assert "in the reference, pixel" not in text
    assert card_of(few, tmp_path / "few.statistics", extractor)["samples"][0]["in_reference"] == 3
    # What the extractor does not have is no news.
    card = card_of(few, real, replace(extractor, spatial_dim=0))
    assert "sfid" in card["skipped"]
    assert "sFID" not in "\n".join(card["warnings"])


def test_the_table_shows_the_floor_of_the_reference(tmp_path) -> None:
    extractor = load_extractor("colours")
    real = write_npz(tmp_path / "real.npz", pictures(60, seed=1))
    card = card_of(write_npz(tmp_path / "a.npz", pictures(20)), real, extractor)
    head, _, row = ([cell.strip() for cell in line.split("|")] for line in markdown(card))
    floor = open_reference(real, extractor, 7).floor(20)
    assert dict(zip(head, row, strict=True))["FD-Colours floor"] == f"{floor:.4g}"
    assert head.index("FD-Colours floor") == head.index("FD-Colours") + 1
    few = card_of(write_npz(tmp_path / "b.npz", pictures(31)), real, extractor)
    assert markdown(few)[2].split("|")[4].strip() == "unknown"  # of half the reference at most


def test_every_source_has_a_progress_bar_that_only_a_terminal_shows(tmp_path, monkeypatch) -> None:
    shown = []

    class Bar(sets.Progress):
        def __init__(self, *counted, **options) -> None:
            super().__init__(*counted, **options)
            shown.append(self)

    monkeypatch.setattr(sets, "Progress", Bar)
    images = read(write_npz(tmp_path / "a.npz", pictures(8)), 3)
    assert len(list(images.watch())) == 3
    assert shown[0].total == 8
    assert shown[0].disable  # stderr is no terminal here
    assert len(images.hashes[0].unique()) == 8


@pytest.fixture
def server(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Serve a folder on this machine as the place of ADM's batches, with images of 8 pixels."""
    folder = tmp_path / "served"
    folder.mkdir()

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *words: object) -> None:
            requests.append(self.path)

    requests: list[str] = []
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as http:
        threading.Thread(target=http.serve_forever, daemon=True).start()
        url = f"http://127.0.0.1:{http.server_port}/batch.npz"
        monkeypatch.setattr(adm_batches, "ADM_BATCHES", {"imagenet256": (url, (4, 8, 8, 3))})
        monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
        yield folder / "batch.npz", requests
        http.shutdown()


def write_batch(path: Path, **changes: np.ndarray) -> None:
    arrays = {name: np.zeros(shape) for name, shape in ADM_SHAPES.items()} | {"arr_0": np.zeros((4, 8, 8, 3), np.uint8)}
    np.savez_compressed(path, **arrays | changes)


def test_a_named_reference_is_fetched_once_checked_and_known_by_its_hash(tmp_path, server) -> None:
    served, requests = server
    write_batch(served, mu=np.zeros(1024))
    with pytest.raises(UserError, match=r"imagenet256: mu is float64 \(1024,\); expected \(2048,\)"):
        fetch_adm_batch("imagenet256")
    served.write_bytes(served.read_bytes()[:5000])  # as a broken connection leaves it
    with pytest.raises(UserError, match=r"imagenet256: .* is no batch of ADM"):
        fetch_adm_batch("imagenet256")
    assert not list((tmp_path / "cache").rglob("*.*"))
    write_batch(served)
    requests.clear()
    path = fetch_adm_batch("imagenet256")
    assert path.read_bytes() == served.read_bytes()
    assert fetch_adm_batch("imagenet256") == path
    assert len(requests) == 1
    with path.open("ab") as file:
        file.write(b"changed")
    with pytest.raises(UserError, match=r"batch.npz: sha256 .*, recorded when it came .*; delete .* to fetch it again"):
        open_reference("imagenet256", load_extractor("colours"), 2)


def test_without_a_network_a_named_reference_says_what_to_put_where(tmp_path, server) -> None:
    served, _ = server  # nothing lies there
    cache = tmp_path / "cache" / "references" / "batch.npz"
    with pytest.raises(UserError, match=rf"not downloadable \(.*404.*\); put http://\S+/batch.npz at {cache}"):
        fetch_adm_batch("imagenet256")
    write_batch(served)
    cache.write_bytes(served.read_bytes())  # as the message says
    served.unlink()
    assert fetch_adm_batch("imagenet256") == cache
    assert cache.with_suffix(".sha256").is_file()
