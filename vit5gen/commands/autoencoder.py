"""`vit5gen autoencoder`."""

from vit5gen.commands.options import Options, Utf8Path, argument
from vit5gen.config import AutoencoderTraining, read_yaml
from vit5gen.section import UserPath, validate


class AutoencoderOptions(Options):
    """Train a small image autoencoder; running the command again resumes it."""

    config: UserPath = argument(..., "CONFIG", "YAML file of an autoencoder, e.g. configs/vae/emoji.yaml", option="")
    output: Utf8Path = argument(..., "FOLDER", "folder of the trained AutoencoderKL")


def run(options: AutoencoderOptions) -> int:
    """Train the autoencoder; return the exit code."""
    from vit5gen.training.train_autoencoder import train_autoencoder

    config = validate(AutoencoderTraining, read_yaml(options.config), f"configuration {options.config}")
    return train_autoencoder(config, options.output)
