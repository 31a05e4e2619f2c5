"""Paths from noise to data: the coefficients of ``x_t = alpha x1 + sigma x0`` (SiT, arXiv 2401.08740, section 2)."""

import math
from types import ModuleType
from typing import Any, NamedTuple

from torch import Tensor


class Coefficients(NamedTuple):
    """The path's coefficients and their time derivatives, float64, in the shape of t."""

    alpha: Tensor
    d_alpha: Tensor
    sigma: Tensor
    d_sigma: Tensor


# Each path is written once for a float (m is `math`) and for a tensor (m is `torch`).
def _linear(t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
    return t, 1.0, 1.0 - t, -1.0


def _gvp(t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
    """Return the trigonometric, variance-preserving interpolant of SiT."""
    angle, rate = t * (math.pi / 2), math.pi / 2
    sine, cosine = m.sin(angle), m.cos(angle)
    return sine, rate * cosine, cosine, -rate * sine


def _vp(t: Any, m: ModuleType) -> tuple[Any, Any, Any, Any]:
    """Return the VP diffusion with beta from 0.1 at data to 20 at noise (arXiv 2011.13456, eq. 33)."""
    low, high, u = 0.1, 20.0, 1.0 - t
    log_alpha = -0.25 * u**2 * (high - low) - 0.5 * u * low
    half_beta = 0.5 * (low + u * (high - low))
    # The offset keeps 1/sigma defined at t=1, and shows nowhere else.
    alpha, sigma = m.exp(log_alpha), m.sqrt(abs(m.expm1(2 * log_alpha)) + 1e-300)
    return alpha, alpha * half_beta, sigma, -(alpha**2) * half_beta / sigma


PATHS = {"linear": _linear, "gvp": _gvp, "vp": _vp}
