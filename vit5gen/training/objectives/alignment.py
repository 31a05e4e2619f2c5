"""Alignment with a pretrained encoder: REPA (arXiv 2410.06940); what iREPA (arXiv 2512.10794) changes is optional."""

from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from timm.layers import to_2tuple
from torch import Tensor, nn

from vit5gen.evaluation.encoders import Encoder, ToMap, find_encoder
from vit5gen.flow import Flow
from vit5gen.models import SiTTransformer2DModel
from vit5gen.models.layers import init_linears
from vit5gen.models.positions import patch_grid
from vit5gen.section import Side, UserPath, Width
from vit5gen.system.errors import UserError
from vit5gen.training.objectives.objective import Batch, Objective, register_objective

_KEPT_MEAN = 0.6  # of the mean over places, how much spatial normalisation subtracts; as in iREPA's code
_WHERE = "training.objectives.alignment"


@register_objective("alignment")
class Alignment(Objective):
    """``-mean_n cos(h_phi(z)_n, y_n)`` of a tap's tokens z and an encoder's features y of the clean image (REPA).

    h_phi is a projector that is trained; the encoder is not, and is no part of a checkpoint. ``mlp``: three layers with
    SiLU, ``width`` wide, as in REPA; ``conv``: one 3 x 3 convolution over the tokens' grid, as in iREPA. spatial_norm
    (iREPA): ``(y - 0.6 mean(y)) / (std(y) + 1e-6)`` of each channel, over the places (one or more) of an image.
    encoder: ``effnet-lite0``, ``emoji-judge``, ``fashion-judge``, which resize images as for evaluation, or a model of
    timm, for which images are resized so that it has a feature for each token, as in REPA; ``side`` sets the size.
    Features of another grid are resized to the tokens', bilinearly, antialiased where that is coarser. The encoder
    computes in the precision of the step.  encoder_weights: a file, in place of the one that timm fetches.
    features: of the step's ``images``, or from ``shards``, for which each image is encoded once, before training.
    Published: SiT-XL/2 in 400K steps as good as without it in 7M (FID without guidance); tap 8 of 28, DINOv2-B, weight
    0.5. iREPA: faster still with each of 27 encoders, weight 1.
    """

    needs_image = True

    def __init__(
        self,
        model: SiTTransformer2DModel,
        flow: Flow,
        *,
        encoder: str,
        tap: Annotated[int, Field(ge=1)],
        projector: Literal["mlp", "conv"] = "mlp",
        width: Width = 2048,
        spatial_norm: bool = False,
        side: Side | None = None,
        encoder_weights: UserPath | None = None,
        features: Literal["images", "shards"] = "images",
    ) -> None:
        super().__init__(model, flow)
        self.taps, self.spatial_norm, self.stored = (tap,), spatial_norm, features == "shards"
        self.grid = patch_grid("latent size", to_2tuple(model.config.sample_size), model.config.patch_size)
        try:
            self.encoder = find_encoder(encoder, max(self.grid), side, encoder_weights)
        except UserError as error:
            raise UserError(f"{_WHERE}: {error}") from error
        self._to_map: ToMap | None = None  # until the first step with it
        size, channels = model.config.hidden_size, self.encoder.channels
        self.projector: nn.Module
        if projector == "conv":
            self.projector = nn.Conv2d(size, channels, 3, padding=1)
        else:
            layers = nn.Linear(size, width), nn.SiLU(), nn.Linear(width, width), nn.SiLU(), nn.Linear(width, channels)
            self.projector = nn.Sequential(*layers)
            init_linears(self.projector, "xavier")

    @classmethod
    def missing_with(cls, options: Mapping[str, Any]) -> dict[str, str]:
        return Encoder(options["encoder"], 0, 1, options.get("encoder_weights")).missing()

    def forward(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch, step: int) -> Tensor:
        """Return the negative mean cosine of each sample, (B,)."""
        target = batch.features if self.stored else self._encode(batch.image)
        assert target is not None
        target = target.to(batch.x1.dtype)
        if self.spatial_norm:
            places = target.flatten(2)
            mean, std = (value[..., None, None] for value in (places.mean(2), places.std(2, correction=0)))
            target = (target - _KEPT_MEAN * mean) / (std + 1e-6)
        tokens = hidden[self.taps[0]]
        if isinstance(self.projector, nn.Conv2d):
            projected = self.projector(tokens.transpose(1, 2).unflatten(2, self.grid)).flatten(2)
        else:
            projected = self.projector(tokens).transpose(1, 2)
        return -F.cosine_similarity(projected.to(target.dtype), target.flatten(2), dim=1).mean(1)

    def flops(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch) -> int | None:
        """Count the encoder too, unless its features are read."""
        if self.stored:
            shape = len(batch.x1), self.encoder.channels, *self.grid
            batch = replace(batch, features=batch.x1.new_zeros(shape))
        return super().flops(prediction, hidden, batch)

    def release(self) -> None:
        self._to_map = None

    def load_encoder(self, device: torch.device) -> tuple[ToMap, dict[str, Any]]:
        to_map, digest = self._load(device)
        made = {"encoder": self.encoder.name, "encoder_sha256": digest, "side": self.encoder.side}
        shape = [self.encoder.channels, *self.grid]
        return lambda images: encode_to_grid(to_map, images.to(device), self.grid), made | {"shape": shape}

    def _encode(self, images: Tensor | None) -> Tensor:
        assert images is not None
        self._to_map = self._to_map or self._load(images.device)[0]
        return encode_to_grid(self._to_map, images, self.grid)

    def _load(self, device: torch.device) -> tuple[ToMap, str]:
        try:
            return self.encoder.load(device)
        except UserError as error:
            raise UserError(f"{_WHERE}: {error}") from error


def encode_to_grid(to_map: ToMap, images: Tensor, grid: tuple[int, int]) -> Tensor:
    """Return the features of uint8 images (B, 3, H, W), resized to ``grid``, (B, C, h, w) fp32, without a gradient."""
    with torch.no_grad():
        return F.interpolate(to_map(images).float(), size=grid, mode="bilinear", align_corners=False, antialias=True)
