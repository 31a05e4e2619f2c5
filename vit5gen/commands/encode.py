"""`vit5gen encode`."""

from typing import ClassVar

from vit5gen.commands.options import ConfigOptions, Utf8Path, argument


class EncodeOptions(ConfigOptions):
    """Encode images once to latent shards."""

    unused: ClassVar = ("model", "flow", "training", "sampling", "evaluation", "data.latents", "data.from_images")

    output: Utf8Path = argument(..., "FOLDER", "folder of the shards and their manifest")


def run(options: EncodeOptions) -> None:
    """Encode the images of a configuration."""
    from vit5gen.data.encoding import encode_images

    encode_images(options.load(), options.output)
