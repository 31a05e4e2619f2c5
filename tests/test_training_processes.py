"""The same run in one process, in two (gloo) and sharded by FSDP2; signals, locks and kills across processes."""

import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import PartialState
from accelerate.state import AcceleratorState
from launch import ROOT, environment, train_in
from safetensors.torch import load_file
from tiny_run import assert_identical, losses, make_inputs, run, weights

from vit5gen.config import TrainingConfig
from vit5gen.system.distributed import processes
from vit5gen.system.errors import UserError
from vit5gen.training import checkpoint
from vit5gen.training.process import RESUME, STOPPED, make_accelerator

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
    assert sharded[:3] == ["ViT5Block", "ViT5Block", "Learner"]
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


@pytest.mark.slow
def test_muon_on_shards_trains_as_ddp_does(config_file: Path, tmp_path: Path) -> None:
    muon = {"training.optimizer": "muon", "training.weight_decay": 0.1, "training.checkpoint_every": 50}

    def job(name: str, num_steps: int) -> dict[str, Any]:
        return {
            "config": config_file,
            "output": tmp_path / name,
            "overrides": {"training.num_steps": num_steps, **muon},
        }

    assert train_in(2, [job("ddp", 50), job("ddp parts", 17), job("ddp parts", 50)], tmp_path)[0] == [0] * 3
    codes, sharded = train_in(2, [job("fsdp", 50), job("fsdp parts", 17), job("fsdp parts", 50)], tmp_path, fsdp=True)
    assert codes == [0] * 3
    assert sharded[:3] == ["ViT5Block", "ViT5Block", "Learner"]
    ddp, fsdp = weights(tmp_path / "ddp", 50), weights(tmp_path / "fsdp", 50)
    assert_identical(ddp, weights(tmp_path / "ddp parts", 50))
    assert_identical(fsdp, weights(tmp_path / "fsdp parts", 50))
    assert ddp.keys() == fsdp.keys()
    assert "optimizer/backbone.blocks.0.mlp.fc1.weight/momentum_buffer" in ddp
    gap = np.abs(np.subtract(losses(tmp_path / "fsdp"), losses(tmp_path / "ddp"))).max()
    print("FSDP2 against DDP:", gap, {name: (ddp[name] - fsdp[name]).abs().max().item() for name in ddp})
    assert gap < 1e-3
    for name in ddp:
        if name.startswith(("model", "ema")):
            assert (ddp[name] - fsdp[name]).abs().max() < 1e-4, name


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
    with pytest.raises(UserError, match="another process is training"):
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


def kill_test(arguments: list[str]) -> int:
    """Run the script in a fresh interpreter: torch does not compute gradients in a fork of one that has done so."""
    with tempfile.TemporaryDirectory() as cache:  # its shards hold an image each, which others must not find
        command = [sys.executable, ROOT / "tests/kill_test.py", *arguments]
        return subprocess.run(command, env=environment() | {"VIT5GEN_CACHE": cache}).returncode


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
@pytest.mark.parametrize("program", ["accelerate", "torchrun"])
def test_a_launcher_that_gets_sigterm_is_announced_by_the_last_line(
    config_file: Path, tmp_path: Path, program: str
) -> None:
    """Stands for accelerate's and torch's tests of launchers that are signalled; the traceback after it is theirs."""
    options = {"accelerate": ("launch", "--multi_gpu", "--num_processes=2"), "torchrun": ("--nproc-per-node=2",)}
    launcher = (str(Path(sys.executable).with_name(program)), *options[program])
    steps = ("--training.num_steps", "40000", "--training.checkpoint_every", "40000", "--training.log_every", "5")
    process = start(config_file, tmp_path / "run", *steps, launcher=launcher)
    wait_for_step(process, tmp_path / "run", 2)
    process.terminate()  # the launcher alone
    output = process.communicate(timeout=300)[0]
    assert process.returncode == 1
    (saved,) = checkpoint.steps(tmp_path / "run/checkpoints")
    step, reported = int(saved.name[5:]), "the launcher now reports this end by a traceback and exit code 1"
    ours, theirs = output.split(f"{reported}, but nothing is lost\n")
    assert ours.splitlines()[-1] == f"stopped by a signal after step {step}; {RESUME} from step {step}; "
    assert "SignalException" in theirs
    assert str(ROOT) not in theirs  # no traceback of ours
    told = [line for line in ours.splitlines() if line.startswith("train: ")]
    assert [int(line.split("/")[0][7:]) for line in told] == list(range(5, step + 1, 5))
    assert list((tmp_path / "run/tensorboard").iterdir())


@pytest.mark.slow
def test_sigterm_has_an_exit_code_of_its_own(config_file: Path, tmp_path: Path) -> None:
    process = start(config_file, tmp_path / "run", "--training.num_steps", "4000")
    wait_for_step(process, tmp_path / "run", 3)
    process.terminate()
    assert process.wait(timeout=300) == STOPPED


@pytest.mark.slow
def test_two_processes_save_by_one_clock_and_refuse_other_data_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
    config_file = make_inputs(tmp_path)

    def job(name: str, num_steps: int, **training: Any) -> dict[str, Any]:
        overrides = {f"training.{key}": value for key, value in {"num_steps": num_steps, **training}.items()}
        return {"config": config_file, "output": tmp_path / name, "overrides": overrides}

    jobs = [job("plain", 9), job("timed", 9, checkpoint_minutes=1e-9, keep_last=100)]
    assert train_in(2, jobs, tmp_path)[0] == [0, 0]
    assert_identical(weights(tmp_path / "plain", 9), weights(tmp_path / "timed", 9))
    assert len(list((tmp_path / "timed/checkpoints").iterdir())) == 9
    (tmp_path / "data/train/star/0.png").unlink()
    with pytest.raises(AssertionError) as raised:
        train_in(2, [job("plain", 12)], tmp_path)
    assert str(raised.value).count("UserError: ") == 2
    assert str(raised.value).count("was made with other data: samples 21 -> 20") == 2


@pytest.mark.slow
def test_a_kill_costs_a_run_of_ones_own_a_quarter_at_most(config_file: Path, tmp_path: Path) -> None:
    settings = yaml.safe_load(config_file.read_text())
    del settings["training"]["checkpoint_every"]
    file = tmp_path / "own.yaml"
    file.write_text(yaml.safe_dump(settings))
    process = start(file, tmp_path / "run", "--training.num_steps", "150")
    wait_for_step(process, tmp_path / "run", 112)
    process.kill()
    process.wait()
    newest = checkpoint.newest_valid(tmp_path / "run/checkpoints")
    assert newest is not None
    assert int(newest.name[5:]) >= 76
    assert run(file, tmp_path / "run", training__num_steps=150) == 0
    run(file, tmp_path / "whole", training__num_steps=150)
    assert_identical(weights(tmp_path / "run", 150), weights(tmp_path / "whole", 150))


@pytest.mark.slow
@pytest.mark.parametrize("lock", ["msvcrt", None])
def test_a_system_without_what_unix_has_trains_or_says_why_not(
    config_file: Path, tmp_path: Path, lock: str | None
) -> None:
    """What Python lacks on Windows is taken away before anything is imported; two calls of msvcrt are played."""
    (tmp_path / "windows.py").write_text(
        "import os, signal, sys, types\n"
        "import torch, accelerate, diffusers.loaders.peft, tensorboard, tqdm.auto  # which know what to do on Windows\n"
        "sys.modules['fcntl'] = sys.modules['resource'] = None\n"
        "del signal.pthread_sigmask, os.register_at_fork\n"
        f"sys.modules['msvcrt'] = {lock!r} and types.SimpleNamespace(LK_NBLCK=2, locking=lambda *_: None)\n"
        "from vit5gen.cli import main\n"
        "main(['train', *sys.argv[1:]])\n"
    )
    command = [sys.executable, str(tmp_path / "windows.py"), str(config_file), "--training.num_steps", "2"]
    more = (["--output", str(tmp_path / "run")], ["--dry-run", "--data.from_images", "true"])
    for options in more[: 2 if lock else 1]:
        done = subprocess.run([*command, *options], env=environment(), capture_output=True, text=True)
        assert done.returncode == (0 if lock else 2), done.stderr
        assert "Traceback" not in done.stderr
        assert ("neither fcntl nor msvcrt" in done.stderr) is (lock is None)
    assert (tmp_path / "run/checkpoints/step_00000002").exists() is (lock is not None)
