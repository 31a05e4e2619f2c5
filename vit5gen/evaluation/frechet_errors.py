"""Frechet distances as entries of a card: with count, floor, or the error of the finite sample."""

from scipy.stats import t as student_t

from vit5gen.evaluation.distances import FrechetReference, jackknife_error
from vit5gen.evaluation.metric import Score
from vit5gen.evaluation.statistics import FeatureStatistics, Grouped

CONFIDENCE = 0.95


def frechet_report(generated: FeatureStatistics, reference: FrechetReference, floor: float | None) -> Score:
    """Return a Frechet distance with its count and its floor, the distance of as many real images, as one entry."""
    return {
        "value": reference.distance(generated.mean, generated.covariance),
        "n": generated.count,
        "floor": floor,
    }


def frechet_with_error(samples: Grouped, reference: FrechetReference) -> Score:
    """Return the Frechet distance with its jackknife standard error and interval.

    The error is that of the finite sample around the mean distance of samples of this size. It does not hold the bias
    that a finite sample has: compare distances at the same count only.
    """
    total = samples.total()
    score: Score = {"value": reference.distance(total.mean, total.covariance), "n": total.count}
    counts = [group.count for group in samples.groups if group.count]
    if len(counts) < 2 or total.count - max(counts) < 2:
        return score | {"standard_error": None, "interval": None}
    rest = samples.leave_one_out(total)
    error = jackknife_error(reference.distance(part.mean, part.covariance) for part in rest)
    margin = error * float(student_t.ppf((1 + CONFIDENCE) / 2, len(counts) - 1))
    return score | {"standard_error": error, "interval": [score["value"] - margin, score["value"] + margin]}
