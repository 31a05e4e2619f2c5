"""Judges: small classifiers that ship with the package, trained on real images alone by examples/train_classifier.py.

No objective of a generator sees their features, unless a run aligns with one (`alignment`): score it in another space.
The card beside the weights has command, seed and held-out accuracy.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit5gen.evaluation.features import Extractor, Features, load_weights, register_extractor
from vit5gen.system.files import read_json
from vit5gen.system.shipped import FOLDER

EMOJI_SHA256 = "7763f45cc9f16dd96015d2d8abd5de060cc8219aff2ee4de631d09fa417f3f77"
FASHION_SHA256 = "99768782948131bf9f71c33820726a1533cd31cb504676e1f0dfa7ca1c4e6859"


@register_extractor("emoji-judge")
def emoji_judge(device: torch.device, weights: Path | None, weights_sha256: str | None) -> Extractor:
    """A classifier of the nine emoji classes at 64 x 64."""
    return _judge("emoji-judge", "EmojiJudge", device, weights, weights_sha256 or EMOJI_SHA256)


@register_extractor("fashion-judge")
def fashion_judge(device: torch.device, weights: Path | None, weights_sha256: str | None) -> Extractor:
    """A classifier of the ten classes of Fashion-MNIST at 32 x 32."""
    return _judge("fashion-judge", "FashionJudge", device, weights, weights_sha256 or FASHION_SHA256)


def _judge(folder: str, name: str, device: torch.device, weights: Path | None, digest: str) -> Extractor:
    """Return the features before the last layer, and the class scores, of images resized to the judge's side."""
    import timm

    card = read_json(FOLDER / folder / "card.json", "card of the judge")
    model, use, classes = card["settings"]["model"], card["input"], card["classes"]
    network = timm.create_model(model, num_classes=len(classes), **card["settings"]["model_kwargs"])
    network.load_state_dict(load_weights(weights or FOLDER / folder / "weights.safetensors", digest))  # fp16 into fp32
    mean, std = (torch.tensor(use[key], device=device).view(3, 1, 1) for key in ("mean", "std"))
    to_map = partial(_map, use["input_size"], mean, std)
    return Extractor(
        name=name,
        metric=f"FD-{name}",
        dim=network.num_features,
        weights_sha256=digest,
        settings={"model": model, "resize": "bilinear, antialiased, float32, half-pixel centres", **use},
        network=network.to(device).eval().requires_grad_(False),
        features=partial(_features, to_map),
        map=to_map,
        device=device,
        num_classes=len(classes),
        classes=classes,
    )


def _features(to_map: Callable[[Any, Tensor, None], Tensor], network: Any, images: Tensor) -> Features:
    pooled = network.forward_head(to_map(network, images, None), pre_logits=True)
    return Features(pooled=pooled, logits=network.get_classifier()(pooled))


def _map(own_side: int, mean: Tensor, std: Tensor, network: Any, images: Tensor, side: int | None) -> Tensor:
    size = (side or own_side,) * 2
    pixels = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return network.forward_features((pixels / 255 - mean) / std)
