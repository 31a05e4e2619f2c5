"""`vit5gen autoencoder`: train a small autoencoder of images."""

from pathlib import Path

from vit5gen.config import AutoencoderTraining, read_yaml, validate
from vit5gen.training.autoencoder import train_autoencoder


def train_from_file(file: str, output: Path) -> int:
    """Train the autoencoder that the YAML ``file`` describes; return the exit code."""
    return train_autoencoder(validate(AutoencoderTraining, read_yaml(file), f"configuration {file}"), output)
