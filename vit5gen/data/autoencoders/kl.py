"""The autoencoder between images and latents: load any AutoencoderKL, encode, decode."""

import math
from collections.abc import Callable
from contextlib import nullcontext, suppress
from numbers import Real
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from huggingface_hub import model_info, try_to_load_from_cache
from huggingface_hub.errors import HFValidationError
from torch.overrides import TorchFunctionMode

from vit5gen.registry import Registry
from vit5gen.system.errors import UserError
from vit5gen.system.precision import exact_float32
from vit5gen.system.shipped import shipped, shipped_names

POOR_PSNR = 20.0  # dB on held-out pictures below which an autoencoder does not know them: all are blurred
_HALF = (torch.bfloat16, torch.float16)
EMOJI = Path(__file__).parents[1] / "emoji_vae"

# Autoencoders that have a name, each a function that returns its folder; beside them, those of generators that ship.
AUTOENCODERS: Registry[Callable[[], Path]] = Registry("autoencoder")
AUTOENCODERS.register("emoji")(lambda: EMOJI)


def load_autoencoder(name: str) -> AutoencoderKL:
    """Load a frozen fp32 autoencoder: a folder, one that ships, or a name on the Hugging Face hub.

    ``"emoji"`` (32 px) ships, and under the name of each `vit5gen.shipped` generator its autoencoder.

    Raises `UserError` when there is no such autoencoder or it cannot be fetched.
    """
    source = _folder(name)
    try:
        here, weights = not missing(name), source if source.is_dir() else name
        if not here:
            model_info(name, timeout=10)  # without a network this says so; the download would retry for long
        vae, found = AutoencoderKL.from_pretrained(weights, output_loading_info=True, local_files_only=here)
        if lacking := found["missing_keys"]:  # diffusers would draw them at random
            raise ValueError(f"it lacks {len(lacking)} weights of an AutoencoderKL")
    except Exception as error:  # file, hub and http errors are those of many libraries
        detail = " ".join(str(error).split())[:120]
        ships = ", ".join(shipped_autoencoders())
        wanted = f"the folder of one (config.json, safetensors), one that ships ({ships}), or a hub name and a network"
        raise UserError(f"vae.name {name!r}: no autoencoder can be loaded ({detail}); expected {wanted}") from error
    vae.register_to_config(_name_or_path=name)  # as it was asked for: pipelines tell it, not this machine's folder
    latent_scaling(vae)  # raises where it is none that `encode` and `decode` know
    return vae.float().eval().requires_grad_(False)


def shipped_autoencoders() -> list[str]:
    """Return the names of the autoencoders that ship, those of generators among them."""
    return [*AUTOENCODERS.names(), *shipped_names()]


def _folder(name: str) -> Path:
    """Return the folder of an autoencoder that ships, else the path of that name."""
    if name in AUTOENCODERS.names():
        return AUTOENCODERS.get(name)()
    folder = Path(name).expanduser()
    return Path(shipped(name)) / "vae" if name in shipped_names() and not folder.exists() else folder


def missing(name: str) -> dict[str, str]:
    """Return an autoencoder that is neither a folder here nor fetched yet, with how to get it."""
    if _folder(name).is_dir():
        return {}
    with suppress(HFValidationError):  # of what is no name on the hub either
        if isinstance(try_to_load_from_cache(name, "config.json"), str):
            return {}
    fetched = "autoencoder on the Hugging Face hub: will be downloaded on first use"
    return {name: f"{fetched}; or set a folder, e.g. one made by `vit5gen autoencoder`"}


def downsample(vae: AutoencoderKL) -> int:
    """Return how many image pixels lie along a side of one latent pixel."""
    return 2 ** (len(vae.config.block_out_channels) - 1)


def encode(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (B, C, h, w) of the scaled latents of uint8 images (B, 3, H, W)."""
    with torch.autocast(images.device.type, enabled=False), torch.no_grad():
        posterior = vae.encode(images.to(vae.dtype) / 127.5 - 1).latent_dist
    return normalise(vae, posterior.mean, posterior.std)


def normalise(vae: AutoencoderKL, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (..., C, h, w) of latents as the transformer sees them."""
    scale, shift = latent_scaling(vae)
    return (mean - shift) * scale, std * scale


def decode(vae: AutoencoderKL, latents: torch.Tensor) -> torch.Tensor:
    """Return images (B, 3, H, W) in [-1, 1] of scaled latents (B, C, h, w)."""
    scale, shift = latent_scaling(vae)
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


def round_trip_psnr(vae: AutoencoderKL, images: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB, (B,), of images (B, 3, H, W) uint8 against what the autoencoder makes of them."""
    return psnr(images, to_uint8(decode(vae, encode(vae, images.to(vae.device))[0])).cpu())


def latent_scaling(vae: AutoencoderKL) -> tuple[float, float]:
    """Return scale and shift of the latents, ``(z - shift) * scale``; refuse an autoencoder that scales otherwise."""
    config, name = vae.config, vae.config.get("_name_or_path") or type(vae).__name__
    scale, shift = config.get("scaling_factor"), config.get("shift_factor") or 0.0
    others = [key for key in ("latents_mean", "latents_std") if config.get(key) is not None]
    if "shift_factor" not in config or others:
        fault = f"its configuration has {' and '.join(others) or 'no shift_factor'}"
    elif not isinstance(scale, Real) or not (scale and math.isfinite(scale) and math.isfinite(shift)):
        fault = f"scaling_factor = {scale!r}, shift_factor = {shift!r}"
    else:
        return float(scale), float(shift)
    wanted = "latents are scaled only by finite numbers, scaling_factor (not 0) and shift_factor"
    raise UserError(f"autoencoder {name!r}: {fault}; expected an AutoencoderKL whose {wanted}; choose another one")


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
