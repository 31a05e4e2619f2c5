"""The command line, built from the sections of `vit5gen.commands`, which import what they need when they run.

So ``--help`` answers at once.
Bad input ends as one line on standard error and exit code 2.
"""

import argparse
import importlib
import inspect
import io
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, Literal, NoReturn, get_args, get_origin

import yaml
from pydantic import BaseModel

from vit5gen import __version__
from vit5gen.commands.options import ConfigOptions, Options, dashed
from vit5gen.config import Config, SamplingConfig, parse_yaml
from vit5gen.section import kinds, validate
from vit5gen.system.errors import UserError, choose, nearest, short

COMMANDS: tuple[str, ...] = ("init", "train", "encode", "sample", "evaluate", "compare", "convert", "classify", "study")
COMMANDS += ("copies", "report", "demo", "publish", "autoencoder", "benchmark")
_AS_YAML = {"guidance_interval"}  # a list that is one value
_WORDS = ("NAME", "PATH", "KEY")  # in kinds of values for which an option may have a better word


class Parser(argparse.ArgumentParser):
    """An `argparse.ArgumentParser` that raises `UserError` instead of printing its usage and exiting."""

    def __init__(self, **options: Any) -> None:
        super().__init__(allow_abbrev=False, formatter_class=argparse.RawDescriptionHelpFormatter, **options)

    def error(self, message: str) -> NoReturn:
        raise UserError(f"{self.prog}: {message}; `{self.prog} --help` lists the options")


@contextmanager
def exit_on_bad_input() -> Iterator[None]:
    """Print a `UserError`, or an error of the machine, as one line on standard error and exit with code 2.

    Names that the terminal cannot show are printed as escapes: they must not end a command that has done its work.
    """
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")
    try:
        yield
    except UserError as error:
        _exit(str(error))
    except OSError as error:
        _exit(f"{error.filename or 'this machine'}: {error.strerror or error}; check path, permissions and disk")
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and "can't allocate memory" not in str(error):
            raise
        _exit("out of memory; choose smaller sizes or batches, see `vit5gen train CONFIG --dry-run`")


def _exit(message: str) -> NoReturn:
    print(f"error: {' '.join(message.split())}", file=sys.stderr)
    sys.exit(2)


def _add_field(group: Any, section: type[BaseModel], key: str, option: str, kind: str) -> None:
    """Make a field an argument, shown as one of its ``kind``, whose values stay text until `_value` reads them."""
    field = section.model_fields[key]
    extra: dict[str, Any] = field.json_schema_extra if isinstance(field.json_schema_extra, dict) else {}
    option = extra.get("option", option)
    switch, shown = field.annotation is bool and "." not in option, str(field.description)
    if not (switch or field.is_required() or field.default in (None, [])):
        shown += f" [{yaml.safe_dump(field.default, default_flow_style=True, width=999).splitlines()[0]}]"
    more: dict[str, Any] = {"help": shown.replace("%", "%%")}
    if kind.startswith("[") and "." not in option and key not in _AS_YAML:
        kind = kind.removeprefix("[").removesuffix(", ...]")
        more |= {"nargs": "+"} | ({"action": "extend"} if option else {})
    metavar = extra.get("metavar", kind) if any(word in kind for word in _WORDS) else kind
    more |= {"action": "store_true"} if switch else {"metavar": metavar}
    if option:
        group.add_argument(option, dest=key if "." not in option else option, default=argparse.SUPPRESS, **more)
    else:
        group.add_argument(key, **more)


def _value(section: type[BaseModel], key: str, option: str, text: Any) -> Any:
    """Read an option's text as YAML, unless its key takes a string."""
    kinds = _kinds(section.model_fields[key].annotation)
    if isinstance(text, bool) or (text == "null" and type(None) in kinds):
        return text if isinstance(text, bool) else None
    as_text = str in kinds and not kinds & {dict, bool}
    if isinstance(text, list):
        return [one if as_text else _parse(option, one) for one in text]
    return text if as_text and list not in kinds else _parse(option, text)


def _kinds(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of; a choice among strings counts as one."""
    if get_origin(annotation) is Literal:
        return {type(one) for one in get_args(annotation)}
    inner = set().union(*(_kinds(one) for one in get_args(annotation)))
    return {get_origin(annotation) or annotation} | inner


def _parse(option: str, text: str) -> Any:
    try:
        return parse_yaml(text)
    except yaml.YAMLError as error:
        expected = "expected e.g. 3, '[a, b]' or '{key: 1}'"
        raise UserError(f"{option} = {short(text)} is not valid YAML; {expected}") from error


def build_parser() -> Parser:
    """Build the parser of all commands from their sections."""
    about = "Train, sample and evaluate class-conditional image generators. Exit code 2 means bad input."
    parser = Parser(prog="vit5gen", description=about)
    parser.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    commands = parser.add_subparsers(metavar="COMMAND", required=True, parser_class=Parser)
    for name in COMMANDS:
        # A command: its docstring is the help, its fields are the options.
        module = importlib.import_module(f"vit5gen.commands.{name}")
        section: type[Options] = getattr(module, f"{name.capitalize()}Options")
        first, _, rest = inspect.cleandoc(section.__doc__ or "").partition("\n")
        brief = first[0].lower() + first[1:].rstrip(".")
        sub: Parser = commands.add_parser(name, help=brief, description=rest.strip() or brief)
        sub.set_defaults(command=(name, section, module.run), parser=sub)
        draws = issubclass(section, SamplingConfig)
        sampling = sub.add_argument_group("sampling", SamplingConfig.__doc__) if draws else sub
        for key, kind in kinds(section).items():
            if key not in ("overrides", *section.unused):
                group = sampling if key in SamplingConfig.model_fields else sub
                _add_field(group, section, key, f"--{dashed(key)}", kind)
        # Every key of the configuration is an option too.
        if issubclass(section, ConfigOptions):
            sub.usage = "%(prog)s CONFIG --output PATH [--section.key VALUE ...] [other options]"
            for part, field in Config.model_fields.items():
                inner: Any = field.annotation
                used = {
                    key: kind for key, kind in kinds(inner).items() if not {part, f"{part}.{key}"} & set(section.unused)
                }
                group = sub.add_argument_group(part, inner.__doc__) if used else sub
                for key, kind in used.items():
                    _add_field(group, inner, key, f"--{part}.{key}", kind)
    return parser


def _read(args: argparse.Namespace) -> Options:
    """Check what was given and return the command's section."""
    name, section, _ = args.command
    given: dict[str, Any] = {}
    for key, text in vars(args).items():
        if key in section.model_fields:
            given[key] = _value(section, key, f"--{dashed(key)}", text)
        elif key.startswith("--"):
            part, inner = key[2:].split(".")
            kind: Any = Config.model_fields[part].annotation
            given.setdefault("overrides", {})[key[2:]] = _value(kind, inner, key, text)
    missing = [key for key, field in section.model_fields.items() if field.is_required() and key not in given]
    if missing:
        args.parser.error(f"the following arguments are required: {', '.join(f'--{dashed(key)}' for key in missing)}")
    return validate(section, given, name)


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run one command and exit: 0 done, 2 bad input (one line on standard error), 130 Ctrl-C, or a code of its own."""
    try:
        with exit_on_bad_input():
            parser, words = build_parser(), list(sys.argv[1:] if argv is None else argv)
            if not words:  # as pip does: the help is the answer, not an error
                parser.print_help()
                sys.exit(0)
            if not words[0].startswith("-"):
                choose("command", words[0], COMMANDS)
            elif words[0] not in ("-h", "--help", "--version"):
                raise UserError(f"{short(words[0])} stands before the command; expected `vit5gen COMMAND [options]`")
            args, unknown = parser.parse_known_args(words)
            if unknown:
                prog, first = args.parser.prog, short(unknown[0])
                if unknown[0].startswith(tuple(f"--{one}" for one in args.command[1].unused)):
                    raise UserError(f"{prog}: {first} has no effect on this command; omit it")
                hint = nearest(unknown[0].split("=")[0], args.parser._option_string_actions)
                raise UserError(f"{prog}: unknown argument {first}.{hint} `{prog} --help` lists the options")
            sys.exit(args.command[-1](_read(args)) or 0)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
