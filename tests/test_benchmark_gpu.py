"""What the benchmark of a GPU does where there is one, without one."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from vit5gen.lab.benchmark import command, engine, steps
from vit5gen.lab.benchmark.engine import FULL, Setting
from vit5gen.lab.benchmark.peers import PeerError
from vit5gen.lab.benchmark.steps import against_published, against_sit, step_config
from vit5gen.system.errors import UserError
from vit5gen.training.dry_run import run_cost
from vit5gen.training.process import memory_hint


def test_each_row_of_xl_is_measured_afresh(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[Any, ...]] = []
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(steps, "fresh", lambda *call: calls.append(call) or {})
    rows = list(steps.on_gpu(Setting(sit=Path("SiT"))))
    assert [row.get("mode") for row in rows] == ["tf32", "bf16", "fastest", None]
    assert {call[0] for call in calls} == {steps._with_gpu}
    *published, (_, compare, *others) = calls
    assert {call[1] for call in published} == {against_published}
    assert compare is against_sit
    assert [call[4:] for call in published] == [("tf32", False), ("bf16", True), ("bf16", False)]
    for sizes in [others[0], *(call[3] for call in published)]:
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


def test_a_row_may_use_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    assert steps._with_gpu(lambda: {"cpu": "ACCELERATE_USE_CPU" in os.environ}) == {"cpu": False}


def test_the_gpu_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "H100")
    monkeypatch.setattr(command, "fresh", lambda function: function())
    monkeypatch.setitem(command.BENCHMARKS, "gpu", lambda setting: [])
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
