"""Distances between sets of features as ADM defines them, each a pure function of features or of their moments."""

from typing import Any

import torch
from torch import Tensor

from vit5gen.errors import UserError


def frechet_distance(mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> float:
    """Return the squared Frechet distance of two Gaussians, in float64.

    ``|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)`` (Dowson and Landau, 1982; Heusel et al., 2017,
    eq. 6), the last trace from symmetric eigenvalues, so that singular covariances are no special case.
    Means are ``(D,)``, covariances ``(D, D)``. Raises `UserError` on other shapes or on values that are not finite.
    """
    return FrechetReference(mean2, cov2).distance(mean1, cov1)


class FrechetReference:
    """One of the two Gaussians with the root of its covariance, which distances to many others share."""

    def __init__(self, mean: Any, covariance: Any) -> None:
        self.mean, self.covariance = _moments(mean, covariance)
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > _rounding(values)
        self._root = vectors[:, kept] * values[kept].sqrt()

    def distance(self, mean: Any, covariance: Any) -> float:
        """Return the squared Frechet distance to the Gaussian with ``mean (D,)`` and ``covariance (D, D)``."""
        mean, covariance = _moments(mean, covariance)
        if mean.shape != self.mean.shape:
            raise UserError(
                f"Frechet distance: {len(mean)} dimensions against {len(self.mean)}; use the same extractor for both"
            )
        values = torch.linalg.eigvalsh(self._root.T @ covariance @ self._root)
        # Rounding leaves eigenvalues near 1e-16 where there are zeros; their roots near 1e-8 would add up.
        cross = values[values > _rounding(values)].sqrt().sum()
        spread = covariance.trace() + self.covariance.trace()
        return float((mean - self.mean).square().sum() + spread - 2 * cross)


def _rounding(values: Tensor) -> float:
    return float(values.abs().max()) * len(values) * torch.finfo(values.dtype).eps if len(values) else 0.0


def _moments(mean: Any, covariance: Any) -> tuple[Tensor, Tensor]:
    mean, covariance = (torch.as_tensor(value).to("cpu", torch.float64) for value in (mean, covariance))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        raise UserError(
            f"Frechet distance: mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)}; "
            "expected (D,) and (D, D)"
        )
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError("Frechet distance: NaN or infinity in the statistics; check the features they come from")
    return mean, covariance
