"""``vit5gen benchmark``: check what is given, measure, and write rows as JSON and as a Markdown table."""

import itertools
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, get_args
from unittest.mock import patch

import torch

from vit5gen.config import Config, load_recorded
from vit5gen.data.images import open_images
from vit5gen.evaluation import load_extractor
from vit5gen.generation.card import commit, versions
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.lab.benchmark import Benchmark, inference, sampling, steps
from vit5gen.lab.benchmark.engine import FULL, QUICK, Row, Setting, fresh
from vit5gen.lab.benchmark.peers import SIT, VIT5
from vit5gen.models.classifier import vit5_small
from vit5gen.section import validate
from vit5gen.system.cpu import keep_freed_memory
from vit5gen.system.errors import UserError
from vit5gen.system.files import check_writable, sha256, write_json, write_text
from vit5gen.training import cost
from vit5gen.training.dry_run import run_cost
from vit5gen.training.run_folder import RunFolder

BENCHMARKS = {
    "train-step": steps.on_cpu,
    "classifier": inference.classifier,
    "sampling": sampling.rows,
    "evaluation": inference.evaluation,
    "memory": steps.memory,
    "start-up": inference.start_up,
    "scaling": steps.scaling,
    "gpu": steps.on_gpu,
}
_NEEDS = {"train-step": "sit", "classifier": "vit5", "sampling": "run", "memory": "sit", "gpu": "sit"}
NUM_GPUS = 8  # whose costs are computed
COLUMNS = ("benchmark", "mode", "ours", "peer", "ratio", "95 % interval", "our median", "peer's median", "unit", "more")


@patch.dict(os.environ, {"ACCELERATE_USE_CPU": "true"})
def run_benchmarks(output: Path, folders: Mapping[str, Path | None], only: Benchmark | None, quick: bool) -> None:
    """Run all benchmarks or one, print their rows, and write ``output`` (JSON) and a table (.md) next to it.

    folders: those of `Setting`. Rows that need one not given are skipped with a note. Raises `UserError` for bad
    input before any work.
    """
    # What will be measured, and what cannot.
    names = get_args(Benchmark) if only is None else (only,)
    if output.suffix != ".json":
        raise UserError(f"--output {output}: expected FILE.json; FILE.md is written next to it")
    notes = ["a quick run with tiny sizes: its figures mean nothing"] if quick else []
    absent = [name for name in names if name in _NEEDS and folders[_NEEDS[name]] is None]
    notes += [f"{name}: rows that need --{_NEEDS[name]} are skipped" for name in absent]
    if {"train-step", "memory"} & set(names) and "bf16" not in steps.modes():
        notes.append("this CPU has no bf16 instructions: the mode bf16 is skipped, and the fastest is fp32")

    # Check all input before any work, and write nothing until then.
    setting = Setting(QUICK if quick else FULL, **folders, notes=notes)
    keep_freed_memory()  # as training does, for both sides of whatever is timed in this process
    if "evaluation" in names:
        load_extractor(inference.PRETRAINED)
    result: dict[str, Any] = {"rows": [], "quick": quick, "notes": notes, "peers": _check(setting)}
    for path in (output, output.with_suffix(".md")):
        check_writable(path)
    # What affects times on this machine, and nothing that identifies it.
    cpu = {"threads": torch.get_num_threads(), "cpu_capability": torch.backends.cpu.get_cpu_capability()}
    result["machine"] = {"cpus": os.cpu_count(), **cpu, "commit": commit(), **versions()}
    result["costs"] = costs()
    if "gpu" in names and torch.cuda.is_available():
        result["machine"]["gpu"] = fresh(torch.cuda.get_device_name)  # not here: to ask takes a part of the GPU

    # Row after row.
    print("\n".join(_head(result)), flush=True)
    for name in names:
        for found in BENCHMARKS[name](setting):
            result["rows"].append({"name": name, **found})
            print(_line(result["rows"][-1]), flush=True)
            _write(output, result)  # an interruption leaves what is measured
    _write(output, result)


def _check(setting: Setting) -> dict[str, dict[str, str]]:
    """Raise `UserError` for folders that are not what they should be; return the hashes of the peers' files."""
    found = {}
    if setting.sit is not None:
        steps.check_published(setting.sit)
        found[SIT.name] = _hashes(setting.sit)
    if setting.vit5 is not None:
        _, side = QUICK.classified
        inference.published(setting.vit5, vit5_small(img_size=side).eval(), torch.ones(1, 3, side, side))
        found[VIT5.name] = _hashes(setting.vit5)
    if setting.run is not None:
        if load_pipeline(setting.run).vae is None:
            raise UserError(f"--run {setting.run}: its pipeline has no autoencoder; expected a trained run")
        config = load_recorded(RunFolder(setting.run).config)
        open_images(config.data)
        load_extractor(config.evaluation.extractor)
    return found


def _hashes(folder: Path) -> dict[str, str]:
    return {str(file.relative_to(folder)): sha256(file) for file in folder.rglob("*.py") if file.is_file()}


def costs() -> list[dict[str, Any]]:
    """Return FLOPs, memory, traffic and GPU-hours of the published number of steps of XL/2, for each backbone.

    They are computed by `vit5gen.training.cost` at an assumed utilisation, not measured.
    """
    found = []
    for backbone, num_steps in itertools.product(("sit", "vit5"), (400_000, 7_000_000)):
        training = {"precision": "bf16", "num_steps": num_steps}
        config = validate(Config, {"model": {"backbone": backbone, "preset": "XL/2"}, "training": training}, "costs")
        image, batch = run_cost(config), config.training.global_batch_size
        memory = cost.memory_bytes(image, config, batch // NUM_GPUS, NUM_GPUS)
        hours = {gpu: round(cost.gpu_hours(image, num_steps * batch, gpu, "bf16")) for gpu in cost.GPUS}
        entry = {"model": f"{backbone} XL/2", "steps": num_steps, "batch": batch}
        entry["forward GFLOPs an image"] = round(image.forward_flops / 1e9, 1)
        entry[f"GB on each of {NUM_GPUS} GPUs"] = round(memory / 1e9, 1)
        entry["GB sent a step"] = round(cost.communication_bytes(image, config, NUM_GPUS) / 1e9, 2)
        entry["assumed utilisation"] = cost.ASSUMED_UTILISATION
        found.append(entry | {f"computed {gpu}-hours": number for gpu, number in hours.items()})
    return found


def _write(output: Path, result: dict[str, Any]) -> None:
    lines = [*_head(result), *map(_line, result["rows"]), "", *_table(result["costs"][0])]
    lines += [_cells(entry.values()) for entry in result["costs"]]
    try:
        write_json(output, result)
        write_text(output.with_suffix(".md"), "\n".join(lines) + "\n")
    except OSError as error:
        raise UserError(f"{output}: cannot be written ({error.strerror}); free space or choose another path") from error


def _head(result: dict[str, Any]) -> list[str]:
    facts = ", ".join(f"{name} {value}" for name, value in result["machine"].items())
    notes = [f"Note: {note}." for note in result["notes"]]
    return [f"Ratio: the peer's median over ours. {facts}.", *notes, "", *_table(COLUMNS)]


def _line(found: Row) -> str:
    names = [found[name] for name in ("name", "mode", "ours", "peer")]
    figures = "{ratio:.3g} | {low:.3g} - {high:.3g} | {our_median:.4g} | {peer_median:.4g} | {unit}".format(**found)
    return _cells([*names, figures, ", ".join(f"{name} {value:.5g}" for name, value in found["more"].items())])


def _table(columns: Iterable[str]) -> list[str]:
    return [_cells(columns), _cells("---" for _ in columns)]


def _cells(values: Iterable[object]) -> str:
    return f"| {' | '.join(map(str, values))} |"
