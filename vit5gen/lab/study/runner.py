"""Trains and measures the runs of a study one after another, and keeps the rows of each that is finished."""

import json
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from vit5gen.config import Config, load_recorded, read_yaml
from vit5gen.data.autoencoders.find_autoencoder import load_autoencoder
from vit5gen.data.images import open_held_out, readable
from vit5gen.data.latents import open_for
from vit5gen.evaluation import Extractor, FeatureStatistics, density_coverage, frechet_report, load_extractor
from vit5gen.evaluation.distances import COVERAGE_NEIGHBOURS
from vit5gen.flow import NonFiniteError
from vit5gen.generation.card import commit
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.many import SamplingJob, generate
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.lab.study.plan import Row, Run, StudyConfig, read_rows, read_study
from vit5gen.lab.study.tables import write_report
from vit5gen.system.distributed import start_processes
from vit5gen.system.errors import UserError
from vit5gen.system.files import locked_file, write_text
from vit5gen.system.precision import PRECISIONS
from vit5gen.training.build import build_model
from vit5gen.training.checkpoint import step_name
from vit5gen.training.dry_run import run_cost
from vit5gen.training.export import pipeline_of_run
from vit5gen.training.held_out import check_count, held_out_loss
from vit5gen.training.loop import train
from vit5gen.training.optimizers.muon import block_matrices, orthogonalise
from vit5gen.training.process import NONFINITE, RESUME, STOPPED
from vit5gen.training.reference_moments import TrainingReference, build_reference
from vit5gen.training.run_folder import CHANGEABLE, RunFolder, differences

# What runs are compared with, by the data and the evaluation of their configuration: the last are features of held-out
# images (N, D).
References = dict[str, tuple[Extractor, TrainingReference, Tensor]]
MARKS = ("rows.jsonl", "runs/*/metrics.json")


def run_study(path: str | Path, output: str | Path) -> int:
    """Do the runs of a study that ``output`` lacks rows of, write rows.jsonl, table and plot; return the exit code.

    Each run is a folder ``output/runs/NAME``; an interrupted one is resumed. A row is written once it is measured, and
    never changed. A run that diverges has no row; the others continue. Several processes may share the runs of one
    ``output``: each leaves alone what another is at. Raises `UserError` for a study or data that do not fit, or a row
    that cannot be read or was made with other settings.
    """
    study, runs = read_study(path)
    output = Path(output)
    try:
        # The rows so far, and whether all that the other runs need is there.
        with RunFolder(output).locked(MARKS, wait=True):
            rows = read_rows(output / "rows.jsonl", runs)
            for name, step in rows.keys() - {key for run in runs for key in run.keys}:
                print(f"note: {output}: {name!r} at step {step} is not of this study; ignored", flush=True)
            check_inputs([run for run in runs if not rows.keys() >= set(run.keys)])
        return _run_study(study, runs, output)
    except OSError as error:
        raise UserError(f"{error}; the rows so far are kept: fix this, then {RESUME}") from error


def _run_study(study: StudyConfig, runs: list[Run], output: Path) -> int:
    references, revision, failed = References(), commit(), 0

    def due(run: Run) -> list[int]:
        """Return the steps that have no row, of any process."""
        rows = read_rows(output / "rows.jsonl", runs)
        return [step for name, step in run.keys if (name, step) not in rows]

    for number, run in enumerate(runs, start=1):
        # A run that lacks rows, and that no other process is at.
        folder = output / "runs" / run.name
        with ExitStack() as stack:
            if not due(run):
                continue
            folder.parent.mkdir(exist_ok=True)
            try:
                stack.enter_context(locked_file(folder.with_name(f".{run.name}.lock"), wait=False))
            except BlockingIOError:
                print(f"\nrun {number} of {len(runs)}: {run.name} is another process's", flush=True)
                continue
            if not (steps := due(run)):  # that process has just ended
                continue

            # Train it, and measure it at its steps.
            print(f"\nrun {number} of {len(runs)}: {run.name} ({'resumed ' * folder.exists()}in {folder})", flush=True)
            try:
                code = _train(run, folder)
                for step in () if code else steps:
                    _add(_row(run, folder, step, references, revision), output)
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
            if study.score_at:  # for which checkpoints were kept
                shutil.rmtree(RunFolder(folder).checkpoints, ignore_errors=True)
            _report(study, runs, output)
    print(f"{output}: rows.jsonl, table.md and, if there is a baseline, plots of {_report(study, runs, output)} rows")
    return failed


def _add(row: Row, output: Path) -> None:
    file = output / "rows.jsonl"
    with RunFolder(output).locked(MARKS, wait=True):
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        write_text(file, "\n".join([*lines, json.dumps(row.model_dump(mode="json"))]) + "\n")


def _report(study: StudyConfig, runs: list[Run], output: Path) -> int:
    """Write table and plots of the rows so far, in the order of the study; return how many there are."""
    with RunFolder(output).locked(MARKS, wait=True):
        rows = read_rows(output / "rows.jsonl", runs)
        if finished := [rows[key] for run in runs for key in run.keys if key in rows]:
            write_report(study, finished, output)
    return len(finished)


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


def _row(run: Run, folder: Path, step: int, references: References, revision: str) -> Row:
    config, run_folder = run.config, RunFolder(folder)
    lines = [line for line in run_folder.lines() if line["step"] <= step]
    steps = [0, *(line["step"] for line in lines)]
    if steps[-1] != step:
        raise UserError(f"{run_folder.log} has no line of step {step}; delete that folder to do the run again")
    if step == config.training.num_steps:
        pipe = load_pipeline(folder)
    else:
        pipe, *_ = pipeline_of_run(run_folder.checkpoints / step_name(step), None, None)
    recorded = load_recorded(run_folder.config)  # which knows the number of classes
    (parameters, flops), batch_size = cost_so_far(recorded, step), config.training.global_batch_size
    return Row(
        run=run.name,
        levels=run.levels,
        seed=run.seed,
        commit=revision,
        steps=step,
        parameters=parameters,
        training_flops=flops,
        loss=lines[-1]["loss"],
        **measure(pipe, config, references),
        seconds=float(batch_size * np.diff(steps) @ [1 / line["images_per_second"] for line in lines]),
        settings=config,
    )


def cost_so_far(config: Config, steps: int) -> tuple[int, int]:
    """Return the parameters of a run, and the FLOPs of its first steps.

    With them count an objective in the steps in which it is active, an encoder for each image whether its features are
    stored or not, and the products of Muon, which are not few for a small model.
    """
    stored = "features", "shards"
    objectives = {
        name: {key: value for key, value in given.items() if (key, value) != stored}
        for name, given in config.training.objectives.items()
    }
    settings = config.training.model_copy(update={"num_steps": steps, "objectives": objectives})
    cost, of_step = run_cost(config.model_copy(update={"training": settings})), 0
    if settings.optimizer == "muon":
        with torch.no_grad(), torch.device("meta"), FlopCounterMode(display=False) as counter:
            for weight in block_matrices(build_model(config)):
                orthogonalise(weight, weight.dtype)
        of_step = counter.get_total_flops()
    return cost.parameters, (cost.training_flops * settings.global_batch_size + of_step) * steps


def measure(pipe: SiTPipeline, config: Config, references: References) -> dict[str, Any]:
    """Return ``held_out_loss``, ``coverage``, and the distance as ``metric``, ``distance``, ``floor`` and ``n``.

    All runs meet the same images, noise, times and labels. references: those made so far; a new one is added.
    """
    device, evaluation = start_processes().device, config.evaluation
    pipe = pipe.to(device)
    key = config.data.model_dump_json() + evaluation.model_dump_json()
    if key not in references:
        extractor = load_extractor(evaluation.extractor, device)
        references[key] = extractor, build_reference(config, extractor), _held_out_features(pipe, config, extractor)
    extractor, reference, real = references[key]
    job = SamplingJob(reference.labels, evaluation.seed, evaluation.batch_size, config.sampling)
    with PRECISIONS[config.training.precision].autocast(device):
        parts = [extractor(images).pooled for _, images in generate(pipe, job)]
    statistics, generated = FeatureStatistics(extractor.dim), torch.cat(parts)
    for part in parts:
        statistics.update(part)
    report = frechet_report(statistics, reference.distance, reference.floor)
    found = {"held_out_loss": held_out_loss(pipe, config), "metric": extractor.metric, "distance": report["value"]}
    if min(len(real), len(generated)) > COVERAGE_NEIGHBOURS:
        found["coverage"] = density_coverage(real, generated)[1]
    return found | {"floor": report["floor"], "n": report["n"]}


def _held_out_features(pipe: SiTPipeline, config: Config, extractor: Extractor) -> Tensor:
    """Return features (N, D) of held-out images, as many as are generated where there are."""
    evaluation, generator = config.evaluation, torch.Generator().manual_seed(config.evaluation.seed)
    names = [pipe.class_name(i) for i in range(pipe.transformer.config.num_classes)]
    images = open_held_out(config.data, evaluation.held_out_split, names)
    chosen = torch.randperm(len(images), generator=generator)[: evaluation.num_images]
    images = readable(images.select(chosen), config.data)
    chunks = torch.arange(len(images)).split(evaluation.batch_size)
    return torch.cat([extractor(images.stack(chunk)).pooled for chunk in chunks])
