"""The pages of the studies show what their rows say: tables made anew from the rows stand there as they are."""

import itertools
import json
import math
from functools import cache
from pathlib import Path

import numpy as np
import pytest

from vit5gen.evaluation.significance import Estimate
from vit5gen.lab.study.differences import SCORES, Difference, find_curves, find_differences, find_verdicts
from vit5gen.lab.study.plan import Run, StudyConfig, read_rows, read_study
from vit5gen.lab.study.scaling import find_trends
from vit5gen.lab.study.tables import write_report

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem for path in (ROOT / "configs" / "studies").glob("*.yaml")}
LEVERS = {"levers", "levers_rates", "scaling"}  # of the page docs/levers.md
STUDIES = sorted(path.parent for path in (ROOT / "docs" / "study").glob("*/rows.jsonl") if path.parent.name in CONFIGS)


@cache
def read(name: str) -> tuple[StudyConfig, list[Run]]:
    return read_study(ROOT / "configs" / "studies" / f"{name}.yaml")


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_tables_are_those_of_the_rows(study: Path, tmp_path: Path) -> None:
    config, runs = read(study.name)
    rows = read_rows(study / "rows.jsonl", runs)
    keys = [key for run in runs for key in run.keys]
    assert rows.keys() <= set(keys)
    write_report(config, [rows[key] for key in keys if key in rows], tmp_path)
    table = (tmp_path / "table.md").read_text()
    assert (study / "table.md").read_text() == table
    if study.name in LEVERS:
        return
    page = (ROOT / "docs" / "study.md").read_text()
    for part in table.strip().split("\n\n"):
        assert part in page
    assert f"study/{study.name}/differences.png" in page


def test_the_page_on_levers_has_the_figures_of_their_rows() -> None:
    page = (ROOT / "docs" / "levers.md").read_text()
    assert (ROOT / "docs" / "study" / "scaling" / "table.md").read_text().strip().split("\n\n")[-1] in page
    rows = list(read_rows(ROOT / "docs" / "study" / "levers_rates" / "rows.jsonl", runs=[]).values())
    for lever in dict.fromkeys(row.levels["lever"] for row in rows):
        best = min((row for row in rows if row.levels["lever"] == lever), key=lambda row: row.held_out_loss)
        cells = f"{best.held_out_loss:.4f} ({best.levels['rate']}) | {best.distance:.1f}"
        cells += f" | {best.training_flops / 1e12:.1f} |"
        assert any(line.startswith(f"| {lever} |") and line.endswith(cells) for line in page.splitlines()), lever


def test_the_page_predicts_what_the_laws_say() -> None:
    page = " ".join((ROOT / "docs" / "levers.md").read_text().split())
    study, runs = read("scaling")
    rows = list(read_rows(ROOT / "docs" / "study" / "scaling" / "rows.jsonl", runs).values())
    assert study.extrapolate_to is not None
    trend = find_trends(study, find_curves(study, rows))[-1]
    law = trend.at(trend.ratios, study.extrapolate_to)
    single = law.margin() * math.sqrt(len(study.seeds) + 1)  # of a new run: the spread of one seed beside the mean's
    low, high, lowest, highest = np.exp([*law.interval, law.difference - single, law.difference + single])
    expected = f"between {lowest:.3f} and {highest:.3f} for one run each, and the mean over many seeds"
    assert f"{expected} between {low:.3f} and {high:.3f}." in page


def test_the_page_on_levers_compares_as_their_rows_do() -> None:
    page = (ROOT / "docs" / "levers.md").read_text().splitlines()
    for start, end in lever_lines():
        assert [line for line in page if line.startswith(start) and line.endswith(end)], (start, end)
    assert set(average_lines() + size_lines()) <= set(page)


def cell(d: Difference | None) -> str:
    if d is None:
        return ""
    digits = SCORES[d.measure][1]
    mean, low, high = (f"{value:+.{digits}f}" for value in (d.mean, d.low, d.high))
    return f"{mean} [{low}, {high}]"


def size_lines() -> list[str]:
    """The lines of the table of SiT minus ViT-5, by the steps of ViT-5 and the width."""
    study, runs = read("scaling")
    rows = list(read_rows(ROOT / "docs" / "study" / "scaling" / "rows.jsonl", runs).values())
    by = {(d.step, d.cell, d.measure, d.budget): d for d in find_differences(study, rows)}
    shown = [("held_out_loss", budget) for budget in ("steps", "training_flops", "seconds")] + [("distance", "steps")]
    lines = []
    for step, width in itertools.product(study.score_at, study.grid["width"]):
        cells = [cell(by.get((step, f"sit, {width}", *one))) for one in shown]
        lines.append(f"| {step} | {width.removeprefix('width ')} | {' | '.join(cells)} |")
    return lines


def average_lines() -> list[str]:
    """The lines of the table of averages: the mean of the tracked one, and what each length has more, by seeds."""
    lines = []
    for width in (64, 128):
        tracked, scans = [], []
        for file in sorted((ROOT / "docs" / "study" / "averages").glob(f"width-{width}-seed-?.tracked.json")):
            scan = json.loads(file.with_name(file.name.replace(".tracked", "")).read_text())["scan"]
            assert scan["ema_lengths"] == [0.03, 0.05, 0.1, 0.2]
            tracked.append(json.loads(file.read_text())["metrics"]["FD-FashionJudge"]["value"])
            scans.append([score["value"] for score in scan["metrics"]["FD-FashionJudge"]])
        found = [Estimate.of_pairs(list(pairs)) for pairs in np.transpose(scans) - np.array(tracked)]
        cells = [f"{one.difference:+.1f} [{', '.join(f'{value:+.1f}' for value in one.interval)}]" for one in found]
        lines.append(f"| {width} | {len(tracked)} | {np.mean(tracked):.1f} | {' | '.join(cells)} |")
    return lines


def lever_lines() -> list[tuple[str, str]]:
    """Beginning and end of the lines of the tables, between which is at most what others have published."""
    study, runs = read("levers")
    rows = read_rows(ROOT / "docs" / "study" / "levers" / "rows.jsonl", runs)
    last, kept = study.score_at[-1], [rows[key] for run in runs for key in run.keys if key in rows]
    found = find_differences(study, kept)
    verdicts = find_verdicts(study, found)

    def cost(lever: str, width: str, budget: str) -> str:
        own, base = (
            {row.seed: getattr(row, budget) for row in kept if row.cell == f"{one}, {width}" and row.steps == last}
            for one in (lever, "none")
        )
        ratio = np.median(list(own.values())) / np.median([base[seed] for seed in own])
        return f"{100 * (ratio - 1):+.0f} %"

    gains, equal = [], []
    for lever, width in itertools.product(
        [lever for lever in study.grid["lever"] if lever != "none"], study.grid["width"]
    ):
        by = {(d.measure, d.budget): d for d in found if d.cell == f"{lever}, {width}" and d.step == last}
        steps = [by[measure, "steps"] for measure in SCORES]
        words = [verdicts[steps[0].change, measure] for measure in SCORES]
        verdict = ", ".join(words if len(set(words)) > 1 else words[:1])
        budgets, name = ("training_flops", "seconds"), width.removeprefix("width ")
        costs = [cost(lever, width, budget) for budget in budgets]
        end = " | ".join([name, str(len(steps[0].values)), *map(cell, steps), *costs, verdict])
        gains.append((f"| {lever} |", f"| {end} |"))
        spent = [cell(by.get((measure, budget))) for budget in budgets for measure in ("held_out_loss", "distance")]
        equal.append((f"| {lever} |", f" {' | '.join([name, *spent])} |"))
    return gains + equal


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_all_rows_of_a_study_are_of_one_commit(study: Path) -> None:
    (commit,) = {row.commit for row in read_rows(study / "rows.jsonl", runs=[]).values()}
    assert not commit.endswith("-dirty")
