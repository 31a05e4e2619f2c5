"""The commands of level 0 in docs/reproduction.md, as they stand there, on a tiny SiT and a tiny reference."""

import json
import runpy
import shlex
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from test_evaluation_card import pictures, write_npz
from tiny import tiny_autoencoder

from vit5gen import cli
from vit5gen.lab.benchmark.evaluators import write_random_inception
from vit5gen.system.files import sha256

ROOT = Path(__file__).parent.parent
# What stands in for the published files and for sizes that need GPUs.
SUBSTITUTES = {"50000": "6", "249": "3", "stabilityai/sd-vae-ft-ema": "vae"}
EXTRA = {"convert": ["--num-attention-heads", "4"], "evaluate": ["--weights", "inception.pth", "--weights-sha256"]}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("level0")
    with safe_open(ROOT / "tests/fixtures/sit_tiny_learn_sigma.safetensors", "pt") as oracle:
        keys = [key for key in oracle.keys() if key.startswith("state.")]  # noqa: SIM118  # not a dict
        torch.save({key.removeprefix("state."): oracle.get_tensor(key) for key in keys}, folder / "SiT-XL-2-256x256.pt")
    tiny_autoencoder().save_pretrained(folder / "vae")
    images = pictures(5, seed=1, side=16)
    write_random_inception(folder / "inception.pth", images)
    moments = {}
    for suffix, dim in (("", 2048), ("_s", 2023)):
        rows = np.random.default_rng(0).normal(size=(5, dim))
        moments |= {f"mu{suffix}": rows.mean(0), f"sigma{suffix}": np.cov(rows.T)}
    write_npz(folder / "VIRTUAL_imagenet256_labeled.npz", images, **moments)
    return folder


def commands() -> list[list[str]]:
    text = (ROOT / "docs/reproduction.md").read_text()
    block = text.split("## Level 0")[1].split("```sh\n")[1].split("```")[0]
    return [words for line in block.splitlines() if (words := shlex.split(line, comments=True))]


def test_the_commands_of_level_0_run(folder: Path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(folder)
    extra = {**EXTRA, "evaluate": [*EXTRA["evaluate"], sha256("inception.pth")]}
    for _, command, *arguments in commands():
        arguments = [SUBSTITUTES.get(argument, argument) for argument in arguments]
        with pytest.raises(SystemExit) as ended:
            cli.main([command, *arguments, *extra.get(command, [])])
        assert ended.value.code == 0, capsys.readouterr().err
    for kind in ("sde", "ode"):
        card = json.loads(Path(f"{kind}.json").read_text())
        assert set(card["metrics"]) == {"FID", "sFID", "IS", "precision", "recall"}
        settings = card["samples"][0]["sampling"]["settings"]
        assert (settings["guidance_scale"], settings["guidance_channels"], settings["labels"]) == (1.5, 3, "random")
        assert card["protocol"]["label"] == "FID"
    out, err = capsys.readouterr()
    assert "FID-50K" not in out
    assert "not FID-50K: 6 samples instead of 50000" in err


def test_published_figures_are_compared_within_their_tolerances() -> None:
    script = runpy.run_path(str(ROOT / "scripts/check_adm_figures.py"))
    metrics = {name: {"value": value} for name, (value, _) in script["EXPECTED"].items()}
    assert script["deviations"](metrics) == []
    metrics["FID"]["value"] += 0.006
    assert [line.split(":")[0] for line in script["deviations"](metrics)] == ["FID"]
    assert script["main"]([]) == 2
    assert script["main"](["absent"]) == 2
