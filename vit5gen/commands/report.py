"""`vit5gen report`."""

from pathlib import Path
from typing import Annotated

from pydantic import Field

from vit5gen.commands.options import Options, argument
from vit5gen.section import UserPath
from vit5gen.system.errors import UserError
from vit5gen.system.files import check_writable, read_json, write_text


class ReportOptions(Options):
    """Write one HTML file on runs, cards and studies, side by side; it needs no network.

    Each is the folder of a run, a card of `evaluate`, `compare`, `copies` or `sample`, or the folder of a study.
    """

    inputs: Annotated[list[UserPath], Field(min_length=1)] = argument(..., "RUN", "runs, cards or studies", option="")
    output: UserPath = argument(..., "FILE.html", "the page; one that exists is replaced")


def run(options: ReportOptions) -> None:
    """Read what is given, tell each kind by its files, and write the page."""
    from vit5gen.report.report_page import build_report
    from vit5gen.report.studies import ROWS
    from vit5gen.training.run_folder import RunFolder
    from vit5gen.training.run_report import is_run, read_run

    # What is what, before anything is written.
    if Path(options.output).suffix.lower() not in (".html", ".htm"):
        raise UserError(f"--output {options.output}: expected FILE.html; choose a name that ends so")
    runs, cards, studies = [], {}, []
    for path in dict.fromkeys(map(Path, options.inputs)):  # what is given twice counts once
        if is_run(path):
            runs.append(read_run(RunFolder(path)))
        elif (path / ROWS).is_file():
            studies.append(path)
        elif path.suffix == ".json" or (path / "card.json").is_file():
            file = path if path.suffix == ".json" else path / "card.json"
            cards[file] = read_json(file, "card")
        else:
            what = "is not there" if not path.exists() else "is neither a run, nor a card (.json), nor a study"
            raise UserError(f"{path}: {what}; expected the --output of train, evaluate, compare, sample or study")

    # The page.
    page = build_report(runs, cards, studies)
    check_writable(options.output)
    write_text(options.output, page)
    print(f"{options.output}: {len(runs)} runs, {len(cards)} cards, {len(studies)} studies; open it in a browser")
