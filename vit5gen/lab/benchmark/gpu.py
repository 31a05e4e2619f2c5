"""The training step of XL/2 on one GPU: ours against published SiT, `vit5` against our `sit`."""

import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import torch

from vit5gen.lab.benchmark.processes import fresh
from vit5gen.lab.benchmark.setting import FULL, Setting
from vit5gen.lab.benchmark.timing import Row
from vit5gen.lab.benchmark.train_step import against_published, against_sit
from vit5gen.system.errors import UserError

MODES = {"tf32": "tf32", "bf16": "bf16", "fastest": "bf16"}  # of ours; the published code sets TF32


class SmallGpuError(UserError):
    """The models do not fit the GPU."""


def rows(setting: Setting) -> Iterator[Row]:
    """Compare steps as ``train-step`` does, each in a process that may use the GPU; without one, tiny sizes on the CPU.

    Raises `PeerError` where ``setting.sit`` is no checkout of the peer.
    """
    sizes = setting.sizes
    if sizes == FULL and not torch.cuda.is_available():
        setting.note("gpu: left out, for none is here")
        return
    sizes = replace(sizes, preset=sizes.gpu_preset, batch=sizes.gpu_batch)
    try:
        if setting.sit is not None:
            for mode, precision in MODES.items():
                yield fresh(_row, against_published, "gpu", mode, setting.sit, sizes, precision)
        yield fresh(_row, against_sit, "gpu", sizes, MODES["fastest"])
    except SmallGpuError as error:
        setting.note(str(error))


def device_name() -> str | None:
    """Return the name of the GPU, if there is one, as a process of its own reads it: to ask takes a part of the GPU."""
    return fresh(torch.cuda.get_device_name) if torch.cuda.is_available() else None


def _row(compare: Callable[..., Row], *arguments: Any) -> Row:
    os.environ.pop("ACCELERATE_USE_CPU")  # which all other benchmarks want
    try:
        return compare(*arguments)
    except (torch.OutOfMemoryError, UserError) as error:
        if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
            raise
        raise SmallGpuError(
            "gpu: out of memory; the published XL/2 and ours train beside each other in about 70 GB"
        ) from error
