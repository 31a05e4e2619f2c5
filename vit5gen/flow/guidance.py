"""Guidance: a conditional network becomes a guided ``model_fn(x, t)`` for the solvers."""

import math
from collections.abc import Callable, Sequence
from numbers import Real

import torch
from torch import Tensor

from vit5gen.flow.flow import ModelFn, call
from vit5gen.system.errors import UserError

ConditionalModel = Callable[[Tensor, Tensor, Tensor], Tensor]


def guide(
    model: ConditionalModel,
    class_labels: Tensor,
    scale: float | Callable[[], float] = 1.0,
    null_label: int | None = None,
    interval: Sequence[float] = (0.0, 1.0),
    channels: int | None = None,
    weak_model: ConditionalModel | None = None,
    weak_scale: float = 1.0,
    batched: bool = True,
) -> ModelFn:
    """Return ``model_fn(x (B, C, ...), t (B,))`` = ``c + (scale - 1)(c - u) + (weak_scale - 1)(c - w)``.

    c, u: ``model`` with ``class_labels`` (B,) and with ``null_label`` (by default the model's own): classifier-free
    guidance (arXiv 2207.12598, eq. 6).  scale: may be a function, which is asked at every evaluation.
    w: ``weak_model`` with the labels: autoguidance (arXiv 2406.02507).
    interval: the t, ends included, at which a sample is guided (arXiv 2404.07724).
    channels: guide only the first so many (3 reproduces the published DiT and SiT tables).
    batched: c and u in one forward of 2B rows, or in two of B where memory is short.
    Where nothing is guided (both scales 1, or every t outside the interval) it is one plain forward of ``model``.
    Velocity, score and noise are affine in each other with weights that c, u and w share, so guiding any of them is
    the same. Raises `UserError` on scales that are not finite and bad intervals, channels, labels or output shapes.
    """
    ask_scale = scale if callable(scale) else lambda: scale
    _finite("weak_scale", weak_scale)
    if len(interval) != 2 or not 0 <= interval[0] <= interval[1] <= 1:
        raise UserError(f"guidance_interval: {interval!r}; expected two times, 0 <= start <= end <= 1.")
    low, high = interval
    if channels is not None and channels < 1:
        raise UserError(f"guidance_channels: {channels!r}; expected at least 1, or None for all.")
    if weak_model is None and weak_scale != 1:
        raise UserError(f"weak_scale: {weak_scale!r} without a weak_model; give one, or leave the scale at 1.")
    null = getattr(model, "null_label", None) if null_label is None else null_label

    def current_scale() -> float:
        value = _finite("guidance_scale", ask_scale())
        if value != 1 and null is None:
            raise UserError("null_label: the model has none; give the label that stands for no class.")
        return value

    current_scale()  # raises before the first step

    def guided(x: Tensor, t: Tensor) -> Tensor:
        scale, width = current_scale(), 1 if x.dim() == 1 else x.shape[1]
        if class_labels.shape != x.shape[:1]:
            raise UserError(f"class_labels: shape {tuple(class_labels.shape)}; expected ({x.shape[0]},), one a sample.")
        if channels is not None and channels > width:
            raise UserError(f"guidance_channels: {channels}; the model has only {width}.")
        inside = None if (low, high) == (0, 1) else (t >= low) & (t <= high)
        if (scale == 1 and weak_scale == 1) or (inside is not None and not inside.any()):
            return call(model, x, t, class_labels)
        labelled, unlabelled = class_labels, torch.full_like(class_labels, -1 if null is None else null)
        if scale == 1 or not batched:
            conditional = call(model, x, t, labelled)
        else:
            both = call(model, torch.cat([x, x]), torch.cat([t, t]), torch.cat([labelled, unlabelled]))
            conditional, unconditional = both.chunk(2)
        out = conditional
        if scale != 1:
            if not batched:
                unconditional = call(model, x, t, unlabelled)
            out = out + (scale - 1) * (conditional - unconditional)
        if weak_model is not None and weak_scale != 1:
            out = out + (weak_scale - 1) * (conditional - call(weak_model, x, t, labelled))
        if channels is not None and channels < width:
            out = torch.cat([out[:, :channels], conditional[:, channels:]], dim=1)
        if inside is not None:
            out = torch.where(inside.reshape(-1, *[1] * (x.dim() - 1)), out, conditional)
        return out

    return guided


def _finite(name: str, value: float) -> float:
    if not (isinstance(value, Real | Tensor) and math.isfinite(value)):
        raise UserError(f"{name}: {value!r}; expected a finite number (1 is off).")
    return value
