"""What a run shows of itself: held-out loss, previews, curves, and the lines that it says once."""

import json
import math
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import tiny_pipeline
from tiny_run import assert_identical, run, weights

from vit5gen.config import TrainingConfig, load_config
from vit5gen.data.autoencoders.find_autoencoder import load_autoencoder
from vit5gen.data.images import ImageSet, open_images
from vit5gen.flow import Flow
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.training import held_out, previews
from vit5gen.training.curves import gap_note, held_out_curves, newest_distance, save_curves
from vit5gen.training.held_out import HeldOut, affordable, affordable_count, held_out_loss
from vit5gen.training.monitor import Monitor
from vit5gen.training.previews import SampleGrid, preview_steps
from vit5gen.training.run_folder import RunFolder


@pytest.fixture(scope="module")
def watched(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train 80 steps with previews, resumed with another rate of the log."""
    output = tmp_path_factory.mktemp("watched") / "run"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(held_out, "_SHARE", 2)
        run(config_file, output, training__num_steps=70, training__checkpoint_every=20)
        run(config_file, output, training__num_steps=80, training__checkpoint_every=20, training__weight_decay=0.0)
    return output


def test_the_held_out_loss_is_that_of_the_study(config_file: Path, watched: Path) -> None:
    config, folder = load_config(config_file), RunFolder(watched)
    evaluations, lines = folder.evaluations(), folder.lines()
    assert [one["step"] for one in evaluations] == [0, 70, 80]
    assert all(one["held_out_loss"] > 0 for one in evaluations)
    assert (
        evaluations[-1]["held_out_loss"] == lines[-1]["held_out_loss"] == held_out_loss(load_pipeline(watched), config)
    )
    assert all("loss" in line for line in lines)
    assert [line["step"] for line in lines] == list(range(1, 81))
    assert [line["step"] for line in lines if "held_out_loss" in line] == [3, 9, 18, 35, 53, 70, 80]


def test_a_run_keeps_its_held_out_images(watched: Path) -> None:
    assert [affordable_count(TrainingConfig(num_steps=n, global_batch_size=32)) for n in (1, 2400, 9999)] == [
        64,
        1024,
        2048,
    ]
    began, resumed = [line for line in RunFolder(watched).lines() if "held_out_count" in line]
    assert (began["held_out_count"], began["held_out_checksum"]) == (
        resumed["held_out_count"],
        resumed["held_out_checksum"],
    )
    assert began["held_out_count"] > 64  # by the share of this test


def test_the_log_tells_checkpoints_resumes_and_changed_keys(watched: Path) -> None:
    lines = RunFolder(watched).lines()
    assert [line["checkpoint"] for line in lines if "checkpoint" in line] == [20, 40, 60]
    (resumed,) = [line for line in lines if "resumed" in line]
    assert (resumed["step"], resumed["resumed"]) == (71, 70)
    assert resumed["changed"] == ["training.num_steps: 70 -> 80"]


def test_previews_change_no_bit_of_training(
    config_file: Path, watched: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Monitor, "due", lambda self, step: False)
    monkeypatch.setattr(previews, "_PREVIEWS", ())
    run(config_file, tmp_path / "run", training__num_steps=80)
    assert_identical(weights(tmp_path / "run", 80), weights(watched, 80))
    losses = [[line["loss"] for line in RunFolder(folder).lines()] for folder in (tmp_path / "run", watched)]
    assert losses[0] == losses[1]


def test_samples_are_shown_before_the_distance_and_on_the_way(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shown: list[tuple[int, bool]] = []
    save, folder = SampleGrid.save, RunFolder(tmp_path / "run")

    def noted(self: SampleGrid, images: torch.Tensor, step: int, evaluations: list[dict[str, Any]]) -> None:
        shown.append((step, newest_distance(evaluations) is not None))
        save(self, images, step, evaluations)

    monkeypatch.setattr(SampleGrid, "save", noted)
    run(config_file, folder.path, training__num_steps=64, training__log_every=10)
    assert shown == [(0, False), (0, True), (10, True), (20, True), (40, True), (50, True), (64, True), (64, True)]
    told = json.loads(Image.open(folder.samples).text["settings"])  # type: ignore[attr-defined]
    assert (told["step"], told["distance_step"], told["seed"]) == (64, 64, 0)
    assert told["sampling"]["sampler"] == "ode-euler"
    assert told["FD-EffNetLite0@96"] == folder.evaluations()[-1]["FD-EffNetLite0@96"]


def test_previews_come_at_lines_of_the_log_and_keep_their_share() -> None:
    assert preview_steps(2400, 50) == {100, 300, 600, 1200, 1800}
    assert preview_steps(400_000, 100) == {12_500, 50_000, 100_000, 200_000, 300_000}
    assert preview_steps(50, 1) == preview_steps(100, 1000) == set()
    assert affordable(preview_steps(2400, 50), 571 / 64) == {1800}
    assert affordable(preview_steps(10_000, 50), 571 / 64) == {2500, 5000, 7500}
    assert affordable({100, 200}, 0) == {100, 200}
    for cost in (0.1, 1, 7, 100):
        chosen = affordable(preview_steps(2400, 50), cost)
        assert all(cost * (3 + len([s for s in chosen if s <= step])) <= 0.02 * step for step in chosen)


def log(*losses: float) -> list[dict[str, Any]]:
    return [{"step": step, "loss": loss} for step, loss in enumerate(losses, start=1)]


def test_a_widening_gap_is_said_once() -> None:
    falling = log(*(1 / step for step in range(1, 41)))

    def note(points: dict[int, float], lines: list[dict[str, Any]] = falling) -> str | None:
        return gap_note(lines, [{"step": step, "held_out_loss": value} for step, value in points.items()])

    assert note({}) is note({0: 2.0, 10: 1.0, 20: 0.9}) is None
    assert note({10: 1.0, 20: 0.9, 30: 0.91}) is None, "that may be chance"
    told = note({10: 1.0, 20: 0.9, 30: 0.95})
    assert told is not None
    assert "rose from 0.9 at step 20 to 0.95 at step 30" in told
    assert note({10: 1.0, 20: 0.9, 30: 0.95, 40: 0.99}) is None, "it was said at step 30"
    assert note({10: 1.0, 20: 0.9, 30: 0.95}, log(*[1.0] * 40)) is None, "training gains nothing either"


def test_a_held_out_curve_ends_where_its_set_changes(config_file: Path, tmp_path: Path) -> None:
    folder = RunFolder(tmp_path / "run")
    for last, seed in ((2, 0), (3, 5), (4, 5)):
        run(config_file, folder.path, training__num_steps=last, evaluation__seed=seed)
    lines, evaluations = folder.lines(), folder.evaluations()
    assert [line["step"] for line in lines if "held_out_checksum" in line] == [1, 3, 4]
    assert [list(curve) for curve in held_out_curves(lines, evaluations)] == [[0, 2], [3, 4]]
    rising = [{"step": step, "held_out_loss": value} for step, value in ((1, 1.0), (2, 9.0))]
    falling = [line | {"held_out_checksum": line["step"]} for line in log(3.0, 2.0)]
    assert gap_note(log(3.0, 2.0), rising) is not None
    assert gap_note(falling, rising) is None, "of two sets"


def test_curves_are_drawn_of_whatever_there_is(tmp_path: Path) -> None:
    save_curves(tmp_path / "empty.png", [], [])
    lines = log(*(1 / step for step in range(1, 41)))
    save_curves(tmp_path / "old.png", lines, [{"step": 0}])
    lines[9] |= {"held_out_loss": 0.5, "checkpoint": 8, "learning_rate": 1.0}
    lines[19] |= {"resumed": 19, "changed": ["training.num_steps: 20 -> 40"], "loss": None}
    report = {"value": 3.0, "n": 2, "floor": None}
    save_curves(tmp_path / "all.png", lines, [{"step": 0, "held_out_loss": 2.0, "FD": report}], [40])
    assert held_out_curves(lines, [{"step": 0, "held_out_loss": 2.0}]) == [{0: 2.0, 10: 0.5}]
    heights = [Image.open(tmp_path / f"{name}.png").height for name in ("empty", "old", "all")]
    assert heights[0] == heights[1] < heights[2]


def test_a_single_point_of_a_curve_shows(tmp_path: Path) -> None:
    save_curves(tmp_path / "loss.png", log(1.0), [])
    picture = Image.open(tmp_path / "loss.png").convert("RGB")
    width, height = picture.size
    middle = picture.crop((width // 2 - 20, 0, width // 2 + 80, height))  # beside the legend
    assert (0x1F, 0x77, 0xB4) in {colour for _, colour in middle.getcolors(10**6) or ()}


def test_without_held_out_images_one_line_says_what_is_lacking(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(config_file.parent / "data/train", tmp_path / "data/train")
    changes = {"training__num_steps": 2, "data__path": str(tmp_path / "data")}
    assert run(config_file, tmp_path / "run", **changes) == 0
    (line,) = [
        line for line in capsys.readouterr().out.splitlines() if "held-out" in line and "training steps" not in line
    ]
    assert "no held-out loss and no floor beside the distance: data.path" in line
    for one in RunFolder(tmp_path / "run").evaluations():
        assert "held_out_loss" not in one
        assert one["FD-EffNetLite0@96"]["floor"] is None


def test_what_the_autoencoder_keeps_is_told_once(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config_file, tmp_path / "run", training__num_steps=2)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "dB on held-out pictures" in line]
    assert line.startswith("note: the autoencoder gives 9.")
    assert "which bounds the model; warning: below 20 dB" in line


def test_curves_show_what_is_finite_and_any_name_of_a_key(tmp_path: Path) -> None:
    lines = [
        {"step": 1, "loss": 1.0, "learning_rate": 1e-3, "held_out_loss": math.inf},
        {"step": 2, "loss": 2.0, "resumed": 1, "changed": ["data.path: 'p$a_{$' -> 'data'"]},
    ]
    save_curves(tmp_path / "loss.png", lines, [{"step": 2, "held_out_loss": math.nan}])
    assert (tmp_path / "loss.png").stat().st_size > 1000
    assert held_out_curves(lines, [{"step": 2, "held_out_loss": 0.5}]) == [{2: 0.5}]


def test_a_broken_file_leaves_the_other_real_pictures_of_its_class(config_file: Path, tmp_path: Path) -> None:
    config = load_config(config_file)
    shutil.copytree(config.data.path or "", tmp_path / "data")
    config = config.model_copy(update={"data": config.data.model_copy(update={"path": str(tmp_path / "data")})})
    images = open_images(config.data)
    whole = SampleGrid(config, tmp_path / "a.png", images.class_names, None)._real
    Path(images.name(int((images.labels == 1).nonzero()[0])).removeprefix("image ")).write_bytes(b"no picture")
    left = SampleGrid(config, tmp_path / "a.png", images.class_names, None)._real
    assert {label: len(real) for label, real in left.items()} == {0: 2, 1: 1, 2: 2}
    assert torch.equal(left[1][0], whole[1][1])


def test_the_checksum_of_held_out_images_is_of_pixels_labels_and_seed(config_file: Path) -> None:
    config = load_config(config_file)
    images, vae = open_images(config.data), load_autoencoder(config.vae.name)

    def checksum(images: ImageSet, **settings: Any) -> int:
        changed = config.model_copy(update={"evaluation": config.evaluation.model_copy(update=settings)})
        return HeldOut.of(images, changed, Flow(), vae, len(images)).checksum

    whole, other = checksum(images), replace(images, read=lambda index: images.read(index) ^ 1)
    assert whole == checksum(images)
    assert whole not in {checksum(other), checksum(images, seed=5)}
    assert whole != checksum(replace(images, labels=images.labels.roll(1)))


def test_nothing_is_compiled_for_the_held_out_loss(config_file: Path) -> None:
    def fail(*_: Any) -> None:
        raise AssertionError

    config, pipe = load_config(config_file), tiny_pipeline()
    found = HeldOut.of(open_images(config.data), config, Flow(), load_autoencoder(config.vae.name), 4)
    _, _, t, labels = found.parts[0]
    parts = [(torch.zeros(4, 4, 8, 8), torch.zeros(4, 4, 8, 8), t[:4], labels[:4] * 0)]
    pipe.transformer.compile(backend=fail)
    assert replace(found, parts=parts).loss(pipe) > 0
