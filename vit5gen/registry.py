"""One class for every plug: what is known under a name, here or in an installed package, and which options it takes."""

import importlib.metadata
import inspect
from collections.abc import Callable, Mapping
from typing import Any, Generic, TypeVar

from pydantic import BaseModel, ConfigDict, create_model

from vit5gen.config import validate
from vit5gen.system.errors import UserError, choose

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Plugs of one kind by name: classes or functions whose options are their keyword-only arguments.

    kind: what messages call them.  group: the entry-point group in which installed packages offer theirs, by name; a
    package is imported when its plug is asked for, so that a broken one hinders nobody else.
    """

    def __init__(self, kind: str, group: str | None = None) -> None:
        self.kind, self.group = kind, group
        self._known: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a plug to make it known as ``name``; `UserError` when another one has that name already."""

        def add(plug: T) -> T:
            known = self._known.setdefault(name, plug)
            if (known.__module__, known.__qualname__) != (plug.__module__, plug.__qualname__):
                raise UserError(
                    f"{self.kind}: {name!r} is already registered by {known.__module__}; choose another name."
                )
            self._known[name] = plug  # a reloaded module replaces its own
            return plug

        return add

    def names(self) -> list[str]:
        """Return all names, registered here or offered by installed packages; none of these is imported."""
        offered = importlib.metadata.entry_points(group=self.group).names if self.group else set()
        return sorted(self._known.keys() | offered)

    def get(self, name: str) -> T:
        """Return the plug called ``name``; `UserError` for an unknown name, a broken package, or two that offer it."""
        if name in self._known:
            return self._known[name]
        choose(self.kind, name, self.names())
        entry, *others = importlib.metadata.entry_points(group=self.group, name=name)
        packages = sorted({one.dist.name if one.dist else one.module for one in (entry, *others)})
        if any(other.value != entry.value for other in others):
            raise UserError(
                f"{self.kind}: {name!r} is offered by the packages {' and '.join(packages)}; uninstall all but one."
            )
        try:
            plug = entry.load()
        except Exception as error:  # what a stranger's module raises when it is imported can be anything
            raise UserError(
                f"{self.kind}: {name!r} of the package {packages[0]} cannot be imported "
                f"({type(error).__name__}: {error}); repair or uninstall that package."
            ) from error
        return self.register(name)(plug)

    def check(self, name: str, options: Mapping[str, Any], where: str) -> None:
        """Raise a `UserError` that begins with ``where`` for an option that the plug lacks, or of the wrong kind.

        Kinds and ranges are those of the annotations, such as ``Annotated[int, Field(ge=1)]`` or ``Literal["a", "b"]``;
        without one, that of the default.
        """
        validate(self._model(name), dict(options), where)

    def build(self, name: str, options: Mapping[str, Any], where: str, *arguments: Any) -> Any:
        """Call the plug called ``name`` with ``arguments`` and the checked ``options``."""
        self.check(name, options, where)
        return self.get(name)(*arguments, **options)

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the keyword-only arguments of the plug called ``name``."""
        parameters = inspect.signature(self.get(name), eval_str=True).parameters
        return {key: one for key, one in parameters.items() if one.kind is one.KEYWORD_ONLY}

    def _model(self, name: str) -> type[BaseModel]:
        """Build the pydantic model that checks the plug's options."""
        fields: dict[str, Any] = {}
        for key, one in self.options(name).items():
            annotation = one.annotation
            if annotation is one.empty:
                annotation = Any if one.default in (None, one.empty) else type(one.default)
            fields[key] = (annotation, ... if one.default is one.empty else one.default)
        config = ConfigDict(extra="forbid", strict=True, allow_inf_nan=False, arbitrary_types_allowed=True)
        return create_model(name, __config__=config, **fields)
