"""Feature networks: images ``(B, 3, H, W)`` uint8 to features, with everything that defines the metric pinned."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from vit5gen.evaluation.statistics import FeatureStatistics
from vit5gen.models.weights import read_tensors
from vit5gen.registry import Registry, name_and_options
from vit5gen.section import Plug
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256
from vit5gen.system.precision import exact_float32


@dataclass(frozen=True)
class Features:
    """What an extractor says of ``B`` images: ``pooled (B, D)``, ``spatial (B, S)`` and ``logits (B, K)`` or None.

    ``others``: features in further spaces, each ``(B, its dimensions)``, by the names of the spaces.
    """

    pooled: Tensor
    spatial: Tensor | None = None
    logits: Tensor | None = None
    others: Mapping[str, Tensor] = field(default_factory=dict)

    @property
    def spaces(self) -> dict[str, Tensor]:
        """All features that have moments, by the names of `Extractor.dims`."""
        return {"pooled": self.pooled} | ({} if self.spatial is None else {"spatial": self.spatial}) | {**self.others}


@dataclass(frozen=True)
class Extractor:
    """A feature network, the name of the Frechet distance it gives, and what fixes its numbers.

    Called with uint8 images ``(B, 3, H, W)`` it returns `Features` in float32, computed without TF32, and without
    autocast but for what the extractor itself sets. ``spatial_dim`` and ``num_classes`` are 0 where `Features` lacks
    spatial features or logits. ``classes`` are the names of the logits, each with the share of held-out real images
    that they recognise. ``licences``: of the weights, by network, for the card. ``others``: dimensions of further
    spaces by name.
    ``map``: returns what is pooled, by place (B, D, h, w), of ``(network, images, side)``, where images are resized to
    that side, or to the extractor's own for None.
    """

    name: str
    metric: str
    dim: int
    weights_sha256: str
    settings: dict[str, Any]
    network: nn.Module = field(repr=False)
    features: Callable[[nn.Module, Tensor], Features] = field(repr=False)
    device: torch.device
    spatial_dim: int = 0
    num_classes: int = 0
    classes: Mapping[str, float] = field(default_factory=dict)
    licences: dict[str, str] = field(default_factory=dict)
    others: Mapping[str, int] = field(default_factory=dict)
    map: Callable[[nn.Module, Tensor, int | None], Tensor] | None = field(default=None, repr=False)

    @property
    def dims(self) -> dict[str, int]:
        """Dimensions of each space that has moments, by name: "pooled", perhaps "spatial", the others."""
        return {"pooled": self.dim} | ({"spatial": self.spatial_dim} if self.spatial_dim else {}) | {**self.others}

    @property
    def identity(self) -> dict[str, Any]:
        """What a card and a statistics file record about it."""
        return {"name": self.name, "weights_sha256": self.weights_sha256, "settings": self.settings}

    def flops(self, side: int) -> int:
        """Return the FLOPs for a square image, as torch counts them; on the meta device nothing is computed."""
        image = torch.zeros(1, 3, side, side, dtype=torch.uint8, device=self.device)
        with torch.inference_mode(), FlopCounterMode(display=False) as counter:
            self.features(self.network, image)  # autocast, which a call turns off, knows no meta device
        return counter.get_total_flops()

    def __call__(self, images: Tensor) -> Features:
        if images.dtype != torch.uint8 or images.ndim != 4 or images.shape[1] != 3:
            given = f"{images.dtype} {tuple(images.shape)}"
            raise UserError(f"images: {given}; expected torch.uint8 (B, 3, H, W); convert them to RGB")
        with exact_float32(self.device), torch.inference_mode():
            return self.features(self.network, images.to(self.device))


ExtractorFactory = Callable[[torch.device, Path | None, str | None], Extractor]
EXTRACTORS: Registry[ExtractorFactory] = Registry("extractor", "vit5gen.extractors")
# Registers ``factory(device, weights, weights_sha256) -> Extractor``: ``weights`` is a file that the user gives,
# ``weights_sha256`` the hash of one that differs from the published file.
register_extractor = EXTRACTORS.register


def load_extractor(
    name: Plug, device: str | torch.device = "cpu", weights: str | Path | None = None, weights_sha256: str | None = None
) -> Extractor:
    """Build a registered extractor, ``NAME`` or ``{NAME: {option: value}}``; its settings record the options.

    Raises `UserError` when the name or an option is unknown, or its weights are missing.
    """
    name, options = name_and_options(name)
    file = Path(weights) if weights is not None else None
    found = EXTRACTORS.build(name, options, f"extractor {name}", torch.device(device), file, weights_sha256)
    return replace(found, settings=found.settings | options) if options else found


def frechet_of(batches: Iterable[Tensor], extractor: Extractor) -> FeatureStatistics:
    """Return the statistics of the pooled features of uint8 image batches ``(B, 3, H, W)``."""
    statistics = FeatureStatistics(extractor.dim)
    for images in batches:
        statistics.update(extractor(images).pooled)
    return statistics


def load_weights(path: Path, expected_sha256: str) -> dict[str, Tensor]:
    """Read a state dict safely after checking the file's hash; raise `UserError` when it is absent or differs."""
    if path.is_file() and (found := sha256(path)) != expected_sha256:
        advice = "download it again or, to use other weights, pass their hash as --weights-sha256"
        raise UserError(f"extractor weights {path}: sha256 {found}, expected {expected_sha256[:8]}...; {advice}")
    return read_tensors(path, "extractor weights")
