"""Options of train_classifier.py and segment.py: what cannot be is told in one line, before anything is written."""

from argparse import Namespace
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from vit5gen.system.errors import UserError


def dashed(name: str) -> str:
    return f"--{name.replace('_', '-')}"


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings as a card records them: paths as text."""
    return {name: str(value) if isinstance(value, Path) else value for name, value in settings.items()}


def check_ranges(options: Namespace, ranges: Mapping[str, tuple[float, float]]) -> None:
    """Raise `UserError` for a number that is less than the least or more than the most, or not a number."""
    for name, (least, most) in ranges.items():
        if not least <= (value := getattr(options, name)) <= most:
            raise UserError(f"{dashed(name)} {value}: expected {least:g} to {most:g}")


@contextmanager
def reading(what: str) -> Iterator[None]:
    """Turn what libraries raise for options that they cannot use into a `UserError` that names those."""
    try:
        yield
    except UserError:
        raise
    except (ValueError, TypeError, AssertionError, KeyError, RuntimeError) as error:
        advice = "this model has none: give --drop-path 0" if "drop_path" in str(error) else "give other values"
        raise UserError(f"{what}: {' '.join(str(error).split())[:300]}; {advice}") from error
