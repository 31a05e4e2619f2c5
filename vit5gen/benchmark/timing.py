"""Two ways to do one thing, measured in turn so that both meet the same disturbances, and their ratio."""

import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Row = dict[str, Any]
Pairs = list[tuple[float, float]]


def seconds(call: Callable[[], object]) -> Callable[[], float]:
    """Return a function that runs ``call`` once and returns how long it took."""

    def timed() -> float:
        start = time.perf_counter()
        call()
        return time.perf_counter() - start

    return timed


def alternate(ours: Callable[[], float], theirs: Callable[[], float], repetitions: int, warm_up: int = 0) -> Pairs:
    """Measure ours, theirs, ours, theirs, ...; the first ``warm_up`` pairs are dropped."""
    return [(ours(), theirs()) for _ in range(warm_up + repetitions)][warm_up:]


def ratio(pairs: Pairs) -> tuple[float, float, float]:
    """Return median(theirs) / median(ours) and its 95 % interval: percentiles of 10,000 bootstraps of the pairs."""
    values = np.array(pairs)
    draws = np.random.default_rng(0).integers(len(values), size=(10_000, len(values)))
    ours, theirs = np.moveaxis(np.median(values[draws], axis=1), -1, 0)
    low, high = np.quantile(theirs / ours, [0.025, 0.975])
    ours, theirs = np.median(values, axis=0)
    return float(theirs / ours), float(low), float(high)


def row(name: str, mode: str, ours: str, peer: str, pairs: Sequence[tuple[float, float]], unit: str = "s") -> Row:
    """Return one row of the result: ``ratio`` is the peer's median over ours, above 1 where we need less."""
    value, low, high = ratio(list(pairs))
    medians = np.median(np.array(pairs), axis=0)
    return {
        "name": name,
        "mode": mode,
        "ours": ours,
        "peer": peer,
        "ratio": value,
        "low": low,
        "high": high,
        "our_median": float(medians[0]),
        "peer_median": float(medians[1]),
        "unit": unit,
        "repetitions": len(pairs),
        "measured": [list(pair) for pair in pairs],
    }
