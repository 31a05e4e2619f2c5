"""The pages of the studies show what their rows say: tables made anew from the rows stand there as they are."""

from pathlib import Path

import pytest

from vit5gen.lab.study.plan import read_rows, read_study
from vit5gen.lab.study.tables import write_report

ROOT = Path(__file__).parents[1]
CONFIGS = {path.stem for path in (ROOT / "configs" / "studies").glob("*.yaml")}
LEVERS = {"levers", "levers_rates", "scaling"}  # of the page docs/levers.md
STUDIES = sorted(path.parent for path in (ROOT / "docs" / "study").glob("*/rows.jsonl") if path.parent.name in CONFIGS)


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_tables_are_those_of_the_rows(study: Path, tmp_path: Path) -> None:
    config, runs = read_study(ROOT / "configs" / "studies" / f"{study.name}.yaml")
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


@pytest.mark.parametrize("study", STUDIES, ids=lambda path: path.name)
def test_all_rows_of_a_study_are_of_one_commit(study: Path) -> None:
    (commit,) = {row.commit for row in read_rows(study / "rows.jsonl", runs=[]).values()}
    assert not commit.endswith("-dirty")
