"""The command line of studies: ``python -m vit5gen.lab.study STUDY --output FOLDER``."""

import signal
import sys

from vit5gen.lab.study.runner import run_study
from vit5gen.parser import Parser, exit_on_bad_input


def main(arguments: list[str] | None = None) -> None:
    """Train and score every run of a study, one at a time; run again, it goes on where it stopped."""
    parser = Parser(prog="python -m vit5gen.lab.study", description=main.__doc__)
    parser.add_argument("study", help="YAML file, e.g. configs/studies/backbones.yaml")
    parser.add_argument("--output", metavar="FOLDER", required=True, help="folder of rows.jsonl, table, plot and runs")
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while measuring; the trainer has its own
    try:
        with exit_on_bad_input():
            options = parser.parse_args(arguments)
            sys.exit(run_study(options.study, options.output))
    except KeyboardInterrupt:
        print("stopped; the same command goes on", file=sys.stderr)
        sys.exit(75)


if __name__ == "__main__":
    main()
