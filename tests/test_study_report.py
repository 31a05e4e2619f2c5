"""Tests of paired differences: intervals, correction and what is left out, against scipy and by hand."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

from vit5gen.lab.study.differences import find_differences
from vit5gen.lab.study.plan import Row, StudyConfig
from vit5gen.lab.study.tables import write_report


def make_rows(seeds: int, levels: dict[str, float], budget: str = "short") -> list[Row]:
    """Rows whose loss is a level's mean and noise that seeds share with an own part; the distance is its double."""
    rng = np.random.default_rng(0)
    shared = rng.normal(size=seeds)
    rows = []
    for level, mean in levels.items():
        for seed in range(seeds):
            loss = mean + shared[seed] + 0.1 * rng.normal()
            rows.append(
                Row.model_construct(
                    run=f"{level}, {budget}, seed {seed}",
                    levels={"model": level, "budget": budget},
                    seed=seed,
                    commit="0",
                    loss=1.0,
                    held_out_loss=loss,
                    distance=2 * loss,
                    metric="FD-X",
                    parameters=10,
                    steps=1,
                    training_flops=1,
                    n=7,
                    floor=1.0,
                    seconds=1.0,
                )
            )
    return rows


def study(seeds: int) -> StudyConfig:
    levels: dict[str, dict[str, Any]] = {"a": {}, "b": {}, "c": {}}
    return StudyConfig(
        base="x", seeds=list(range(seeds)), grid={"model": levels, "budget": {"short": {}}}, baseline={"model": "a"}
    )


def test_intervals_and_p_are_those_of_paired_t() -> None:
    rows = make_rows(6, {"a": 0.0, "b": 0.3, "c": 0.02})
    found = [d for d in find_differences(study(6), rows) if d.measure == "held_out_loss"]
    assert [(d.cell, d.baseline) for d in found] == [("b, short", "a, short"), ("c, short", "a, short")]
    raw = []
    for d, level in zip(found, "bc", strict=True):
        ours, base = ([row.held_out_loss for row in rows if row.levels["model"] == name] for name in (level, "a"))
        expected = stats.ttest_rel(ours, base)
        interval = expected.confidence_interval(0.95)
        assert (d.low, d.high) == pytest.approx((interval.low, interval.high))
        raw.append(expected.pvalue)
    # Holm: the smallest of two counts twice, the other once and no less than that.
    small, large = sorted(raw)
    assert sorted(d.p for d in found) == pytest.approx([2 * small, max(2 * small, large)])


def test_few_seeds_are_not_tested() -> None:
    found = find_differences(study(3), make_rows(3, {"a": 0.0, "b": 9.0}))
    assert len(found) == 2
    assert all(d.p is None and d.low > 0 for d in found)


def test_differences_by_rounding_alone_are_not_tested() -> None:
    rows = [row.model_copy(update={"held_out_loss": 0.1 * row.seed}) for row in make_rows(5, {"a": 0.0, "b": 0.0})]
    shifted = [
        row.model_copy(update={"held_out_loss": row.held_out_loss + 0.1}) if row.levels["model"] == "b" else row
        for row in rows
    ]
    (found,) = (d for d in find_differences(study(5), shifted) if d.measure == "held_out_loss")
    assert found.p is None


def test_only_seeds_that_both_have_count(tmp_path: Path) -> None:
    rows = make_rows(5, {"a": 0.0, "b": 1.0, "c": 2.0})
    rows = [row for row in rows if not (row.levels["model"] == "b" and row.seed == 4)]
    rows = [row for row in rows if not (row.levels["model"] == "c" and row.seed > 0)]
    found = find_differences(study(5), rows)
    assert [(d.cell, len(d.values)) for d in found] == [("b, short", 4)] * 2
    write_report(study(5), rows, tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert "| b, short - a, short | held-out loss |" in table
    assert "| 0 of 4 |" in table
    assert (tmp_path / "differences.png").stat().st_size > 1000


def test_a_plot_goes_with_its_differences(tmp_path: Path) -> None:
    (tmp_path / "differences.png").write_bytes(b"earlier")
    write_report(study(5), make_rows(5, {"a": 0.0}), tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["table.md"]


def test_budgets_are_not_mixed() -> None:
    rows = make_rows(3, {"a": 0.0, "b": 1.0}) + make_rows(3, {"b": 5.0}, budget="long")
    assert {d.cell for d in find_differences(study(3), rows)} == {"b, short"}
