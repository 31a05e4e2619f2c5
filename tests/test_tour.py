"""docs/tour.ipynb: what is stored is fit to be read on a page, and every cell runs."""

import json
import os
import re
import sys
from pathlib import Path

import pytest
from launch import environment

TOUR = Path(__file__).parents[1] / "docs/tour.ipynb"
PICTURES = 4


def count_pictures(cells: list) -> int:
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", ()))


def test_what_is_stored() -> None:
    text = TOUR.read_text()
    assert len(text) < 400_000
    cells = json.loads(text)["cells"]
    assert count_pictures(cells) == PICTURES
    printed = [str(line) for cell in cells for output in cell.get("outputs", ()) for line in output.get("text", ())]
    assert not [line for line in printed if re.search(r"(^|\s)/\w|Traceback|error: ", line)]  # a path of the machine
    for target in ("extending.md", "training.md", "../README.md"):
        assert target in text
        assert (TOUR.parent / target).is_file()


@pytest.mark.slow
def test_every_cell_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    for name, value in environment(PATH=f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}").items():
        monkeypatch.setenv(name, value)
    notebook = nbformat.read(TOUR, 4)
    for cell in notebook.cells:
        if cell.cell_type == "code":
            cell.outputs = []
    where = {"metadata": {"path": str(tmp_path)}}
    nbclient.NotebookClient(notebook, timeout=900, kernel_name="python3", resources=where).execute()
    assert count_pictures(notebook.cells) == PICTURES
    assert (tmp_path / "comparison.json").is_file()
