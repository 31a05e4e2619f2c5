"""argparse without abbreviations and with errors of one line."""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from vit5gen.errors import UserError


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises `UserError` where that one prints its usage and exits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Print a `UserError` as one line on standard error and exit with code 2."""
    try:
        yield
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
