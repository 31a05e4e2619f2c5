"""How much memory this process takes at most while it does something."""

import ctypes
import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

T = TypeVar("T")


def peak_of(work: Callable[[], T]) -> tuple[T, float, float]:
    """Do some work; return its result, and the (growth over the present, absolute) peak memory of this process in MB.

    On Linux; elsewhere the peaks are NaN.
    """
    if sys.platform != "linux":
        return work(), math.nan, math.nan
    ctypes.CDLL(None).malloc_trim(0)  # what imports freed would hide a part of the growth
    Path("/proc/self/clear_refs").write_text("5")  # start the peak again
    before = _status("VmRSS")
    result = work()
    highest = _status("VmHWM")  # not getrusage's maximum, which a process inherits from the one that started it
    return result, highest - before, highest


def _status(key: str) -> float:
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024 / 1e6
