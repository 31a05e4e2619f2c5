"""AutoencoderDC: the deep compression autoencoder (DC-AE, arXiv 2410.10733) of SANA."""

from collections.abc import Mapping
from typing import Any

from vit5gen.data.autoencoders.codec import AUTOENCODERS, Codec, Sizes


@AUTOENCODERS.register("AutoencoderDC")
class DC(Codec):
    """One latent of an image, which ``scaling_factor`` normalises."""

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Return the sizes: each block but the last halves the image."""
        return Sizes(config["latent_channels"], 2 ** (len(config["encoder_block_out_channels"]) - 1))
