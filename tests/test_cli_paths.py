"""``~`` stands for the home folder in every path, of options and of configurations, of old runs too.

No public suite tests this: upstream it is left to the shell, which expands no ``--output=~/run`` and no line of YAML.
"""

from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import yaml
from tiny_run import make_inputs

from vit5gen.cli import COMMANDS, main
from vit5gen.config import AutoencoderTraining, Config, load_config, recorded_values
from vit5gen.section import kinds, validate
from vit5gen.training.run_folder import differences, to_yaml

# Texts that name something other than a file; every other one is a path.
NAMES = {
    *("backbone", "preset", "source", "split", "classes", "image_column", "label_column", "held_out_split", "sampler"),
    *("extractor", "init_weights", "init_digest", "optimizer", "trainable", "weights_sha256", "key", "metrics"),
    *("weights", "drop_prefix", "repo", "license", "sweep", "morph", "rows"),
}


def sections() -> dict[str, Any]:
    found = {
        name: getattr(import_module(f"vit5gen.commands.{name}"), f"{name.capitalize()}Options") for name in COMMANDS
    }
    parts = {name: field.annotation for name, field in Config.model_fields.items()}
    return found | parts | {"autoencoder file": AutoencoderTraining}


@pytest.mark.parametrize("name", sections())
def test_every_text_is_a_path_or_known_as_none(name: str) -> None:
    paths = {key for key, kind in kinds(sections()[name]).items() if "PATH" in kind}
    texts = {key for key, kind in kinds(sections()[name]).items() if "NAME" in kind or "PATH" in kind}
    assert texts - paths <= NAMES
    assert not paths & NAMES - {"weights"}  # a file of `evaluate`, a name of `convert`


def test_the_home_folder_is_found_and_names_stay_as_they_are(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/ada")
    section = sections()["sample"]
    given = {"checkpoint": "~/run", "num_images": 1, "output": "~/a.png", "guide": "~/weak", "autoguidance_scale": 2.0}
    options = validate(section, given, "sample")
    assert (options.checkpoint, options.output, options.guide) == ("/home/ada/run", "/home/ada/a.png", "/home/ada/weak")
    several = validate(sections()["evaluate"], {"samples": ["~/a", "b~"], "reference": "~/r.npz"}, "evaluate")
    assert (several.samples, several.reference) == (["/home/ada/a", "b~"], "/home/ada/r.npz")
    for name in ("stabilityai/sd-vae-ft-ema", "https://example.org/~ada/data", "emoji-64", "a/~b"):
        assert validate(Config, {"model": {"preset": "S/2"}, "vae": {"name": name}}, "").vae.name == name


def test_a_run_that_recorded_a_tilde_resumes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    config = load_config(make_inputs(tmp_path), {"data.path": "~/data", "data.latents": "~/latents"})
    assert config.data.path == str(tmp_path / "data")
    recorded = yaml.safe_load(to_yaml(config))
    recorded["data"] |= {"path": "~/data", "latents": "~/latents"}  # as an earlier version wrote it
    assert differences(recorded, config, changeable=()) == []
    assert recorded_values(recorded)["data"]["path"] == config.data.path
    assert differences(recorded, load_config(tmp_path / "run.yaml", {"data.path": "~/other"})) != []


def test_a_command_reads_from_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    make_inputs(tmp_path)
    with pytest.raises(SystemExit) as stopped:
        main(["train", "~/run.yaml", "--dry-run", "--output=~/run", "--data.path=~/data", "--vae.name=~/vae"])
    said = capsys.readouterr()
    assert stopped.value.code == 0, said.err
    assert said.out.startswith(f"start:    a new run in {tmp_path / 'run'}")
    assert "missing" not in said.out
    assert not (tmp_path / "run").exists()
