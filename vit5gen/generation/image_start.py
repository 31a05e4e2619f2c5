"""Drawing that begins with an image: what users hand in, and its state on the path from noise to data."""

from numbers import Real
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image, ImageOps
from torch import Tensor

from vit5gen.config import STRENGTH, DataConfig
from vit5gen.data.autoencoders.codec import encode, sizes_of
from vit5gen.data.images import decoding
from vit5gen.data.pictures import to_rgb
from vit5gen.flow import Flow
from vit5gen.system.errors import UserError
from vit5gen.system.precision import exact_float32

_DATA = DataConfig()


def open_picture(file: str | Path) -> Image.Image:
    """Return the picture in a file; raise `UserError` where there is none."""
    if not Path(file).is_file():
        raise UserError(f"image {file}: no such file; check the path")
    with decoding(f"image {file}", "give another picture"), Image.open(file) as picture:
        picture.load()
        return picture


def start_time(image: Any, strength: float | None, vae: ModelMixin | None) -> float:
    """Return the time at which drawing begins: 0, or as the strength of an image says; `UserError` for a bad one."""
    if image is None:
        if strength is not None:
            raise UserError(f"strength = {strength!r} has no effect without an image; give image, or omit strength")
        return 0.0
    strength = STRENGTH if strength is None else strength
    if isinstance(strength, bool) or not isinstance(strength, Real) or not 0 <= strength <= 1:
        raise UserError(f"strength = {strength!r}; expected a number from 0 (the image) to 1 (noise)")
    if vae is None:
        raise UserError("image needs an autoencoder; set pipe.vae, or omit image")
    return 1 - float(strength)


def noisy_latents(image: Any, num_labels: int, noise: Tensor, start: float, flow: Flow, vae: ModelMixin) -> Tensor:
    """Return the state (B, C, h, w) at time ``start`` on the path from ``noise`` (B, C, h, w) to the image's latents.

    Raises `UserError` for images of another size or kind (see `read_images`), and for more than one that are not one
    for each label.
    """
    height, width = (sizes_of(vae).downsample * side for side in noise.shape[2:])
    images = read_images(image, height, width)
    if len(images) not in (1, num_labels):
        raise UserError(f"image: {len(images)} images; expected one, or one for each of the {num_labels} labels")
    if start == 0:
        return noise
    with exact_float32(noise.device):
        latents = encode(vae, images.to(noise.device))[0].float()
    latents, at = latents.repeat_interleave(len(noise) // len(images), dim=0), flow.coefficients(start)
    return latents if start == 1 else at.alpha * latents + at.sigma * noise


def read_images(given: Any, height: int, width: int) -> Tensor:
    """Return images (N, 3, height, width), float32 in [0, 255].

    given: a picture of PIL, an array (H, W, 3) or (N, H, W, 3), a tensor (3, H, W) or (N, 3, H, W), or a list of them.
    Pictures may have any size: they are scaled and cut to this one around their centre. Arrays and tensors must have
    it, as uint8 or as floats in [0, 1]. Raises `UserError` for anything else.
    """
    parts = given if isinstance(given, list | tuple) else [given]
    if not parts:
        raise UserError("image: empty; expected at least one picture")
    return torch.cat([_read(part, height, width) for part in parts])


def _read(part: Any, height: int, width: int) -> Tensor:
    """Return one picture, or one array of images, as `read_images` does."""
    if isinstance(part, Image.Image):
        with decoding("image", "convert it to RGB"):
            picture = to_rgb(part, _DATA.exif, _DATA.rules)
        if picture.size != (width, height):
            picture = ImageOps.fit(picture, (width, height), Image.Resampling.LANCZOS)
        part = np.asarray(picture)

    # An array has its channels last, as in diffusers.
    images = part
    if isinstance(part, np.ndarray) and part.ndim in (3, 4) and part.dtype.kind in "biuf":
        images = torch.from_numpy(np.moveaxis(part, -1, -3).copy())
    if not isinstance(images, Tensor):
        kinds = "a picture of PIL, an array (N, H, W, 3), a tensor (N, 3, H, W) or a list of them"
        raise UserError(f"image: {type(part).__name__}; expected {kinds}")
    if images.dim() not in (3, 4) or images.shape[-3:] != (3, height, width):
        shape = f"{width}x{height} pixels, a tensor (N, 3, {height}, {width}) or an array (N, {height}, {width}, 3)"
        raise UserError(f"image: shape {tuple(part.shape)}; expected {shape}; resize it, or give height and width")
    if images.dtype != torch.uint8:
        if not (images.is_floating_point() and ((images >= 0) & (images <= 1)).all()):  # NaN is not, either
            raise UserError(f"image: values of {images.dtype}; expected uint8, or floats in [0, 1]; convert them")
        images = 255 * images
    return images.float().reshape(-1, 3, height, width)
