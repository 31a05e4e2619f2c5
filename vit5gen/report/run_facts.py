"""What the folder of a run tells of it: its numbers, a verdict in words, and what a reader should be warned of."""

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median
from typing import Any

from vit5gen.report.chart import shown
from vit5gen.report.history import floor_note, gap_note, held_out_curves, newest_distance

_FEW = 1000  # images, whose distance is mostly bias
_CLOSE, _FAR = 1.2, 2.0  # times the floor
_RISE = 1.02  # times the best, which noise alone hardly makes
_RECENT = 10  # lines of the log that tell the present speed
_UNITS = (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 172_800), ("days", 86400, math.inf))


@dataclass(frozen=True)
class RunFacts:
    """A run as its folder tells it; config: sections of keys and values as recorded.

    lines, evaluations: of log.jsonl and metrics.json.  saved: steps of its checkpoints.  pictures: folder of the small
    ones; told: what is kept beside these, empty for a run of an earlier version.  samples: its samples.png.  diverged:
    whether it ended for that reason.
    """

    path: Path
    config: dict[str, dict[str, Any]]
    lines: Sequence[dict[str, Any]]
    evaluations: Sequence[dict[str, Any]]
    saved: Sequence[int]
    pictures: Path
    samples: Path
    told: dict[str, Any] = field(default_factory=dict)
    diverged: bool = False

    @cached_property
    def last(self) -> int:
        return int(self.config["training"]["num_steps"])

    @cached_property
    def batch(self) -> int:
        return int(self.config["training"]["global_batch_size"])

    @cached_property
    def step(self) -> int:
        """The newest step that the log or an evaluation tells of."""
        return max((one["step"] for one in (*self.lines, *self.evaluations)), default=0)

    @cached_property
    def metric(self) -> str | None:
        """The name of the newest distance."""
        newest = newest_distance(self.evaluations)
        return newest and newest[0]

    @cached_property
    def distances(self) -> dict[int, dict[str, Any]]:
        """The reports of `metric` by step."""
        return self.reports.get(self.metric or "", {})

    @cached_property
    def reports(self) -> dict[str, dict[int, dict[str, Any]]]:
        """The reports of each distance by step; an extractor that was changed has left several."""
        names = dict.fromkeys(name for one in self.evaluations for name, told in one.items() if isinstance(told, dict))
        return {name: {one["step"]: one[name] for one in self.evaluations if name in one} for name in names}

    @cached_property
    def best(self) -> int:
        """The step of the lowest of the `distances`."""
        return min(self.distances, key=lambda step: self.distances[step]["value"])

    @cached_property
    def held_out(self) -> list[dict[int, float]]:
        return [curve for curve in held_out_curves(self.lines, self.evaluations) if curve]

    @cached_property
    def speed(self) -> float | None:
        """Images a second, of late."""
        speeds = [y for _, y in self.series("images_per_second")[-_RECENT:]]
        return median(speeds) if speeds else None

    @cached_property
    def seconds(self) -> float:
        """The time that the steps of the log took, without evaluations."""
        total, before = 0.0, 0.0
        for step, speed in self.series("images_per_second"):
            total, before = total + (step - before) * self.batch / speed, step
        return total

    @property
    def to_come(self) -> str:
        """Time that is left, as far as it is known."""
        left = (self.last - self.step) * self.batch
        return "nothing" if not left else f"{left:,} images" if not self.speed else duration(left / self.speed)

    def series(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of the lines of the log that have a finite value of this name."""
        found = ((line["step"], line.get(key)) for line in self.lines)
        return [(step, y) for step, y in found if isinstance(y, int | float) and math.isfinite(y)]


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    unit, size, _ = next(one for one in _UNITS if seconds < one[2])
    return f"{seconds / size:.{int(size > 1 and seconds < 10 * size)}f} {unit}"


def with_error(report: dict[str, Any]) -> str:
    """Return the value of a score, and its error where that is known."""
    error = report.get("deviation", report.get("standard_error"))
    return shown(report.get("value")) + (f" ± {shown(error)}" if error else "")


def verdict(run: RunFacts) -> str:
    """Return in words how good a run is: its newest distance against its floor and its best."""
    state = f"Step {run.step:,} of {run.last:,}"
    if run.metric is None:
        return f"{state}; {'no distance was measured' if run.evaluations else 'not evaluated yet'}."
    *before, newest = run.distances
    report, best = run.distances[newest], run.distances[run.best]["value"]
    value, floor = report["value"], report.get("floor")
    told = f"{state}. {run.metric} is {with_error(report)} at step {newest:,} (N = {report['n']:,})"
    if floor:
        ratio = value / floor
        how = "below" if ratio < 1 else "close to" if ratio < _CLOSE else "far from" if ratio > _FAR else "above"
        told += f", {how} its floor: {ratio:.2f} times the {shown(floor)} of as many held-out images"
    if before and run.best == newest:
        told += f"; the best so far, {1 - value / run.distances[before[-1]]['value']:.1%} below the one before"
    elif value > _RISE * best:
        told += f"; it was better at step {run.best:,}: {shown(best)}"
    return f"{told}."


def find_warnings(run: RunFacts) -> Iterator[str]:
    """Yield what the numbers of a run should not be read without."""
    if run.diverged:
        yield "the run stopped because loss or gradient was not finite in too many steps in a row"
    if skipped := max((line.get("skipped") or 0 for line in run.lines), default=0):
        yield f"{skipped:,} steps were skipped because loss or gradient was not finite"
    if run.step < run.last:
        yield f"not finished: step {run.step:,} of {run.last:,}; if it stopped, run the same command again to resume"
    notes = [floor_note(list(run.evaluations[:i]), one) for i, one in enumerate(run.evaluations)]
    yield from filter(None, [gap_note(run.lines, run.evaluations, later=True), *notes])
    std = next((line["latents_std"] for line in run.lines if line.get("latents_std")), 1.0)
    if not 1 / 3 <= std <= 3:
        yield f"latents have a standard deviation of {std:.3g}, not 1: check vae.name, or set vae.normalize: measured"
    report = list(run.distances.values())[-1] if run.distances else {"n": _FEW, "value": 0}
    if report["n"] < _FEW:
        yield f"N = {report['n']:,} is small, most of the distance is bias: compare it at equal N, and with its floor"
    if report["value"] < (report.get("floor") or 0):
        yield "samples score better than held-out images, as copies would: look at the nearest training images"
