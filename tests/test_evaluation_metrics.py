import math

import numpy as np
import pytest
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric

from vit5gen.errors import UserError
from vit5gen.evaluation import FeatureStatistics, frechet_distance


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def moments(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    return rows.mean(0), torch.cov(rows.T)


def test_commuting_gaussians_match_the_closed_form() -> None:
    basis = torch.linalg.qr(normal(64, 64))[0]
    first, second = normal(64, seed=1).exp(), normal(64, seed=2).exp()
    mean1, mean2 = normal(64, seed=3), normal(64, seed=4)
    expected = (mean1 - mean2).square().sum() + (first.sqrt() - second.sqrt()).square().sum()
    found = frechet_distance(mean1, basis * first @ basis.T, mean2, (basis * second @ basis.T).numpy())
    assert found == pytest.approx(float(expected), rel=1e-9)


def test_singular_covariances_match_the_nuclear_norm_of_the_rows() -> None:
    # tr (S1^1/2 S2 S1^1/2)^1/2 is the nuclear norm of X1 X2^T / sqrt((n1 - 1)(n2 - 1)), exact for any rank.
    first, second = normal(20, 200), normal(9, 200, seed=1) * 3 + 1
    centred = [rows - rows.mean(0) for rows in (first, second)]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / math.sqrt(19 * 8)
    (mean1, cov1), (mean2, cov2) = moments(first), moments(second)
    expected = (mean1 - mean2).square().sum() + cov1.trace() + cov2.trace() - 2 * cross
    assert frechet_distance(mean1, cov1, mean2, cov2) == pytest.approx(float(expected), rel=1e-9)
    assert frechet_distance(mean2, cov2, mean1, cov1) == pytest.approx(float(expected), rel=1e-9)
    assert abs(frechet_distance(mean1, cov1, mean1, cov1)) < 1e-9


def test_distance_is_invariant_to_rotation_and_scales_with_the_square() -> None:
    first, second = normal(500, 16), normal(400, 16, seed=1) * 1.3 + 0.2
    rotation = torch.linalg.qr(normal(16, 16, seed=2))[0]
    distance = frechet_distance(*moments(first), *moments(second))
    rotated = frechet_distance(*moments(first @ rotation), *moments(second @ rotation))
    scaled = frechet_distance(*moments(first * 3), *moments(second * 3))
    assert rotated == pytest.approx(distance, rel=1e-9)
    assert scaled == pytest.approx(9 * distance, rel=1e-9)


def test_distance_equals_torch_fidelity_on_the_same_features() -> None:
    first, second = normal(900, 128), normal(800, 128, seed=1) * 1.1 + 0.1
    theirs = fid_statistics_to_metric(
        fid_features_to_statistics(first), fid_features_to_statistics(second), verbose=False
    )["frechet_inception_distance"]
    ours = [FeatureStatistics(128).update(rows) for rows in (first, second)]
    found = frechet_distance(ours[0].mean, ours[0].covariance, ours[1].mean, ours[1].covariance)
    assert found == pytest.approx(theirs, rel=1e-6)


def test_bad_statistics_are_errors_of_one_line() -> None:
    mean, cov = moments(normal(50, 4))
    with pytest.raises(UserError, match="NaN"):
        frechet_distance(mean * np.nan, cov, mean, cov)
    with pytest.raises(UserError, match="4 dimensions against 3"):
        frechet_distance(mean, cov, mean[:3], cov[:3, :3])
    with pytest.raises(UserError, match=r"expected \(D,\) and \(D, D\)"):
        frechet_distance(mean, cov[:2], mean, cov)
