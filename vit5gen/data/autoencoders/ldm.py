"""Autoencoders in the layout of latent diffusion's code (LDM), in which VA-VAE (arXiv 2501.01423) is published."""

import re
from collections.abc import Mapping

import torch
from diffusers import AutoencoderKL
from torch import Tensor

from vit5gen.system.errors import UserError

_LEVEL = re.compile(r"(encoder|decoder)\.(down|up)\.(\d+)\.")
_GROUPS = 32  # of each group norm there
_RENAMED = {  # after the number of the level
    r"\.block\.": ".resnets.",
    r"\.attn\.": ".attentions.",
    r"\.downsample\.": ".downsamplers.0.",
    r"\.upsample\.": ".upsamplers.0.",
    r"\.mid\.attn_1\.": ".mid_block.attentions.0.",
    r"\.mid\.block_1\.": ".mid_block.resnets.0.",
    r"\.mid\.block_2\.": ".mid_block.resnets.1.",
    r"\.nin_shortcut\.": ".conv_shortcut.",
    r"^(encoder|decoder)\.norm_out\.": r"\1.conv_norm_out.",
    r"(attentions\.\d+)\.norm\.": r"\1.group_norm.",
    r"(attentions\.\d+)\.([qkv])\.": r"\1.to_\2.",
    r"(attentions\.\d+)\.proj_out\.": r"\1.to_out.0.",
}


def is_ldm(state: Mapping[str, Tensor]) -> bool:
    """Whether a state dict is that of an autoencoder in this layout."""
    return {"encoder.conv_in.weight", "encoder.mid.block_1.conv1.weight", "decoder.conv_in.weight"} <= state.keys()


def from_ldm(state: Mapping[str, Tensor]) -> AutoencoderKL:
    """Return the autoencoder of such a state dict, all sizes read from its shapes; parts of the training are left out.

    The file does not tell how latents are normalised: the configuration says, not at all. Raises `UserError` for
    weights that are absent or do not fit.
    """
    # Widths, levels with attention, and layers.
    prefixes = ("encoder.", "decoder.", "quant_conv.", "post_quant_conv.")
    state = {name: value for name, value in state.items() if name.startswith(prefixes)}
    count = 1 + max(int(found[3]) for name in state if (found := _LEVEL.match(name)))
    first = [state.get(f"encoder.down.{i}.block.0.conv2.weight") for i in range(count)]
    attends = [f"encoder.down.{i}.attn.0.norm.weight" in state for i in range(count)]
    layers = sum(re.fullmatch(r"encoder\.down\.0\.block\.\d+\.conv1\.weight", name) is not None for name in state)
    if None in first or any(len(one) % _GROUPS for one in first if one is not None):
        raise UserError(f"autoencoder: its widths are not those of {_GROUPS} groups; expected weights in LDM's layout")
    try:
        with torch.device("meta"):
            vae = AutoencoderKL(
                in_channels=state["encoder.conv_in.weight"].shape[1],
                out_channels=state["decoder.conv_out.weight"].shape[0],
                down_block_types=[f"{'Attn' * yes}DownEncoderBlock2D" for yes in attends],
                up_block_types=[f"{'Attn' * yes}UpDecoderBlock2D" for yes in reversed(attends)],
                block_out_channels=[len(one) for one in first if one is not None],
                layers_per_block=layers,
                latent_channels=state["decoder.conv_in.weight"].shape[1],
                norm_num_groups=_GROUPS,
                scaling_factor=1.0,
                use_quant_conv="quant_conv.weight" in state,
                use_post_quant_conv="post_quant_conv.weight" in state,
                mid_block_add_attention="encoder.mid.attn_1.norm.weight" in state,
            )

        # The weights under diffusers' names; there attention is made of linear layers, and decoding counts backwards.
        renamed = {}
        for name, value in state.items():
            if level := _LEVEL.match(name):
                number = int(level[3]) if level[2] == "down" else count - 1 - int(level[3])
                name = f"{level[1]}.{level[2]}_blocks.{number}.{name[level.end() :]}"
            for pattern, new in _RENAMED.items():
                name = re.sub(pattern, new, name)
            renamed[name] = value[..., 0, 0] if re.search(r"\.to_\w+(\.0)?\.weight$", name) else value
        vae.load_state_dict({name: value.float() for name, value in renamed.items()}, assign=True)
    except (KeyError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:160]
        raise UserError(f"autoencoder: weights in LDM's layout do not fit ({reason}); download it again") from error
    return vae.eval().requires_grad_(False)
