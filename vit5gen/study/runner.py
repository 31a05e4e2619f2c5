"""Trains and measures the runs of a study one after another, and keeps a row of each that is finished."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch

from vit5gen.card import commit
from vit5gen.config import Config
from vit5gen.cost import model_cost
from vit5gen.errors import UserError
from vit5gen.files import write_text
from vit5gen.study.measure import Judge
from vit5gen.study.plan import Run, StudyConfig, read_study
from vit5gen.study.report import write_report
from vit5gen.training.build import build_model
from vit5gen.training.loop import STOPPED, train
from vit5gen.training.run import Log, differences, locked

Row = dict[str, Any]
NUMBERS = ("steps", "parameters", "training_flops", "loss", "held_out_loss", "distance", "n", "seconds")


def run_study(path: str | Path, output: str | Path) -> int:
    """Do the runs of a study that ``output`` has no row of, write rows.jsonl, table and plot; return the exit code.

    Each run is a folder ``output/runs/NAME``; an interrupted one goes on. A row is written once its run is measured,
    and never changed. Raises `UserError` for a study that does not fit, a row that cannot be read or is of another
    study, or another process at work in ``output``.
    """
    study, runs = read_study(path)
    output, failed = Path(output), 0
    with locked(output, begun="runs/*/metrics.json"):
        rows, judge = read_rows(output / "rows.jsonl", runs), Judge(study.num_held_out)
        for number, run in enumerate(runs, start=1):
            if run.name in rows:
                continue
            folder = output / "runs" / run.name
            state = f"incomplete folder {folder}, going on" if folder.exists() else f"in {folder}"
            print(f"\nrun {number} of {len(runs)}: {run.name} ({state})", flush=True)
            if code := train(_brief(run.config), folder):
                print(f"run {run.name} ended with exit code {code} and has no row", flush=True)
                if code == STOPPED:
                    return code
                failed = code  # that run diverged; the others need not wait
                continue
            rows[run.name] = _row(run, folder, judge)
            write_text(output / "rows.jsonl", "".join(json.dumps(row) + "\n" for row in rows.values()))
            _report(study, runs, rows, output)
        _report(study, runs, rows, output)
    print(f"{output}: rows.jsonl, table.md and differences.png of {len(rows)} runs")
    return failed


def _report(study: StudyConfig, runs: list[Run], rows: dict[str, Row], output: Path) -> None:
    if finished := [rows[run.name] for run in runs if run.name in rows]:
        write_report(study, finished, output)


def read_rows(file: Path, runs: list[Run]) -> dict[str, Row]:
    """Return the rows by the name of their run; raise `UserError` for one that is broken or made by other settings."""
    by_name, rows = {run.name: run for run in runs}, {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines, start=1):
        where = f"{file} line {number}"
        try:
            row = json.loads(line)
            name, settings = row["run"], row["settings"]
            if missing := [key for key in NUMBERS if not isinstance(row.get(key), int | float)]:
                raise KeyError(f"no number for {missing[0]}")
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{where}: unreadable row ({error}); restore it, or delete the line to do the run again"
            ) from None
        if name in rows:
            raise UserError(f"{where}: a second row of {name!r}; delete one")
        if name in by_name and (changes := differences(settings, by_name[name].config, free=())):
            raise UserError(
                f"{where}: {name!r} was made by other settings: {'; '.join(changes)}; restore them, or choose another "
                "--output"
            )
        rows[name] = row
    return rows


def _brief(config: Config) -> Config:
    """Return the configuration with evaluations of two images: the judge scores the run, once and for all alike."""
    few = {"num_images": 2, "num_reference": 2, "every": None}
    return config.model_copy(update={"evaluation": config.evaluation.model_copy(update=few)})


def _row(run: Run, folder: Path, judge: Judge) -> Row:
    config, lines = run.config, Log(folder).read()
    with torch.device("meta"):
        cost = model_cost(build_model(config))
    images = config.training.global_batch_size * np.diff([0, *(line["step"] for line in lines)])
    return {
        "run": run.name,
        "levels": run.levels,
        "seed": run.seed,
        "commit": commit(),
        "steps": config.training.num_steps,
        "parameters": cost.parameters,
        "training_flops": cost.training_flops * config.training.global_batch_size * config.training.num_steps,
        "loss": lines[-1]["loss"],
        **judge.measure(folder, config),
        "seconds": float(images @ [1 / line["images_per_second"] for line in lines]),
        "settings": config.model_dump(mode="json"),
    }
