"""What fp64, fp32, tf32 and bf16 mean in training, sampling, costs and cards; exact fp32 for what is compared."""

import importlib.util
import sysconfig
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import nn

from vit5gen.system import cpu

_LOCK = threading.Lock()
_OPEN: list[list[Callable[[], object]]] = []  # for every open context, of any thread, what the last one undoes


@dataclass(frozen=True)
class Precision:
    """An arithmetic. Weights, gradient and optimizer are in ``weights``, activations in ``rounded`` where that is set.

    rounded: the type to which autocast rounds products in training, and to which sampling casts the weights.
    products: torch's setting for products of fp32, where "high" lets a GPU round to TF32.
    """

    weights: torch.dtype = torch.float32
    rounded: torch.dtype | None = None
    products: Literal["highest", "high"] = "highest"

    @property
    def activation_bytes(self) -> int:
        """Bytes of a number that goes into a product and is kept for the backward pass."""
        return (self.rounded or self.weights).itemsize

    @property
    def cast_bytes(self) -> int:
        """Bytes of each weight's copy that autocast makes."""
        return 0 if self.rounded is None else self.rounded.itemsize

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context in which a network of such weights computes with this precision."""
        return torch.autocast(device.type, self.rounded or torch.bfloat16, enabled=self.rounded is not None)

    def set_products(self) -> None:
        """Set for the whole process how products of fp32 are computed."""
        _set_products(self.products)

    def cast_for_sampling(self, *networks: nn.Module) -> None:
        """Cast the weights and set the products: beside cast weights, what is left in fp32 is exact."""
        _set_products(self.products if self.rounded is None else "highest")
        for network in networks if self.rounded is not None else ():
            nn.Module.to(network, self.rounded)  # `to` of diffusers warns of modules that would stay in fp32

    def warn_if_slow(self, device: torch.device, show: Callable[[str], object] = print) -> None:
        """Show a note when bf16 is asked of a CPU without it (measured on AMD Zen 3: 20 times as long as fp32)."""
        if self.rounded is not None and device.type == "cpu" and not cpu.has_bf16():
            show("note: precision bf16 is many times slower than fp32 on this CPU, which has no bf16 instructions")


PRECISIONS = {
    "fp64": Precision(weights=torch.float64),
    "fp32": Precision(),
    "tf32": Precision(products="high"),
    "bf16": Precision(rounded=torch.bfloat16, products="high"),
}


def resolve(name: str, device: torch.device) -> str:
    """Return the name of a precision; ``auto`` is bf16 where the device has instructions for it, else tf32 or fp32."""
    if name != "auto":
        return name
    on_gpu = device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else cpu.has_bf16()
    return "bf16" if has_bf16 else "tf32" if on_gpu else "fp32"


def find_compiler_fault(device: torch.device) -> str:
    """Return what torch.compile lacks to make code for the device, empty where it lacks nothing.

    On a CPU it needs the C++ compiler for which torch looks, and Python's headers; elsewhere Triton.
    """
    if device.type != "cpu":
        return "" if importlib.util.find_spec("triton") else "Triton is not installed"
    from torch._inductor import cpp_builder  # takes a second

    try:
        compiler = cpp_builder.get_cpp_compiler()
    except (OSError, RuntimeError):
        return "torch finds no C++ compiler (g++, or that of the variable CXX)"
    header = Path(sysconfig.get_path("include"), "Python.h")
    return "" if header.exists() else f"{compiler} needs Python's headers, and there is no {header}"


def _set_products(products: str) -> None:
    """Set how products of fp32 are computed, at the end of `exact_float32` where any thread is inside."""
    with _LOCK:
        if _OPEN:
            _OPEN[0].append(partial(cpu.set_products, products))
        else:
            cpu.set_products(products)


def precision_of(network: nn.Module) -> str:
    """Return in what a network computes: its weights' type, and for fp32 whether its products may be rounded (tf32)."""
    dtype = next(network.parameters()).dtype
    try:
        rounded = cpu.get_products() != "highest"
    except RuntimeError:  # the user chose by torch's newer settings
        rounded = cast(Any, torch.backends.cuda.matmul).fp32_precision == "tf32"
    if dtype == torch.float32:
        return "tf32" if rounded else "fp32"
    return {torch.bfloat16: "bf16", torch.float16: "fp16", torch.float64: "fp64"}.get(dtype, str(dtype))


@contextmanager
def exact_float32(device: torch.device) -> Iterator[None]:
    """Turn autocast and TF32 off: either moves a Frechet distance in its third digit.

    TF32 is a setting of the process: it stays off until the last context of any thread ends, and can be read meanwhile.
    On a CPU the order of sums is one, too: see `plain_products`.
    """
    with _LOCK:
        _OPEN.append(_OPEN[-1] if _OPEN else _turn_off())
    products = cpu.plain_products() if device.type == "cpu" else nullcontext()
    try:
        with torch.autocast(device.type, enabled=False), products:
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
    found: list[tuple[Callable[[Any], object], Any, Any]] = []
    for read, write, off in settings:
        with suppress(RuntimeError):  # the user chose by the newer settings alone
            found.append((write, read(), off))
    for write, _, off in found:
        write(off)
    return [partial(write, before) for write, before, _ in found]


def _attribute(owner: object, name: str, off: Any) -> tuple[Callable[[], Any], Callable[[Any], object], Any]:
    return partial(getattr, owner, name), partial(setattr, owner, name), off
