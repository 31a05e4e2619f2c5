"""Mean and deviation of each channel of latents, draws from posteriors as a transformer sees them, in one pass."""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from vit5gen.data.autoencoders.codec import Normalization
from vit5gen.system.distributed import gather_objects, rank_and_world
from vit5gen.system.errors import UserError

_AT_ONCE = 64  # images of a shard, whose latents may be as large as pictures
_CONSTANT = 1e-12  # of the mean square: what is left of the variance of a constant


def moments(mean: Tensor, std: Tensor) -> Tensor:
    """Return count, sum and sum of squares, (3, C) float64, of draws ``mean + std * noise``, (..., C, h, w) each."""
    mean, std = (value.double().movedim(-3, 0).flatten(1) for value in (mean, std))
    return torch.stack([torch.full_like(mean[:, 0], mean.shape[1]), mean.sum(1), (mean**2 + std**2).sum(1)]).cpu()


def moments_of_shards(files: list[Path]) -> Tensor:
    """Return the `moments` of all shards, each read by one process; any number of processes gives the same bits."""
    rank, world = rank_and_world()
    share = {}
    for number in range(rank, len(files), world):
        with safe_open(files[number], framework="pt") as shard:
            mean, std = shard.get_slice("mean"), shard.get_slice("std")
            rows = range(0, mean.get_shape()[0], _AT_ONCE)
            share[number] = torch.stack([moments(mean[k : k + _AT_ONCE], std[k : k + _AT_ONCE]) for k in rows]).sum(0)
    every = {number: values for part in gather_objects(share) for number, values in part.items()}
    return torch.stack([every[number] for number in range(len(files))]).sum(0)


def statistics(found: Tensor, seen_as: Normalization) -> dict[str, list[float]]:
    """Return mean and deviation of each channel, not normalised, from the `moments` of latents normalised so.

    Raises `UserError` for a channel that is constant, or not finite.
    """
    scale, shift = (torch.tensor(values, dtype=torch.float64) for values in seen_as)
    count, total, squares = found
    mean, square = total / count, squares / count
    variance = square - mean**2
    variance[variance < _CONSTANT * square] = 0
    result = {"mean": (mean / scale + shift).tolist(), "std": (variance.sqrt() / scale.abs()).tolist()}
    normalization_from(result, "the training latents")
    return result


def normalization_from(found: Any, what: str) -> Normalization:
    """Return the normalisation to mean 0 and deviation 1; raise a `UserError` that names ``what`` for none."""
    try:
        mean, std = (torch.tensor(found[key], dtype=torch.float64) for key in ("mean", "std"))
        fault = [i for i, ok in enumerate((std > 0) & std.isfinite() & mean.isfinite()) if not ok]
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise UserError(f"{what}: no statistics of channels ({error!r}); encode again") from error
    if fault:
        values = f"mean {float(mean[fault[0]])} and deviation {float(std[fault[0]])}"
        advice = "expected finite numbers, the deviation above 0; set vae.normalize to config, or encode again"
        raise UserError(f"{what}: channel {fault[0]} has {values}; {advice}")
    return Normalization((1 / std).tolist(), mean.tolist())
