"""Streaming mean and covariance of features, in float64: any batches, any order, any number of processes."""

import math
from collections.abc import Iterator, Sequence
from functools import reduce

import torch
from torch import Tensor

from vit5gen.system.distributed import rank_and_world, sum_over_processes
from vit5gen.system.errors import UserError

GROUPS = 10
_STRIP = 256
_ROWS = 4096
_ROWS_A_GROUP = 64


class FeatureStatistics:
    """Count, mean and scatter of feature rows, updated and merged by the pairwise rule of Chan et al. (1983).

    Memory is constant, whatever the number of rows: the upper triangle of ``(dim, dim)`` float64, in strips. Rounding
    does not grow with a common offset of the features, because every batch is centred before it is squared.
    """

    def __init__(self, dim: int) -> None:
        self.dim = dim
        self.count = 0
        self._mean = torch.zeros(dim, dtype=torch.float64)
        size = sum(min(_STRIP, dim - i) * (dim - i) for i in range(0, dim, _STRIP))
        self._scatter = torch.zeros(size, dtype=torch.float64)

    @classmethod
    def from_moments(cls, mean: Tensor, covariance: Tensor, count: int) -> "FeatureStatistics":
        """Rebuild statistics from ``mean (D,)``, ``covariance (D, D)`` with ddof 1, and the count of rows."""
        result = cls(len(mean))
        result.count = count
        result._mean = mean.double().clone()
        for first, strip in result._strips():
            strip.copy_(covariance[first : first + len(strip), first:].double() * (count - 1))
        return result

    @classmethod
    def from_state(cls, dim: int, state: Tensor) -> "FeatureStatistics":
        """Rebuild statistics from their `state`."""
        result = cls(dim)
        count, result._mean, result._scatter = state.split([1, dim, len(result._scatter)])
        result.count = int(count)
        return result

    @property
    def state(self) -> Tensor:
        """All of it in one tensor: the count, the mean, and the strips of the scatter."""
        return torch.cat([torch.tensor([float(self.count)]), self._mean, self._scatter])

    def update(self, features: object) -> "FeatureStatistics":
        """Add the rows of ``features (B, dim)``; raise `UserError` on another shape or on NaN and infinity."""
        features = torch.as_tensor(features).detach()
        if features.ndim != 2 or features.shape[1] != self.dim:
            raise UserError(f"features: shape {tuple(features.shape)}; expected (B, {self.dim}); check the extractor")
        for part in features.split(_ROWS):  # in float64 all of 50,000 rows take 0.8 GB
            added = torch.empty(len(part) + 1, self.dim, dtype=torch.float64)
            rows = added[:-1].copy_(part)
            if len(rows):
                mean = rows.mean(dim=0)
                if not mean.isfinite().all() and (broken := ~rows.isfinite().all(dim=1)).any():
                    row = self.count + int(broken.nonzero()[0])
                    raise UserError(f"features: NaN or infinity in row {row}; check that image")
                rows -= mean
                self._add(len(rows), mean, added)
        return self

    def merge(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Add the rows that ``other`` has seen; the order of merges does not matter."""
        self._check(other)
        if other.count:
            self._scatter += other._scatter
            self._add(other.count, other._mean, torch.empty(1, self.dim, dtype=torch.float64))
        return self

    def without(self, other: "FeatureStatistics") -> "FeatureStatistics":
        """Return the statistics of the rows left when the rows of ``other``, all of them seen here, are taken out."""
        self._check(other)
        rest = FeatureStatistics(self.dim)
        rest.count = self.count - other.count
        if rest.count < 0:
            raise UserError(f"statistics: cannot take {other.count} rows out of {self.count}")
        if rest.count:
            rest._mean = self._mean + (self._mean - other._mean) * (other.count / rest.count)
            shift = other._mean - rest._mean
            rest._scatter = self._scatter - other._scatter
            rest._add_products(shift[None], -rest.count * other.count / self.count)
        return rest

    def all_reduce(self) -> "FeatureStatistics":
        """Sum over the processes of ``torch.distributed`` with their exact counts; without processes, do nothing."""
        if rank_and_world()[1] == 1:
            return self
        count, local_mean = self.count, self._mean
        total = sum_over_processes(torch.tensor([count], dtype=torch.float64))
        self.count = int(total)
        if self.count:
            self._mean = sum_over_processes(local_mean * (count / self.count))
            shift = local_mean - self._mean
            self._add_products(shift[None], count)
            self._scatter = sum_over_processes(self._scatter)
        return self

    @property
    def mean(self) -> Tensor:
        """Mean ``(dim,)`` in float64."""
        self._need(1)
        return self._mean

    @property
    def covariance(self) -> Tensor:
        """Unbiased covariance ``(dim, dim)`` in float64 (ddof 1)."""
        self._need(2)
        result = torch.empty(self.dim, self.dim, dtype=torch.float64)
        for first, strip in self._strips():
            result[first:, first : first + len(strip)] = strip.T
            result[first : first + len(strip), first:] = strip
        return result.div_(self.count - 1)

    def _strips(self) -> Iterator[tuple[int, Tensor]]:
        """Yield ``(first row, scatter[first row : first row + H, first row:])``, views of the flat storage."""
        start = 0
        for first in range(0, self.dim, _STRIP):
            shape = (min(_STRIP, self.dim - first), self.dim - first)
            yield first, self._scatter[start : start + math.prod(shape)].view(shape)
            start += math.prod(shape)

    def _add_products(self, rows: Tensor, weight: float = 1) -> None:
        for first, strip in self._strips():
            strip.addmm_(rows[:, first : first + len(strip)].T, rows[:, first:], alpha=weight)

    def _add(self, count: int, mean: Tensor, rows: Tensor) -> None:
        """Add centred rows and the spread between the means, in one product: it is written into the last row."""
        total = self.count + count
        shift = mean - self._mean
        rows[-1] = shift * (self.count * count / total) ** 0.5
        self._add_products(rows)
        self._mean = self._mean + shift * (count / total)
        self.count = total

    def _check(self, other: "FeatureStatistics") -> None:
        if other.dim != self.dim:
            raise UserError(f"statistics: {other.dim} dimensions against {self.dim}; use the same extractor for both")

    def _need(self, count: int) -> None:
        if self.count < count:
            raise UserError(f"statistics: {self.count} samples; expected at least {count}; give more images")


class Grouped:
    """The rows of a set dealt into groups by sample index, so that a delete-group jackknife needs no second pass.

    Rows wait until there are some for every group: however few are added, all of a scatter is read and written.
    """

    def __init__(self, dim: int, groups: int = GROUPS) -> None:
        self._groups = tuple(FeatureStatistics(dim) for _ in range(groups))
        self._waiting: list[tuple[Tensor, Tensor]] = []

    @classmethod
    def of(cls, groups: Sequence[FeatureStatistics]) -> "Grouped":
        """Return these groups, to which no rows are added."""
        result = cls(groups[0].dim, groups=0)
        result._groups = tuple(groups)
        return result

    def update(self, features: Tensor, indices: Tensor) -> None:
        """Add ``features (B, D)`` whose positions in the whole set are ``indices (B,)``."""
        self._waiting.append((features, indices))
        if sum(len(rows) for rows, _ in self._waiting) >= _ROWS_A_GROUP * len(self._groups):
            self._deal()

    def _deal(self) -> None:
        if self._waiting:
            features, indices = (torch.cat(parts) for parts in zip(*self._waiting, strict=True))
            self._waiting.clear()
            for residue, group in enumerate(self._groups):
                group.update(features[indices % len(self._groups) == residue])

    @property
    def groups(self) -> tuple[FeatureStatistics, ...]:
        """Statistics of each group: of the rows whose index leaves the group's number as remainder."""
        self._deal()
        return self._groups

    def all_reduce(self) -> None:
        for group in self.groups:
            group.all_reduce()

    def total(self) -> FeatureStatistics:
        """Statistics of all groups together."""
        return reduce(FeatureStatistics.merge, self.groups, FeatureStatistics(self.groups[0].dim))

    def leave_one_out(self, total: FeatureStatistics) -> Iterator[FeatureStatistics]:
        """Yield the statistics without each group that is not empty."""
        return (total.without(group) for group in self.groups if group.count)
