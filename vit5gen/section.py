"""What a section of settings is, what its values may be, and what is said of one that is wrong."""

import os
import re
from typing import Annotated, Any, Literal, TypeVar, get_args

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WithJsonSchema

from vit5gen.system.errors import LARGEST, UserError, composed, nearest, short


def _read_number(value: Any) -> Any:
    """Read 1e-4, which has no dot and so is a string in YAML 1.1; another value is left as it is."""
    number = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
    return float(value) if isinstance(value, str) and number.fullmatch(value) else value


Float = Annotated[float, BeforeValidator(_read_number)]
Positive = Annotated[Float, Field(gt=0)]
Ratio = Annotated[Float, Field(gt=0, le=1000)]
NonNegative = Annotated[Float, Field(ge=0)]
Unit = Annotated[Float, Field(ge=0, le=1)]
Fraction = Annotated[Float, Field(gt=0, lt=1)]
Decay = Annotated[Float, Field(ge=0, lt=1)]
Length = Annotated[Float, Field(ge=0.01, le=0.28)]
# Beyond these a value is a slip of the finger: it would end in a hang, an overflow or a machine without memory.
MOST_WIDTH, MOST_LAYERS, MOST_CLASSES, MOST_SIDE = 2**16, 1000, 10**7, 2**14
MOST_IMAGES, MOST_BATCH, MOST_STEPS, MOST_WORKERS = 10**7, 2**20, 10**6, 1024
# A path, in which ~ is the home folder; a URL, or a name on the hub, stays as it is.
UserPath = Annotated[str, AfterValidator(os.path.expanduser), WithJsonSchema({"type": "string", "format": "path"})]
Name = Annotated[str, AfterValidator(composed)]
Natural = Annotated[int, Field(ge=0, le=LARGEST)]
Exif = Literal["apply", "ignore"]
Rules = Literal[1, 2]
Count = Annotated[int, Field(ge=1, le=LARGEST)]
Several = Annotated[int, Field(ge=2, le=MOST_IMAGES)]
StepCount = Annotated[int, Field(ge=1, le=MOST_STEPS)]
BatchSize = Annotated[int, Field(ge=1, le=MOST_BATCH)]
Width = Annotated[int, Field(ge=1, le=MOST_WIDTH)]
Layers = Annotated[int, Field(ge=1, le=MOST_LAYERS)]
Side = Annotated[int, Field(ge=1, le=MOST_SIDE)]
Classes = Annotated[int, Field(ge=1, le=MOST_CLASSES)]
Tiles = Annotated[int, Field(ge=1, le=1000)]
Small = Annotated[int, Field(ge=0, le=MOST_WORKERS)]
T = TypeVar("T", bound=BaseModel)
# What pydantic says, and what is said here.
_WORDS = {
    "^Value error, ": "",
    "^Input should be (?=greater|less)": "set it to a number ",
    "^Input should be a valid integer.*": "set it to a whole number",
    "^Input should be a valid boolean.*": "set it to true or false",
    "^Input should be a valid list": "set it to a list, e.g. [a, b]",
    "^Input should be a valid dictionary": "set it to a mapping, e.g. {key: value}",
    "^Input should be a valid string": "set it to a text, in quotes where it looks like a number",
    "^Input should be ": "set it to ",
    "^List should have (.*) after validation.*": r"give \1",
}
_UNKNOWN = ("extra_forbidden", "invalid_key")  # the latter is no text: 1, or on, YAML's true
_BOUNDS = {"minimum": "ge", "exclusiveMinimum": "gt", "maximum": "le", "exclusiveMaximum": "lt"}  # of JSON schema


def _read_numbers(options: Any) -> Any:
    return {key: _read_number(value) for key, value in options.items()} if isinstance(options, dict) else options


def _check_plug(value: Any) -> Any:
    if isinstance(value, dict) and len(value) == 1:
        ((name, options),) = value.items()
        if isinstance(name, str) and isinstance(options, dict):
            return {name: _read_numbers(options)}
    if not isinstance(value, str):
        raise ValueError("expected NAME, or with options NAME: {option: value}")
    return value


PlugOptions = Annotated[dict[str, Any], BeforeValidator(_read_numbers)]
Plug = Annotated[str | dict[str, dict[str, Any]], BeforeValidator(_check_plug)]


class Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True)

    @classmethod
    def spell(cls, path: list[str]) -> str:
        """Return how messages name a key."""
        return ".".join(path)


def kinds(section: type[BaseModel]) -> dict[str, str]:
    """Return what the values of each key may be, as help shows it: ``N >= 1``, ``0..1``, ``{a,b}``, ``true|false``."""
    return {key: _kind(one) for key, one in section.model_json_schema()["properties"].items()}


def _kind(schema: dict[str, Any]) -> str:
    if "anyOf" in schema:
        return "|".join(_kind(one) for one in schema["anyOf"] if one.get("type") != "null")
    if "enum" in schema:
        return f"{{{','.join(map(str, schema['enum']))}}}"
    match schema.get("type"):
        case _ if "const" in schema:
            return str(schema["const"])
        case "boolean":
            return "true|false"
        case "string":
            return "PATH" if schema.get("format") == "path" else "NAME"
        case "integer" | "number" as number:
            return _range("N" if number == "integer" else "X", schema)
        case "array":
            one = _kind(schema["items"])
            return f"[{one}, {one if schema.get('maxItems') == 2 else '...'}]"
    return "{KEY: VALUE}"


def _range(name: str, schema: dict[str, Any]) -> str:
    """Return the range of a number; where an int64 ends goes without saying."""
    bounds = {_BOUNDS.get(key, key): bound for key, bound in schema.items() if bound != LARGEST}
    least = [(bounds[key], sign) for key, sign in (("ge", ">="), ("gt", ">")) if key in bounds]
    most = [f" {sign} {bounds[key]}" for key, sign in (("le", "<="), ("lt", "<")) if key in bounds]
    if {"ge", "le"} <= bounds.keys():
        return f"{bounds['ge']}..{bounds['le']}"
    if least and most:
        return f"{least[0][0]} {least[0][1].replace('>', '<')} {name}{most[0]}"
    return "".join([name, *(f" {sign} {bound}" for bound, sign in least), *most])


def validate(kind: type[T], data: dict[str, Any], what: str) -> T:
    """Build ``kind`` from plain values; or raise a one-line `UserError` naming ``what`` and the first bad key."""
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        raise UserError(f"{what}: {_first_problem(kind, error)}") from None


def _first_problem(kind: type[BaseModel], error: ValidationError) -> str:
    # A mistyped key explains the one that is missing.
    found = error.errors(include_url=False)
    problem = min(found, key=lambda one: one["type"] not in _UNKNOWN)
    path = [str(part) for part in problem["loc"]]
    section, keys = _section_of(kind, path)
    others = len({one["loc"][: len(keys)] for one in found}) - 1
    more = f" ({others} more problem{'s' * (others > 1)})" if others else ""

    # Keys that are unknown or absent, and sections that are none.
    if problem["type"] in _UNKNOWN:
        hint = f"expected one of {', '.join(section.model_fields)}.{nearest(path[-1], section.model_fields)}"
        return f"unknown key {_spell(kind, path)!r}; {hint}{more}"
    if problem["type"] == "missing":
        return f"{_spell(kind, path)!r} is missing; add it{more}"
    inner, _ = _section_of(kind, [*path, ""])
    if problem["type"] == "model_type":
        expected = f"expected keys such as '{next(iter(inner.model_fields))}:' in it"
        return f"section {_spell(kind, path)!r}: {expected}, found {short(problem['input'])}; fix the file{more}"

    # Values: of what kind they must be, in words, and in which range.
    message = _in_words(problem["msg"])
    shown = kinds(section)[keys[-1]] if keys and issubclass(section, Section) else ""
    if len(path) > len(keys) and "|" in shown and not shown.startswith("["):
        path, message = keys, f"set it to {shown.replace('|', ' or ')}"
    elif message.startswith("set it to a") and re.fullmatch(r"[^{]*\d[^{]*", shown):
        message += f" ({shown})"
    elif problem["type"] == "literal_error":
        hint = nearest(str(problem["input"]), re.findall("'(.+?)'", problem["ctx"]["expected"]))
        message += f".{hint}" if hint else ""
    if (key := message.split()[0].rstrip(":")) in inner.model_fields and isinstance(problem["input"], dict):
        return f"{_spell(kind, [*path, key])}{message.removeprefix(key)}{more}"
    value = "" if isinstance(problem["input"], dict) else f" = {short(problem['input'])}"
    return f"{_spell(kind, path)}{value}: {message}{more}" if path else message + more


def _in_words(message: str) -> str:
    """Return pydantic's message in the words of this package."""
    for words, ours in _WORDS.items():
        message = re.sub(words, ours, message)
    return message[0].lower() + message[1:]


def _spell(kind: type[BaseModel], path: list[str]) -> str:
    return kind.spell(path) if issubclass(kind, Section) else ".".join(path)


def _section_of(kind: type[BaseModel], path: list[str]) -> tuple[type[BaseModel], list[str]]:
    """Return the section in which a path ends, and the path as far as its parts name keys."""
    for depth, part in enumerate(path[:-1], start=1):
        annotation: Any = kind.model_fields[part].annotation
        inner = [one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields")]  # or None
        if not inner:
            return kind, path[:depth]
        kind = inner[0]
    return kind, path
