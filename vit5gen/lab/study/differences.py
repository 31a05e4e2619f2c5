"""Paired differences between the cells of a study, with their uncertainty, as a table and a plot."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from vit5gen.evaluation.significance import FEWEST_SEEDS, Estimate, holm
from vit5gen.lab.study.plan import Row, StudyConfig
from vit5gen.system.files import atomic, write_text

MEASURES = {"held_out_loss": ("held-out loss", 4), "distance": ("distance", 1)}  # name and digits in a table


@dataclass(frozen=True)
class Difference:
    """What a cell has more of ``measure`` than its baseline cell, seed by seed; ``low``..``high`` is 95 % (Student).

    reference: the mean of the baseline cell over these seeds.
    """

    cell: str
    baseline: str
    measure: str
    values: tuple[float, ...]
    low: float
    high: float
    reference: float
    p: float | None = None  # two-sided paired t-test, corrected over the study by Holm

    @property
    def mean(self) -> float:
        return float(np.mean(self.values))


def find_differences(study: StudyConfig, rows: list[Row]) -> list[Difference]:
    """Return, for both measures, the differences of cells that are one level away from a baseline.

    Pairs share the seed; rows without a partner are left out. p is Holm's over all tests of one measure, and None with
    fewer than five pairs.
    """
    found, seeds = [], sorted({row.seed for row in rows})
    for measure in MEASURES:
        values = {(tuple(row.levels.items()), row.seed): getattr(row, measure) for row in rows}
        family = []
        for levels in dict.fromkeys(levels for levels, _ in values):
            for axis, level in study.baseline.items():
                reference = tuple((dict(levels) | {axis: level}).items())
                shared = [seed for seed in seeds if {(levels, seed), (reference, seed)} <= values.keys()]
                if levels != reference and len(shared) > 1:
                    cell, baseline = (", ".join(dict(one).values()) for one in (levels, reference))
                    pairs = [values[levels, seed] - values[reference, seed] for seed in shared]
                    mean = float(np.mean([values[reference, seed] for seed in shared]))
                    family.append(_difference(cell, baseline, measure, pairs, mean))
        corrected = holm([d.p for d in family])
        found += [replace(d, p=p) for d, p in zip(family, corrected, strict=True)]
    return found


def _difference(cell: str, baseline: str, measure: str, pairs: list[float], reference: float) -> Difference:
    found = Estimate.of_pairs(pairs)
    p = found.p if len(pairs) >= FEWEST_SEEDS else None
    return Difference(cell, baseline, measure, tuple(pairs), *found.interval, reference, p)


def write_report(study: StudyConfig, rows: list[Row], output: Path) -> None:
    """Write ``table.md``, and ``differences.png`` if there are any, of the rows so far."""
    last = max(row.steps for row in rows)
    rows = [row for row in rows if row.steps == last or not study.score_at]
    found = find_differences(study, rows)
    write_text(output / "table.md", "\n\n".join([_values(rows), _table(found)]) + "\n")
    plot = output / "differences.png"
    if found:
        with atomic(plot) as temporary:
            _plot(study, found, rows[0].metric).savefig(temporary, format="png", dpi=120, bbox_inches="tight")
    else:
        plot.unlink(missing_ok=True)


def _values(rows: list[Row]) -> str:
    """Table of the cells: mean ± standard deviation over seeds."""
    lines = [
        f"| cell | seeds | parameters | steps | TFLOPs | held-out loss | {rows[0].metric} (N, floor) | s |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name in dict.fromkeys(row.cell for row in rows):
        own = [row for row in rows if row.cell == name]
        first, (loss, distance) = own[0], (_spread(own, measure) for measure in MEASURES)
        cost = f"{first.parameters:,} | {first.steps} | {first.training_flops / 1e12:.1f}"
        quality = f"{loss} | {distance} ({first.n}, {first.floor:.1f})"
        lines.append(f"| {name} | {len(own)} | {cost} | {quality} | {np.mean([row.seconds for row in own]):.0f} |")
    return "\n".join(lines)


def _spread(rows: list[Row], measure: str) -> str:
    values, (_, digits) = [getattr(row, measure) for row in rows], MEASURES[measure]
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def _table(found: list[Difference]) -> str:
    lines = ["| cell - baseline | measure | difference [95 %] | seeds below 0 | p (Holm) |", "|---|---|---|---|---|"]
    for d in found:
        name, digits = MEASURES[d.measure]
        mean, low, high = (f"{value:+.{digits}f}" for value in (d.mean, d.low, d.high))
        below, p = sum(value < 0 for value in d.values), "" if d.p is None else f"{d.p:.2g}"
        cells = f"{d.cell} - {d.baseline} | {name} | {mean} [{low}, {high}] | {below} of {len(d.values)} | {p}"
        lines.append(f"| {cells} |")
    return "\n".join(lines)


def _plot(study: StudyConfig, found: list[Difference], metric: str) -> Figure:
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
