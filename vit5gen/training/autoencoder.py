"""Train a small autoencoder."""

import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from diffusers import AutoencoderKL
from PIL import Image
from torch.nn import functional
from torchvision.utils import make_grid
from tqdm import tqdm

from vit5gen.config import AutoencoderTraining, read_yaml, validate
from vit5gen.data.autoencoders.kl import decode, encode, load_autoencoder, psnr, to_uint8
from vit5gen.data.images import ImageSet, open_images
from vit5gen.parser import Parser, exit_on_bad_input
from vit5gen.system.cpu import warn_of_slow_bf16
from vit5gen.system.errors import UserError
from vit5gen.system.files import check_writable, clear_weights


def train_autoencoder(config: AutoencoderTraining, output: Path) -> float:
    """Train an `AutoencoderKL`, save it with fp16 weights and a picture of round trips; return the held-out PSNR in dB.

    The loss is squared error + absolute error + Kullback-Leibler divergence to the unit normal (arXiv 1312.6114), each
    a mean over elements. Scale and shift then give latents of the training images mean 0 and standard deviation 1.
    """
    images, held_out = open_images(config.data), open_images(config.data, config.held_out_split)
    with torch.random.fork_rng(devices=[]):  # diffusers initialises from the global generator
        torch.manual_seed(config.seed)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * len(config.block_out_channels),
            up_block_types=["UpDecoderBlock2D"] * len(config.block_out_channels),
            block_out_channels=config.block_out_channels,
            layers_per_block=config.layers_per_block,
            latent_channels=config.latent_channels,
            norm_num_groups=config.norm_num_groups,
            mid_block_add_attention=False,
            sample_size=config.data.resolution,
            scaling_factor=1.0,
            shift_factor=0.0,
            force_upcast=False,
        )
    optimizer = torch.optim.AdamW(vae.parameters(), lr=config.learning_rate, weight_decay=0.0, fused=True)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: _warmup_cosine(step, config.num_steps))
    generator = torch.Generator().manual_seed(config.seed)
    batches = _augmented_batches(images, config, generator)
    progress = tqdm(range(config.num_steps), desc="autoencoder", unit="step")
    for step in progress:
        target = next(batches) / 127.5 - 1
        with torch.autocast("cpu", torch.bfloat16, enabled=config.precision == "bf16"):
            posterior = vae.encode(target).latent_dist
            noise = torch.randn(posterior.mean.shape, generator=generator)
            reconstruction = vae.decode(posterior.mean + posterior.std * noise).sample.float()
        error = reconstruction - target
        divergence = (posterior.mean.float().square() + posterior.var.float() - 1 - posterior.logvar.float()).mean() / 2
        loss = error.square().mean() + config.l1_weight * error.abs().mean() + config.kl_weight * divergence
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        schedule.step()
        if step % 100 == 0:
            progress.set_postfix(loss=f"{loss.item():.4f}", kl=f"{divergence.item():.2f}")
    vae.eval().requires_grad_(False)
    mean, std = _encode_all(vae, images)
    shift = mean.mean().item()
    # The mean square of a draw is (mean - shift)^2 + std^2.
    vae.register_to_config(
        shift_factor=shift, scaling_factor=((mean - shift).square() + std.square()).mean().item() ** -0.5
    )
    clear_weights(output)
    vae.half().save_pretrained(output)
    return _evaluate(load_autoencoder(str(output)), held_out, output)


def _check_sizes(config: AutoencoderTraining) -> None:
    """Raise `UserError` for sizes that do not divide."""
    groups, factor = config.norm_num_groups, 2 ** (len(config.block_out_channels) - 1)
    if any(width % groups for width in config.block_out_channels):
        raise UserError(
            f"block_out_channels = {config.block_out_channels}: expected multiples of norm_num_groups {groups}"
        )
    if config.data.resolution % factor:
        raise UserError(
            f"data.resolution = {config.data.resolution}: expected a multiple of {factor}, for the "
            f"{len(config.block_out_channels)} entries of block_out_channels"
        )


def _augmented_batches(
    images: ImageSet, config: AutoencoderTraining, generator: torch.Generator
) -> Iterator[torch.Tensor]:
    """Yield uint8 (B, 3, H, W) for ever: every epoch anew shuffled, images mirrored and shifted at random."""
    while True:
        for indices in torch.randperm(len(images), generator=generator).split(config.batch_size):
            batch = torch.stack([images.read(int(i)) for i in indices])
            mirrored = torch.rand(len(batch), generator=generator) < 0.5
            batch[mirrored] = batch[mirrored].flip(-1)
            rows, columns = torch.randint(2 * config.max_shift + 1, (2,), generator=generator).tolist()
            padded = functional.pad(batch.float(), [config.max_shift] * 4, mode="replicate")
            side = config.data.resolution
            yield padded[:, :, rows : rows + side, columns : columns + side]


def _warmup_cosine(step: int, num_steps: int) -> float:
    return min(1.0, (step + 1) / 100) * (1 + math.cos(math.pi * step / num_steps)) / 2


def _encode_all(vae: AutoencoderKL, images: ImageSet) -> tuple[torch.Tensor, torch.Tensor]:
    chunks = torch.arange(len(images)).split(64)
    encoded = [encode(vae, torch.stack([images.read(int(i)) for i in chunk])) for chunk in chunks]
    mean, std = zip(*encoded, strict=True)
    return torch.cat(mean), torch.cat(std)


def _evaluate(vae: AutoencoderKL, images: ImageSet, output: Path) -> float:
    originals = torch.stack([images.read(i) for i in range(len(images))])
    mean, _ = _encode_all(vae, images)
    decoded = torch.cat([to_uint8(decode(vae, latents)) for latents in mean.split(64)])
    scores = psnr(originals, decoded)
    for label, name in enumerate(images.class_names):
        print(f"{name:>12}: {scores[images.labels == label].mean():.2f} dB")
    shown = torch.linspace(0, len(images) - 1, 64).long()  # odd rows of the picture: what the rows above come back as
    pairs = [tile for row in shown.split(16) for tile in (originals[row], decoded[row])]
    picture = make_grid(torch.cat(pairs), nrow=16)
    Image.fromarray(picture.permute(1, 2, 0).numpy()).save(output / "round_trips.png")
    return scores.mean().item()


def main(arguments: list[str] | None = None) -> None:
    """Train an autoencoder from the command line: ``python -m vit5gen.data.autoencoder CONFIG --output FOLDER``."""
    parser = Parser(prog="python -m vit5gen.data.autoencoder", description=main.__doc__)
    parser.add_argument("config", help="YAML of AutoencoderTraining, e.g. configs/vae/emoji.yaml")
    parser.add_argument("--output", type=Path, required=True, help="folder of the trained AutoencoderKL")
    start = time.perf_counter()
    with exit_on_bad_input():
        options = parser.parse_args(arguments)
        config = validate(AutoencoderTraining, read_yaml(options.config), f"configuration {options.config}")
        _check_sizes(config)
        check_writable(options.output / "config.json")
        warn_of_slow_bf16(config.precision, torch.device("cpu"))
        score = train_autoencoder(config, options.output)
    print(f"{options.output}: held-out PSNR {score:.2f} dB after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
