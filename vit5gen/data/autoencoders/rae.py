"""AutoencoderRAE: representation autoencoders (RAE, arXiv 2510.11690), frozen DINOv2, SigLIP2 or MAE."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin

from vit5gen.data.autoencoders.codec import AUTOENCODERS, Codec, Normalization, Sizes
from vit5gen.system.errors import UserError


@AUTOENCODERS.register("AutoencoderRAE")
class RAE(Codec):
    """One latent of an image in [0, 1], which the autoencoder itself normalises, in encoding and in decoding."""

    packages = ("transformers",)
    extra = "rae"

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Return the sizes: images of any side are encoded to the same grid, and decoded to one side."""
        if not config["reshape_to_2d"]:
            raise UserError("AutoencoderRAE: reshape_to_2d = False gives no grid of latents; expected True")
        pixels = config["patch_size"]
        side = pixels * (config["encoder_input_size"] // config["encoder_patch_size"])
        return Sizes(config["encoder_hidden_size"], pixels, side)

    def encode(self, vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, None]:
        """Return the latents; in training mode the class would add noise to them (``noise_tau``)."""
        return vae.eval().encode(images / 2 + 0.5).latent, None

    def decode(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        """Return the images; raise `UserError` for a grid that the class would resample to its own."""
        side = vae.config.encoder_input_size // vae.config.encoder_patch_size
        if latents.shape[-2:] != (side, side):
            grid = "x".join(map(str, latents.shape[-2:]))
            raise UserError(f"AutoencoderRAE: latents of {grid}; expected {side}x{side}: it draws images of one size")
        return 2 * vae.decode(latents).sample - 1

    def published(self, vae: ModelMixin) -> Normalization:
        """Return that nothing is left to do."""
        return Normalization()
