"""Training of a small autoencoder: ``vit5gen autoencoder``, with the checkpoints and signals of the training loop."""

import math
import shutil
import time
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from torch import Tensor, nn
from torch.nn import functional

from vit5gen.config import AutoencoderTraining, TrainingConfig, recorded_values
from vit5gen.data.autoencoders.codec import decode, encode, psnr, to_uint8
from vit5gen.data.autoencoders.find_autoencoder import load_autoencoder
from vit5gen.data.images import ImageSet, make_source, open_images, readable
from vit5gen.generation.grid import save_pairs, with_attribution
from vit5gen.system.errors import UserError
from vit5gen.system.files import check_writable, clear_weights
from vit5gen.system.precision import PRECISIONS
from vit5gen.system.progress import Progress
from vit5gen.training import checkpoint, process
from vit5gen.training.run_folder import RunFolder, to_yaml
from vit5gen.training.trainer import Outcome, Trainer

_WARMUP, _LOG_EVERY = 100, 100  # steps
_SHOWN = 48  # held-out pictures at most in round_trips.png
_SIZES = ("block_out_channels", "layers_per_block", "latent_channels", "norm_num_groups")  # of diffusers' network


class RoundTrip(nn.Module):
    """An autoencoder with the loss of what comes back from it."""

    def __init__(self, config: AutoencoderTraining) -> None:
        super().__init__()
        self.config, levels = config, len(config.block_out_channels)
        sizes = config.model_dump(include=set(_SIZES)) | {"sample_size": config.data.resolution}
        blocks = {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
        fixed = {"mid_block_add_attention": False, "scaling_factor": 1.0, "shift_factor": 0.0, "force_upcast": False}
        with torch.random.fork_rng(devices=[]):  # diffusers initialises from the global generator
            torch.manual_seed(config.seed)
            self.vae = AutoencoderKL(**sizes, **blocks, **fixed)

    def forward(self, target: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Return the loss of images (B, 3, H, W) in [-1, 1], and the divergence in it.

        It is squared error + absolute error + Kullback-Leibler divergence to the unit normal (arXiv 1312.6114), each a
        mean over elements.
        """
        with PRECISIONS[self.config.precision].autocast(target.device):
            posterior = self.vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator).to(target.device)
            reconstruction = self.vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error, mean, variance = reconstruction - target, posterior.mean.float(), posterior.var.float()
        divergence = (mean.square() + variance - 1 - posterior.logvar.float()).mean() / 2
        l1_weight, kl_weight = self.config.l1_weight, self.config.kl_weight
        return error.square().mean() + l1_weight * error.abs().mean() + kl_weight * divergence, divergence


class Shuffle(nn.Module):
    """Batches of uint8 images (B, 3, H, W): every epoch in a new order, mirrored and shifted at random.

    What is random comes from one generator; its state and the present order are buffers, so that a checkpoint resumes
    in the middle of an epoch.
    """

    order: Tensor
    state: Tensor

    def __init__(self, images: ImageSet, config: AutoencoderTraining) -> None:
        super().__init__()
        self.images, self.config = images, config
        self.generator = torch.Generator().manual_seed(config.seed)
        self.register_buffer("order", torch.arange(len(images)))
        self.register_buffer("state", self.generator.get_state())

    def batch(self, step: int) -> Tensor:
        """Draw the batch of ``step`` (0-based), for whose noise the generator is next."""
        size, shift, side = self.config.batch_size, self.config.max_shift, self.config.data.resolution
        position = step % math.ceil(len(self.order) / size)  # in the epoch
        if position == 0:
            self.order = torch.randperm(len(self.order), generator=self.generator)
        indices = self.order[position * size : (position + 1) * size]
        batch = self.images.stack(indices)
        mirrored = torch.rand(len(batch), generator=self.generator) < 0.5
        batch[mirrored] = batch[mirrored].flip(-1)
        rows, columns = torch.randint(2 * shift + 1, (2,), generator=self.generator).tolist()
        padded = functional.pad(batch.float(), [shift] * 4, mode="replicate")
        return padded[:, :, rows : rows + side, columns : columns + side]


def train_autoencoder(config: AutoencoderTraining, output: str | Path) -> int:
    """Train an `AutoencoderKL`, save it with fp16 weights and a picture of round trips; return the exit code.

    A signal saves a checkpoint, from which the same command resumes, bit for bit; a folder that holds a trained one is
    left alone. In the end scale and shift give latents of the training images mean 0 and standard deviation 1. Raises
    `UserError` for input that does not fit.
    """
    # The machine, and the images that are learnt and held out.
    folder, begun = RunFolder(output), time.perf_counter()
    _check_sizes(config)
    settings = TrainingConfig(precision=config.precision, trackers=[])
    accelerator = process.make_accelerator(settings, folder.path)
    PRECISIONS[config.precision].set_products()
    PRECISIONS[config.precision].warn_if_slow(accelerator.device, accelerator.print)
    images = readable(open_images(config.data), config.data)
    held_out = readable(open_images(config.data, config.held_out_split), config.data)
    with folder.locked(("checkpoints", "config.json")):
        check_writable(folder.path / "config.json")
        if (folder.path / "config.json").exists() and not checkpoint.steps(folder.checkpoints):
            accelerator.print(f"{folder} holds a trained autoencoder; nothing to do (--output names another folder)")
            return 0
        with process.disk_hint():
            # The network, its optimizer and its batches, resumed where there is a checkpoint.
            network, shuffle = RoundTrip(config), Shuffle(images, config)
            optimizer = torch.optim.AdamW(network.parameters(), config.learning_rate, weight_decay=0.0, fused=True)
            trainer = Trainer(accelerator, network, optimizer, {"model": network.vae, "draws": shuffle})
            if (start := checkpoint.newest_valid(folder.checkpoints)) is not None:
                _resume(trainer, shuffle, start, config)
            trainer.data = {"images": len(images)}
            clock = process.SaveClock(settings.checkpoint_minutes)
            bar = Progress("autoencoder", config.num_steps, "step", trainer.step, every=_LOG_EVERY)
            with process.stop_signals() as stop_asked, bar as progress:
                while trainer.step < config.num_steps:
                    # One step, at a rate that warms up and decays as a cosine.
                    cosine = 1 + math.cos(math.pi * trainer.step / config.num_steps)
                    for group in trainer.optimizer.param_groups:
                        group["lr"] = config.learning_rate * (min(1.0, (trainer.step + 1) / _WARMUP) * cosine / 2)
                    target = shuffle.batch(trainer.step).to(accelerator.device) / 127.5 - 1
                    loss, divergence = trainer.network(target, shuffle.generator)
                    loss.backward()
                    norm = trainer.clip(1.0)
                    trainer.optimizer.step()
                    trainer.optimizer.zero_grad()
                    trainer.count(outcome := Outcome({"loss": loss.item()}, norm.item(), stop_asked(), clock.due()))
                    if not outcome.finite:
                        raise UserError(f"the loss of step {trainer.step} is not finite; set learning_rate lower")
                    shown = {"loss": f"{loss.item():.4f}", "kl": f"{divergence.item():.2f}"}
                    progress.set_postfix(shown, refresh=False)
                    progress.update()

                    # A checkpoint: by the clock, for a signal, and before what comes after the last step.
                    if outcome.stop or outcome.save or trainer.step == config.num_steps:
                        shuffle.state = shuffle.generator.get_state()
                        trainer.save(folder.checkpoints, to_yaml(config))
                        clock.restart()
                    if outcome.stop:
                        accelerator.print(process.stopped(trainer.step, trainer.saved_step))
                        return process.STOPPED
            score = _finish(network.vae, images, held_out, folder, make_source(config.data).attribution)
    accelerator.print(f"{folder}: held-out PSNR {score:.2f} dB after {time.perf_counter() - begun:.0f} s")
    return 0


def _check_sizes(config: AutoencoderTraining) -> None:
    """Raise `UserError` for sizes that do not divide."""
    groups, factor = config.norm_num_groups, 2 ** (len(config.block_out_channels) - 1)
    widths, side = config.block_out_channels, config.data.resolution
    if any(width % groups for width in widths):
        expected = f"expected multiples of norm_num_groups {groups}; set that to {math.gcd(*widths)}"
        raise UserError(f"block_out_channels = {widths}: {expected}")
    if side % factor:
        what = f"a multiple of {factor}, for the {len(widths)} entries of block_out_channels"
        raise UserError(f"data.resolution = {side}: expected {what}; set it to e.g. {max(side // factor, 1) * factor}")


def _resume(trainer: Trainer, shuffle: Shuffle, start: Path, config: AutoencoderTraining) -> None:
    """Restore a checkpoint of the same configuration and number of images; raise `UserError` for another one."""
    recorded, now = checkpoint.read_config(start), config.model_dump(mode="json")
    recorded["data"] = recorded_values(recorded)["data"] | {"num_classes": config.data.num_classes}  # of no consequence
    if changed := [key for key, value in now.items() if recorded.get(key) != value]:
        raise UserError(f"{start} has another {', '.join(changed)}; restore the old value or choose another --output")
    trainer.restore(start)
    shuffle.generator.set_state(shuffle.state.cpu())


def _finish(
    vae: AutoencoderKL, images: ImageSet, held_out: ImageSet, folder: RunFolder, attribution: str | None
) -> float:
    """Scale the latents, save weights and picture, delete the checkpoints; return the held-out PSNR in dB."""
    vae.eval().requires_grad_(False)
    mean, std = _encode_all(vae, images)
    shift = mean.mean().item()
    # The mean square of a draw is (mean - shift)^2 + std^2.
    scale = ((mean - shift).square() + std.square()).mean().item() ** -0.5
    vae.register_to_config(shift_factor=shift, scaling_factor=scale)
    clear_weights(folder.path)
    vae.half().save_pretrained(folder.path)
    score = _evaluate(load_autoencoder(str(folder)), held_out, folder.path, attribution)
    shutil.rmtree(folder.checkpoints, ignore_errors=True)
    return score


def _encode_all(vae: AutoencoderKL, images: ImageSet) -> tuple[Tensor, Tensor]:
    chunks = torch.arange(len(images)).split(64)
    encoded = [encode(vae, images.stack(chunk).to(vae.device)) for chunk in chunks]
    mean, std = zip(*encoded, strict=True)
    return torch.cat(mean), torch.cat(std)


def _evaluate(vae: AutoencoderKL, images: ImageSet, output: Path, attribution: str | None) -> float:
    """Print the PSNR of each class, save a picture of round trips; return the mean PSNR in dB."""
    originals = images.stack(range(len(images)))
    mean, _ = _encode_all(vae, images)
    decoded = torch.cat([to_uint8(decode(vae, latents)) for latents in mean.split(64)])
    scores = psnr(originals, decoded)
    for label, name in enumerate(images.class_names):
        print(f"{name:>12}: {scores[images.labels == label].mean():.2f} dB")
    shown = torch.linspace(0, len(images) - 1, min(len(images), _SHOWN)).long().tolist()
    classes = images.labels.tolist()
    titles = [(images.class_names[classes[i]], classes[i], f"{scores[i]:.1f} dB") for i in shown]
    fact = f"held-out pictures, each with what the autoencoder makes of it; all {len(images)}: {scores.mean():.2f} dB"
    pairs = [(originals[i], decoded[i]) for i in shown]
    settings = with_attribution({"psnr": scores.mean().item()}, attribution)
    save_pairs(output / "round_trips.png", pairs, titles, [fact], settings)
    return scores.mean().item()
