"""Help shows what a value may be, in which range, and lists only what a command reads.

Stands for test_hf_argparser.py of transformers, where an option's type and choices follow from its annotation.
"""

import importlib
import inspect
import re
from pathlib import Path

import pytest
from pydantic import ValidationError
from tiny_run import make_inputs

from vit5gen.cli import COMMANDS, build_parser
from vit5gen.config import (
    Config,
    DataConfig,
    DrawConfig,
    FlowConfig,
    ModelConfig,
    ReadConfig,
    TrainingConfig,
    VaeConfig,
    load_config,
)
from vit5gen.data.encoding import encode_images
from vit5gen.section import Section, kinds


def help_of(command: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit):
        build_parser().parse_args([command, "--help"])
    return capsys.readouterr().out


@pytest.mark.parametrize("command", COMMANDS)
def test_no_option_is_shown_as_a_mere_value(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    shown = help_of(command, capsys)
    options = re.findall(r"^  (--\S+) ?(.*)$", shown, re.MULTILINE)
    assert options
    assert not [option for option, kind in options if kind.startswith("VALUE")]


def test_kinds_and_ranges_of_keys_are_shown(capsys: pytest.CaptureFixture[str]) -> None:
    """Stands for HfArgumentParserTest.test_with_literal and test_with_default_bool of transformers."""
    shown = help_of("train", capsys)
    for line in (
        "--training.num_steps N >= 0",
        "--model.num_layers 1..1000",
        "--model.class_dropout_prob 0..1",
        "--model.mlp_ratio 0 < X <= 1000",
        "--data.held_out 0 < X < 1",
        "--training.learning_rate X > 0",
        "--training.ema_decays [0 <= X < 1, ...]",
        "--flow.path {linear,gvp,vp}",
        "--flow.time_shift X > 0|auto",
        "--training.compile true|false|auto",
        "--data.horizontal_flip true|false",
        "--data.path PATH",
        "--model.backbone_kwargs {KEY: VALUE}",
        "--training.trackers [{tensorboard,wandb}, ...]",
    ):
        assert re.search(rf"^  {re.escape(line)}(\n|  )", shown, re.MULTILINE), line
    assert "[true]" in shown
    assert "[True]" not in shown


@pytest.mark.parametrize(
    ("section", "key", "kind", "inside", "outside"),
    [
        (ModelConfig, "num_layers", "1..1000", (1, 1000), (0, 1001)),
        (ModelConfig, "class_dropout_prob", "0..1", (0, 1), (-0.1, 1.1)),
        (DataConfig, "held_out", "0 < X < 1", (0.1, 0.9), (0, 1)),
        (TrainingConfig, "num_steps", "N >= 0", (0, 10**9), (-1, 0.5)),
        (FlowConfig, "time_shift", "X > 0|auto", (0.1, "auto"), (0, "fast")),
    ],
)
def test_the_range_that_is_shown_is_the_one_that_is_checked(
    section: type[Section], key: str, kind: str, inside: tuple[object, ...], outside: tuple[object, ...]
) -> None:
    assert kinds(section)[key] == kind
    for value in inside:
        assert getattr(section(**{key: value}), key) == value
    for value in outside:
        with pytest.raises(ValidationError):
            section(**{key: value})


def test_encode_lists_every_key_that_it_reads_and_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config, read = load_config(make_inputs(tmp_path)), set[str]()
    for part, section in (("data", DataConfig), ("vae", VaeConfig), ("training", TrainingConfig), ("flow", FlowConfig)):

        def watched(self: object, key: str, part: str = part) -> object:
            read.add(f"{part}.{key}")
            return object.__getattribute__(self, key)

        monkeypatch.setattr(section, "__getattribute__", watched)
    encode_images(config, tmp_path / "latents")
    monkeypatch.undo()
    listed = set(re.findall(r"^  --(\w+\.\w+)", help_of("encode", capsys), re.MULTILINE))
    keys = {f"{part}.{key}" for part, field in Config.model_fields.items() for key in field.annotation.model_fields}
    of_hub = {"data.image_column", "data.label_column"}  # of the source huggingface
    assert (read & keys) - {"data.latents", "data.from_images"} == listed - of_hub


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_reads_the_options_that_it_lists(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    module = importlib.import_module(f"vit5gen.commands.{command}")
    section = getattr(module, f"{command.capitalize()}Options")
    code = inspect.getsource(module) + "".join(
        inspect.getsource(base) for base in section.__mro__ if base.__module__.startswith("vit5gen.commands.")
    )
    assert set(section.unused) <= {*section.model_fields, *Config.model_fields, "data.latents", "data.from_images"}
    for part in (DrawConfig, ReadConfig):
        if issubclass(section, part):
            name = part.__name__
            assert f"options.part({name})" in code or f"options.model_dump(include=set({name}.model_fields)" in code
    own = section.model_fields.keys() - DrawConfig.model_fields.keys() - ReadConfig.model_fields.keys() - {"overrides"}
    if "**options.model_dump()" not in code:
        idle = [key for key in own if not re.search(rf'\b(options|self)\.{key}\b|"{key}"', code)]
        assert not idle
    assert ("--shuffle" in help_of(command, capsys)) == (command in ("evaluate", "compare"))
