import numpy as np
import pytest
import torch

from vit5gen.evaluation import FeatureStatistics
from vit5gen.system.errors import UserError


@pytest.fixture
def rows() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    mix = torch.randn(12, 12, generator=generator, dtype=torch.float64)
    return torch.randn(300, 12, generator=generator, dtype=torch.float64) @ mix + 3


def test_moments_equal_numpy_for_any_batches_and_any_order(rows: torch.Tensor) -> None:
    for sizes in ([300], [1] * 300, [7, 100, 0, 93, 100]):
        for order in (torch.arange(300), torch.randperm(300, generator=torch.Generator().manual_seed(1))):
            statistics = FeatureStatistics(12)
            for batch in rows[order].split(sizes):
                statistics.update(batch)
            assert statistics.count == 300
            np.testing.assert_allclose(statistics.mean, rows.numpy().mean(0), rtol=1e-12)
            np.testing.assert_allclose(
                statistics.covariance, np.cov(rows.numpy(), rowvar=False), rtol=1e-11, atol=1e-12
            )


def test_merges_do_not_depend_on_their_order(rows: torch.Tensor) -> None:
    parts = [FeatureStatistics(12).update(part) for part in rows.split([10, 150, 0, 1, 139])]
    for order in ([0, 1, 2, 3, 4], [3, 2, 4, 0, 1]):
        merged = FeatureStatistics(12)
        for index in order:
            merged.merge(parts[index])
        assert merged.count == 300
        torch.testing.assert_close(merged.covariance, torch.cov(rows.T), rtol=1e-11, atol=1e-12)


def test_taking_rows_out_undoes_their_merge(rows: torch.Tensor) -> None:
    total, part = FeatureStatistics(12).update(rows), FeatureStatistics(12).update(rows[:120])
    rest = total.without(part)
    assert rest.count == 180
    torch.testing.assert_close(rest.mean, rows[120:].mean(0), rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(rest.covariance, torch.cov(rows[120:].T), rtol=1e-11, atol=1e-12)


def test_a_large_offset_costs_no_precision(rows: torch.Tensor) -> None:
    statistics = FeatureStatistics(12)
    for batch in (rows + 1e7).split(13):
        statistics.update(batch)
    torch.testing.assert_close(statistics.covariance, torch.cov(rows.T), rtol=1e-7, atol=1e-7)


def test_bad_features_are_named(rows: torch.Tensor) -> None:
    statistics = FeatureStatistics(12).update(rows)
    broken = rows[:5].clone()
    broken[3, 2] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity in row 303"):
        statistics.update(broken)
    with pytest.raises(UserError, match=r"\(B, 12\)"):
        statistics.update(torch.zeros(4, 11))
    with pytest.raises(UserError, match="at least 2"):
        _ = FeatureStatistics(12).update(np.ones((1, 12))).covariance
    with pytest.raises(UserError, match="same extractor"):
        statistics.merge(FeatureStatistics(13))
