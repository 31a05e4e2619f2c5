"""Record the numbers of two commits side by side, on one machine in one run, and print what differs.

usage: python scripts/same_numbers.py BASE [--only WORD]

BASE is checked out next to the present tree. Both sides then run the same commands in fresh processes: 50 steps of the
quick start (fp32; bf16 where the CPU has instructions for it), accumulation, two processes, a resume from a checkpoint
that BASE wrote, samples of several solvers as npz and PNG (guided, autoguided, with an interval, in two processes), an
evaluation, the dry run of every recipe, and the options of every command. Files are compared by their bytes, cards and
logs by their numbers. Exit code 0: nothing differs.
"""

import argparse
import json
import multiprocessing
import os
import re
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import redirect_stderr, redirect_stdout, suppress
from hashlib import sha256
from io import StringIO
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
TRAIN = ["--training.num_steps", "50", "--training.log_every", "1", "--training.checkpoint_every", "25"]
TRAIN += ["--evaluation.num_images", "32", "--evaluation.num_reference", "64", "--evaluation.images_per_class", "1"]
TRAIN += ["--training.trackers", "[]"]
RUNS = {
    "fp32": (1, []),
    "bf16": (1, ["--training.precision", "bf16"]),
    "accumulated": (1, ["--training.micro_batch_size", "8"]),
    "two processes": (2, []),
}
SAMPLES = {
    "euler.npz": (1, ["--sampler", "ode-euler"]),
    "heun.npz": (1, ["--sampler", "ode-heun", "--guidance-scale", "2"]),
    "ab2.png": (1, ["--sampler", "ode-ab2", "--guidance-scale", "2", "--guidance-interval", "[0.2, 0.8]"]),
    "dopri5.npz": (1, ["--sampler", "ode-dopri5", "--guidance-channels", "3", "--guidance-scale", "1.5"]),
    "sde.npz": (1, ["--sampler", "sde-euler"]),
    "sde-heun": (1, ["--sampler", "sde-heun", "--guidance-scale", "2"]),
    "autoguided.npz": (1, ["--autoguidance-scale", "2", "--guide", "GUIDE"]),
    "joined.npz": (2, ["--sampler", "ode-heun", "--guidance-scale", "2"]),
    "bf16.npz": (1, ["--precision", "bf16"]),
}
UNCOMPARED = {"versions", "sha256", "path", "checkpoint", "weights_sha256", "command", "run", "markdown"}


def run(argv: list[str], processes: int = 1) -> str:
    """Run a command of the package in forked processes; return what the first one printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free.getsockname()[1])}
    joined |= {"WORLD_SIZE": str(processes), "ACCELERATE_USE_CPU": "true"}
    context = multiprocessing.get_context("fork")
    printed = context.Queue()

    def child(rank: int) -> None:
        from vit5gen.cli import main

        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), **joined} if processes > 1 else {}
        out, err = StringIO(), StringIO()
        code: Any = None
        with redirect_stdout(out), redirect_stderr(err):
            try:
                main(argv)
            except SystemExit as error:
                code = error.code
        if rank == 0:
            printed.put((code, out.getvalue(), err.getvalue()))

    children = [context.Process(target=child, args=(rank,)) for rank in range(processes)]
    for one in children:
        one.start()
    code, out, err = printed.get(timeout=600)
    for one in children:
        one.join()
    if code:
        raise RuntimeError(f"{argv}: exit code {code}: {err[-2000:]}")
    return str(out)


def digest(path: Path) -> str:
    return sha256(path.read_bytes()).hexdigest()[:16]


def numbers(value: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted key, value) of nested JSON, without what names versions and places."""
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            if key not in UNCOMPARED:
                yield from numbers(inner, f"{prefix}.{key}")
    else:
        yield prefix, value


def record(side: Path, base: Path, folder: Path, only: str) -> dict[str, Any]:
    """Run everything with the package of this interpreter; return what it gave by name.

    base: folder of what BASE has left: its configuration, its pipeline and its checkpoint.
    """
    import vit5gen.generation.many
    import vit5gen.training.loop  # paid for once

    assert Path(vit5gen.__file__).is_relative_to(side), f"{vit5gen.__file__} is not of {side}"
    found: dict[str, Any] = {}
    config = str(base / "quickstart.yaml")
    bf16 = re.search("amx_bf16|avx512_bf16", Path("/proc/cpuinfo").read_text())
    for name, (processes, options) in RUNS.items():
        if name == "bf16" and not bf16:
            continue
        output = folder / name
        if only in "train":
            run(["train", config, "--output", str(output), *TRAIN, *options], processes)
            found |= of_run(name, output)
    if only in "train":
        if not (base / "resumed").exists():  # BASE writes it, both go on from it
            shutil.copytree(folder / "fp32", base / "resumed")
            shutil.rmtree(base / "resumed/checkpoints/step_00000050")
        shutil.copytree(base / "resumed", folder / "resumed")
        run(["train", config, "--output", str(folder / "resumed"), *TRAIN])
        found |= of_run("resumed", folder / "resumed")
    trained = base / "trained"
    if not trained.exists():
        shutil.copytree(folder / "fp32", trained)
        run(["convert", str(trained / "checkpoints/step_00000025"), "--output", str(base / "guide")])
    for name, (processes, options) in SAMPLES.items() if only in "sample" else ():
        output = folder / name
        options = [str(base / "guide") if word == "GUIDE" else word for word in options]
        command = ["sample", "--checkpoint", str(trained), "--num-images", "10", "--seed", "3", "--batch-size", "4"]
        run([*command, "--num-inference-steps", "6", "--output", str(output), *options], processes)
        files = sorted(output.rglob("*.png")) if output.is_dir() else [output]
        found |= {f"sample {name} {file.name}": digest(file) for file in files}
        cards = [output.with_suffix(".card.json"), output.with_name(f"{name}.card.json"), output / "card.json"]
        card = json.loads(next(card for card in cards if card.is_file()).read_text())
        found |= {f"card of {name}{key}": value for key, value in numbers(card)}
    if only in "evaluate":
        card_file = folder / "card.json"
        reference = ["--reference", config, "--extractor", "effnet-lite0", "--output", str(card_file)]
        for name, more in {str(folder / "heun.npz"): [], str(trained): ["--num-images", "12"]}.items():
            run(["evaluate", name, *reference, *more, *(["--sampler", "ode-euler"] if more else [])])
            card = json.loads(card_file.read_text())
            found |= {f"evaluate {Path(name).name}{key}": value for key, value in numbers(card)}
    for recipe in sorted((side / "configs").glob("imagenet*/*.yaml")) if only in "plan" else ():
        found[f"dry run {recipe.parent.name}/{recipe.stem}"] = run(["train", str(recipe), "--dry-run"])
    for command in ("train", "encode", "sample", "evaluate", "convert", "classify", "benchmark") * (only in "help"):
        shown = run([command, "--help"])
        for option in re.findall(r"^  (-.*)", shown, re.MULTILINE):
            found[f"option {command} {option.split()[0]}"] = True
    return found


def of_run(name: str, output: Path) -> dict[str, Any]:
    """Return losses, checkpoints, weights and pictures of a run."""
    lines = [json.loads(line) for line in (output / "log.jsonl").read_text().splitlines()]
    found: dict[str, Any] = {f"{name}: loss {line['step']}": line["loss"] for line in lines}
    files = [
        *output.glob("checkpoints/*/*"),
        output / "pipeline/transformer/diffusion_pytorch_model.safetensors",
    ]
    found |= {f"{name}: {file.relative_to(output)}": digest(file) for file in [*files, output / "samples.png"]}
    metrics = json.loads((output / "metrics.json").read_text())
    return found | {f"{name}: metrics{key}": value for key, value in numbers(metrics)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base")
    parser.add_argument("--only", default="", help="train | sample | evaluate | plan | help; default: all")
    parser.add_argument("--record", nargs=3, type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.record:
        side, base, folder = args.record
        (folder / "record.json").write_text(json.dumps(record(side, base, folder, args.only)))
        return 0
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        git = ["git", "-C", str(ROOT), "worktree"]
        subprocess.run([*git, "add", "--detach", "--quiet", str(place / "base"), args.base], check=True)
        try:
            (place / "made").mkdir()
            shutil.copy(place / "base/configs/quickstart.yaml", place / "made/quickstart.yaml")
            sides = []
            for name, side in (("before", place / "base"), ("after", ROOT)):
                folder = place / name
                folder.mkdir()
                command = [sys.executable, __file__, args.base, "--only", args.only, "--record"]
                variables = {
                    "PYTHONPATH": str(side),
                    "OMP_NUM_THREADS": "1",
                    "VIT5GEN_CACHE": str(place / f"cache-{name}"),
                }
                subprocess.run(
                    [*command, str(side), str(place / "made"), str(folder)],
                    check=True,
                    cwd=side,
                    env=os.environ | variables,
                )
                sides.append(json.loads((folder / "record.json").read_text()))
        finally:
            with suppress(subprocess.CalledProcessError):
                subprocess.run([*git, "remove", "--force", str(place / "base")], check=True)
    before, after = sides
    names = list(dict.fromkeys([*before, *after]))
    different = [name for name in names if before.get(name) != after.get(name)]
    for name in different:
        print(f"{name}: {before.get(name)!r} -> {after.get(name)!r}")
    print(f"{len(names) - len(different)} of {len(names)} equal")
    return bool(different)


if __name__ == "__main__":
    sys.exit(main())
