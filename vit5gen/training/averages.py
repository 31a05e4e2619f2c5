"""Averages of the weights, several at once, sharded as the weights are: exponential ones, and of power functions."""

from collections.abc import Iterable, Iterator

import numpy as np
import torch
from torch import Tensor, nn


def exponent_of(length: float) -> float:
    """Return gamma of the power function t^gamma whose standard deviation is ``length``, as a part of the training.

    It solves length^2 = (gamma + 1) / ((gamma + 2)^2 (gamma + 3)) (Karras et al., arXiv 2312.02696, section 3.1), of
    whose three roots the largest is meant. length: in (0, 0.28], 0.289 being the plain mean, gamma = 0.
    """
    return float(np.roots([1, 7, 16 - length**-2, 12 - length**-2]).real.max())


def halve(value: Tensor) -> Tensor:
    """Return a tensor in fp16; as it is where that has no number for one of its values (above 65504)."""
    half = value.half()
    return half if torch.isfinite(half).all() else value


class EMA:
    """Averages ``ema <- decay * ema + (1 - decay) * weight`` of every parameter that is trained, one set for each.

    decays: constant (SiT trains with .9999 and no warm-up); these averages start at the initial weights.
    lengths: of averages by a power function, under the names ``power_<length>``, whose decay at update t is
    (1 - 1/t)^(gamma + 1) (arXiv 2312.02696, section 3.1): the first update drops the initial weights.
    """

    def __init__(self, model: nn.Module, decays: Iterable[float], lengths: Iterable[float] = ()) -> None:
        self._weights = {name: value for name, value in model.named_parameters() if value.requires_grad}
        self.exponents = {f"power_{length}": exponent_of(length) for length in lengths}
        keys: list[float | str] = [*decays, *self.exponents]
        self.averages = {key: [weight.detach().clone() for weight in self._weights.values()] for key in keys}

    @torch.no_grad()
    def update(self, count: int) -> None:
        """Move every average one step towards the present weights; count: of the updates so far and this one."""
        for key, average in self.averages.items():
            decay = (1 - 1 / count) ** (self.exponents[key] + 1) if isinstance(key, str) else key
            torch._foreach_lerp_(average, list(self._weights.values()), 1 - decay)

    def items(self, key: float | str) -> Iterator[tuple[str, Tensor]]:
        """Return the average of a decay, or name, with the parameters' names; under FSDP, this process's shards."""
        return zip(self._weights, self.averages[key], strict=True)
