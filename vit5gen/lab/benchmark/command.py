"""``vit5gen benchmark``: check what is given, measure, and write rows as JSON and as a Markdown table."""

import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from vit5gen.config import load_recorded
from vit5gen.data.images import open_images
from vit5gen.evaluation import load_extractor
from vit5gen.generation.card import commit, versions
from vit5gen.generation.loading import load_pipeline
from vit5gen.lab.benchmark import NAMES, classifier, evaluation, gpu, memory, sampling, scaling, start_up, train_step
from vit5gen.lab.benchmark.costs import costs
from vit5gen.lab.benchmark.peers import SIT, VIT5
from vit5gen.lab.benchmark.setting import FULL, QUICK, Setting
from vit5gen.lab.benchmark.timing import Row
from vit5gen.models.classifier import vit5_small
from vit5gen.system.cpu import keep_freed_memory
from vit5gen.system.errors import UserError, choose
from vit5gen.system.files import check_writable, sha256, write_json, write_text

_MODULES = (train_step, classifier, sampling, evaluation, memory, start_up, scaling, gpu)
BENCHMARKS = {name: module.rows for name, module in zip(NAMES, _MODULES, strict=True)}
_NEEDS = {"train-step": "sit", "classifier": "vit5", "sampling": "run", "memory": "sit", "gpu": "sit"}


@patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"})
def run_benchmarks(
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
    names = NAMES if only is None else (choose("--only", only, NAMES),)
    output, given = Path(output), {"sit": sit, "vit5": vit5, "run": run}
    if output.suffix != ".json":
        raise UserError(f"--output {output}: expected FILE.json, beside which FILE.md is written")
    notes = ["a quick run of tiny sizes: its figures mean nothing"] if quick else []
    notes += [
        f"{name}: rows that need --{option} are left out"
        for name, option in _NEEDS.items()
        if name in names and given[option] is None
    ]
    if {"train-step", "memory"} & set(names) and "bf16" not in train_step.modes():
        notes.append("this CPU has no instructions for bf16: that mode is left out, and the fastest is fp32")
    folders = {name: None if folder is None else Path(folder) for name, folder in given.items()}
    setting = Setting(QUICK if quick else FULL, **folders, notes=notes)
    keep_freed_memory()  # as training does, for both sides of whatever is timed in this process
    if "evaluation" in names:
        load_extractor(evaluation.PRETRAINED)
    result: dict[str, Any] = {"rows": [], "quick": quick, "notes": notes, "peers": _check(setting)}
    for path in (output, output.with_suffix(".md")):
        check_writable(path)
    result |= {"machine": _machine(), "costs": costs()}
    if "gpu" in names and (name := gpu.device_name()) is not None:
        result["machine"]["gpu"] = name
    print("\n".join(_head(result)), flush=True)
    for name in names:
        for found in BENCHMARKS[name](setting):
            print(_line(found), flush=True)
            result["rows"].append(found)
            _write(output, result)  # an interruption leaves what is measured
    _write(output, result)


def _check(setting: Setting) -> dict[str, dict[str, str]]:
    """Raise `UserError` for folders that are not what they should be; return the hashes of the peers' files."""
    found = {}
    if setting.sit is not None:
        train_step.check_published(setting.sit)
        found[SIT.name] = _hashes(setting.sit)
    if setting.vit5 is not None:
        side = QUICK.image_side
        classifier.published(setting.vit5, vit5_small(img_size=side).eval(), torch.ones(1, 3, side, side))
        found[VIT5.name] = _hashes(setting.vit5)
    if setting.run is not None:
        if load_pipeline(setting.run).vae is None:
            raise UserError(f"--run {setting.run}: its pipeline has no autoencoder; expected a trained run")
        config = load_recorded(setting.run / "config.yaml")
        open_images(config.data)
        load_extractor(config.evaluation.extractor)
    return found


def _hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256(file) for file in folder.rglob("*.py") if file.is_file()}


def _write(output: Path, result: dict[str, Any]) -> None:
    lines = [*_head(result), *map(_line, result["rows"]), "", *_table(result["costs"][0])]
    lines += [_cells(entry.values()) for entry in result["costs"]]
    try:
        write_json(output, result)
        write_text(output.with_suffix(".md"), "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); make room, or choose another path") from error


def _head(result: dict[str, Any]) -> list[str]:
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    columns = "benchmark, mode, ours, peer, ratio, 95 % interval, our median, peer's median, unit, more"
    notes = [f"Note: {note}." for note in result["notes"]]
    return [f"Ratio: the peer's median over ours. {facts}.", *notes, "", *_table(columns.split(", "))]


def _line(found: Row) -> str:
    interval = f"{found['low']:.3g} - {found['high']:.3g}"
    medians = [f"{found[name]:.4g}" for name in ("our_median", "peer_median")]
    names = [found[name] for name in ("name", "mode", "ours", "peer")]
    more = [f"{name} {value:.5g}" for name, value in found["more"].items()]
    return _cells([*names, f"{found['ratio']:.3g}", interval, *medians, found["unit"], ", ".join(more)])


def _table(columns: Iterable[str]) -> list[str]:
    return [_cells(columns), _cells("---" for _ in columns)]


def _cells(values: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"


def _machine() -> dict[str, Any]:
    """Return what of this machine decides times; nothing that tells which one it is."""
    return {
        "cpus": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "commit": commit(),
        **versions(),
    }
