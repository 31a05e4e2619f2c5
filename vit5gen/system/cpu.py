"""Settings of torch and of the C library with which a CPU computes the same, faster; and what it has."""

import contextlib
import ctypes
import functools
import os
import platform
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor

import torch

_CHANGED = threading.Condition()
_OPEN: list[str | None] = []  # for every open context, of any thread, the precision to which the last one returns
_PLAIN: list[None] = []  # one for every context, of any thread, that keeps to torch's setting or waits to
_HELD = threading.local()  # how many contexts of either kind this thread is in


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Compute fp32 products of matrices on the CPU with oneDNN where that rounds nothing.

    Off Intel's processors it is twice as fast as MKL, torch's choice for fp32 (measured on AMD Zen 5).
    """
    with _CHANGED:
        _enter(lambda: not _PLAIN)
        _OPEN.append(_OPEN[-1] if _OPEN else _ask())
    try:
        yield
    finally:
        with _CHANGED:
            before = _OPEN.pop()
            if not _OPEN and before is not None:
                torch.set_float32_matmul_precision(before)
            _leave()


@contextlib.contextmanager
def plain_products() -> Iterator[None]:
    """Compute products as torch is set while other threads ask for fast ones: each waits for the end of the other.

    Both are fp32 but add up in another order. The setting is the process's, and an image must not depend on who met it.
    """
    try:
        with _CHANGED:
            _PLAIN.append(None)  # before it waits, so that it comes next
            _enter(lambda: not _OPEN)
        try:
            yield
        finally:
            with _CHANGED:
                _leave()
    finally:
        with _CHANGED:
            _PLAIN.pop()
            _CHANGED.notify_all()


def get_products() -> str:
    """Return how products of fp32 were last set to be computed, whatever another thread computes by just now.

    Raises `RuntimeError` where the user chose by torch's newer settings.
    """
    with _CHANGED:
        known = _OPEN[-1] if _OPEN else None
        return torch.get_float32_matmul_precision() if known is None else known


def set_products(precision: str) -> None:
    """Set how products of fp32 are computed, as soon as no thread computes by `fast_products`."""
    with _CHANGED:
        if _OPEN and _OPEN[-1] is not None:
            _OPEN[:] = [precision] * len(_OPEN)
        else:
            torch.set_float32_matmul_precision(precision)


def _enter(free: Callable[[], bool]) -> None:
    """Wait until it is free, except in a thread that is in such a context: two of them would wait for ever."""
    if not getattr(_HELD, "depth", 0):
        _CHANGED.wait_for(free)
    _HELD.depth = getattr(_HELD, "depth", 0) + 1


def _leave() -> None:
    _HELD.depth -= 1
    _CHANGED.notify_all()


@contextlib.contextmanager
def fast_inference() -> Iterator[None]:
    """Compute as `fast_products` where no gradient is recorded: a backward pass comes too late to compute likewise."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # what is compiled keeps the setting it meets
        yield
    else:
        with fast_products():
            yield


def _ask() -> str | None:
    """Ask for "medium", which hands products to oneDNN and lets it round to bf16; return the precision before."""
    try:
        before = torch.get_float32_matmul_precision()
    except RuntimeError:  # the user chose by torch's newer settings, one a backend: they stand
        return None
    if not _rounds_nothing():
        return None
    torch.set_float32_matmul_precision("medium")
    return before


@functools.cache
def _rounds_nothing() -> bool:
    """Whether "medium" leaves the last bit of fp32 alone: not on GPUs, nor on CPUs with tiles for bf16.

    Tried once, in a thread of its own, where no mode of the caller's holds: autocast, another device, a counter of
    FLOPs; where it does round, other threads never meet it.
    """
    if torch.cuda.is_available():
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    with ThreadPoolExecutor(1) as thread:
        kept = thread.submit(_keeps_the_last_bit).result()
    torch.set_float32_matmul_precision(before)
    return kept


def _keeps_the_last_bit() -> bool:
    one = torch.eye(512, dtype=torch.float32, device="cpu")
    x = (1 + torch.finfo(torch.float32).eps) * torch.ones_like(one)
    return torch.equal(x @ one, x)


def cores() -> int:
    """Return how many cores there are for this process: those that it may run on, shared with others of its launch."""
    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    return max(1, usable // int(os.environ.get("LOCAL_WORLD_SIZE", "1")))


def has_bf16() -> bool:
    """Whether this CPU has instructions for products in bf16; torch's own test is passed by any x86 with AVX-512."""
    if platform.machine().lower() in ("x86_64", "amd64"):
        return torch.cpu._is_avx512_bf16_supported()
    return torch.backends.mkldnn.is_available() and bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def keep_freed_memory(large: bool = True) -> None:
    """Have glibc keep what is freed for the next step: to get it zeroed again takes up to 10 % of a step.

    large: False has blocks of 8 MiB or more given back, for the gaps that they leave add to the peak. Measured under
    gradient checkpointing, SiT-S/2 and batch 16: 1.2 GB in place of 1.5, for 4 % of the time; 1 MiB: 0.9 GB, 34 %.
    """
    if platform.system() == "Windows":  # whose C library is another, and cannot be opened like this
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-4, 0 if large else 65536)  # M_MMAP_MAX: how many may be blocks of their own
        mallopt(-3, 8 * 2**20)  # M_MMAP_THRESHOLD: the least of these
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
