"""What the sections of commands share: how a field becomes an option, and which options cannot be combined."""

from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any, ClassVar, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from vit5gen.config import Config, load_config
from vit5gen.section import MOST_IMAGES, Length, Section, UserPath
from vit5gen.system.errors import UserError
from vit5gen.system.files import check_writable

S = TypeVar("S", bound=Section)
Images = Annotated[int, Field(ge=1, le=MOST_IMAGES)]


def _check_utf8(path: str) -> str:
    try:
        path.encode()
    except UnicodeEncodeError:
        raise ValueError("expected a path in UTF-8, as files of weights need; choose another path") from None
    return path


# Of an output that holds weights: safetensors can write a path that is no UTF-8, but cannot read it again.
Utf8Path = Annotated[UserPath, AfterValidator(_check_utf8)]


def _split(values: Any) -> Any:
    """Return the parts of texts between commas, as numbers; what is none is told by the check of all values."""
    with suppress(ValueError, TypeError):
        return [float(part) for value in values for part in str(value).strip("[]").split(",")]
    return values


# 0.05,0.1 or 0.05 0.1 or [0.05, 0.1], in ascending order; what is given twice counts once.
Lengths = Annotated[list[Length], BeforeValidator(_split), AfterValidator(lambda found: sorted(set(found)))]


def argument(default: Any, metavar: str, description: str, **more: Any) -> Any:
    """Describe a field whose value is shown as ``metavar``; option="" makes it positional, else names its option."""
    return Field(default, description=description, json_schema_extra={"metavar": metavar, **more})


class Options(Section):
    """The options of a command.

    excludes: for an option, those that cannot be combined with it.  unused: the options, and the sections and keys of a
    configuration, that the command does not use.
    """

    excludes: ClassVar[dict[str, tuple[str, ...]]] = {}
    unused: ClassVar[tuple[str, ...]] = ()

    @classmethod
    def spell(cls, path: list[str]) -> str:
        """Return how messages name an option; the place in a list is left out."""
        if not path:
            return ""
        field = cls.model_fields.get(path[0])
        extra: Any = field.json_schema_extra if field is not None else None
        return (extra or {}).get("option") or f"--{dashed(path[0])}"

    @model_validator(mode="after")
    def _no_idle_options(self) -> "Options":
        given = {name for name in self.model_fields_set if getattr(self, name) is not None}
        for name, others in self.excludes.items():
            if name in given and (idle := sorted(given & set(others))):
                raise ValueError(f"{self.spell(idle)} has no effect with --{dashed(name)}; omit it")
        return self

    def part(self, section: type[S]) -> S:
        """Return the options that are those of ``section``."""
        return section.model_validate(self.model_dump(include=set(section.model_fields), exclude_unset=True))


def with_picture(output: str) -> Path:
    """Return where the picture beside a card belongs; raise `UserError` unless both can be written."""
    if (picture := Path(output).with_suffix(".png")) == Path(output):
        raise UserError(f"--output {output}: a picture is written there; name the card {picture.stem}.json")
    for file in (output, picture):
        check_writable(file)
    return picture


class ConfigOptions(Options):
    """The options of a command that takes a run's configuration, whose keys are options too, but for the ``unused``."""

    config: UserPath = argument(..., "CONFIG", "YAML file, e.g. configs/quickstart.yaml", option="")
    overrides: dict[str, Any] = Field({}, exclude=True)

    def load(self) -> Config:
        """Return the configuration, with the keys that were given as options."""
        return load_config(self.config, self.overrides)


def dashed(name: str) -> str:
    """Return the spelling of a field as an option."""
    return name.replace("_", "-")
