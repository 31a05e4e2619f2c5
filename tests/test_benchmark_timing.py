import numpy as np
import pytest

from vit5gen.lab.benchmark.engine import Sizes, race, ratio


def test_measures_in_turn_and_drops_the_warm_up(monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []
    clock = iter([0, 100, 100, 300, 0, 1, 1, 3, 3, 5, 5, 9])
    monkeypatch.setattr("time.perf_counter", lambda: next(clock))
    pairs = race(lambda: calls.append("a"), lambda: calls.append("b"), Sizes(repetitions=2, warm_up=1))
    assert calls == ["a", "b"] * 3
    assert pairs == [(1, 2), (2, 4)]


def test_a_constant_ratio_is_known_exactly_whatever_disturbs_both() -> None:
    assert ratio([(1.0, 1.5), (7.0, 10.5), (2.0, 3.0)]) == (1.5, 1.5, 1.5)


def test_an_outlier_does_not_move_the_ratio() -> None:
    assert ratio([(1.0, 2.0)] * 14 + [(1.0, 500.0)])[0] == 2


def test_the_interval_covers_the_true_ratio() -> None:
    rng, covered = np.random.default_rng(0), 0
    for _ in range(200):
        ours, theirs = np.exp(0.2 * rng.standard_normal((2, 15))) * [[1], [1.3]]
        _, low, high = ratio(list(zip(ours, theirs, strict=True)))
        covered += low <= 1.3 <= high
    print(f"the true ratio lies in {covered / 2} % of 200 intervals of 95 %")
    assert covered >= 180
