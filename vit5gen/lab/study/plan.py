"""A study's file, the runs that it asks for, and the row that is kept of each finished one."""

import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from vit5gen.config import Config, find_config, load_config, read_yaml, recorded_values
from vit5gen.data.autoencoders.find_autoencoder import find_sizes
from vit5gen.section import Count, Natural, Section, validate
from vit5gen.system.errors import UserError, choose
from vit5gen.training.build import check_values
from vit5gen.training.run_folder import differences


class StudyConfig(Section):
    """A study: every combination of one level from each axis of the grid, trained from every seed."""

    base: str = Field(description="configuration of a run, relative to this file")
    overrides: dict[str, Any] = Field({}, description="section.key: value, for all runs")
    seeds: list[Natural] = Field([0, 1, 2], min_length=1, description="training seeds of every cell")
    grid: dict[str, dict[str, dict[str, Any]]] = Field(description="axis: {level: {section.key: value}}")
    baseline: dict[str, str] = Field({}, description="axis: the level that its other levels are compared with")
    more_seeds: dict[str, list[Natural]] = Field({}, description="level: further seeds of the cells that have it")
    score_at: list[Count] = Field([], description="steps of which a run keeps checkpoints and rows; default: its last")
    replicate: str | None = Field(None, description="axis whose levels must agree for a verdict, e.g. width")
    extrapolate_to: Count | None = Field(None, description="parameters to which laws over `replicate` are extrapolated")


Key = tuple[str, int]  # of a row: the name of its run, and the step


@dataclass(frozen=True)
class Run:
    """One run of a study: its level on each axis, its seed, the configuration that they give, and when it is scored."""

    levels: dict[str, str]
    seed: int
    config: Config
    steps: tuple[int, ...]

    @property
    def name(self) -> str:
        """Name of the run and of its folder: its levels and its seed."""
        return ", ".join([*self.levels.values(), f"seed {self.seed}"])

    @property
    def keys(self) -> list[Key]:
        """The rows that the run has once it is measured."""
        return [(self.name, step) for step in self.steps]


def read_study(path: str | Path) -> tuple[StudyConfig, list[Run]]:
    """Read a study and check every run of it; seeds turn slowest, so that an unfinished study has whole replications.

    Raises `UserError` for a key that does not exist, a value that does not fit, or a baseline that is not a level.
    """
    # What the file says of itself.
    study = validate(StudyConfig, read_yaml(path), f"study {path}")
    if not study.grid or not all(study.grid.values()):
        raise UserError(f"study {path}: grid needs an axis, and every axis a level; add them")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"study {path}: seeds {study.seeds} list a seed twice; list each once")
    for level in study.more_seeds:
        choose(f"study {path}: more_seeds", level, list(itertools.chain(*study.grid.values())))
    if study.score_at != sorted(set(study.score_at)):
        raise UserError(f"study {path}: score_at = {study.score_at}; list each step once, the last one last")
    for axis, level in study.baseline.items():
        choose(f"study {path}: baseline {axis}", level, study.grid[choose(f"study {path}: axis", axis, study.grid)])
    if study.replicate is not None:
        choose(f"study {path}: replicate", study.replicate, study.grid.keys() - study.baseline.keys())
    for key, needed in (("replicate", "score_at"), ("extrapolate_to", "replicate")):
        if getattr(study, key) and not getattr(study, needed):
            raise UserError(f"study {path}: {key} has no effect without {needed}; add that, or omit {key}")

    # The cells, whose names become folders and rows of tables.
    names = [", ".join(levels) for levels in itertools.product(*study.grid.values())]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"study {path}: two cells are called {min(twice)!r}; rename a level")
    cells = {levels: _config(path, study, levels) for levels in itertools.product(*study.grid.values())}
    if len(extractors := {str(config.evaluation.extractor) for config in cells.values()}) > 1:
        raise UserError(f"study {path}: evaluation.extractor is {' and '.join(sorted(extractors))}; use one for all")

    # Every cell from each of its seeds, which the cells that it is compared with have too.
    more = study.more_seeds
    seeds = {levels: {*study.seeds, *itertools.chain(*(more.get(one, []) for one in levels))} for levels in cells}
    for axis, level in study.baseline.items():
        for levels in cells:
            reference = tuple(level if name == axis else own for name, own in zip(study.grid, levels, strict=True))
            if absent := seeds[levels] - seeds[reference]:
                fault = f"{', '.join(levels)} has seed {min(absent)}, {', '.join(reference)} lacks it"
                raise UserError(f"study {path}: {fault}; add {level!r} to more_seeds")
    return study, [
        Run(dict(zip(study.grid, levels, strict=True)), seed, config.model_copy(update={"training": training}), steps)
        for seed in dict.fromkeys([*study.seeds, *itertools.chain(*more.values())])
        for levels, config in cells.items()
        if seed in seeds[levels]
        for training in [config.training.model_copy(update={"seed": seed})]
        for steps in [tuple(study.score_at) or (training.num_steps,)]
    ]


def _config(path: str | Path, study: StudyConfig, levels: tuple[str, ...]) -> Config:
    # The settings of all levels, none of which two axes may set.
    overrides, where = dict(study.overrides), f"study {path}: grid {' / '.join(levels)}"
    if bad := [level for level in levels if not level.isprintable() or set(level) & set("/|") or level[:1] in "."]:
        advice = "avoid '/', '|', a leading dot and unprintable characters"
        raise UserError(f"{where}: level {bad[0]!r} cannot be the name of a folder and a table row; {advice}")
    for axis, level in zip(study.grid, levels, strict=True):
        for key, value in study.grid[axis][level].items():
            if key in overrides.keys() - study.overrides.keys():
                raise UserError(f"{where}: {key} is set by two axes; set it in one")
            overrides[key] = value
    if "training.seed" in overrides:
        raise UserError(f"{where}: sets training.seed; move it to the seeds of the study")

    # The run that they give, with a checkpoint where it is scored, checked as training would.
    if common := math.gcd(*study.score_at):
        overrides |= {"training.checkpoint_every": common, "training.keep_every": common}
    try:
        config = find_sizes(load_config(find_config(path).parent / study.base, overrides))
        check_values(config)
        if config.training.num_steps == 0:
            raise UserError("training.num_steps = 0; expected at least 1")
        last, log_every = config.training.num_steps, config.training.log_every
        if study.score_at and (study.score_at[-1] != last or common % log_every):
            expected = f"multiples of training.log_every = {log_every} up to training.num_steps = {last}"
            raise UserError(f"score_at = {study.score_at}; expected {expected}")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return config


class Row(Section):
    """A run at one of its steps, the last one unless the study says more: what it was, what it cost, how good it is."""

    run: str
    levels: dict[str, str]
    seed: Natural
    commit: str  # of the code when the run was last started
    steps: Natural  # so far, as are FLOPs and seconds
    parameters: Natural
    training_flops: int
    loss: float | None  # mean since the line of the log before, None if no step was finite
    held_out_loss: float
    metric: str
    distance: float
    floor: float
    n: Natural
    coverage: float | None = None  # of held-out images by as many generated ones; None in rows of earlier versions
    seconds: float  # of training alone
    settings: Config

    @field_validator("settings", mode="before")
    @classmethod
    def _recorded(cls, value: Any) -> Any:
        return recorded_values(value) if isinstance(value, dict) else value

    @property
    def cell(self) -> str:
        """Name of the cell: its levels."""
        return ", ".join(self.levels.values())

    @property
    def key(self) -> Key:
        return self.run, self.steps


def read_rows(file: Path, runs: list[Run]) -> dict[Key, Row]:
    """Return the rows by run and step, those of no run of this study among them.

    Raises `UserError` for a row that is broken, stands twice, or was made with other settings.
    """
    by_name, rows = {run.name: run for run in runs}, dict[Key, Row]()
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines, start=1):
        where = f"{file} line {number}"
        try:
            row = validate(Row, json.loads(line), where)
        except ValueError as error:
            reason = str(error).removeprefix(f"{where}: ")
            advice = "restore it, or delete the line to do the run again"
            raise UserError(f"{where}: unreadable row ({reason}); {advice}") from None
        if row.key in rows:
            raise UserError(f"{where}: a second row of {row.run!r}; delete one of them")
        if row.run in by_name and (changes := _changes(row, by_name[row.run])):
            advice = "restore the settings, or choose another --output"
            raise UserError(f"{where}: {row.run!r} was made with other settings: {'; '.join(changes)}; {advice}")
        rows[row.key] = row
    return rows


def _changes(row: Row, run: Run) -> list[str]:
    pairs = {"levels": (row.levels, run.levels), "seed": (row.seed, run.seed)}
    own = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in pairs.items() if old != new]
    return own + differences(row.settings.model_dump(mode="json"), run.config, changeable=())
