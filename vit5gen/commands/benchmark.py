"""`vit5gen benchmark`."""

from pathlib import Path

from vit5gen.commands.options import Options, argument
from vit5gen.lab.benchmark import NAMES


class BenchmarkOptions(Options):
    """Measure against published code, side by side, and write ratios."""

    sit: str | None = argument(None, "PATH", "checkout of willisma/SiT, whose code is then run")
    vit5: str | None = argument(None, "PATH", "checkout of wangf3014/ViT-5, whose code is then run")
    run: str | None = argument(None, "RUN", "folder of a run, for the benchmark sampling")
    only: str | None = argument(None, "NAME", f"{' | '.join(NAMES)}; default: all")
    quick: bool = argument(False, "", "tiny sizes: shows that it runs, its figures mean nothing")
    output: str = argument(..., "FILE.json", "result; a table FILE.md is put beside it")


def run(options: BenchmarkOptions) -> None:
    """Run all benchmarks or one."""
    from vit5gen.lab.benchmark.command import run_benchmarks

    given = options.model_dump(include={"sit", "vit5", "run"})
    folders = {name: None if folder is None else Path(folder) for name, folder in given.items()}
    run_benchmarks(Path(options.output), folders, options.only, options.quick)
