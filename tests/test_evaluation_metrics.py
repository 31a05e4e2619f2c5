import math
import time
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.linalg
import torch
from torch_fidelity.metric_fid import fid_features_to_statistics, fid_statistics_to_metric
from torch_fidelity.metric_isc import isc_features_to_metric
from torch_fidelity.metric_kid import kid_features_to_metric
from torch_fidelity.metric_prc import calculate_precision_recall_full

from vit5gen.evaluation import (
    FeatureStatistics,
    FrechetReference,
    distances,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
    spatial_features,
)
from vit5gen.evaluation.distances import ScoreSums, frechet_with_error
from vit5gen.evaluation.metric import METRICS, available
from vit5gen.evaluation.statistics import Grouped
from vit5gen.system.errors import UserError


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


def test_inception_score_of_uniform_is_1_and_of_balanced_one_hot_is_the_number_of_classes() -> None:
    assert inception_score(torch.full((30, 10), 0.1)) == pytest.approx(1, rel=1e-6)
    assert inception_score(np.eye(10)[np.arange(200) % 10]) == pytest.approx(10, rel=1e-9)


def test_inception_score_takes_consecutive_splits_and_a_shorter_last_one() -> None:
    probabilities = normal(25, 6).mul(2).softmax(dim=1)
    expected = []
    for part in probabilities.split(10):
        kl = (part * (part.log() - part.mean(0).log())).sum(1).mean()
        expected.append(float(kl.exp()))
    assert inception_score(probabilities, split_size=10) == pytest.approx(sum(expected) / 3, rel=1e-12)
    sums = ScoreSums(25, 6, split_size=10)
    for indices in torch.randperm(25, generator=torch.Generator().manual_seed(0)).split(4):
        sums.update(probabilities[indices], indices)
    assert sums.value() == pytest.approx(sum(expected) / 3, rel=1e-12)


def test_inception_score_equals_torch_fidelity_with_equal_splits() -> None:
    logits = normal(60, 12).float() * 3
    theirs = isc_features_to_metric(logits, splits=3, shuffle=False)["inception_score_mean"]
    assert inception_score(logits.double().softmax(dim=1), split_size=20) == pytest.approx(theirs, rel=1e-6)


def test_kernel_distance_equals_torch_fidelity() -> None:
    real, generated = normal(300, 32), normal(250, 32, seed=1) * 1.1 + 0.1
    settings = {"kid_subsets": 20, "kid_subset_size": 100, "rng_seed": 2020, "verbose": False, "kid_kernel": "poly"}
    theirs = kid_features_to_metric(
        generated, real, **settings, kid_kernel_poly_degree=3, kid_kernel_poly_gamma=None, kid_kernel_poly_coef0=1
    )["kernel_inception_distance_mean"]
    ours, error = kernel_distance(real, generated, subsets=20, subset_size=100)
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert error > 0


def test_error_of_the_kernel_distance_is_the_spread_over_fresh_draws() -> None:
    results = [
        kernel_distance(normal(200, 8, seed=2 * i), normal(200, 8, seed=2 * i + 1) + 0.3, 1, 200) for i in range(100)
    ]
    values, errors = torch.tensor(results).T
    assert errors.mean() == pytest.approx(float(values.std()), rel=0.2)


def test_precision_and_recall_of_equal_and_of_far_sets() -> None:
    rows = normal(50, 8)
    for adm_fp16 in (False, True):
        assert precision_recall(rows, rows.clone(), adm_fp16=adm_fp16) == (1, 1)
        assert precision_recall(rows, rows + 100, adm_fp16=adm_fp16) == (0, 0)


def test_precision_and_recall_have_their_sides() -> None:
    wide, narrow = normal(400, 2), normal(300, 2, seed=1) * 0.1
    precision, recall = precision_recall(wide, narrow)
    assert precision > 0.99
    assert recall < 0.2


@pytest.mark.parametrize("block_bytes", [2**27, 4 * 130 * 7])
def test_precision_and_recall_equal_torch_fidelity_in_any_blocks(monkeypatch, block_bytes: int) -> None:
    monkeypatch.setattr(distances, "_BLOCK_BYTES", block_bytes)
    real, generated = normal(150, 16).float(), normal(130, 16, seed=1).float() * 0.9 + 0.3
    theirs = calculate_precision_recall_full(generated, real)
    assert precision_recall(real, generated) == pytest.approx(theirs, abs=1e-7)
    assert 0 < theirs[0] < 1


def test_adm_fp16_rounds_distances_and_falls_back_where_they_overflow() -> None:
    # In float16 the distances 2048 and 2048.5 are equal, so the farther point counts as inside.
    real = torch.tensor([[0.0, 0.0], [math.sqrt(2048.0), 0.0]])
    generated = torch.tensor([[0.0, 0.0], [0.0, math.sqrt(2048.5)]])
    assert precision_recall(real, generated, k=1)[0] == 0.5
    assert precision_recall(real, generated, k=1, adm_fp16=True)[0] == 1
    large = normal(40, 4).float() * 1000
    assert precision_recall(large, large + 200, adm_fp16=True) == precision_recall(large, large + 200)


def test_spatial_features_are_seven_channels_in_rows_columns_channels() -> None:
    maps = torch.arange(2 * 192 * 17 * 17).view(2, 192, 17, 17)
    flat = spatial_features(maps)
    assert flat.shape == (2, 2023)
    assert torch.equal(flat[1].view(17, 17, 7)[3, 5], maps[1, :7, 3, 5])


def test_jackknife_interval_covers_the_mean_distance_of_fresh_draws() -> None:
    dim, count, repetitions = 64, 2000, 200
    generator = torch.Generator().manual_seed(0)
    scale = torch.linspace(0.5, 1.5, dim, dtype=torch.float64)
    reference = FrechetReference(torch.zeros(dim), torch.eye(dim))
    scores = []
    for _ in range(repetitions):
        grouped = Grouped(dim)
        rows = torch.randn(count, dim, generator=generator, dtype=torch.float64) * scale + 0.1
        grouped.update(rows, torch.arange(count))
        scores.append(frechet_with_error(grouped, reference))
    truth = sum(score["value"] for score in scores) / repetitions
    covered = sum(score["interval"][0] <= truth <= score["interval"][1] for score in scores) / repetitions
    spread = torch.tensor([score["value"] for score in scores]).std()
    error = sum(score["standard_error"] for score in scores) / repetitions
    print(f"coverage {covered:.3f}, mean standard error {error:.4f}, spread of fresh draws {spread:.4f}")
    assert covered >= 0.9
    assert error == pytest.approx(float(spread), rel=0.25)


def test_features_of_half_precision_may_sum_to_more_than_it_holds() -> None:
    rows = (normal(20, 2048) + 40).half()
    assert precision_recall(rows, rows) == (1, 1)
    assert kernel_distance(rows, rows, subset_size=20)[0] < 0


def test_scores_are_errors_of_one_line_on_bad_features() -> None:
    rows = normal(20, 4)
    broken = rows.clone()
    broken[3, 1] = float("nan")
    with pytest.raises(UserError, match="NaN or infinity in the generated features"):
        precision_recall(rows, broken)
    with pytest.raises(UserError, match="3 real samples; needs at least 4"):
        precision_recall(rows[:3], rows)
    with pytest.raises(UserError, match="20 real samples; needs at least 1000"):
        kernel_distance(rows, rows)
    for wrong in (rows.abs(), torch.tensor([[1.5, -0.5]]), torch.full((2, 2), torch.nan)):
        with pytest.raises(UserError, match="rows that do not sum to 1"):
            inception_score(wrong)
    with pytest.raises(UserError, match="k = 0"):
        precision_recall(rows, rows, k=0)
    for options in ({"subsets": 0, "subset_size": 9}, {"subset_size": 1}):
        with pytest.raises(UserError, match="expected at least 1 of at least 2"):
            kernel_distance(rows, rows, **options)


@pytest.mark.slow
def test_distance_at_2048_dimensions_is_three_times_faster_than_a_matrix_root() -> None:
    first, second = (torch.cov(normal(4096, 2048, seed=seed).T) for seed in (0, 1))
    start = time.perf_counter()
    ours = frechet_distance(torch.zeros(2048), first, torch.zeros(2048), second)
    middle = time.perf_counter()
    root = scipy.linalg.sqrtm(first.numpy() @ second.numpy())
    end = time.perf_counter()
    expected = float(first.trace() + second.trace()) - 2 * float(np.trace(root).real)
    print(f"ours {middle - start:.1f} s, scipy.linalg.sqrtm {end - middle:.1f} s")
    assert ours == pytest.approx(expected, rel=1e-6)
    assert 3 * (middle - start) < end - middle


def test_a_metric_tells_what_this_machine_lacks_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    lacking = {"scorer-weights.pt": "download it"}
    monkeypatch.setattr(METRICS.get("kid"), "missing", lambda self: lacking, raising=False)
    reference, extractor = SimpleNamespace(rows=torch.zeros(2, 2)), SimpleNamespace(num_classes=0)
    with pytest.raises(UserError, match=r"metric kid: it needs scorer-weights\.pt; download it"):
        available(["kid"], reference, extractor)
    lacking.clear()
    assert list(available(["kid"], reference, extractor)[0]) == ["kid"]
