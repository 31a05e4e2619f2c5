"""The process around the loop: accelerate, batch sizes, signals, and errors on which all processes agree."""

import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from multiprocessing import resource_tracker
from pathlib import Path
from types import FrameType

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker
from accelerate.utils import DistributedDataParallelKwargs, ProjectConfiguration
from safetensors import SafetensorError

from vit5gen.config import TrainingConfig
from vit5gen.registry import missing_packages
from vit5gen.system.cpu import keep_freed_memory
from vit5gen.system.distributed import has_launcher, start_processes
from vit5gen.system.errors import UserError
from vit5gen.training.objectives import OBJECTIVES, shared_options

STOPPED = 75  # exit code after SIGTERM or SIGINT: saved, the same command resumes (EX_TEMPFAIL)
NONFINITE = 70  # exit code after too many non-finite steps in a row (EX_SOFTWARE)
RESUME = "run the same command again to resume"
_MOMENT = 5.0  # seconds


def make_accelerator(settings: TrainingConfig, output: Path) -> Accelerator:
    """Start accelerate; raise `UserError` for a tracker that is not installed (accelerate would drop it silently).

    Mixed precision is left to `Precision.autocast`, which computes the same under DDP, FSDP2 and alone. FSDP2's own
    policy would round the time and sum gradients in bfloat16.
    """
    for tracker, remedy in missing_packages(settings.trackers).items():
        raise UserError(f"training.trackers: {tracker} is not installed; run `{remedy}`, or omit {tracker}")
    start_processes()
    keep_freed_memory(large=not settings.gradient_checkpointing)
    # A part of an objective need not have a gradient in every step.
    train_all = all(OBJECTIVES.get(name).trains_all and one.always for name, one in shared_options(settings).items())
    # Where a run of an earlier version has its events, accelerate's folder for the project, they stay together.
    board = TensorBoardTracker("vit5gen" if (output / "vit5gen").is_dir() else "tensorboard", output)
    parts_unused = DistributedDataParallelKwargs(find_unused_parameters=True)
    return Accelerator(
        mixed_precision="no",
        kwargs_handlers=None if train_all else [parts_unused],
        log_with=[board if tracker == "tensorboard" else tracker for tracker in settings.trackers] or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output)),
    )


def batch_sizes(settings: TrainingConfig, world_size: int) -> tuple[int, int]:
    """Return (micro-batch size of a process, micro-batches a step); raise `UserError` when they do not divide."""
    total = settings.global_batch_size
    local, rest = divmod(total, world_size)
    if rest:
        fault = f"training.global_batch_size = {total} must be a multiple of the {world_size} processes"
        raise UserError(f"{fault}; set it to e.g. {total - rest + world_size}")
    micro = settings.micro_batch_size or local
    if local % micro:
        share = f"the {local} samples per process (global_batch_size {total} over {world_size} processes)"
        fits = max(size for size in range(1, min(micro, local) + 1) if local % size == 0)
        raise UserError(f"training.micro_batch_size = {micro} must divide {share}; set it to {fits}")
    return micro, local // micro


def stopped(step: int, saved_step: int) -> str:
    """Say that a signal has ended the training, from where it can go on, and what a launcher makes of it."""
    reported = "; the launcher now reports this end by a traceback and exit code 1, but nothing is lost"
    said = f"\nstopped by a signal after step {step}; {RESUME} from step {saved_step}"
    return said + reported * has_launcher()


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that returns whether SIGTERM or SIGINT has come; a later second signal ends the process.

    Ctrl-C under a launcher arrives twice within a moment: from the terminal and from the launcher.
    """
    first: float | None = None

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal first
        first = first or time.monotonic()
        if time.monotonic() - first > _MOMENT:
            signal.signal(number, previous[signal.Signals(number)])
            signal.raise_signal(number)

    previous = {number: signal.signal(number, note) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield lambda: first is not None
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


class SaveClock:
    """Tells that ``minutes``, None being never, have passed since the last save; the main process's word counts."""

    def __init__(self, minutes: float | None) -> None:
        self.minutes = minutes
        self.restart()

    def restart(self) -> None:
        self.start = time.monotonic()

    def due(self) -> bool:
        return self.minutes is not None and time.monotonic() - self.start >= 60 * self.minutes


@contextmanager
def signals_blocked() -> Iterator[None]:
    """Start processes that SIGTERM and SIGINT do not reach: a signal to the whole group must not take the data away.

    The mask is inherited; here, what has come is delivered in the end.
    """
    if not hasattr(signal, "pthread_sigmask"):  # Windows, where only a console's Ctrl-C reaches a group
        yield
        return
    resource_tracker.ensure_running()  # its start would unblock them
    previous = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM, signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, previous)


@contextmanager
def memory_hint(micro_batch_size: int) -> Iterator[None]:
    """Turn running out of the accelerator's memory into a `UserError` that names what to try."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        smaller = next((size for size in range(micro_batch_size // 2, 0, -1) if micro_batch_size % size == 0), None)
        advice = "try --training.gradient_checkpointing true, or shard the model with configs/accelerate/fsdp2.yaml"
        if smaller:
            advice = f"try --training.micro_batch_size {smaller}, which gives the same result with less memory"
        raise UserError(f"out of memory with training.micro_batch_size {micro_batch_size}; {advice}") from error


@contextmanager
def disk_hint() -> Iterator[None]:
    """Turn a full or broken disk into a `UserError` that says how to go on."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        raise UserError(f"{error}; checkpoints are still valid: fix this, then {RESUME}") from error


@contextmanager
def seeded(seed: int, step: int, position: int, device: torch.device) -> Iterator[None]:
    """Give torch's own generators a state that belongs to this micro-batch, for backbones that use dropout."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, position]).generate_state(1, np.uint64)[0] >> 1))
        yield
