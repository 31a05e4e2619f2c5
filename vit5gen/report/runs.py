"""The part of a page on runs, one or several side by side: samples, curves, cost, settings, what to do next."""

import shlex
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from pathlib import Path
from typing import Any

import yaml

from vit5gen.report.chart import Chart, Curve, draw, shown
from vit5gen.report.page import code, data_uri, folded, section, table
from vit5gen.report.run_facts import RunFacts, duration, find_warnings, verdict, with_error
from vit5gen.report.small_pictures import step_picture

_PICTURES = 60  # of all runs of a page
_SERIES = {"grad_norm": ("Gradient norm", "before clipping"), "learning_rate": ("Learning rate", "per step")}
_SERIES |= {"images_per_second": ("Speed", "images/s")}
Named = dict[str, RunFacts]


def describe_runs(given: Sequence[RunFacts]) -> tuple[list[str], dict[str, Any]]:
    """Return the parts of a page on runs, and what its script reads; the numbers of evaluations are those recorded."""
    runs, alone = _named(given), len(given) == 1
    drawn = {chart.key: draw(chart) for chart in _charts(runs)}
    samples, steps = _samples(runs)
    flat = [{f"{part}.{key}": v for part, own in run.config.items() for key, v in own.items()} for run in given]
    differing = [row for row in _transposed(flat) if len(set(row[1:])) > 1]
    evaluations, settings, warnings = list[str](), list[str](), list[str]()
    for name, run in runs.items():
        of = _of(name, runs)
        warnings += [f"{of}{note}" for note in find_warnings(run)]
        evaluations += [folded(f"{of}{len(run.evaluations)} evaluations", _evaluations(run))] if run.evaluations else []
        settings.append(folded(f"{of}configuration, command and versions", code(_settings(run))))
    parts = [
        *(f'<p class="verdict">{escape(_of(name, runs) + verdict(run))}</p>' for name, run in runs.items()),
        _tiles(given[0]) if alone else table(["", *runs], _transposed(list(map(_summary, given)))),
        bullets(warnings),
        section("Samples", samples),
        section("Curves", f'<div class="charts">{"".join(figure for figure, _ in drawn.values())}</div>' * bool(drawn)),
        section("What differs", table(["key", *runs], differing) if differing else ""),
        section("Evaluations", *evaluations),
        section("Next", code("\n".join(line for run in given for line in _commands(run.path.resolve())))),
        section("Settings", *settings),
    ]
    told = [{"path": str(run.path), "evaluations": run.evaluations} for run in given]
    return parts, {"runs": told, "charts": {key: values for key, (_, values) in drawn.items()}, "steps": steps}


def bullets(notes: Iterable[str]) -> str:
    """Return a list of warnings; nothing where there is none."""
    items = "".join(f"<li>{escape(note)}</li>" for note in notes)
    return f'<ul class="warnings">{items}</ul>' if items else ""


def _named(runs: Sequence[RunFacts]) -> Named:
    """Name each run by the shortest end of its path that no other has."""
    paths = [run.path.resolve() for run in runs]
    ends = ([str(Path(*path.parts[-n:])) for path in paths] for n in range(1, 99))
    return dict(zip(next(names for names in ends if len(set(names)) == len(names)), runs, strict=True))


def _transposed(columns: Sequence[dict[str, Any]]) -> list[list[str]]:
    """Return a row for each key of the columns, of which some may lack it."""
    keys = dict.fromkeys(key for column in columns for key in column)
    return [[key, *(str(column.get(key, "–")) for column in columns)] for key in keys]


def _of(name: str, runs: Named) -> str:
    return "" if len(runs) == 1 else f"{name}: "


def _evaluations(run: RunFacts) -> str:
    rows = []
    for one in run.evaluations:
        report = run.distances.get(one["step"], {})
        numbers = with_error(report), shown(report.get("floor")), shown(report.get("n"))
        rows.append([f"{one['step']:,}", shown(one.get("held_out_loss")), *numbers])
    return table(["step", "held-out loss", run.metric or "distance", "floor", "N"], rows)


def _summary(run: RunFacts) -> dict[str, str]:
    """Return the newest numbers of a run, and its cost, by what they are."""
    images, each, losses = run.step * run.batch, run.told.get("flops_per_image"), run.series("loss")
    newest = run.distances[max(run.distances)] if run.metric else {}
    return {
        "step": f"{run.step:,} of {run.last:,}",
        run.metric or "distance": with_error(newest),
        "floor": shown(newest.get("floor")),
        "N": shown(newest.get("n")),
        "best": f"{shown(run.distances[run.best]['value'])} at {run.best:,}" if run.metric else "–",
        "held-out loss": shown(list(run.held_out[-1].values())[-1] if run.held_out else None),
        "training loss": shown(losses[-1][1] if losses else None),
        "images/s": shown(run.speed),
        "images so far": f"{images:,}",
        "TFLOPs so far": f"{each * images / 1e12:,.1f}" if each else "–",
        "time of the steps": duration(run.seconds),
        "still to come": run.to_come,
    }


def _tiles(run: RunFacts) -> str:
    cells = (f"<div><dt>{escape(what)}</dt><dd>{escape(value)}</dd></div>" for what, value in _summary(run).items())
    return f'<dl class="tiles">{"".join(cells)}</dl>'


def _charts(runs: Named) -> Iterator[Chart]:
    """Yield what is drawn over steps; one run has a colour for each curve, of several each run has one."""
    alone, marks = len(runs) == 1, [mark for run in runs.values() for mark in _marks(run)] * (len(runs) == 1)
    losses, distances = list[Curve](), dict[str, list[Curve]]()
    for n, (name, run) in enumerate(runs.items()):
        of = _of(name, runs)
        losses.append(Curve(f"{of}training", run.series("loss"), n))
        losses += [Curve(f"{of}held-out", list(one.items()), n + alone, "dots") for one in run.held_out]
        for metric, found in run.reports.items():
            own, errors = distances.setdefault(metric, []), [one.get("standard_error") for one in found.values()]
            values = [(x, one["value"]) for x, one in found.items()]
            own.append(Curve(f"{of}{metric}", values, n + 2 * alone, "dots", errors))
            floors = [(x, one["floor"]) for x, one in found.items() if one.get("floor") is not None]
            own.append(Curve(f"{of}floor", floors, n + 7 * alone, "rule"))
    charts = [Chart("loss", "Loss", "mean per image", losses, marks)]
    for metric, curves in distances.items():
        charts.append(Chart(f"distance {metric}", metric, "Fréchet distance, lower is better", curves, marks, True))
    for key, (title, unit) in _SERIES.items():
        curves = [Curve(title if alone else name, run.series(key), n) for n, (name, run) in enumerate(runs.items())]
        charts.append(Chart(key, title, unit, curves, marks, True))
    yield from (chart for chart in charts if any(curve.points for curve in chart.curves))


def _marks(run: RunFacts) -> Iterator[tuple[int, str, str]]:
    for step in sorted({*run.saved, *(line["checkpoint"] for line in run.lines if "checkpoint" in line)}):
        yield step, "checkpoint", f"checkpoint of step {step:,}"
    for line in run.lines:
        if "resumed" in line:
            yield line["resumed"], "resumed", "; ".join(["resumed", *line.get("changed", [])])


def _samples(runs: Named) -> tuple[str, list[int]]:
    """Return the samples of each run at the step of one slider, with what else was drawn; and the slider's steps."""
    figures, all_steps = [], set[int]()
    for name, run in runs.items():
        # Of many evaluations some, as far apart as each other; of an earlier version the newest grid alone.
        steps = [one["step"] for one in run.evaluations if step_picture(run.pictures, one["step"]).is_file()]
        most = min(len(steps), max(2, _PICTURES // len(runs)))
        steps = [steps[round(i * (len(steps) - 1) / max(1, most - 1))] for i in range(most)]
        all_steps |= set(steps)
        images = [_image(step_picture(run.pictures, step), run, name, step, step == steps[-1]) for step in steps]
        images += [_image(run.samples, run, name, run.step, True)] if not steps and run.samples.is_file() else []
        rows, credit = run.told.get("rows", ()) if steps else (), run.told.get("attribution")
        title = escape(_of(name, runs)) + ("Samples of the same noise at every step" if steps else "Newest samples")
        figures += [picture("".join(images), title, rows, (), credit)] if images else []
    for name, run in runs.items():
        for key in ("trajectory", "nearest"):
            told, file = run.told.get(key), run.pictures / f"{key}.webp"
            if told and file.is_file():
                what = escape(f"{told['what']}, step {told['step']:,}")
                image, credit = f'<img src="{data_uri(file)}" alt="{what}">', run.told.get("attribution")
                figures.append(picture(image, escape(_of(name, runs)) + what, told["rows"], told["columns"], credit))
    most = len(all_steps) - 1
    slider = (
        '<div class="slider" hidden><button type="button">play</button><label>step <input type="range" min="0" '
        f'max="{most}" value="{most}"></label><output></output></div>'
    ) * (most > 0)
    return f'{slider}<div class="stage">{"".join(figures)}</div>' if figures else "", sorted(all_steps)


def _image(file: Path, run: RunFacts, name: str, step: int, visible: bool) -> str:
    report = run.distances.get(step)
    caption = escape(f"step {step:,}{f' · {run.metric} {with_error(report)}' if report else ''}")
    place = f'data-step="{step}" data-caption="{caption}"{"" if visible else " hidden"}'
    return f'<img src="{data_uri(file)}" alt="samples of {escape(name)}, {caption}" {place}>'


def picture(image: str, title: str, rows: Sequence[str], columns: Sequence[str], credit: str | None) -> str:
    """Return a figure of an image with names beside its rows and above its columns; image, title: HTML."""
    beside, above = (
        f'<div class="{kind}">{"".join(f"<span>{escape(str(name))}</span>" for name in names)}</div>' if names else ""
        for kind, names in (("rows", rows), ("columns", columns))
    )
    caption, credit = f'{title} <output class="at"></output>', escape(credit or "")
    sheet = f'<div class="sheet">{beside}<div>{above}{image}</div></div>'
    return f'<figure class="picture"><figcaption>{caption}</figcaption>{sheet}<small>{credit}</small></figure>'


def _commands(path: Path) -> Iterator[str]:
    """Yield shell commands that use the run at ``path``."""
    evaluate = ["evaluate", path, "--reference", path / "config.yaml", "--extractor", "effnet-lite0"]
    for words in (
        ["sample", "--checkpoint", path, "--num-images", "16", "--output", path / "more.png"],
        [*evaluate, "--num-images", "1000", "--output", path / "evaluation.json"],
        ["report", path, "OTHER_RUN", "--output", "comparison.html"],
        ["publish", path, "--repo", "NAME", "--dry-run", "FOLDER"],
    ):
        yield shlex.join(["vit5gen", *map(str, words)])


def _settings(run: RunFacts) -> str:
    told = {key: run.told[key] for key in ("command", "versions", "commit") if key in run.told}
    parts = [run.config, {"newest evaluation": told}] if told else [run.config]
    return "\n".join(yaml.safe_dump(part, sort_keys=False, allow_unicode=True) for part in parts)
