"""Guidance: a conditional network becomes a guided ``model_fn(x, t)`` for the solvers."""

import math
from collections.abc import Callable, Iterable, Sequence
from numbers import Integral, Real
from typing import Any

import torch
from torch import Tensor

from vit5gen.config import DrawConfig
from vit5gen.system.errors import UserError

_DEFAULTS = DrawConfig()
ConditionalModel = Callable[[Tensor, Tensor, Tensor], Tensor]


class GuidedModel:
    """``model_fn(x (B, C, ...), t (1,) or (B,))`` = ``c + (scale - 1)(c - u) + (weak_scale - 1)(c - w)``.

    c, u: ``model`` with ``class_labels`` (B,) and with ``null_label`` (by default the model's own): classifier-free
    guidance (arXiv 2207.12598, eq. 6), in one forward of 2B rows.  Labels may be rows of weights (B, null_label + 1).
    scale: may be a function, which is called at every evaluation.
    w: ``weak_model`` with the labels: autoguidance (arXiv 2406.02507).
    interval: the t, ends included, at which a sample is guided (arXiv 2404.07724).
    channels: guide only this many first ones (3 reproduces the published DiT and SiT tables).
    Where nothing is guided (both scales 1, or every t outside the interval) it is one plain forward of ``model``.
    Velocity, score, noise and data are affine in each other with weights that c, u and w share, so guiding any of them
    is the same. ``rows`` counts what the networks have evaluated. Raises `UserError` on scales that are not finite and
    bad intervals, channels or labels.
    """

    takes_one_time = True

    def __init__(
        self,
        model: ConditionalModel,
        class_labels: Tensor,
        scale: float | Callable[[], float] = _DEFAULTS.guidance_scale,
        null_label: int | None = None,
        interval: Sequence[float] = tuple(_DEFAULTS.guidance_interval),
        channels: int | None = _DEFAULTS.guidance_channels,
        weak_model: ConditionalModel | None = None,
        weak_scale: float = _DEFAULTS.autoguidance_scale,
    ) -> None:
        _check_finite("weak_scale", weak_scale)
        ends = tuple(interval) if isinstance(interval, Iterable) else ()
        if len(ends) != 2 or not (all(isinstance(end, Real | Tensor) for end in ends) and 0 <= ends[0] <= ends[1] <= 1):
            expected = "two times (start, end), 0 <= start <= end <= 1, e.g. (0.2, 0.8)"
            raise UserError(f"guidance_interval: {interval!r}; expected {expected}.")
        if channels is not None and not (isinstance(channels, Integral) and channels >= 1):
            raise UserError(f"guidance_channels: {channels!r}; expected a whole number of at least 1, or None for all.")
        if weak_model is None and weak_scale != 1:
            raise UserError(f"weak_scale: {weak_scale!r} without a weak_model; pass one, or weak_scale=1.")
        self.model, self.labels, self.ask_scale = model, class_labels, scale if callable(scale) else lambda: scale
        own = getattr(model, "null_label", None) if getattr(model, "has_null_label", True) else None
        self.null_label: Any = own if null_label is None else null_label
        self.interval, self.channels = ends, channels
        self.weak_model, self.weak_scale, self.rows = weak_model, weak_scale, 0
        _ = self.scale  # raises before the first step

    @property
    def scale(self) -> float:
        """The scale of classifier-free guidance by now."""
        scale = _check_finite("guidance_scale", self.ask_scale())
        if scale != 1 and self.null_label is None:
            reason = "the model has no null label, perhaps because it was trained without label dropout"
            raise UserError(f"guidance_scale = {scale}: {reason}; use 1, or autoguidance, or pass null_label")
        return scale

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        batch, width = x.shape[0], 1 if x.dim() == 1 else x.shape[1]
        scale, labels, (low, high) = self.scale, self.labels, self.interval
        if labels.shape[:1] != x.shape[:1]:
            raise UserError(f"class_labels: shape {tuple(labels.shape)}; expected ({batch},), one per sample.")
        if self.channels is not None and self.channels > width:
            raise UserError(f"guidance_channels: {self.channels}; the model has only {width}.")

        # One plain forward where nothing is guided.
        inside = None if (low, high) == (0, 1) else (t >= low) & (t <= high)
        self.rows += batch
        if (scale == 1 and self.weak_scale == 1) or (inside is not None and not inside.any()):
            return self.model(x, t, labels)

        # With and without the label at once, then the weaker model.
        if scale == 1:
            out = conditional = self.model(x, t, labels)
        else:
            self.rows += batch
            twice = torch.cat([t, t]) if len(t) > 1 else t
            both = self.model(torch.cat([x, x]), twice, torch.cat([labels, self._null_labels()]))
            conditional, unconditional = both[:batch], both[batch:]
            out = conditional + (scale - 1) * (conditional - unconditional)
        if self.weak_model is not None and self.weak_scale != 1:
            self.rows += batch
            out = out + (self.weak_scale - 1) * (conditional - self.weak_model(x, t, labels))

        # The channels and the samples that are guided.
        if self.channels is not None and self.channels < width:
            out = torch.cat([out[:, : self.channels], conditional[:, self.channels :]], dim=1)
        if inside is not None:
            out = torch.where(inside.reshape(-1, *[1] * (x.dim() - 1)), out, conditional)
        return out

    def _null_labels(self) -> Tensor:
        if self.labels.dim() == 1:
            return torch.full_like(self.labels, self.null_label)
        null = torch.zeros_like(self.labels)
        return null.index_fill(1, torch.tensor(self.null_label, device=null.device), 1)


def _check_finite(name: str, value: float) -> float:
    if not (isinstance(value, Real | Tensor) and math.isfinite(value)):
        raise UserError(f"{name}: {value!r}; expected a finite number (1 is off).")
    return value
