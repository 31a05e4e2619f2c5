"""`vit5gen study`: train and score every run of a study."""

import signal
import sys

from vit5gen.lab.study.runner import run_study


def run_until_stopped(file: str, output: str) -> int:
    """Train and score every run of a study, one at a time; return the exit code, 75 when a signal stopped it."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # while measuring; the trainer has its own
    try:
        return run_study(file, output)
    except KeyboardInterrupt:
        print("stopped; the same command resumes", file=sys.stderr)
        return 75
