"""AutoencoderKL: Stable Diffusion's, SDXL's, SD3's and Flux.1's, VA-VAE, and what `vit5gen autoencoder` trains."""

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import ModelMixin

from vit5gen.data.autoencoders.codec import AUTOENCODERS, Codec, Normalization, Sizes


@AUTOENCODERS.register("AutoencoderKL")
class KL(Codec):
    """A posterior; one scale and shift, or mean and deviation of each channel, as diffusers' pipelines apply them."""

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Return the sizes: each block but the last halves the image."""
        return Sizes(config["latent_channels"], 2 ** (len(config["block_out_channels"]) - 1))

    def encode(self, vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the posterior's mean and deviation."""
        posterior = vae.encode(images).latent_dist
        return posterior.mean, posterior.std

    def normalization(self, vae: ModelMixin) -> Normalization:
        """Return what decoding undoes: ``z / scaling_factor + shift_factor``, as in Stable Diffusion 3.

        With means and deviations it is ``z * latents_std / scaling_factor + latents_mean``, as in Stable Diffusion XL.
        """
        config = vae.config
        scale, mean, std = (config.get(key) for key in ("scaling_factor", "latents_mean", "latents_std"))
        if mean is None or std is None:
            return Normalization(scale, config.get("shift_factor") or 0.0)
        return Normalization([scale / s if s else s for s in std], list(mean))

    def record(self, vae: ModelMixin, normalization: Normalization) -> None:
        """Write it where diffusers' pipelines look."""
        scale, shift = normalization
        mean = std = None
        if isinstance(scale, list) or isinstance(shift, list):
            count = vae.config.latent_channels
            scales, mean = (v if isinstance(v, list) else [v] * count for v in (scale, shift))
            scale, shift, std = 1.0, 0.0, [1 / s for s in scales]
        vae.register_to_config(scaling_factor=scale, shift_factor=shift, latents_mean=mean, latents_std=std)
