"""Backbones that a user might register, for tests of training."""

import torch
from torch import Tensor, nn

from vit5gen.models import Backbone, register_backbone


class DropoutBlock(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.GELU(), nn.Dropout(0.5), nn.Linear(width, width))

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        return x + self.mlp(x + conditioning[:, None])


@register_backbone("dropout")
class DropoutBackbone(Backbone):
    """Draws from torch's global generator in every forward pass."""

    def __init__(self, hidden_size, num_layers, num_attention_heads, mlp_ratio, grid) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.blocks = nn.ModuleList(DropoutBlock(hidden_size) for _ in range(num_layers))

    def forward(self, tokens: Tensor, conditioning: Tensor, grid: tuple[int, int], taps: tuple[int, ...] = ()):  # type: ignore[no-untyped-def]
        return self.run_blocks(tokens, tokens.shape[1], tokens.shape[1], taps, conditioning)


@register_backbone("hungry")
class HungryBackbone(DropoutBackbone):
    """Takes at most one sample at once into the accelerator's memory."""

    def forward(self, tokens: Tensor, *args, **kwargs):  # type: ignore[no-untyped-def]
        if self.training and len(tokens) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return super().forward(tokens, *args, **kwargs)
