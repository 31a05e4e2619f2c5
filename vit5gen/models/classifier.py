"""The ViT-5 image classifier (arXiv 2602.08071) under timm's conventions, made of the generator's `ViT5Block`."""

import argparse
import math
from collections.abc import Mapping
from typing import Any

import torch
from timm.layers import PatchEmbed, to_2tuple
from timm.models import build_model_with_cfg, generate_default_cfgs, register_model
from timm.models._features import feature_take_indices
from torch import Tensor, nn

from vit5gen.config import ASSUMED_CLASSES, ModelConfig
from vit5gen.models.backbone import Backbone
from vit5gen.models.layers import check_heads, check_positive, check_sizes, init_linears, make_norm
from vit5gen.models.positions import Grid, Segment, patch_grid, resample_positions, rope_table
from vit5gen.models.transformer import SIZES
from vit5gen.models.vit5 import NUM_REGISTERS, REGISTER_THETA, ROPE_THETA, ViT5Block, check_registers
from vit5gen.models.weights import read_checkpoint
from vit5gen.system.cpu import fast_inference
from vit5gen.system.errors import UserError, choose

for _name in ("patch_grid", "resample_positions", "rope_table"):  # they branch by sizes, so torch.fx records calls
    torch.fx.wrap(_name)


class ViT5(Backbone):
    """ViT-5 classifier: images (B, C, H, W) -> logits (B, num_classes), or features where `num_classes` is 0.

    Tokens are ``[cls, patches, registers]``; cls has neither absolute nor rotary position. Images may differ from
    `img_size` (int or (H, W)), whose grid the positions refer to, unless `dynamic_img_size` is off; `patch_size`, a
    square's, must divide their sides. `global_pool` is "token" (cls), "avg" (over the patches) or "" (all tokens).
    `drop_path_rate` is the same for all blocks. Weights are made on `device`, and drawn in fp32 before they become
    `dtype`. Raises `UserError` for sizes that do not fit together.
    """

    def __init__(
        self,
        img_size: int | tuple[int, int] = 224,
        patch_size: int | tuple[int, int] = 16,
        in_chans: int = 3,
        *,
        num_classes: int = ASSUMED_CLASSES,
        global_pool: str = "token",
        embed_dim: int = 768,
        depth: int = 12,
        num_heads: int = 12,
        mlp_ratio: float = ModelConfig.model_fields["mlp_ratio"].default,
        num_registers: int = NUM_REGISTERS,
        drop_rate: float = 0.0,
        drop_path_rate: float = 0.0,
        dynamic_img_size: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        # Refuse sizes that no layer can have.
        patch_size = _square(patch_size)
        check_sizes(in_chans=in_chans, embed_dim=embed_dim, depth=depth)
        check_positive(mlp_ratio=mlp_ratio)
        check_heads(embed_dim, num_heads, rope=True, names=("embed_dim", "num_heads"))
        check_registers(num_registers)

        # What timm asks of a model.
        self.patch_size, self.in_chans = patch_size, in_chans
        self.grid = patch_grid("image size", to_2tuple(img_size), patch_size)
        self.num_classes, self.global_pool = num_classes, choose("global_pool", global_pool, ("token", "avg", ""))
        self.num_features = self.head_hidden_size = self.embed_dim = embed_dim
        self.num_prefix_tokens, self.num_reg_tokens, self.head_dim = 1, num_registers, embed_dim // num_heads
        info = {"num_chs": embed_dim, "reduction": patch_size}
        self.feature_info = [{"module": f"blocks.{i}", **info} for i in range(depth)]

        # Tokens, blocks and head, and their first values.
        with torch.device(device or torch.get_default_device()):
            strict = not dynamic_img_size
            self.patch_embed = PatchEmbed(to_2tuple(img_size), patch_size, in_chans, embed_dim, strict_img_size=strict)
            self.cls_token = nn.Parameter(torch.empty(1, 1, embed_dim))
            self.pos_embed = nn.Parameter(torch.empty(1, math.prod(self.grid), embed_dim))
            self.reg_token = nn.Parameter(torch.empty(1, num_registers, embed_dim)) if num_registers else None
            sizes = (embed_dim, num_heads, mlp_ratio)
            self.blocks = nn.ModuleList(ViT5Block(*sizes, drop_path=drop_path_rate) for _ in range(depth))
            self.norm = make_norm("rms", embed_dim)
            self.head_drop = nn.Dropout(drop_rate)
            self.head = nn.Linear(embed_dim, num_classes) if num_classes else nn.Identity()
            init_linears(self, "trunc_normal")
            for token in (self.cls_token, self.pos_embed, self.reg_token):
                if token is not None:
                    nn.init.trunc_normal_(token, std=0.02)
        self.to(dtype=dtype)

    def _embed(self, images: Tensor) -> tuple[Tensor, Tensor, Grid]:
        """Return tokens ``[cls, patches, registers]``, their rotation and the grid of the patches."""
        grid = patch_grid("image size", images.shape[-2:], self.patch_size)
        x = self.patch_embed(images)
        x = x + resample_positions(self.pos_embed, self.grid, grid)
        parts = [part for part in (self.cls_token, x, self.reg_token) if part is not None]
        x = torch.cat([part.to(x.dtype).expand(x.shape[0], -1, -1) for part in parts], dim=1)
        side = math.isqrt(self.num_reg_tokens)
        segments = (Segment((1, 1)), Segment(grid, ROPE_THETA, self.grid), Segment((side, side), REGISTER_THETA))
        return x, rope_table(segments, self.head_dim, x.device), grid

    def forward_features(self, x: Tensor) -> Tensor:
        """Images -> tokens ``[cls, patches, registers]`` (B, 1 + N + R, D) after the final norm."""
        x, rope, _ = self._embed(x)
        return self.norm(self.run_blocks(x, x.shape[1], x.shape[1], (), None, rope))

    def forward_head(self, x: Tensor, pre_logits: bool = False) -> Tensor:
        """Tokens (B, 1 + N + R, D) -> logits, or the pooled features (B, D) for `pre_logits`."""
        if self.global_pool == "token":
            x = x[:, 0]
        elif self.global_pool == "avg":
            x = x[:, 1 : x.shape[1] - self.num_reg_tokens].mean(dim=1)
        x = self.head_drop(x)
        return x if pre_logits else self.head(x)

    @fast_inference()
    def forward(self, x: Tensor) -> Tensor:
        return self.forward_head(self.forward_features(x))

    def forward_intermediates(
        self,
        x: Tensor,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
    ) -> Any:
        """Return (final tokens, [patches after the chosen blocks]), timm's convention.

        `indices`: the last n blocks, or the blocks of these numbers; None: all. Patches are (B, D, h, w), or (B, N, D)
        with `output_fmt` "NLC"; `return_prefix_tokens` pairs each with its cls and registers (B, 1 + R, D).
        """
        choose("output_fmt", output_fmt, ("NCHW", "NLC"))
        wanted, last = feature_take_indices(len(self.blocks), indices)
        x, rope, grid = self._embed(x)
        count, found = math.prod(grid), []
        for i, block in enumerate(self.blocks[: last + 1] if stop_early else self.blocks):
            x = self.run_block(block, x, None, rope)
            if i in wanted:
                y = self.norm(x) if norm else x
                patches, extra = y[:, 1 : 1 + count], torch.cat([y[:, :1], y[:, 1 + count :]], dim=1)
                if output_fmt == "NCHW":
                    patches = patches.transpose(1, 2).unflatten(2, grid).contiguous()
                found.append((patches, extra) if return_prefix_tokens else patches)
        return found if intermediates_only else (self.norm(x), found)

    def prune_intermediate_layers(
        self, indices: int | list[int] = 1, prune_norm: bool = False, prune_head: bool = True
    ) -> list[int]:
        """Drop what `forward_intermediates` with these indices does not need; return the indices as a list."""
        wanted, last = feature_take_indices(len(self.blocks), indices)
        self.blocks = self.blocks[: last + 1]
        if prune_norm:
            self.norm = nn.Identity()
        if prune_head:
            self.reset_classifier(0, "")
        return wanted

    def get_classifier(self) -> nn.Module:
        return self.head

    def reset_classifier(self, num_classes: int, global_pool: str | None = None) -> None:
        """Replace the head by a new one; 0 classes: none."""
        if global_pool is not None:
            self.global_pool = choose("global_pool", global_pool, ("token", "avg", ""))
        self.num_classes = num_classes
        self.head = nn.Linear(self.embed_dim, num_classes).to(self.pos_embed) if num_classes else nn.Identity()
        init_linears(self.head, "trunc_normal")

    def set_input_size(
        self, img_size: int | tuple[int, int] | None = None, patch_size: int | tuple[int, int] | None = None
    ) -> None:
        """Refer positions to images of another size, and embed patches of another size; None keeps what is.

        Positions and patch weights are resampled. Raises `UserError` for sizes that do not fit together.
        """
        patch_size = _square(self.patch_size if patch_size is None else patch_size)
        size = to_2tuple(self.patch_embed.img_size if img_size is None else img_size)
        grid = patch_grid("image size", size, patch_size)
        self.patch_embed.set_input_size(size, patch_size)
        if grid != self.grid:
            positions = resample_positions(self.pos_embed.detach(), self.grid, grid)
            self.pos_embed = nn.Parameter(positions, self.pos_embed.requires_grad)
        self.grid, self.patch_size = grid, patch_size
        for info in self.feature_info:
            info["reduction"] = patch_size
        # What timm's `get_model_input_config` and `save_for_hf` read, under the names of its 1.0.31.
        self._traits = {**getattr(self, "_traits", {}), "img_size": size}
        self._model_args = {**getattr(self, "_model_args", {}), "img_size": size, "patch_size": patch_size}

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Load as torch does, but also what was published or is of another image size: see `checkpoint_filter_fn`."""
        return super().load_state_dict(checkpoint_filter_fn(state_dict, self), strict, assign)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        self.gradient_checkpointing = enable

    def no_weight_decay(self) -> set[str]:
        return {"pos_embed", "cls_token", "reg_token"}

    def group_matcher(self, coarse: bool = False) -> dict[str, Any]:
        """Layers in order, for layer-wise learning rates."""
        return {
            "stem": r"^cls_token|pos_embed|reg_token|patch_embed",
            "blocks": [(r"^blocks\.(\d+)", None), (r"^norm", (99999,))],
        }


def _square(patch_size: int | tuple[int, int]) -> int:
    """Return the side of the patches, which timm lets users give as a pair; raise `UserError` where they differ."""
    height, width = to_2tuple(patch_size)
    check_sizes(patch_size=height)
    if height != width:
        raise UserError(f"patch_size: {height}x{width} is not square; expected one number, e.g. {height}.")
    return height


def checkpoint_filter_fn(state_dict: Mapping[str, Any], model: ViT5) -> dict[str, Tensor]:
    """Published state dict -> ours: unwrap it, drop the RoPE buffers, resample square positions to the model's grid.

    Without those buffers it may be our own, whose positions, if they are as many as the model's, have its grid. What
    has the model's names, such as a subclass's, is not unwrapped.
    """
    found = state_dict if state_dict.keys() == model.state_dict().keys() else read_checkpoint(state_dict)
    state = {key: value for key, value in found.items() if not key.endswith((".rope.freqs", ".rope_reg.freqs"))}
    positions = state.get("pos_embed", model.pos_embed)
    side, other = math.isqrt(positions.shape[1]), len(state) < len(found) or positions.shape != model.pos_embed.shape
    if other and positions.shape[1] == side**2:
        state["pos_embed"] = resample_positions(positions, (side, side), model.grid)
    return state


def _cfg(file: str | None = None, size: int = 224) -> dict[str, Any]:
    """Return how weights are used; the rest, such as ImageNet's mean and classes, is as timm has it by default."""
    return {
        "url": f"https://huggingface.co/FengWang3211/ViT-5/resolve/main/{file}" if file else "",
        "input_size": (3, size, size),
        "fixed_input_size": True,  # img_size follows input_size: positions refer to the grid as built
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
        "license": "apache-2.0",
        "paper_ids": "arXiv:2602.08071",
    }


default_cfgs = generate_default_cfgs(
    {
        "vit5_small.in1k": _cfg("vit5_small_patch16_224.pth"),
        "vit5_base.in1k": _cfg("vit5_base_patch16_224.pth"),
        "vit5_base.in1k_384": _cfg("vit5_base_patch16_384.pth", 384),
        "vit5_large.in1k": _cfg("vit5_large_patch16_224.pth"),
        "vit5_large.in1k_384": _cfg("vit5_large_patch16_384.pth", 384),
        "vit5_xlarge": _cfg(),
    }
)


def _create(variant: str, size: str, pretrained: bool, kwargs: dict[str, Any]) -> ViT5:
    options = dict(zip(("embed_dim", "depth", "num_heads"), SIZES[size], strict=True)) | kwargs
    features = {"out_indices": 3, "feature_cls": "getter"}
    with torch.serialization.safe_globals([argparse.Namespace]):  # the published files carry their arguments
        return build_model_with_cfg(
            ViT5, variant, pretrained, pretrained_filter_fn=checkpoint_filter_fn, feature_cfg=features, **options
        )


@register_model
def vit5_small(pretrained: bool = False, **kwargs: Any) -> ViT5:
    """ViT-5-S/16, 22.0 M parameters, ImageNet-1k top-1 82.2."""
    return _create("vit5_small", "S", pretrained, kwargs)


@register_model
def vit5_base(pretrained: bool = False, **kwargs: Any) -> ViT5:
    """ViT-5-B/16, 86.5 M parameters, top-1 84.2 (384 pixels: 85.4)."""
    return _create("vit5_base", "B", pretrained, kwargs)


@register_model
def vit5_large(pretrained: bool = False, **kwargs: Any) -> ViT5:
    """ViT-5-L/16, 304.3 M parameters, top-1 84.9 (384 pixels: 86.0)."""
    return _create("vit5_large", "L", pretrained, kwargs)


@register_model
def vit5_xlarge(pretrained: bool = False, **kwargs: Any) -> ViT5:
    """ViT-5-XL/16, 448.5 M parameters; no weights were published."""
    return _create("vit5_xlarge", "XL", pretrained, kwargs)
