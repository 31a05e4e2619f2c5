"""The ViT-5 block and the ViT-5 backbone for generation (arXiv 2602.08071), every design decision a switch."""

import math
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn

from vit5gen.models.backbone import Backbone, register_backbone
from vit5gen.models.layers import Attention, Mlp, SwiGLU, check_heads, check_positive, init_linears, make_norm, modulate
from vit5gen.models.positions import Grid, Segment, resample_positions, rope_table, sincos_table
from vit5gen.system.errors import UserError, choose

ROPE_THETA, REGISTER_THETA, NUM_REGISTERS = 10000.0, 100.0, 4

_PLAIN = {"norm": "layer", "qk_norm": False, "qkv_bias": True}  # what ViT-5 changes of the vision transformer's block
_GATED = {"activation": "swiglu", "layer_scale": "none", "absolute_position": "none", "num_registers": 0}
# Our reading of each architecture, as options of the backbone "vit5".
VARIANTS: dict[str, dict[str, Any]] = {
    "vit5": {},
    "deit3": {**_PLAIN, "rope": False, "num_registers": 0},
    "dinov2": {**_PLAIN, "gamma_init": 1e-5, "rope": False, "register_rope": False},
    "dinov3": {**_PLAIN, "gamma_init": 1e-5, "absolute_position": "none", "register_rope": False},
    "llama": {**_GATED, "qk_norm": False},
    "qwen3": _GATED,
}


@dataclass(frozen=True)
class BlockOptions:
    """The switches of a block, explained at `ViT5Backbone`; the defaults are those of the published classifier."""

    norm: str = "rms"
    affine_norms: bool = True
    activation: str = "gelu"
    layer_scale: str = "gate_times_gamma"
    gamma_init: float = 1e-4
    qk_norm: bool = True
    qkv_bias: bool = False


def check_registers(count: int) -> None:
    """Raise `UserError` unless the registers fill a square grid (0 means none)."""
    if count < 0 or math.isqrt(count) ** 2 != count:
        raise UserError(f"num_registers: {count} is not a square; expected 0, 1, 4, 9, 16, ...")


class ViT5Block(nn.Module):
    """``x + g1 * attn(norm(x))``, then ``x + g2 * mlp(norm(x))``: the one block of classifier and generator.

    x (B, N, D) -> (B, N, D). Without conditioning g is LayerScale's gamma. With conditioning (B, D), for blocks built
    with `modulated`, shift and scale follow each norm, and g is gate * gamma (`layer_scale` "gate_times_gamma"),
    gate ("none") or gamma ("gamma_only"). shift = scale = 0 and gate = 1 give the unconditioned block bit for bit.
    """

    gamma_1: nn.Parameter | None
    gamma_2: nn.Parameter | None

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        mlp_ratio: float,
        options: BlockOptions = BlockOptions(),
        modulated: bool = False,
        drop_path: float = 0.0,
    ) -> None:
        super().__init__()
        mlp = {"gelu": Mlp, "swiglu": SwiGLU}[choose("activation", options.activation, ("gelu", "swiglu"))]
        layer_scale = choose("layer_scale", options.layer_scale, ("gate_times_gamma", "none", "gamma_only"))
        self.norm1 = make_norm(options.norm, hidden_size, options.affine_norms)
        self.attn = Attention(hidden_size, num_heads, options.qkv_bias, options.qk_norm)
        self.norm2 = make_norm(options.norm, hidden_size, options.affine_norms)
        self.mlp = mlp(hidden_size, mlp_ratio)
        self.gated = layer_scale != "gamma_only"
        for name in ("gamma_1", "gamma_2"):
            gamma = torch.full((hidden_size,), float(options.gamma_init))
            self.register_parameter(name, None if layer_scale == "none" else nn.Parameter(gamma))
        self.modulation = nn.Linear(hidden_size, (6 if self.gated else 4) * hidden_size) if modulated else None
        self.drop_path = DropPath(drop_path)

    def _modulation(self, conditioning: Tensor | None) -> list[list[Tensor | None]]:
        """Return ``[shift, scale, gate]`` for attention and MLP; None stands for identity."""
        if conditioning is None:
            return [[None, None, None]] * 2
        assert self.modulation is not None, "conditioning needs a block built with modulated=True"
        halves = self.modulation(F.silu(conditioning))[:, None].chunk(2, dim=-1)
        return [list(half.chunk(3, -1)) if self.gated else [*half.chunk(2, -1), None] for half in halves]

    def _residual(self, x: Tensor, update: Tensor, gate: Tensor | None, gamma: Tensor | None) -> Tensor:
        factor = gamma if gate is None else gate if gamma is None else gate * gamma
        if self.training and self.drop_path.drop_prob:
            return x + self.drop_path(update if factor is None else factor * update)
        return x + update if factor is None else torch.addcmul(x, factor, update)

    def forward(self, x: Tensor, conditioning: Tensor | None = None, rope: Tensor | None = None) -> Tensor:
        (shift1, scale1, gate1), (shift2, scale2, gate2) = self._modulation(conditioning)
        x = self._residual(x, self.attn(modulate(self.norm1(x), shift1, scale1), rope), gate1, self.gamma_1)
        return self._residual(x, self.mlp(modulate(self.norm2(x), shift2, scale2)), gate2, self.gamma_2)


@register_backbone("vit5")
class ViT5Backbone(Backbone):
    """ViT-5 blocks with adaLN conditioning over ``[patches, extra tokens, registers]``; registers never leave it.

    The switches:
    norm "rms" | "layer"; affine_norms: weights in the modulated norms. activation "gelu" (exact) | "swiglu" (as many
    parameters). layer_scale: what multiplies a residual, see `ViT5Block`; gamma_init: 1e-4 as published, 1 for short
    runs. absolute_position "learnable" (starts as sin-cos) | "sincos_fixed" | "none". rope: rotate patches by row and
    column; rope_grid: patches along a side that positions are stretched or squeezed onto, default: this model's.
    num_registers: a square; register_rope: rotate them on a grid of their own, low theta = high frequency. qk_norm,
    qkv_bias: see `Attention`. weight_init "xavier" as in SiT | "trunc_normal" as in the classifier: how the published
    generator started is not known. Raises `UserError` for values that do not fit together.
    """

    pos_embed: Tensor | None

    def __init__(
        self,
        hidden_size: int,
        num_layers: int,
        num_attention_heads: int,
        mlp_ratio: float,
        grid: Grid,
        *,
        norm: str = BlockOptions.norm,
        activation: str = BlockOptions.activation,
        layer_scale: str = BlockOptions.layer_scale,
        gamma_init: float = BlockOptions.gamma_init,
        absolute_position: str = "learnable",
        rope: bool = True,
        rope_theta: float = ROPE_THETA,
        rope_grid: int | None = None,
        num_registers: int = NUM_REGISTERS,
        register_rope: bool = True,
        register_theta: float = REGISTER_THETA,
        qk_norm: bool = BlockOptions.qk_norm,
        qkv_bias: bool = BlockOptions.qkv_bias,
        affine_norms: bool = False,
        weight_init: str = "xavier",
    ) -> None:
        super().__init__()
        # Refuse switches that do not go together.
        check_positive(
            rope_theta=rope_theta, register_theta=register_theta, rope_grid=1 if rope_grid is None else rope_grid
        )
        check_registers(num_registers)
        check_heads(hidden_size, num_attention_heads, rope=rope or (register_rope and num_registers > 0))
        choose("absolute_position", absolute_position, ("learnable", "sincos_fixed", "none"))

        # Registers and positions, each turned or not.
        self.grid, self.head_dim = grid, hidden_size // num_attention_heads
        self.rope_grid = grid if rope_grid is None else (rope_grid, rope_grid)
        self.rope_theta = rope_theta if rope else None
        self.register_theta = register_theta if register_rope else None
        self.num_registers = num_registers
        self.reg_token = nn.Parameter(torch.empty(1, num_registers, hidden_size)) if num_registers else None
        table = None if absolute_position == "none" else sincos_table(hidden_size, grid)
        if absolute_position == "sincos_fixed":
            self.register_buffer("pos_embed", table)
        else:
            self.register_parameter("pos_embed", None if table is None else nn.Parameter(table))

        # The blocks, and the first values of what is learnt.
        options = BlockOptions(norm, affine_norms, activation, layer_scale, gamma_init, qk_norm, qkv_bias)
        sizes = (hidden_size, num_attention_heads, mlp_ratio)
        self.blocks = nn.ModuleList(ViT5Block(*sizes, options, modulated=True) for _ in range(num_layers))
        init_linears(self, weight_init)
        if self.reg_token is not None:
            nn.init.trunc_normal_(self.reg_token, std=0.02)

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "reg_token"}

    def forward(
        self,
        tokens: Tensor,
        conditioning: Tensor,
        grid: Grid,
        taps: tuple[int, ...] = (),
        extra_tokens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """tokens (B, N, D), extra_tokens (B, M, D) -> (B, N, D); see `Backbone.run_blocks` for taps."""
        if self.pos_embed is not None:
            tokens = tokens + resample_positions(self.pos_embed, self.grid, grid)
        num_kept = tokens.shape[1] + (0 if extra_tokens is None else extra_tokens.shape[1])
        registers = None if self.reg_token is None else self.reg_token.expand(tokens.shape[0], -1, -1)
        parts = [part.to(tokens.dtype) for part in (tokens, extra_tokens, registers) if part is not None]
        x = torch.cat(parts, dim=1)
        return self.run_blocks(x, tokens.shape[1], num_kept, taps, conditioning, self._rope(grid, num_kept, x.device))

    def _rope(self, grid: Grid, num_kept: int, device: torch.device) -> Tensor | None:
        if self.rope_theta is None and (self.register_theta is None or not self.num_registers):
            return None
        side = math.isqrt(self.num_registers)
        segments = (
            Segment(grid, self.rope_theta, self.rope_grid),
            Segment((1, num_kept - grid[0] * grid[1])),  # extra tokens have no place
            Segment((side, side), self.register_theta),
        )
        return rope_table(segments, self.head_dim, device)
