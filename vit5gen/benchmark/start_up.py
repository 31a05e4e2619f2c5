"""How long the command line takes to answer."""

import subprocess
import sys
from collections.abc import Callable, Iterator

from vit5gen.benchmark.setting import Setting
from vit5gen.benchmark.timing import Row, alternate, row, seconds


def rows(setting: Setting) -> Iterator[Row]:
    """Time ``vit5gen --help`` against an interpreter that does nothing."""
    sizes = setting.sizes
    ours, bare = _python("from vit5gen.cli import main; main(['--help'])"), _python("pass")
    pairs = alternate(seconds(ours), seconds(bare), sizes.repetitions, sizes.warm_up)
    yield row("start-up", "help", "vit5gen --help", "python", pairs)


def _python(code: str) -> Callable[[], object]:
    return lambda: subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
