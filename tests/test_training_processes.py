"""The same run in one process, in two (gloo) and sharded by FSDP2; signals, locks and kills across processes."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import PartialState
from accelerate.state import AcceleratorState
from kill_test import main as kill_test
from launch import ROOT, environment, train_in
from safetensors.torch import load_file
from tiny_run import assert_identical, losses, run, weights

from vit5gen.config import TrainingConfig
from vit5gen.errors import UserError
from vit5gen.processes import processes
from vit5gen.training.loop import STOPPED
from vit5gen.training.process import make_accelerator

ACCUMULATED = {"training__micro_batch_size": 1}
IMAGES = {"data__from_images": True}


@pytest.fixture(scope="module")
def runs(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train in two processes everything that the tests below compare, so that the imports are paid once."""
    folder = tmp_path_factory.mktemp("processes")

    def job(name: str, num_steps: int, **overrides: Any) -> dict[str, Any]:
        dotted = {key.replace("__", "."): value for key, value in overrides.items()}
        return {"config": config_file, "output": folder / name, "overrides": {"training.num_steps": num_steps} | dotted}

    assert run(config_file, folder / "across", training__num_steps=17) == 0
    jobs = [
        job("whole", 40, **ACCUMULATED),
        job("parts", 17, **ACCUMULATED),
        job("parts", 40, **ACCUMULATED),
        job("images", 20, **IMAGES),
        job("image parts", 9, **IMAGES),
        job("image parts", 20, **IMAGES),
        job("fp64", 50, training__precision="fp64"),
        job("fp32", 50),
        job("across", 30),
    ]
    assert train_in(2, jobs, folder) == ([0] * len(jobs), [])
    return folder


def test_a_mac_computes_on_its_cpu(monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> None:
    for name in ("is_available", "is_built"):
        monkeypatch.setattr(torch.backends.mps, name, lambda: True)
    PartialState._reset_state()
    request.addfinalizer(lambda: AcceleratorState._reset_state(reset_partial_state=True))
    assert make_accelerator(TrainingConfig(trackers=[]), Path()).device.type == processes().device.type == "cpu"


@pytest.mark.parametrize(("whole", "parts", "steps"), [("whole", "parts", 40), ("images", "image parts", 20)])
def test_two_processes_resume_bit_for_bit(runs: Path, whole: str, parts: str, steps: int) -> None:
    assert_identical(weights(runs / whole, steps), weights(runs / parts, steps))
    assert losses(runs / whole) == losses(runs / parts)
    assert (runs / whole / "samples.png").read_bytes() == (runs / parts / "samples.png").read_bytes()


def test_one_and_two_processes_train_alike(config_file: Path, runs: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "fp64", training__num_steps=50, training__precision="fp64")
    run(config_file, tmp_path / "fp32", training__num_steps=50)
    gaps = {name: np.abs(np.subtract(losses(tmp_path / name), losses(runs / name))) for name in ("fp64", "fp32")}
    print({name: (gap[0], gap.max()) for name, gap in gaps.items()})
    assert len(gaps["fp64"]) == 50
    assert gaps["fp64"].max() < 1e-9
    assert gaps["fp32"][0] < 1e-6
    assert gaps["fp32"].max() < 1e-3


def test_a_run_moves_from_one_process_to_two_and_back(config_file: Path, runs: Path, tmp_path: Path) -> None:
    assert run(config_file, runs / "across", training__num_steps=40) == 0
    run(config_file, tmp_path / "one", training__num_steps=40)
    np.testing.assert_allclose(losses(runs / "across"), losses(tmp_path / "one"), atol=1e-5)


def test_fsdp2_shards_blocks_and_trains_as_ddp_does(config_file: Path, runs: Path) -> None:
    steps = {"training.checkpoint_every": 50}
    jobs = [
        {"config": config_file, "output": runs / name, "overrides": {"training.num_steps": n, **steps}}
        for name, n in (("fsdp", 50), ("fsdp parts", 17), ("fsdp parts", 50))
    ]
    codes, sharded = train_in(2, jobs, runs, fsdp=True)
    assert codes == [0, 0, 0]
    assert sharded[:3] == ["ViT5Block", "ViT5Block", "SiTTransformer2DModel"]
    gap = np.abs(np.subtract(losses(runs / "fsdp"), losses(runs / "fp32"))).max()
    print("FSDP2 against DDP:", gap)
    assert gap < 1e-3
    assert_identical(weights(runs / "fsdp", 50), weights(runs / "fsdp parts", 50))
    ddp, fsdp = weights(runs / "fp32", 50), weights(runs / "fsdp", 50)
    assert ddp.keys() == fsdp.keys()
    for name in ddp:
        if name.startswith("ema"):
            assert (ddp[name] - fsdp[name]).abs().max() < 1e-3, name
    exported = load_file(runs / "fsdp/pipeline/transformer/diffusion_pytorch_model.safetensors")
    assert_identical(exported, load_file(runs / "fsdp/checkpoints/step_00000050/ema_0.9.safetensors"))
    # A sharded run goes on in one plain process.
    assert run(config_file, runs / "fsdp", training__num_steps=52, training__checkpoint_every=50) == 0


def start(config_file: Path, output: Path, *options: str, launcher: tuple[str, ...] = ()) -> subprocess.Popen[str]:
    command = [*(launcher or (sys.executable,)), str(ROOT / "train.py"), str(config_file), "--output", str(output)]
    return subprocess.Popen(
        [*command, *options],
        env=environment(ACCELERATE_USE_CPU="true"),
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )


def wait_for_step(process: subprocess.Popen[str], output: Path, step: int) -> None:
    while not (output / "log.jsonl").exists() or (output / "log.jsonl").read_text().count("\n") < step:
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.01)


def test_the_lock_dies_with_the_trainer_and_workers_change_nothing(config_file: Path, tmp_path: Path) -> None:
    steps = {"training__num_steps": 400, "training__checkpoint_every": 20}
    options = ("--training.num_steps", "400", "--training.checkpoint_every", "20", "--data.num_workers", "1")
    process = start(config_file, tmp_path / "killed", *options)
    wait_for_step(process, tmp_path / "killed", 30)
    os.kill(process.pid, signal.SIGSTOP)
    with pytest.raises(UserError, match="another process trains there"):
        run(config_file, tmp_path / "killed", **steps)
    workers = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    process.kill()
    os.waitpid(process.pid, 0)
    assert any(Path("/proc", worker).exists() for worker in workers)
    steps["training__num_steps"] = 60
    assert run(config_file, tmp_path / "killed", **steps) == 0
    run(config_file, tmp_path / "whole", **steps)
    assert_identical(weights(tmp_path / "killed", 60), weights(tmp_path / "whole", 60))


@pytest.mark.slow
def test_a_launcher_that_starts_one_process_for_two_is_noticed(config_file: Path, tmp_path: Path) -> None:
    launcher = (str(Path(sys.executable).with_name("accelerate")), "launch", "--cpu", "--num_processes", "2")
    output = start(config_file, tmp_path / "run", launcher=launcher).communicate(timeout=300)[0]
    assert "ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N" in output
    assert not (tmp_path / "run").exists()


def test_killed_runs_equal_an_undisturbed_one(config_file: Path, tmp_path: Path) -> None:
    options = ["--training.num_steps", "40", "--training.checkpoint_every", "4"]
    assert kill_test([str(config_file), "--kills", "3", "--output", str(tmp_path / "kills"), *options]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_run_killed_again_and_again_equals_an_undisturbed_one(
    config_file: Path, tmp_path: Path, processes: int
) -> None:
    options = ["--training.num_steps", "200", "--training.checkpoint_every", "5", "--processes", str(processes)]
    assert kill_test([str(config_file), "--kills", "10", "--output", str(tmp_path / "kills"), *options]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_a_killed_encoding_equals_an_undisturbed_one(config_file: Path, tmp_path: Path, processes: int) -> None:
    options = ["--encode", "--kills", "3", "--processes", str(processes)]
    assert kill_test([str(config_file), *options, "--output", str(tmp_path / "kills")]) == 0


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_to_two_launched_processes_saves_and_the_run_goes_on(
    config_file: Path, tmp_path: Path, number: signal.Signals
) -> None:
    launcher = (str(Path(sys.executable).with_name("accelerate")), "launch", "--multi_gpu", "--num_processes", "2")
    steps = ("--training.num_steps", "400", "--training.checkpoint_every", "500")
    process = start(config_file, tmp_path / "run", *steps, launcher=launcher)
    wait_for_step(process, tmp_path / "run", 5)
    os.killpg(process.pid, number)  # as a terminal does
    output = process.communicate(timeout=300)[0]
    assert process.returncode != 0
    assert "stopped by a signal after step" in output
    (saved,) = (tmp_path / "run/checkpoints").iterdir()
    step = int(saved.name.removeprefix("step_"))
    assert 5 <= step < 400
    process = start(config_file, tmp_path / "run", "--training.num_steps", str(step + 3), *steps[2:], launcher=launcher)
    assert process.wait(timeout=300) == 0
    process = start(config_file, tmp_path / "whole", "--training.num_steps", str(step + 3), launcher=launcher)
    assert process.wait(timeout=300) == 0
    assert_identical(weights(tmp_path / "run", step + 3), weights(tmp_path / "whole", step + 3))


@pytest.mark.slow
def test_sigterm_has_an_exit_code_of_its_own(config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, tmp_path / "run", "--training.num_steps", "4000")
    wait_for_step(process, tmp_path / "run", 3)
    process.terminate()
    assert process.wait(timeout=300) == STOPPED
