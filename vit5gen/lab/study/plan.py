"""A study's file, and the runs that it asks for."""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import Field

from vit5gen.config import Config, Natural, Section, find_config, load_config, read_yaml, validate
from vit5gen.system.errors import UserError, choose
from vit5gen.training.build import check_values
from vit5gen.training.process import batch_sizes


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

    Raises `UserError` for a key that does not exist, a value that does not fit, or a baseline that is no level.
    """
    study = validate(StudyConfig, read_yaml(path), f"study {path}")
    if not study.grid or not all(study.grid.values()):
        raise UserError(f"study {path}: grid needs an axis, and every axis a level; add them")
    if len(set(study.seeds)) < len(study.seeds):
        raise UserError(f"study {path}: seeds {study.seeds} name a seed twice; list each once")
    for axis, level in study.baseline.items():
        choose(f"study {path}: baseline {axis}", level, study.grid[choose(f"study {path}: axis", axis, study.grid)])
    names = [", ".join(levels) for levels in itertools.product(*study.grid.values())]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"study {path}: two cells are called {min(twice)!r}; rename a level")
    cells = {levels: _config(path, study, levels) for levels in itertools.product(*study.grid.values())}
    if len(extractors := {config.evaluation.extractor for config in cells.values()}) > 1:
        raise UserError(f"study {path}: evaluation.extractor is {' and '.join(sorted(extractors))}; compare by one")
    return study, [
        Run(dict(zip(study.grid, levels, strict=True)), seed, _seeded(config, seed))
        for seed in study.seeds
        for levels, config in cells.items()
    ]


def _config(path: str | Path, study: StudyConfig, levels: tuple[str, ...]) -> Config:
    overrides, where = dict(study.overrides), f"study {path}: grid {' / '.join(levels)}"
    if bad := [level for level in levels if not level.isprintable() or set(level) & set("/|") or level[:1] in "."]:
        raise UserError(
            f"{where}: level {bad[0]!r} names folders and rows of tables; leave out '/', '|', a leading dot"
        )
    for axis, level in zip(study.grid, levels, strict=True):
        for key, value in study.grid[axis][level].items():
            if key in overrides.keys() - study.overrides.keys():
                raise UserError(f"{where}: {key} is set by two axes; set it in one")
            overrides[key] = value
    if "training.seed" in overrides:
        raise UserError(f"{where}: sets training.seed; expected under seeds of the study, move it there")
    try:
        config = load_config(find_config(path).parent / study.base, overrides)
        check_values(config)
        batch_sizes(config.training, num_processes=1)
        if config.training.num_steps == 0:
            raise UserError("training.num_steps = 0; expected at least 1")
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    return config


def _seeded(config: Config, seed: int) -> Config:
    return config.model_copy(update={"training": config.training.model_copy(update={"seed": seed})})
