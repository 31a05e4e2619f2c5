"""What the log and the evaluations of a run tell: curves, and what a reader should be warned of."""

import math
from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise
from statistics import fmean
from typing import Any

_CLEAR_RISE = 0.02  # of the held-out loss above its minimum; with the same noise and times it hardly fluctuates
_RECENT = 10  # lines of the log whose mean tells whether the training loss falls
Entries = Sequence[dict[str, Any]]


def held_out_curves(lines: Entries, evaluations: Entries) -> list[dict[int, float]]:
    """Return the held-out loss by step, in order, from lines of the log and evaluations: a curve for each held-out set.

    The set has changed where another checksum stands in the log: losses before and after are not comparable.
    """
    found = {
        one["step"]: one["held_out_loss"] for one in [*evaluations, *lines] if one.get("held_out_loss") is not None
    }
    checksums = [(line["step"], line["held_out_checksum"]) for line in lines if "held_out_checksum" in line]
    starts = [step for (_, before), (step, now) in pairwise(checksums) if before != now]
    curves: list[dict[int, float]] = [{} for _ in range(len(starts) + 1)]
    for step in sorted(found):
        if math.isfinite(found[step]):
            curves[bisect_right(starts, step)][step] = found[step]
    return curves


def newest_distance(evaluations: Entries) -> tuple[str, int, dict[str, Any]] | None:
    """Return the name, the step and the report of the newest distance, None where there is none."""
    reports = ((name, one["step"], value) for one in reversed(evaluations) for name, value in one.items())
    return next((report for report in reports if isinstance(report[2], dict)), None)


def gap_note(lines: Entries, evaluations: Entries, later: bool = False) -> str | None:
    """Say that held-out pictures lose while training ones gain, at the first step at which that shows; else None.

    later: say it at any later step as well.
    """
    points, best = held_out_curves(lines, evaluations)[-1], -1
    steps, losses = zip(*logged(lines), strict=True) if logged(lines) else ((), ())
    for step, loss in points.items():
        if best < 0 or loss < points[best]:
            best = step
        elif loss > (1 + _CLEAR_RISE) * points[best]:
            ends = bisect_right(steps, best), bisect_right(steps, step)
            before, after = (losses[max(0, end - _RECENT) : end] for end in ends)
            if before and fmean(after) < fmean(before):
                rise = f"rose from {points[best]:.4g} at step {best} to {loss:.4g} at step {step}"
                advice = "the model begins to memorise; use fewer steps, more pictures or a smaller model"
                note = f"the held-out loss {rise}, while the training loss falls: {advice}"
                return note if later or step == max(points) else None
    return None


def logged(lines: Entries) -> list[tuple[int, float]]:
    """Return step and training loss of the lines that have one."""
    return [(line["step"], line["loss"]) for line in lines if line.get("loss") is not None]


def floor_note(earlier: list[dict[str, Any]], entry: dict[str, Any]) -> str | None:
    """Return a note if the last of the ``earlier`` evaluations with ``entry``'s distance has another floor."""
    for name in entry.keys() - {"step", "held_out_loss"}:
        before = next((old for old in reversed(earlier) if name in old), entry)
        was, now = before[name]["floor"], entry[name]["floor"]
        if was != now and (None in (was, now) or not math.isclose(was, now, rel_tol=1e-3)):
            changed = "the real images or the evaluation settings have changed"
            what = f"the floor is {now}, but was {was} at step {before['step']}: {changed}"
            return f"{name}: {what}; distances before and after are not comparable"
    return None
