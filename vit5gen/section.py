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
    problem = min(error.errors(include_url=False), key=lambda found: found["type"] != "extra_forbidden")
    path = [str(part) for part in problem["loc"]]
    where = kind.spell(path) if issubclass(kind, Section) else ".".join(path)
    more = f" ({error.error_count() - 1} more problems)" if error.error_count() > 1 else ""
    if problem["type"] == "extra_forbidden":
        known = _keys(kind, path[:-1])
        return f"unknown key {where!r}; expected one of {', '.join(known)}.{nearest(path[-1], known)}{more}"
    if problem["type"] == "missing":
        return f"{where!r} is missing; add it{more}"
    if problem["type"] == "model_type":
        first = _keys(kind, path)[0]
        return f"section {where!r}: expected keys such as '{first}:' in it, found {short(problem['input'])}{more}"
    message = problem["msg"].removeprefix("Value error, ")
    message = message[0].lower() + message[1:]
    value = "" if isinstance(problem["input"], dict) else f" = {short(problem['input'])}"
    return f"{where}{value}: {message}{more}" if where else message + more


def _keys(kind: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        annotation: Any = kind.model_fields[part].annotation
        kind = next(one for one in (annotation, *get_args(annotation)) if hasattr(one, "model_fields"))  # or None
    return list(kind.model_fields)
