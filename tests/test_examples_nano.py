"""examples/nano.py computes what the package does: its losses and its samples are equal bit for bit."""

import importlib
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny_run import losses, run

from vit5gen.data.sources import emoji
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.system.cpu import fast_products

ROOT = Path(__file__).parents[1]
STEPS = 20


def test_nano_equals_the_package_bit_for_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples"))
    nano = importlib.import_module("nano")
    pictures, labels = emoji.load_emoji(32, "train")
    few = torch.randperm(len(labels), generator=torch.Generator().manual_seed(0))[:70]

    def load_few(resolution: int, split: str) -> tuple[torch.Tensor, torch.Tensor]:
        return pictures[few], labels[few]

    monkeypatch.setattr("vit5gen.data.sources.emoji.load_emoji", load_few)
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
    changes: dict[str, Any] = {"training__num_steps": STEPS, "training__warmup_steps": 7, "training__log_every": 1}
    changes |= {"training__global_batch_size": 8, "sampling__num_inference_steps": 1}
    changes |= {"training__precision": "fp32", "training__compile": False}  # the same on every machine
    changes |= {"evaluation__num_images": 2, "evaluation__num_reference": 2, "evaluation__images_per_class": 1}
    run(ROOT / "configs/quickstart.yaml", tmp_path / "run", **changes)
    pipe = load_pipeline(tmp_path / "run")
    generators = [torch.Generator().manual_seed(i) for i in range(5)]
    options = {"guidance_scale": 2.0, "num_inference_steps": 6, "sampler": "ode-heun", "output_type": "uint8"}
    expected = pipe([0, 1, 2, 3, 0], generator=generators, **options).images

    monkeypatch.setattr(nano, "load_emoji", load_few)
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=torch.Generator().manual_seed(i)) for i in range(5)])
    with fast_products():  # how this machine multiplies matrices is the package's choice, and its only one
        steps = list(nano.train(nano.encode(pipe.vae), num_steps=STEPS, size=8, warmup=7))
        drawn = nano.sample(steps[-1][1], pipe.vae, torch.tensor([0, 1, 2, 3, 0]), noise, num_steps=6)
    assert [loss for loss, _ in steps] == losses(tmp_path / "run")
    assert torch.equal(drawn, expected)
