"""The figures of a study: differences, and of runs scored at several steps learning curves and trends with size."""

import itertools

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, LogLocator

from vit5gen.lab.study.differences import BUDGETS, MEASURES, Curves, Difference, name_of
from vit5gen.lab.study.plan import StudyConfig
from vit5gen.lab.study.scaling import Trend


def plot_differences(study: StudyConfig, found: list[Difference], metric: str) -> Figure:
    """Draw a row for each difference, in per cent of its baseline, so that studies and measures compare.

    A row has the seeds, their mean and its interval, and tells the number of seeds and p.
    """
    # A panel for each measure, with a row for each difference.
    panels = [[d for d in found if d.measure == measure] for measure in MEASURES]
    baseline = ", ".join(f"{axis}: {level}" for axis, level in study.baseline.items())
    figure = Figure(figsize=(11, 1.4 + 0.34 * len(panels[0])), layout="constrained")
    for axes, panel, title in zip(figure.subplots(1, 2, sharey=True), panels, ("held-out loss", metric), strict=True):
        for height, d in enumerate(reversed(panel)):
            values, mean, low, high = (100 * np.array(x) / d.reference for x in (d.values, d.mean, d.low, d.high))
            axes.plot(values, [height] * len(d.values), "o", color="0.65", markersize=4)
            axes.errorbar(mean, height, xerr=[[mean - low], [high - mean]], fmt="o", color="C0", capsize=3)
            note = f"{len(d.values)} seeds" + ("" if d.p is None else f", p = {d.p:.2g}")
            axes.annotate(note, (1.01, height), xycoords=("axes fraction", "data"), va="center", fontsize=8)

        # The baseline is the line at 0; the rows have names at the left of the first panel.
        axes.axvline(0, color="0.3", linewidth=0.8)
        several = len(study.baseline) > 1  # else the cell tells with which it is compared
        names = [f"{d.cell} - {d.baseline}" if several else d.cell for d in reversed(panel)]
        axes.set_yticks(range(len(panel)), names)
        axes.set_ylim(-0.6, len(panel) - 0.4)
        axes.set_title(title, fontsize=11)
        axes.set_xlabel(f"difference to the baseline ({baseline}), in % of it\n(95 % interval; left of 0 is better)")
        axes.locator_params(axis="x", nbins=6)
        axes.grid(axis="x", alpha=0.3)
    return figure


def plot_curves(study: StudyConfig, curves: Curves) -> Figure:
    """Draw the mean held-out loss of the seeds over steps and FLOPs, with a panel for each level of `replicate`."""
    panels = list(study.grid[study.replicate]) if study.replicate else [""]
    figure = Figure(figsize=(1 + 4.5 * len(panels), 7.5), layout="constrained")
    grid = figure.subplots(2, len(panels), sharey="col", squeeze=False)
    for (line, budget), (column, panel) in itertools.product(zip(grid, BUDGETS, strict=False), enumerate(panels)):
        axes = line[column]
        cells = [levels for levels, _ in curves if not panel or (study.replicate, panel) in levels]
        for levels in dict.fromkeys(cells):
            own = [
                [(getattr(row, budget), row.held_out_loss) for row in curves[key]] for key in curves if key[0] == levels
            ]
            axes.plot(*np.mean(own, axis=0).T, "o-", markersize=4, label=name_of(levels, study.replicate))
        axes.set(xscale="log", title=panel, xlabel=BUDGETS[budget], ylabel="held-out loss")
        axes.grid(alpha=0.3)
        if budget == "steps":
            axes.set_xticks(study.score_at, study.score_at)
        else:
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter(EngFormatter())
        axes.minorticks_off()
    grid[0, -1].legend(fontsize=8)
    return figure


def plot_trends(trends: list[Trend]) -> Figure:
    """Draw the losses with their laws, and beside them each seed's ratio in per cent, its law, and the 95 % of that."""
    figure = Figure(figsize=(12, 4.5), layout="constrained")
    left, right = figure.subplots(1, 2)
    for number, one in enumerate(trends):
        color, many = f"C{number}", np.geomspace(one.parameters.min(), one.parameters.max(), 50)
        for name, losses, style in ((one.change, one.losses, "s--"), (one.baseline, one.reference, "o-")):
            left.plot(one.parameters, losses.mean(axis=0), style[0], color=color, markersize=4)
            label = f"{name}, {one.samples:,} samples"
            left.plot(
                many, [np.exp(one.at(np.log(losses), n).difference) for n in many], style[1:], color=color, label=label
            )
        at = [one.at(one.ratios, n) for n in many]
        mean, low, high = 100 * np.expm1([(e.difference, *e.interval) for e in at]).T
        right.plot(one.parameters, 100 * np.expm1(one.ratios).T, "o", color=color, markersize=4)
        right.plot(many, mean, color=color, label=f"{one.change} / {one.baseline}, {one.samples:,} samples")
        right.fill_between(many, low, high, color=color, alpha=0.15, linewidth=0)
    left.set(yscale="log", title="held-out loss")
    left.yaxis.set_major_formatter("{x:.1f}")
    left.yaxis.set_minor_formatter("{x:.1f}")
    right.set(title="difference of the held-out loss, in % of the baseline's")
    for axes in (left, right):
        axes.set(xscale="log", xlabel="parameters, in millions")
        axes.set_xticks(trends[0].parameters, [f"{n / 1e6:.2f}" for n in trends[0].parameters])
        axes.xaxis.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    return figure
