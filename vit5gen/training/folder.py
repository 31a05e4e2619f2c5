"""The folder of a run: its lock, its configuration and its log."""

import json
import math
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import yaml

from vit5gen.config import Config, as_recorded, read_yaml, recorded_values, validate
from vit5gen.system.errors import UserError, short
from vit5gen.system.files import locked_file, read_json, write_json, write_text
from vit5gen.training import checkpoint

# Sections and keys that may differ when a run goes on: they change what is kept and shown, not what is computed.
FREE = {
    "evaluation",
    "sampling",
    "data.num_workers",
    "data.latents",
    "training.num_steps",
    "training.micro_batch_size",
    "training.gradient_checkpointing",
    "training.checkpoint_every",
    "training.checkpoint_minutes",
    "training.keep_last",
    "training.keep_every",
    "training.log_every",
    "training.trackers",
    "training.max_nonfinite_steps",
}


@contextmanager
def locked(folder: Path, marks: Sequence[str] = ("checkpoints", "metrics.json")) -> Iterator[None]:
    """Hold the kernel's lock on a run, which is gone when this process is; make the folder if need be.

    marks: patterns of files that tell a run that has begun. Bad input that shows before leaves no new folder behind.
    Raises `UserError` when another process trains in this folder, it holds other files, or cannot be written or locked.
    """

    def begun() -> bool:
        return any(found for pattern in marks for found in folder.glob(pattern))

    existed = folder.exists()
    of_a_run = (folder / ".lock").exists() or begun()  # copies often lack hidden files
    if existed and not of_a_run and (not folder.is_dir() or any(folder.iterdir())):
        raise UserError(f"--output {folder}: holds other files; choose a new folder or that of an earlier run")
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            stack.enter_context(locked_file(folder / ".lock", wait=False))
        except BlockingIOError:
            raise UserError(
                f"--output {folder}: another process trains there; wait for it or choose another folder"
            ) from None
        except OSError as error:
            raise UserError(
                f"--output {folder}: {error.strerror}; choose a folder that can be written, on a file system with locks"
            ) from error
        try:
            yield
        except UserError:
            if not existed and not begun():
                shutil.rmtree(folder, ignore_errors=True)
            raise


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: dict[str, Any], config: Config, free: Collection[str] = FREE) -> list[str]:
    """List ``section.key: old -> new`` for every key that is not free to change, as those that show and keep are."""
    old, new = recorded_values(old), as_recorded(config, old).model_dump(mode="json")
    return [
        f"{section}.{key}: {old[section].get(key)!r} -> {value!r}"
        for section, values in new.items()
        for key, value in values.items()
        if not {section, f"{section}.{key}"} & set(free) and old[section].get(key) != value
    ]


def _accept(start: Path, fault: str, changes: list[str], accept_changes: bool) -> None:
    """Refuse to resume ``start`` under changed conditions unless the user accepts that."""
    if changes and not accept_changes:
        raise UserError(
            f"{start} {fault}: {'; '.join(changes)}. "
            "Restore what it had, choose another --output, or add --accept-changes to resume with what there is now"
        )
    for change in changes:
        print(f"note: going on with {change}", flush=True)


def check_data(start: Path | None, accept_changes: bool, data: dict[str, Any]) -> None:
    """Refuse to resume ``start`` with other data, which `latents.identity` tells, unless the user accepts that.

    What only one side knows is not compared; a checkpoint of an earlier version has not recorded its data.
    """
    if start is not None:
        recorded = checkpoint.read_state(start).get("data", {})
        known = [key for key, value in data.items() if value is not None and recorded.get(key) is not None]
        changes = [f"{key} {_change(key, recorded[key], data[key])}" for key in known if recorded[key] != data[key]]
        _accept(start, "was made by other data", changes, accept_changes)


def _change(key: str, old: Any, new: Any) -> str:
    if key == "classes":
        removed, added = [name for name in old if name not in new], [name for name in new if name not in old]
        sides = (("removed", removed), ("added", added))
        return ", ".join(f"{what} {short(names)}" for what, names in sides if names) or "in another order"
    other = {"digest": "of other files or contents", "autoencoder": "of other weights or scale"}
    return other.get(key, f"{old} -> {new}")


class Log:
    """``log.jsonl`` (a line per ``log_every`` steps) and ``metrics.json`` (an entry per evaluation) of a run."""

    def __init__(self, folder: Path) -> None:
        self.lines = folder / "log.jsonl"
        self.metrics = folder / "metrics.json"

    def rewind(self, step: int) -> None:
        """Forget what was logged after ``step``: it will be computed again."""
        if self.lines.exists():
            kept = [line for line in self.read() if line["step"] <= step]
            write_text(self.lines, "".join(json.dumps(line) + "\n" for line in kept))
        if self.metrics.exists():
            write_json(self.metrics, {"evaluations": [entry for entry in self.evaluations() if entry["step"] <= step]})

    def write(self, line: dict[str, Any]) -> None:
        with self.lines.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, Any]]:
        """Return the lines; those that a kill cut short or a disk damaged are left out."""
        text = self.lines.read_text(encoding="utf-8", errors="replace") if self.lines.exists() else ""
        return [
            line
            for line in map(_parsed, text.split("\n")[:-1])
            if isinstance(line, dict) and isinstance(line.get("step"), int)
        ]

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the entries; raise `UserError` when they cannot be read: only evaluations can give them again."""
        if not self.metrics.exists():
            return []
        content = read_json(self.metrics, "metrics")
        try:
            return [entry for entry in content["evaluations"] if entry["step"] >= 0]
        except (KeyError, TypeError) as error:
            raise UserError(f"metrics {self.metrics}: no list of evaluations; restore or remove the file") from error

    def add_evaluation(self, entry: dict[str, Any]) -> None:
        others = [old for old in self.evaluations() if old["step"] != entry["step"]]
        write_json(self.metrics, {"evaluations": [*others, entry]})


def _parsed(line: str) -> Any:
    try:
        return json.loads(line)
    except (ValueError, RecursionError):
        return None


def find_start(config: Config, output: Path, resume: str, accept_changes: bool) -> tuple[Path | None, Config]:
    """Settle where a run starts and by which values; return the checkpoint to resume, if any, and the configuration.

    Raises `UserError` when the folder holds another run, or the checkpoint does not fit the configuration.
    """
    checkpoints = output / "checkpoints"
    if resume == "auto":
        start = checkpoint.newest_valid(checkpoints)
    elif resume == "never":
        if checkpoint.steps(checkpoints):
            raise UserError(f"--output {output}: holds a run; choose a new folder, or --resume auto to go on with it")
        start = None
    else:
        start = Path(resume)
        if fault := checkpoint.problem(start):
            raise UserError(
                f"--resume {start}: {fault}; expected a valid checkpoint such as RUN/checkpoints/step_00000010"
            )
    if start is not None:
        recorded = read_yaml(start / "config.yaml")
        _accept(start, "was made by another configuration", differences(recorded, config), accept_changes)
        config = as_recorded(config, recorded)
        step = checkpoint.read_state(start)["step"]
        if step > config.training.num_steps:
            raise UserError(
                f"{start} is beyond training.num_steps = {config.training.num_steps}; ask for {step} or more"
            )
    values = config.model_dump()
    if values["training"]["checkpoint_every"] is None:
        values["training"]["checkpoint_every"] = max(1, min(10_000, math.ceil(config.training.num_steps / 4)))
    return start, validate(Config, values, "configuration")  # in which every key counts as given


def begin(config: Config, output: Path, step: int, data: dict[str, Any]) -> None:
    """Write configuration and data of a run that resumes from ``step``, now that all of its input has proved to fit."""
    file, data_file = output / "config.yaml", output / "data.json"
    try:
        other = step == 0 and (read_json(data_file, "data") != data or bool(differences(read_yaml(file), config)))
    except (UserError, AttributeError, TypeError):  # absent, as in an earlier version, or damaged
        other = True
    Log(output).rewind(-1 if other else step)  # killed before its first checkpoint, all that it left is another's
    write_text(file, to_yaml(config))
    write_json(data_file, data)


def finished(config: Config, output: Path, start: Path | None) -> bool:
    """Tell whether the run has its last checkpoint and its last evaluation, after which nothing is left to do."""
    last = config.training.num_steps
    done = start is not None and start.parent == output / "checkpoints" and start.name == checkpoint.step_name(last)
    return done and last in {entry["step"] for entry in Log(output).evaluations()}
