"""`vit5gen autoencoder`: train a small autoencoder of images."""

import time
from pathlib import Path

import torch

from vit5gen.config import read_yaml, validate
from vit5gen.data.autoencoder import AutoencoderTraining, check_sizes, train_autoencoder
from vit5gen.system.cpu import warn_of_slow_bf16
from vit5gen.system.files import check_writable


def train_from_file(file: str, output: Path) -> None:
    """Train the autoencoder that the YAML ``file`` describes, write its folder ``output`` and print its score.

    Raises `UserError` for bad values and an output that cannot be written.
    """
    start = time.perf_counter()
    config = validate(AutoencoderTraining, read_yaml(file), f"configuration {file}")
    check_sizes(config)
    check_writable(output / "config.json")
    warn_of_slow_bf16(config.precision, torch.device("cpu"))
    score = train_autoencoder(config, output)
    print(f"{output}: held-out PSNR {score:.2f} dB after {time.perf_counter() - start:.0f} s")
