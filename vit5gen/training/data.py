"""Where training samples come from: latent shards, or images that are encoded again in every step."""

from collections.abc import Callable, Generator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader

from vit5gen.config import Config
from vit5gen.data.autoencoders.kl import encode, load_autoencoder
from vit5gen.data.encoding import ensure_latents
from vit5gen.data.images import ImageSet, check_classes, drop_broken
from vit5gen.data.latents import LatentDataset, identity, open_for, settings_of
from vit5gen.system.precision import PRECISIONS
from vit5gen.training.objectives import OBJECTIVES, Batch
from vit5gen.training.process import batch_sizes, signals_blocked
from vit5gen.training.random import MicroBatches, Source, TrainingSet, data_index


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


def open_source(
    config: Config, accelerator: Accelerator, check: Callable[[dict[str, Any]], None] = lambda data: None
) -> tuple[ImageSource | LatentDataset, AutoencoderKL, dict[str, Any]]:
    """Open what a run trains on, encoding latents first where there are none yet, and its autoencoder.

    Returned last is what a checkpoint records of the data: their `identity`, and ``broken``, the number of images left
    out. ``check`` gets either as early as it is known, the first before anything is encoded.
    Raises `UserError` when data or autoencoder are absent or do not fit the configuration.
    """
    vae = load_autoencoder(config.vae.name).to(accelerator.device)
    source: ImageSource | LatentDataset
    if config.data.latents is not None and not config.data.from_images:
        source = latents = LatentDataset(Path(config.data.latents).expanduser())
        latents.check(config, vae)
        data = identity(latents.manifest)
        check(data)
        latents.verify()
    else:
        images = open_for(config, vae)
        with accelerator.main_process_first():  # the others find in the cache what it has read
            images = replace(images, digest=partial(str, images.digest()))
        data = identity(settings_of(images, vae, config))
        check(data)
        if config.data.from_images:
            if config.data.on_broken_image == "skip":
                images, problems = drop_broken(images)
                for problem in problems:
                    accelerator.print(f"warning: skipped: {problem}")
                check_classes(images, config.data, why="all are broken")
            source = ImageSource(images)
        else:
            source = LatentDataset(ensure_latents(images, vae, config))
    broken = {"broken": data["samples"] - len(source)}
    check(broken)
    return source, vae, data | broken


def nonfinite_advice(config: Config, source: ImageSource | LatentDataset, vae: AutoencoderKL, step: int) -> str:
    """Say what to do about a loss of ``step`` that is not finite: blame the latents of its samples if these are not."""
    size = config.training.global_batch_size
    indices = [data_index(config.training.seed, step, i, size, len(source)) for i in range(size)]

    def finite(index: int, flip: bool) -> bool:
        *data, _ = source.get(index, flip)
        values = data if len(data) == 2 else encode(vae, data[0][None].to(vae.device))
        return all(bool(value.isfinite().all()) for value in values)

    spoilt = [i for i in indices if not all(finite(i, flip) for flip in (False, *[True] * config.data.horizontal_flip))]
    if spoilt:
        return f"the latents of the samples {spoilt} are not finite: check these images, and the weights of vae.name"
    return f"its samples were {indices}; lower training.learning_rate, or set training.max_grad_norm"


def micro_batches(
    config: Config,
    source: Source,
    vae: AutoencoderKL | None,
    accelerator: Accelerator,
    first_step: int = 0,
) -> Generator[Batch]:
    """Yield this process's micro-batches (see `TrainingSet`) from ``first_step`` to the last, images encoded."""
    settings = config.training
    samples = TrainingSet(
        source,
        config.latent_shape,
        settings.seed,
        settings.global_batch_size,
        null_label=config.data.num_classes,
        drop_prob=config.model.class_dropout_prob,
        flip=config.data.horizontal_flip,
    )
    dtype = PRECISIONS[settings.precision].weights
    keeps_image = any(OBJECTIVES.get(name).needs_image for name in settings.objectives)
    size, _ = batch_sizes(settings, accelerator.num_processes)
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
        for sample in batches:
            first = int(sample["position"][0])
            sample = {name: value.to(accelerator.device, non_blocking=True) for name, value in sample.items()}
            image = sample.get("image")
            x1 = sample["x1"] if image is None else encode_batch(vae, image, sample["posterior"])
            x1, x0 = x1.to(dtype), sample["x0"].to(dtype)
            image = image if keeps_image else None
            empty = x1.new_empty(0)
            yield Batch(
                x1, x0, sample["label"], sample["uniform"], sample["position"], first, image, empty, empty, empty
            )
    finally:
        if config.data.num_workers:
            # Left to garbage collection, workers that SIGTERM does not reach would keep a failed trainer from exiting.
            batches._shutdown_workers()  # type: ignore[attr-defined]


def encode_batch(vae: AutoencoderKL, images: Tensor, noise: Tensor) -> Tensor:
    """Draw latents (B, C, h, w) of uint8 images (B, 3, H, W) with the given normal noise, in the model's scale."""
    mean, std = encode(vae, images)
    return mean + std * noise
