"""Whole tensors from sharded ones and back; plain tensors pass through."""

from torch import Tensor
from torch.distributed.tensor import DTensor, distribute_tensor


def gather_shards(value: Tensor) -> Tensor:
    """Return a tensor gathered from all shards (a collective under FSDP)."""
    return value.full_tensor() if isinstance(value, DTensor) else value


def shard_like(value: Tensor, example: Tensor) -> Tensor:
    """Return a whole tensor on the device of ``example``, cut into shards as that is."""
    value = value.to(example.device)
    if isinstance(example, DTensor):
        return distribute_tensor(value, example.device_mesh, example.placements)
    return value
