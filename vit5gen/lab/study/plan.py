"""A study's file, the runs that it asks for, and the row that is kept of each finished one."""

import itertools
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field, field_validator

from vit5gen.config import Config, find_config, load_config, read_yaml, recorded_values
from vit5gen.data.autoencoders.find_autoencoder import find_sizes
from vit5gen.section import Natural, Section, validate
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


@dataclass(frozen=True)
class Run:
    """One run of a study: its level on each axis, its seed, and the configuration that they give."""

    levels: dict[str, str]
    seed: int
    config: Config

    @property
    def name(self) -> str:
        """Name of the run and of its folder: its levels and its seed."""
        return ", ".join([*self.levels.values(), f"seed {self.seed}"])


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
    for axis, level in study.baseline.items():
        choose(f"study {path}: baseline {axis}", level, study.grid[choose(f"study {path}: axis", axis, study.grid)])

    # The cells, whose names become folders and rows of tables.
    names = [", ".join(levels) for levels in itertools.product(*study.grid.values())]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"study {path}: two cells are called {min(twice)!r}; rename a level")
    cells = {levels: _config(path, study, levels) for levels in itertools.product(*study.grid.values())}
    if len(extractors := {str(config.evaluation.extractor) for config in cells.values()}) > 1:
        raise UserError(f"study {path}: evaluation.extractor is {' and '.join(sorted(extractors))}; use one for all")

    # Every cell from every seed.
    return study, [
        Run(dict(zip(study.grid, levels, strict=True)), seed, config.model_copy(update={"training": training}))
        for seed in study.seeds
        for levels, config in cells.items()
        for training in [config.training.model_copy(update={"seed": seed})]
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

    # The run that they give, checked as training would.
    try:
        config = find_sizes(load_config(find_config(path).parent / study.base, overrides))
        check_values(config)
        if config.training.num_steps == 0:
            raise UserError("training.num_steps = 0; expected at least 1")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return config


class Row(Section):
    """A finished run: what it was, what it cost, and how good it is."""

    run: str
    levels: dict[str, str]
    seed: Natural
    commit: str  # of the code when the run was last started
    steps: Natural
    parameters: Natural
    training_flops: int
    loss: float | None  # mean since the line of the log before, None if no step was finite
    held_out_loss: float
    metric: str
    distance: float
    floor: float
    n: Natural
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


def read_rows(file: Path, runs: list[Run]) -> dict[str, Row]:
    """Return the rows by the name of their run, those of no run of this study among them.

    Raises `UserError` for a row that is broken, stands twice, or was made with other settings.
    """
    by_name, rows = {run.name: run for run in runs}, {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines, start=1):
        where = f"{file} line {number}"
        try:
            row = validate(Row, json.loads(line), where)
        except ValueError as error:
            reason = str(error).removeprefix(f"{where}: ")
            advice = "restore it, or delete the line to do the run again"
            raise UserError(f"{where}: unreadable row ({reason}); {advice}") from None
        if row.run in rows:
            raise UserError(f"{where}: a second row of {row.run!r}; delete one of them")
        if row.run not in by_name:
            print(f"note: {where}: {row.run!r} is not a run of this study; ignored", flush=True)
        elif changes := _changes(row, by_name[row.run]):
            advice = "restore the settings, or choose another --output"
            raise UserError(f"{where}: {row.run!r} was made with other settings: {'; '.join(changes)}; {advice}")
        rows[row.run] = row
    return rows


def _changes(row: Row, run: Run) -> list[str]:
    pairs = {"levels": (row.levels, run.levels), "seed": (row.seed, run.seed)}
    own = [f"{name}: {old!r} -> {new!r}" for name, (old, new) in pairs.items() if old != new]
    return own + differences(row.settings.model_dump(mode="json"), run.config, changeable=())
