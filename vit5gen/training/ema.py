"""Exponential moving averages of the weights, several decays at once, sharded as the weights are."""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from vit5gen.training.sharding import sharded_as, whole


class EMA:
    """Averages ``ema <- decay * ema + (1 - decay) * weight`` of every parameter, one set per decay.

    The decay is constant (SiT trains with .9999 and no warm-up); the averages start at the initial weights.
    """

    def __init__(self, model: nn.Module, decays: Iterable[float]) -> None:
        parameters = dict(model.named_parameters())
        self.names = list(parameters)
        self._weights: list[Tensor] = list(parameters.values())
        self.averages = {decay: [weight.detach().clone() for weight in self._weights] for decay in decays}

    @torch.no_grad()
    def update(self) -> None:
        """Move every average one step towards the present weights."""
        for decay, average in self.averages.items():
            torch._foreach_lerp_(average, self._weights, 1 - decay)

    def state_dict(self, decay: float) -> dict[str, Tensor]:
        """Return the average of ``decay`` by parameter name, gathered whole (a collective under FSDP)."""
        return {name: whole(value) for name, value in zip(self.names, self.averages[decay], strict=True)}

    @torch.no_grad()
    def load_state_dict(self, decay: float, state: dict[str, Tensor]) -> None:
        """Take whole tensors by parameter name and shard them as the averages are."""
        for name, value in zip(self.names, self.averages[decay], strict=True):
            value.copy_(sharded_as(state[name], value))
