"""Exact fp32 for what is compared between machines, decoded images and features; in what a network computes."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any, cast

import torch
from torch import nn

from vit5gen.system.cpu import plain_products

_LOCK = threading.Lock()
_OPEN: list[list[Callable[[], object]]] = []  # for every open context, of any thread, what the last one undoes


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Turn autocast and TF32 off: either moves a Frechet distance in its third digit.

    TF32 is a setting of the process: it stays off until the last context of any thread ends, and can be read meanwhile.
    On a CPU the order of sums is one, too: see `plain_products`.
    """
    with _LOCK:
        _OPEN.append(_OPEN[-1] if _OPEN else _turn_off())
    try:
        with (
            torch.autocast(device.type, enabled=False),
            plain_products() if device.type == "cpu" else nullcontext(),
        ):
            yield
    finally:
        with _LOCK:
            before = _OPEN.pop()
            for undo in before if not _OPEN else ():
                undo()


def _turn_off() -> list[Callable[[], object]]:
    """Turn TF32 off by torch's older settings and its newer ones, which must agree; return what sets them again."""
    cudnn, matmul = cast(Any, torch.backends.cudnn), torch.backends.cuda.matmul
    settings = [_attribute(cudnn, "allow_tf32", False)]
    settings += [_attribute(part, "fp32_precision", "ieee") for part in (cudnn.conv, cudnn.rnn)]
    if torch.cuda.is_available():  # elsewhere products know no TF32, and `fast_products` chooses how they are computed
        settings += [(torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest")]
        settings += [_attribute(matmul, "fp32_precision", "ieee")]
    undo: list[Callable[[], object]] = []
    turn_off: list[Callable[[], object]] = []
    for read, write, off in settings:
        try:
            undo.append(partial(write, read()))
        except RuntimeError:  # the user chose by the newer settings alone
            continue
        turn_off.append(partial(write, off))
    for change in turn_off:
        change()
    return undo


def _attribute(owner: object, name: str, off: Any) -> tuple[Callable[[], Any], Callable[[Any], object], Any]:
    return partial(getattr, owner, name), partial(setattr, owner, name), off


def precision_of(network: nn.Module) -> str:
    """Return in what a network computes: its weights' type, and for fp32 whether its products may be rounded (tf32)."""
    dtype = next(network.parameters()).dtype
    try:
        rounded = torch.get_float32_matmul_precision() != "highest"
    except RuntimeError:  # the user chose by torch's newer settings
        rounded = cast(Any, torch.backends.cuda.matmul).fp32_precision == "tf32"
    if dtype == torch.float32:
        return "tf32" if rounded else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}.get(dtype, str(dtype))
