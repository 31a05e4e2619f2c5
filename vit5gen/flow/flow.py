"""The flow: what a network may predict on a path, the velocity and the loss that follow, and the draws of t.

Everywhere ``x0`` is noise, ``x1`` is data and t runs from 0 (noise) to 1 (data): ``x_t = alpha x1 + sigma x0`` and the
velocity is ``d_alpha x1 + d_sigma x0`` (SiT, arXiv 2401.08740, section 2).
"""

import math
from collections.abc import Callable, Collection
from dataclasses import dataclass
from typing import Any, get_args

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity

from vit5gen.config import FlowConfig
from vit5gen.flow.paths import PATHS, Coefficients
from vit5gen.flow.times import SHIFT, shift_time
from vit5gen.system.errors import UserError, choose

ModelFn = Callable[[Tensor, Tensor], Any]
Time = float | Tensor

_DEFAULTS = FlowConfig()
PREDICTIONS: tuple[str, ...] = get_args(FlowConfig.model_fields["prediction"].annotation)
LOSS_WEIGHTS = ("none", "velocity", "likelihood")
DIFFUSIONS = ("constant", "sbdm", "sigma", "linear", "decreasing", "increasing-decreasing")
TIME_DISTRIBUTIONS: tuple[str, ...] = get_args(FlowConfig.model_fields["time_distribution"].annotation)
EPS = 1e-3  # how far sampling stays from an end of [0, 1] at which a coefficient is infinite
_VP_TRAINING_EPS = 1e-5
_LAST_DATA_TIME = 1 - 0.05  # from here on the loss of data is weighted as here


class NonFiniteError(UserError, FloatingPointError):
    """A state that is infinite or not a number, or a step that cannot avoid one."""


def lower_choice(what: str, value: object, choices: Collection[str]) -> str:
    """Return ``value`` in lower case; raise `UserError`, with the value as it was given, unless it is a choice."""
    lower = str(value).lower()
    return lower if lower in choices else choose(what, str(value), choices)


def rows(x: Tensor) -> Tensor:
    """Return ``x`` (B, ...) as (B, N); (B,) has one element per sample."""
    return x.unsqueeze(-1).flatten(1)


@dataclass(frozen=True)
class Flow:
    """A path, what the network predicts on it, and how its error is weighted; names ignore case.

    path: linear | gvp | vp.  prediction: velocity | score | noise | data (x1).
    loss_weight: None | velocity | likelihood, as in SiT's code for noise and score: ``velocity`` makes the loss that of
    the implied velocity, ``likelihood`` weighs it by SBDM's D over sigma^2. A velocity's loss is never reweighed.
    The loss of data is that of the implied velocity too, on the linear path ``|x - x1|^2 / max(1 - t, 0.05)^2``, in
    which prediction and target share the clamp, as in JiT (arXiv 2511.13720, table 1 and its code). Only the loss is
    clamped: a solver stops `EPS` before 1, and one of fixed steps takes an Euler step last, which evaluates only its
    beginning; of the noise it leaves sigma(1 - EPS), a thousandth on the linear path.
    direction_weight: adds this much of ``1 - cos(velocity, target)`` over channels (FasterDiT, arXiv 2410.10356;
    LightningDiT, arXiv 2501.01423). Raises `UserError` for unknown names.
    """

    path: str = _DEFAULTS.path
    prediction: str = _DEFAULTS.prediction
    loss_weight: str | None = _DEFAULTS.loss_weight
    direction_weight: float = _DEFAULTS.direction_weight

    def __post_init__(self) -> None:
        weight = "none" if self.loss_weight is None else self.loss_weight
        object.__setattr__(self, "path", lower_choice("path", self.path, PATHS))
        object.__setattr__(self, "prediction", lower_choice("prediction", self.prediction, PREDICTIONS))
        object.__setattr__(self, "loss_weight", lower_choice("loss_weight", weight, LOSS_WEIGHTS))
        if not (math.isfinite(self.direction_weight) and self.direction_weight >= 0):
            raise UserError(f"direction_weight: {self.direction_weight!r}; expected a finite number of at least 0.")

    def coefficients(self, t: Time) -> Coefficients:
        """Return alpha, d_alpha, sigma, d_sigma at ``t`` (a float or any tensor), in float64.

        On the CPU each time is computed as a scalar: vectorised sin and exp may round differently in the last lanes
        of a vector, and then a sample would depend on its place in the batch.
        """
        path = PATHS[self.path]
        if isinstance(t, Tensor) and (t.is_cuda or t.is_meta):
            t = t.double()
            return Coefficients(*(c if isinstance(c, Tensor) else torch.full_like(t, c) for c in path(t, torch)))
        t = t.cpu().double() if isinstance(t, Tensor) else torch.tensor(t, dtype=torch.float64)
        table = torch.tensor([path(value, math) for value in t.flatten().tolist()], dtype=torch.float64)
        return Coefficients(*table.reshape(*t.shape, 4).unbind(-1))

    def interval(self, training: bool = False) -> tuple[float, float]:
        """Return the times on which training, or an ODE solver, is free of infinite coefficients."""
        if self.path == "vp":
            return 0.0, 1 - (_VP_TRAINING_EPS if training else EPS)
        if self.prediction == "data":
            return 0.0, 1.0 if training else 1 - EPS
        return (0.0, 1.0) if self.prediction == "velocity" else (EPS, 1 - EPS)

    def reversed_interval(self) -> tuple[float, float]:
        """Return the times, in increasing order, of an ODE from data to noise: ``1 - t`` of `interval`, as published.

        On vp they are not those of `interval`, and 1 gives way to the last time that training has seen. Those of data
        are the same either way: near 1 the error of a network that predicts it would be divided by next to nothing.
        """
        start, end = self.interval()
        if self.prediction == "data":
            return start, end
        return 1 - end, min(1 - start, self.interval(training=True)[1])

    def sde_interval(self, diffusion: str, last_step_size: float, evaluates_end: bool) -> tuple[float, float]:
        """Return the times of an SDE solver: it starts and ends where score and diffusion are finite.

        Without a last step, a velocity on linear or gvp runs to 1 as published, unless the solver evaluates its end.
        """
        start, end = self.interval()
        if lower_choice("diffusion", diffusion, DIFFUSIONS) == "sbdm" and self.path != "vp":
            start = EPS
        if evaluates_end:
            end = min(end, 1 - EPS)
        return start, 1 - last_step_size if last_step_size > 0 else end

    def diffusion(self, t: Time, form: str, norm: float) -> Tensor:
        """Return D(t), float64 in the shape of ``t``, of the SDE ``dx = (v + D score) dt + sqrt(2 D) dW``.

        SiT's paper writes ``w/2`` and ``sqrt(w)``: D is half of its w(t), so that form ``sigma`` is w(t) = 2 sigma_t.
        Of the forms only SBDM, equal to the diffusion of score-based models, is infinite, at t=0 on linear and gvp.
        """
        form, t = lower_choice("diffusion", form, DIFFUSIONS), torch.as_tensor(t, dtype=torch.float64)
        if not (math.isfinite(norm) and norm >= 0):
            raise UserError(f"diffusion_norm: {norm!r}; expected a finite number of at least 0.")
        if form == "constant":
            return torch.full_like(t, norm)
        if form == "linear":
            return norm * (1 - t)
        if form == "decreasing":
            return 0.25 * (norm * torch.cos(math.pi * t) + 1) ** 2
        if form == "increasing-decreasing":
            return norm * torch.sin(math.pi * t) ** 2
        c = self.coefficients(t)
        return norm * (c.sigma if form == "sigma" else _score_gain(c))

    def interpolate(self, x0: Tensor, x1: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return ``x_t`` and the velocity target, both in the shape of ``x1`` (B, ...); ``t`` (B,).

        Raises `UserError` when the shapes of x0 or t do not match x1.
        """
        if x0.shape != x1.shape or t.shape != x1.shape[:1]:
            shapes = f"x0 {tuple(x0.shape)}, t {tuple(t.shape)} for x1 {tuple(x1.shape)}"
            raise UserError(f"shapes: {shapes}; expected x0 in the shape of x1 and t of shape ({x1.shape[0]},).")
        alpha, d_alpha, sigma, d_sigma = (_like(c, x1) for c in self.coefficients(t))
        return alpha * x1 + sigma * x0, d_alpha * x1 + d_sigma * x0

    def convert(self, prediction: Tensor, x: Tensor, t: Time, target: str) -> Tensor:
        """Turn the network's prediction at ``(x, t)`` into ``target``: x0 (noise), x1 (data), velocity or score.

        With x it fixes x1 and x0: ``target = p prediction + q x``, and (p, q) solves one 2x2 system (Cramer). The score
        is ``-x0/sigma``, taken out of the system so that a score or noise network is exact at sigma = 0. What data
        imply is infinite there.
        """
        target = lower_choice("target", target, (*PREDICTIONS, "x0", "x1"))
        target = {"x0": "noise", "x1": "data"}.get(target, target)
        if target == self.prediction:
            return prediction
        c = self.coefficients(t)
        one, zero = torch.ones_like(c.alpha), torch.zeros_like(c.alpha)
        rows = {"velocity": (c.d_alpha, c.d_sigma), "data": (one, zero), "noise": (zero, one), "score": (zero, one)}
        (r1, r0), (g1, g0) = rows[self.prediction], rows[target]
        determinant = r1 * c.sigma - r0 * c.alpha
        p, q = (g1 * c.sigma - g0 * c.alpha) / determinant, (r1 * g0 - r0 * g1) / determinant
        if self.prediction == "score":
            p = -c.sigma * p
        if target == "score":
            p, q = -p / c.sigma, -q / c.sigma
        return _like(p, x) * prediction + _like(q, x) * x

    def predict(self, model_fn: ModelFn, x: Tensor, t: Time) -> tuple[Tensor, Any]:
        """Return the network's output at ``x`` (B, ...) and ``t`` (float or (B,)) in x's dtype, and its hidden states.

        ``model_fn`` gets t as (B,), or one time as (1,) where it says so by ``takes_one_time``. It may return hidden
        states with its prediction; else they are None.
        Raises `UserError` when the shape of t or of the prediction does not match x.
        """
        times = torch.as_tensor(t, dtype=x.dtype, device=x.device)
        if times.shape not in ((), x.shape[:1]):
            raise UserError(f"t: shape {tuple(times.shape)}; expected a number or ({x.shape[0]},), one per sample.")
        one = getattr(model_fn, "takes_one_time", False)
        out = model_fn(x, times.reshape(-1) if one else times.expand(x.shape[0]))
        prediction, hidden = out if isinstance(out, tuple) and len(out) == 2 else (out, None)
        if not isinstance(prediction, Tensor) or prediction.shape != x.shape:
            found = f"shape {tuple(out.shape)}" if isinstance(out, Tensor) else type(out).__name__
            raise UserError(f"model output: {found}; expected a tensor in the shape of its input, {tuple(x.shape)}.")
        return prediction.to(x.dtype), hidden

    def velocity(self, model_fn: ModelFn, x: Tensor, t: Time) -> Tensor:
        """Return dx/dt at ``x`` (B, ...) and ``t`` (float or (B,)), whatever the network predicts."""
        return self.convert(self.predict(model_fn, x, t)[0], x, t, "velocity")

    def score(self, model_fn: ModelFn, x: Tensor, t: Time) -> Tensor:
        """Return the gradient of log p_t at ``x`` (B, ...) and ``t`` (float or (B,)), whatever the network predicts."""
        return self.convert(self.predict(model_fn, x, t)[0], x, t, "score")

    def loss(self, model_fn: ModelFn, x1: Tensor, x0: Tensor | None = None, t: Tensor | None = None) -> Any:
        """Return the loss of each sample, (B,): pure when noise ``x0`` and times ``t`` (B,) are given, else drawn.

        Where ``model_fn`` returns hidden states with its prediction, as a model with taps does, they are returned
        with the loss. Raises `UserError` when the shapes of x0, t or the prediction do not match ``x1`` (B, ...).
        """
        if t is None:
            t = draw_timesteps(self, torch.rand(x1.shape[0], dtype=torch.float64))
        x0 = torch.randn_like(x1) if x0 is None else x0
        t = t.to(x1)
        x_t, velocity = self.interpolate(x0, x1, t)
        prediction, hidden = self.predict(model_fn, x_t, t)
        loss = self.loss_of(prediction, x_t, velocity, x0, t)
        return loss if hidden is None else (loss, hidden)

    def loss_of(self, prediction: Tensor, x_t: Tensor, velocity: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return the loss of each sample, (B,), of a prediction at ``x_t`` (B, ...) and ``t`` (B,).

        velocity, x0: the target of `interpolate` and the noise, in the shape of ``x_t``.
        """
        if self.prediction == "velocity":
            error = prediction - velocity
        elif self.prediction == "data":
            x1 = Flow(self.path).convert(velocity, x_t, t, "x1")
            t = t.clamp(max=_LAST_DATA_TIME)  # for the direction below, too
            c = self.coefficients(t)
            error = _like(c.d_alpha - c.d_sigma * c.alpha / c.sigma, x_t) * (prediction - x1)
        else:
            c = self.coefficients(t)
            error = prediction - x0 if self.prediction == "noise" else _like(c.sigma, x_t) * prediction + x0
            if self.loss_weight != "none":
                gain = _score_gain(c) / c.sigma
                error = error * _like(gain if self.loss_weight == "velocity" else (gain / c.sigma).sqrt(), x_t)
        loss = rows(error.square()).mean(1)
        if self.direction_weight > 0:
            found = self.convert(prediction, x_t, t, "velocity")
            cosine = cosine_similarity(found.unsqueeze(-1), velocity.unsqueeze(-1), dim=1)  # (B,): one channel
            loss = loss + self.direction_weight * rows(1 - cosine).mean(1)
        return loss


def _score_gain(c: Coefficients) -> Tensor:
    """Return what multiplies the score in ``velocity = (d_alpha/alpha) x + gain score``: SBDM's diffusion, too."""
    return c.d_alpha / c.alpha * c.sigma**2 - c.sigma * c.d_sigma


def _like(coefficient: Tensor, x: Tensor) -> Tensor:
    """Shape a coefficient (B,) to multiply ``x`` (B, ...); one of shape () acts as a number and needs no copy."""
    if coefficient.dim() == 0:
        return coefficient
    return coefficient.to(x.dtype).to(x.device).reshape(-1, *[1] * (x.dim() - 1))


def draw_timesteps(
    flow: Flow,
    uniforms: Tensor,
    time_distribution: str = _DEFAULTS.time_distribution,
    logit_mean: float = _DEFAULTS.logit_mean,
    logit_std: float = _DEFAULTS.logit_std,
    time_shift: float = SHIFT,
    stratum: tuple[Tensor, int] | None = None,
) -> Tensor:
    """Map given uniforms (B,) in [0, 1) to times (B,) on the flow's training interval; pure.

    logit_normal: the logit of t is normal (arXiv 2403.03206, eq. 19, with t for 1 - t: mean > 0 favours data).
    time_shift: see `shift_time`.  stratum: ``(positions (B,), global batch size N)`` puts the uniform at position i in
    [i/N, (i+1)/N), so that a whole batch covers the distribution evenly (after arXiv 2107.00630, appendix I.1);
    positions need no permutation since the data are shuffled. Raises `UserError` for unknown names or bad numbers.
    """
    u = uniforms.double()
    if stratum is not None:
        positions, size = stratum
        u = (positions.to(u) + u) / size
    if lower_choice("time_distribution", time_distribution, TIME_DISTRIBUTIONS) == "logit_normal":
        if not (math.isfinite(logit_mean) and math.isfinite(logit_std) and logit_std > 0):
            raise UserError(
                f"logit_mean, logit_std: {logit_mean!r}, {logit_std!r}; expected finite numbers, std above 0."
            )
        u = torch.sigmoid(logit_mean + logit_std * torch.special.ndtri(u))
    low, high = flow.interval(training=True)
    return low + (high - low) * shift_time(u, time_shift)
