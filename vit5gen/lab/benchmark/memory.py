"""Peak memory of training, each in a fresh process."""

import ctypes
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path

from vit5gen.config import Config
from vit5gen.lab.benchmark.peers import SIT, load
from vit5gen.lab.benchmark.processes import fresh
from vit5gen.lab.benchmark.setting import Setting, Sizes
from vit5gen.lab.benchmark.timing import Row, row
from vit5gen.lab.benchmark.train_step import OurStep, modes, published_step, step_config

STEPS = 3
Peak = tuple[float, float]  # beyond the present, and absolute


def rows(setting: Setting) -> Iterator[Row]:
    """Compare what training takes beyond the imports of its code; the absolute peaks stand beside it.

    Raises `PeerError` where ``setting.sit`` is no checkout of the peer.
    """
    if setting.sit is None:
        return
    if sys.platform != "linux":
        setting.note("memory: left out, for peaks are read from Linux's /proc")
        return
    sizes, precisions = setting.sizes, modes()

    @cache
    def measure(sit: Path, precision: str, checkpointing: bool) -> list[tuple[Peak, Peak]]:
        config = step_config(sizes, precision=precision, gradient_checkpointing=checkpointing)
        runs = range(sizes.fresh_repetitions)
        return [(fresh(_ours, config), fresh(_published, sit, sizes)) for _ in runs]

    for mode in ("fp32", "fastest"):
        for checkpointing in (False, True):
            peaks = measure(setting.sit, precisions[mode], checkpointing)
            growth, absolute = ([(ours[i], theirs[i]) for ours, theirs in peaks] for i in (0, 1))
            highest = dict(zip(("our_peak", "peer_peak"), map(max, zip(*absolute, strict=True)), strict=True))
            name = mode + "-checkpointing" * checkpointing
            yield row("memory", name, "sit", "sit", growth, "MB", highest)


def _ours(config: Config) -> Peak:
    return _peak(lambda: OurStep(config))


def _published(folder: Path, sizes: Sizes) -> Peak:
    load(SIT, folder)
    return _peak(lambda: published_step(folder, sizes))


def _peak(build: Callable[[], Callable[[], None]]) -> Peak:
    """Return (growth over the present, absolute) peak memory of this process after some steps, in MB."""
    ctypes.CDLL(None).malloc_trim(0)  # what imports freed would hide a part of the growth
    Path("/proc/self/clear_refs").write_text("5")  # start the peak again
    before = _status("VmRSS")
    step = build()
    for _ in range(STEPS):
        step()
    peak = _status("VmHWM")  # not getrusage's maximum, which a process inherits from the one that started it
    return peak - before, peak


def _status(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024 / 1e6
