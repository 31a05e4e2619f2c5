"""ODE and SDE solvers as generators of ``(i, t, x)``: plain loops over a grid of times, one state in memory.

Times and step sizes are float64 scalars; tensors see only products and sums, element by element, so that with an
elementwise network a sample is bitwise the same alone and in a batch. No gradients are kept.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import wraps
from inspect import signature
from itertools import pairwise
from numbers import Real
from typing import ParamSpec

import torch
from torch import Generator, Tensor

from vit5gen.flow.dopri5 import dopri5_steps
from vit5gen.flow.flow import DIFFUSIONS, Flow, ModelFn, NonFiniteError, Time, named, shift_time
from vit5gen.system.errors import UserError

P = ParamSpec("P")
Field = Callable[[Tensor, Time], Tensor]
Step = tuple[int, float, Tensor]
Noise = Iterable[Tensor] | Generator | Sequence[Generator] | None
Past = list[tuple[float, Tensor]]

LAST_STEPS = ("none", "mean", "tweedie", "euler")
SDE_METHODS = ("euler", "heun")


class CountingModel:
    """Wrap a network and count its evaluations: ``rows`` over the batch size is the number per image."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self.model, self.calls, self.rows = model, 0, 0

    def __call__(self, x: Tensor, *args: Tensor) -> Tensor:
        self.calls += 1
        self.rows += x.shape[0]
        return self.model(x, *args)


def _euler(field: Field, x: Tensor, t: float, end: float, past: Past) -> Tensor:
    return x + (end - t) * field(x, t)


def _heun(field: Field, x: Tensor, t: float, end: float, past: Past) -> Tensor:
    first = field(x, t)
    second = field(x + (end - t) * first, end)
    return x + (end - t) / 2 * (first + second)


def _midpoint(field: Field, x: Tensor, t: float, end: float, past: Past) -> Tensor:
    half = (end - t) / 2
    return x + (end - t) * field(x + half * field(x, t), t + half)


def _rk4(field: Field, x: Tensor, t: float, end: float, past: Past) -> Tensor:
    step, middle = end - t, t + (end - t) / 2
    k1 = field(x, t)
    k2 = field(x + step / 2 * k1, middle)
    k3 = field(x + step / 2 * k2, middle)
    k4 = field(x + step * k3, end)
    return x + step / 6 * (k1 + 2 * (k2 + k3) + k4)


def _ab2(field: Field, x: Tensor, t: float, end: float, past: Past) -> Tensor:
    """Adams-Bashforth of order 2 on any grid, after one Euler step: one evaluation a step."""
    step, slope = end - t, field(x, t)
    increment = slope
    if past:
        previous_step, previous_slope = past.pop()
        increment = slope + step / (2 * previous_step) * (slope - previous_slope)
    past.append((step, slope))
    return x + step * increment


FIXED_METHODS = {"euler": _euler, "heun": _heun, "midpoint": _midpoint, "rk4": _rk4, "ab2": _ab2}
ODE_METHODS = (*FIXED_METHODS, "dopri5")


def time_grid(
    num_steps: int, start: float, end: float, shift: float = 1.0, times: Sequence[float] | Tensor | None = None
) -> list[float]:
    """Return the ``num_steps + 1`` times of a solver: uniform, shifted (`shift_time`) or ``times`` as given.

    Raises `UserError` unless num_steps >= 1, 0 <= start < end <= 1 and ``times`` increases strictly in [0, 1].
    """
    if not (isinstance(num_steps, Real) and num_steps >= 1 and num_steps % 1 == 0) or num_steps is True:
        raise UserError(f"num_steps: {num_steps!r}; expected a whole number of at least 1.")
    if times is None:
        if not 0 <= start < end <= 1:
            raise UserError(f"t_span: {(start, end)!r}; expected 0 <= start < end <= 1.")
        # The last one is given as it is: rounding must not carry it over 1.
        warped = [shift_time(i / num_steps, shift) for i in range(int(num_steps))]
        return [start + (end - start) * u for u in warped] + [float(end)]
    grid = [float(t) for t in times]
    if len(grid) != num_steps + 1:
        raise UserError(f"times: {len(grid)} values; expected num_steps + 1 = {num_steps + 1}.")
    if not all(0 <= a < b <= 1 for a, b in pairwise(grid)):
        raise UserError(
            f"times: {grid!r}; expected strictly increasing values in [0, 1] (reverse=True runs them back)."
        )
    return grid


def integrate(
    field: Field, x: Tensor, grid: list[float], method: str, rtol: float, atol: float, debug: bool = False
) -> Iterator[Step]:
    """Yield ``(i, t, x)`` after every step of ``dx/dt = field(x, t)`` along ``grid``, which may run either way.

    dopri5 uses only the ends of the grid and yields the time of the slowest sample.
    """
    method = named("method", method, ODE_METHODS)
    if method == "dopri5":
        if not all(math.isfinite(tolerance) and tolerance > 0 for tolerance in (rtol, atol)):
            raise UserError(f"rtol, atol: {rtol!r}, {atol!r}; expected finite numbers above 0.")
        return _watch(dopri5_steps(field, x, grid[0], grid[-1], rtol, atol), debug)
    return _watch(_fixed_steps(field, x, grid, method), debug)


def _fixed_steps(field: Field, x: Tensor, grid: list[float], method: str) -> Iterator[Step]:
    past: Past = []
    for i, (t, end) in enumerate(pairwise(grid)):
        x = FIXED_METHODS[method](field, x, t, end, past)
        yield i, end, x


def _watch(steps: Iterator[Step], debug: bool) -> Iterator[Step]:
    """Pass the steps on and raise `NonFiniteError` after the last; with ``debug`` after the first bad one."""
    finite: list[Tensor] = []
    times: list[float] = []
    for i, t, x in steps:
        finite.append(torch.isfinite(x).all())
        times.append(t)
        if debug:
            _check_finite(finite, times)
        yield i, t, x
    _check_finite(finite, times)


def _check_finite(finite: list[Tensor], times: list[float]) -> None:
    good = torch.stack(finite).tolist() if finite else []
    if not all(good):
        i = good.index(False)
        raise NonFiniteError(
            f"state: not finite after step {i + 1}, at t = {times[i]:.6g}; expected finite model output there:"
            " check the weights and the state it began with (float16 may overflow)."
        )


def final_state(steps: Iterator[Step]) -> Tensor:
    """Exhaust the steps of a solver, keeping one state at a time."""
    for step in steps:
        state = step[2]
    return state


def _exhausting(solver: Callable[P, Iterator[Step]], name: str) -> Callable[P, Tensor]:
    """Return the function ``name`` that takes what ``solver`` takes and returns its final state."""

    @wraps(solver)
    def sample(*args: P.args, **options: P.kwargs) -> Tensor:
        return final_state(solver(*args, **options))

    sample.__name__ = sample.__qualname__ = name
    sample.__doc__ = f"Return the final state (B, ...) of `{solver.__name__}`, which tells of its options and errors."
    sample.__signature__ = signature(solver).replace(return_annotation=Tensor)  # type: ignore[attr-defined]
    return sample


def ode_steps(
    flow: Flow,
    model_fn: ModelFn,
    x0: Tensor,
    num_steps: int,
    method: str = "euler",
    t_span: tuple[float, float] | None = None,
    reverse: bool = False,
    rtol: float = 1e-3,
    atol: float = 1e-6,
    shift: float = 1.0,
    times: Sequence[float] | Tensor | None = None,
    debug: bool = False,
) -> Iterator[Step]:
    """Yield ``(i, t, x)`` after each step of the probability-flow ODE from ``x0`` (B, ...).

    method: euler | heun | midpoint | rk4 | ab2 take ``num_steps`` steps; dopri5 is ruled by rtol and atol, per sample.
    t_span: ``(start, end)``, by default what the flow bears; ``shift`` warps the grid, ``times`` gives it as a whole.
    reverse: from data to noise, along the same grid backwards (its t_span may be given either way round; its default
    is `Flow.reversed_interval`).  debug: raise at the first step that is not finite. Raises `UserError` on bad values.
    """
    start, end = t_span or (flow.reversed_interval() if reverse else flow.interval())
    if reverse:
        start, end = min(start, end), max(start, end)
    grid = time_grid(num_steps, start, end, shift, times)

    @torch.no_grad()
    def field(x: Tensor, t: Time) -> Tensor:
        return flow.velocity(model_fn, x, t)

    return integrate(field, x0.detach(), grid[::-1] if reverse else grid, method, rtol, atol, debug)


sample_ode = _exhausting(ode_steps, "sample_ode")


def _draws(noise: Noise, x: Tensor, num_steps: int) -> Iterator[Tensor]:
    """Yield one Gaussian tensor like ``x`` a step, from one generator, one a sample, given tensors or afresh."""
    if noise is None or isinstance(noise, Generator):
        device = x.device if noise is None else noise.device
        for _ in range(num_steps):
            yield torch.randn(x.shape, generator=noise, device=device, dtype=x.dtype).to(x.device)
        return
    if isinstance(noise, list | tuple) and noise and all(isinstance(g, Generator) for g in noise):
        if len(noise) != len(x):
            raise UserError(f"noise: {len(noise)} generators; expected one a sample, {len(x)}.")
        for _ in range(num_steps):
            draws = (torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in noise)
            yield torch.stack([draw.to(x.device) for draw in draws])
        return
    count = 0
    for draw in noise:
        if not isinstance(draw, Tensor) or draw.shape != x.shape:
            what = tuple(draw.shape) if isinstance(draw, Tensor) else type(draw).__name__
            raise UserError(f"noise: draw {count} is {what}; expected a tensor of shape {tuple(x.shape)}.")
        count += 1
        yield draw.to(x)
    raise UserError(f"noise: ran out after {count} draws; expected one for each of {num_steps} steps.")


def sde_steps(
    flow: Flow,
    model_fn: ModelFn,
    x0: Tensor,
    num_steps: int,
    method: str = "euler",
    diffusion: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step: str | None = "mean",
    last_step_size: float = 0.04,
    noise: Noise = None,
    t_span: tuple[float, float] | None = None,
    shift: float = 1.0,
    times: Sequence[float] | Tensor | None = None,
    debug: bool = False,
) -> Iterator[Step]:
    """Yield ``(i, t, x)`` after ``num_steps`` steps of ``dx = (v + D score) dt + sqrt(2 D) dW``, and after a last one.

    `Flow.diffusion` gives D(t) and its convention: form ``sigma`` is w(t) = 2 sigma_t where papers write sqrt(w) dW.
    method: euler (Euler-Maruyama) | heun (SiT's: the noise first, then a Heun step of the drift).
    last_step: mean (the drift alone) | tweedie (the expected data) | euler (the velocity alone), of ``last_step_size``,
    or none, which sets that size to 0.  noise: an iterable of (B, ...) tensors, a Generator, B Generators, or None; one
    draw a step.  t_span, shift, times, debug: as in `ode_steps`. Raises `UserError` on bad values.
    """
    method = named("method", method, SDE_METHODS)
    diffusion = named("diffusion", diffusion, DIFFUSIONS)
    last_step = named("last_step", last_step, LAST_STEPS)
    size = 0.0 if last_step == "none" else last_step_size
    if not 0 <= size < 1:
        raise UserError(f"last_step_size: {last_step_size!r}; expected a number in [0, 1).")
    evaluates_end = method == "heun" or last_step != "none"
    start, end = t_span or flow.sde_interval(diffusion, size, evaluates_end)
    grid = time_grid(num_steps, start, end, shift, times)
    if grid[-1] + size > 1 + 1e-9:
        raise UserError(f"last_step_size: {size!r} from t = {grid[-1]}; expected to end at 1 at the latest.")
    flow.diffusion(grid[0], diffusion, diffusion_norm)  # raises on a bad norm before the first step

    @torch.no_grad()
    def drift(x: Tensor, t: float) -> Tensor:
        prediction = flow.predict(model_fn, x, t)
        gain = flow.diffusion(t, diffusion, diffusion_norm).item()
        velocity = flow.convert(prediction, x, t, "velocity")
        return velocity + gain * flow.convert(prediction, x, t, "score")

    def steps(x: Tensor) -> Iterator[Step]:
        draws = _draws(noise, x, int(num_steps))
        for i, (t, end) in enumerate(pairwise(grid)):
            step = end - t
            kick = math.sqrt(2 * flow.diffusion(t, diffusion, diffusion_norm).item() * step) * next(draws)
            if method == "euler":
                x = x + step * drift(x, t) + kick
            else:
                x = x + kick
                first = drift(x, t)
                x = x + step / 2 * (first + drift(x + step * first, end))
            yield i, end, x
        if last_step == "none":
            return
        t = grid[-1]
        with torch.no_grad():
            if last_step == "mean":
                x = x + size * drift(x, t)
            elif last_step == "euler":
                x = x + size * flow.velocity(model_fn, x, t)
            else:
                x = flow.convert(flow.predict(model_fn, x, t), x, t, "x1")
        yield int(num_steps), t + size, x

    return _watch(steps(x0.detach()), debug)


sample_sde = _exhausting(sde_steps, "sample_sde")
