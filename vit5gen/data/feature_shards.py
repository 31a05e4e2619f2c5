"""Features of an encoder for every training image, encoded once into shards in the cache."""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from vit5gen.config import Config
from vit5gen.data.encoding import in_cache, write_shards
from vit5gen.data.images import ImageSet
from vit5gen.data.latents import LatentDataset, all_finite, settings_of_images
from vit5gen.system.errors import UserError
from vit5gen.system.progress import Progress

ToFeatures = Callable[[Tensor], Tensor]


def ensure_features(images: ImageSet, encode: ToFeatures, encoder: dict[str, Any], config: Config) -> LatentDataset:
    """Return the features of these images from the cache, encoding them if need be; row i is of image i.

    encode: uint8 images (B, 3, H, W) to features (B, C, h, w).  encoder: what these depend on, and ``shape`` (C, h, w).
    A shard holds ``features`` (n, F, C, h, w) fp16, F = 2 (original, mirrored) or 1, and ``labels``. Raises `UserError`
    as `encode_dataset` does.
    """
    made = {"horizontal_flip": config.data.horizontal_flip, "resolution": config.data.resolution, "dtype": "float16"}
    settings = encoder | made | settings_of_images(images, config)
    size = 2 * (1 + config.data.horizontal_flip) * torch.Size(encoder["shape"]).numel() + 8
    make = partial(_make_shard, encode, config)
    return LatentDataset(in_cache("features", settings, config, partial(write_shards, images, settings, size, make)))


def _make_shard(
    encode: ToFeatures, config: Config, images: ImageSet, progress: Progress
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of one shard; no image is left out, as those that are broken were before."""
    parts: list[Tensor] = []
    indices: Any = range(len(images))  # which the workers turn into images
    loader = DataLoader(indices, config.vae.batch_size, num_workers=config.data.num_workers, collate_fn=images.stack)
    for pixels in loader:
        views = (pixels, pixels.flip(-1))[: 1 + config.data.horizontal_flip]
        parts.append(torch.stack([encode(view).cpu().half() for view in views], 1))
        if not all_finite(parts[-1]):
            found = f"features of {images.name(config.vae.batch_size * (len(parts) - 1))}, or of one of the next"
            raise UserError(f"{found}, overflow float16; set features of the objective to images")
        progress.update(len(pixels))
    return {"features": torch.cat(parts), "labels": images.labels}, []
