"""The processes that a launcher has started, on GPUs or on the CPU."""

import os

import torch
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env

from vit5gen.errors import UserError


def start_processes() -> PartialState:
    """Join the processes that a launcher has started; raise `UserError` where it silently started only one."""
    if "MASTER_ADDR" in os.environ and "WORLD_SIZE" not in os.environ:
        raise UserError(
            "`accelerate launch --cpu --num_processes N` starts one process, whatever N is; on CPU use "
            "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...`"
        )
    return processes()


def processes() -> PartialState:
    """Return what this process knows of the others: as Accelerator; PartialState alone overlooks ACCELERATE_USE_CPU.

    A Mac computes on its CPU: Apple's GPUs have no float64.
    """
    return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or torch.backends.mps.is_available())
