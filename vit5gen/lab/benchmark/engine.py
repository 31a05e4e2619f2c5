"""What all benchmarks share: sizes, two ways to do one thing measured in turn, their ratio, and fresh processes."""

import os
import signal
import socket
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any, TypeVar, get_args

import numpy as np
import torch
from accelerate import PartialState

from vit5gen.lab.benchmark import GpuRow
from vit5gen.system.errors import UserError

T = TypeVar("T")
Row = dict[str, Any]
Pairs = Sequence[tuple[float, float]]


@dataclass(frozen=True)
class Sizes:
    """Sizes of all benchmarks; the defaults are those of the published comparison."""

    repetitions: int = 15
    fresh_repetitions: int = 5  # of what runs in processes of its own
    warm_up: int = 3
    preset: str = "S/2"
    latent_side: int = 32
    num_layers: int | None = None  # of our models; None: the preset's
    batch: int = 16
    classified: tuple[int, int] = (8, 224)  # images, and their side
    scored: tuple[int, int] = (50, 256)
    raced: tuple[int, int] = (1000, 256)  # pictures that whole evaluators read, half of them the reference
    race_repetitions: int = 2
    published_steps: int = 250
    drawn_images: int | None = None  # None: as many as the run evaluates
    sides: tuple[int, ...] = (16, 32, 64)  # 64, 256 and 1024 tokens
    batches: tuple[int, ...] = (4, 8, 16)


FULL = Sizes()
QUICK = Sizes(
    repetitions=2,
    fresh_repetitions=1,
    warm_up=1,
    latent_side=4,
    num_layers=1,
    batch=2,
    classified=(1, 32),
    scored=(2, 32),
    raced=(8, 32),
    race_repetitions=1,
    published_steps=3,
    drawn_images=6,
    sides=(4, 8),
    batches=(2, 4),
)


@dataclass(frozen=True)
class Setting:
    """Sizes, folders that the user names (checkouts of the peers and a trained run; None: not given), GPU's rows."""

    sizes: Sizes = FULL
    sit: Path | None = None
    vit5: Path | None = None
    run: Path | None = None
    notes: list[str] = field(default_factory=list)
    rows: Sequence[str] = get_args(GpuRow)

    def note(self, text: str) -> None:
        """Add and print what no row can say."""
        self.notes.append(text)
        print(f"Note: {text}.", flush=True)


def race(ours: Callable[[], object], theirs: Callable[[], object], sizes: Sizes) -> Pairs:
    """Time ours, theirs, ours, theirs, ..., so that both meet the same disturbances.

    Return the seconds of each pair after the warm-up.
    """
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(sizes.warm_up + sizes.repetitions)]
    return pairs[sizes.warm_up :]


def seconds(function: Callable[[], object]) -> float:
    """Return how long ``function`` takes, on a GPU until its work is done."""
    start = time.perf_counter()
    function()
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def ratio(pairs: Pairs) -> tuple[float, float, float]:
    """Return median(theirs) / median(ours) and its 95 % interval: percentiles of 10,000 bootstraps of the pairs."""
    values = np.array(pairs)
    draws = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    ours, theirs = np.moveaxis(np.median(values[draws], axis=1), -1, 0)
    low, high = np.quantile(theirs / ours, [0.025, 0.975])
    ours, theirs = np.median(values, axis=0)
    return float(theirs / ours), float(low), float(high)


def row(mode: str, ours: str, peer: str, pairs: Pairs, more: dict[str, float] | None = None, unit: str = "s") -> Row:
    """Return one row of the result; its ratio is above 1 where we need less than the peer. more: further entries."""
    (value, low, high), (our_median, peer_median) = ratio(pairs), np.median(pairs, axis=0).tolist()
    names = {"mode": mode, "ours": ours, "peer": peer}
    figures = {"ratio": value, "low": low, "high": high, "our_median": our_median, "peer_median": peer_median}
    return names | figures | {"unit": unit, "repetitions": len(pairs), "measured": pairs, "more": more or {}}


def fresh(function: Callable[..., T], *arguments: Any, count: int = 1) -> T:
    """Call a module's function in ``count`` fresh processes that train together; return the result of the first.

    For what must not meet the past of this process. Raises what the function raises, and `UserError` when a process is
    killed.
    """
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    end_silently = (signal.signal, (signal.SIGINT, signal.SIG_DFL))  # Ctrl-C comes to all; one tells of it
    with ProcessPoolExecutor(count, get_context("spawn"), *end_silently) as pool:
        futures = [pool.submit(_run_process, rank, count, port, function, arguments) for rank in range(count)]
        try:
            results = [future.result() for future in futures]
        except BrokenProcessPool as error:
            raise UserError("a benchmark process was killed, perhaps for lack of memory; free some memory") from error
    return results[0]


def _run_process(rank: int, count: int, port: int, function: Callable[..., T], arguments: tuple[Any, ...]) -> T:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    if count > 1:
        joined = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
        os.environ.update({name: str(value) for name, value in joined.items()}, MASTER_ADDR="127.0.0.1")
    try:
        return function(*arguments)
    finally:
        PartialState().destroy_process_group()


def _end_with_parent() -> None:
    """Leave no process at work when the one that started it is killed."""
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
