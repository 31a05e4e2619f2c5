"""Where training samples come from: latent shards, or images that are encoded anew in every step."""

from collections.abc import Generator
from dataclasses import dataclass

from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader

from vit5gen.config import Config
from vit5gen.data.autoencoder import encode, load_autoencoder
from vit5gen.data.images import ImageSet, check_classes, drop_broken
from vit5gen.data.latents import LatentDataset, ensure_latents, open_for
from vit5gen.training.draws import MicroBatches, TrainingSet
from vit5gen.training.process import signals_blocked


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
    """Open what a run trains on and its autoencoder, encoding latents first where there are none yet.

    Raises `UserError` when data or autoencoder are absent or do not fit the configuration.
    """
    vae = load_autoencoder(config.vae.name).to(accelerator.device)
    if config.data.from_images:
        images = open_for(config, vae)
        if config.data.on_broken_image == "skip":
            images, problems = drop_broken(images)
            for problem in problems:
                accelerator.print(f"warning: skipped: {problem}")
            check_classes(images, config.data, why="all are broken")
        return ImageSource(images), vae
    latents = LatentDataset(ensure_latents(config, vae))
    latents.check(config, vae)
    if config.data.latents is not None:  # those of the cache have just been checked
        latents.verify(accelerator.process_index, accelerator.num_processes)
    return latents, vae


def micro_batches(
    config: Config,
    source: ImageSource | LatentDataset,
    accelerator: Accelerator,
    first_step: int,
    size: int,
    null_label: int,
) -> Generator[dict[str, Tensor]]:
    """Yield this process's micro-batches of ``size`` samples (see `TrainingSet`) from ``first_step`` to the last."""
    settings = config.training
    samples = TrainingSet(
        source,
        config.latent_shape,
        settings.seed,
        settings.global_batch_size,
        null_label,
        drop_prob=config.model.class_dropout_prob,
        flip=config.data.horizontal_flip,
    )
    rank, world = accelerator.process_index, accelerator.num_processes
    keys = MicroBatches(first_step, settings.num_steps, settings.global_batch_size, size, rank, world)
    loader = DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=config.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        # Forked, workers would inherit the state of CUDA and of the trainer's threads.
        multiprocessing_context="spawn" if config.data.num_workers else None,
    )
    with signals_blocked():
        batches = iter(loader)
    try:
        for batch in batches:
            yield {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
    finally:
        if config.data.num_workers:
            # Left to garbage collection, workers that SIGTERM does not reach would keep a failed trainer from exiting.
            batches._shutdown_workers()  # type: ignore[attr-defined]


def encode_batch(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> Tensor:
    """Draw latents (B, C, h, w) of uint8 images (B, 3, H, W) with the given normal noise, in the model's scale."""
    mean, std = encode(vae, images)
    return mean + std * noise
