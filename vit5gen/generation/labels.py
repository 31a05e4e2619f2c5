"""Classes by id and by name."""

import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from itertools import product
from numbers import Real
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit5gen.system.errors import UserError, composed, nearest, short

Labels = int | str | Sequence[int | str] | Sequence[Sequence[float]] | Tensor | np.ndarray | None
NONE = "none"  # how the command line calls no class
_ROUNDING = 1e-4  # of the sum of weights


def read_labels(class_labels: Labels, names: dict[int, str], num_classes: int, has_null: bool) -> Tensor:
    """Return ids (B,) int64, or rows of weights (B, num_classes + 1) float32 of which the null label has the last.

    class_labels: as for `find_class_ids`, or rows with a weight for each class (and the null label), or None for the
    null label alone. Raises `UserError` for a class that does not exist, or weights that are no parts of 1.
    """
    if class_labels is None:
        if not has_null:
            reason = "the model has no null label, because it was trained without label dropout"
            raise UserError(f"class_labels = None: {reason}; give a class")
        return torch.tensor([num_classes])
    rows = class_labels.tolist() if isinstance(class_labels, Tensor | np.ndarray) else class_labels
    rows = [_row(one) for one in rows] if isinstance(rows, list | tuple) else []
    if not rows or None in rows:
        return torch.tensor(find_class_ids(class_labels, names, num_classes))

    # Rows of weights.
    for i, row in enumerate(rows):
        what = f"class_labels: row {i}"
        if len(row) not in (num_classes, num_classes + has_null):
            raise UserError(f"{what} has {len(row)} weights; expected one for each of the {num_classes} classes")
        if wrong := [weight for weight in row if not (math.isfinite(weight) and weight >= 0)]:
            raise UserError(f"{what} has the weight {wrong[0]}; expected finite numbers of at least 0")
        if abs(math.fsum(row) - 1) > _ROUNDING:
            raise UserError(f"{what}: its weights sum to {math.fsum(row):.6g}; expected 1; divide them by their sum")
    return torch.tensor([[*row, *[0.0] * (num_classes + 1 - len(row))] for row in rows])


def read_mixture(text: str, names: dict[int, str], num_classes: int, has_null: bool) -> list[float] | None:
    """Return the weights over classes, and null label if there is one, of ``none`` or ``cat=0.5,dog=0.5``.

    None for any other text, and where a class has that name. Raises `UserError` as `read_labels` does.
    """
    parts = re.findall(r"(.+?)=([^=,]*)(?:,|$)", text)
    if ids_called(text, names) or text not in (NONE, ",".join(map("=".join, parts))):
        return None
    if text == NONE:
        return one_hot(int(read_labels(None, names, num_classes, has_null)), num_classes + 1)
    row = [0.0] * (num_classes + has_null)
    try:
        for name, weight in parts:
            null = name == NONE and not ids_called(name, names)
            row[int(read_labels(None if null else name, names, num_classes, has_null))] += float(weight)
        read_labels([row], names, num_classes, has_null)
    except ValueError as error:  # a UserError is one, too
        reason = str(error).removeprefix("class_labels: row 0").removeprefix(":").strip()
        raise UserError(f"class {text!r}: {reason}; expected e.g. cat=0.5,dog=0.5") from None
    return row


def one_hot(label: int, width: int) -> list[float]:
    """Return the weights of a single label."""
    return [float(i == label) for i in range(width)]


def _row(label: Any) -> Any:
    """Return a row of numbers as a list, None for what is none."""
    row = label.tolist() if isinstance(label, Tensor | np.ndarray) else label
    numbers = isinstance(row, list | tuple) and all(isinstance(x, Real) and not isinstance(x, bool) for x in row)
    return [float(x) for x in row] if numbers else None


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
        expected = "an id, a name or a flat list"
        expected += "; weights over classes are rows: [[0.5, 0.5, 0, ...]]" if isinstance(label, float) else ""
        raise UserError(f"class_labels: {label!r} is neither an id nor a name; expected {expected}")
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
