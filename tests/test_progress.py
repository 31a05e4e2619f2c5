"""Progress: a bar on a terminal, plain lines in a log; what they tell, and when."""

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from tiny_run import run

from vit5gen.system.progress import Progress


class Clock:
    """A clock that a test moves."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1000.0
        monkeypatch.setattr(time, "monotonic", lambda: self.now)


def count(clock: Clock, seconds: float, **options: Any) -> None:
    with Progress("encode", 25, "image", **options) as progress:
        for i in range(25):
            clock.now += seconds
            progress.set_postfix({"loss": i}, refresh=False)
            progress.update()


def test_a_log_gets_a_plain_line_at_each_multiple_and_at_the_end(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stands for transformers' and accelerate's tests of `logging_steps` without a progress bar."""
    count(Clock(monkeypatch), 0.5, every=10)
    assert capsys.readouterr().err.splitlines() == [
        "encode: 10/25 images, loss=9, 2 images/s, time left 00:07",
        "encode: 20/25 images, loss=19, 2 images/s, time left 00:02",
        "encode: 25/25 images, loss=24, 2 images/s, time left 00:00",
    ]


def test_other_work_tells_of_itself_once_a_minute(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    count(clock, 1)
    assert capsys.readouterr().err == ""
    count(clock, 6)
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(",")[0] for line in lines] == ["encode: 10/25 images", "encode: 20/25 images"]
    count(clock, 6, silent=True)
    assert capsys.readouterr().err == ""


def test_pauses_do_not_count_and_a_resumed_count_has_its_own_rate(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = Clock(monkeypatch)
    with Progress("train", 30, "step", initial=10, every=5) as progress:
        for i in range(10, 20):
            clock.now += 1
            progress.update()
            if i == 12:  # as an evaluation between two steps, which takes three minutes
                for _ in range(3):
                    clock.now += 60
                    progress.set_postfix_str("2/6 images")
                progress.set_postfix_str("")
                progress.unpause()
    lines = capsys.readouterr().err.splitlines()
    paused = [line for line in lines if "2/6 images" in line]
    assert paused == ["train: 13/30 steps, 2/6 images, 1 steps/s, time left 00:17"] * 3
    assert lines[-1] == "train: 20/30 steps, 1 steps/s, time left 00:10"


def test_a_terminal_gets_a_bar(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    with Progress("train", 3, "step", every=1) as progress:
        for _ in range(3):
            progress.update()
    shown = capsys.readouterr().err
    assert "\rtrain:   0%|" in shown
    assert "3/3 [00:0" in shown
    assert "time left" not in shown


def test_a_training_tells_step_loss_rate_and_time_left_at_log_every(
    config_file: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stands for accelerate's examples run by its CI, whose logs hold one line of each `logging_steps`."""
    assert run(config_file, tmp_path / "run", training__num_steps=8, training__log_every=3) == 0
    shown = capsys.readouterr().err
    lines = [line for line in shown.splitlines() if line.startswith("train: ")]
    assert [re.findall(r"train: (\d+)/8 steps, loss=[\d.]+, ", line) for line in lines] == [["3"], ["6"], ["8"]]
    assert all(re.search(r"images/s=[\d.e+]+, [\d.e+]+ steps/s, time left \d\d:\d\d$", line) for line in lines)
    assert "|" not in shown
    assert "\r" not in shown
