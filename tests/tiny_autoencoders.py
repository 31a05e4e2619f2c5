"""An autoencoder of each class, as small as its architecture allows, whose latents are far from mean 0 and deviation 1.

All take images of 16 px; the statistics of their latents differ from channel to channel.
"""

from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE, ModelMixin

from vit5gen.data.autoencoders.pixels import PixelAutoencoder

SIDE = 16
SIZES = {  # channels and down-sampling
    "AutoencoderKL": (4, 2),
    "AutoencoderDC": (4, 2),
    "AutoencoderKLFlux2": (16, 4),
    "AutoencoderRAE": (64, 8),
    "PixelAutoencoder": (3, 1),
}


def tiny_autoencoder_of(class_name: str, seed: int = 0, **options: Any) -> ModelMixin:
    """Return a frozen autoencoder of that class with random weights."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = _make(class_name, options).eval().requires_grad_(False)
        if class_name in ("AutoencoderKL", "AutoencoderKLFlux2"):
            vae.quant_conv.weight *= 4
            vae.quant_conv.bias[:4] = torch.tensor([3.0, -2.0, 1.0, 0.5])
            vae.quant_conv.bias[4:] = torch.tensor([-1.0, -2.0, 0.0, -3.0])
        if class_name == "AutoencoderDC":
            vae.encoder.conv_out.weight *= torch.tensor([2.0, 5.0, 9.0, 14.0]).view(-1, 1, 1, 1)
            vae.encoder.conv_out.bias += torch.tensor([3.0, -2.0, 1.0, -4.0])
    return vae


def _make(class_name: str, options: dict[str, Any]) -> ModelMixin:
    kl = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    kl |= {"block_out_channels": [4, 8], "layers_per_block": 1, "norm_num_groups": 4, "latent_channels": 4}
    if class_name == "AutoencoderKL":
        return AutoencoderKL(**(kl | {"scaling_factor": 0.5, "shift_factor": 0.25} | options))
    if class_name == "AutoencoderKLFlux2":
        vae = AutoencoderKLFlux2(**(kl | options))
        vae.bn.running_mean.copy_(torch.linspace(-3, 3, 16))
        vae.bn.running_var.copy_(torch.linspace(0.2, 5, 16))
        return vae
    if class_name == "AutoencoderDC":
        sizes = {f"{part}_block_out_channels": (8, 16) for part in ("encoder", "decoder")}
        layers = {f"{part}_layers_per_block": (1, 1) for part in ("encoder", "decoder")}
        scales = {f"{part}_qkv_multiscales": ((), (5,)) for part in ("encoder", "decoder")}
        kinds = {f"{part}_block_types": ("ResBlock", "EfficientViTBlock") for part in ("encoder", "decoder")}
        fixed = {"latent_channels": 4, "attention_head_dim": 8, "scaling_factor": 0.4}
        return AutoencoderDC(**(sizes | layers | scales | kinds | fixed | options))
    if class_name == "AutoencoderRAE":
        encoder = {"encoder_hidden_size": 64, "encoder_patch_size": 8, "encoder_num_hidden_layers": 1}
        decoder = {"decoder_hidden_size": 32, "decoder_num_hidden_layers": 1, "decoder_num_attention_heads": 2}
        sizes = {"encoder_input_size": SIDE, "patch_size": 8, "decoder_intermediate_size": 32, "noise_tau": 0.8}
        each = torch.linspace(0.1, 3, 64).view(-1, 1, 1)
        return AutoencoderRAE(**(encoder | decoder | sizes | {"latents_mean": 2 - each, "latents_std": each} | options))
    return PixelAutoencoder()


def save_autoencoder(class_name: str, folder: Path, **options: Any) -> str:
    """Save one; return its folder as a name."""
    tiny_autoencoder_of(class_name, **options).save_pretrained(folder)
    return str(folder)


def random_images(count: int, seed: int = 0) -> torch.Tensor:
    """Return uint8 images (N, 3, 16, 16): noise of different brightness and contrast in each image and channel."""
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(count, 3, SIDE, SIDE, generator=generator)
    level, spread = (torch.rand(count, 3, 1, 1, generator=generator) for _ in range(2))
    return (60 * level + 70 + (5 + 60 * spread) * noise).clamp(0, 255).to(torch.uint8)
