"""Peak memory of training, each in a fresh process."""

import importlib
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path

from vit5gen.benchmark.peers import SIT, load
from vit5gen.benchmark.processes import fresh
from vit5gen.benchmark.setting import Setting, Sizes
from vit5gen.benchmark.timing import Row, alternate, row
from vit5gen.benchmark.train_step import OurStep, published_step, step_config

STEPS = 3


def rows(setting: Setting) -> Iterator[Row]:
    """Compare what training takes beyond its imports; the absolute peaks stand beside it."""
    if setting.sit is None:
        return
    theirs: list[float] = []
    for mode in ("fp32", "fastest"):
        for checkpointing in (False, True):
            ours: list[float] = []
            pairs = alternate(
                partial(_measure, ours, _our_peak, mode, checkpointing, setting.sizes),
                partial(_measure, theirs, _published_peak, setting.sit, setting.sizes),
                setting.sizes.memory_repetitions,
            )
            name = mode + "-checkpointing" * checkpointing
            peaks = {"our_absolute": max(ours), "peer_absolute": max(theirs)}
            yield row("memory", name, "sit", "sit", pairs, unit="MB") | peaks


def _measure(absolute: list[float], function: Callable[..., tuple[float, float]], *arguments: object) -> float:
    growth, peak = fresh(function, *arguments)
    absolute.append(peak)
    return growth


def _our_peak(mode: str, checkpointing: bool, sizes: Sizes) -> tuple[float, float]:
    config = step_config(mode, sizes.latent_side, sizes.batch, gradient_checkpointing=checkpointing)
    if config.training.compile:
        importlib.import_module("torch._inductor.compile_fx")
    return _peak(lambda: OurStep(config))


def _published_peak(folder: Path, sizes: Sizes) -> tuple[float, float]:
    load(SIT, folder)
    return _peak(lambda: published_step(folder, sizes.latent_side, sizes.batch))


def _peak(build: Callable[[], Callable[[], None]]) -> tuple[float, float]:
    """Return (growth over the present, absolute) peak memory of this process after some steps, in MB."""
    before = _status("VmRSS")
    step = build()
    for _ in range(STEPS):
        step()
    peak = _status("VmHWM")  # not getrusage's maximum, which a process inherits from the one that started it
    return peak - before, peak


def _status(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024 / 1e6
