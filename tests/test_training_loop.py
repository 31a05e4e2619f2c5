"""Training on a tiny run: what it leaves behind, and that an interrupted run equals an undisturbed one."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_run import assert_identical, run, weights

from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.system.errors import UserError
from vit5gen.training import checkpoint
from vit5gen.training.process import NONFINITE


def test_a_run_leaves_what_the_contract_lists_and_repeats_itself(config_file: Path, tmp_path: Path) -> None:
    for name in ("a", "b"):
        assert run(config_file, tmp_path / name) == 0
    a, b = tmp_path / "a", tmp_path / "b"
    for file in ("samples.png", "loss.png", "log.jsonl", "config.yaml", "metrics.json", "checkpoints/step_00000010"):
        assert (a / file).exists(), file
    assert (a / "pipeline/transformer/diffusion_pytorch_model.safetensors").exists()
    assert (a / "samples.png").read_bytes() == (b / "samples.png").read_bytes()
    assert_identical(weights(a, 10), weights(b, 10))
    evaluations = json.loads((a / "metrics.json").read_text())["evaluations"]
    assert [entry["step"] for entry in evaluations] == [0, 10]
    assert all(entry["FD-EffNetLite0@96"].keys() == {"value", "n", "floor"} for entry in evaluations)
    lines = [json.loads(line) for line in (a / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, 11))
    pipe = SiTPipeline.from_pretrained(a / "pipeline")
    assert dict(pipe.config.id2label) == {"0": "circle", "1": "square", "2": "star"} or pipe.class_ids("star") == [2]
    ema = load_file(a / "checkpoints/step_00000010/ema_0.9.safetensors")
    assert all(torch.equal(value, ema[name]) for name, value in pipe.transformer.named_parameters())


def test_a_finished_run_changes_nothing(config_file: Path, tmp_path: Path) -> None:
    def snapshot() -> dict[str, tuple[int, bytes]]:
        files = (path for path in tmp_path.rglob("*") if path.is_file())
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}

    output = tmp_path / "run"
    run(config_file, output, training__num_steps=3)
    before = snapshot()
    assert run(config_file, output, training__num_steps=3) == 0
    assert snapshot() == before


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"training__micro_batch_size": 2},
        {"data__from_images": True},
        {"training__precision": "fp64", "flow__stratified": True},
    ],
    ids=["shards", "accumulation", "images", "float64"],
)
def test_resume_equals_an_undisturbed_run_bit_for_bit(
    config_file: Path, tmp_path: Path, changes: dict[str, Any]
) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    run(config_file, whole, training__num_steps=40, **changes)
    run(config_file, parts, training__num_steps=17, **changes)
    assert run(config_file, parts, training__num_steps=40, **changes) == 0
    assert_identical(weights(whole, 40), weights(parts, 40))
    losses = [[json.loads(line)["loss"] for line in (r / "log.jsonl").open()] for r in (whole, parts)]
    assert losses[0] == losses[1]
    assert (whole / "samples.png").read_bytes() == (parts / "samples.png").read_bytes()


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "delete"])
def test_a_damaged_checkpoint_is_passed_over(
    config_file: Path, tmp_path: Path, damage: str, capsys: pytest.CaptureFixture[str]
) -> None:
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(config_file, whole)
    shutil.copytree(whole, broken)
    (broken / "metrics.json").write_text('{"evaluations": []}')
    file = broken / "checkpoints/step_00000010/optimizer.safetensors"
    content = file.read_bytes()
    if damage == "delete":
        file.unlink()
    else:
        flipped = content[:-3] + bytes([content[-3] ^ 1]) + content[-2:]
        file.write_bytes({"truncate": content[:-7], "flip": flipped, "empty": b""}[damage])
    capsys.readouterr()
    assert run(config_file, broken) == 0
    warnings = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning")]
    assert len(warnings) == 1
    assert "step_00000010" in warnings[0]
    assert_identical(weights(whole, 10), weights(broken, 10))


def test_with_no_valid_checkpoint_nothing_is_overwritten(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "run", training__num_steps=3)
    for file in (tmp_path / "run/checkpoints").glob("*/model.safetensors"):
        file.write_bytes(b"")
    before = sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*"))
    with pytest.raises(UserError, match="valid"):
        run(config_file, tmp_path / "run", training__num_steps=9)
    assert sorted((path, path.stat().st_mtime_ns) for path in (tmp_path / "run").rglob("*")) == before


def test_another_configuration_is_refused_until_accepted(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "run", training__num_steps=2)
    with pytest.raises(UserError, match=r"training\.learning_rate: 0\.001 -> 0\.1"):
        run(config_file, tmp_path / "run", training__num_steps=3, training__learning_rate=0.1)
    assert run(config_file, tmp_path / "run", accept=True, training__num_steps=3, training__learning_rate=0.1) == 0


def test_memory_may_be_saved_on_the_way(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "whole", training__num_steps=6)
    run(config_file, tmp_path / "parts", training__num_steps=3)
    assert run(config_file, tmp_path / "parts", training__num_steps=6, training__gradient_checkpointing=True) == 0
    assert_identical(weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6))


def test_bad_input_leaves_no_folder(config_file: Path, tmp_path: Path) -> None:
    for changes in ({"data__num_classes": 4}, {"vae__latent_channels": 8}, {"training__micro_batch_size": 3}):
        with pytest.raises(UserError):
            run(config_file, tmp_path / "run", **changes)
        assert not (tmp_path / "run").exists()


def test_a_full_disk_keeps_the_older_checkpoint(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    run(config_file, tmp_path / "run", training__num_steps=5)

    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    monkeypatch.setattr(
        "vit5gen.training.monitor.Monitor.evaluate", lambda self, step: self.folder.add_evaluation({"step": step})
    )
    run(config_file, tmp_path / "run", training__num_steps=7)
    assert "No space left" in capsys.readouterr().out
    folder = tmp_path / "run/checkpoints"
    assert [path.name for path in folder.iterdir()] == ["step_00000005"]
    assert checkpoint.find_damage(folder / "step_00000005") is None


def test_steps_that_are_not_finite_are_skipped_counted_and_end_the_run(config_file: Path, tmp_path: Path) -> None:
    changes = {"training__learning_rate": 1e30, "training__max_nonfinite_steps": 3, "training__num_steps": 30}
    assert run(config_file, tmp_path / "run", **changes) == NONFINITE
    assert list((tmp_path / "run/nonfinite").glob("step_*"))
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").open()]
    assert lines[-1]["skipped"] >= 2
