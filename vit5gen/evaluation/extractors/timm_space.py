"""Feature spaces of published networks, as timm builds them and holds their weights."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import timm
import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download, try_to_load_from_cache
from PIL import Image
from torch import Tensor

from vit5gen.evaluation.features import Extractor, Features, load_weights, register_extractor
from vit5gen.models.weights import read_tensors
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256
from vit5gen.system.precision import PRECISIONS

_FILE = "model.safetensors"  # in the repository of a timm model on the hub


@dataclass(frozen=True)
class Space:
    """A network of timm and what is done to images before and to its features after it: a plug of extractors.

    name: in cards; its distance is ``metric``, else FD-``name``.  side: of the square that images are resized to.
    resize: "pillow" (bicubic, to uint8) or "float" (antialiased bicubic in 0..1, not clamped).  pool: "cls" (after the
    final norm), "mean" (of a map, over its places), "attention" (the network's own pool of tokens), or "head": what the
    network returns, projected and normalised to length 1.  as_dinov2: resample the positions as DINOv2's own code does,
    see `_positions`.  options: of ``timm.create_model``.  precision: "bf16" computes the network under autocast.
    option: by which users name a file of weights.
    """

    name: str
    model: str
    side: int
    resize: Literal["pillow", "float"]
    pool: Literal["cls", "mean", "attention", "head"]
    metric: str | None = None
    as_dinov2: bool = False
    options: Mapping[str, Any] = field(default_factory=dict)
    precision: Literal["fp32", "bf16"] = "fp32"
    option: str | None = None

    def missing(self) -> dict[str, str]:
        """Return where the weights come from, unless they are in the cache."""
        found = isinstance(try_to_load_from_cache(self._repository, _FILE), str)
        return {} if found else {f"{self._repository}/{_FILE}": "weights: will be downloaded on first use"}

    def __call__(self, device: torch.device, weights: Path | None, weights_sha256: str | None) -> Extractor:
        """Build the extractor; raise `UserError` when its weights are absent, differ from the hash, or do not fit."""
        path = weights or self._fetch()
        digest = weights_sha256 or sha256(path) if path.is_file() else ""
        state = load_weights(path, digest) if weights_sha256 else read_tensors(path, "extractor weights")
        try:
            # What is not of these sizes, or no state dict at all, fails in as many ways.
            state = _positions(state, self.side) if self.as_dinov2 else state
            overlay = {"state_dict": state}
            network = timm.create_model(self.model, pretrained=True, pretrained_cfg_overlay=overlay, **self.options)
        except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:
            reason = " ".join(str(error).split())[:120]
            advice = f"give the weights of timm's {self.model}"
            raise UserError(f"extractor weights {path}: do not fit ({reason}); {advice}") from error
        network.pretrained_cfg.pop("state_dict")  # a second copy
        settings = {"model": self.model, "side": self.side, "resize": self.resize, "pool": self.pool}
        return Extractor(
            name=self.name,
            metric=self.metric or f"FD-{self.name}",
            dim=network.num_classes if self.pool == "head" else network.num_features,
            weights_sha256=digest,
            settings=settings | ({} if self.precision == "fp32" else {"precision": self.precision}),
            network=network.to(device).eval().requires_grad_(False),
            features=self.features,
            device=device,
            licences={self.name: str(network.pretrained_cfg.get("license") or "unknown")},
        )

    def pixels(self, images: Tensor) -> Tensor:
        """Return uint8 images ``(B, 3, H, W)`` resized, in 0..1 but for what the float filter overshoots."""
        size = (self.side, self.side)
        if self.resize == "float":
            # In float32 the places of pixels are rounded: values are off by 3e-5.
            return F.interpolate(images.double() / 255, size=size, mode="bicubic", antialias=True).float()
        rows = [Image.fromarray(image) for image in images.permute(0, 2, 3, 1).cpu().numpy()]
        resized = np.stack([np.asarray(row.resize(size, Image.Resampling.BICUBIC)) for row in rows])
        return torch.from_numpy(resized).permute(0, 3, 1, 2).to(images.device).float() / 255

    def features(self, network: Any, images: Tensor) -> Features:
        """Return the pooled features of uint8 images."""
        inputs = self._inputs(network, images)
        device = torch.device("cpu") if images.is_meta else images.device  # the meta device knows no autocast
        with PRECISIONS[self.precision].autocast(device):
            if self.pool == "head":
                return Features(F.normalize(network(inputs), dim=1))
            found = network.forward_features(inputs)
            if self.pool == "mean":
                return Features(found.mean(dim=(2, 3)).float())
            return Features((network.attn_pool(found) if self.pool == "attention" else found[:, 0]).float())

    def map(self, network: Any, images: Tensor) -> Tensor:
        """Return the last features of uint8 images by place, normalised where the network does, ``(B, D, h, w)``."""
        options = {"indices": 1, "norm": True, "output_fmt": "NCHW", "intermediates_only": True}
        return network.forward_intermediates(self._inputs(network, images), **options)[0]

    def _inputs(self, network: Any, images: Tensor) -> Tensor:
        published = network.pretrained_cfg
        mean, std = (torch.tensor(published[key], device=images.device)[:, None, None] for key in ("mean", "std"))
        return (self.pixels(images) - mean) / std

    @property
    def _repository(self) -> str:
        return f"timm/{self.model}"

    def _fetch(self) -> Path:
        """Return the weights in the hub's cache; download them there when they are absent."""
        if isinstance(found := try_to_load_from_cache(self._repository, _FILE), str):
            return Path(found)
        try:
            return Path(hf_hub_download(self._repository, _FILE, etag_timeout=10))
        except Exception as error:  # file, hub and http errors are those of many libraries
            reason = " ".join(str(error).split())[:120]
            problem = f"{self.name} weights: not in the cache and not downloadable ({reason})"
            option = self.option or f"--weights (for fdr6 in a folder, as {self.model}.safetensors)"
            raise UserError(f"{problem}; pass {_FILE} of the hub's {self._repository} as {option}") from error


def _positions(state: Mapping[str, Tensor], side: int) -> dict[str, Tensor]:
    """Return the state with positions for ``side``, resampled as DINOv2's own code does.

    Bicubic without antialiasing, by a factor that is 0.1 patches too large; timm antialiases: other features.
    """
    positions, patch = state["pos_embed"], state["patch_embed.proj.weight"].shape[-1]
    old, new = round((positions.shape[1] - 1) ** 0.5), side // patch
    if old == new:
        return dict(state)
    grid = positions[:, 1:].unflatten(1, (old, old)).permute(0, 3, 1, 2)
    factor = (new + 0.1) / old
    grid = F.interpolate(grid, scale_factor=(factor, factor), mode="bicubic")
    return {**state, "pos_embed": torch.cat([positions[:, :1], grid.flatten(2).transpose(1, 2)], dim=1)}


_DINOV2, _CLIP = "vit_large_patch14_dinov2.lvd142m", "vit_large_patch14_clip_quickgelu_336.openai"
SPACES = {
    # As dgm-eval has it.
    "dinov2": Space("DINOv2-L14@224", _DINOV2, 224, "pillow", "cls", "FD-DINOv2", True, {"img_size": 224}),
    # As CMMD has it, which resizes in floats; OpenAI trained it with the fast approximation of GELU.
    "clip": Space("CLIP-L14@336", _CLIP, 336, "float", "head"),
}
for _name, _space in SPACES.items():
    register_extractor(_name)(_space)
