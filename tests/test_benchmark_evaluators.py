import importlib.util
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from vit5gen.lab.benchmark import evaluators
from vit5gen.lab.benchmark.engine import QUICK, Setting
from vit5gen.lab.benchmark.evaluators import EVALUATORS, measure, race_evaluators


def stand_in(monkeypatch: pytest.MonkeyPatch, distances: dict[str, float]) -> list[str]:
    """Let each evaluator take a second less than the one before, and return which one was asked."""
    asked: list[str] = []

    def fresh(function: Any, name: str, folder: Path, weights: Path | None) -> dict[str, float]:
        assert function is measure
        assert [len(list((folder / part).iterdir())) for part in "ab"] == [4, 4]
        assert Image.open(folder / "b" / "0003.png").size == (32, 32)
        asked.append(name)
        parts = {"network s": 3.0, "distance s": 1.0, "rest s": 0.5, "peak MB": 100.0}
        return {"seconds": 2.0 + 2 * list(EVALUATORS).index(name), "distance": distances[name], **parts}

    monkeypatch.setattr(evaluators, "fresh", fresh)
    monkeypatch.setattr(evaluators, "write_random_inception", lambda path, images: None)
    return asked


def test_evaluators_run_in_turn_and_disagreement_is_noted(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_in(monkeypatch, {"vit5gen": 5.0, "torch-fidelity": 5.001, "pytorch-fid": 6.0})
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name)
    setting = Setting(replace(QUICK, race_repetitions=2))
    rows = list(race_evaluators(setting))
    assert asked == 2 * list(EVALUATORS)
    assert [(row["peer"], row["ratio"]) for row in rows] == [("torch-fidelity", 2), ("pytorch-fid", 3)]
    assert rows[1]["more"]["images/s"] == 4
    assert rows[1]["more"]["peer's distance"] == 6
    assert [note for note in setting.notes if "distance" in note] == [
        "evaluation: pytorch-fid finds a distance of 6.0, not 5.0"
    ]


def test_a_peer_that_is_not_installed_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = stand_in(monkeypatch, dict.fromkeys(EVALUATORS, 5.0))
    monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    setting = Setting(QUICK)
    assert [row["peer"] for row in race_evaluators(setting)] == ["torch-fidelity"]
    assert asked == ["vit5gen", "torch-fidelity"]
    assert [note for note in setting.notes if "pip install pytorch-fid" in note]


@pytest.mark.slow
def test_evaluators_find_one_distance() -> None:
    setting = Setting(QUICK)
    for row in race_evaluators(setting):
        more = row["more"]
        assert more["distance"] == pytest.approx(more["peer's distance"], rel=1e-4)
        assert more["distance"] > 1
        parts = more["network s"] + more["distance s"] + more["rest s"]
        assert parts == pytest.approx(row["our_median"])
        assert more["peak MB"] > 50
    assert not [note for note in setting.notes if "finds a distance" in note]
