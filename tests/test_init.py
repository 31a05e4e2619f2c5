"""`vit5gen init`: ten folders, each of which trains without another word; the held-out part and what is found."""

import json
import random
import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_convert import published
from tiny_run import forget_processes, make_inputs

from vit5gen.cli import main
from vit5gen.config import DataConfig, VaeConfig, load_config, load_recorded
from vit5gen.data.images import ImageSet, _hold_out, open_held_out, open_images, open_training_images
from vit5gen.system.errors import UserError
from vit5gen.training import initial, propose
from vit5gen.training.build import check_values


def fill(folder: Path, count: int, sizes: tuple[int, ...] = (32,), mode: str = "RGB", seed: int = 0) -> None:
    """Save pictures of a rectangle on a plain ground."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng([seed, *map(ord, folder.name)])
    for i in range(count):
        side = sizes[i % len(sizes)]
        image = Image.fromarray(np.full((side, side + i % 3, 3), rng.integers(256, size=3), np.uint8))
        image.paste(tuple(rng.integers(256, size=3).tolist()), (side // 4, side // 4, side // 2, side * 3 // 4))
        image.convert(mode).save(folder / f"{i}.png")


def splits(root: Path) -> None:
    for name in ("cat", "dog"):
        fill(root / "train" / name, 12)
        fill(root / "test" / name, 4, seed=1)


def validation(root: Path) -> None:
    for name in ("cat", "dog", "eel"):
        fill(root / "Training" / name, 8)
        fill(root / "val" / name, 2, seed=1)
    fill(root / "test", 3)  # without classes, as in a competition


def flat(root: Path) -> None:
    for name in ("cat", "dog"):
        fill(root / name, 20)


def many(root: Path) -> None:
    for i in range(300):
        fill(root / f"class {i}", 3)


def mixed(root: Path) -> None:
    for name in ("wide", "tall", "test"):
        fill(root / name, 8, (20, 90, 200, 700))


def grey(root: Path) -> None:
    for name in "0123456789":
        fill(root / name, 4, (28,), "L")


def twenty(root: Path) -> None:
    fill(root / "only", 20, (64,))


def broken(root: Path) -> None:
    flat(root)
    (root / "cat" / "cut.png").write_bytes((root / "cat" / "0.png").read_bytes()[:60])
    (root / "dog" / "notes.txt").write_text("no picture")
    (root / "empty").mkdir()
    (root / "junk").mkdir()
    (root / "junk" / "a.jpg").write_bytes(b"no picture")


def unicode(root: Path) -> None:
    for name in ("Käse # 1", "寿司", "a: 'b'", "-"):
        fill(root / name, 5)


def uneven(root: Path) -> None:
    for name, count in (("one", 1), ("two", 2), ("fifty", 50)):
        fill(root / name, count, (130,))


FOLDERS: list[Callable[[Path], None]] = [
    *(splits, validation, flat, many, mixed, grey, twenty, broken, unicode, uneven),
]
KEYS = {
    "splits": {"held_out": None, "resolution": 32},
    "validation": {"held_out": None, "split": "Training"},
    "flat": {"held_out": 0.1, "split": "train", "classes": None, "on_broken_image": "fail"},
    "many": {"held_out": 0.1},
    "mixed": {"resolution": 64},
    "grey": {"resolution": 32},
    "twenty": {"resolution": 64},
    "broken": {"on_broken_image": "skip", "classes": ["cat", "dog"]},
    "unicode": {"held_out": 0.1},
    "uneven": {"held_out": 0.1, "resolution": 64},
}
HELD_OUT = {"splits": 8, "validation": 6, "many": 300, "flat": 4, "twenty": 2, "unicode": 4, "uneven": 6}


def call(*arguments: object) -> int:
    forget_processes()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    return ended.value.code  # type: ignore[return-value]


@pytest.fixture(autouse=True)
def _here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def _no_trial(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(propose, "seconds_of_step", lambda *_: 0.5)
    monkeypatch.setattr(propose, "build_trainer", lambda *_: None)


@pytest.mark.usefixtures("_no_trial")
@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_what_is_written_fits_the_folder(make: Callable[[Path], None], capsys: pytest.CaptureFixture[str]) -> None:
    name = make.__name__
    make(Path("pictures"))
    assert call("init", "pictures", "--output", "own.yaml") == 0
    printed = capsys.readouterr().out
    assert "vit5gen train own.yaml --output runs/own\n" in printed
    config = load_config("own.yaml")
    check_values(config)
    images = open_training_images(config.data)
    held_out = open_held_out(config.data, config.evaluation.held_out_split, images.class_names)
    assert {key: getattr(config.data, key) for key in KEYS[name]} == KEYS[name]
    assert len(held_out) == HELD_OUT.get(name, len(held_out)) >= 2
    assert f"held out: {len(held_out)} pictures" in printed
    if name == "broken":
        seen = "42 pictures looked at, 2 of which cannot be decoded: pictures/cat/cut.png, pictures/junk/a.jpg\n"
        assert seen in printed
    assert config.training.global_batch_size <= len(images)
    assert config.evaluation.held_out_split == ("val" if name == "validation" else "test")


@pytest.mark.slow
@pytest.mark.parametrize("make", FOLDERS, ids=lambda make: make.__name__)
def test_each_trains(make: Callable[[Path], None]) -> None:
    make(Path("pictures"))
    assert call("init", "pictures", "--output", "own.yaml") == 0
    assert call("train", "own.yaml", "--output", "run", "--training.num_steps", "20") == 0
    assert [entry["step"] for entry in json.loads(Path("run/metrics.json").read_text())["evaluations"]] == [0, 20]
    classes = [path for path in Path("pictures").rglob("*") if path.is_dir() and any(path.glob("*.png"))]
    found = load_recorded("run/config.yaml").data.num_classes
    assert found == len({path.name for path in classes} - ({"test"} if make is validation else set()))


@pytest.mark.usefixtures("_no_trial")
def test_a_poor_autoencoder_brings_the_file_of_a_better_one(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    flat(Path("p"))
    for limit, there in ((0.0, False), (99.0, True)):
        monkeypatch.setattr("vit5gen.data.autoencoders.codec.POOR_PSNR", limit)
        Path("own.yaml").unlink(missing_ok=True)
        assert call("init", "p", "--output", "own.yaml") == 0
        assert Path("own-autoencoder.yaml").exists() == there
    printed = capsys.readouterr().out
    assert "vit5gen autoencoder own-autoencoder.yaml --output runs/own-vae\n" in printed
    Path("short.yaml").write_text(re.sub(r"num_steps: \d+", "num_steps: 1", Path("own-autoencoder.yaml").read_text()))
    assert call("autoencoder", "short.yaml", "--output", "runs/own-vae") == 0
    config = load_config("own.yaml", {"vae.name": "runs/own-vae"})
    assert call("encode", "own.yaml", "--vae.name", "runs/own-vae", "--output", "latents") == 0
    assert config.vae.downsample == 4


@pytest.mark.usefixtures("_no_trial")
def test_what_cannot_be_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    Path("own.yaml").touch()
    Path("none/a").mkdir(parents=True)
    Path("bad/a").mkdir(parents=True)
    Path("bad/a/1.png").touch()
    fill(Path("loose"), 3)
    fill(Path("single/a"), 1)
    Path("single/a/broken.png").touch()
    fill(Path("split/train"), 3)
    fill(Path("split/test"), 3)
    for folder, output, message in [
        ("absent", "new.yaml", "no such folder"),
        ("none", "new.yaml", "no pictures in class folders"),
        ("loose", "new.yaml", "into a folder of its own, e.g. loose/cats; one class is enough"),
        ("split", "new.yaml", "into a folder of its own, e.g. split/train/cats; one class is enough"),
        ("bad", "new.yaml", "none of its pictures decodes"),
        ("bad", "own.yaml", "exists already"),
        ("single", "new.yaml", "1 picture to train on; expected at least 2: add some"),
    ]:
        assert call("init", folder, "--output", output) == 2
        said = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("note:")]
        assert len(said) == 1
        assert message in said[0]
    assert not Path("new.yaml").exists()


@pytest.mark.usefixtures("_no_trial")
@pytest.mark.parametrize("counts", [(1, 1), (2, 1), (3,)])
def test_where_too_few_would_be_held_out_none_is_and_both_files_train(
    counts: tuple[int, ...], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for label, count in enumerate(counts):
        fill(Path("p") / str(label), count)
    monkeypatch.setattr("vit5gen.data.autoencoders.codec.POOR_PSNR", 99.0)
    assert call("init", "p", "--output", "own.yaml") == 0
    printed, pictures = capsys.readouterr().out, "1 class" if len(counts) == 1 else "2 classes"
    assert f"{sum(counts)} pictures in {pictures} (" in printed
    assert "held out: none" in printed
    assert "held_out: null" in Path("own.yaml").read_text()
    for file in (Path("own.yaml"), Path("own-autoencoder.yaml")):
        file.write_text(re.sub(r"num_steps: \d+", "num_steps: 1", file.read_text()))
    assert call("autoencoder", "own-autoencoder.yaml", "--output", "runs/own-vae") == 0
    few = ("--evaluation.num_images", 2, "--evaluation.num_reference", 2, "--sampling.num_inference_steps", 1)
    assert call("train", "own.yaml", "--output", "run", "--vae.name", "runs/own-vae", *few) == 0


def names(data: DataConfig, split: str | None = None) -> set[str]:
    images = open_images(data, split)
    return {images.name(i).split("/", 1)[1] for i in range(len(images))}


def test_the_held_out_part_is_a_function_of_the_files_alone() -> None:
    root, data = Path("p"), DataConfig(path="p", resolution=8, held_out=0.1)
    fill(root / "a", 30)
    fill(root / "b", 12)
    whole, held_out = names(data.model_copy(update={"held_out": None})), names(data, "test")
    before = {file.read_bytes() for file in (root / "a").iterdir() if f"a/{file.name}" in held_out}
    assert len(open_images(data, "test")) == 4
    assert len(open_images(data)) == 38
    assert names(data) | held_out == whole
    # Renamed and copied files, another class and another place change nothing of class a.
    root.rename("q")
    for i, file in enumerate(random.Random(0).sample(sorted(Path("q/a").iterdir()), 30)):
        file.rename(file.with_name(f"new{i}.png"))
        Path("q/a", f"copy{i}.png").write_bytes(Path("q/a", f"new{i}.png").read_bytes())
    fill(Path("q/c"), 9)
    moved = data.model_copy(update={"path": "q"})
    images = open_images(moved, "test")
    files = [Path(images.name(i).removeprefix("image ")) for i in range(len(images))]
    assert {file.read_bytes() for file in files if file.parent.name == "a"} == before
    assert sum(file.parent.name == "a" for file in files) == 2 * len(before)


def test_at_least_two_are_held_out_and_every_class_keeps_one() -> None:
    fill(Path("p/a"), 1)
    fill(Path("p/b"), 3)
    data = DataConfig(path="p", resolution=8, held_out=0.01)
    assert open_images(data).labels.bincount().tolist() == [1, 1]
    Path("p/a/0.png").write_bytes(sorted((path.read_bytes() for path in Path("p/b").iterdir()), key=_hash)[0])
    assert open_images(data).labels.bincount().tolist() == [1, 2]  # a copy of a's only picture stays beside it


def test_images_without_files_are_held_out_by_class_and_row() -> None:
    labels = torch.arange(60) % 2
    images = ImageSet(["a", "b"], labels, lambda _: torch.zeros(3, 8, 8), str)
    held_out = _hold_out(images, 0.1, ["a", "b"])
    assert labels[held_out].bincount().tolist() == [3, 3]
    fewer = _hold_out(replace(images, labels=labels[:50]), 0.1, ["b"])
    assert labels[:50][fewer].tolist() == [1, 1]  # of 25
    assert (held_out[:50] & ~_hold_out(replace(images, labels=labels[:50]), 0.12, ["a", "b"])).sum() == 0


def _hash(content: bytes) -> str:
    from hashlib import sha256

    return sha256(content).hexdigest()


def test_a_split_and_a_held_out_part_exclude_each_other() -> None:
    splits(Path("p"))
    for data in (DataConfig(path="p", held_out=0.1), DataConfig(source="emoji", resolution=32, held_out=0.1)):
        with pytest.raises(UserError, match=r"held_out = 0\.1: \S+ has a split 'test' already"):
            open_images(data)


def test_near_duplicates_are_counted() -> None:
    fill(Path("p/a"), 6)
    images = open_images(DataConfig(path="p", resolution=8))
    thumbnails = {images.name(i): torch.full((256,), 50.0 * i) for i in range(6)}
    thumbnails["image p/a/5.png"] = thumbnails["image p/a/0.png"] + 7
    assert propose.near_duplicates(images.select([4, 5]), images.select([0, 1, 2, 3]), thumbnails) == 1


def test_classes_are_found_when_a_run_begins_and_latents_remember_what_is_held_out(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    config = make_inputs(tmp_path)
    text = config.read_text().replace("num_classes: 3\n", "split: train\n")
    config.write_text(text)
    steps = ["--training.num_steps", 2, "--evaluation.num_images", 2, "--evaluation.num_reference", 2]
    assert call("train", config, "--output", "run", *steps) == 0
    assert load_recorded("run/config.yaml").data.num_classes == 3
    for _ in range(2):
        fill(tmp_path / "data" / "train" / "moon", 2)
        assert call("train", config, "--output", "run", "--training.num_steps", 3) == 2
        assert "classes added ['moon']" in capsys.readouterr().err
    (tmp_path / "data" / "test").rename(tmp_path / "away")
    assert call("encode", config, "--output", "latents", "--data.held_out", 0.1) == 0
    assert json.loads(Path("latents/manifest.json").read_text())["held_out"] == 0.1
    assert call("train", config, "--output", "new", "--data.latents", "latents") == 2
    assert "made with held_out 0.1, the run has None" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_trial")
def test_from_weights_takes_their_size_and_autoencoder(capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("animals", "robots"):
        fill(Path("pictures") / name, 12)
    assert call("init", "pictures", "--from", "emoji-64", "--output", "own.yaml") == 0
    printed = capsys.readouterr().out
    assert not Path("own-autoencoder.yaml").exists()  # these weights know the latents of their own alone
    assert "without --from, another can be trained" in printed
    config = load_config("own.yaml")
    assert (config.training.init_from, config.vae.name, config.data.resolution) == ("emoji-64", "emoji-64", 64)
    assert not config.model.sized
    assert call("train", "own.yaml", "--dry-run") == 0
    assert "1 of 2 classes found by name; new: robots (from the null row)" in capsys.readouterr().out
    assert call("init", "pictures", "--from", "emoji-46", "--output", "other.yaml") == 2
    assert "training.init_from emoji-46: there is no such file or folder" in capsys.readouterr().err
    assert not Path("other.yaml").exists()
    assert call("init", "pictures", "--num-attention-heads", 4, "--output", "other.yaml") == 2
    assert "--num-attention-heads 4 has no effect without --from" in capsys.readouterr().err


@pytest.mark.usefixtures("_no_trial")
def test_from_a_file_whose_width_shows_no_heads(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("animals", "robots"):
        fill(Path("pictures") / name, 12)
    file, heads = published("sit_tiny", tmp_path)
    monkeypatch.setattr(initial, "VaeConfig", lambda: VaeConfig(name="emoji"))  # SiT's own is not here
    command = ["init", "pictures", "--from", file, "--output", "own.yaml"]
    assert call(*command) == 2
    assert "--num-attention-heads, or model.num_attention_heads in a configuration" in capsys.readouterr().err
    assert call(*command, "--num-attention-heads", heads) == 0
    assert load_config("own.yaml").model.num_attention_heads == heads
