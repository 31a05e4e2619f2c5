"""Tests of runs that are scored at several steps: equal budgets, corrections, verdicts and laws, in closed form."""

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from scipy import stats

from vit5gen.lab.study.differences import Difference, find_curves, find_differences, find_verdicts
from vit5gen.lab.study.plan import Row, StudyConfig
from vit5gen.lab.study.scaling import Trend, find_trends
from vit5gen.lab.study.tables import write_report

STEPS, SIZES = [300, 600, 1200], {"narrow": 10**4, "middle": 10**5, "wide": 10**6}
LEVERS = ("none", "helps", "harms", "mixed")
CHANGES = {  # of the loss, by lever and width
    "none": (0.0, 0.0, 0.0),
    "helps": (-0.3, -0.4, -0.5),
    "harms": (0.3, 0.2, 0.3),
    "mixed": (-0.3, 0.0, -0.3),
}
COSTS = {"none": (1.0, 1.0), "helps": (1.5, 2.0), "harms": (1.0, 0.8), "mixed": (1.0, 1.0)}  # FLOPs, seconds


def study(**changes: Any) -> StudyConfig:
    grid = {"lever": {lever: {} for lever in LEVERS}, "width": {width: {} for width in SIZES}}
    return StudyConfig.model_validate(
        {"base": "x", "grid": grid, "baseline": {"lever": "none"}, "score_at": STEPS, "replicate": "width"} | changes
    )


def loss(lever: str, width: str, seed: int, step: float) -> float:
    """A loss that is linear in the logarithm of the step, as it is taken to be between scores."""
    noise = np.random.default_rng([LEVERS.index(lever), SIZES[width], seed]).normal(0, 0.001)
    return 3 - 0.1 * math.log(step) + CHANGES[lever][list(SIZES).index(width)] + noise


def make_rows(value: Callable[[str, str, int, float], float] = loss, seeds: int = 3) -> list[Row]:
    def generate() -> Iterator[Row]:
        for seed in range(seeds):
            for lever in LEVERS:
                for width, parameters in SIZES.items():
                    for step in STEPS:
                        found = value(lever, width, seed, step)
                        yield Row.model_construct(
                            run=f"{lever}, {width}, seed {seed}",
                            levels={"lever": lever, "width": width},
                            seed=seed,
                            steps=step,
                            parameters=parameters,
                            training_flops=int(1000 * COSTS[lever][0] * step),
                            seconds=COSTS[lever][1] * step / 10,
                            held_out_loss=found,
                            distance=100 * found,
                            coverage=1 - found / 10,
                            metric="FD-X",
                            n=7,
                            floor=1.0,
                            settings=SimpleNamespace(training=SimpleNamespace(global_batch_size=32)),
                        )

    return list(generate())


def select(found: list[Difference], cell: str, budget: str, measure: str = "held_out_loss") -> dict[int, Difference]:
    return {d.step: d for d in found if (d.cell, d.budget, d.measure) == (cell, budget, measure)}


@pytest.mark.parametrize(
    ("lever", "budget", "ratio", "steps"),
    [
        ("helps", "steps", 1, STEPS),
        ("helps", "training_flops", 1.5, [600, 1200]),  # at 300 steps' FLOPs it has made 200, before its first score
        ("helps", "seconds", 2, [600, 1200]),
        ("harms", "training_flops", 1, STEPS),
        ("harms", "seconds", 0.8, [300, 600]),  # at 1200 steps' seconds it would have made 1500, after its last
    ],
)
def test_budgets_are_equal_and_nothing_is_extrapolated(lever: str, budget: str, ratio: float, steps: list[int]) -> None:
    found = select(find_differences(study(), make_rows()), f"{lever}, wide", budget)
    assert list(found) == steps
    for step, d in found.items():
        expected = [loss(lever, "wide", s, step / ratio) - loss("none", "wide", s, step) for s in range(3)]
        assert d.baseline == "none, wide"
        assert d.values == pytest.approx(expected)


def test_a_run_that_waited_for_its_machine_does_not_count_as_slow() -> None:
    rows = make_rows()
    waited = [row.model_copy(update={"seconds": row.seconds * (1 + 9 * (row.seed == 1))}) for row in rows]
    assert find_differences(study(), waited) == find_differences(study(), rows)


def test_each_of_several_baselines_has_its_own_verdict_and_law() -> None:
    """Both together are better than one of them alone, and worse than the other alone."""
    grid = {"lever": {"none": {}, "helps": {}}, "optimizer": {"a": {}, "b": {}}, "width": {key: {} for key in SIZES}}
    plan = study(grid=grid, baseline={"lever": "none", "optimizer": "a"}, extrapolate_to=10**8)
    rows = [
        row.model_copy(
            update={
                "levels": {"lever": row.levels["lever"], "optimizer": optimizer, "width": row.levels["width"]},
                "held_out_loss": row.held_out_loss + (optimizer == "b") * (0.2 + 0.001 * row.seed),
            }
        )
        for row in make_rows()
        for optimizer in grid["optimizer"]
        if row.levels["lever"] in grid["lever"]
    ]
    found = find_verdicts(plan, find_differences(plan, rows))
    assert found["helps, b - none, b", "held_out_loss"] == "recommended"
    assert found["helps, b - helps, a", "held_out_loss"] == "worse"
    trends = find_trends(plan, find_curves(plan, rows))
    pairs = [("none, b", "none, a"), ("helps, a", "none, a"), ("helps, b", "none, b"), ("helps, b", "helps, a")]
    assert [(trend.change, trend.baseline) for trend in trends] == [pair for pair in pairs for _ in STEPS]
    assert {trend.losses.shape for trend in trends} == {(3, 3)}


def test_corrected_intervals_are_bonferronis_over_the_cells_of_a_baseline() -> None:
    found = find_differences(study(), make_rows())
    for measure, sign in (("held_out_loss", 1), ("coverage", -0.1)):
        d = select(found, "helps, narrow", "steps", measure)[600]
        values = [sign * (loss("helps", "narrow", seed, 600) - loss("none", "narrow", seed, 600)) for seed in range(3)]
        for (low, high), level in (((d.low, d.high), 0.95), (d.corrected, 1 - 0.05 / 3)):
            expected = stats.ttest_1samp(values, 0).confidence_interval(level)
            assert (low, high) == pytest.approx((expected.low, expected.high))


def test_verdicts_need_every_width_after_correction() -> None:
    found = find_verdicts(study(), find_differences(study(), make_rows()))
    words = {"helps": "recommended", "harms": "worse", "mixed": "not shown here"}
    measures = ("held_out_loss", "distance", "coverage")
    assert found == {(f"{lever} - none", measure): word for measure in measures for lever, word in words.items()}

    # An interval of one difference at a time without 0 does not suffice.
    def noisy(lever: str, width: str, seed: int, step: float) -> float:
        return 1 + (lever == "helps") * (-1 + 0.25 * (seed - 1))

    rows = [row for row in make_rows(noisy) if row.levels["lever"] in ("none", "helps")]
    d = select(find_differences(study(), rows), "helps, wide", "steps")[1200]
    assert d.high < 0 < d.corrected[1]
    assert set(find_verdicts(study(), find_differences(study(), rows)).values()) == {"not shown here"}

    # What is not measured from every seed has no verdict; a run that lacks its last score does not count at all.
    for lacking in ({"helps, wide, seed 1", "helps, wide, seed 2"}, {"helps, wide, seed 2"}):
        rows = [row for row in make_rows() if row.run not in lacking or row.steps < 1200]
        found = find_differences(study(), rows)
        assert find_verdicts(study(), found)["helps - none", "held_out_loss"] == "unfinished"
        assert {len(d.values) for d in select(found, "helps, wide", "steps").values()} <= {2}


def by_law(lever: str, width: str, seed: int, step: float) -> float:
    """Power laws of the parameters; each seed has exponents of its own, and the factors depend on the step."""
    exponent = {"none": -0.10, "helps": -0.12 + 0.001 * seed}.get(lever, 0.0)
    return (5 if lever == "none" else 4.8) * SIZES[width] ** exponent * step**-0.05


def test_laws_are_recovered() -> None:
    rows = make_rows(by_law)
    plan = study(extrapolate_to=10**8)
    trends = [trend for trend in find_trends(plan, find_curves(plan, rows)) if trend.change == "helps"]
    assert [(trend.samples, trend.baseline) for trend in trends] == [(32 * step, "none") for step in STEPS]
    slopes = [math.log(10) * (-0.02 + 0.001 * seed) for seed in range(3)]
    far = [math.log(4.8 / 5) + 8 * slope for slope in slopes]
    for trend in trends:
        for estimate, values in ((trend.slope(trend.ratios), slopes), (trend.at(trend.ratios, 10**8), far)):
            expected = stats.ttest_1samp(values, 0).confidence_interval(0.95)
            assert estimate.difference == pytest.approx(np.mean(values))
            assert estimate.interval == pytest.approx((expected.low, expected.high))
        assert trend.slope(np.log(trend.reference)).difference == pytest.approx(-0.1 * math.log(10))
        assert trend.misfit < 1e-12


def test_a_law_that_bends_is_told() -> None:
    sizes = np.array([1e4, 1e5, 1e6])
    losses = np.exp(np.array([[0.0, 0.3, 0.0], [0.0, 0.3, 0.0]]))
    assert Trend("a", "b", 1, sizes, losses, np.ones((2, 3))).misfit == pytest.approx(0.2)


def test_sizes_that_are_not_all_there_have_no_law() -> None:
    plan, rows = study(extrapolate_to=10**8), make_rows(by_law)
    some = [row for row in rows if row.levels != {"lever": "helps", "width": "middle"}]
    assert "helps" not in {trend.change for trend in find_trends(plan, find_curves(plan, some))}
    assert not find_trends(study(), find_curves(plan, rows))


def test_the_report_shows_all_of_it(tmp_path: Path) -> None:
    plan = study(extrapolate_to=10**8)
    write_report(plan, make_rows(by_law), tmp_path)
    values, differences, verdicts, laws = (tmp_path / "table.md").read_text().strip().split("\n\n")
    mean = np.mean([by_law("helps", "wide", seed, 600) for seed in range(3)])
    assert f"| helps, wide | 3 | 1,000,000 | 600 | 0.0 | {mean:.4f} ±" in values
    assert "| helps, wide - none, wide | held-out loss | FLOPs, 600 |" in differences
    assert "| helps - none | held-out loss | recommended |" in verdicts
    change, far = (
        f"{100 * math.expm1(x):+.2f} [" for x in (-0.019 * math.log(10), math.log(0.96) - 0.019 * math.log(1e8))
    )
    assert (
        f"| helps / none | 9,600 | -0.1190 [-0.1215, -0.1165] | -0.1000 [-0.1000, -0.1000] | 0.00 % | {change}" in laws
    )
    assert f"| {far}" in laws
    assert "extrapolated to 100,000,000 parameters" in laws
    for name in ("differences", "learning_curves", "scaling"):
        assert (tmp_path / f"{name}.png").stat().st_size > 1000
    write_report(plan, make_rows(by_law)[:1], tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]
