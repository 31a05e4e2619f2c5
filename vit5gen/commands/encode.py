"""`vit5gen encode`."""

from typing import ClassVar

from vit5gen.commands.options import ConfigOptions, Utf8Path, argument
from vit5gen.section import UserPath


class EncodeOptions(ConfigOptions):
    """Encode images once to latent shards.

    With --from no image is encoded: the latents of another program become shards.
    """

    unused: ClassVar = ("model", "flow", "training", "sampling", "evaluation", "data.latents", "data.from_images")

    output: Utf8Path = argument(..., "FOLDER", "folder of the shards and their manifest")
    ready: UserPath | None = argument(
        None, "FOLDER", "LightningDiT's latents, or latents.npy and labels.npy, of this vae", option="--from"
    )


def run(options: EncodeOptions) -> None:
    """Encode the images of a configuration, or take latents that are ready."""
    if options.ready is not None:
        from vit5gen.data.ready_latents import import_latents

        import_latents(options.load(), options.ready, options.output)
    else:
        from vit5gen.data.encoding import encode_images

        encode_images(options.load(), options.output)
