"""What a run's numbers show over its steps: ``loss.png``."""

from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from vit5gen.report.history import Entries, held_out_curves, logged, newest_distance
from vit5gen.system.files import atomic

_FEW = 10  # points


def _line(points: Sequence[object]) -> str:
    """Return how a curve is drawn: few points, of which one makes no line, with markers."""
    return "o-" if len(points) < _FEW else "-"


def save_curves(path: Path, lines: Entries, evaluations: Entries, checkpoints: Sequence[int] = ()) -> None:
    """Plot both losses, the distance against its floor, and the learning rate over steps.

    checkpoints: steps of those on the disk, which are marked beside those that the lines tell of; so are resumes, with
    the keys that changed.
    """
    distance = newest_distance(evaluations)
    rates = [(line["step"], line["learning_rate"]) for line in lines if "learning_rate" in line]
    heights = [3.0, *([2.0] if distance else []), *([1.0] if rates else [])]
    figure = Figure(figsize=(8, 1.6 * sum(heights)), layout="constrained")
    axes_of = figure.subplots(len(heights), sharex=True, height_ratios=heights, squeeze=False)
    panels: list[Axes] = axes_of[:, 0].tolist()

    # Losses. What the first steps lose is many times the rest, and would flatten it.
    if shown := logged(lines):
        style, label = _line(shown), "training (weights, the run's times)"
        panels[0].plot(*zip(*shown, strict=True), style, color="C0", linewidth=1, markersize=4, label=label)
    for number, curve in enumerate(filter(None, held_out_curves(lines, evaluations))):
        label = "_" if number else "held-out (average of the weights, uniform times)"
        panels[0].plot(list(curve), list(curve.values()), "o-", color="C1", markersize=4, label=label)
        shown += curve.items()
    if late := [loss for step, loss in shown if step >= 0.05 * shown[-1][0]]:
        panels[0].set_ylim(top=1.2 * max(late))
    panels[0].set_ylabel("loss")

    if distance:
        name = distance[0]
        measured = [(one["step"], one[name]["value"], one[name].get("floor")) for one in evaluations if name in one]
        steps, values, floors = zip(*measured, strict=True)
        panels[1].plot(steps, values, "o-", color="C2", markersize=4, label=name)
        if floors[-1] is not None:
            label = f"floor: held-out pictures score {floors[-1]:.4g}"
            panels[1].axhline(floors[-1], color="0.4", linestyle="--", linewidth=1, label=label)
        panels[1].set(ylabel="distance", ylim=(0, None))
    if rates:
        panels[-1].plot(*zip(*rates, strict=True), _line(rates), color="0.3", linewidth=1, markersize=4)
        panels[-1].set(ylabel="learning rate", ylim=(0, None))
    panels[-1].set_xlabel("step")
    panels[-1].xaxis.set_major_locator(MaxNLocator("auto", steps=[1, 2, 2.5, 5, 10], integer=True, min_n_ticks=1))

    # Events: checkpoints at the foot, resumes across all panels, changed keys beside them.
    foot = panels[0].get_xaxis_transform()
    saved = sorted({*checkpoints, *(line["checkpoint"] for line in lines if "checkpoint" in line)})
    if saved:
        panels[0].plot(saved, [0.02] * len(saved), "^", color="0.3", markersize=5, transform=foot, label="checkpoint")
    for number, line in enumerate(line for line in lines if "resumed" in line):
        at = line["resumed"]
        for axes in panels:
            name = "resumed" if axes is panels[0] and not number else "_"  # which the legend leaves out
            axes.axvline(at, color="C3", linestyle=":", linewidth=1, label=name)
        text = "\n".join(f" {key} " for key in line.get("changed", []))
        side = "right" if 2 * at > lines[-1]["step"] else "left"
        place = (at, 0.72 - 0.1 * (number % 5))
        panels[0].text(*place, text, ha=side, va="top", fontsize=7, color="C3", transform=foot, parse_math=False)
    for axes in panels:
        axes.grid(alpha=0.3)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="upper right" if axes is panels[0] else "best", fontsize=8)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
