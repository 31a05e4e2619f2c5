"""No autoencoder: the latents of an image are its pixels in [-1, 1]."""

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import torch
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import nn

from vit5gen.data.autoencoders.codec import AUTOENCODERS, Codec, Sizes


class PixelAutoencoder(ModelMixin, ConfigMixin):
    """Gives back what it gets, as a part of a pipeline that diffusers saves and loads like any other."""

    @register_to_config
    def __init__(self) -> None:
        super().__init__()
        self.placed = nn.Parameter(torch.ones(1))  # tells type and device, as the weights of others do

    def encode(self, images: torch.Tensor) -> SimpleNamespace:
        """Return images (B, 3, H, W) in [-1, 1] as ``latent``."""
        return SimpleNamespace(latent=images)

    def decode(self, latents: torch.Tensor) -> SimpleNamespace:
        """Return latents (B, 3, H, W) as the images ``sample``."""
        return SimpleNamespace(sample=latents)


@AUTOENCODERS.register("PixelAutoencoder")
class Pixels(Codec):
    """Three channels, none of which is normalised unless a run measures them."""

    def network(self, name: str) -> type[PixelAutoencoder]:
        """Return the class, which is not of diffusers."""
        return PixelAutoencoder

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Return the sizes of an image."""
        return Sizes(3, 1)
