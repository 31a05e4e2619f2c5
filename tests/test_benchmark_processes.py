import os

import torch
from accelerate import PartialState

from vit5gen.benchmark.processes import fresh


def joined(value: int) -> tuple[int, int, float]:
    """Return the number of processes, this process, and the sum over all of value + rank."""
    state, total = PartialState(cpu=True), torch.tensor(0.0)
    total += value + state.process_index
    if state.num_processes > 1:
        torch.distributed.all_reduce(total)
    return state.num_processes, os.getpid(), total.item()


def test_processes_are_fresh_and_joined() -> None:
    (one, pid, alone), (two, other, both) = fresh(joined, 3), fresh(joined, 3, count=2)
    assert (one, alone, two, both) == (1, 3, 2, 7)
    assert len({pid, other, os.getpid()}) == 3
