"""The smallest training run that goes through every stage: pictures, an autoencoder and a model made on the spot."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from accelerate.state import AcceleratorState, GradientState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file

from vit5gen.config import load_config
from vit5gen.training.loop import train


def make_inputs(folder: Path) -> Path:
    """Write pictures of three classes and a random autoencoder; return the configuration file that uses them."""
    rng = np.random.default_rng(0)
    for split, count in (("train", 7), ("test", 4)):
        for label in ("circle", "square", "star"):
            (folder / "data" / split / label).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)
                Image.fromarray(pixels).save(folder / "data" / split / label / f"{i}.png")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[4, 4],
            norm_num_groups=2,
            latent_channels=4,
            mid_block_add_attention=False,
        ).save_pretrained(folder / "vae")
    config: dict[str, Any] = {
        "data": {"source": "folder", "path": str(folder / "data"), "resolution": 16, "num_classes": 3},
        "vae": {"name": str(folder / "vae"), "latent_channels": 4, "downsample": 2},
        "model": {
            "backbone": "vit5",
            "backbone_kwargs": {"gamma_init": 1.0},
            "hidden_size": 32,
            "num_layers": 2,
            "num_attention_heads": 2,
            "patch_size": 2,
        },
        "sampling": {"sampler": "ode-euler", "num_inference_steps": 2},
        "training": {
            "num_steps": 10,
            "global_batch_size": 4,
            "precision": "fp32",
            "learning_rate": 1e-3,
            "ema_decays": [0.9, 0.99],
            "checkpoint_every": 5,
            "log_every": 1,
        },
        "evaluation": {"num_images": 6, "num_reference": 12, "images_per_class": 2},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(config))
    return folder / "run.yaml"


def forget_processes() -> None:
    """Have accelerate start anew, as in a fresh process."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()


def run(config_file: Path, output: Path, resume: str = "auto", accept: bool = False, **overrides: Any) -> int:
    """Train in this process; overrides are written ``section__key=value``."""
    forget_processes()
    overrides = {key.replace("__", "."): value for key, value in overrides.items()}
    return train(load_config(config_file, overrides), output, resume, accept)


def weights(output: Path, step: int) -> dict[str, torch.Tensor]:
    """Return every tensor of a checkpoint: weights, averages and optimizer."""
    files = sorted((output / "checkpoints" / f"step_{step:08d}").glob("*.safetensors"))
    assert [file.stem for file in files] == ["ema_0.9", "ema_0.99", "model", "optimizer"]
    return {f"{file.stem}/{key}": value for file in files for key, value in load_file(file).items()}


def assert_identical(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def losses(output: Path) -> list[float]:
    """Return the logged loss of every step."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line["loss"] for line in lines]
