"""Images to latents and back, through an autoencoder of any class; each class has a file that says how it is called."""

import math
from collections.abc import Mapping
from contextlib import nullcontext
from numbers import Real
from typing import Any, NamedTuple

import diffusers
import torch
from diffusers import ModelMixin
from torch.overrides import TorchFunctionMode

from vit5gen.registry import Registry, missing_packages
from vit5gen.system.errors import UserError
from vit5gen.system.precision import exact_float32

POOR_PSNR = 20.0  # dB on held-out pictures below which an autoencoder does not know them: all are blurred
_ROUNDING = 1e-3  # of a standard deviation
_HALF = (torch.bfloat16, torch.float16)

Values = float | list[float]  # of all channels, or of each


class Normalization(NamedTuple):
    """How the latents z of an autoencoder become those that a transformer sees: ``(z - shift) * scale``."""

    scale: Values = 1.0
    shift: Values = 0.0

    def agrees(self, other: "Normalization") -> bool:
        """Whether both give the same latents, but for the rounding of numbers in files."""
        scale, shift, scale2, shift2 = (torch.tensor(values, dtype=torch.float64) for values in (*self, *other))
        if len({value.numel() for value in (scale, shift, scale2, shift2)} - {1}) > 1:
            return False
        return max(float((scale / scale2 - 1).abs().max()), float(((shift - shift2) * scale2).abs().max())) < _ROUNDING


class Sizes(NamedTuple):
    """Channels of a latent, image pixels along a side of one latent pixel, and the only image side, if there is one."""

    channels: int
    downsample: int
    side: int | None = None


class Codec:
    """How the autoencoders of one class are called, and where they keep the normalisation of their latents.

    packages: what this class needs beside diffusers.  extra: the extra of this package that installs it.
    """

    packages: tuple[str, ...] = ()
    extra = ""

    def network(self, name: str) -> Any:
        """Return the class of that name."""
        return getattr(diffusers, name)

    def sizes(self, config: Mapping[str, Any]) -> Sizes:
        """Return the sizes of an autoencoder of that complete configuration."""
        raise NotImplementedError

    def encode(self, vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return mean and standard deviation (B, C, h, w) of the latents of images (B, 3, H, W) in [-1, 1].

        They are not normalised. The deviation is None where there is one latent of an image.
        """
        return vae.encode(images).latent, None

    def decode(self, vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
        """Return the images (B, 3, H, W) of latents (B, C, h, w) that are not normalised, about in [-1, 1]."""
        return vae.decode(latents).sample

    def normalization(self, vae: ModelMixin) -> Normalization:
        """Return what was recorded with `record`, else what the files of the autoencoder say."""
        recorded = vae.config.get("_normalization")
        return self.published(vae) if recorded is None else Normalization(**recorded)

    def published(self, vae: ModelMixin) -> Normalization:
        """Return the normalisation that users of this class apply."""
        return Normalization(vae.config.get("scaling_factor", 1.0))

    def record(self, vae: ModelMixin, normalization: Normalization) -> None:
        """Write another normalisation into the configuration of the autoencoder, with which it is saved."""
        vae.register_to_config(_normalization=normalization._asdict())


AUTOENCODERS: Registry[type[Codec]] = Registry("class of autoencoders")  # by the name of the class


def codec_of(vae: ModelMixin) -> Codec:
    """Return how an autoencoder is called; raise `UserError` for one of an unknown class."""
    names = [base.__name__ for base in type(getattr(vae, "_orig_mod", vae)).__mro__]
    known = AUTOENCODERS.registered()
    return AUTOENCODERS.get(next((name for name in names if name in known), names[0]))()


def find_codec(name: str) -> Codec:
    """Return how autoencoders of that class are called; raise `UserError` where none is, or a package is not here."""
    codec = AUTOENCODERS.get(name)()
    if absent := missing_packages(codec.packages):
        raise UserError(f"{name} needs {' and '.join(absent)}: pip install 'vit5gen[{codec.extra}]'")
    return codec


def sizes_of(vae: ModelMixin) -> Sizes:
    """Return the sizes of an autoencoder."""
    return codec_of(vae).sizes(vae.config)


def encode(vae: ModelMixin, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (B, C, h, w) of the normalised latents of uint8 images (B, 3, H, W)."""
    with torch.autocast(images.device.type, enabled=False), torch.no_grad():
        mean, std = codec_of(vae).encode(vae, images.to(vae.dtype) / 127.5 - 1)
    return normalise(vae, mean, torch.zeros_like(mean) if std is None else std)


def normalise(vae: ModelMixin, mean: torch.Tensor, std: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return mean and standard deviation (..., C, h, w) of latents as the transformer sees them."""
    scale, shift = _columns(vae, mean.device)
    return (mean - shift) * scale, std * scale


def decode(vae: ModelMixin, latents: torch.Tensor) -> torch.Tensor:
    """Return images (B, 3, H, W) in [-1, 1] of normalised latents (B, C, h, w)."""
    scale, shift = _columns(vae, latents.device)
    wide = torch.promote_types(vae.dtype, torch.float32)  # in bf16 two values in five would move by a grey level
    with exact_float32(latents.device), torch.no_grad(), nullcontext() if vae.dtype == wide else _Widening():
        return codec_of(vae).decode(vae, latents.to(wide) / scale + shift).clamp(-1, 1)


def normalization_of(vae: ModelMixin) -> Normalization:
    """Return the normalisation of the latents; raise `UserError` where it is none of finite numbers."""
    codec, what = codec_of(vae), f"autoencoder {vae.config.get('_name_or_path') or type(vae).__name__!r}"
    try:
        found = codec.normalization(vae)
    except (TypeError, ValueError) as error:  # of a file that anyone may have changed
        raise UserError(f"{what}: no statistics of latents ({error}); choose another one") from error
    return check_normalization(found, what, vae)


def check_normalization(found: Normalization, what: str, vae: ModelMixin) -> Normalization:
    """Return a normalisation that fits the autoencoder; else raise a `UserError` that begins with ``what``."""
    channels = sizes_of(vae).channels
    for name, values in found._asdict().items():
        each = values if isinstance(values, list) else [values]
        fault = "" if not isinstance(values, list) or len(each) == channels else f"{len(each)} values"
        for value in each:
            if not isinstance(value, Real) or not math.isfinite(value) or (name == "scale" and not value):
                fault = fault or repr(value)
        if fault:
            wanted = f"finite numbers, one for all or each of {channels} channels, the scale not 0"
            raise UserError(f"{what}: {name} of the latents has {fault}; expected {wanted}; choose another one")
    return Normalization(*(list(map(float, v)) if isinstance(v, list) else float(v) for v in found))


def _columns(vae: ModelMixin, device: torch.device) -> Any:
    """Return scale and shift: numbers, or tensors (C, 1, 1)."""
    values = normalization_of(vae)
    return [v if isinstance(v, Real) else torch.tensor(v, device=device).view(-1, 1, 1) for v in values]


def to_uint8(images: torch.Tensor) -> torch.Tensor:
    """Quantise images in [-1, 1] to uint8, each level with an equal share of the range, as SiT and ADM do."""
    return (127.5 * images + 128).clamp(0, 255).to(torch.uint8)


def psnr(images: torch.Tensor, others: torch.Tensor) -> torch.Tensor:
    """Return the peak signal-to-noise ratio (B,) in dB between uint8 images (B, 3, H, W)."""
    error = (images.double() - others.double()).square().flatten(1).mean(1)
    return 10 * torch.log10(255**2 / error)


def round_trip_psnr(vae: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """Return the PSNR in dB, (B,), of images (B, 3, H, W) uint8 against what the autoencoder makes of them."""
    return psnr(images, to_uint8(decode(vae, encode(vae, images.to(vae.device))[0])).cpu())


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
