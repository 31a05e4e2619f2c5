"""Distances between sets of features as ADM defines them, each a pure function of features or of their moments."""

import copy
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit  # scipy.stats would take 65 MB more
from torch import Tensor

from vit5gen.evaluation.statistics import FeatureStatistics, Grouped
from vit5gen.system.distributed import sum_over_processes
from vit5gen.system.errors import UserError

CONFIDENCE = 0.95
SPLIT_SIZE = 5000  # samples, of the Inception Score
SUBSET_SIZE = 1000  # rows, of the kernel distance
NEIGHBOURS = 3  # of precision and recall
COVERAGE_NEIGHBOURS = 5  # of density and coverage
SIZES = 15  # of which a Frechet distance at infinitely many samples is extrapolated


def frechet_distance(mean1: Any, cov1: Any, mean2: Any, cov2: Any) -> float:
    """Return the squared Frechet distance of two Gaussians, in float64.

    ``|m1 - m2|^2 + tr(S1) + tr(S2) - 2 tr((S1^1/2 S2 S1^1/2)^1/2)`` (Dowson and Landau, 1982; Heusel et al., 2017,
    eq. 6), the last trace from symmetric eigenvalues, so that singular covariances are no special case.
    Means are ``(D,)``, covariances ``(D, D)``. Raises `UserError` on other shapes or on values that are not finite.
    """
    return FrechetReference(mean2, cov2).distance(mean1, cov1)


class FrechetReference:
    """A Gaussian, ``mean (D,)`` and ``covariance (D, D)`` in float64; its distances to many others share a root."""

    def __init__(self, mean: Any, covariance: Any) -> None:
        self.mean, self.covariance = _moments(mean, covariance)

    @classmethod
    def of(cls, statistics: FeatureStatistics) -> "FrechetReference":
        return cls(statistics.mean, statistics.covariance)

    @cached_property
    def _root(self) -> Tensor:
        # Any R with R R^T = S1 gives the eigenvalues of S1^1/2 S2 S1^1/2; Cholesky's is the cheapest, if there is one.
        root, failed = torch.linalg.cholesky_ex(self.covariance)
        if not failed:
            return root
        values, vectors = torch.linalg.eigh(self.covariance)
        kept = values > _rounding(values)
        return vectors[:, kept] * values[kept].sqrt()

    def distance(self, mean: Any, covariance: Any) -> float:
        """Return the squared Frechet distance to the Gaussian with ``mean (D,)`` and ``covariance (D, D)``."""
        mean, covariance = _moments(mean, covariance)
        return self._distance(mean, covariance, None)

    def distance_of(self, statistics: FeatureStatistics) -> float:
        """Return the distance to the Gaussian of these statistics, in less memory."""
        covariance, kept = statistics.covariance, self._root.shape[1]
        return self._distance(statistics.mean, covariance, covariance.view(-1)[: kept**2].view(kept, kept))

    def _distance(self, mean: Tensor, covariance: Tensor, product: Tensor | None) -> float:
        """Write the matrix of which the eigenvalues are asked for to ``product``, which may lie in ``covariance``."""
        if (dim := len(mean)) != (own := len(self.mean)):
            raise UserError(f"Frechet distance: {dim} dimensions against {own}; use the same extractor for both")
        spread = covariance.trace() + self.covariance.trace()
        values = torch.linalg.eigvalsh(torch.matmul(self._root.T @ covariance, self._root, out=product))
        # Rounding leaves eigenvalues near 1e-16 where there are zeros; their roots near 1e-8 would add up.
        cross = values[values > _rounding(values)].sqrt().sum()
        return float((mean - self.mean).square().sum() + spread - 2 * cross)


def frechet_report(generated: FeatureStatistics, reference: FrechetReference, floor: float | None) -> dict[str, Any]:
    """Return a Frechet distance with its count and its floor, the distance of as many real images, as one entry."""
    return {"value": reference.distance_of(generated), "n": generated.count, "floor": floor}


def frechet_with_error(samples: Grouped, reference: FrechetReference) -> dict[str, Any]:
    """Return the Frechet distance with its jackknife standard error and interval.

    The error is that of the finite sample around the mean distance of samples of this size. It does not hold the bias
    that a finite sample has: compare distances at the same count only.
    """
    return with_error(leave_one_out_distances(samples, reference), sum(group.count for group in samples.groups))


def leave_one_out_distances(samples: Grouped, reference: FrechetReference) -> list[float]:
    """Return the distance of all samples and, where an error can be told, those without each group."""
    total, counts = samples.total(), [group.count for group in samples.groups if group.count]
    told = len(counts) > 1 and total.count - max(counts) > 1
    return [reference.distance_of(total), *map(reference.distance_of, samples.leave_one_out(total) if told else ())]


def with_error(values: Sequence[float], count: int) -> dict[str, Any]:
    """Return the first value as that of ``count`` samples, with the jackknife error that the others give, if any."""
    value, *rest = values
    score = {"value": value, "n": count}
    if not rest:
        return score | {"standard_error": None, "interval": None}
    error = jackknife_error(rest)
    margin = error * float(stdtrit(len(rest) - 1, (1 + CONFIDENCE) / 2))
    return score | {"standard_error": error, "interval": [value - margin, value + margin]}


def frechet_of_rows(x: Any, y: Any) -> float:
    """Return the squared Frechet distance of two sets of features ``(N, D)`` and ``(M, D)``, of any rank.

    The trace of `frechet_distance` is the sum of singular values of the product of the centred rows, which for few rows
    is a small matrix. Raises `UserError` for fewer than two rows.
    """
    x, y = (rows.double() for rows in _pair(x, y, 2, "Frechet distance"))
    if min(len(x), len(y)) >= x.shape[1]:
        return frechet_distance(x.mean(dim=0), torch.cov(x.T), y.mean(dim=0), torch.cov(y.T))
    shift = (x.mean(dim=0) - y.mean(dim=0)).square().sum()
    x, y = ((rows - rows.mean(dim=0)) / (len(rows) - 1) ** 0.5 for rows in (x, y))
    return float(shift + x.square().sum() + y.square().sum() - 2 * torch.linalg.svdvals(x @ y.T).sum())


def frechet_at_infinity(reference: FrechetReference, rows: Tensor, smallest: int) -> tuple[float, list[float]]:
    """Return the Frechet distance of infinitely many samples, and the distances that it is extrapolated from.

    Least squares of the distance over 1/N at 15 sizes from ``smallest`` to all of ``rows (N, D)``, at 1/N = 0 (Chong
    and Forsyth, 2020). Each size adds rows to the last, in an order drawn once.
    """
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(0))
    counts = np.linspace(smallest, len(rows), SIZES).round().astype(int)
    statistics, distances = FeatureStatistics(rows.shape[1]), []
    for first, last in zip([0, *counts], counts, strict=False):
        statistics.update(rows[order[first:last]])
        distances.append(reference.distance_of(statistics))
    return float(np.polyfit(1 / counts, distances, 1)[1]), distances


class ScoreSums:
    """Sums behind the Inception Score, kept for each split of consecutive samples, so that order and batches are free.

    Split ``s`` holds the samples with index in ``[s * split_size, (s + 1) * split_size)``, as ADM cuts its unshuffled
    samples. Groups of samples (by index, as `Grouped` has them) have sums of their own, for a jackknife.
    Memory: ``(groups, splits, K)`` for ``K`` classes.
    """

    def __init__(self, total: int, num_classes: int, split_size: int, groups: int = 1) -> None:
        if split_size < 1:
            raise UserError(f"Inception Score: split_size = {split_size}; expected at least 1")
        self.split_size = split_size
        # A row: the sum of probabilities of each class, the sum of p log p, the count.
        self.sums = torch.zeros(groups, -(-total // split_size), num_classes + 2, dtype=torch.float64)

    def update(self, probabilities: Any, indices: Tensor) -> None:
        """Add ``probabilities (B, K)`` of the samples with these ``indices (B,)``."""
        rows = torch.as_tensor(probabilities).to("cpu", torch.float64)
        negative_entropy = torch.xlogy(rows, rows).sum(dim=1, keepdim=True)
        rows = torch.cat([rows, negative_entropy, torch.ones(len(rows), 1)], dim=1)
        groups, splits, width = self.sums.shape
        self.sums.view(-1, width).index_add_(0, indices % groups * splits + indices // self.split_size, rows)

    def without(self, group: int) -> "ScoreSums":
        """Return the sums of the samples of the other groups, all in one group."""
        rest = copy.copy(self)
        rest.sums = self.sums.sum(dim=0, keepdim=True) - self.sums[group]
        return rest

    def all_reduce(self) -> None:
        self.sums = sum_over_processes(self.sums)

    def value(self) -> float:
        """Return the mean over splits of ``exp(E KL(p(y|x) || p(y)))``; raise `UserError` without samples."""
        sums = self.sums.sum(dim=0)
        sums = sums[sums[:, -1] > 0]
        if not len(sums):
            raise UserError("Inception Score: no samples; give at least one")
        sums = sums / sums[:, -1:]
        marginal = sums[:, :-2]
        return float((sums[:, -2] - torch.xlogy(marginal, marginal).sum(dim=1)).exp().mean())


def inception_score(probabilities: Any, split_size: int = SPLIT_SIZE) -> float:
    """Return ADM's Inception Score of class probabilities ``(N, K)``: consecutive splits, unshuffled, the last shorter.

    Source: Salimans et al. (2016), eq. 1. Raises `UserError` on NaN or on rows that do not sum to 1.
    """
    rows = torch.as_tensor(probabilities)
    if rows.ndim != 2:
        raise UserError(f"Inception Score: probabilities {tuple(rows.shape)}; expected (N, K)")
    sums_to_one = torch.allclose(rows.double().sum(dim=1), torch.ones((), dtype=torch.float64), atol=1e-3)
    if not sums_to_one or (rows < 0).any():
        raise UserError("Inception Score: values below 0 or rows that do not sum to 1; give the softmax of logits")
    sums = ScoreSums(rows.shape[0], rows.shape[1], split_size)
    sums.update(rows, torch.arange(len(rows)))
    return sums.value()


def kernel_distance(
    real: Any, generated: Any, subsets: int = 100, subset_size: int = SUBSET_SIZE, seed: int = 2020
) -> tuple[float, float]:
    """Return the Kernel Inception Distance and its standard error.

    The mean over random subsets of the unbiased squared MMD with kernel ``(x.y / D + 1)^3`` (Binkowski et al., 2018,
    eq. 4), in float64; the defaults draw the subsets that torch-fidelity draws. The error is that of the data, not of
    the draw of subsets: it shrinks with the number of rows, never with ``subsets`` (first-order projection of the
    U-statistic, Hoeffding 1948; up to sqrt(2) too wide for equal distributions).
    ``real (N, D)``, ``generated (M, D)``. Raises `UserError` when there are fewer rows than ``subset_size``.
    """
    if subsets < 1 or subset_size < 2:
        raise UserError(f"KID: {subsets} subsets of {subset_size}; expected at least 1 of at least 2")
    real, generated = _pair(real, generated, subset_size, "KID")
    draw = np.random.RandomState(seed)
    values, spreads = [], []
    for _ in range(subsets):
        y = generated[draw.choice(len(generated), subset_size, replace=False)].double()
        x = real[draw.choice(len(real), subset_size, replace=False)].double()
        own_x, own_y = ((_kernel(rows, rows).fill_diagonal_(0).sum(dim=1)) / (subset_size - 1) for rows in (x, y))
        cross = _kernel(x, y)
        values.append(own_x.mean() + own_y.mean() - 2 * cross.mean())
        projections = torch.stack([own_x - cross.mean(dim=1), own_y - cross.mean(dim=0)])
        spreads.append(projections.var(dim=1) * 4)
    variance = torch.stack(spreads).mean(dim=0).cpu() / torch.tensor([len(real), len(generated)])
    return float(torch.stack(values).mean()), float(variance.sum().sqrt())


def gaussian_discrepancy(real: Any, generated: Any, sigma: float = 10) -> float:
    """Return 1000 times the biased squared MMD with a Gaussian kernel, in float64: of CLIP's features it is CMMD.

    ``real (N, D)``, ``generated (M, D)``; the mean of the kernel within a set holds each row with itself (Jayasumana et
    al., 2024, eq. 4). Not 0 for finite samples of one distribution.
    """
    real, generated = (rows.double() for rows in _pair(real, generated, 1, "CMMD"))

    def mean(x: Tensor, y: Tensor) -> float:  # of the kernel less 1, which cancels
        exponents = (_squared_distances(part, y, False) / (-2 * sigma**2) for part in _blocks(x, len(y)))
        return sum(float(exponent.expm1().sum()) for exponent in exponents) / (len(x) * len(y))

    return 1000 * (mean(real, real) + mean(generated, generated) - 2 * mean(real, generated))


def precision_recall(real: Any, generated: Any, k: int = NEIGHBOURS, adm_fp16: bool = False) -> tuple[float, float]:
    """Return improved precision and recall in blocks of distances, as ADM computes them.

    Precision: the share of ``generated (M, D)`` within the k-nearest-neighbour ball of any of ``real (N, D)``; recall:
    the reverse (Kynkaanniemi et al., 2019, eq. 2). ``adm_fp16`` rounds squared distances to float16 as ADM does, and
    like it falls back to float32 for a block with an overflow. Raises `UserError` for ``k`` rows or fewer.
    """
    if k < 1:
        raise UserError(f"precision and recall: k = {k}; expected at least 1")
    real, generated = _pair(real, generated, k + 1, "precision and recall")
    radii_real, radii_generated = (_radii(rows, k, adm_fp16) for rows in (real, generated))
    recalled, precise = [], torch.zeros(len(generated), dtype=torch.bool, device=generated.device)
    for rows, radii in zip(_blocks(real, len(generated)), _blocks(radii_real, len(generated)), strict=True):
        distances = _squared_distances(rows, generated, adm_fp16)
        recalled.append((distances <= radii_generated).any(dim=1))
        precise |= (distances <= radii[:, None]).any(dim=0)
    return float(precise.double().mean()), float(torch.cat(recalled).double().mean())


def density_coverage(real: Any, generated: Any, k: int = COVERAGE_NEIGHBOURS) -> tuple[float, float]:
    """Return density and coverage (Naeem et al., 2020, eq. 3 and 4) in blocks of distances.

    A ball around each of ``real (N, D)`` ends before its k-th nearest real neighbour. Density: how many balls hold a
    row of ``generated (M, D)``, on average, by k; coverage: the share of balls that hold any. Raises `UserError` for
    ``k`` rows or fewer.
    """
    if k < 1:
        raise UserError(f"density and coverage: k = {k}; expected at least 1")
    real, generated = _pair(real, generated, k + 1, "density and coverage")
    inside, covered = 0, 0
    for rows, radii in zip(*(_blocks(one, len(generated)) for one in (real, _radii(real, k, False))), strict=True):
        distances = _squared_distances(rows, generated, False)
        inside += int((distances < radii[:, None]).sum())
        covered += int((distances.amin(dim=1) < radii).sum())
    return inside / (k * len(generated)), covered / len(real)


def nearest(rows: Tensor, others: Tensor) -> tuple[Tensor, Tensor]:
    """Return the distance (float64) of each of ``rows (N, D)`` to the nearest of ``others (M, D)``, and its index."""
    other = others.double()
    parts = [_squared_distances(part.double(), other, False).min(dim=1) for part in rows.split(1024)]
    return torch.cat([part.values for part in parts]).sqrt(), torch.cat([part.indices for part in parts])


def spatial_features(maps: Any) -> Tensor:
    """Return sFID's features ``(B, 7 * H * W)`` of maps ``(B, C, H, W)``: 7 channels, flattened as (H, W, channel).

    On Inception's Mixed_6d.branch1x1 ``(B, 192, 17, 17)`` this is the ``(B, 2023)`` of ADM, whose graph is NHWC.
    """
    return torch.as_tensor(maps)[:, :7].permute(0, 2, 3, 1).flatten(start_dim=1)


def jackknife_error(estimates: Iterable[float]) -> float:
    """Return the delete-group jackknife standard error from the estimates without each of G groups (Wu, 1986)."""
    values = torch.tensor(list(estimates), dtype=torch.float64)
    return float((values.var(correction=0) * (len(values) - 1)).sqrt())


# A block of distances has all columns and as many rows as this allows. Columns are filled by ADM's 10,000.
_BLOCK_BYTES = 2**25
_COLUMNS = 10_000


def _blocks(rows: Tensor, columns: int) -> tuple[Tensor, ...]:
    return rows.split(max(1, _BLOCK_BYTES // (4 * columns)))


def _radii(rows: Tensor, k: int, adm_fp16: bool) -> Tensor:
    # The nearest of k + 1 neighbours is the row itself.
    nearest = (_squared_distances(part, rows, adm_fp16).topk(k + 1, largest=False) for part in _blocks(rows, len(rows)))
    return torch.cat([found.values[:, k] for found in nearest])


def _squared_distances(x: Tensor, y: Tensor, adm_fp16: bool) -> Tensor:
    distances = x.new_empty(len(x), len(y))
    for part, columns in zip(y.split(_COLUMNS), distances.split(_COLUMNS, dim=1), strict=True):
        rounded = _half_distances(x, part) if adm_fp16 else None
        if rounded is not None and rounded.isfinite().all():
            columns.copy_(rounded)
        else:
            columns.copy_(x @ part.T).mul_(-2)
            columns.add_(_squared_norms(x)[:, None]).add_(_squared_norms(part)).clamp_(min=0)
    return distances


def _squared_norms(rows: Tensor) -> Tensor:
    # In parts: square() of all makes another array of the size of rows.
    return torch.cat([part.square().sum(dim=1) for part in rows.split(1024)])


def _half_distances(x: Tensor, y: Tensor) -> Tensor:
    x, y = x.half(), y.half()
    norms_x, norms_y = (rows.square().float().sum(dim=1).half() for rows in (x, y))
    return (norms_x[:, None] - 2 * (x.float() @ y.float().T).half() + norms_y).clamp_(min=0)


def _kernel(x: Tensor, y: Tensor) -> Tensor:
    return (x @ y.T / x.shape[1] + 1) ** 3


def _pair(real: Any, generated: Any, needed: int, what: str) -> tuple[Tensor, Tensor]:
    real, generated = (torch.as_tensor(rows) for rows in (real, generated))
    if real.ndim != 2 or generated.ndim != 2 or real.shape[1] != generated.shape[1]:
        shapes = f"{tuple(real.shape)} and {tuple(generated.shape)}"
        raise UserError(f"{what}: features {shapes}; expected (N, D) and (M, D)")
    for name, rows in (("real", real), ("generated", generated)):
        if len(rows) < needed:
            raise UserError(f"{what}: {len(rows)} {name} samples; needs at least {needed}; give more images")
        if not all(part.isfinite().all() for part in rows.split(1024)):  # of all at once would copy them
            raise UserError(f"{what}: NaN or infinity in the {name} features; check the images they come from")
    dtype = torch.float64 if real.dtype == generated.dtype == torch.float64 else torch.float32
    return real.to(dtype), generated.to(dtype)


def _rounding(values: Tensor) -> float:
    return float(values.abs().max()) * len(values) * torch.finfo(values.dtype).eps if len(values) else 0.0


def _moments(mean: Any, covariance: Any) -> tuple[Tensor, Tensor]:
    mean, covariance = (torch.as_tensor(value).to("cpu", torch.float64) for value in (mean, covariance))
    if mean.ndim != 1 or covariance.shape != (len(mean), len(mean)):
        shapes = f"mean {tuple(mean.shape)} and covariance {tuple(covariance.shape)}"
        raise UserError(f"Frechet distance: {shapes}; expected (D,) and (D, D)")
    if not (mean.isfinite().all() and covariance.isfinite().all()):
        raise UserError("Frechet distance: NaN or infinity in the statistics; check the features they come from")
    return mean, covariance
