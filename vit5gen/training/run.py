"""The folder of a run: its lock, its configuration and its log."""

import fcntl
import json
import os
import shutil
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import yaml

from vit5gen.config import Config, read_yaml
from vit5gen.errors import UserError
from vit5gen.files import read_json, write_json, write_text
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
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / ".lock").open("ab")
    except OSError as error:
        raise UserError(f"--output {folder}: {error.strerror}; choose a folder that can be written") from error
    # A forked child (a data worker) would hold the lock beyond the trainer's death.
    os.register_at_fork(after_in_child=lock.close)
    with lock:
        _flock(lock, folder)
        try:
            yield
        except UserError:
            if not existed and not begun():
                shutil.rmtree(folder)
            raise


def _flock(lock: IO[bytes], folder: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise UserError(
            f"--output {folder}: another process trains there; wait for it or choose another folder"
        ) from None
    except OSError as error:
        raise UserError(
            f"--output {folder}: cannot be locked ({error.strerror}); choose a file system with flock"
        ) from error


def to_yaml(config: Config) -> str:
    """Return the resolved configuration as YAML."""
    return yaml.safe_dump(config.model_dump(mode="json"), sort_keys=False)


def differences(old: dict[str, Any], config: Config, free: Collection[str] = FREE) -> list[str]:
    """List ``section.key: old -> new`` for every key that is not free to change, as those that show and keep are."""
    new = config.model_dump(mode="json")
    return [
        f"{section}.{key}: {old.get(section, {}).get(key)!r} -> {value!r}"
        for section, values in new.items()
        for key, value in values.items()
        if not {section, f"{section}.{key}"} & set(free) and old.get(section, {}).get(key) != value
    ]


def check_same(checkpoint: Path, config: Config, accept_changes: bool) -> None:
    """Refuse to resume ``checkpoint`` under another configuration unless the user accepts that."""
    changes = differences(read_yaml(checkpoint / "config.yaml"), config)
    if changes and not accept_changes:
        raise UserError(
            f"{checkpoint} was made by another configuration: {'; '.join(changes)}. "
            "Restore these values, choose another --output, or add --accept-changes to go on with the new ones"
        )
    for change in changes:
        print(f"note: going on with {change}", flush=True)


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


def find_start(config: Config, output: Path, resume: str, accept_changes: bool) -> Path | None:
    """Settle where a run starts; return the checkpoint to resume, if any.

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
        check_same(start, config, accept_changes)
        step = checkpoint.read_state(start)["step"]
        if step > config.training.num_steps:
            raise UserError(
                f"{start} is beyond training.num_steps = {config.training.num_steps}; ask for {step} or more"
            )
    return start


def begin(config: Config, output: Path, step: int) -> None:
    """Write the configuration of a run that goes on from ``step``, now that all of its input has proved to fit."""
    file = output / "config.yaml"
    try:
        other = step == 0 and file.exists() and bool(differences(read_yaml(file), config))
    except (UserError, AttributeError):  # damaged
        other = True
    Log(output).rewind(-1 if other else step)  # killed before its first checkpoint, all that it left is another's
    write_text(file, to_yaml(config))


def finished(config: Config, output: Path, start: Path | None) -> bool:
    """Tell whether the run has its last checkpoint and its last evaluation, after which nothing is left to do."""
    last = config.training.num_steps
    done = start is not None and start.parent == output / "checkpoints" and start.name == checkpoint.step_name(last)
    return done and last in {entry["step"] for entry in Log(output).evaluations()}
