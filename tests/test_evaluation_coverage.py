"""Density and coverage, Frechet distances of classes and of infinitely many samples: closed forms, other formulas."""

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
from scipy.spatial.distance import cdist
from test_evaluation_card import pictures, write_folder, write_npz

from vit5gen.cli import main
from vit5gen.evaluation import FrechetReference, density_coverage, distances, frechet_distance, load_extractor
from vit5gen.evaluation.distances import frechet_at_infinity, frechet_of_rows
from vit5gen.evaluation.evaluation_card import evaluation_card
from vit5gen.evaluation.reference import open_reference, save_statistics
from vit5gen.evaluation.samples import Samples, open_image_set
from vit5gen.system.errors import UserError


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def naive(real: torch.Tensor, generated: torch.Tensor, k: int) -> tuple[float, float]:
    radii = np.sort(cdist(real, real), axis=1)[:, k]
    between = cdist(real, generated)
    inside = between < radii[:, None]
    return inside.sum() / (k * len(generated)), (between.min(axis=1) < radii).mean()


@pytest.mark.parametrize("sizes", [(40, 40), (60, 33), (31, 80)])
@pytest.mark.parametrize("k", [1, 5])
def test_density_and_coverage_match_their_definition(sizes: tuple[int, int], k: int, monkeypatch) -> None:
    real, generated = normal(sizes[0], 4), normal(sizes[1], 4, seed=1) * 1.3 + 0.5
    expected = naive(real, generated, k)
    assert density_coverage(real, generated, k) == pytest.approx(expected, rel=1e-12)
    assert expected[1] > 0
    monkeypatch.setattr(distances, "_BLOCK_BYTES", 4 * 7 * sizes[1])  # 7 rows in a block
    monkeypatch.setattr(distances, "_COLUMNS", 11)
    assert density_coverage(real.float(), generated.float(), k) == pytest.approx(expected, rel=1e-12)


def test_density_and_coverage_match_prdc() -> None:
    prdc = pytest.importorskip("prdc")
    real, generated = normal(200, 8), normal(150, 8, seed=1) * 0.8 + 0.1
    theirs = prdc.compute_prdc(real.numpy(), generated.numpy(), nearest_k=5)
    assert density_coverage(real, generated) == pytest.approx((theirs["density"], theirs["coverage"]), rel=1e-12)


def test_density_and_coverage_of_equal_shifted_and_collapsed_sets() -> None:
    real = normal(50, 3)
    # Itself and k - 1 neighbours lie strictly within each ball: k points of k.
    assert density_coverage(real, real.clone(), 4) == (1, 1)
    assert density_coverage(real, real + 100) == (0, 0)
    # On a line of whole numbers the second neighbour is at distance 1, but 2 for the ends: 0 and 2 see their neighbour.
    line = torch.arange(9, dtype=torch.float64)[:, None]
    collapsed = torch.full((20, 1), 1.0, dtype=torch.float64)
    assert density_coverage(line, collapsed, 2) == (1, 2 / 9)  # the balls of 0 and 1; that of 2 ends at 1, strictly
    # An outlier among the real ones has a large ball, which recall would count and coverage does not fill.
    many = torch.cat([line, torch.tensor([[1000.0]], dtype=torch.float64)])
    assert density_coverage(many, torch.full((20, 1), 500.0, dtype=torch.float64), 2) == (0.5, 0.1)


@pytest.mark.parametrize("sizes", [(9, 20), (40, 12), (60, 50)])
def test_the_distance_of_rows_is_that_of_their_moments(sizes: tuple[int, int]) -> None:
    x, y = normal(sizes[0], 16) * 2 + 1, normal(sizes[1], 16, seed=1)
    expected = frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert frechet_of_rows(x, y) == pytest.approx(expected, rel=1e-9)


def test_the_distance_at_infinity_is_the_line_through_distances_of_many_sizes() -> None:
    rows, dim = normal(2000, 6) + 0.1, 6
    reference = FrechetReference(torch.zeros(dim), torch.eye(dim))
    value, found = frechet_at_infinity(reference, rows, 50)
    order = torch.randperm(2000, generator=torch.Generator().manual_seed(0)).numpy()
    counts, expected = np.linspace(50, 2000, 15).round().astype(int), []
    for count in counts:
        part = rows.numpy()[order[:count]]
        covariance = np.cov(part, rowvar=False)
        trace = np.trace(covariance + np.eye(dim) - 2 * scipy.linalg.sqrtm(covariance).real)
        expected.append((part.mean(0) ** 2).sum() + trace)
    np.testing.assert_allclose(found, expected, rtol=1e-9)
    slope = np.cov(1 / counts, expected)[0, 1] / np.var(1 / counts, ddof=1)
    assert value == pytest.approx(np.mean(expected) - slope * np.mean(1 / counts), rel=1e-9)


def test_the_distance_at_infinity_is_free_of_the_bias_of_few_samples() -> None:
    reference = FrechetReference(torch.zeros(12), torch.eye(12))
    values = [frechet_at_infinity(reference, normal(800, 12, seed=seed), 100) for seed in range(20)]
    at_infinity, at_all = (
        torch.tensor(one, dtype=torch.float64) for one in ([v for v, _ in values], [f[-1] for _, f in values])
    )
    print(f"of equal distributions: {at_all.mean():.4f} at 800, {at_infinity.mean():.4f} at infinity")
    assert at_all.mean() > 20 * at_all.std() / 20**0.5
    assert at_infinity.mean().abs() < at_all.mean() / 5


def labelled(folder: Path, seed: int, counts: dict[str, int]) -> Path:
    for i, (name, count) in enumerate(counts.items()):
        write_folder(folder / name, pictures(count, seed=seed + i))
    return folder


def of_classes(samples: Samples, reference: Path, **options) -> dict:
    extractor = load_extractor("colours")
    card = evaluation_card([samples], open_reference(reference, extractor, 7), extractor, ["class-fd"], **options)
    return card["metrics"]["FD-Colours-per-class"]


def test_the_distance_of_each_class_is_that_of_its_images(tmp_path: Path) -> None:
    counts = {"apple": 6, "bee": 9, "car": 1, "dog": 5}
    real, made = labelled(tmp_path / "real", 0, counts | {"owl": 4}), labelled(tmp_path / "made", 9, counts)
    found = of_classes(open_image_set(made, 4), real)
    extractor, expected = load_extractor("colours"), {}
    for name in ("apple", "bee", "dog"):
        rows = [
            extractor(torch.cat([images for _, images in open_image_set(one / name, 3).chunks()]))
            for one in (made, real)
        ]
        x, y = (one.pooled.double() for one in rows)
        expected[name] = frechet_distance(x.mean(0), torch.cov(x.T), y.mean(0), torch.cov(y.T))
    assert found["worst"] == pytest.approx(expected, rel=1e-6)
    assert list(found["worst"].values()) == sorted(found["worst"].values(), reverse=True)
    assert found["value"] == pytest.approx(sum(expected.values()) / 3, rel=1e-6)
    facts = {"n": 21, "classes": 3, "left_out": 2, "fewest_samples": 5, "fewest_references": 5}
    assert {name: found[name] for name in facts} == facts

    # The same from an archive and from statistics, and by number where names are unknown.
    archive = shutil.make_archive(str(tmp_path / "made"), "zip", made)
    assert of_classes(open_image_set(archive, 4), real) == found
    save_statistics(open_reference(real, extractor, 7), extractor, tmp_path / "real.safetensors")
    assert of_classes(open_image_set(made, 4), tmp_path / "real.safetensors") == found
    files = [write_npz(tmp_path / f"{i}.npz", pictures(9, seed=i), arr_1=np.arange(9) % 3) for i in (0, 1)]
    assert of_classes(open_image_set(files[0], 4), files[1])["worst"].keys() == {"0", "1", "2"}


def test_classes_that_do_not_fit_are_one_line(tmp_path: Path) -> None:
    real, made = (labelled(tmp_path / name, 0, {"apple": 3, "bee": 3}) for name in ("real", "made"))
    with pytest.raises(UserError, match=r"metric class-fd: the reference has no classes; use class folders"):
        of_classes(open_image_set(made, 4), write_npz(tmp_path / "plain.npz", pictures(9)))
    with pytest.raises(UserError, match=r"metric class-fd: the samples have no classes"):
        of_classes(open_image_set(tmp_path / "plain.npz", 4), real)
    one = labelled(tmp_path / "one", 0, {"apple": 3})
    with pytest.raises(UserError, match=r"1 \(apple\) and 2 \(apple, bee\); 1 with two images in both, expected at l"):
        of_classes(open_image_set(one, 4), real)


def test_the_command_computes_what_is_named_and_density_by_default(tmp_path: Path, capsys) -> None:
    real, made = (write_npz(tmp_path / f"{seed}.npz", pictures(24, seed=seed)) for seed in (0, 1))
    words = [
        "evaluate",
        str(made),
        "--reference",
        str(real),
        "--extractor",
        "colours",
        "--output",
        str(tmp_path / "card"),
    ]
    found = []
    for metrics in ([], ["--metrics", "dc: {k: 3}", "fd-infinity: {smallest: 8}"]):
        with pytest.raises(SystemExit) as stopped:
            main([*words, *metrics])
        assert stopped.value.code == 0
        found.append(json.loads((tmp_path / "card").read_text())["metrics"])
    assert {"density-Colours", "coverage-Colours"} < found[0].keys()
    assert found[0]["density-Colours"]["k"] == 5
    assert found[1].keys() == {"density-Colours", "coverage-Colours", "FD-Colours-infinity"}
    assert len(found[1]["FD-Colours-infinity"]["distances"]) == 15
    for metric, advice in (
        ("dc: {k: 24}", "dc: 24 samples; needs at least 25"),
        ("fd-infinity", "needs at least 5014"),
    ):
        with pytest.raises(SystemExit) as stopped:
            main([*words, "--metrics", metric])
        assert stopped.value.code == 2
        assert advice in capsys.readouterr().err
