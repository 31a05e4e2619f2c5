"""Trains and measures the runs of a study one after another, and keeps a row of each that is finished."""

from pathlib import Path

import numpy as np

from vit5gen.config import read_yaml
from vit5gen.data.autoencoders.kl import load_autoencoder
from vit5gen.data.images import open_held_out
from vit5gen.data.latents import open_for
from vit5gen.flow import NonFiniteError
from vit5gen.generation.card import commit
from vit5gen.lab.study.measure import Judge
from vit5gen.lab.study.plan import Run, StudyConfig, read_study
from vit5gen.lab.study.report import write_report
from vit5gen.lab.study.rows import Row, read_rows, write_rows
from vit5gen.system.errors import UserError
from vit5gen.training.dry_run import run_cost
from vit5gen.training.folder import CHANGEABLE, RunFolder, differences
from vit5gen.training.loop import train
from vit5gen.training.process import NONFINITE, STOPPED


def run_study(path: str | Path, output: str | Path) -> int:
    """Do the runs of a study that ``output`` has no row of, write rows.jsonl, table and plot; return the exit code.

    Each run is a folder ``output/runs/NAME``; an interrupted one is resumed. A row is written once its run is measured,
    and never changed. A run that diverges has no row; the others continue. Raises `UserError` for a study or data that
    do not fit, a row that cannot be read or was made by other settings, or another process at work in ``output``.
    """
    study, runs = read_study(path)
    output = Path(output)
    with RunFolder(output).locked(("rows.jsonl", "runs/*/metrics.json")):
        try:
            return _run_study(study, runs, output)
        except OSError as error:
            raise UserError(f"{error}; the rows so far are kept: fix it, and the same command resumes") from error


def _run_study(study: StudyConfig, runs: list[Run], output: Path) -> int:
    rows, judge, revision, failed = read_rows(output / "rows.jsonl", runs), Judge(), commit(), 0
    check_inputs([run for run in runs if run.name not in rows])
    for number, run in enumerate(runs, start=1):
        if run.name in rows:
            continue
        folder = output / "runs" / run.name
        print(f"\nrun {number} of {len(runs)}: {run.name} ({'resumed ' * folder.exists()}in {folder})", flush=True)
        try:
            code = _train(run, folder)
            if code == 0:
                rows[run.name] = _row(run, folder, judge, revision)
        except NonFiniteError as error:
            print(f"error: {error}")
            code = NONFINITE
        except UserError as error:
            raise UserError(f"run {run.name}: {error}") from error
        if code:
            print(f"run {run.name} ended with exit code {code} and has no row", flush=True)
            if code == STOPPED:
                return code
            failed = code  # that run diverged; the others need not wait
            continue
        write_rows(output / "rows.jsonl", list(rows.values()))
        write_report(study, [rows[run.name] for run in runs if run.name in rows], output)
    finished = [rows[run.name] for run in runs if run.name in rows]
    if finished:
        write_report(study, finished, output)
    print(f"{output}: rows.jsonl, table.md and, where there is a baseline, differences.png of {len(finished)} runs")
    return failed


def check_inputs(runs: list[Run]) -> None:
    """Raise `UserError` unless images, held-out images and autoencoder of every run are there."""
    seen = set()
    for run in runs:
        data, split = run.config.data, run.config.evaluation.held_out_split
        if (key := (data.model_dump_json(), run.config.vae, split)) in seen:
            continue
        seen.add(key)
        try:
            images = open_for(run.config, load_autoencoder(run.config.vae.name))
            if (count := len(open_held_out(data, split, images.class_names))) < 2:
                raise UserError(f"data: split {split!r} has {count} images; expected at least 2")
        except UserError as error:
            raise UserError(f"run {run.name}: {error}") from error


def _train(run: Run, folder: Path) -> int:
    """Train with evaluations of two images: the judge scores the run, once and for all alike."""
    few = {"num_images": 2, "num_reference": 2, "every": None}
    config = run.config.model_copy(update={"evaluation": run.config.evaluation.model_copy(update=few)})
    begun = RunFolder(folder).config
    if begun.exists() and (changes := differences(read_yaml(begun), config, CHANGEABLE - {"training.num_steps"})):
        raise UserError(f"{folder} was begun with other settings: {'; '.join(changes)}; delete that folder")
    return train(config, folder, "auto")


def _row(run: Run, folder: Path, judge: Judge, revision: str) -> Row:
    config, lines = run.config, RunFolder(folder).lines()
    steps = [0, *(line["step"] for line in lines)]
    if steps[-1] != config.training.num_steps:
        raise UserError(f"{RunFolder(folder).log} ends at step {steps[-1]}; delete that folder to do the run again")
    cost = run_cost(config)
    images = config.training.global_batch_size * np.diff(steps)
    return Row(
        run=run.name,
        levels=run.levels,
        seed=run.seed,
        commit=revision,
        steps=config.training.num_steps,
        parameters=cost.parameters,
        training_flops=cost.training_flops * config.training.global_batch_size * config.training.num_steps,
        loss=lines[-1]["loss"],
        **judge.measure(folder, config),
        seconds=float(images @ [1 / line["images_per_second"] for line in lines]),
        settings=config,
    )
