"""Trains and measures the runs of a study one after another, and keeps a row of each that is finished."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from vit5gen.config import Config, load_recorded, read_yaml
from vit5gen.data.autoencoders.find_autoencoder import load_autoencoder
from vit5gen.data.images import open_held_out
from vit5gen.data.latents import open_for
from vit5gen.evaluation import Extractor, frechet_of, frechet_report, load_extractor
from vit5gen.flow import NonFiniteError
from vit5gen.generation.card import commit
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.many import SamplingJob, generate
from vit5gen.lab.study.plan import Row, Run, StudyConfig, read_rows, read_study
from vit5gen.lab.study.report import write_report
from vit5gen.system.distributed import start_processes
from vit5gen.system.errors import UserError
from vit5gen.system.files import write_text
from vit5gen.system.precision import PRECISIONS
from vit5gen.training.dry_run import run_cost
from vit5gen.training.held_out import check_count, held_out_loss
from vit5gen.training.loop import train
from vit5gen.training.process import NONFINITE, RESUME, STOPPED
from vit5gen.training.reference_moments import TrainingReference, build_reference
from vit5gen.training.run_folder import CHANGEABLE, RunFolder, differences

# What runs are compared with, by the data and the evaluation of their configuration.
References = dict[str, tuple[Extractor, TrainingReference]]


def run_study(path: str | Path, output: str | Path) -> int:
    """Do the runs of a study that ``output`` has no row of, write rows.jsonl, table and plot; return the exit code.

    Each run is a folder ``output/runs/NAME``; an interrupted one is resumed. A row is written once its run is measured,
    and never changed. A run that diverges has no row; the others continue. Raises `UserError` for a study or data that
    do not fit, a row that cannot be read or was made with other settings, or another process at work in ``output``.
    """
    study, runs = read_study(path)
    output = Path(output)
    with RunFolder(output).locked(("rows.jsonl", "runs/*/metrics.json")):
        try:
            return _run_study(study, runs, output)
        except OSError as error:
            raise UserError(f"{error}; the rows so far are kept: fix this, then {RESUME}") from error


def _run_study(study: StudyConfig, runs: list[Run], output: Path) -> int:
    # The rows so far, and whether all that the other runs need is there.
    rows, references, revision, failed = read_rows(output / "rows.jsonl", runs), References(), commit(), 0
    check_inputs([run for run in runs if run.name not in rows])

    def report() -> int:
        if finished := [rows[run.name] for run in runs if run.name in rows]:
            write_report(study, finished, output)
        return len(finished)

    for number, run in enumerate(runs, start=1):
        # Train and measure a run that has no row.
        if run.name in rows:
            continue
        folder = output / "runs" / run.name
        print(f"\nrun {number} of {len(runs)}: {run.name} ({'resumed ' * folder.exists()}in {folder})", flush=True)
        try:
            code = _train(run, folder)
            if code == 0:
                rows[run.name] = _row(run, folder, references, revision)
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

        # Keep its row; table and plot show all there are, in the order of the study.
        lines = [json.dumps(row.model_dump(mode="json")) + "\n" for row in rows.values()]
        write_text(output / "rows.jsonl", "".join(lines))
        report()
    print(f"{output}: rows.jsonl, table.md and, if there is a baseline, differences.png of {report()} runs")
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
            check_count(open_held_out(data, split, images.class_names), run.config)
        except UserError as error:
            raise UserError(f"run {run.name}: {error}") from error


def _train(run: Run, folder: Path) -> int:
    """Train with evaluations of two images: `measure` scores the run, as all others."""
    few = {"num_images": 2, "num_reference": 2, "every": None}
    config = run.config.model_copy(update={"evaluation": run.config.evaluation.model_copy(update=few)})
    begun = RunFolder(folder).config
    if begun.exists() and (changes := differences(read_yaml(begun), config, CHANGEABLE - {"training.num_steps"})):
        raise UserError(f"{folder} was started with other settings: {'; '.join(changes)}; delete that folder")
    return train(config, folder, "auto", accept_changes=False)


def _row(run: Run, folder: Path, references: References, revision: str) -> Row:
    config, lines = run.config, RunFolder(folder).lines()
    steps = [0, *(line["step"] for line in lines)]
    if steps[-1] != config.training.num_steps:
        raise UserError(f"{RunFolder(folder).log} ends at step {steps[-1]}; delete that folder to do the run again")
    cost = run_cost(load_recorded(RunFolder(folder).config))  # which knows the number of classes
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
        **measure(folder, config, references),
        seconds=float(images @ [1 / line["images_per_second"] for line in lines]),
        settings=config,
    )


def measure(folder: Path, config: Config, references: References) -> dict[str, Any]:
    """Return ``held_out_loss``, and the distance as ``metric``, ``distance``, ``floor`` and ``n``.

    All runs meet the same images, noise, times and labels. references: those made so far; a new one is added.
    """
    device, evaluation = start_processes().device, config.evaluation
    pipe = load_pipeline(folder).to(device)
    key = config.data.model_dump_json() + evaluation.model_dump_json()
    if key not in references:
        extractor = load_extractor(evaluation.extractor, device)
        references[key] = extractor, build_reference(config, extractor)
    extractor, reference = references[key]
    job = SamplingJob(reference.labels, evaluation.seed, evaluation.batch_size, config.sampling)
    with PRECISIONS[config.training.precision].autocast(device):
        images = (images for _, images in generate(pipe, job))
        report = frechet_report(frechet_of(images, extractor), reference.distance, reference.floor)
    found = {"held_out_loss": held_out_loss(pipe, config), "metric": extractor.metric, "distance": report["value"]}
    return found | {"floor": report["floor"], "n": report["n"]}
