"""What a study leaves beside its rows: ``table.md`` and figures."""

from pathlib import Path

import numpy as np

from vit5gen.lab.study.differences import BUDGETS, SCORES, Difference, find_curves, find_differences, find_verdicts
from vit5gen.lab.study.plan import Row, StudyConfig
from vit5gen.lab.study.plots import plot_curves, plot_differences, plot_trends
from vit5gen.lab.study.scaling import Trend, find_trends
from vit5gen.system.files import atomic, write_text


def write_report(study: StudyConfig, rows: list[Row], output: Path) -> None:
    """Write ``table.md``, and the figures for which there is something, of the rows so far."""
    found, curves = find_differences(study, rows), find_curves(study, rows)
    trends, last = find_trends(study, curves), max(row.steps for row in rows)
    final = [d for d in found if not d.budget or (d.budget, d.step) == ("steps", last)]
    tables = [_values(rows), _table(found) if found else "", _verdicts(study, found), _trends(study, trends)]
    write_text(output / "table.md", "\n\n".join(filter(None, tables)) + "\n")
    figures = {
        "differences": plot_differences(study, final, rows[0].metric) if final else None,
        "learning_curves": plot_curves(study, curves) if study.score_at and curves else None,
        "scaling": plot_trends(trends) if trends else None,
    }
    for name, figure in figures.items():
        if figure is None:
            (output / f"{name}.png").unlink(missing_ok=True)
        else:
            with atomic(output / f"{name}.png") as temporary:
                figure.savefig(temporary, format="png", dpi=120, bbox_inches="tight")


def _values(rows: list[Row]) -> str:
    """Table of the cells: mean ± standard deviation over seeds."""
    covered = all(row.coverage is not None for row in rows)
    names = f"held-out loss | {rows[0].metric} (N, floor)" + " | coverage" * covered
    lines = [f"| cell | seeds | parameters | steps | TFLOPs | {names} | s |", "|" + "---|" * (8 + covered)]
    for name, step in dict.fromkeys((row.cell, row.steps) for row in rows):
        own = [row for row in rows if (row.cell, row.steps) == (name, step)]
        first, (loss, distance) = own[0], (_spread(own, measure) for measure in ("held_out_loss", "distance"))
        cost = f"{first.parameters:,} | {first.steps} | {first.training_flops / 1e12:.1f}"
        quality = f"{loss} | {distance} ({first.n}, {first.floor:.1f})"
        quality += f" | {_spread(own, 'coverage')}" if covered else ""
        lines.append(f"| {name} | {len(own)} | {cost} | {quality} | {np.mean([row.seconds for row in own]):.0f} |")
    return "\n".join(lines)


def _spread(rows: list[Row], measure: str) -> str:
    values, (_, digits) = [getattr(row, measure) for row in rows], SCORES[measure]
    deviation = f" ± {np.std(values, ddof=1):.{digits}f}" if len(values) > 1 else ""
    return f"{np.mean(values):.{digits}f}{deviation}"


def _table(found: list[Difference]) -> str:
    scored = any(d.budget for d in found)
    at, corrected = (" | at equal", " | corrected") if scored else ("", "")
    lines = [f"| cell - baseline | measure{at} | difference [95 %]{corrected} | seeds below 0 | p (Holm) |"]
    lines.append("|" + "---|" * (5 + 2 * scored))
    for d in found:
        name, digits = SCORES[d.measure]
        mean, low, high, *wide = (f"{value:+.{digits}f}" for value in (d.mean, d.low, d.high, *d.corrected))
        below, p = sum(value < 0 for value in d.values), "" if d.p is None else f"{d.p:.2g}"
        at, corrected = (f" | {BUDGETS[d.budget]}, {d.step}", f" | [{', '.join(wide)}]") if scored else ("", "")
        cells = f"{d.cell} - {d.baseline} | {name}{at} | {mean} [{low}, {high}]{corrected}"
        lines.append(f"| {cells} | {below} of {len(d.values)} | {p} |")
    return "\n".join(lines)


def _verdicts(study: StudyConfig, found: list[Difference]) -> str:
    if not (verdicts := find_verdicts(study, found)):
        return ""
    lines = [f"| change | measure | verdict at equal steps, {study.score_at[-1]} |", "|---|---|---|"]
    lines += [f"| {change} | {SCORES[measure][0]} | {verdict} |" for (change, measure), verdict in verdicts.items()]
    return "\n".join(lines)


def _trends(study: StudyConfig, trends: list[Trend]) -> str:
    """Table of the laws: exponents, what the ratio of the losses does with size, and what it would be far beyond."""
    if not trends:
        return ""
    size = study.extrapolate_to or 0
    ratio = f"ratio: misfit | with ten times the parameters | extrapolated to {size:,} parameters"
    lines = [f"| losses | samples | exponent | of the baseline | {ratio} |", "|---|---|---|---|---|---|---|"]
    for one in trends:
        slopes = (one.slope(logs) for logs in (np.log(one.losses), np.log(one.reference)))
        exponents = (_interval(np.array([e.difference, *e.interval]) / np.log(10), 4) for e in slopes)
        far = (one.slope(one.ratios), one.at(one.ratios, size))
        ratios = (_interval(100 * np.expm1([e.difference, *e.interval]), 2) + " %" for e in far)
        name = f"{one.change} / {one.baseline} | {one.samples:,}"
        lines.append(f"| {' | '.join([name, *exponents, f'{100 * one.misfit:.2f} %', *ratios])} |")
    return "\n".join(lines)


def _interval(values: np.ndarray, digits: int) -> str:
    mean, low, high = (f"{value:+.{digits}f}" for value in values)
    return f"{mean} [{low}, {high}]"
