"""The folder of a run: who may write there, where it starts from, and every path in it."""

import json
import math
import os
import shutil
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any

import yaml

from vit5gen.config import Config, ModelConfig, as_recorded, read_yaml, recorded_values
from vit5gen.data.latents import find_class_names
from vit5gen.generation.card import REPORT, TrainingFacts, names_only
from vit5gen.generation.find_pipeline import PIPELINE
from vit5gen.report.small_pictures import FOLDER as PICTURES
from vit5gen.section import Section, validate
from vit5gen.system.errors import UserError, short
from vit5gen.system.files import locked_file, read_json, write_json, write_text
from vit5gen.training import checkpoint
from vit5gen.training.build import settle_auto

# Sections and keys that may differ when a run is resumed: they change what is kept and shown, not what is computed.
_HOW_FAR = {"training.num_steps", "training.max_nonfinite_steps"}
_WITH_WHAT = {"data.num_workers", "data.latents", "training.micro_batch_size", "training.gradient_checkpointing"}
_KEPT = {"training.checkpoint_every", "training.checkpoint_minutes", "training.keep_last", "training.keep_every"}
_KEPT |= {"training.ema_snapshot_every"}
_SHOWN = {"evaluation", "sampling", "training.log_every", "training.trackers"}
# Keys that are recorded where they are set: a checkpoint of a run without them has the bytes it had before them.
_RECORDED_IF_SET = {"optimizer_kwargs", "ema_lengths", "ema_snapshot_every"}
SNAPSHOTS = 64  # of averages: lengths of 0.022 to 0.24 can then be rebuilt from those of 0.05 and 0.10
FindClasses = Callable[[Config], list[str] | None]
CHANGEABLE = _HOW_FAR | _WITH_WHAT | _KEPT | _SHOWN


def to_yaml(config: Section) -> str:
    """Return the resolved configuration as YAML."""
    values = config.model_dump(mode="json")
    training = values.get("training", {})
    for key in _RECORDED_IF_SET - {key for key, value in training.items() if value}:
        training.pop(key, None)
    return yaml.safe_dump(values, sort_keys=False)


def differences(old: dict[str, Any], config: Config, changeable: Collection[str] = CHANGEABLE) -> list[str]:
    """List ``section.key: old -> new`` for every key that is not ``changeable``."""
    old, new = recorded_values(old), as_recorded(config, old).model_dump(mode="json")
    return [
        f"{section}.{key}: {old[section].get(key)!r} -> {value!r}"
        for section, values in new.items()
        for key, value in values.items()
        if not {section, f"{section}.{key}"} & set(changeable) and old[section].get(key) != value
    ]


def settle(config: Config, find: FindClasses = find_class_names) -> Config:
    """Return the configuration with what is fixed when a run begins, in which every key counts as given."""
    values = config.model_dump()
    if values["training"]["checkpoint_every"] is None:
        values["training"]["checkpoint_every"] = max(1, min(10_000, math.ceil(config.training.num_steps / 4)))
    every = values["training"]["ema_snapshot_every"] or max(1, math.ceil(config.training.num_steps / SNAPSHOTS))
    values["training"]["ema_snapshot_every"] = every if config.training.ema_lengths else None
    if values["data"]["num_classes"] is None:
        names = find(config)
        values["data"]["num_classes"] = None if names is None else len(names)
    return validate(Config, values, "configuration")


def keep_origin(config: Config, recorded: dict[str, Any]) -> Config:
    """Return ``config`` with what its `training.init_from` settled when the run of the ``recorded`` one began."""
    model, before = config.model.model_dump(exclude_unset=True), recorded_values(recorded)
    if config.training.init_from is None or before["training"]["init_from"] is None:
        return config
    switches = before["model"]["backbone_kwargs"] | model.get("backbone_kwargs", {})
    digest = {"init_digest": config.training.init_digest or before["training"]["init_digest"]}
    changed = {
        "model": validate(ModelConfig, before["model"] | model | {"backbone_kwargs": switches}, "configuration"),
        "training": config.training.model_copy(update=digest),
    }
    return config.model_copy(update=changed)


def _accept(start: Path, fault: str, changes: list[str], accept_changes: bool) -> None:
    """Refuse to resume ``start`` under changed conditions unless the user accepts that; some always."""
    if any(change.startswith(("classes ", "data.num_classes:", "training.optimizer:")) for change in changes):
        reasons = "its label table is of its classes, and its moments are of its optimizer"
        found = f"{start} {fault}: {'; '.join(changes)}; {reasons}"
        raise UserError(f"{found}. Restore them, or begin a new run with --training.init_from {start}")
    if changes and not accept_changes:
        advice = "Restore the recorded values, choose another --output, or add --accept-changes to resume with the new"
        raise UserError(f"{start} {fault}: {'; '.join(changes)}. {advice}")
    for change in changes:
        print(f"note: resuming with {change}", flush=True)


def check_data(start: Path | None, accept_changes: bool, data: dict[str, Any]) -> None:
    """Refuse to resume ``start`` with other data, by `latents.identity`, unless the user accepts that.

    Only what both sides know is compared; a checkpoint of an earlier version has not recorded its data.
    """
    if start is not None:
        recorded = checkpoint.read_state(start).get("data", {})
        known = [key for key, value in data.items() if value is not None and recorded.get(key) is not None]
        changes = [f"{key} {_change(key, recorded[key], data[key])}" for key in known if recorded[key] != data[key]]
        _accept(start, "was made with other data", changes, accept_changes)


def _change(key: str, old: Any, new: Any) -> str:
    if key == "classes":
        removed, added = [name for name in old if name not in new], [name for name in new if name not in old]
        sides = (("removed", removed), ("added", added))
        return ", ".join(f"{what} {short(names)}" for what, names in sides if names) or "in another order"
    other = {"digest": "of other files or contents", "autoencoder": "of other weights or scale"}
    return other.get(key, f"{old} -> {new}")


def run_facts(
    run: "RunFolder", config: Config, evaluation: dict[str, Any], command: str | None = None
) -> TrainingFacts:
    """Return what the model card of a run tells beyond the configuration of its pipeline."""
    data = config.data
    on_hub = data.source == "huggingface" and data.path is not None and not Path(data.path).exists()
    name = names_only(str(data.path or data.latents or data.source))
    return TrainingFacts(
        command=command,
        figures=evaluation,
        picture=run.samples if run.samples.is_file() else None,
        origin=config.training.origin,
        dataset=name if on_hub else Path(name).name,
        on_hub=on_hub,
        num_images=read_json(run.data, "data").get("samples") if run.data.is_file() else None,
        sampling=config.sampling,
    )


class RunFolder:
    """The folder of a run: every path in it, its lock, its configuration, its log and its evaluations."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.checkpoints, self.nonfinite = self.path / "checkpoints", self.path / "nonfinite"
        self.averages = self.path / "averages"  # snapshots of them
        self.config, self.data = self.path / checkpoint.CONFIG, self.path / "data.json"
        self.log, self.metrics = self.path / "log.jsonl", self.path / "metrics.json"
        self.samples, self.loss_curve = self.path / "samples.png", self.path / "loss.png"
        self.report, self.pictures = self.path / REPORT, self.path / PICTURES
        self.changes: list[str] = []  # keys that differ from those of the checkpoint that is resumed
        self.pipeline, self._pipeline_before = self.path / PIPELINE, self.path / f".{PIPELINE}.old"

    def __str__(self) -> str:
        return str(self.path)

    @contextmanager
    def locked(
        self, marks: Sequence[str] = ("checkpoints", "metrics.json"), write: bool = True, wait: bool = False
    ) -> Iterator[None]:
        """Hold the kernel's lock on the folder, which is gone when this process is; make the folder if need be.

        marks: patterns of files by which a run that has begun is known. Bad input that shows before leaves no new
        folder behind. write: False makes nothing, and locks where there is a lock. wait: for a process that has the
        lock. Raises `UserError` when another process trains in this folder, it has other files, or it cannot be
        written or locked.
        """
        # Only a new or empty folder, or that of a run.
        folder, lock, existed = self.path, self.path / ".lock", self.path.exists()

        def begun() -> bool:
            return any(found for pattern in marks for found in folder.glob(pattern))

        of_a_run = lock.exists() or begun()  # copies often lack hidden files
        if existed and not of_a_run and (not folder.is_dir() or any(folder.iterdir())):
            advice = "choose a new folder or the folder of an earlier run"
            raise UserError(f"--output {folder}: contains files that are not a run; {advice}")

        # The lock, and in the end no trace of a run that could not begin.
        with ExitStack() as stack:
            try:
                if write:
                    folder.mkdir(parents=True, exist_ok=True)
                if write or lock.exists():
                    stack.enter_context(locked_file(lock, wait))
            except BlockingIOError:
                advice = "another process is training in this folder; wait for it or choose another folder"
                raise UserError(f"--output {folder}: {advice}") from None
            except OSError as error:
                advice = "choose a writable folder on a file system that supports locks"
                raise UserError(f"--output {folder}: {error.strerror}; {advice}") from error
            try:
                yield
            except UserError:
                if write and not existed and not begun():
                    shutil.rmtree(folder, ignore_errors=True)
                raise

    def find_start(
        self,
        config: Config,
        resume: str,
        accept_changes: bool,
        find: FindClasses = find_class_names,
        begin: Callable[[Config], Config] = lambda config: config,
    ) -> tuple[Path | None, Config]:
        """Settle where a run starts and by which values; return the checkpoint to resume, if any, and these values.

        find: the classes of the data, where the configuration does not say how many.  begin: adds to the configuration
        of a new run what its `training.init_from` settles; a resumed run has it recorded.
        Raises `UserError` when the folder holds another run, or the checkpoint does not fit the configuration.
        """
        start, last = None, config.training.num_steps
        if resume in ("auto", "latest"):
            start = checkpoint.newest_valid(self.checkpoints)
        elif resume != "never":
            # A run, or its checkpoints, stands for the newest; a file for the checkpoint that it is in.
            folder = Path(resume).parent if Path(resume).is_file() else Path(resume)
            start = checkpoint.newest_valid(folder / "checkpoints") or checkpoint.newest_valid(folder)
            fault = "" if start else checkpoint.find_damage(folder) if folder.exists() else "no such file or folder"
            start = start or folder
            if fault:
                expected = "expected auto, latest, never, RUN, or RUN/checkpoints/step_00000010, undamaged"
                advice = f"to begin a new run with other weights, set --training.init_from {resume}"
                raise UserError(f"--resume {resume}: {fault}; {expected}; {advice}")
        elif checkpoint.steps(self.checkpoints):
            raise UserError(f"--output {self}: contains a run; choose a new folder, or --resume auto to resume it")
        recorded = {} if start is None else checkpoint.read_config(start)
        config = settle_auto(begin(config) if start is None else keep_origin(config, recorded), recorded)
        if start is not None:
            _accept(start, "was made with another configuration", differences(recorded, config), accept_changes)
            config = as_recorded(config, recorded)
            if (step := checkpoint.read_state(start)["step"]) > last:
                raise UserError(f"{start} is past training.num_steps = {last}; set that to {step} or more")
        config = settle(config, find)
        self.changes = [] if start is None else differences(recorded, config, changeable=())
        return start, config

    def record(self, config: Config, step: int, data: dict[str, Any]) -> None:
        """Write configuration and data of a run that starts from ``step``, now that all of its input has proved to fit.

        Log lines and snapshots after that step are removed: those steps will be computed again.
        """
        try:
            changed = read_json(self.data, "data") != data or bool(differences(read_yaml(self.config), config))
        except (UserError, AttributeError, TypeError):  # absent, as in an earlier version, or damaged
            changed = True
        if step == 0 and changed:  # killed before its first checkpoint, all that it left is another run's
            step = -1
        if self.log.exists():
            kept = [line for line in self.lines() if line["step"] <= step]
            write_text(self.log, "".join(json.dumps(line) + "\n" for line in kept))
        if self.metrics.exists():
            kept = [entry for entry in self.evaluations() if entry["step"] <= step]
            write_json(self.metrics, {"evaluations": kept})
        for snapshot in checkpoint.steps(self.averages):
            if int(snapshot.name[5:]) > step:
                shutil.rmtree(snapshot)
        write_text(self.config, to_yaml(config))
        write_json(self.data, data)

    def finished(self, config: Config, start: Path | None) -> bool:
        """Tell whether the run has its last checkpoint and its last evaluation, after which nothing is left to do."""
        last = config.training.num_steps
        return start == self.checkpoints / checkpoint.step_name(last) and self.evaluated(last)

    def saved_steps(self) -> list[int]:
        """Return the steps of the checkpoints, oldest first."""
        return [int(path.name.removeprefix("step_")) for path in checkpoint.steps(self.checkpoints)]

    def lines(self) -> list[dict[str, Any]]:
        """Return the lines of the log; those that a kill cut short or a disk damaged are left out."""
        text = self.log.read_text(encoding="utf-8", errors="replace") if self.log.exists() else ""
        lines: list[Any] = []
        for line in text.split("\n")[:-1]:
            with suppress(ValueError, RecursionError):
                lines.append(json.loads(line))
        return [line for line in lines if isinstance(line, dict) and isinstance(line.get("step"), int)]

    def add_line(self, line: dict[str, Any]) -> None:
        """Add a line to the log."""
        with self.log.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def evaluations(self) -> list[dict[str, Any]]:
        """Return the entries; raise `UserError` when they cannot be read: only evaluations can give them again."""
        if not self.metrics.exists():
            return []
        content = read_json(self.metrics, "metrics")
        try:
            return [entry for entry in content["evaluations"] if entry["step"] >= 0]
        except (KeyError, TypeError) as error:
            raise UserError(f"metrics {self.metrics}: not a list of evaluations; restore or remove the file") from error

    def evaluated(self, step: int) -> bool:
        """Tell whether there is an evaluation of this step."""
        return any(entry["step"] == step for entry in self.evaluations())

    def add_evaluation(self, entry: dict[str, Any]) -> None:
        """Add an evaluation, in place of an earlier one of its step."""
        others = [old for old in self.evaluations() if old["step"] != entry["step"]]
        write_json(self.metrics, {"evaluations": [*others, entry]})

    @contextmanager
    def new_pipeline(self) -> Iterator[Path]:
        """Yield a folder that takes the place of ``pipeline/`` in the end."""
        new = self.path / f".{PIPELINE}.new"
        for left in (new, self._pipeline_before):
            shutil.rmtree(left, ignore_errors=True)
        yield new
        if self.pipeline.exists():
            os.replace(self.pipeline, self._pipeline_before)
        os.replace(new, self.pipeline)
        shutil.rmtree(self._pipeline_before, ignore_errors=True)

    def repair_pipeline(self) -> None:
        """Put the former ``pipeline/`` back where a kill came between the two."""
        if self._pipeline_before.exists() and not self.pipeline.exists():
            os.replace(self._pipeline_before, self.pipeline)
