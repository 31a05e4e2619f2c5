"""Checkpoints that are whole or absent: ``RUN/checkpoints/step_00000010/``.

A checkpoint holds what `Trainer` collects as safetensors of whole (unsharded) tensors, so that any number of
processes, DDP or FSDP, resumes it; ``state.json`` (step, counters, versions), ``config.yaml`` and, last, the checksums
of all of them.
"""

import json
import os
import shutil
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor

from vit5gen.config import read_yaml
from vit5gen.generation.card import versions
from vit5gen.system.errors import UserError
from vit5gen.system.files import read_json, sha256, write_json

CONFIG = "config.yaml"
_CHECKSUMS = "checksums.json"


def gather_shards(value: Tensor) -> Tensor:
    """Return a tensor gathered from all shards (a collective under FSDP); a plain one as it is."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, example: Tensor) -> Tensor:
    """Return a whole tensor on the device of ``example``, cut into shards where that is."""
    value = value.to(example.device)
    if isinstance(example, DTensor):
        return distribute_tensor(value, example.device_mesh, example.placements)
    return value


@torch.no_grad()
def fill(targets: Iterable[tuple[str, Tensor]], folder: Path, file: str, frozen: Collection[str] = ()) -> None:
    """Copy one file of a checkpoint into tensors by name, sharding it as they are.

    frozen: what the file may hold besides: earlier versions also averaged parameters that are not trained.
    Raises `UserError` when the file is absent, or names or shapes differ.
    """
    where, saved = f"checkpoint {folder}: {file}", load_tensors(folder, file)
    for name, value in targets:
        tensor = saved.pop(name, None)
        if tensor is None or tensor.shape != value.shape:
            raise UserError(f"{where} has no {name!r} of shape {list(value.shape)}; resume with the same model")
        value.copy_(shard_like(tensor, value))
    if unknown := saved.keys() - frozen:
        raise UserError(f"{where} has {min(unknown)!r}, which this model lacks; resume with the same model")


def load_tensors(folder: Path, name: str) -> dict[str, Tensor]:
    """Read one file of a checkpoint; raise `UserError` when the checkpoint lacks it."""
    path = folder / f"{name}.safetensors"
    if not path.is_file():
        advice = "restore the settings, or begin a new run with --training.init_from"
        raise UserError(f"checkpoint {folder} has no {name!r}: averages and objectives cannot begin in a run; {advice}")
    return safetensors.torch.load_file(path)


def save(
    folder: Path, step: int, tensors: dict[str, dict[str, Tensor]], state: dict[str, Any], config: str | None = None
) -> None:
    """Write ``folder/step_%08d`` so that it appears whole; an older checkpoint is untouched when this fails."""
    target = folder / step_name(step)
    temporary = folder / f".{target.name}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        for name, values in tensors.items():
            contiguous = {key: value.contiguous() for key, value in values.items()}
            safetensors.torch.save_file(contiguous, temporary / f"{name}.safetensors")
        write_json(temporary / "state.json", {"step": step, **state, "versions": versions()})
        if config is not None:
            (temporary / CONFIG).write_text(config, encoding="utf-8")
        files = sorted(temporary.iterdir())
        write_json(temporary / _CHECKSUMS, {file.name: sha256(file) for file in files})
        for file in files:
            shutil.copymode(temporary / "state.json", file)  # safetensors writes for the owner alone
        for file in [*files, temporary]:
            _fsync(file)
        # What stands there is broken, or later than the checkpoint that the user chose to resume.
        shutil.rmtree(target, ignore_errors=True)
        os.replace(temporary, target)
        _fsync(folder)
    except (OSError, SafetensorError):
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _fsync(path: Path) -> None:
    if os.name == "nt" and path.is_dir():  # Windows opens no folders
        return
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def find_damage(folder: Path) -> str | None:
    """Return what is wrong with a checkpoint (missing, truncated or altered files), or None when it is valid."""
    try:
        checksums = json.loads((folder / _CHECKSUMS).read_text(encoding="utf-8"))
        for name, checksum in checksums.items():
            if sha256(folder / name) != checksum:
                return f"{name} is damaged"
    except OSError as error:
        # A failing disk names no file.
        return f"{Path(error.filename).name} is missing" if error.filename else f"cannot be read ({error.strerror})"
    except (ValueError, AttributeError, RecursionError):
        return f"{_CHECKSUMS} is damaged"
    return None if checksums else f"{_CHECKSUMS} is damaged"


def step_name(step: int) -> str:
    """Return the folder name of a checkpoint."""
    return f"step_{step:08d}"


def steps(folder: Path) -> list[Path]:
    """Return the checkpoints of a run, oldest first, valid or not."""
    return sorted(path for path in folder.glob("step_*") if path.name[5:].isdigit())


def newest_valid(folder: Path) -> Path | None:
    """Return the newest valid checkpoint, None when there is none at all; report each damaged one skipped.

    Raises:
        UserError: there are checkpoints but none is valid.
    """
    found = steps(folder)
    for path in reversed(found):
        fault = find_damage(path)
        if fault is None:
            return path
        print(f"warning: skipping damaged checkpoint {path}: {fault}", flush=True)
    if found:
        raise UserError(f"none of the {len(found)} checkpoints in {folder} is valid; restore one, or use a new folder")
    return None


def prune(folder: Path, step: int, keep_last: int, keep_every: int | None) -> None:
    """Delete unfinished writes and, up to ``step``, all but the ``keep_last`` newest and multiples of ``keep_every``.

    Later checkpoints are left by a run that was resumed from an older one on purpose: they must not push out the new.
    """
    for path in [path for path in steps(folder) if int(path.name[5:]) <= step][:-keep_last]:
        if keep_every is None or int(path.name[5:]) % keep_every:
            shutil.rmtree(path, ignore_errors=True)
    for path in folder.glob(".step_*.tmp"):
        shutil.rmtree(path, ignore_errors=True)


def read_state(folder: Path) -> dict[str, Any]:
    """Return the ``state.json`` of a checkpoint."""
    return read_json(folder / "state.json", "checkpoint state")


def read_config(folder: Path) -> dict[str, Any]:
    """Return the configuration that a checkpoint was made by, as it is recorded."""
    return read_yaml(folder / CONFIG)
