"""The smallest training run that goes through every stage: pictures, an autoencoder and a model made on the spot."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import AutoencoderKL
from PIL import Image


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
