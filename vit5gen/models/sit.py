"""SiT's block and backbone (arXiv 2401.08740): DiT with adaLN-Zero, fixed sin-cos positions, no rotation."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit5gen.models.backbone import Backbone, register_backbone
from vit5gen.models.layers import Attention, Mlp, check_heads, init_linears, make_norm, modulate
from vit5gen.models.positions import Grid, resample_positions, sincos_table


class SiTBlock(nn.Module):
    """Attention and MLP, each modulated and gated by the conditioning; the gates start at zero.

    x (B, N, D), conditioning (B, D) -> (B, N, D).
    """

    def __init__(self, hidden_size: int, num_heads: int, mlp_ratio: float) -> None:
        super().__init__()
        self.norm1 = make_norm("layer", hidden_size, affine=False)
        self.attn = Attention(hidden_size, num_heads, qkv_bias=True, qk_norm=False)
        self.norm2 = make_norm("layer", hidden_size, affine=False)
        self.mlp = Mlp(hidden_size, mlp_ratio, approximate="tanh")
        self.modulation = nn.Linear(hidden_size, 6 * hidden_size)

    def forward(self, x: Tensor, conditioning: Tensor) -> Tensor:
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(F.silu(conditioning))[:, None].chunk(6, dim=-1)
        x = torch.addcmul(x, gate1, self.attn(modulate(self.norm1(x), shift1, scale1)))
        return torch.addcmul(x, gate2, self.mlp(modulate(self.norm2(x), shift2, scale2)))


@register_backbone("sit")
class SiTBackbone(Backbone):
    """SiT's blocks over ``[patches, extra tokens]``; the position table is a buffer, so it is saved but not trained."""

    pos_embed: Tensor

    def __init__(
        self, hidden_size: int, num_layers: int, num_attention_heads: int, mlp_ratio: float, grid: Grid
    ) -> None:
        super().__init__()
        check_heads(hidden_size, num_attention_heads)
        self.grid = grid
        self.register_buffer("pos_embed", sincos_table(hidden_size, grid))
        self.blocks = nn.ModuleList(SiTBlock(hidden_size, num_attention_heads, mlp_ratio) for _ in range(num_layers))
        init_linears(self, "xavier")

    def forward(
        self,
        tokens: Tensor,
        conditioning: Tensor,
        grid: Grid,
        taps: tuple[int, ...] = (),
        extra_tokens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, dict[int, Tensor]]:
        """tokens (B, N, D), extra_tokens (B, M, D) -> (B, N, D); see `Backbone.run_blocks` for taps."""
        x = tokens + resample_positions(self.pos_embed, self.grid, grid)
        if extra_tokens is not None:
            x = torch.cat([x, extra_tokens.to(x.dtype)], dim=1)
        return self.run_blocks(x, tokens.shape[1], x.shape[1], taps, conditioning)
