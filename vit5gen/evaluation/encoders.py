"""Encoders whose features by place a training aligns with: extractors that work offline, and models of timm."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor

from vit5gen import registry
from vit5gen.evaluation.extractors.timm_space import Space
from vit5gen.evaluation.features import EXTRACTORS, load_extractor
from vit5gen.system.errors import UserError, listed, nearest

# Extractors with features by place, and how many these have.
OFFLINE = {"effnet-lite0": 1280, "emoji-judge": 768, "fashion-judge": 768}
ToMap = Callable[[Tensor], Tensor]  # uint8 images (B, 3, H, W) to features by place (B, C, h, w)


@dataclass(frozen=True)
class Encoder:
    """An encoder by name; ``channels`` are those of its features.

    side: of the square that images are resized to; None: the extractor's own.  weights: a file in place of the one that
    the hub or its cache has, for a model of timm.
    """

    name: str
    channels: int
    side: int | None
    weights: str | None

    def missing(self) -> dict[str, str]:
        """Return what this machine lacks for it, and how to get it."""
        if self.weights is not None:
            return {} if Path(self.weights).is_file() else {self.weights: f"weights of {self.name}, as timm has them"}
        return registry.missing(EXTRACTORS.get(self.name)) if self.name in OFFLINE else self._space.missing()

    def load(self, device: torch.device) -> tuple[ToMap, str]:
        """Return what encodes images, and the SHA-256 of its weights; on the meta device timm's have none.

        Raises `UserError` when the weights are absent and cannot be fetched, or do not fit.
        """
        # Networks draw their weights before these are read; the cost of a step is counted where all is on meta.
        with torch.random.fork_rng(devices=[]), torch.device("cpu"):
            if self.name in OFFLINE:
                found = load_extractor(self.name, device)
                return lambda images: found.map(found.network, images, self.side), found.weights_sha256  # type: ignore[misc]
            if device.type == "meta":
                return partial(self._space.map, _on_meta(self.name, self.side)), ""
            found = self._space(device, None if self.weights is None else Path(self.weights), None)
            return partial(self._space.map, found.network), found.weights_sha256

    @property
    def _space(self) -> Space:
        assert self.side is not None
        sized = _sized(self.name, self.side)
        return Space(self.name, self.name, self.side, "float", "cls", options=sized, option="encoder_weights")


def find_encoder(name: str, grid: int, side: int | None, weights: str | None) -> Encoder:
    """Return the encoder of that name, of whose weights nothing is read.

    Where ``side`` is None, timm's models get images of the size at which they have ``grid`` x ``grid`` places, as in
    REPA. Raises `UserError` for an unknown name, a model without features by place of such images, and weights for an
    encoder that comes with its own.
    """
    if name in OFFLINE:
        if weights is not None:
            raise UserError(f"encoder_weights = {weights!r}: {name} has its own; omit it")
        return Encoder(name, OFFLINE[name], side, None)
    if name not in (known := timm.list_pretrained()):
        expected = f"expected {listed(OFFLINE)}, or a model of timm with its weights' tag"
        raise UserError(f"encoder = {name!r} is not known; {expected}.{nearest(name, [*OFFLINE, *known])}")
    try:
        stride = _on_meta(name, None).feature_info[-1]["reduction"]
        found = Encoder(name, 0, side or grid * stride, weights)
        images = torch.zeros(1, 3, stride, stride, dtype=torch.uint8, device="meta")
        return replace(found, channels=found.load(images.device)[0](images).shape[1])
    except Exception as error:  # whatever a network raises that has none, or none of such images
        of, advice = "" if side is None else f" of images of side = {side}", "choose another encoder, or side"
        raise UserError(f"encoder = {name!r} has no features by place{of} in timm; {advice}") from error


@lru_cache(maxsize=8)
def _on_meta(name: str, side: int | None) -> Any:
    with torch.device("meta"):
        return timm.create_model(name, **({} if side is None else _sized(name, side))).eval()


def _sized(name: str, side: int) -> dict[str, int]:
    """Return the option of models whose positions are of one size of images."""
    return {"img_size": side} if timm.get_pretrained_cfg(name).fixed_input_size else {}
