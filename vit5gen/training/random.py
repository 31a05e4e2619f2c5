"""Every random number of training, as a pure function of (seed, step, position in the global batch).

Nothing depends on rank, process count or micro-batch, and nothing has to be saved to resume exactly.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

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


class Source(Protocol):
    """What training reads: latents ``(mean, std, label)`` or images ``(uint8 image, label)``."""

    def __len__(self) -> int: ...
    def get(self, index: int, flip: bool) -> tuple[Any, ...]: ...


class TrainingSet(Dataset[dict[str, Any]]):
    """Samples by (step, position): the data with the draws that belong to it.

    Yields ``x1`` (C, h, w) drawn from the latent's posterior, or ``image`` (3, H, W) uint8 and ``posterior`` noise;
    and ``x0`` noise, ``uniform`` in [0, 1), ``label`` (already null where dropped) and ``index`` of the sample.
    """

    def __init__(
        self,
        source: Source,
        latent_shape: tuple[int, int, int],
        seed: int,
        batch_size: int,
        null_label: int,
        drop_prob: float,
        flip: bool,
    ) -> None:
        self.source, self.latent_shape = source, latent_shape
        self.seed, self.batch_size = seed, batch_size
        self.null_label, self.drop_prob, self.flip = null_label, drop_prob, flip

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        step, position = key
        draws = sample_draws(self.seed, step, position, self.latent_shape)
        index = data_index(self.seed, step, position, self.batch_size, len(self.source))
        *data, label = self.source.get(index, self.flip and draws.flip)
        sample = {"x0": draws.noise, "uniform": draws.uniform, "position": position, "index": index}
        sample["label"] = self.null_label if draws.drop < self.drop_prob else int(label)
        if len(data) == 2:
            mean, std = data
            return sample | {"x1": mean + std * draws.posterior}
        return sample | {"image": data[0], "posterior": draws.posterior}


@dataclass(frozen=True)
class MicroBatches:
    """Batch sampler: the (step, position) keys of one process, micro-batch after micro-batch."""

    first_step: int
    num_steps: int
    batch_size: int
    micro_batch_size: int
    rank: int
    world_size: int

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        local = self.batch_size // self.world_size
        for step in range(self.first_step, self.num_steps):
            for start in range(self.rank * local, (self.rank + 1) * local, self.micro_batch_size):
                yield [(step, start + k) for k in range(self.micro_batch_size)]
