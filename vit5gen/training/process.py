"""The process around the loop: accelerate, batch sizes, signals, and errors on which all processes agree."""

import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TypeVar

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import ProjectConfiguration, broadcast_object_list

from vit5gen.config import TrainingConfig
from vit5gen.errors import UserError
from vit5gen.sampling import start_processes

T = TypeVar("T")


def make_accelerator(settings: TrainingConfig, output: Path) -> Accelerator:
    """Start accelerate with the arithmetic that ``training.precision`` asks for."""
    start_processes()
    torch.set_float32_matmul_precision("highest" if settings.precision in ("fp32", "fp64") else "high")
    return Accelerator(
        mixed_precision="bf16" if settings.precision == "bf16" else "no",
        log_with=list(settings.trackers) or None,
        project_config=ProjectConfiguration(project_dir=str(output), logging_dir=str(output)),
    )


def batch_sizes(settings: TrainingConfig, num_processes: int) -> tuple[int, int]:
    """Return (micro-batch size of a process, micro-batches a step); raise `UserError` when they do not divide."""
    total = settings.global_batch_size
    local, rest = divmod(total, num_processes)
    if rest:
        raise UserError(
            f"training.global_batch_size = {total} is not a multiple of {num_processes} processes; choose one"
        )
    micro = settings.micro_batch_size or local
    if local % micro:
        raise UserError(
            f"training.micro_batch_size = {micro} does not divide the {local} samples of a process "
            f"(global_batch_size {total} over {num_processes} processes); choose a divisor"
        )
    return micro, local // micro


def on_main(accelerator: Accelerator, function: Callable[[], T]) -> T:
    """Run ``function`` on the main process; all processes return its result or raise its `UserError`."""
    outcome: list[tuple[T | None, str | None]] = [(None, None)]
    if accelerator.is_main_process:
        try:
            outcome = [(function(), None)]
        except UserError as error:
            outcome = [(None, str(error))]
    broadcast_object_list(outcome)
    result, message = outcome[0]
    if message is not None:
        raise UserError(message)
    return result  # type: ignore[return-value]


@contextmanager
def stop_signals() -> Iterator[Callable[[], bool]]:
    """Yield a function that tells whether SIGTERM or SIGINT has come; a second signal ends the process at once."""
    received = False
    kinds = (signal.SIGTERM, signal.SIGINT)

    def note(number: int, frame: FrameType | None) -> None:
        nonlocal received
        received = True
        signal.signal(number, previous[signal.Signals(number)])

    previous = {number: signal.signal(number, note) for number in kinds}
    try:
        yield lambda: received
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


@contextmanager
def seeded(seed: int, step: int, position: int, device: torch.device) -> Iterator[None]:
    """Give torch's own generators a state that belongs to this micro-batch, for backbones that use dropout."""
    devices = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(int(np.random.SeedSequence([seed, step, position]).generate_state(1, np.uint64)[0] >> 1))
        yield
