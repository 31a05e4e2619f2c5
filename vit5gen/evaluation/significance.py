"""Whether a difference is more than chance: its interval, its p, Holm's correction, and how much data decides it."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from scipy import stats

from vit5gen.evaluation.distances import CONFIDENCE, jackknife_error

FEWEST_SEEDS = 5  # below, intervals are shown but no test is made: three seeds settle nothing
POWER = 0.8


@dataclass(frozen=True)
class Estimate:
    """A difference, its standard error, and the degrees of freedom of Student's t that the error has."""

    difference: float
    error: float
    freedom: float

    @classmethod
    def of_pairs(cls, differences: Sequence[float]) -> "Estimate":
        """Return the mean of the differences of two or more pairs."""
        return cls(float(np.mean(differences)), float(stats.sem(differences)), len(differences) - 1)

    @classmethod
    def of_groups(cls, difference: float, a: Sequence[float], b: Sequence[float], paired: bool) -> "Estimate":
        """Return b less a, from the scores of both without each group of images (delete-group jackknife).

        Of pairs the jackknife is that of the difference; else errors add in squares, with Welch's degrees of freedom.
        """
        if paired:
            return cls(difference, jackknife_error(y - x for x, y in zip(a, b, strict=True)), len(a) - 1)
        squares = [jackknife_error(values) ** 2 for values in (a, b)]
        spread = sum(square**2 / (len(values) - 1) for square, values in zip(squares, (a, b), strict=True))
        return cls(difference, math.sqrt(sum(squares)), sum(squares) ** 2 / spread if spread else len(a) + len(b) - 2)

    def margin(self, level: float = 1 - CONFIDENCE) -> float:
        """Return how far the difference must be from 0 to have a two-sided p of ``level``."""
        return self.error * float(stats.t.isf(level / 2, self.freedom))

    @property
    def interval(self) -> tuple[float, float]:
        """The 95 % interval of Student's t."""
        return self.difference - self.margin(), self.difference + self.margin()

    @cached_property
    def p(self) -> float | None:
        """Two-sided, None where the error is of rounding alone, so that no test can be made."""
        if self.margin() <= 1e-9 * abs(self.difference):
            return None
        return float(2 * stats.t.sf(abs(self.difference) / self.error, self.freedom))

    @property
    def detectable(self) -> float:
        """The difference that a test with this error finds in 80 % of repetitions."""
        return self.margin() + self.error * float(stats.t.ppf(POWER, self.freedom))

    def count_to_decide(self, count: int, level: float) -> int:
        """Return for how many images instead of ``count`` p would be ``level``; the difference must not be 0.

        The error falls with the square root of the number of images. A repetition decides it every other time.
        """
        return math.ceil(count * (self.margin(level) / self.difference) ** 2)


def holm(ps: Sequence[float | None]) -> list[float | None]:
    """Return each p corrected for the tests of its family (Holm, Scand. J. Statist. 6, 1979); None stays None."""
    tested = sorted((p, i) for i, p in enumerate(ps) if p is not None)
    corrected, largest = list(ps), 0.0
    for rank, (p, i) in enumerate(tested):
        largest = max(largest, min(1.0, (len(tested) - rank) * p))
        corrected[i] = largest
    return corrected
