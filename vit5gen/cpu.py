"""Settings of torch and of the C library with which a CPU computes the same, faster."""

import contextlib
import ctypes
import functools
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def fast_products() -> Iterator[None]:
    """Compute fp32 products of matrices on the CPU with oneDNN where that rounds nothing.

    Off Intel's processors it is twice as fast as MKL, torch's choice for fp32 (measured on AMD Zen 5).
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium" if _medium_is_exact() else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextlib.contextmanager
def fast_inference() -> Iterator[None]:
    """Compute as `fast_products` where no gradient is recorded: a backward pass comes too late to compute likewise."""
    if torch.compiler.is_compiling() or torch.is_grad_enabled():  # what is compiled keeps the setting it meets
        yield
    else:
        with fast_products():
            yield


@functools.cache
def _medium_is_exact() -> bool:
    """Whether "medium", which hands products to oneDNN and lets it round to bf16, leaves the last bit of fp32 alone.

    It does not on GPUs, nor on processors with tiles for bf16.
    """
    if torch.cuda.is_available():
        return False
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    x = torch.full((512, 512), 1 + torch.finfo(torch.float32).eps)
    exact = torch.equal(x @ torch.eye(512), x)
    torch.set_float32_matmul_precision(before)
    return exact


def keep_freed_memory() -> None:
    """Have glibc keep what is freed for the next step: to get it zeroed anew takes up to 10 % of a step."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # other C libraries have none
    if mallopt is not None:
        mallopt(-4, 0)  # M_MMAP_MAX: no blocks of their own
        mallopt(-1, -1)  # M_TRIM_THRESHOLD: never
