"""What a page tells of runs, one or several side by side: verdict, samples, curves, cost, settings, what to do next."""

import math
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from statistics import median
from typing import Any

import yaml

from vit5gen.report.chart import Chart, Curve, draw, shown
from vit5gen.report.history import floor_note, gap_note, held_out_curves, logged, newest_distance
from vit5gen.report.page import code, data_uri, folded, section, table
from vit5gen.report.pictures import step_picture

_FEW = 1000  # images, whose distance is mostly bias
_CLOSE, _FAR = 1.2, 2.0  # times the floor
_RISE = 1.02  # times the best, which noise alone hardly makes
_PICTURES = 60  # of all runs of a page
_RECENT = 10  # lines of the log that tell the present speed
_SECONDS = (("s", 1, 90), ("min", 60, 90 * 60), ("h", 3600, 48 * 3600), ("days", 86400, math.inf))
Finite = int | float


@dataclass(frozen=True)
class RunFacts:
    """A run as its folder tells it; config: sections of keys and values as recorded.

    lines, evaluations: of log.jsonl and metrics.json.  saved: steps of its checkpoints.  pictures: folder of its small
    ones.  told: what was kept beside these (`vit5gen.training.run_report`), empty for a run of an earlier version.
    picture: one of the newest samples, for a run that has no small ones.  diverged: whether it ended for that reason.
    """

    path: Path
    config: dict[str, dict[str, Any]]
    lines: list[dict[str, Any]]
    evaluations: list[dict[str, Any]]
    saved: list[int]
    pictures: Path
    told: dict[str, Any] = field(default_factory=dict)
    picture: Path | None = None
    diverged: bool = False

    @property
    def last(self) -> int:
        return int(self.config["training"]["num_steps"])

    @property
    def step(self) -> int:
        """The newest step that the log or an evaluation tells of."""
        return max((one["step"] for one in (*self.lines, *self.evaluations)), default=0)

    def series(self, key: str) -> list[tuple[float, float]]:
        """Return (step, value) of the lines of the log that have a finite value of this name."""
        found = ((line["step"], line.get(key)) for line in self.lines)
        return [(step, y) for step, y in found if isinstance(y, Finite) and math.isfinite(y)]

    def distances(self, name: str) -> list[tuple[int, dict[str, Any]]]:
        return [(one["step"], one[name]) for one in self.evaluations if isinstance(one.get(name), dict)]

    @property
    def seconds(self) -> float:
        """Return the time that the steps of the log took, evaluations left out."""
        batch, before, total = self.config["training"]["global_batch_size"], 0.0, 0.0
        for step, speed in self.series("images_per_second"):
            total, before = total + (step - before) * batch / speed, step
        return total


def describe_runs(runs: Sequence[RunFacts]) -> tuple[list[str], dict[str, Any]]:
    """Return the parts of a page on runs, and what its script reads; the numbers of evaluations are those recorded."""
    names = _names(runs)
    figures, charts = [], {}
    for chart in _charts(runs, names):
        figure, charts[chart.key] = draw(chart)
        figures.append(figure)
    pictures, steps = _pictures(runs, names)
    ends = _ends(runs, names)
    warned = [escape(f"{name}: {note}" if len(runs) > 1 else note) for name, run in names for note in _warnings(run)]
    parts = [
        "".join(f'<p class="verdict">{_bold(name, runs)}{escape(verdict(run))}</p>' for name, run in names),
        _tiles(runs[0]) if len(runs) == 1 else table(*ends),
        f'<ul class="warnings">{"".join(f"<li>{note}</li>" for note in warned)}</ul>' if warned else "",
        section("Samples", pictures),
        section("Curves", f'<div class="charts">{"".join(figures)}</div>' if figures else ""),
        section("Evaluations", *(_evaluations(name, run, len(runs) == 1) for name, run in names)),
        section("What differs", _differences(names) if len(runs) > 1 else ""),
        section("Cost", table(["", *(name for name, _ in names)], _costs([run for _, run in names]))),
        section("Next", code("\n".join(line for run in runs for line in _commands(run)))),
        section("Settings", *(_settings(name, run, len(runs) == 1) for name, run in names)),
    ]
    told = [{"path": str(run.path), "evaluations": run.evaluations} for run in runs]
    return parts, {"runs": told, "charts": charts, "steps": steps}


def _names(runs: Sequence[RunFacts]) -> list[tuple[str, RunFacts]]:
    """Pair each run with the shortest end of its path that no other has."""
    paths = [run.path.resolve() for run in runs]
    for count in range(1, max(len(path.parts) for path in paths) + 1):
        names = [str(Path(*path.parts[-count:])) for path in paths]
        if len(set(names)) == len(names):
            break
    return list(zip(names, runs, strict=True))


def _bold(name: str, runs: Sequence[RunFacts]) -> str:
    return f"<b>{escape(name)}</b> " if len(runs) > 1 else ""


def verdict(run: RunFacts) -> str:
    """Return in words how good a run is: its newest distance, against its floor and its best."""
    state = f"Step {run.step:,} of {run.last:,}"
    if (newest := newest_distance(run.evaluations)) is None:
        return f"{state}; {'no distance was measured' if run.evaluations else 'not evaluated yet'}."
    name, at, report = newest
    value, floor = report["value"], report.get("floor")
    told = f"{state}. {name} is {shown(value)} at step {at:,} (N = {report['n']:,})"
    if floor:
        ratio = value / floor
        how = "below" if ratio < 1 else "close to" if ratio < _CLOSE else "far from" if ratio > _FAR else "above"
        told += f", {how} the floor, {ratio:.2f} times what the same number of held-out images scores ({shown(floor)})"
    values = {step: one["value"] for step, one in run.distances(name)}
    best = min(values, key=lambda step: values[step])
    if len(values) > 1 and best == at:
        before = list(values.values())[-2]
        told += f"; the best so far, {1 - value / before:.1%} below the evaluation before"
    elif value > _RISE * values[best]:
        told += f"; it was better at step {best:,}: {shown(values[best])}"
    return f"{told}."


def _warnings(run: RunFacts) -> Iterator[str]:
    skipped = max((line.get("skipped") or 0 for line in run.lines), default=0)
    if run.diverged:
        yield "the run stopped because loss or gradient was not finite in too many steps in a row"
    if skipped:
        yield f"{skipped:,} steps were skipped because their loss or gradient was not finite"
    if run.step < run.last:
        yield f"not finished: step {run.step:,} of {run.last:,}; if it was stopped, run the same command again to resume"
    if note := gap_note(run.lines, run.evaluations, later=True):
        yield note
    notes = (floor_note(run.evaluations[:i], one) for i, one in enumerate(run.evaluations))
    yield from dict.fromkeys(filter(None, notes))
    std = next((line["latents_std"] for line in run.lines if line.get("latents_std")), 1.0)
    if not 1 / 3 <= std <= 3:
        yield f"the latents' standard deviation is {std:.3g}, far from 1: check vae.name, or set vae.normalize to measured"
    newest = newest_distance(run.evaluations)
    if newest and newest[2]["n"] < _FEW:
        what = f"N = {newest[2]['n']:,} images are few: most of the distance is bias"
        yield f"{what}; compare it only with the floor and with runs of the same N"
    if newest and newest[2].get("floor") and newest[2]["value"] < newest[2]["floor"]:
        yield "samples score better than held-out images, as copies do: look at the nearest training images"


def _tiles(run: RunFacts) -> str:
    newest, losses = newest_distance(run.evaluations), logged(run.lines)
    held_out = [value for curve in held_out_curves(run.lines, run.evaluations) for value in curve.values()]
    tiles = [("step", f"{run.step:,}", f"of {run.last:,}")]
    if newest:
        name, at, report = newest
        values = {step: one["value"] for step, one in run.distances(name)}
        best = min(values, key=lambda step: values[step])
        error = f" ± {shown(report['standard_error'])}" if report.get("standard_error") else ""
        tiles.append((name, f"{shown(report['value'])}{error}", f"floor {shown(report.get('floor'))}, step {at:,}"))
        tiles.append(("best", shown(values[best]), f"at step {best:,}"))
    if held_out:
        tiles.append(("held-out loss", shown(held_out[-1]), f"lowest {shown(min(held_out))}"))
    if losses:
        tiles.append(("training loss", shown(losses[-1][1]), f"at step {losses[-1][0]:,}"))
    if speed := _speed(run):
        tiles.append(("speed", f"{speed:,.0f}", "images/s"))
        left = (run.last - run.step) * run.config["training"]["global_batch_size"] / speed
        tiles.append(("time", duration(run.seconds), f"{duration(left)} to come" if left else "finished"))
    cells = (f"<div><dt>{escape(a)}</dt><dd>{escape(b)}</dd><dd>{escape(c)}</dd></div>" for a, b, c in tiles)
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _speed(run: RunFacts) -> float | None:
    speeds = [y for _, y in run.series("images_per_second")[-_RECENT:]]
    return median(speeds) if speeds else None


def duration(seconds: float) -> str:
    """Return a time in the unit that suits it."""
    unit, size, _ = next(one for one in _SECONDS if seconds < one[2])
    return f"{seconds / size:.{0 if seconds / size >= 10 or size == 1 else 1}f} {unit}"


def _ends(runs: Sequence[RunFacts], names: Sequence[tuple[str, RunFacts]]) -> tuple[list[str], list[list[str]]]:
    """Return the table of final numbers: head and rows."""
    kinds = dict.fromkeys(key for run in runs for one in run.evaluations for key in one if isinstance(one[key], dict))
    head = ["run", "step", *(f"{kind}{more}" for kind in kinds for more in (" (N)", " floor", " best"))]
    rows = []
    for name, run in names:
        row = [name, f"{run.step:,} of {run.last:,}"]
        for kind in kinds:
            found = [one for _, one in run.distances(kind)]
            cells = (
                [f"{shown(found[-1]['value'])} ({found[-1]['n']:,})", shown(found[-1].get("floor"))] if found else []
            )
            row += [*cells, shown(min(one["value"] for one in found))] if found else ["–"] * 3
        losses, held_out = logged(run.lines), held_out_curves(run.lines, run.evaluations)[-1]
        row += [shown(losses[-1][1] if losses else None), shown(list(held_out.values())[-1] if held_out else None)]
        rows.append([*row, duration(run.seconds)])
    return [*head, "training loss", "held-out loss", "time"], rows


def _charts(runs: Sequence[RunFacts], names: Sequence[tuple[str, RunFacts]]) -> Iterator[Chart]:
    several = len(runs) > 1
    marks = [] if several else list(_marks(runs[0]))

    def label(name: str, what: str) -> str:
        return f"{name}: {what}" if several and what else name if several else what

    losses, kinds = [], dict.fromkeys(key for run in runs for one in run.evaluations for key in one)
    for number, (name, run) in enumerate(names):
        curve = Curve(label(name, "training"), run.series("loss"), number)
        losses += [curve] if curve.points else []
        for held_out in filter(None, held_out_curves(run.lines, run.evaluations)):
            losses.append(Curve(label(name, "held-out"), list(held_out.items()), number if several else 1, "dots"))
    if losses:
        yield Chart("loss", "Loss", "mean per image", losses, marks)
    for kind in kinds:
        curves = []
        for number, (name, run) in enumerate(names):
            if found := run.distances(kind):
                errors = [one.get("standard_error") for _, one in found]
                points = [(step, one["value"]) for step, one in found]
                curves.append(Curve(label(name, kind), points, number if several else 2, "dots", errors))
                floors = [(step, one["floor"]) for step, one in found if one.get("floor") is not None]
                if floors and not (several and any(c.kind == "rule" and c.points == floors for c in curves)):
                    curves.append(Curve(label(name, "floor"), floors, number if several else 7, "rule"))
        if curves:
            yield Chart(f"distance {kind}", kind, "Fréchet distance, lower is better", curves, marks, from_zero=True)
    for key, title, unit in (
        ("grad_norm", "Gradient norm", "before clipping"),
        ("learning_rate", "Learning rate", "per step"),
        ("images_per_second", "Speed", "images/s"),
    ):
        drawn = [(n, label(name, title.lower()), run.series(key)) for n, (name, run) in enumerate(names)]
        curves = [Curve(name, points, n) for n, name, points in drawn if points]
        if curves:
            yield Chart(key, title, unit, curves, marks, from_zero=True)


def _marks(run: RunFacts) -> Iterator[tuple[int, str, str]]:
    told = {line["checkpoint"] for line in run.lines if isinstance(line.get("checkpoint"), int)}
    for step in sorted(told | set(run.saved)):
        yield step, "checkpoint", f"checkpoint of step {step:,}"
    for line in run.lines:
        if isinstance(at := line.get("resumed"), int):
            yield at, "resumed", f"resumed at step {at:,}: {'; '.join(line.get('changed', ['nothing changed']))}"


def _pictures(runs: Sequence[RunFacts], names: Sequence[tuple[str, RunFacts]]) -> tuple[str, list[int]]:
    """Return the samples of each run at the step of one slider, and the steps of the slider."""
    shown_steps: dict[str, list[int]] = {}
    for name, run in names:
        steps = [one["step"] for one in run.evaluations if step_picture(run.pictures, one["step"]).is_file()]
        most = max(2, _PICTURES // len(runs))
        chosen = (
            range(len(steps)) if len(steps) <= most else {round(i * (len(steps) - 1) / (most - 1)) for i in range(most)}
        )
        shown_steps[name] = [steps[i] for i in sorted(chosen)]
    steps = sorted({step for own in shown_steps.values() for step in own})
    figures = []
    for name, run in names:
        own, images = shown_steps[name], []
        for step in own:
            report = next(
                (v for one in run.evaluations if one["step"] == step for v in one.values() if isinstance(v, dict)), None
            )
            caption = f"step {step:,}" + (f" · {shown(report['value'])}" if report else "")
            hidden = "" if step == own[-1] else " hidden"
            source = data_uri(step_picture(run.pictures, step))
            alt = escape(f"samples of {name} at step {step:,}")
            images.append(
                f'<img src="{source}" alt="{alt}" data-step="{step}" data-caption="{escape(caption)}"{hidden}>'
            )
        if not own and run.picture is not None:
            images = [f'<img src="{data_uri(run.picture)}" alt="{escape(f"newest samples of {name}")}">']
        if images:
            told = run.told if own else {}
            figures.append(
                _labelled("".join(images), _bold(name, runs), told.get("rows", ()), (), told.get("attribution"))
            )
    figures += [one for name, run in names for one in _beside(name, run, runs)]
    slider = ""
    if len(steps) > 1:
        slider = (
            '<div class="slider" hidden><button type="button">play</button><label>step <input type="range" min="0" '
            f'max="{len(steps) - 1}" value="{len(steps) - 1}"></label><output></output></div>'
        )
    return slider + f'<div class="stage">{"".join(figures)}</div>' if figures else "", steps


def _beside(name: str, run: RunFacts, runs: Sequence[RunFacts]) -> Iterator[str]:
    """Yield the newest trajectory, and the nearest training images of the newest samples."""
    for key in ("trajectory", "nearest"):
        told, file = run.told.get(key), run.pictures / f"{key}.webp"
        if told and file.is_file():
            what = escape(f"{told['what']}, step {told['step']:,}")
            image, title = f'<img src="{data_uri(file)}" alt="{what}">', f"{_bold(name, runs)}{what}"
            yield _labelled(image, title, told.get("rows", ()), told["columns"], run.told.get("attribution"))


def _labelled(image: str, title: str, rows: Sequence[str], columns: Sequence[str], attribution: str | None) -> str:
    """Return a figure of a picture with names beside its rows and above its columns."""
    left = f'<div class="rows">{"".join(f"<span>{escape(str(row))}</span>" for row in rows)}</div>' if rows else ""
    above = (
        f'<div class="columns">{"".join(f"<span>{escape(str(one))}</span>" for one in columns)}</div>'
        if columns
        else ""
    )
    credit = f"<small>{escape(attribution)}</small>" if attribution else ""
    caption = f'<figcaption>{title} <output class="at"></output></figcaption>'
    return f'<figure class="picture">{caption}<div class="sheet">{left}<div>{above}{image}</div></div>{credit}</figure>'


def _evaluations(name: str, run: RunFacts, alone: bool) -> str:
    kinds = dict.fromkeys(key for one in run.evaluations for key in one if isinstance(one[key], dict))
    rows = []
    for one in run.evaluations:
        cells = [f"{one['step']:,}", shown(one.get("held_out_loss"))]
        for kind in kinds:
            report = one.get(kind) or {}
            error = f" ± {shown(report['standard_error'])}" if report.get("standard_error") else ""
            cells += [f"{shown(report.get('value'))}{error}", shown(report.get("floor")), shown(report.get("n"))]
        rows.append(cells)
    head = ["step", "held-out loss", *(cell for kind in kinds for cell in (kind, "floor", "N"))]
    return folded(f"{len(rows)} evaluations{'' if alone else f' of {name}'}", table(head, rows)) if rows else ""


def _differences(names: Sequence[tuple[str, RunFacts]]) -> str:
    """Return the keys of the configuration in which runs differ."""
    flat = [
        {f"{part}.{key}": value for part, own in run.config.items() for key, value in own.items()} for _, run in names
    ]
    keys = dict.fromkeys(key for values in flat for key in values)
    rows = [[key, *(str(values.get(key, "–")) for values in flat)] for key in keys]
    rows = [row for row in rows if len(set(row[1:])) > 1]
    return (
        table(["key", *(name for name, _ in names)], rows) if rows else "<p>Nothing: the configurations are equal.</p>"
    )


def _costs(runs: Sequence[RunFacts]) -> list[list[str]]:
    rows: list[list[str]] = [[what] for what in ("images so far", "time of the steps", "FLOPs", "still to come")]
    for run in runs:
        batch, speed = run.config["training"]["global_batch_size"], _speed(run)
        flops, left = run.told.get("flops_per_image"), (run.last - run.step) * batch
        rows[0].append(f"{run.step * batch:,}")
        rows[1].append(duration(run.seconds))
        rows[2].append(f"{flops * run.step * batch:.3g}" if flops else "–")
        rows[3].append(f"{left:,} images{f', {duration(left / speed)}' if speed else ''}" if left else "nothing")
    return rows


def _commands(run: RunFacts) -> list[str]:
    """Return shell commands that use the run."""
    path = str(run.path.resolve())
    to = [str(run.path.resolve() / name) for name in ("more.png", "config.yaml", "evaluation.json")]
    evaluate = ["vit5gen", "evaluate", path, "--reference", to[1]]
    return [
        shlex.join(["vit5gen", "sample", "--checkpoint", path, "--num-images", "16", "--output", to[0]]),
        shlex.join([*evaluate, "--extractor", "effnet-lite0", "--num-images", "1000", "--output", to[2]]),
        shlex.join(["vit5gen", "report", path, "OTHER_RUN", "--output", "comparison.html"]),
        shlex.join(["vit5gen", "publish", path, "--repo", "NAME", "--dry-run", "FOLDER"]),
    ]


def _settings(name: str, run: RunFacts, alone: bool) -> str:
    told = {key: run.told[key] for key in ("command", "versions", "commit") if key in run.told}
    text = yaml.safe_dump(run.config, sort_keys=False, allow_unicode=True)
    text += "\n# of the newest evaluation\n" + yaml.safe_dump(told, sort_keys=False, allow_unicode=True) if told else ""
    return folded(f"configuration and versions{'' if alone else f' of {name}'}", code(text))
