"""Scores of averages of one run over their lengths: which is the best by each score, and a plot of all."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from vit5gen.evaluation.metric import Score
from vit5gen.system.files import atomic


def find_best(models: Sequence[dict[str, Score]]) -> dict[str, int]:
    """Return for each score that differs, and tells which way is better, the number of the best of the ``models``."""
    found = {}
    for name, score in models[0].items():
        values = [model[name]["value"] for model in models]
        better = score.get("runs", [score])[0].get("better")
        if better and len(set(values)) > 1:
            found[name] = values.index(min(values) if better == "lower" else max(values))
    return found


def save_scan(path: Path, scan: dict[str, Any], title: str) -> None:
    """Plot each score of a card's ``scan`` over the lengths, with what its table has after the ±, and mark the best."""
    lengths, metrics = scan["ema_lengths"], scan["metrics"]
    figure = Figure(figsize=(7, 0.8 + 2 * len(metrics)), layout="constrained")
    panels = figure.subplots(len(metrics), sharex=True, squeeze=False)[:, 0]
    for axes, (name, scores) in zip(panels, metrics.items(), strict=True):
        values = [score["value"] for score in scores]
        errors = [score.get("deviation", score.get("standard_error")) or 0.0 for score in scores]
        axes.errorbar(lengths, values, yerr=errors, fmt="o-", color="C0", markersize=4, capsize=2)
        if name in scan["best"]:
            best = scan["best"][name]
            value = values[lengths.index(best)]
            axes.plot([best], [value], "*", color="C3", markersize=13, label=f"best: {value:.4g} at {best:g}")
            axes.legend(fontsize=8)
        axes.set_ylabel(name)
        axes.grid(alpha=0.3)
    panels[-1].set_xlabel("length of the average, as a part of the training")
    figure.suptitle(title, fontsize=10)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
