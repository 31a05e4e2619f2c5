"""The plug: the registry of backbones, and what a backbone inherits. docs/extending.md is its contract in prose."""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from vit5gen.registry import Registry
from vit5gen.section import MOST_WIDTH
from vit5gen.system.errors import UserError

BACKBONES: Registry[type[nn.Module]] = Registry("backbone", "vit5gen.backbones", most=MOST_WIDTH)
register_backbone = BACKBONES.register
backbone_names = BACKBONES.names


class Backbone(nn.Module):
    """Base of backbones made of `blocks`: the loop with gradient checkpointing and taps.

    A subclass sets `blocks`, and its ``forward(tokens, conditioning, grid, taps=(), extra_tokens=None)`` ends in
    `run_blocks`. Deriving from this class is optional: the plain contract is ``forward(tokens, conditioning, grid)``.
    """

    blocks: nn.ModuleList
    gradient_checkpointing = False
    _gradient_checkpointing_func = staticmethod(functools.partial(checkpoint, use_reentrant=False))

    def run_block(self, block: nn.Module, *args: Any) -> Tensor:
        """Apply one block, recomputing its activations in the backward pass if gradient checkpointing is on."""
        if self.gradient_checkpointing and torch.is_grad_enabled():
            return self._gradient_checkpointing_func(block, *args)
        return block(*args)

    def run_blocks(
        self, x: Tensor, num_patches: int, num_kept: int, taps: Sequence[int], *args: Any
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """Apply ``block(x, *args)`` in turn to x ``[patches, extra tokens, own tokens]``.

        Returns the patches (B, num_patches, D) and, if there are taps, also ``{k: state after k blocks}`` where a state
        (B, num_kept, D) holds patches and extra tokens. Raises `UserError` for a tap that is not the number of a block.
        """
        for k in taps:
            if not 1 <= k <= len(self.blocks):
                raise UserError(f"taps: block {k} does not exist; expected 1 to {len(self.blocks)}.")
        hidden = {}
        for k, block in enumerate(self.blocks, start=1):
            x = self.run_block(block, x, *args)
            if k in taps:
                hidden[k] = x[:, :num_kept]
        return (x[:, :num_patches], hidden) if taps else x[:, :num_patches]
