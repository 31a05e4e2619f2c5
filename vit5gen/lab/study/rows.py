"""The rows of a study: what is kept of each finished run, and the file that holds them."""

import json
from pathlib import Path
from typing import Any

from pydantic import field_validator

from vit5gen.config import Config, Natural, Section, recorded_values, validate
from vit5gen.lab.study.plan import Run
from vit5gen.system.errors import UserError
from vit5gen.system.files import write_text
from vit5gen.training.folder import differences


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

    Raises `UserError` for a row that is broken, stands twice, or was made by other settings.
    """
    by_name, rows = {run.name: run for run in runs}, {}
    lines = file.read_text(encoding="utf-8", errors="replace").splitlines() if file.exists() else []
    for number, line in enumerate(lines, start=1):
        where = f"{file} line {number}"
        try:
            row = validate(Row, json.loads(line), where)
        except ValueError as error:
            reason = str(error).removeprefix(f"{where}: ")
            raise UserError(
                f"{where}: unreadable row ({reason}); restore it, or delete the line to do the run again"
            ) from None
        if row.run in rows:
            raise UserError(f"{where}: a second row of {row.run!r}; delete one")
        if row.run not in by_name:
            print(f"note: {where}: {row.run!r} is no run of this study; left out", flush=True)
        elif changes := _changes(row, by_name[row.run]):
            raise UserError(
                f"{where}: {row.run!r} was made by other settings: {'; '.join(changes)}; restore them, or choose "
                "another --output"
            )
        rows[row.run] = row
    return rows


def _changes(row: Row, run: Run) -> list[str]:
    own = [
        f"{name}: {old!r} -> {new!r}"
        for name, old, new in (("levels", row.levels, run.levels), ("seed", row.seed, run.seed))
        if old != new
    ]
    return own + differences(row.settings.model_dump(mode="json"), run.config, changeable=())


def write_rows(file: Path, rows: list[Row]) -> None:
    """Replace the file of rows."""
    write_text(file, "".join(json.dumps(row.model_dump(mode="json")) + "\n" for row in rows))
