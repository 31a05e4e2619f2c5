"""The one error that users meet: a single line with the name, the value, what was expected and what to do next."""

import difflib
import os
import unicodedata
from collections import Counter
from collections.abc import Iterable
from contextlib import suppress
from numbers import Integral

LARGEST = 2**63 - 1  # of int64, where whole numbers end that have no range of their own


class UserError(ValueError):
    """Bad input. The command line prints its message as one line and exits with code 2."""

    def __str__(self) -> str:
        """Return the message; where a DataLoader's worker put its traceback before it, the last line has it."""
        message = super().__str__().strip()
        return message.splitlines()[-1].partition(": ")[2] if message.startswith("Caught ") else message


def nearest(name: str, choices: Iterable[str]) -> str:
    """Return ``" Did you mean 'x'?"`` for the choice most like ``name``, or an empty string when none is close."""
    by_lower = {str(choice).lower(): str(choice) for choice in choices}
    matches = difflib.get_close_matches(str(name).lower(), by_lower, n=1)
    return f" Did you mean {by_lower[matches[0]]!r}?" if matches else ""


def composed(name: str) -> str:
    """Return a name as names are compared: no spaces around it, accents composed, which a Mac's files decompose.

    The name of a file that this machine's locale could not read is read as UTF-8.
    """
    if any("\udc80" <= letter <= "\udcff" for letter in name):
        with suppress(UnicodeEncodeError):  # beside letters that the locale lacks: no name of a file
            name = os.fsencode(name).decode("utf-8", "surrogateescape")
    return unicodedata.normalize("NFC", name).strip()


def distinct(what: str, names: Iterable[str]) -> list[str]:
    """Return the names composed; raise `UserError` where two of them are then one."""
    found = [composed(name) for name in names]
    if twice := [name for name, count in Counter(found).items() if count > 1]:
        raise UserError(f"{what}: {twice[0]!r} is listed twice; name each class once")
    return found


def short(value: object) -> str:
    """Return what `repr` does, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Iterable[str], most: int = 10) -> str:
    """Return the names with commas between them; of many, the first and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def check_whole(what: str, value: object, least: int = 1, most: int = LARGEST) -> int:
    """Return a whole number; ``what`` is its name with ``=``. Raise `UserError` for one out of range or none."""
    if isinstance(value, bool) or not isinstance(value, Integral) or not least <= int(value) <= most:
        raise UserError(f"{what} {short(value)}; expected a whole number of at least {least} and at most {most}")
    return int(value)


def choose(what: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` when it is one of ``choices``; raise `UserError` that lists them and suggests the nearest."""
    choices = list(choices)
    if value not in choices:
        known = f"{', '.join(choices)}.{nearest(value, choices)}"
        raise UserError(f"{what}: {short(value)} is not known; expected one of {known}")
    return value
