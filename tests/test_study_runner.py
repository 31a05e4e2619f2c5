"""Tests of the runner: rows, resumption, and what it says of rows and folders that do not fit."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from test_study_plan import write_study
from tiny_run import forget_processes
from tiny_run import run as tiny_run

from vit5gen.cli import main
from vit5gen.data.autoencoders.codec import encode
from vit5gen.data.images import open_images
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.lab.study import runner
from vit5gen.lab.study.plan import read_rows, read_study
from vit5gen.system.errors import UserError
from vit5gen.system.files import locked_file
from vit5gen.training.held_out import held_out_loss
from vit5gen.training.process import STOPPED


def study(path: Path, output: Path) -> int:
    forget_processes()
    return runner.run_study(path, output)


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("study")
    assert study(write_study(folder), folder / "out") == 0
    return folder


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / "rows.jsonl").read_text().splitlines()]


def test_a_row_for_each_run(done: Path) -> None:
    found = rows(done)
    assert [row["run"] for row in found] == ["vit5, seed 0", "sit, seed 0", "vit5, seed 1", "sit, seed 1"]
    for row in found:
        log = (done / "out" / "runs" / row["run"] / "log.jsonl").read_text().splitlines()
        assert row["loss"] == json.loads(log[-1])["loss"]
        assert row["settings"]["training"]["seed"] == row["seed"]
        assert (row["n"], row["steps"]) == (6, 4)
        assert row["metric"] == "FD-EffNetLite0@96"
        assert row["floor"] == found[0]["floor"] > 0
        assert row["seconds"] > 0
        assert row["commit"]
    assert len({row["held_out_loss"] for row in found}) == 4
    assert "| vit5 | 2 |" in (done / "out" / "table.md").read_text()
    assert (done / "out" / "differences.png").is_file()


def test_finished_rows_are_not_done_again(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (done / "out" / "rows.jsonl").read_bytes()
    assert study(done / "study.yaml", done / "out") == 0
    assert (done / "out" / "rows.jsonl").read_bytes() == before
    assert "run 1 of" not in capsys.readouterr().out


def test_a_lost_row_comes_back_the_same(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = done / "out" / "rows.jsonl"
    before = file.read_text()
    file.write_text("".join(line + "\n" for line in before.splitlines() if "sit, seed 0" not in line))
    assert study(done / "study.yaml", done / "out") == 0
    again = {row["run"]: row for row in rows(done)}
    assert again == {row["run"]: row for row in map(json.loads, before.splitlines())}
    assert "run 2 of 4: sit, seed 0 (resumed in" in capsys.readouterr().out


def test_a_copy_without_hidden_files_goes_on(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "out").mkdir()
    rows = (done / "out" / "rows.jsonl").read_text()
    (tmp_path / "out" / "rows.jsonl").write_text(rows)
    assert study(done / "study.yaml", tmp_path / "out") == 0
    assert (tmp_path / "out" / "table.md").read_text() == (done / "out" / "table.md").read_text()
    assert "run 1 of" not in capsys.readouterr().out
    assert (tmp_path / "out" / "rows.jsonl").read_text() == rows


@pytest.mark.parametrize(
    ("mangle", "message"),
    [
        (lambda text: text[:-20], "line 4: unreadable row"),
        (lambda text: text.replace('"held_out_loss"', '"lost"', 1), "line 1: unreadable row.*held_out_loss"),
        (lambda text: text + text.splitlines()[1] + "\n", "line 5: a second row of '.*, seed [01]'"),
        (lambda text: text.replace('"hidden_size": 32', '"hidden_size": 64', 1), "model.hidden_size: 64 -> 32"),
        (lambda text: text.replace('"seed": 0, "commit"', '"seed": 1, "commit"', 1), "seed: 1 -> 0"),
        (lambda text: text.replace('{"backbone": "vit5"}', '{"back": "vit5"}', 1), "levels: .*'back'"),
        (lambda text: text.replace('"floor": ', '"floor": null, "was": ', 1), "line 1: unreadable row.*'was'"),
        (lambda text: text.replace('"n": 6', '"n": "six"', 1), "line 1: unreadable row.*n = 'six'"),
        (lambda text: "[]\n" + text, "line 1: unreadable row"),
    ],
)
def test_rows_that_do_not_fit_are_named(done: Path, tmp_path: Path, mangle: Any, message: str) -> None:
    _, runs = read_study(done / "study.yaml")
    file = tmp_path / "rows.jsonl"
    file.write_text(mangle((done / "out" / "rows.jsonl").read_text()))
    with pytest.raises(UserError, match=message):
        read_rows(file, runs)


@pytest.mark.slow
def test_a_stop_keeps_rows_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, train = write_study(tmp_path), runner.train
    codes = iter([0, STOPPED])
    monkeypatch.setattr(runner, "train", lambda *args, **options: train(*args, **options) or next(codes))
    assert study(path, tmp_path / "out") == STOPPED
    first = rows(tmp_path)
    assert [row["run"] for row in first] == ["vit5, seed 0"]
    monkeypatch.setattr(runner, "train", train)
    assert study(path, tmp_path / "out") == 0
    assert rows(tmp_path)[0] == first[0]
    assert len(rows(tmp_path)) == 4


@pytest.mark.slow
def test_a_run_scored_at_several_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    one = {"grid": {"backbone": {"vit5": {}}}, "seeds": [0], "baseline": {}}
    path, measure = write_study(tmp_path, **one, score_at=[2, 4]), runner.measure

    # Stopped between its two rows, it is measured where it was not, and not trained again.
    calls = iter([measure])
    monkeypatch.setattr(runner, "measure", lambda *args: next(calls)(*args))
    with pytest.raises((StopIteration, RuntimeError)):
        study(path, tmp_path / "out")
    (first,), run = rows(tmp_path), tmp_path / "out" / "runs" / "vit5, seed 0"
    assert sorted(path.name for path in (run / "checkpoints").glob("step_*")) == ["step_00000002", "step_00000004"]
    monkeypatch.setattr(runner, "measure", measure)
    assert study(path, tmp_path / "out") == 0
    assert "already trained to step 4; nothing to do" in capsys.readouterr().out
    found = rows(tmp_path)
    assert found[0] == first
    assert [row["steps"] for row in found] == [2, 4]
    assert found[1]["training_flops"] == 2 * found[0]["training_flops"] > 0
    assert 0 < found[0]["seconds"] < found[1]["seconds"]
    assert all(0 <= row["coverage"] <= 1 for row in found)
    assert not (run / "checkpoints").exists()
    assert (run / "pipeline").is_dir()

    # At the constant rate, what it is after two steps is a run of two steps.
    overrides = {"training.num_steps": 2, "training.trackers": []}
    assert study(write_study(tmp_path, **one, overrides=overrides), tmp_path / "short" / "out") == 0
    (short,) = rows(tmp_path / "short")
    for key in ("loss", "held_out_loss", "distance", "coverage", "training_flops"):
        assert short[key] == first[key]


def test_processes_share_the_runs(done: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(done / "out", tmp_path / "out")
    file = tmp_path / "out" / "rows.jsonl"
    before = file.read_text()
    file.write_text("".join(line + "\n" for line in before.splitlines() if "sit, seed 0" not in line))
    kept = file.read_text()
    with locked_file(tmp_path / "out" / "runs" / ".sit, seed 0.lock", wait=False):
        assert study(done / "study.yaml", tmp_path / "out") == 0
    assert "run 2 of 4: sit, seed 0 is another process's" in capsys.readouterr().out
    assert file.read_text() == kept
    assert study(done / "study.yaml", tmp_path / "out") == 0
    assert sorted(file.read_text().splitlines()) == sorted(before.splitlines())


def test_a_run_that_diverges_leaves_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    path, train = write_study(tmp_path), runner.train
    monkeypatch.setattr(
        runner, "train", lambda *args, **kw: 70 if "sit, seed 0" in args[1].name else train(*args, **kw)
    )
    assert study(path, tmp_path / "out") == 70
    assert [row["run"] for row in rows(tmp_path)] == ["vit5, seed 0", "vit5, seed 1", "sit, seed 1"]
    assert "run sit, seed 0 ended with exit code 70" in capsys.readouterr().out


@pytest.mark.slow
def test_folders_that_do_not_fit_are_named(tmp_path: Path) -> None:
    path = write_study(tmp_path, seeds=[0])
    folder = tmp_path / "out" / "runs" / "vit5, seed 0"
    assert tiny_run(path.with_name("run.yaml"), folder, training__num_steps=2, training__trackers=[]) == 0
    with pytest.raises(UserError, match=r"run vit5, seed 0: .*started with other settings: training.num_steps: 2 -> 4"):
        study(path, tmp_path / "out")
    shutil.rmtree(folder)
    assert study(path, tmp_path / "out") == 0
    (tmp_path / "out" / "rows.jsonl").unlink()
    log = folder / "log.jsonl"
    log.write_text(log.read_text()[:-20])
    with pytest.raises(UserError, match=r"run vit5, seed 0: .*log.jsonl has no line of step 4; delete that folder"):
        study(path, tmp_path / "out")


def test_inputs_are_missed_before_any_run(tmp_path: Path) -> None:
    grid = {"held out": {"test": {}, "none": {"evaluation.held_out_split": "nope"}}}
    path = write_study(tmp_path, grid=grid, baseline={})
    with pytest.raises(UserError, match=r"run none, seed 0: .*no folder 'nope'"):
        study(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("kept", "message"), [(["circle/0"], "has 1 images; expected at least 2"), (["new/0"], "'new'")]
)
def test_held_out_images_that_do_not_serve_are_told_before_any_run(
    tmp_path: Path, kept: list[str], message: str
) -> None:
    path = write_study(tmp_path)
    test = tmp_path / "data" / "test"
    (test / "circle").rename(tmp_path / "pictures")
    shutil.rmtree(test)
    for name in kept:
        (test / name).parent.mkdir(parents=True)
        shutil.copy(tmp_path / "pictures" / "0.png", test / f"{name}.png")
    with pytest.raises(UserError, match=f"run vit5, seed 0: .*{message}"):
        study(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_held_out_loss_is_that_of_all_images(done: Path) -> None:
    _, runs = read_study(done / "study.yaml")
    pipe = load_pipeline(done / "out" / "runs" / runs[0].name)
    pipe.transformer.requires_grad_(False)
    pipe.transformer.head.linear.weight.zero_()
    pipe.transformer.head.linear.bias.zero_()
    config = runs[0].config
    small = config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"batch_size": 5})})
    loss = held_out_loss(pipe, config, 12)
    assert held_out_loss(pipe, small, 12) == pytest.approx(loss, rel=1e-6)
    # A network that says zero has the loss E|x1 - x0|^2 = 1 + E|x1|^2 an element.
    with torch.inference_mode():
        images = open_images(config.data, "test")
        x1, _ = encode(pipe.vae, torch.stack([images.read(i) for i in range(12)]))
    assert loss == pytest.approx(1 + x1.square().mean().item(), rel=0.05)
    assert held_out_loss(pipe, config, 6) != loss


def test_bad_input_ends_with_code_2(done: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([str(done / "absent.yaml"), "--output", str(done / "new")], [], ["--outptu", "x"]):
        with pytest.raises(SystemExit) as caught:
            main(["study", *arguments])
        assert caught.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1
    assert not (done / "new").exists()


def test_an_objective_costs_while_it_is_active_and_muon_its_products(tmp_path: Path) -> None:
    """FLOPs of each step, from the shapes of what is multiplied."""
    grid = {
        "lever": {
            "none": {},
            "short": {"training.objectives": {"flow": {}, "self_alignment": {"tap": 1, "stop_at": 3}}},
            "long": {"training.objectives": {"flow": {}, "self_alignment": {"tap": 1}}},
            "muon": {"training.optimizer": "muon"},
        }
    }
    _, runs = read_study(write_study(tmp_path, grid=grid, baseline={}, seeds=[0]))
    flops = {run.levels["lever"]: [runner.cost_so_far(run.config, step)[1] for step in (2, 4)] for run in runs}
    plain = flops["none"][0] // 2
    assert flops["none"][1] == 4 * plain
    added = flops["long"][0] // 2 - plain
    assert added > 0
    assert flops["short"] == [2 * (plain + added), 4 * plain + 3 * added]
    # Five iterations of x x^T, its square, and a polynomial of it times x.
    width, shapes = 32, [(3 * 32, 32), (32, 32), (4 * 32, 32), (32, 4 * 32), (6 * 32, 32)]
    products = 2 * 5 * sum(2 * (2 * width**2 * max(shape) + width**3) for shape in shapes)
    assert flops["muon"] == [steps * (plain + products) for steps in (2, 4)]
