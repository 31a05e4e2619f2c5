"""Classes by id and by name."""

import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from typing import Any

import numpy as np
from torch import Tensor

from vit5gen.system.errors import UserError, composed, nearest, short

Labels = int | str | Sequence[int | str] | Tensor | np.ndarray


def find_class_ids(class_labels: Labels, names: dict[int, str], num_classes: int) -> list[int]:
    """Return the ids of an id, a name, or a list of both; raise `UserError` for a class that does not exist."""
    if isinstance(class_labels, Tensor | np.ndarray):
        class_labels = class_labels.tolist()
    entries = class_labels if isinstance(class_labels, Sequence) and not isinstance(class_labels, str) else None
    return [_class_id(entry, names, num_classes) for entry in ([class_labels] if entries is None else entries)]


def _class_id(label: object, names: dict[int, str], count: int) -> int:
    """Return the id of one class."""
    # A name, or in digits an id that no class has for a name.
    if isinstance(label, str):
        matches = ids_called(label, names)
        if len(matches) > 1:
            several = ", ".join(repr(names[i]) for i in sorted(matches))
            advice = f"give one of the ids {sorted(matches)}, or the exact name: one of {several}"
            raise UserError(f"class {label!r} is the name of several classes; {advice}")
        known = {composed(part) for name in names.values() for part in (name, *name.split(","))}
        # Where all names are numbers, a number that is no name is a slip, not an id.
        numbers = [name.isdecimal() for name in known]
        is_id = re.fullmatch(r"[0-9]{1,18}", label.strip()) and not (names and all(numbers))
        if not matches and not is_id:
            listed = ", ".join(names.values()) if len(names) <= 12 else f"{len(names)} names"
            an_id = "" if names and all(numbers) else f", or an id in 0..{count - 1}"
            expected = f"one of {listed}{an_id}" if names else f"an id in 0..{count - 1} (there are no class names)"
            raise UserError(f"class {label!r} does not exist; expected {expected}.{nearest(label, known)}")
        if not matches and any(numbers) and int(label) < count:
            warnings.warn(f"no class is named {label!r}; using it as id {int(label)}", stacklevel=4)
        label = min(matches) if matches else int(label)

    # An id.
    if isinstance(label, bool) or not isinstance(label, int | np.integer):
        raise UserError(f"class_labels: {label!r} is neither an id nor a name; expected an id, a name or a flat list")
    if not 0 <= label < count:
        raise UserError(f"class {label} does not exist; expected an id in 0..{count - 1}")
    return int(label)


def ids_called(label: str, names: dict[int, str]) -> set[int]:
    """Return the ids of a name: exact spelling counts more than any case, the whole more than a part between commas."""
    full_names = {i: [name] for i, name in names.items()}
    synonyms = {i: name.split(",") for i, name in names.items()}
    spellings: list[Callable[[str], str]] = [str, str.casefold]
    for spell, names_of in product(spellings, (full_names, synonyms)):
        wanted = spell(composed(label))
        if found := {i for i, known in names_of.items() if wanted in (spell(composed(name)) for name in known)}:
            return found
    return set()


def names_by_id(id2label: Any) -> dict[int, str]:
    """Return names by id, which JSON has turned into strings; raise `UserError` where they are something else."""
    given = {} if id2label is None else id2label
    found = {str(i): name for i, name in given.items()} if isinstance(given, Mapping) else None
    if found is None or not all(i.isdecimal() and len(i) < 10 and isinstance(name, str) for i, name in found.items()):
        raise UserError(f"id2label = {short(given)}; expected the names of classes by id, e.g. {{0: 'cat', 1: 'dog'}}")
    return {int(i): name for i, name in found.items()}
