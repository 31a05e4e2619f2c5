"""What the benchmark of a GPU does where there is one, without one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch

from vit5gen.cli import main
from vit5gen.lab.benchmark import GpuRow, command, engine, steps
from vit5gen.lab.benchmark.engine import FULL, QUICK, Setting
from vit5gen.lab.benchmark.peers import PeerError
from vit5gen.lab.benchmark.steps import against_published, against_sit, drawing_against_sit, step_config
from vit5gen.system.errors import UserError
from vit5gen.training.cost import find_gpu
from vit5gen.training.dry_run import run_cost
from vit5gen.training.process import memory_hint


def test_each_row_of_xl_is_measured_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(steps, "fresh", lambda *call: calls.append(call) or {})
    rows = list(steps.on_gpu(Setting(sit=Path("SiT"))))
    assert [row.get("mode") for row in rows] == [None, None, "tf32", "bf16", "fastest"]
    assert {call[0] for call in calls} == {steps._with_gpu}
    own, published = calls[:2], calls[2:]
    assert [call[1] for call in own] == [against_sit, drawing_against_sit]
    assert {call[3] for call in own} == {"bf16"}
    assert {call[1] for call in published} == {against_published}
    assert [call[4:] for call in published] == [("tf32", False), ("bf16", True), ("bf16", False)]
    for sizes in {*(call[2] for call in own), *(call[3] for call in published)}:
        assert (sizes.preset, sizes.batch, sizes.latent_side) == ("XL/2", 32, FULL.latent_side)
        assert run_cost(step_config(sizes)).num_blocks == 28


def in_our_step() -> None:
    with memory_hint(32):
        raise torch.OutOfMemoryError("CUDA out of memory")


def in_theirs() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory")


def no_peer() -> None:
    raise PeerError("no checkout")


@pytest.mark.parametrize(("row", "message"), [(in_our_step, "70 GB"), (in_theirs, "70 GB"), (no_peer, "no checkout")])
def test_a_small_gpu_is_told_as_one(row: Callable[[], None], message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    with pytest.raises(UserError, match=message):
        steps._with_gpu(row)  # type: ignore[arg-type]


def test_a_small_gpu_costs_no_other_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def fresh(call: Callable[..., Any], *arguments: Any) -> Any:
        if "bf16" in arguments:
            raise steps.SmallGpuError("gpu: out of memory")
        return {}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(steps, "fresh", fresh)
    setting = Setting(sit=Path("SiT"))
    assert len(list(steps.on_gpu(setting))) == 1
    assert setting.notes[-1] == "gpu: out of memory"


def test_the_rows_that_are_asked_for_are_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Setting] = []
    monkeypatch.setattr(command, "costs", lambda: [{}])
    monkeypatch.setitem(command.BENCHMARKS, "gpu", lambda setting: asked.append(setting) or [])
    words = ["benchmark", "--only", "gpu", "--quick", "--output", str(tmp_path / "r.json")]
    for more in ([], ["--rows", "sampling,train-step"]):
        with pytest.raises(SystemExit) as stop:
            main([*words, *more])
        assert not stop.value.code
    assert [tuple(setting.rows) for setting in asked] == [get_args(GpuRow), ("sampling", "train-step")]
    assert [len(setting.notes) for setting in asked] == [
        2,
        1,
    ]  # rows without their folder, which none of these two needs


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--only gpu", "--only gpu: torch finds no GPU here; run it on one"),
        ("--only gpu --rows samplign", "Did you mean 'sampling'"),
        ("--only gpu --quick --rows bf16,sampling", "--rows bf16: expected --sit"),
        ("--rows sampling", "--rows has no effect without --only gpu"),
    ],
)
def test_what_cannot_be_measured_is_told(
    words: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["benchmark", *words.split(), "--output", str(tmp_path / "r.json")])
    assert stop.value.code == 2
    told = capsys.readouterr().err
    assert message in told
    assert told.count("\n") == 1
    assert not list(tmp_path.iterdir())


def test_no_row_is_begun_that_may_end_too_late(monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]

    def fresh(call: Callable[..., Any], compare: Callable[..., Any], *arguments: Any) -> Any:
        now[0] += steps.GPU_SECONDS * (0.45 if compare is against_sit else 0.3)
        return {}

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(steps, "fresh", fresh)
    monkeypatch.setattr("time.monotonic", lambda: now[0])
    setting = Setting(sit=Path("SiT"))
    assert len(list(steps.on_gpu(setting))) == 2
    assert now[0] < steps.GPU_SECONDS
    assert [note.split()[1] for note in setting.notes] == ["tf32", "bf16", "fastest"]
    assert setting.notes[0].endswith("--rows tf32 measures it alone")


@pytest.mark.parametrize("compare", [against_sit, drawing_against_sit])
def test_rows_tell_the_utilisation_of_both_backbones(
    compare: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A tiny model on the CPU, which is taken for an H100; no public suite tests its MFU (torchtitan prints one)."""
    monkeypatch.setattr(steps, "find_gpu", lambda name: "H100")
    with torch.compiler.set_stance("force_eager"):
        found = compare(QUICK, "bf16")
    configs = [step_config(QUICK, backbone) for backbone in ("vit5", "sit")]
    for who, config, median in zip(("", "peer's "), configs, ("our_median", "peer_median"), strict=True):
        cost = run_cost(config)
        # Heun takes 2 evaluations in its first step and, of the last one, the beginning and the end; guided, twice.
        of_image = cost.training_flops if compare is against_sit else 2 * 4 * cost.forward_flops
        utilisation = QUICK.batch * of_image / found[median] / 989e12
        assert found["more"][f"{who}MFU"] == pytest.approx(utilisation)
        assert found["more"][f"{who}GFLOP/s"] == pytest.approx(utilisation * 989e3)


def test_a_gpu_is_found_by_its_name() -> None:
    names = {"NVIDIA H100 80GB HBM3": "H100", "NVIDIA A100-SXM4-80GB": "A100", "NVIDIA H200": "H200", "": None}
    names |= dict.fromkeys(["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "Tesla T4"])
    assert {name: find_gpu(name) for name in names} == names


def test_a_row_may_use_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert steps._with_gpu(lambda: {"cpu": "ACCELERATE_USE_CPU" in os.environ}) == {"cpu": False}


def test_the_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(command, "fresh", lambda function: function())
    monkeypatch.setitem(command.BENCHMARKS, "gpu", lambda setting: [])
    monkeypatch.setattr(command, "costs", lambda: [{}])
    folders = dict.fromkeys(("sit", "vit5", "run"))
    command.run_benchmarks(tmp_path / "result.json", folders, only="gpu", quick=True)
    assert json.loads((tmp_path / "result.json").read_text())["machine"]["gpu"] == "H100"


def test_a_call_ends_when_the_gpu_has_done_it(monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: done.append("synchronised"))
    monkeypatch.setattr("time.perf_counter", lambda: done.append("clock") or 0.0)
    engine.seconds(lambda: done.append("call"))
    assert done == ["clock", "call", "synchronised", "clock"]
