"""The autoencoder between images and latents: load any AutoencoderKL, encode, decode; and train a small one."""

import math
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from PIL import Image
from torch.nn import functional
from torch.overrides import TorchFunctionMode
from torchvision.utils import make_grid
from tqdm import tqdm

from vit5gen.config import AutoencoderTraining
from vit5gen.data.images import ImageSet, open_images
from vit5gen.system.errors import UserError
from vit5gen.system.files import clear_weights
from vit5gen.system.precision import exact_float32

_HALF = (torch.bfloat16, torch.float16)
EMOJI = Path(__file__).with_name("emoji_vae")


def load_autoencoder(name: str) -> AutoencoderKL:
    """Load a frozen fp32 autoencoder: ``"emoji"`` (shipped, 32 px), a folder, or a name on the Hugging Face hub.

    Raises `UserError` when there is no such autoencoder or it cannot be fetched.
    """
    source = EMOJI if name == "emoji" else Path(name).expanduser()
    try:
        options: dict[str, Any] = {"output_loading_info": True}
        if not source.is_dir():
            options["local_files_only"] = is_cached(name)
            if not options["local_files_only"]:
                model_info(name, timeout=10)  # without a network this says so; the download would retry for long
        vae, found = AutoencoderKL.from_pretrained(source if source.is_dir() else name, **options)
        if missing := found["missing_keys"]:  # diffusers would draw them at random
            raise ValueError(f"it lacks {len(missing)} weights of an AutoencoderKL")
    except Exception as error:  # file, hub and http errors are those of many libraries
        detail = " ".join(str(error).split())[:120]
        raise UserError(
            f"vae.name {name!r}: no autoencoder can be loaded ({detail}); expected 'emoji', the folder of one"
            f" (config.json, safetensors), or a hub name and a network"
        ) from error
    vae.register_to_config(_name_or_path=name)  # as it was asked for: pipelines tell it, not this machine's folder
    scaling(vae)  # raises where it is none that `encode` and `decode` know
    return vae.float().eval().requires_grad_(False)


def is_cached(name: str) -> bool:
    """Whether the hub's autoencoder of that name has been fetched."""
    try:
        return isinstance(try_to_load_from_cache(name, "config.json"), str)
    except HFValidationError:
        return False


def downsample(vae: AutoencoderKL) -> int:
    """Return how many image pixels lie along a side of one latent pixel."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (B, C, h, w) of the scaled latents of uint8 images (B, 3, H, W)."""
    with torch.autocast(images.device.type, enabled=False), torch.no_grad():
        posterior = vae.encode(images.to(vae.dtype) / 127.5 - 1).latent_dist
    scale, shift = scaling(vae)
    return (posterior.mean - shift) * scale, posterior.std * scale


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return images (B, 3, H, W) in [-1, 1] of scaled latents (B, C, h, w)."""
    scale, shift = scaling(vae)
    wide = torch.promote_types(vae.dtype, torch.float32)  # in bf16 two values in five would move by a grey level
    with exact_float32(latents.device), torch.no_grad(), nullcontext() if vae.dtype == wide else _Widening():
        return vae.decode(latents.to(wide) / scale + shift).sample.clamp(-1, 1)


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Quantise images in [-1, 1] to uint8, each level with an equal share of the range, as SiT and ADM do."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB between uint8 images (B, 3, H, W)."""
    error = (images.double() - others.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


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


def check_sizes(config: AutoencoderTraining) -> None:
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


def scaling(vae: AutoencoderKL) -> tuple[float, float]:
    """Return scale and shift of the latents, ``(z - shift) * scale``; refuse an autoencoder that tells others."""
    config, name = vae.config, vae.config.get("_name_or_path") or type(vae).__name__
    scale, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    others = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    if "shift_factor" not in config or others:
        found = " and ".join(others) or "no shift_factor"
        fault = f"its configuration has {found}"
    elif not isinstance(scale, Real) or not (scale and math.isfinite(scale) and math.isfinite(shift)):
        fault = f"scaling_factor = {scale!r}, shift_factor = {shift!r}"
    else:
        return float(scale), float(shift)
    raise UserError(
        f"autoencoder {name!r}: {fault}; expected an AutoencoderKL whose latents are scaled by finite numbers,"
        " scaling_factor (not 0) and shift_factor, alone: choose another one"
    )


class _Widening(TorchFunctionMode):
    """In this thread, whatever meets fp32 is cast to it where it is used, and nothing is cast from it.

    So an autoencoder of bf16 or fp16 decodes exactly, while it stays as it is for other threads, and for offloading.
    """

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        values = [*args, *(kwargs or {}).values()]
        if any(isinstance(value, torch.Tensor) and value.dtype == torch.float32 for value in values):
            args = tuple(map(_widen, args))
            kwargs = {name: _widen(value) for name, value in (kwargs or {}).items()}
        return func(*args, **(kwargs or {}))


def _widen(value: Any) -> Any:
    """Return a tensor of half precision, or the name of such a type, as fp32."""
    if isinstance(value, torch.Tensor) and value.dtype in _HALF:
        return value.float()
    return torch.float32 if isinstance(value, torch.dtype) and value in _HALF else value


if __name__ == "__main__":
    print("error: the command is now `vit5gen autoencoder CONFIG --output FOLDER`", file=sys.stderr)
    sys.exit(2)
