"""Exponential moving averages of the weights, several decays at once, sharded as the weights are."""

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor, nn


class EMA:
    """Averages ``ema <- decay * ema + (1 - decay) * weight`` of every parameter that is trained, one set per decay.

    The decay is constant (SiT trains with .9999 and no warm-up); the averages start at the initial weights.
    """

    def __init__(self, model: nn.Module, decays: Iterable[float]) -> None:
        self._weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.averages = {decay: [weight.detach().clone() for weight in self._weights.values()] for decay in decays}

    @torch.no_grad()
    def update(self) -> None:
        """Move every average one step towards the present weights."""
        for decay, average in self.averages.items():
            torch._foreach_lerp_(average, list(self._weights.values()), 1 - decay)

    def items(self, decay: float) -> Iterator[tuple[str, Tensor]]:
        """Return the average of ``decay`` with the parameters' names; under FSDP, this process's shards of it."""
        return zip(self._weights, self.averages[decay], strict=True)
