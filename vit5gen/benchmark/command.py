"""``vit5gen benchmark``: check what is given, measure, and write rows as JSON and as a Markdown table."""

import os
import subprocess
import tempfile
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vit5gen import cost
from vit5gen.benchmark import (
    NAMES,
    classifier,
    evaluation,
    memory,
    peers,
    sampling,
    scaling,
    start_up,
    train_step,
)
from vit5gen.benchmark.setting import FULL, QUICK, Setting
from vit5gen.benchmark.timing import Row
from vit5gen.card import versions
from vit5gen.config import Config, load_config, validate
from vit5gen.errors import UserError, choose
from vit5gen.files import sha256, write_json, write_text
from vit5gen.pipeline import pipeline_folder
from vit5gen.training.plan import run_cost

_MODULES = (train_step, classifier, sampling, evaluation, memory, start_up, scaling)
BENCHMARKS = {name: module.rows for name, module in zip(NAMES, _MODULES, strict=True)}
_NEEDS = {"train-step": "sit", "classifier": "vit5", "sampling": "run", "memory": "sit"}
_COLUMNS = ("benchmark", "mode", "ours", "peer", "ratio", "95 % interval", "our median", "peer's median", "unit")


def benchmark_command(
    output: str | Path,
    sit: str | Path | None = None,
    vit5: str | Path | None = None,
    run: str | Path | None = None,
    only: str | None = None,
    quick: bool = False,
) -> None:
    """Run all benchmarks or one, print their rows, and write ``output`` (JSON) and a table (.md) beside it.

    What needs a folder that is not given is left out with a note. Raises `UserError` for bad input before any work.
    """
    output, names = Path(output), NAMES if only is None else [choose("--only", only, NAMES)]
    folders = [None if folder is None else Path(folder) for folder in (sit, vit5, run)]
    setting = Setting(QUICK if quick else FULL, *folders)
    _check(setting, output)
    missing = {name: option for name, option in _NEEDS.items() if name in names and getattr(setting, option) is None}
    notes = [f"{name}: rows that need --{option} are left out" for name, option in missing.items()]
    if quick:
        notes.insert(0, "a quick run of tiny sizes: its figures mean nothing")
    result: dict[str, Any] = {
        "rows": [],
        "quick": quick,
        "notes": notes,
        "machine": _machine(),
        "peers": _hashes(setting),
        "costs": costs(),
    }
    print("\n".join(_head(result)), flush=True)
    with patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"}):
        for name in names:
            for found in BENCHMARKS[name](setting):
                print(_line(found), flush=True)
                result["rows"].append(found)
                _write(output, result)  # an interruption leaves what is measured
    _write(output, result)


def _check(setting: Setting, output: Path) -> None:
    table = output.with_suffix(".md")
    if output.suffix != ".json" or output.is_dir() or table.is_dir():
        raise UserError(f"--output {output}: expected FILE.json, beside which {table.name} is written; choose another")
    for repository, folder in ((peers.SIT, setting.sit), (peers.VIT5, setting.vit5)):
        if folder is not None:
            peers.load(repository, folder)
    if setting.run is not None:
        pipeline_folder(setting.run)
        load_config(setting.run / "config.yaml")
    try:
        output.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=output.parent):
            pass
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose another path") from error


def _write(output: Path, result: dict[str, Any]) -> None:
    table = [*_head(result), *map(_line, result["rows"]), "", *_cost_table(result["costs"])]
    try:
        write_json(output, result)
        write_text(output.with_suffix(".md"), "\n".join(table) + "\n")
    except OSError as error:
        raise UserError(f"--output {output} cannot be written ({error.strerror}); choose another path") from error


def _head(result: dict[str, Any]) -> list[str]:
    notes = [f"Note: {note}." for note in result["notes"]]
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    return [f"Ratio: the peer's median over ours. {facts}.", "", *notes, "", _table_row(_COLUMNS), "|---" * 9 + "|"]


def _line(found: Row) -> str:
    cells = [found["name"], found["mode"], found["ours"], found["peer"], f"{found['ratio']:.3g}"]
    cells += [f"{found['low']:.3g}-{found['high']:.3g}", f"{found['our_median']:.4g}", f"{found['peer_median']:.4g}"]
    return _table_row([*cells, found["unit"]])


def _cost_table(table: list[dict[str, Any]]) -> list[str]:
    heads = list(table[0])
    return [_table_row(heads), "|---" * len(heads) + "|", *(_table_row(entry.values()) for entry in table)]


def _table_row(cells: Any) -> str:
    return f"| {' | '.join(map(str, cells))} |"


def _machine() -> dict[str, Any]:
    """Return what of this machine decides times; nothing that tells which one it is."""
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty", "--abbrev=40"]
    try:
        commit = subprocess.run(command, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    return {
        "cpus": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit or None,
        **versions(),
    }


def _hashes(setting: Setting) -> dict[str, str]:
    files = {"sit": (setting.sit, "models.py"), "vit5": (setting.vit5, "models_vit5.py")}
    return {name: sha256(folder / file) for name, (folder, file) in files.items() if folder is not None}


def costs() -> list[dict[str, Any]]:
    """Return what XL/2 costs on GPUs, computed by `vit5gen.cost` at an assumed utilisation, not measured."""
    found = []
    for backbone in ("sit", "vit5"):
        training = {"precision": "bf16"}
        sections = {"model": {"backbone": backbone, "preset": "XL/2"}, "training": training}
        config = validate(Config, sections, "benchmark")
        one, batch = run_cost(config), config.training.global_batch_size
        for steps in (400_000, 7_000_000):
            hours = {
                f"computed_hours_{gpu}": round(cost.gpu_hours(one, steps * batch, gpu, "bf16")) for gpu in cost.GPUS
            }
            found.append(
                {
                    "model": f"{backbone} XL/2",
                    "steps": steps,
                    "batch": batch,
                    "assumed_mfu": cost.ASSUMED_MFU,
                    "forward_gflops": round(one.forward_flops / 1e9, 1),
                    "memory_gb_of_8_gpus": round(cost.memory_bytes(one, config, batch // 8, 8) / 1e9, 1),
                    "sent_gb_a_step": round(cost.communication_bytes(one, config, 1, 8) / 1e9, 2),
                    **hours,
                }
            )
    return found
