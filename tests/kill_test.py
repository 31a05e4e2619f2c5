"""Kill a training run with SIGKILL at random moments, and compare its final weights with an undisturbed run's.

    python tests/kill_test.py configs/quickstart.yaml --kills 25 --output runs/kill-test [--training.num_steps 200 ...]

Options that this script does not know go to train.py. At least a fifth of the kills strike inside a save. Exit code 0:
so many kills took place, and every tensor of the last checkpoint (weights, averages, optimizer) is equal bit for bit.
"""

import argparse
import json
import math
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

TRAIN = Path(__file__).parents[1] / "train.py"


@dataclass(frozen=True)
class Kill:
    """A moment: seconds after the start, the last step in the log, and whether a save was under way."""

    seconds: float
    step: int
    in_save: bool


class Attempt:
    """One start of the trainer in ``run``."""

    def __init__(self, command: list[str], run: Path) -> None:
        self.run, self.start = run, time.time()
        with run.with_suffix(".txt").open("ab") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log)

    def step(self) -> int:
        """Return the last step that this attempt knows of, -1 before it has opened the log."""
        file = self.run / "log.jsonl"
        if not file.exists() or file.stat().st_mtime < self.start:
            return -1
        lines = file.read_text().split("\n")[:-1]
        return json.loads(lines[-1])["step"] if lines else 0

    def saving(self) -> bool:
        """Tell whether this attempt has begun a checkpoint that is not yet whole."""
        try:
            unfinished = list((self.run / "checkpoints").glob(".step_*.tmp"))
            return any(path.stat().st_mtime >= self.start for path in unfinished)
        except FileNotFoundError:  # renamed in the meantime
            return False

    def wait_for(self, event: Callable[[], bool], pause: float) -> bool:
        """Return True when ``event`` has come, False when the trainer has ended before."""
        while self.process.poll() is None:
            if event():
                return True
            time.sleep(pause)
        return False

    def kill(self) -> Kill:
        seconds, step = time.time() - self.start, self.step()
        self.process.kill()
        self.process.wait()
        return Kill(seconds, step, self.saving())


def kill_often(command: list[str], run: Path, num_steps: int, count: int, draw: random.Random) -> list[Kill]:
    """Start and kill the trainer until ``count`` kills are done, a fifth of them inside a save."""
    kills: list[Kill] = []
    saves, longest = math.ceil(count / 5), 0.02  # seconds into a save; shorter after a miss
    while len(kills) < count or sum(kill.in_save for kill in kills) < saves:
        # Kill after kill moves on by one part of the run, at a random place in it.
        place = num_steps * min(len(kills) + draw.random(), count - 0.5) / count
        wants_save = sum(kill.in_save for kill in kills) < saves and (len(kills) % 2 == 0 or len(kills) >= count)
        attempt = Attempt(command, run)
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


def differing(a: Path, b: Path) -> list[str]:
    """Return the files of tensors that are not the same, byte for byte, in two checkpoints."""
    names = {file.name for folder in (a, b) for file in folder.glob("*.safetensors")}
    assert names, f"no checkpoint in {a}"
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
    parser.add_argument("--seed", type=int, default=0, help="of the moments")
    args, options = parser.parse_known_args(argv)
    args.output.mkdir(parents=True)
    log = (args.output / "killed.txt").open("ab")
    undisturbed, killed = args.output / "undisturbed", args.output / "killed"
    base = [sys.executable, str(TRAIN), args.config, *options, "--training.log_every", "1"]
    subprocess.run([*base, "--output", str(undisturbed)], check=True, stdout=log, stderr=log)
    last = max(path.name for path in (undisturbed / "checkpoints").iterdir())

    command = [*base, "--output", str(killed)]
    kills = kill_often(command, killed, int(last.removeprefix("step_")), args.kills, random.Random(args.seed))
    subprocess.run(command, check=True, stdout=log, stderr=log)

    in_save = sum(kill.in_save for kill in kills)
    wrong = differing(undisturbed / "checkpoints" / last, killed / "checkpoints" / last)
    enough = len(kills) >= args.kills and in_save * 5 >= args.kills
    print(f"{len(kills)} kills, {in_save} of them inside a save; {last}: {wrong or 'equal bit for bit'}")
    if not enough:
        print("too few kills before the end: train more steps, or save more often")
    return 0 if enough and not wrong else 1


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    sys.exit(main())
