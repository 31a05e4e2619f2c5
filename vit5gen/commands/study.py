"""`vit5gen study`."""

import signal
import sys

from vit5gen.commands.options import Options, argument
from vit5gen.section import UserPath


class StudyOptions(Options):
    """Train and score every run of a study, one at a time; running the command again resumes it."""

    config: UserPath = argument(..., "CONFIG", "YAML file, e.g. configs/studies/backbones.yaml", option="")
    output: UserPath = argument(..., "FOLDER", "folder for rows.jsonl, table, plot and runs")


def run(options: StudyOptions) -> int:
    """Do the runs that have no row yet; return the exit code, 75 when a signal stopped it."""
    from vit5gen.lab.study.runner import run_study
    from vit5gen.training.process import RESUME, STOPPED

    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while measuring; the trainer has its own
    try:
        return run_study(options.config, options.output)
    except KeyboardInterrupt:
        print(f"stopped; {RESUME}", file=sys.stderr)
        return STOPPED
