"""Layers that both backbones share: norms, modulation, attention, MLPs, initialisation."""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit5gen.models.positions import rotate, widen, without_autocast
from vit5gen.section import MOST_CLASSES, MOST_LAYERS, MOST_WIDTH
from vit5gen.system.errors import UserError, check_whole, choose, short

EPS = 1e-6

for _name in ("attention", "rotate", "widen"):  # they branch by dtype, so torch.fx records calls of them
    torch.fx.wrap(_name)


class RMSNorm(nn.RMSNorm):
    """RMS norm whose statistics are taken in fp32 at least; returns the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        weight = None if self.weight is None else self.weight.to(wide.dtype)
        return F.rms_norm(wide, self.normalized_shape, weight, self.eps).to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer norm whose statistics are taken in fp32 at least; returns the input's dtype."""

    def forward(self, x: Tensor) -> Tensor:
        wide = widen(x)
        weight, bias = (None if p is None else p.to(wide.dtype) for p in (self.weight, self.bias))
        return F.layer_norm(wide, self.normalized_shape, weight, bias, self.eps).to(x.dtype)


def make_norm(kind: str, size: int, affine: bool = True) -> nn.Module:
    """Build the norm called ``rms`` or ``layer`` with epsilon 1e-6."""
    norm = {"rms": RMSNorm, "layer": LayerNorm}[choose("norm", kind, ("rms", "layer"))]
    return norm(size, eps=EPS, elementwise_affine=affine)


def modulate(x: Tensor, shift: Tensor | None, scale: Tensor | None) -> Tensor:
    """Return ``x * (1 + scale) + shift`` in one pass (None: x itself); x (B, N, D), the others (B, 1, D)."""
    return x if shift is None or scale is None else torch.addcmul(shift, x, 1 + scale)


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Softmax attention over (B, heads, N, head_dim)."""
    if q.dtype == torch.bfloat16 and q.device.type == "cpu":  # measured 2-4x faster there than the fused kernel
        return ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(-1) @ v
    return F.scaled_dot_product_attention(q, k, v)


def fuses_on_cpu(x: Tensor) -> bool:
    """Whether x is being compiled for the CPU, where code may be written for what the compiler fuses."""
    return torch.compiler.is_compiling() and x.device.type == "cpu"


class Linear(nn.Linear):
    """Linear map that, compiled for the CPU, adds its bias apart: fused with what follows, it costs no pass over y.

    Written on rows and as a difference, or the compiler would fuse it with the product again.
    """

    def forward(self, x: Tensor) -> Tensor:
        if self.bias is None or not fuses_on_cpu(x):
            return super().forward(x)
        y = F.linear(x.flatten(0, -2), self.weight)
        return torch.sub(y, -self.bias.to(y.dtype)).unflatten(0, x.shape[:-1])


class Float32Linear(nn.Linear):
    """Linear map computed in fp32, or in its weights' float64, also under autocast."""

    def forward(self, x: Tensor) -> Tensor:
        with without_autocast(x.device):
            weight = widen(self.weight)
            return F.linear(x.to(weight.dtype), weight, None if self.bias is None else self.bias.to(weight.dtype))


class Attention(nn.Module):
    """Multi-head self-attention with optional QK-norm (RMS over the head's channels, weight shared by the heads).

    tokens (B, N, D) -> (B, N, D); `rope` is the table of all N tokens, or is None. Queries and keys are normed before
    they are rotated (ViT-5, arXiv 2602.08071).
    """

    def __init__(self, hidden_size: int, num_heads: int, qkv_bias: bool, qk_norm: bool) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.qkv = Linear(hidden_size, 3 * hidden_size, bias=qkv_bias)
        head_dim = hidden_size // num_heads
        self.q_norm = RMSNorm(head_dim, eps=EPS) if qk_norm else nn.Identity()
        self.k_norm = RMSNorm(head_dim, eps=EPS) if qk_norm else nn.Identity()
        self.proj = Linear(hidden_size, hidden_size)

    def forward(self, x: Tensor, rope: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rotate(q, rope), rotate(k, rope)
        return self.proj(attention(q, k, v).transpose(1, 2).flatten(2))


class Mlp(nn.Module):
    """Two-layer MLP with biases and exact (``none``) or tanh-approximated (``tanh``) GELU."""

    def __init__(self, hidden_size: int, mlp_ratio: float, approximate: str = "none") -> None:
        super().__init__()
        self.fc1 = Linear(hidden_size, int(hidden_size * mlp_ratio))
        self.fc2 = Linear(int(hidden_size * mlp_ratio), hidden_size)
        self.approximate = approximate

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        if self.approximate == "tanh" and fuses_on_cpu(x):  # the same function; tanh takes three times as long as exp
            y = widen(x)
            x = (y * torch.sigmoid(math.sqrt(8 / math.pi) * (y + 0.044715 * y**3))).to(x.dtype)
        else:
            x = F.gelu(x, approximate=self.approximate)
        return self.fc2(x)


class SwiGLU(nn.Module):
    """Gated MLP ``fc2(silu(a) * b)`` of as many parameters as `Mlp`: 2/3 of its width (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, mlp_ratio: float) -> None:
        super().__init__()
        width = hidden_size * mlp_ratio * 2 / 3
        unit = 8 if width >= 1024 else 1  # tensor cores want multiples of 8; below, equal parameters matter more
        inner = max(1, round(width / unit)) * unit
        self.fc1 = Linear(hidden_size, 2 * inner)
        self.fc2 = Linear(inner, hidden_size)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.fc1(x).chunk(2, dim=-1)
        return self.fc2(F.silu(gate) * value)


def check_positive(**values: float) -> None:
    """Raise `UserError` unless every value is a finite number above zero."""
    for name, value in values.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise UserError(f"{name}: {short(value)} is not positive; expected a number above 0.")


def check_sizes(**values: int) -> None:
    """Raise `UserError` unless every value is a whole number from 1 to what the configuration allows of its kind."""
    most = {"num_layers": MOST_LAYERS, "depth": MOST_LAYERS, "num_classes": MOST_CLASSES}
    for name, value in values.items():
        check_whole(f"{name}:", value, 1, most.get(name, MOST_WIDTH))


def check_heads(
    hidden_size: int,
    num_heads: int,
    rope: bool = False,
    names: tuple[str, str] = ("hidden_size", "num_attention_heads"),
) -> None:
    """Raise `UserError` unless the heads divide the width (with RoPE: into head sizes that are multiples of 4).

    `names` are those of the two arguments where the user gave them.
    """
    width, heads = names
    if check_whole(f"{heads}:", num_heads, 0, MOST_WIDTH) < 1 or hidden_size % num_heads:
        divisors = ", ".join(str(n) for n in range(1, 65) if hidden_size % n == 0)
        raise UserError(f"{heads}: {num_heads} does not divide {width} {hidden_size}; choose one of {divisors}.")
    if rope and hidden_size // num_heads % 4:
        found = f"{num_heads} gives heads of {hidden_size // num_heads} channels"
        wanted = f"a multiple of 4: change the heads or {width} {hidden_size}, or switch RoPE off"
        raise UserError(f"{heads}: {found}; 2-D RoPE (of patches or registers) needs {wanted}.")


def init_linears(module: nn.Module, kind: str) -> None:
    """Initialise the linear layers inside: Xavier-uniform (SiT) or ``trunc_normal`` of 0.02 (ViT-5); biases are zero.

    Layers called ``modulation`` start at zero altogether (adaLN-Zero, arXiv 2212.09748).
    """
    fill = {"xavier": nn.init.xavier_uniform_, "trunc_normal": lambda w: nn.init.trunc_normal_(w, std=0.02)}
    init = fill[choose("weight_init", kind, fill)]
    for name, layer in module.named_modules():
        if isinstance(layer, nn.Linear):
            (nn.init.zeros_ if name.endswith("modulation") else init)(layer.weight)
            if layer.bias is not None:
                nn.init.zeros_(layer.bias)
