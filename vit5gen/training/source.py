"""Where training samples come from: latent shards, or images that are encoded anew in every step."""

from dataclasses import dataclass

from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor

from vit5gen.config import Config
from vit5gen.data.autoencoder import downsample, encode, load_autoencoder
from vit5gen.data.images import ImageSet, open_images
from vit5gen.data.latents import LatentDataset, ensure_latents
from vit5gen.errors import UserError


@dataclass(frozen=True)
class ImageSource:
    """Images by (index, flip), as `LatentDataset` gives latents."""

    images: ImageSet

    @property
    def class_names(self) -> list[str]:
        return self.images.class_names

    def __len__(self) -> int:
        return len(self.images)

    def get(self, index: int, flip: bool) -> tuple[Tensor, int]:
        """Return (uint8 image (3, H, W), label)."""
        image, label = self.images[index]
        return image.flip(-1) if flip else image, label


def open_source(config: Config, accelerator: Accelerator) -> tuple[ImageSource | LatentDataset, AutoencoderKL]:
    """Open what a run trains on and its autoencoder, encoding latents first where that is asked for.

    Raises `UserError` when data or autoencoder are absent or do not fit the configuration.
    """
    vae = load_autoencoder(config.vae.name).to(accelerator.device)
    found = {"vae.latent_channels": vae.config.latent_channels, "vae.downsample": downsample(vae)}
    expected = {"vae.latent_channels": config.vae.latent_channels, "vae.downsample": config.vae.downsample}
    for key, value in found.items():
        if expected[key] != value:
            raise UserError(
                f"{key} = {expected[key]}, but autoencoder {config.vae.name!r} has {value}; set {key} to it"
            )
    if not config.data.from_images:
        latents = LatentDataset(ensure_latents(config, vae))
        latents.check(config, vae)
        return latents, vae
    images = open_images(config.data)
    if len(images.class_names) != config.data.num_classes:
        raise UserError(
            f"data.num_classes = {config.data.num_classes}, but the data have {len(images.class_names)} classes; "
            f"set it to {len(images.class_names)}"
        )
    return ImageSource(images), vae


def encode_batch(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> Tensor:
    """Draw latents (B, C, h, w) of uint8 images (B, 3, H, W) with the given normal noise, in the model's scale."""
    mean, std = encode(vae, images)
    return mean + std * noise
