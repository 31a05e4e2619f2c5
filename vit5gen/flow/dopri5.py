"""Dormand and Prince's Runge-Kutta pair of order 5(4), with an own time and step size for every sample."""

import math
from collections.abc import Callable, Generator

import torch
from torch import Tensor

from vit5gen.flow.flow import NonFiniteError, rows

# Nodes and stages, the last of which is the solution of order 5 (J. Comput. Appl. Math. 6, 1980, table 2), and
# Shampine's solution of order 4 (Math. Comp. 46, 1986): the difference of the two estimates the error.
_NODES = (0.0, 1 / 5, 3 / 10, 4 / 5, 8 / 9, 1.0, 1.0)
_STAGES = (
    (),
    (1 / 5,),
    (3 / 40, 9 / 40),
    (44 / 45, -56 / 15, 32 / 9),
    (19372 / 6561, -25360 / 2187, 64448 / 6561, -212 / 729),
    (9017 / 3168, -355 / 33, 46732 / 5247, 49 / 176, -5103 / 18656),
    (35 / 384, 0.0, 500 / 1113, 125 / 192, -2187 / 6784, 11 / 84),
)
_FOURTH = (1951 / 21600, 0.0, 22642 / 50085, 451 / 720, -12231 / 42400, 649 / 6300, 1 / 60)
_ERROR = tuple(fifth - fourth for fifth, fourth in zip((*_STAGES[-1], 0.0), _FOURTH, strict=True))


def _weighted(weights: tuple[float, ...], slopes: list[Tensor]) -> Tensor:
    first, *others = (weight * slope for weight, slope in zip(weights, slopes, strict=True) if weight)
    return sum(others, start=first)


def _norms(x: Tensor, scale: Tensor) -> list[float]:
    """Return the root mean square of ``x / scale`` for each sample, each reduced alone: its bits know no neighbours."""
    ratio = rows(x / scale).double()
    return torch.stack([row.square().mean().sqrt() for row in ratio.unbind()]).tolist()


def _column(values: list[float], x: Tensor) -> Tensor:
    return torch.tensor(values, dtype=torch.float64).to(x).reshape(-1, *[1] * (x.dim() - 1))


def _first_step(
    field: Callable[[Tensor, Tensor], Tensor], x: Tensor, slope: Tensor, scale: Tensor, start: float, end: float
) -> list[float]:
    """Guess a step for each sample from two slopes (Hairer, Norsett and Wanner, Solving ODEs I, section II.4).

    scale: the error to bear, in the shape of x (B, ...).
    """
    span = abs(end - start)
    sizes, slopes = _norms(x, scale), _norms(slope, scale)
    trial = [0.01 * a / b if min(a, b) > 1e-5 else 1e-6 for a, b in zip(sizes, slopes, strict=True)]
    trial = [min(h, span) for h in trial]
    signed = [math.copysign(h, end - start) for h in trial]
    times = torch.tensor([start + h for h in signed], dtype=torch.float64)
    bends = _norms(field(x + _column(signed, x) * slope, times) - slope, scale)
    steps = []
    for h, first, bend in zip(trial, slopes, bends, strict=True):
        steepest = max(first, bend / h)
        steps.append(min(100 * h, (0.01 / steepest) ** 0.2 if steepest > 1e-15 else max(1e-6, h * 1e-3), span))
    return steps


def dopri5_steps(
    field: Callable[[Tensor, Tensor], Tensor], x: Tensor, start: float, end: float, rtol: float, atol: float
) -> Generator[tuple[int, float, Tensor], Tensor | None]:
    """Yield ``(i, t, x)`` after every round of attempted steps, t being the time of the sample that is furthest behind.

    Every round evaluates the whole batch ``x`` (B, ...) at its own times (B,) (a network may hold a label for each
    row); a sample that rejects its step or has arrived stays as it is. Raises `NonFiniteError` if no step size works.
    """
    # Every sample starts at its own time, with a step of its own.
    sign = math.copysign(1.0, end - start)
    times = [start] * len(x)
    slope = field(x, torch.tensor(times, dtype=torch.float64))
    steps = _first_step(field, x, slope, atol + rtol * x.abs(), start, end)
    i = 0
    while any(t != end for t in times):
        # The steps of this round end where the way does.
        left = [abs(end - t) for t in times]
        taken = [min(h, rest) for h, rest in zip(steps, left, strict=True)]
        for t, h in zip(times, steps, strict=True):
            if t != end and not h > 1e-12 * abs(end - start):
                raise NonFiniteError(
                    f"dopri5: no step size works at t = {t:.6g}; expected finite, smooth model output there."
                )

        # Six more slopes; the last one is at the end of the step, and so the first one of the next.
        column = _column([sign * h for h in taken], x)
        slopes = [slope]
        for node, weights in zip(_NODES[1:], _STAGES[1:], strict=True):
            trial = x + column * _weighted(weights, slopes)
            stage = torch.tensor([t + sign * node * h for t, h in zip(times, taken, strict=True)], dtype=torch.float64)
            slopes.append(field(trial, stage))

        # Accept a step whose error is within the tolerance, and choose the next from how far within or beyond.
        ratios = _norms(column * _weighted(_ERROR, slopes), atol + rtol * torch.maximum(x.abs(), trial.abs()))
        accepted = [ratio <= 1 and t != end for ratio, t in zip(ratios, times, strict=True)]
        mask = torch.tensor(accepted, device=x.device).reshape(column.shape)
        x, slope = torch.where(mask, trial, x), torch.where(mask, slopes[-1], slope)
        for k, ratio in enumerate(ratios):
            if accepted[k]:
                times[k] = end if taken[k] == left[k] else times[k] + sign * taken[k]
            # An accepted step never shrinks and grows at most tenfold; a rejected one shrinks at most fivefold, and by
            # that where the ratio is no number.
            factor = 0.9 * max(ratio, 1e-10) ** -0.2 if ratio < math.inf else 0.2
            steps[k] = taken[k] * (min(max(factor, 1.0), 10.0) if accepted[k] else max(factor, 0.2))
        yield i, sign * min(sign * t for t in times), x
        i += 1
