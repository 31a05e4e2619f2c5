"""`vit5gen benchmark`."""

from pathlib import Path
from typing import get_args

from pydantic import model_validator

from vit5gen.commands.options import Options, argument
from vit5gen.lab.benchmark import Benchmark, GpuRow
from vit5gen.section import UserPath
from vit5gen.system.errors import choose


class BenchmarkOptions(Options):
    """Measure against published code, side by side, and write ratios."""

    sit: UserPath | None = argument(None, "PATH", "checkout of willisma/SiT, whose code is run")
    vit5: UserPath | None = argument(None, "PATH", "checkout of wangf3014/ViT-5, whose code is run")
    run: UserPath | None = argument(None, "RUN", "folder of a run, needed for the benchmark `sampling`")
    only: Benchmark | None = argument(None, "NAME", "the only benchmark to run; default: all")
    rows: str | None = argument(None, "NAME[,NAME]", f"rows of --only gpu: {', '.join(get_args(GpuRow))}; default: all")
    quick: bool = argument(False, "", "tiny sizes, only to check that it runs: the figures mean nothing")
    output: UserPath = argument(..., "FILE.json", "results; a table FILE.md is written next to it")

    @model_validator(mode="after")
    def _all_is_used(self) -> "BenchmarkOptions":
        if self.rows is not None and self.only != "gpu":
            raise ValueError("--rows has no effect without --only gpu; omit it")
        if self.run is not None and self.only not in (None, "sampling"):
            raise ValueError(f"--run has no effect with --only {self.only}; omit it")
        return self


def run(options: BenchmarkOptions) -> None:
    """Run all benchmarks or one."""
    from vit5gen.lab.benchmark.command import run_benchmarks

    given = options.model_dump(include={"sit", "vit5", "run"})
    folders = {name: None if folder is None else Path(folder) for name, folder in given.items()}
    rows = [] if options.rows is None else [choose("--rows", row, get_args(GpuRow)) for row in options.rows.split(",")]
    run_benchmarks(Path(options.output), folders, options.only, options.quick, rows)
