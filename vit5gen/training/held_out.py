"""The loss on held-out images: the same images, noise and times at every step and in every run."""

import math
import zlib
from dataclasses import dataclass
from functools import partial

import torch
from diffusers import ModelMixin
from torch import Tensor

from vit5gen.config import Config, TrainingConfig
from vit5gen.data.autoencoders.codec import POOR_PSNR, encode, round_trip_psnr
from vit5gen.data.images import ImageSet, open_held_out, readable
from vit5gen.flow import Flow, draw_timesteps
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.system.distributed import gather_objects, processes, rank_and_world, sum_over_processes
from vit5gen.system.errors import UserError
from vit5gen.training.build import build_scheduler

NUM_HELD_OUT = 2048  # images of the held-out loss, where there are as many
_NUM_DECODED = 64  # images that tell what the autoencoder keeps
_SHARE = 0.02  # of the training so far that held-out losses may take


@dataclass(frozen=True)
class HeldOut:
    """``images`` with noise and times, and the latents of this process's share.

    parts: of consecutive images x1 and x0 (B, C, h, w), t (B,) and labels (B,), on the CPU.
    checksum: of seed, pixels and labels; losses of sets with another one are not comparable.
    """

    images: ImageSet
    parts: list[tuple[Tensor, ...]]
    checksum: int

    @classmethod
    @torch.inference_mode()
    def of(cls, images: ImageSet, config: Config, flow: Flow, vae: ModelMixin, count: int = NUM_HELD_OUT) -> "HeldOut":
        """Choose ``count`` of the images and encode them, shared over the processes.

        Noise and order come from ``evaluation.seed``; one t lies in each of ``count`` equal parts of the time interval.
        Raises `UserError` for fewer than 2 images, or a broken one.
        """
        generator = torch.Generator().manual_seed(config.evaluation.seed)
        chosen = readable(images.select(torch.randperm(len(images), generator=generator)[:count]), config.data)
        check_count(chosen, config)
        order = torch.randperm(len(chosen), generator=generator)
        t = draw_timesteps(flow, torch.full((len(chosen),), 0.5), stratum=(order, len(chosen)))
        rank, world = rank_and_world()
        parts: list[tuple[Tensor, ...]] = []
        checksum = torch.zeros((), dtype=torch.float64)  # whole numbers, whose sum is exact
        for number, part in enumerate(torch.arange(len(chosen)).split(config.evaluation.batch_size)):
            x0 = torch.randn(len(part), *config.latent_shape, generator=generator)
            if number % world == rank:
                pixels, labels = chosen.stack(part), chosen.labels[part]
                content = pixels.numpy().tobytes() + labels.numpy().tobytes()
                checksum += zlib.crc32(content, number + config.evaluation.seed % 2**31)
                parts.append((encode(vae, pixels.to(vae.device))[0].cpu(), x0, t[part], labels))
        return cls(chosen, parts, int(sum_over_processes(checksum)))

    @torch.inference_mode()
    def loss(self, pipe: SiTPipeline) -> float:
        """Return the mean loss of a pipeline's network; all processes take part."""
        total, network = torch.zeros((), dtype=torch.float64), pipe.transformer
        with torch.compiler.set_stance("force_eager"):  # to compile for these shapes takes longer than the passes
            for part in self.parts:
                x1, x0, t, labels = (value.to(pipe.device) for value in part)
                x1, x0 = x1.to(network.dtype), x0.to(network.dtype)
                total += pipe.flow.loss(partial(network, class_labels=labels), x1, x0, t).sum().item()
        return sum_over_processes(total).item() / len(self.images)


def mean_psnr(vae: ModelMixin, images: ImageSet) -> float:
    """Return the mean PSNR in dB of some of the images against what the autoencoder makes of them."""
    chosen = torch.linspace(0, len(images) - 1, min(len(images), _NUM_DECODED)).long().split(8)
    return torch.cat([round_trip_psnr(vae, images.stack(part)) for part in chosen]).mean().item()


def check_count(images: ImageSet, config: Config) -> None:
    """Raise `UserError` unless there are two held-out images or more: one has no spread."""
    if len(images) < 2:
        found = f"split {config.evaluation.held_out_split!r} has {len(images)} images"
        raise UserError(f"data: {found}; expected at least 2: add some, or set evaluation.held_out_split")


def affordable_count(settings: TrainingConfig) -> int:
    """Return of how many images the first and the last held-out loss, and their encoding, keep within their share.

    An image costs about half as much as one of a compiled step, which goes back, too. At least 64: fewer tell nothing.
    """
    images = _SHARE * settings.num_steps * settings.global_batch_size
    return min(NUM_HELD_OUT, max(_NUM_DECODED, int(2 * images / 3)))


def find_held_out(config: Config, vae: ModelMixin, class_names: list[str], count: int) -> HeldOut | None:
    """Encode ``count`` of a run's held-out images, and say what the autoencoder keeps of them.

    Returns None, having said why, where a process has none or one is broken. All processes take part.
    """
    found, fault = None, ""
    flow = build_scheduler(config).flow
    try:
        images = open_held_out(config.data, config.evaluation.held_out_split, class_names)
        found = HeldOut.of(images, config, flow, vae, count)
    except UserError as error:
        fault = str(error)
    faults = [fault for fault in gather_objects(fault) if fault]
    if found is None or faults:
        processes().print(f"\nnote: no held-out loss and no floor beside the distance: {faults[0]}")
        return None
    if math.isinf(quality := mean_psnr(vae, found.images)):  # pixels, which bound nothing
        return found
    poor = f"; warning: below {POOR_PSNR:g} dB every picture is blurred: train one on yours (vit5gen autoencoder)"
    told = f"the autoencoder gives {quality:.1f} dB on held-out pictures, which bounds the model"
    processes().print(f"\nnote: {told}{poor if quality < POOR_PSNR else ''}")
    return found


def held_out_loss(pipe: SiTPipeline, config: Config, count: int = NUM_HELD_OUT) -> float:
    """Return the mean loss of a pipeline's network, in fp32, on the same ``count`` held-out images for every run."""
    names = [pipe.class_name(i) for i in range(pipe.transformer.config.num_classes)]
    images = open_held_out(config.data, config.evaluation.held_out_split, names)
    return HeldOut.of(images, config, pipe.flow, pipe.vae, count).loss(pipe)


def affordable(previews: set[int], cost: float) -> set[int]:
    """Return the previews at which a held-out loss, as dear as ``cost`` steps, keeps within its share of those so far.

    Beside it count the earlier ones, those of the first and the last step, and as much for encoding the images.
    """
    chosen: list[int] = []
    for step in sorted(previews):
        if (len(chosen) + 4) * cost <= _SHARE * step:
            chosen.append(step)
    return set(chosen)
