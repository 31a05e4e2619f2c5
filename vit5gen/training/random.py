"""Every random number of training, as a pure function of (seed, step, position in the global batch).

Nothing depends on rank, process count or micro-batch, and nothing has to be saved to resume exactly.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

_ORDER_STREAM = 2**63  # keys of the data order; step numbers stay below


def _random(seed: int, stream: int, position: int = 0) -> np.random.Generator:
    # Philox is counter-based: one key a (seed, step), one block of 2**192 counters a position.
    # (Plain lists would pass through float64, which merges neighbouring streams.)
    key, counter = np.array([seed, stream], np.uint64), np.array([0, 0, 0, position], np.uint64)
    return np.random.Generator(np.random.Philox(key=key, counter=counter))


@lru_cache(maxsize=2)
def _order(seed: int, epoch: int, size: int) -> np.ndarray:
    return _random(seed, _ORDER_STREAM + epoch).permutation(size)


def data_index(seed: int, step: int, position: int, batch_size: int, size: int) -> int:
    """Return the sample for ``position`` in the global batch of ``step``; each epoch visits every sample once."""
    epoch, offset = divmod(step * batch_size + position, size)
    return int(_order(seed, epoch, size)[offset])


@dataclass(frozen=True)
class Draws:
    """The random numbers of one training sample: float32 normals ``(C, h, w)``, a uniform for t, and two coins."""

    noise: Tensor
    posterior: Tensor
    uniform: float
    drop: float
    flip: bool


def sample_draws(seed: int, step: int, position: int, shape: tuple[int, int, int]) -> Draws:
    """Draw for the sample at ``position`` of the global batch of ``step``; ``shape`` is (C, h, w) of a latent."""
    random = _random(seed, step, position)
    uniform, drop, flip = random.random(3)
    noise, posterior = random.standard_normal((2, *shape), dtype=np.float32)
    return Draws(torch.from_numpy(noise), torch.from_numpy(posterior), uniform, drop, flip < 0.5)
