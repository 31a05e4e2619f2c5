"""Two ways to do one thing, measured in turn so that both meet the same disturbances, and their ratio."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from vit5gen.lab.benchmark.setting import Sizes

Row = dict[str, Any]
Pairs = Sequence[tuple[float, float]]


def race(ours: Callable[[], object], theirs: Callable[[], object], sizes: Sizes) -> Pairs:
    """Time ours, theirs, ours, theirs, ...; return the seconds of each pair after the warm-up."""
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(sizes.warm_up + sizes.repetitions)]
    return pairs[sizes.warm_up :]


def seconds(call: Callable[[], object]) -> float:
    """Return how long ``call`` takes, on a GPU until its work is done."""
    start = time.perf_counter()
    call()
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


def row(
    name: str, mode: str, ours: str, peer: str, pairs: Pairs, unit: str = "s", more: dict[str, float] | None = None
) -> Row:
    """Return one row of the result; its ratio is above 1 where we need less than the peer. more: what else it tells."""
    value, low, high = ratio(pairs)
    our_median, peer_median = np.median(np.array(pairs), axis=0).tolist()
    return {
        "name": name,
        "mode": mode,
        "ours": ours,
        "peer": peer,
        "ratio": value,
        "low": low,
        "high": high,
        "our_median": our_median,
        "peer_median": peer_median,
        "unit": unit,
        "repetitions": len(pairs),
        "measured": pairs,
        "more": more or {},
    }
