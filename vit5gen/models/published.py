"""Published checkpoints of SiT and ViT-5 -> the models here: sizes are read from the shapes, every key must fit."""

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from vit5gen.config import ModelConfig
from vit5gen.models.classifier import ViT5, checkpoint_filter_fn
from vit5gen.models.transformer import SIZES, SiTTransformer2DModel
from vit5gen.models.weights import Weights, load_exactly, read_checkpoint
from vit5gen.system.errors import UserError, listed

_SIT_NAMES = {
    r"^x_embedder\.proj\.": "patch_embed.",
    r"^t_embedder\.mlp\.0\.": "time_embed.fc1.",
    r"^t_embedder\.mlp\.2\.": "time_embed.fc2.",
    r"^y_embedder\.embedding_table\.": "label_embed.",
    r"^final_layer\.": "head.",
    r"^(pos_embed|blocks\.)": r"backbone.\1",
    r"adaLN_modulation\.1\.": "modulation.",
}


# Published weights of the same layout that mean something else.
_SIT_PARTS = ("x_embedder.", "t_embedder.", "y_embedder.", "final_layer.", "pos_embed", "blocks.")
_DIT = "DiT, which predicts noise and is no flow; draw from it with diffusers' DiTPipeline"


def _shape(state: Mapping[str, Tensor], key: str, layout: str) -> list[int]:
    if key not in state:
        keys = listed(state, 5) or "nothing"
        raise UserError(f"checkpoint: has no {key!r}, so it is not {layout}'s published layout; it has {keys}.")
    return list(state[key].shape)


def _depth(state: Mapping[str, Tensor]) -> int:
    return 1 + max((int(found[1]) for key in state if (found := re.match(r"blocks\.(\d+)\.", key))), default=0)


def _ratio(rows: int, width: int) -> float:
    """Return the MLP ratio that ``int(width * ratio)`` turns into `rows` again."""
    return rows / width if int(width * (rows / width)) == rows else (rows + 0.5) / width


def _side(count: int, name: str) -> int:
    if math.isqrt(count) ** 2 != count:
        advice = f"load it in Python, with {name}=(height, width)"
        raise UserError(f"checkpoint: its {count} positions do not form a square; {advice}.")
    return math.isqrt(count)


def load_sit(source: Weights, num_attention_heads: int | None = None, **overrides: Any) -> SiTTransformer2DModel:
    """Build the generator from SiT's published state dict (layout of ``SiT-XL-2-256x256.pt``).

    Sizes, classes and `learn_sigma` follow from the shapes; the heads, which no shape shows, from the preset of that
    width unless given. The label table is assumed to end in the null row unless ``class_dropout_prob=0`` is given, or
    it has ``num_classes`` rows; one of 1000 has ImageNet's classes and no null row.
    `overrides` are further arguments of `SiTTransformer2DModel`. Raises `UserError` if anything does not fit.
    """
    # What is not SiT's: a DiT of diffusers, and parts that were only trained with it.
    state = read_checkpoint(source)
    if any(key.startswith("transformer_blocks.") for key in state):
        raise UserError(f"checkpoint: is a transformer in diffusers' layout, e.g. of {_DIT}")
    _shape(state, "x_embedder.proj.weight", "SiT")
    if foreign := [key for key in state if not key.startswith(_SIT_PARTS)]:
        parts = " ".join(dict.fromkeys(f"{key.partition('.')[0]}." for key in foreign))
        advice = f"to leave them out, `vit5gen convert FILE --output FOLDER --drop-prefix {parts}`"
        raise UserError(f"checkpoint: has weights that SiT does not have: {listed(foreign, 5)}; {advice}")

    # The sizes, each from the shape of a weight; heads show in none.
    hidden_size, channels, patch, _ = _shape(state, "x_embedder.proj.weight", "SiT")
    of_width = {width: heads for width, _, heads in SIZES.values()}
    heads = of_width.get(hidden_size) if num_attention_heads is None else num_attention_heads
    if heads is None:
        fault = f"cannot be read from the shapes, and no preset has hidden_size {hidden_size}"
        raise UserError(
            f"num_attention_heads: {fault}; set num_attention_heads: "
            "--num-attention-heads, or model.num_attention_heads in a configuration."
        )
    rows = _shape(state, "y_embedder.embedding_table.weight", "SiT")[0]
    outputs = _shape(state, "final_layer.linear.weight", "SiT")[0]
    positions = _shape(state, "pos_embed", "SiT")[1]
    if rows == overrides.get("num_classes", 1000):
        overrides = {"class_dropout_prob": 0.0} | overrides
    dropout = overrides.get("class_dropout_prob", ModelConfig.model_fields["class_dropout_prob"].default)
    found = {
        "backbone": "sit",
        "patch_size": patch,
        "in_channels": channels,
        "num_classes": rows - (dropout > 0),
        "hidden_size": hidden_size,
        "num_layers": _depth(state),
        "num_attention_heads": heads,
        "mlp_ratio": _ratio(_shape(state, "blocks.0.mlp.fc1.weight", "SiT")[0], hidden_size),
        "learn_sigma": outputs == 2 * channels * patch**2,
    }
    if "sample_size" not in overrides:
        found["sample_size"] = _side(positions, "sample_size") * patch
    model = SiTTransformer2DModel(**(found | overrides))

    # The weights under their names here; the patch embedding is a convolution there and a product here.
    converted = {}
    for key, value in state.items():
        for pattern, replacement in _SIT_NAMES.items():
            key = re.sub(pattern, replacement, key)
        converted[key] = value.flatten(1) if key == "patch_embed.weight" else value
    load_exactly(model, converted)
    return model


def check_variance(model: SiTTransformer2DModel, name: str) -> str | None:
    """Return a warning where the half of the outputs that is discarded was trained: as DiT's variance, SiT's is zero.

    Raises `UserError` where the file's name says so, too.
    """
    halves = model.head.linear.weight.unflatten(0, (model.config.patch_size**2, -1)).chunk(2, dim=1)
    if not model.config.learn_sigma or not halves[1].any():
        return None
    if re.match(r"DiT[-_/.]", name, re.IGNORECASE):
        raise UserError(f"checkpoint: {name} is {_DIT}; rename the file if it is a flow all the same")
    return f"note: its outputs include a trained variance, as DiT's do and SiT's do not; use it unless it is {_DIT}"


def reverse_time(model: SiTTransformer2DModel) -> None:
    """Turn weights whose time runs from data (0) to noise (1), as REPA's do, into those of SiT's time, exactly.

    The velocity is then ``-v(x, 1 - t)``: the frequencies w of the time's embedding enter as cos(w - wt) and
    sin(w - wt), which are linear in cos(wt) and sin(wt).
    """
    half = model.time_embed.fc1.in_features // 2
    frequencies = torch.exp(-math.log(10000) / half * torch.arange(half, dtype=torch.float64))
    cos, sin = model.time_embed.fc1.weight.data.double().chunk(2, dim=1)
    c, s = frequencies.cos(), frequencies.sin()
    model.time_embed.fc1.weight.data = torch.cat([cos * c + sin * s, cos * s - sin * c], 1).float()
    for parameter in (model.head.linear.weight, model.head.linear.bias):
        parameter.data.neg_()


def load_vit5(
    source: Weights,
    img_size: int | tuple[int, int] | None = None,
    patch_size: int | None = None,
    num_heads: int | None = None,
    **overrides: Any,
) -> ViT5:
    """Build the classifier from ViT-5's published state dict; positions are resampled if `img_size` differs from its.

    Depth, width, classes, registers, channels and heads (by the QK-norm) follow from the shapes. `overrides` are
    further arguments of `ViT5`. Raises `UserError` if anything does not fit.
    """
    state = read_checkpoint(source)
    width, channels, patch, _ = _shape(state, "patch_embed.proj.weight", "ViT-5")
    positions = _shape(state, "pos_embed", "ViT-5")[1]
    if num_heads is None:
        num_heads = width // _shape(state, "blocks.0.attn.q_norm.weight", "ViT-5")[0]
    found = {
        "img_size": _side(positions, "img_size") * patch if img_size is None else img_size,
        "patch_size": patch if patch_size is None else patch_size,
        "in_chans": channels,
        "num_classes": len(state["head.weight"]) if "head.weight" in state else 0,
        "embed_dim": width,
        "depth": _depth(state),
        "num_heads": num_heads,
        "mlp_ratio": _ratio(_shape(state, "blocks.0.mlp.fc1.weight", "ViT-5")[0], width),
        "num_registers": state["reg_token"].shape[1] if "reg_token" in state else 0,
    }
    model = ViT5(**(found | overrides))
    load_exactly(model, checkpoint_filter_fn(state, model))
    return model
