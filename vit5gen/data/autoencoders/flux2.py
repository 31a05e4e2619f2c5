"""AutoencoderKLFlux2: that of Flux.2, whose latents are packed 2x2 and normalised by running statistics."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin
from torch.nn.functional import pixel_shuffle, pixel_unshuffle

from vit5gen.data.autoencoders.codec import AUTOENCODERS, Codec, Normalization, Sizes


@AUTOENCODERS.register("AutoencoderKLFlux2")
class Flux2(Codec):
    """A posterior; each 2x2 latent pixels become one of four times as many channels, as in diffusers' pipeline."""

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Return the sizes of packed latents."""
        side = config["patch_size"][0]
        return Sizes(config["latent_channels"] * side**2, side * 2 ** (len(config["block_out_channels"]) - 1))

    def encode(self, vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the packed posterior's mean and deviation."""
        posterior, side = vae.encode(images).latent_dist, vae.config.patch_size[0]
        return pixel_unshuffle(posterior.mean, side), pixel_unshuffle(posterior.std, side)

    def decode(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        """Return the images of packed latents."""
        return vae.decode(pixel_shuffle(latents, vae.config.patch_size[0])).sample

    def published(self, vae: ModelMixin) -> Normalization:
        """Return mean and deviation of the autoencoder's batch norm, which is no layer of it."""
        std = (vae.bn.running_var.double() + vae.config.batch_norm_eps).sqrt()
        return Normalization((1 / std).tolist(), vae.bn.running_mean.double().tolist())
