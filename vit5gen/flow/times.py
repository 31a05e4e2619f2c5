"""Times of a solver, from 0 (noise) to 1 (data), and how they may be warped."""

import math
from numbers import Real
from typing import Any

from torch import Tensor

from vit5gen.system.errors import UserError

SHIFT = 1.0  # of times: none


def shift_time(u: Any, shift: float) -> Any:
    """Warp ``u`` in [0, 1]: above 1, ``shift`` moves it towards noise (arXiv 2403.03206, eq. 23, with t for 1 - t)."""
    if not (math.isfinite(shift) and shift > 0):
        raise UserError(f"shift: {shift!r}; expected a finite number above 0 (1 changes nothing).")
    return u / (u + shift * (1 - u))


def to_diffusers(t: Any, velocity: Tensor) -> tuple[Any, Tensor]:
    """Return diffusers' ``(sigma, model output)`` = ``(1 - t, -velocity)``; applied twice it is the identity."""
    return 1 - t, -velocity


def time_grid(num_steps: int, start: float, end: float, shift: float = SHIFT) -> list[float]:
    """Return the ``num_steps + 1`` times of a solver: uniform, or shifted (`shift_time`).

    Raises `UserError` unless num_steps >= 1 and 0 <= start < end <= 1.
    """
    if not (isinstance(num_steps, Real) and num_steps >= 1 and num_steps % 1 == 0) or num_steps is True:
        raise UserError(f"num_steps: {num_steps!r}; expected a whole number of at least 1.")
    if not 0 <= start < end <= 1:
        raise UserError(f"t_span: {(start, end)!r}; expected 0 <= start < end <= 1.")
    # The last one is given as it is: rounding must not carry it over 1.
    warped = [shift_time(i / num_steps, shift) for i in range(int(num_steps))]
    return [start + (end - start) * u for u in warped] + [float(end)]
