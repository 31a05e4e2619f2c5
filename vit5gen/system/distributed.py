"""The processes that a launcher has started: what the environment asks of them, who each is, how results join."""

import os
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import parse_flag_from_env
from torch import Tensor

from vit5gen.system.errors import UserError

T = TypeVar("T")

_FALSE = ("false", "0", "no", "n", "off", "f", "")
_FLAG = ("true", "1", "yes", "y", "on", "t", *_FALSE[:-1])
_SET_HERE = "set training.{0} (or sample --{0}) instead, and launch with --{1} no"
_OTHERWISE = "vit5gen shards with FSDP2 only, see configs/accelerate/fsdp2.yaml; unset it"
# What accelerate or torch would read, the values that are supported here, and what to do in place of any other.
_OBEYED: dict[str, tuple[tuple[str, ...], str]] = {
    "ACCELERATE_MIXED_PRECISION": (("no",), _SET_HERE.format("precision", "mixed_precision")),
    "ACCELERATE_DYNAMO_BACKEND": (("no",), _SET_HERE.format("compile", "dynamo_backend")),
    "ACCELERATE_GRADIENT_ACCUMULATION_STEPS": (("1",), "set training.micro_batch_size instead and unset this"),
    "FSDP_ACTIVATION_CHECKPOINTING": (_FALSE, "set training.gradient_checkpointing instead and switch this off"),
    "ACCELERATE_USE_DEEPSPEED": (_FALSE, _OTHERWISE),
    "ACCELERATE_USE_MEGATRON_LM": (_FALSE, _OTHERWISE),
    "ACCELERATE_USE_PARALLELISM_CONFIG": (_FALSE, _OTHERWISE),
    "ACCELERATE_USE_SAGEMAKER": (_FALSE, "start it with `accelerate launch` or torchrun, and unset this"),
    "ACCELERATE_USE_FSDP": (("true", "false", ""), "expected true or false"),
    "ACCELERATE_USE_CPU": (_FLAG, "expected true or false"),
    "ACCELERATE_CPU_AFFINITY": (_FLAG, "expected true or false"),
    "ACCELERATE_DEBUG_MODE": (_FLAG, "expected true or false"),
    "FORK_LAUNCHED": (_FLAG, "unset it: launchers set it"),
    "ACCELERATE_TORCH_DEVICE": (("cpu", "cuda"), "expected cpu or cuda; choose GPUs with CUDA_VISIBLE_DEVICES"),
}
_MPI_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
_LAUNCH = "`accelerate launch` or torchrun"
_OF_ACCELERATE = "ACCELERATE_MIXED_PRECISION"  # which its launcher always sets


def find_fault(environment: Mapping[str, str], num_gpus: int | None) -> str | None:
    """Return which setting in the environment is not supported and what to do, None when there is none.

    num_gpus: of this machine; None when the run is on the CPU in any case.
    """
    # Settings that are not obeyed, and numbers that are none.
    for name, (obeyed, advice) in _OBEYED.items():
        if name in environment and environment[name].strip().lower() not in obeyed:
            return f"{name} = {environment[name]!r} in the environment is not supported: {advice}"
    if environment.get("ACCELERATE_TORCH_DEVICE") == "cuda" and not num_gpus:
        return "ACCELERATE_TORCH_DEVICE = 'cuda' in the environment: this machine has no GPU; unset it"
    numbers = {}
    for name in ("WORLD_SIZE", *_MPI_SIZES, "RANK", "LOCAL_RANK"):
        value = environment.get(name, "1" if name == "WORLD_SIZE" else "0")
        if not value.strip().isdecimal() or len(value) > 9:
            return f"{name} = {value!r} in the environment: expected a whole number; unset it, or start with {_LAUNCH}"
        numbers[name] = int(value)

    # Ranks, devices and sharding that do not go together.
    size, asked = numbers["WORLD_SIZE"], environment.get("ACCELERATE_USE_CPU", "false").strip().lower()
    on_cpu = num_gpus is None or asked not in _FALSE
    for name in ("RANK", "LOCAL_RANK"):
        if numbers[name] >= size:
            return f"{name} = {numbers[name]} in the environment is not below WORLD_SIZE = {size}; use {_LAUNCH}"
    sharded = environment.get("ACCELERATE_USE_FSDP", "false").strip().lower() == "true"
    if sharded and environment.get("FSDP_VERSION", "1") != "2":
        return f"FSDP_VERSION = {environment.get('FSDP_VERSION')!r} in the environment is not supported: {_OTHERWISE}"
    if sharded and on_cpu:
        return "ACCELERATE_USE_FSDP and ACCELERATE_USE_CPU: FSDP needs GPUs; unset one of them"
    on_gpus = size > 1 and not on_cpu and environment.get("ACCELERATE_TORCH_DEVICE") != "cpu"
    if num_gpus is not None and on_gpus and numbers["LOCAL_RANK"] >= num_gpus:
        more = f"start at most {num_gpus} here" if num_gpus else "set ACCELERATE_USE_CPU=true to use the CPU"
        return f"LOCAL_RANK = {numbers['LOCAL_RANK']} of WORLD_SIZE = {size}: this machine has {num_gpus} GPUs; {more}"

    # Processes that could not find each other, or would not know of each other.
    wanted = ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    absent = [name for name in wanted if not environment.get(name)]
    if absent and (size > 1 or sharded):
        what = f"WORLD_SIZE = {size}" if size > 1 else "ACCELERATE_USE_FSDP"
        return f"{what} in the environment, but no {absent[0]}: unset it to run alone, or start with {_LAUNCH}"
    if "WORLD_SIZE" in environment:
        return None
    if (joined := max(numbers[name] for name in _MPI_SIZES)) > 1 and not (on_cpu and environment.get("MASTER_ADDR")):
        return f"MPI has started {joined} processes, each of which would run alone: start them with {_LAUNCH}"
    # What accelerate's launcher sets alone tells it from a batch system's MASTER_ADDR.
    if {"MASTER_ADDR", _OF_ACCELERATE} <= environment.keys():
        command = "`ACCELERATE_USE_CPU=true accelerate launch --multi_gpu --num_processes N ...`"
        return f"`accelerate launch --cpu` starts only one process, whatever N you give; on a CPU use {command}"
    return None


def start_processes() -> PartialState:
    """Join the processes that a launcher has started; raise `UserError` for unsupported settings in the environment."""
    _settle()
    return processes()


def processes() -> PartialState:
    """Return what this process knows of the others: as Accelerator; PartialState alone overlooks ACCELERATE_USE_CPU.

    A Mac computes on its CPU: Apple's GPUs have no float64. Raises `UserError` as `start_processes` does, once.
    """
    if not PartialState._shared_state:
        _settle()
    try:
        return PartialState(cpu=parse_flag_from_env("ACCELERATE_USE_CPU") or torch.backends.mps.is_available())
    except (ValueError, RuntimeError) as error:  # torch's: a port in use, an address that is none
        address = ", ".join(f"{name} = {os.environ.get(name)!r}" for name in ("MASTER_ADDR", "MASTER_PORT"))
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"the processes cannot connect at {address} ({reason}); start them with {_LAUNCH}") from error


def _settle() -> None:
    """Raise `UserError` for an environment that cannot be obeyed; remove what accelerate would take for a launcher's.

    That is the LOCAL_RANK that batch systems set for one process, and MPI's numbers where torch's stand beside them.
    """
    if _joined():  # already, whatever is set
        return
    if fault := find_fault(os.environ, None if torch.backends.mps.is_available() else torch.cuda.device_count()):
        raise UserError(fault)
    alone = os.environ.get("WORLD_SIZE", "1").strip() == "1" and os.environ.get("ACCELERATE_USE_FSDP") != "true"
    for name in ("LOCAL_RANK",) * alone + _MPI_SIZES * ("WORLD_SIZE" in os.environ):
        os.environ.pop(name, None)


def _joined() -> bool:
    return dist.is_available() and dist.is_initialized()


def rank_and_world() -> tuple[int, int]:
    """Return the number of this process and that of all that ``torch.distributed`` has joined; without it (0, 1)."""
    return (dist.get_rank(), dist.get_world_size()) if _joined() else (0, 1)


def has_launcher() -> bool:
    """Whether `accelerate launch` or torchrun has started this process and waits for its end."""
    return dist.is_torchelastic_launched() or _OF_ACCELERATE in os.environ


def is_main() -> bool:
    """Whether this process writes files, speaks to the user and holds the results."""
    return rank_and_world()[0] == 0


def on_main(function: Callable[[], T]) -> T:
    """Run ``function`` on the main process; all processes return its result or raise its `UserError`."""
    outcome: list[Any] = [None, None]
    if is_main():
        try:
            outcome = [function(), None]
        except UserError as error:
            outcome = [None, str(error)]
    if _joined():
        dist.broadcast_object_list(outcome)
    result, message = outcome
    if message is not None:
        raise UserError(message)
    return result


def gather_objects(value: T) -> list[T]:
    """Return the value of every process, in their order, on all of them."""
    values: list[Any] = [value] * rank_and_world()[1]
    if _joined():
        dist.all_gather_object(values, value)
    return values


def gather_rows(rows: Tensor, indices: Tensor) -> Tensor:
    """Return the rows of all processes, sorted by sample index, on the main process; on others the local rows."""
    rank, world = rank_and_world()
    if world > 1:
        parts: list[Any] | None = None if rank else [None] * world
        dist.gather_object((rows, indices), parts)
        if parts is not None:
            rows, indices = (torch.cat(part) for part in zip(*parts, strict=True))
    return rows if (indices.diff() > 0).all() else rows[indices.argsort()]


def sum_over_processes(values: Tensor) -> Tensor:
    """Return the sum of ``values`` over the processes, on the CPU."""
    if rank_and_world()[1] == 1:
        return values
    values = values.to("cuda" if dist.get_backend() == "nccl" else "cpu")
    dist.all_reduce(values)
    return values.cpu()
