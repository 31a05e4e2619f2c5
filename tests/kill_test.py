"""Kill a training run, or an encoding, with SIGKILL at random moments, and compare its end with an undisturbed one's.

    python tests/kill_test.py configs/quickstart.yaml --kills 25 --output runs/kill-test [--training.compile false ...]
    python tests/kill_test.py configs/quickstart.yaml --kills 25 --output runs/kill-test --encode

Options that this script does not know go to the command. A quarter of the kills strike inside a save. The processes are
forked from this one, which pays for the imports once; ``--processes 2`` joins two through gloo and kills both.
Exit code 0: so many kills took place, and every file (weights, averages and optimizer of the last checkpoint; shards
and manifest) is equal byte for byte.
"""

import argparse
import json
import math
import multiprocessing
import os
import random
import socket
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

IMAGES_IN_A_SHARD = 1  # so that a small set of images has many


@dataclass(frozen=True)
class Kill:
    """A moment: seconds after the start, the last step or shard, and whether a save was under way."""

    seconds: float
    step: int
    in_save: bool


class Attempt:
    """One start of the command, in one process or several, whose output is ``run``."""

    def __init__(self, command: list[str], run: Path, processes: int) -> None:
        self.run, self.start, self.encodes = run, time.time(), command[0] == "encode"
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = str(free.getsockname()[1])
        joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(processes)}
        joined["ACCELERATE_USE_CPU"] = "true"
        self.processes = []
        for rank in range(processes):
            variables = {"RANK": str(rank), "LOCAL_RANK": str(rank), **joined} if processes > 1 else {}
            arguments = ([*command, "--output", str(run)], run.with_suffix(".txt"), variables)
            self.processes.append(multiprocessing.get_context("fork").Process(target=_run, args=arguments))
            self.processes[-1].start()

    def step(self) -> int:
        """Return the last step that this attempt knows of, or the shards that there are; -1 before there is any."""
        if self.encodes:
            return len(list(self.run.glob("shard_*.safetensors"))) - (not self.run.exists())
        file = self.run / "log.jsonl"
        if not file.exists() or file.stat().st_mtime < self.start:
            return -1
        lines = file.read_text().split("\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0

    def saving(self) -> bool:
        """Tell whether this attempt has begun a checkpoint or a shard that is not yet whole."""
        unfinished = self.run.glob(".shard_*.tmp") if self.encodes else self.run.glob("checkpoints/.step_*.tmp")
        try:
            return any(path.stat().st_mtime >= self.start for path in unfinished)
        except FileNotFoundError:  # renamed in the meantime
            return False

    def wait_for(self, event: Callable[[], bool], pause: float) -> bool:
        """Return True when ``event`` has come, False when the command has ended before."""
        while all(process.is_alive() for process in self.processes):
            if event():
                return True
            time.sleep(pause)
        return False

    def kill(self) -> Kill:
        seconds, step = time.time() - self.start, self.step()
        for process in self.processes:
            process.kill()
        for process in self.processes:
            process.join()
        return Kill(seconds, step, self.saving())

    def end(self) -> None:
        """Wait for the end; raise `RuntimeError` unless every process succeeds."""
        for process in self.processes:
            process.join()
        if codes := [process.exitcode for process in self.processes if process.exitcode]:
            raise RuntimeError(f"exit codes {codes}: {self.run.with_suffix('.txt').read_text()[-2000:]}")


def _run(argv: list[str], log: Path, variables: dict[str, str]) -> None:
    from vit5gen.cli import main
    from vit5gen.data import encoding

    with log.open("ab", buffering=0) as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    os.environ |= variables
    encoding.SHARD_SIZE = IMAGES_IN_A_SHARD
    main(argv)


def kill_often(
    command: list[str], run: Path, processes: int, length: int, count: int, draw: random.Random
) -> list[Kill]:
    """Start and kill the command until ``count`` kills are done, a quarter of them inside a save."""
    kills: list[Kill] = []
    saves, longest = math.ceil(count / 4), 0.02  # seconds into a save; shorter after a miss
    while len(kills) < count or sum(kill.in_save for kill in kills) < saves:
        # Kill after kill gets further by one part of the run, at a random place in it.
        place = length * min(len(kills) + draw.random(), count - 0.5) / count
        wants_save = sum(kill.in_save for kill in kills) < saves and (len(kills) % 2 == 0 or len(kills) >= count)
        attempt = Attempt(command, run, processes)
        if not attempt.wait_for(lambda a=attempt, p=place: a.step() >= math.floor(p), 0.002):
            break
        if wants_save:
            if not attempt.wait_for(attempt.saving, 0.0002):
                break
            time.sleep(draw.uniform(0, longest))
        else:
            time.sleep(draw.uniform(0, 0.1))
        kills.append(attempt.kill())
        longest *= 1 if kills[-1].in_save or not wants_save else 0.5
        print(f"kill {len(kills)}: {kills[-1]}", flush=True)
    return kills


def differing(a: Path, b: Path, patterns: tuple[str, ...] = ("*.safetensors",)) -> list[str]:
    """Return the files that are not the same, byte for byte, in two folders."""
    names = {file.name for folder in (a, b) for pattern in patterns for file in folder.glob(pattern)}
    assert names, f"nothing to compare in {a}"
    return sorted(
        name
        for name in names
        if not ((a / name).exists() and (b / name).exists() and (a / name).read_bytes() == (b / name).read_bytes())
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config")
    parser.add_argument("--output", type=Path, required=True, help="new folder for the two runs")
    parser.add_argument("--kills", type=int, default=25)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--encode", action="store_true", help="kill `vit5gen encode` instead of `vit5gen train`")
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, options = parser.parse_known_args(argv)
    import vit5gen.training.loop  # noqa: F401  (paid for once)

    args.output.mkdir(parents=True)
    undisturbed, killed = args.output / "undisturbed", args.output / "killed"
    command = ["encode" if args.encode else "train", args.config, *options]
    command += [] if args.encode else ["--training.log_every", "1"]
    Attempt(command, undisturbed, args.processes).end()
    if args.encode:
        length, folder, patterns = len(list(undisturbed.glob("*.safetensors"))), "", ("*.safetensors", "*.json")
    else:
        folder = max(f"checkpoints/{path.name}" for path in (undisturbed / "checkpoints").iterdir())
        length, patterns = int(folder.partition("step_")[2]), ("*.safetensors",)

    kills = kill_often(command, killed, args.processes, length, args.kills, random.Random(args.seed))
    Attempt(command, killed, args.processes).end()

    in_save = sum(kill.in_save for kill in kills)
    wrong = differing(undisturbed / folder, killed / folder, patterns)
    enough = len(kills) >= args.kills and in_save * 4 >= args.kills
    print(
        f"{len(kills)} kills, {in_save} of them inside a save; {folder or 'shards'}: {wrong or 'equal byte for byte'}"
    )
    if not enough:
        print("too few kills before the end: train more steps, save more often, or encode more images")
    return 0 if enough and not wrong else 1


if __name__ == "__main__":
    os.environ |= {"PYTHONUNBUFFERED": "1", "ACCELERATE_USE_CPU": "true"}
    sys.path.insert(0, str(Path(__file__).parents[1]))
    sys.exit(main())
