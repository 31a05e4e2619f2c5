"""The six spaces of FDr^6, for which every image is decoded once: Inception's, and those of five networks of timm."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from vit5gen.evaluation.extractors import inception
from vit5gen.evaluation.extractors.timm_space import Space
from vit5gen.evaluation.features import Extractor, Features, register_extractor
from vit5gen.registry import needs
from vit5gen.system.errors import UserError

# Positions follow the size of the images, and 256 is padded to 266, a multiple of 14.
_VIT = {"dynamic_img_size": True, "dynamic_img_pad": True}
SPACES = (
    Space("ConvNeXtV2", "convnextv2_base.fcmae_ft_in22k_in1k", 224, "float", "mean", precision="bf16"),
    Space("DINOv2", "vit_large_patch14_dinov2.lvd142m", 256, "float", "cls", options=_VIT, precision="bf16"),
    Space("MAE", "vit_large_patch16_224.mae", 224, "float", "cls", options=_VIT, precision="bf16"),
    Space(
        "SigLIP2", "vit_so400m_patch16_siglip_256.v2_webli", 224, "float", "attention", options=_VIT, precision="bf16"
    ),
    Space("CLIP", "vit_large_patch14_clip_224.openai", 256, "float", "cls", options=_VIT, precision="bf16"),
)


@register_extractor("fdr6")
@needs(lambda: inception.missing_weights() | {file: why for one in SPACES for file, why in one.missing().items()})
def fdr6(device: torch.device, weights: Path | None, weights_sha256: str | None) -> Extractor:
    """Inception with all that it gives, and beside it five spaces as FD-loss defines them (Yang et al., 2026).

    ``weights``: a folder with Inception's file by its published name, and the others as ``NAME OF TIMM.safetensors``.
    Raises `UserError` for a file, a hash, or weights that are absent or do not fit.
    """
    files = [inception.weights_paths()[0].name, *(f"{space.model}.safetensors" for space in SPACES)]
    if weights_sha256 is not None:
        raise UserError("--weights-sha256: one hash for the six files of fdr6; omit it, the card records theirs")
    if weights is not None and not weights.is_dir():
        raise UserError(f"--weights {weights}: no folder; fdr6 expects one with {', '.join(files)}")
    first, *rest = (weights / file if weights is not None else None for file in files)
    whole = inception.inception(device, first, None)
    parts = {space.name: space(device, file, None) for space, file in zip(SPACES, rest, strict=True)}

    def features(networks: Any, images: Tensor) -> Features:
        others = {name: part.features(networks[name], images).pooled for name, part in parts.items()}
        return replace(whole.features(networks["Inception"], images), others=others)

    settings = {name: part.settings | {"weights_sha256": part.weights_sha256} for name, part in parts.items()}
    return replace(
        whole,
        name="FDr6",
        settings=whole.settings | settings,
        network=nn.ModuleDict({"Inception": whole.network} | {name: part.network for name, part in parts.items()}),
        features=features,
        licences={**whole.licences, **{name: part.licences[name] for name, part in parts.items()}},
        others={name: part.dim for name, part in parts.items()},
    )
