"""A pipeline of a few thousand random weights: latents 4x8x8, images 16x16, five classes."""

import torch
from diffusers import AutoencoderKL
from torch import nn

from vit5gen import SiTPipeline, SiTScheduler, SiTTransformer2DModel

NAMES = {0: "golden retriever, retriever", 1: "crane", 2: "Crane", 3: "7", 4: "smileys & emotion"}


def tiny_transformer(seed: int = 0, **options: object) -> SiTTransformer2DModel:
    """Return a transformer whose weights are random everywhere, so that no output is zero."""
    sizes = {"sample_size": 8, "num_classes": 5, "hidden_size": 32, "num_layers": 2, "num_attention_heads": 2}
    return _random(SiTTransformer2DModel(**{"backbone": "sit", **sizes, **options}), seed, 0.1).eval()


def tiny_autoencoder(seed: int = 1) -> AutoencoderKL:
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        norm_num_groups=4,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    return _random(vae, seed, 0.3).eval()


def tiny_pipeline(**options: object) -> SiTPipeline:
    pipe = SiTPipeline(tiny_transformer(**options), SiTScheduler(), tiny_autoencoder(), id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def _random(model: nn.Module, seed: int, std: float) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=std, generator=generator)
    return model
