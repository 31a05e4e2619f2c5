"""Positions: rotary tables over two axes, the fixed sin-cos table, and resampling to another grid."""

import contextlib
from collections.abc import Callable, Sequence
from functools import lru_cache, partial, wraps
from math import prod
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from vit5gen.system.errors import UserError

Grid = tuple[int, int]


def patch_grid(what: str, size: Sequence[int], patch_size: int) -> Grid:
    """Return how many patches an image or latent of ``size (H, W)`` has; raise `UserError` unless they fill it."""
    height, width = size
    if height % patch_size or width % patch_size or min(height, width) < 1:
        raise UserError(f"{what}: {height}x{width} is not divisible by patch_size {patch_size}; choose a divisor.")
    return height // patch_size, width // patch_size


class Segment(NamedTuple):
    """Tokens of one kind on a grid of their own; `theta` None means that they do not turn."""

    grid: Grid
    theta: float | None = None
    built: Grid | None = None  # the grid that positions run over; None: `grid` itself


def _where_made(device: torch.device) -> torch.device:
    """Return where a table for ``device`` is computed: on the CPU, once, with the same numbers for all devices.

    What is compiled computes it in every call, and must not wait there for a copy from the CPU.
    """
    return device if torch.compiler.is_compiling() else torch.device("cpu")


def axial_angles(segment: Segment, head_dim: int, device: torch.device) -> Tensor:
    """Angles (h*w, head_dim/2): the first half turns with the row, the second with the column.

    Positions are ``arange(n) / n * n_built``: a grid other than the one built for is stretched or squeezed onto it.
    """
    (h, w), built = segment.grid, segment.built or segment.grid
    if segment.theta is None:
        return torch.zeros(h * w, head_dim // 2, device=device)
    axis = partial(torch.arange, dtype=torch.float32, device=device)
    frequencies = 1.0 / segment.theta ** (axis(0, head_dim // 2, 2) / (head_dim // 2))
    rows, columns = ((axis(n) / n * m)[:, None] * frequencies for n, m in zip((h, w), built, strict=True))
    return torch.cat([rows[:, None].expand(-1, w, -1), columns[None].expand(h, -1, -1)], dim=-1).flatten(0, 1)


def _remembered(make: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Remember constant tensors by their arguments; trace them again while compiling.

    Such tables are not buffers, because ``model.to(torch.bfloat16)`` would round them.
    """
    cached = lru_cache(maxsize=64)(make)

    @wraps(make)
    def get(*args: Any) -> Tensor:
        if torch.compiler.is_compiling() or type(torch.empty(0)) is not Tensor:  # compiled, or under a fake-tensor mode
            return make(*args)
        with torch.inference_mode(False):  # a table first made while sampling must be usable in training too
            return cached(*args)

    return get


@_remembered
def rope_table(segments: tuple[Segment, ...], head_dim: int, device: torch.device) -> Tensor:
    """Build one fp32 table (N, head_dim/2, 2) of cos and sin for the tokens of all segments, in order."""
    if device.type == "meta":  # where nothing but the shape counts
        return torch.empty(sum(prod(segment.grid) for segment in segments), head_dim // 2, 2, device=device)
    angles = torch.cat([axial_angles(segment, head_dim, _where_made(device)) for segment in segments])
    return torch.stack([angles.cos(), angles.sin()], dim=-1).to(device)


def widen(x: Tensor) -> Tensor:
    """Return x in fp32, or in float64 if it has that: what must not be computed in half precision."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def rotate(x: Tensor, rope: Tensor) -> Tensor:
    """Turn neighbouring pairs of channels of x (B, heads, N, head_dim) by the angles of `rope`, in fp32 at least."""
    pairs = widen(x).unflatten(-1, (-1, 2))
    if torch.compiler.is_compiling():  # the compiler fuses real arithmetic only
        (a, b), (cos, sin) = pairs.unbind(-1), rope.unbind(-1)
        turned = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1)
    else:  # measured 3-10x faster than the above
        turned = torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(rope))
    return turned.flatten(-2).to(x.dtype)


def sincos_table(hidden_size: int, grid: Grid) -> Tensor:
    """Fixed table (1, h*w, D): sine and cosine of the column, then of the row, base 10000 (MAE, DiT, SiT)."""
    if hidden_size % 4:
        raise UserError(f"hidden_size: {hidden_size} is not a multiple of 4, which absolute positions need.")
    omega = 10000.0 ** -(torch.arange(hidden_size // 4, dtype=torch.float64) / (hidden_size // 4))
    rows, columns = (torch.arange(n, dtype=torch.float64)[:, None] * omega for n in grid)
    halves = [torch.cat([a.sin(), a.cos()], dim=-1).expand(*grid, -1) for a in (columns[None], rows[:, None])]
    return torch.cat(halves, dim=-1).flatten(0, 1)[None].float()


@_remembered
def _resampling(built: int, length: int, device: torch.device) -> Tensor:
    """Weights (length, built) of bicubic resampling with antialiasing along one axis."""
    impulses = torch.eye(built, device=_where_made(device))[None, None]
    return F.interpolate(impulses, size=(length, built), mode="bicubic", antialias=True)[0, 0].to(device)


def resample_positions(table: Tensor, built: Grid, grid: Grid) -> Tensor:
    """Resample an absolute table (1, h*w, D) from the grid `built` to `grid`, as timm's `resample_abs_pos_embed` does.

    Written as two matrix products, whose backward pass is deterministic on GPUs and compiles for any grid.
    """
    if built == grid:
        return table
    wide = widen(table[0])
    rows, columns = (_resampling(n, m, table.device).to(wide.dtype) for n, m in zip(built, grid, strict=True))
    with without_autocast(table.device):
        resampled = torch.einsum("hi,wj,ijd->hwd", rows, columns, wide.unflatten(0, built))
    return resampled.flatten(0, 1)[None].to(table.dtype)


def without_autocast(device: torch.device) -> contextlib.AbstractContextManager[object]:
    """Context in which autocast does not round fp32 arithmetic."""
    if device.type == "meta":  # which has none; torch's own test does not compile in 2.11
        return contextlib.nullcontext()
    return torch.autocast(device.type, enabled=False)
