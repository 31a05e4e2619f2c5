"""The one error that users meet: a single line with the name, the value, what was expected and what to do next."""

import difflib
from collections.abc import Iterable


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


def short(value: object) -> str:
    """Return what `repr` does, at most 80 characters of it."""
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."


def listed(names: Iterable[str], most: int = 10) -> str:
    """Return the names with commas between them; of many, the first and how many more there are."""
    names = list(names)
    return ", ".join(names[:most]) + (f" and {len(names) - most} more" if len(names) > most else "")


def choose(what: str, value: str, choices: Iterable[str]) -> str:
    """Return ``value`` when it is one of ``choices``; raise `UserError` that lists them and suggests the nearest."""
    choices = list(choices)
    if value not in choices:
        raise UserError(
            f"{what}: {value!r} is not known; expected one of {', '.join(choices)}.{nearest(value, choices)}"
        )
    return value
