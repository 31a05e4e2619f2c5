"""One class for every plug: what is known under a name, here or in an installed package, and which options it takes."""

import importlib
import importlib.metadata
import importlib.util
import inspect
import pkgutil
import sys
from collections.abc import Callable, Iterable, Mapping
from typing import Annotated, Any, Generic, TypeVar, get_args, get_origin

from pydantic import ConfigDict, Field, create_model

from vit5gen.section import Float, Plug, validate
from vit5gen.system.errors import LARGEST, UserError, choose, nearest, short

T = TypeVar("T", bound=Callable[..., Any])


class Registry(Generic[T]):
    """Plugs of one kind by name: classes or functions whose options are their keyword-only arguments.

    kind: what messages call them.  group: the entry-point group in which installed packages offer theirs, by name; a
    package is imported when its plug is asked for, so that a broken one affects nobody else.  most: where whole numbers
    end whose annotation has no range of its own.
    """

    def __init__(self, kind: str, group: str | None = None, most: int = LARGEST) -> None:
        self.kind, self.group, self.most = kind, group, most
        self._known: dict[str, T] = {}
        self._loaded: set[str] = set()  # names that came from a package's entry point

    def register(self, name: str) -> Callable[[T], T]:
        """Decorate a plug to register it as ``name``; `UserError` when that name is already taken."""

        def add(plug: T) -> T:
            known = self._known.setdefault(name, plug)
            if _identity(known) != _identity(plug):
                raise UserError(f"{self.kind}: {name!r} is already registered by {_identity(known)[0]}; rename yours.")
            self._known[name] = plug  # a reloaded module replaces its own
            return plug

        return add

    def registered(self) -> list[str]:
        """Return the names that modules imported so far have registered, in that order."""
        return list(self._known)

    def names(self) -> list[str]:
        """Return all names: those registered here, in that order, and those that packages offer; none is imported."""
        offered = {one.name for one in self._entries()}
        return [*self._known, *sorted(offered - self._known.keys())]

    def get(self, name: str) -> T:
        """Return the plug called ``name``; `UserError` for an unknown name, a broken package, or two that offer it."""
        entries = self._entries(name=name)
        known = self._known.get(name)
        offers = {
            one.dist.name if one.dist else one.value: one.dist.name if one.dist else one.module for one in entries
        }
        if known is not None and name not in self._loaded:  # registered by a module, which may be that of an entry
            own = _identity(known)[0].split(".")[0]
            offers |= {} if own in {one.module.split(".")[0] for one in entries} else {own: own}
        if len(offers) > 1:
            packages = " and ".join(sorted(set(offers.values())))
            raise UserError(f"{self.kind}: {name!r} is offered by the packages {packages}; uninstall all but one.")
        if known is not None:
            return known
        choose(self.kind, name, self.names())
        try:
            plug = entries[0].load()
            if not callable(plug):
                raise TypeError("it is neither a class nor a function")
        except (Exception, SystemExit) as error:  # what a stranger's module raises when it is imported can be anything
            fault = f"cannot be imported ({type(error).__name__}: {error}); repair or uninstall that package."
            raise UserError(f"{self.kind}: {name!r} of the package {next(iter(offers.values()))} {fault}") from error
        self._loaded.add(name)
        return self._known.setdefault(name, plug)

    def check(self, name: str, options: Mapping[str, Any], where: str) -> dict[str, Any]:
        """Return the options as the plug gets them, "1e-4" as a number.

        Raises a `UserError` that begins with ``where`` for an option that the plug lacks, or of the wrong kind. Kinds
        and ranges are those of the annotations, such as ``Annotated[int, Field(ge=1)]`` or ``Literal["a", "b"]``;
        without one, that of the default.
        """
        if not isinstance(options, Mapping):
            raise UserError(f"{where}: {short(options)} is not a mapping of options; expected e.g. {{}}")
        known = self.options(name)
        for key in options:
            if key not in known:
                expected = f"expected {', '.join(known)}" if known else "it has none: set {}"
                raise UserError(f"{where}: {key!r} is not an option of {name!r}; {expected}.{nearest(key, known)}")
        fields: dict[str, Any] = {
            key: (self._kind_of(one), ... if one.default is one.empty else one.default) for key, one in known.items()
        }
        config = ConfigDict(strict=True, allow_inf_nan=False, arbitrary_types_allowed=True, protected_namespaces=())
        checked = validate(create_model(name, __config__=config, **fields), dict(options), where)
        return {key: getattr(checked, key) for key in options}

    def build(self, name: str, options: Mapping[str, Any], where: str, *arguments: Any) -> Any:
        """Call the plug called ``name`` with ``arguments`` and the checked ``options``."""
        return self.get(name)(*arguments, **self.check(name, options, where))

    def options(self, name: str) -> dict[str, inspect.Parameter]:
        """Return the keyword-only arguments of the plug called ``name``; `UserError` when they cannot be read."""
        plug = self.get(name)
        try:
            try:
                parameters = inspect.signature(plug, eval_str=True).parameters
            except NameError:  # of a type that is imported for type checkers alone: the defaults tell the kinds
                parameters = inspect.signature(plug).parameters
        except ValueError as error:
            fault = "does not tell its arguments; register a class or function that is written in Python."
            raise UserError(f"{self.kind}: {name!r} {fault}") from error
        options = {key: one for key, one in parameters.items() if one.kind is one.KEYWORD_ONLY}
        if hidden := [key for key in options if key.startswith("_")]:
            raise UserError(f"{self.kind}: {name!r} has the option {hidden[0]!r}; rename it to begin with a letter.")
        return options

    def _entries(self, **chosen: Any) -> list[importlib.metadata.EntryPoint]:
        """Return what installed packages offer; a table without a group looks for none."""
        return list(importlib.metadata.entry_points(group=self.group, **chosen)) if self.group else []

    def _kind_of(self, option: inspect.Parameter) -> Any:
        """Return what pydantic checks a value of the option by."""
        number = Annotated[Float, Field(gt=-1e38, lt=1e38)]  # which fp32 holds
        kind = option.annotation
        if get_origin(kind) is Annotated and get_args(kind)[0] is float:
            return Annotated[(Float, *get_args(kind)[1:])]
        if kind is option.empty or isinstance(kind, str):
            default = option.default
            whole_or_not = isinstance(default, int) and not isinstance(default, bool)
            kind = int | number if whole_or_not else Any if default in (None, option.empty) else type(default)
        return {int: Annotated[int, Field(ge=-self.most, le=self.most)], float: number}.get(kind, kind)


def import_modules(package: str, first: Iterable[str] = ()) -> None:
    """Import every module of a package, which registers the plugs in its folder: ``first`` these, then by name."""
    for name in (*first, *(module.name for module in pkgutil.iter_modules(sys.modules[package].__path__))):
        importlib.import_module(f"{package}.{name}")


def _identity(plug: Any) -> tuple[str, str]:
    """Return module and name of a plug, which one that is no class or function may lack."""
    return getattr(plug, "__module__", type(plug).__module__), getattr(plug, "__qualname__", repr(plug))


def name_and_options(plug: Plug) -> tuple[str, Mapping[str, Any]]:
    """Return the name and the options of a plug that is given as ``NAME`` or ``{NAME: {option: value}}``."""
    return (plug, {}) if isinstance(plug, str) else next(iter(plug.items()))


def needs(missing: Callable[..., dict[str, str]]) -> Callable[[T], T]:
    """Decorate a function that is a plug: ``missing()`` returns what it lacks on this machine, and how to get it."""

    def add(plug: T) -> T:
        plug.missing = missing  # type: ignore[attr-defined]
        return plug

    return add


def missing(plug: object, *arguments: Any) -> dict[str, str]:
    """Return what a plug says that it lacks on this machine, ``{path or package: how to get it}``; else nothing."""
    return getattr(plug, "missing", dict)(*arguments)


def missing_packages(packages: Iterable[str], remedy: str = "pip install {}") -> dict[str, str]:
    """Return those packages that are not installed, each with how to get it; none is imported."""
    absent = (name for name in packages if importlib.util.find_spec(name.replace("-", "_")) is None)
    return {name: remedy.format(name) for name in absent}
