"""argparse without abbreviations and with errors of one line."""

import argparse
import io
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

from vit5gen.system.errors import UserError


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises `UserError` where that one prints its usage and exits."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


def utf8_path(text: str) -> str:
    """Return the path of an output; safetensors can write one that is no UTF-8, but cannot read it again."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise argparse.ArgumentTypeError(f"{text!r} is not UTF-8, which weights need; choose another path") from None
    return text


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Print a `UserError` as one line on standard error and exit with code 2; likewise what the machine refuses.

    Names that the terminal cannot show are printed as escapes: they must not end a command that has done its work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except OSError as error:
        _exit(f"{error.filename or 'this machine'}: {error.strerror or error}; check the path, its rights and the disk")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        _exit("out of memory; choose smaller sizes or batches, see `vit5gen train CONFIG --dry-run`")


def _exit(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)
