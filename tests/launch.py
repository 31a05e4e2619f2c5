"""Training in fresh processes: one interpreter after another, or two joined through gloo.

As a script it runs several trainings in turn, ``python tests/launch.py JOBS.json``, so that the imports are paid once.
"""

import json
import os
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
FSDP = {
    # What `accelerate launch --config_file configs/accelerate/fsdp2.yaml` sets, on the CPU.
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_STATE_DICT_TYPE": "SHARDED_STATE_DICT",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "ACCELERATE_TORCH_DEVICE": "cpu",
}


def environment(**more: str) -> dict[str, str]:
    """Return this process's environment with one thread, without what earlier tests left of a launcher."""
    launcher = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "FORK_LAUNCHED")
    kept = {name: value for name, value in os.environ.items() if name not in launcher}
    return kept | {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"} | more


def free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for one in sockets:
            one.bind(("127.0.0.1", 0))
        return [one.getsockname()[1] for one in sockets]


def train_in(
    num_processes: int, jobs: list[dict[str, Any]], folder: Path, fsdp: bool = False
) -> tuple[list[int], list[str]]:
    """Run trainings ``{config, output, overrides}`` in turn in so many joined processes.

    Returns their exit codes and the classes of the modules that were sharded.
    """
    # A port for each training: one process may look for the next store where the other has yet to close the last.
    jobs = [{**job, "port": str(port)} for job, port in zip(jobs, free_ports(len(jobs)), strict=True)]
    file = folder / "jobs.json"
    file.write_text(json.dumps(jobs, default=str))
    common = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(num_processes)}
    common |= FSDP if fsdp else {"ACCELERATE_USE_CPU": "true"}
    processes = [
        subprocess.Popen(
            [sys.executable, __file__, str(file)],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
            stdout=(folder / f"rank{rank}.txt").open("w"),
            stderr=subprocess.STDOUT,
        )
        for rank in range(num_processes)
    ]
    try:
        codes = [process.wait(timeout=240) for process in processes]
    finally:
        for process in processes:
            process.kill()
    logs = "\n".join((folder / f"rank{rank}.txt").read_text()[-3000:] for rank in range(num_processes))
    assert codes == [0] * num_processes, logs
    codes, sharded = json.loads((folder / "outcome.json").read_text())
    return codes, sharded


def _main(file: Path) -> None:
    import registered_backbones  # noqa: F401
    import torch.distributed.fsdp
    from accelerate.state import DistributedType, PartialState
    from tiny_run import forget_processes

    from vit5gen.config import load_config
    from vit5gen.training.loop import train

    fully_shard, sharded = torch.distributed.fsdp.fully_shard, []

    def recorded(module: Any, **options: Any) -> Any:
        sharded.append(type(module).__name__)
        return fully_shard(module, **options)

    torch.distributed.fsdp.fully_shard = recorded
    if "ACCELERATE_USE_FSDP" in os.environ:
        # On the CPU accelerate silently takes DDP instead of FSDP; nothing else differs from a run on GPUs.
        PartialState._prepare_backend = lambda *_: ("gloo", DistributedType.MULTI_GPU)
    codes = []
    for job in json.loads(file.read_text()):
        os.environ["MASTER_PORT"] = job["port"]
        forget_processes()
        config = load_config(job["config"], job.get("overrides"))
        codes.append(train(config, job["output"], job.get("resume", "auto"), job.get("accept", False)))
    if os.environ["RANK"] == "0":
        (file.parent / "outcome.json").write_text(json.dumps([codes, sharded]))


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
