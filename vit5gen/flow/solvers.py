"""ODE and SDE solvers as generators of ``(i, t, x)``: plain loops over a grid of times, one state in memory.

Times and step sizes are float64 scalars; tensors see only products and sums, element by element, so that with an
elementwise network a sample is bitwise the same alone and in a batch. No gradients are kept.
"""

import math
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from functools import partial, wraps
from inspect import signature
from itertools import pairwise
from typing import ParamSpec

import torch
from torch import Tensor

from vit5gen.flow.dopri5 import dopri5_steps
from vit5gen.flow.flow import DIFFUSIONS, Flow, ModelFn, NonFiniteError, Time, lower_choice
from vit5gen.flow.times import SHIFT, time_grid
from vit5gen.system.errors import UserError

P = ParamSpec("P")
Field = Callable[[Tensor, Time], Tensor]
Step = tuple[int, float, Tensor]
Steps = Generator[Step, Tensor | None, None]
Noise = Iterable[Tensor] | torch.Generator | Sequence[torch.Generator] | None
Past = list[tuple[float, Tensor]]

METHOD = "euler"  # where none is chosen
RTOL, ATOL = 1e-3, 1e-6  # of dopri5
LAST_STEPS = ("none", "mean", "tweedie", "euler")
SDE_METHODS = ("euler", "heun")


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


def integrate(
    field: Field, x: Tensor, grid: list[float], method: str, rtol: float, atol: float, last_is_euler: bool = False
) -> Steps:
    """Yield ``(i, t, x)`` after every step of ``dx/dt = field(x, t)`` along ``grid``, which may run either way.

    last_is_euler: never evaluate at the end of the grid.
    A state that is sent takes the place of the one yielded. dopri5 uses only the ends of the grid, yields the time of
    the slowest sample, and takes no other state.
    """
    method = lower_choice("method", method, ODE_METHODS)
    if method == "dopri5":
        if not all(math.isfinite(tolerance) and tolerance > 0 for tolerance in (rtol, atol)):
            raise UserError(f"rtol, atol: {rtol!r}, {atol!r}; expected finite numbers above 0.")
        return _watch(dopri5_steps(torch.no_grad()(field), x, grid[0], grid[-1], rtol, atol))
    methods = [method] * (len(grid) - 2) + ["euler" if last_is_euler else method]
    return _watch(_fixed_steps(field, x, grid, methods))


def _fixed_steps(field: Field, x: Tensor, grid: list[float], methods: list[str]) -> Steps:
    past: Past = []
    for i, (method, (t, end)) in enumerate(zip(methods, pairwise(grid), strict=True)):
        with torch.no_grad():
            x = FIXED_METHODS[method](field, x, t, end, past)
        x = yield from offer(i, end, x)


def offer(i: int, t: float, x: Tensor) -> Generator[Step, Tensor | None, Tensor]:
    """Yield a step, again with each state that is sent in its place; return the last one, to continue from."""
    while (sent := (yield i, t, x)) is not None:
        x = sent.to(x)
    return x


def _watch(steps: Generator[Step, Tensor | None]) -> Steps:
    """Pass the steps on and raise `NonFiniteError` after the last one when a state was not finite."""
    finite: list[Tensor] = []
    times: list[float] = []
    for i, t, x in steps:
        finite.append(torch.isfinite(x).all())
        times.append(t)
        while (sent := (yield i, t, x)) is not None:
            i, t, x = steps.send(sent)
    good = torch.stack(finite).tolist() if finite else []
    if not all(good):
        i = good.index(False)
        raise NonFiniteError(
            f"state: not finite after step {i + 1}, at t = {times[i]:.6g}; expected finite model output there:"
            " check the weights and the initial state (float16 may overflow)."
        )


def final_state(steps: Iterable[Step]) -> Tensor:
    """Exhaust the steps of a solver, keeping one state at a time."""
    for step in steps:
        state = step[2]
    return state


def _exhausting(solver: Callable[P, Steps], name: str) -> Callable[P, Tensor]:
    """Return the function ``name`` that takes what ``solver`` takes and returns its final state."""

    @wraps(solver)
    def sample(*args: P.args, **options: P.kwargs) -> Tensor:
        return final_state(solver(*args, **options))

    sample.__name__ = sample.__qualname__ = name
    sample.__doc__ = f"Return the final state (B, ...) of `{solver.__name__}`, which see for options and errors."
    sample.__signature__ = signature(solver).replace(return_annotation=Tensor)  # type: ignore[attr-defined]
    return sample


def ode_steps(
    flow: Flow,
    model_fn: ModelFn,
    x0: Tensor,
    num_steps: int,
    method: str = METHOD,
    t_span: tuple[float, float] | None = None,
    reverse: bool = False,
    rtol: float = RTOL,
    atol: float = ATOL,
    *,
    shift: float = SHIFT,
    start: float | None = None,
) -> Steps:
    """Yield ``(i, t, x)`` after each step of the probability-flow ODE from ``x0`` (B, ...).

    method: euler | heun | midpoint | rk4 | ab2 take ``num_steps`` steps; dopri5 follows rtol and atol, per sample.
    t_span: ``(start, end)``, by default what the flow bears; ``shift`` warps the grid.  start: the time of ``x0``,
    where it is later.
    reverse: from data to noise, along the same grid backwards (its t_span may be given either way round; its default
    is `Flow.reversed_interval`). A state that is sent takes the place of the one yielded, but for dopri5.
    Where the network predicts data, the last step to them is Euler's (see `Flow`), unless t_span is given.
    Raises `UserError` on bad values.
    """
    first, end = t_span or (flow.reversed_interval() if reverse else flow.interval())
    if reverse:
        first, end = min(first, end), max(first, end)
    grid = time_grid(num_steps, _begin(first, end, start), end, shift)
    field = partial(flow.velocity, model_fn)
    lands = flow.prediction == "data" and t_span is None and not reverse
    return integrate(field, x0.detach(), grid[::-1] if reverse else grid, method, rtol, atol, lands)


sample_ode = _exhausting(ode_steps, "sample_ode")


def _begin(first: float, end: float, start: float | None) -> float:
    """Return when the steps begin: ``start``, if it is later than ``first``; `UserError` where no time is left then."""
    if start is not None and start >= end:
        advice = "begin earlier (an image: with more strength), or choose another sampler"
        raise UserError(f"start: t = {start:.6g}, but the steps of this solver end at {end:.6g}; {advice}")
    return first if start is None else max(first, start)


def _draws(noise: Noise, x: Tensor, num_steps: int) -> Iterator[Tensor]:
    """Yield one Gaussian tensor like ``x`` per step: from one generator, one per sample, given tensors, or new."""
    # One generator, torch's own where there is none, for the whole batch.
    if noise is None or isinstance(noise, torch.Generator):
        device = x.device if noise is None else noise.device
        for _ in range(num_steps):
            yield torch.randn(x.shape, generator=noise, device=device, dtype=x.dtype).to(x.device)
        return

    # One for each sample, which then does not depend on its neighbours.
    if isinstance(noise, list | tuple) and noise and all(isinstance(g, torch.Generator) for g in noise):
        if len(noise) != len(x):
            raise UserError(f"noise: {len(noise)} generators; expected one per sample, {len(x)}.")
        for _ in range(num_steps):
            draws = (torch.randn(x.shape[1:], generator=g, device=g.device, dtype=x.dtype) for g in noise)
            yield torch.stack([draw.to(x.device) for draw in draws])
        return

    # Given tensors, as many as there are steps.
    count = 0
    for draw in noise:
        if not isinstance(draw, Tensor) or draw.shape != x.shape:
            what = tuple(draw.shape) if isinstance(draw, Tensor) else type(draw).__name__
            raise UserError(f"noise: draw {count} is {what}; expected a tensor of shape {tuple(x.shape)}.")
        count += 1
        yield draw.to(x)
    raise UserError(f"noise: ran out after {count} draws; expected one for each of the {num_steps} steps.")


def sde_steps(
    flow: Flow,
    model_fn: ModelFn,
    x0: Tensor,
    num_steps: int,
    method: str = METHOD,
    diffusion: str = "sigma",
    diffusion_norm: float = 1.0,
    last_step: str | None = "mean",
    last_step_size: float = 0.04,
    noise: Noise = None,
    *,
    t_span: tuple[float, float] | None = None,
    shift: float = SHIFT,
    start: float | None = None,
) -> Steps:
    """Yield ``(i, t, x)`` after ``num_steps`` steps of ``dx = (v + D score) dt + sqrt(2 D) dW``, and after a last one.

    `Flow.diffusion` gives D(t) and its convention: form ``sigma`` is w(t) = 2 sigma_t where papers write sqrt(w) dW.
    method: euler (Euler-Maruyama) | heun (SiT's: the noise first, then a Heun step of the drift).
    last_step: mean (the drift alone) | tweedie (the expected data) | euler (the velocity alone), of ``last_step_size``,
    or none, which sets that size to 0.  noise: an iterable of (B, ...) tensors, a Generator, B Generators, or None; one
    draw a step.  t_span, shift, start: as in `ode_steps`. Raises `UserError` on bad values.
    """
    # Refuse what the solver does not know before its first step.
    method = lower_choice("method", method, SDE_METHODS)
    diffusion = lower_choice("diffusion", diffusion, DIFFUSIONS)
    last_step = lower_choice("last_step", last_step, LAST_STEPS)
    size = 0.0 if last_step == "none" else last_step_size
    if not 0 <= size < 1:
        raise UserError(f"last_step_size: {last_step_size!r}; expected a number in [0, 1).")

    # The times of the steps, which leave room for the last one and keep off what is infinite.
    evaluates_end = method == "heun" or last_step != "none"
    first, end = t_span or flow.sde_interval(diffusion, size, evaluates_end)
    grid = time_grid(num_steps, _begin(first, end, start), end, shift)
    if grid[-1] + size > 1 + 1e-9:
        raise UserError(f"last_step_size: {size!r} from t = {grid[-1]}; expected to end by t = 1.")
    flow.diffusion(grid[0], diffusion, diffusion_norm)  # raises on a bad norm before the first step

    # The network predicts once; velocity and score both follow from that.
    @torch.no_grad()
    def drift(x: Tensor, t: float) -> Tensor:
        prediction, _ = flow.predict(model_fn, x, t)
        gain = flow.diffusion(t, diffusion, diffusion_norm).item()
        velocity = flow.convert(prediction, x, t, "velocity")
        return velocity + gain * flow.convert(prediction, x, t, "score")

    def steps(x: Tensor) -> Steps:
        # Euler-Maruyama, or SiT's Heun: the noise of the whole step first, then the drift.
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
            x = yield from offer(i, end, x)

        # The last step adds no noise: what it added there would stay in the image.
        if last_step == "none":
            return
        t = grid[-1]
        with torch.no_grad():
            if last_step == "mean":
                x = x + size * drift(x, t)
            elif last_step == "euler":
                x = x + size * flow.velocity(model_fn, x, t)
            else:
                x = flow.convert(flow.predict(model_fn, x, t)[0], x, t, "x1")
        yield from offer(int(num_steps), t + size, x)

    return _watch(steps(x0.detach()))


sample_sde = _exhausting(sde_steps, "sample_sde")
