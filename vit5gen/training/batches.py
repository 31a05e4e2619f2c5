"""From a source to the loss: the batches of one process and what the model loses on each."""

from collections.abc import Callable, Iterator

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor
from torch.utils.data import DataLoader

from vit5gen.config import Config
from vit5gen.flow import Flow, draw_timesteps
from vit5gen.training.build import latent_shape
from vit5gen.training.draws import MicroBatches, Source, TrainingSet
from vit5gen.training.source import encode_batch

Batch = dict[str, Tensor]


def open_batches(
    config: Config, source: Source, accelerator: Accelerator, first_step: int, num_steps: int, micro_batch_size: int
) -> Iterator[Batch]:
    """Yield the micro-batches of this process from ``first_step`` to ``num_steps``, see `TrainingSet` for a sample."""
    settings = config.training
    samples = TrainingSet(
        source,
        latent_shape(config),
        settings.seed,
        settings.global_batch_size,
        null_label=config.data.num_classes,
        drop_prob=config.model.class_dropout_prob,
        flip=config.data.horizontal_flip,
    )
    keys = MicroBatches(
        first_step,
        num_steps,
        settings.global_batch_size,
        micro_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    loader = DataLoader(
        samples,
        batch_sampler=keys,
        num_workers=config.data.num_workers,
        pin_memory=accelerator.device.type == "cuda",
        # A forked worker would share the lock of the run and hold it after the trainer's death.
        multiprocessing_context="spawn" if config.data.num_workers else None,
    )
    return iter(loader)


def batch_losses(
    config: Config, flow: Flow, network: Callable[..., Tensor], vae: AutoencoderKL, batch: Batch, device: torch.device
) -> Tensor:
    """Return the loss (B,) of every sample of a batch."""
    batch = {name: value.to(device, non_blocking=True) for name, value in batch.items()}
    x1 = batch["x1"] if "x1" in batch else encode_batch(vae, batch["image"], batch["posterior"])
    t = draw_timesteps(
        flow,
        batch["uniform"],
        config.flow.time_distribution,
        config.flow.logit_mean,
        config.flow.logit_std,
        config.flow.time_shift,
        (batch["position"], config.training.global_batch_size) if config.flow.stratified else None,
    )
    dtype = torch.float64 if config.training.precision == "fp64" else torch.float32
    return flow.loss(lambda x, t: network(x, t, batch["label"]), x1.to(dtype), batch["x0"].to(dtype), t)
