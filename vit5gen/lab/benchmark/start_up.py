"""How long the command line takes to answer."""

import subprocess
import sys
from collections.abc import Callable, Iterator

from vit5gen.lab.benchmark.setting import Setting
from vit5gen.lab.benchmark.timing import Row, race, row


def rows(setting: Setting) -> Iterator[Row]:
    """Time ``vit5gen --help`` against an interpreter that does nothing."""
    ours, bare = _python("from vit5gen.cli import main; main(['--help'])"), _python("pass")
    yield row("start-up", "help", "vit5gen --help", "python", race(ours, bare, setting.sizes))


def _python(code: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
