"""Top-1 and top-5 of a published ViT-5 on a folder of images."""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import timm
import torch
from PIL import Image
from timm.data import create_transform
from torch.utils.data import DataLoader

from vit5gen.config import DataConfig
from vit5gen.data.images import ImageSet, decoding
from vit5gen.data.pictures import cut_strip, eight_bits, find_classes
from vit5gen.models import load_vit5
from vit5gen.models.classifier import default_cfgs
from vit5gen.system.distributed import start_processes
from vit5gen.system.errors import UserError, choose, listed
from vit5gen.system.precision import PRECISIONS


def classify(
    folder: str | Path, model: str, checkpoint: str | Path, batch_size: int, num_workers: int
) -> dict[str, float]:
    """Return ``{"top1": percent, "top5": percent, "num_images": n}``; the image size is the checkpoint's.

    Raises `UserError` when the model is not known, the checkpoint is of another model, the folder's classes are not as
    many as the checkpoint's, or an image cannot be read.
    """
    # The checkpoint's network, and on the meta device the one that the model's name promises.
    choose("--model", model, sorted({name.split(".")[0] for name in default_cfgs}))
    where = start_processes().device
    net = load_vit5(checkpoint).eval().to(where)
    with torch.device("meta"):
        expected = timm.create_model(model)
    if (net.embed_dim, len(net.blocks)) != (expected.embed_dim, len(expected.blocks)):
        found = f"{len(net.blocks)} blocks of width {net.embed_dim}"
        wanted = f"{len(expected.blocks)} of {expected.embed_dim}"
        raise UserError(f"--checkpoint: {found}, but {model} has {wanted}; set --model to the model of the file.")

    # The images as the checkpoint takes them, a folder for each of its classes.
    images: Any = _image_folder(folder, net.patch_embed.img_size[0], expected.pretrained_cfg)
    if len(names := images.class_names) != net.num_classes:
        found = f"{len(names)} classes, the checkpoint {net.num_classes} ({listed(names)})"
        advice = "labels follow from the order of the folders, so none may be missing."
        raise UserError(f"FOLDER: {str(folder)!r} has {found}; {advice}")

    # How often the first guess is right, and how often one of five.
    hits = torch.zeros(2, dtype=torch.int64)
    with torch.inference_mode():
        for pixels, labels in DataLoader(images, batch_size, num_workers=num_workers):
            with PRECISIONS["bf16" if where.type == "cuda" else "fp32"].autocast(where):
                logits = net(pixels.to(where))
            best = logits.topk(min(5, net.num_classes)).indices.cpu() == labels[:, None]
            hits += torch.stack([best[:, 0].sum(), best.sum()])
    top1, top5 = (100 * hits / len(images)).tolist()
    return {"top1": top1, "top5": top5, "num_images": len(images)}


def _read(files: list[Path], transform: Callable[[Image.Image], torch.Tensor], index: int) -> torch.Tensor:
    """Return an image as a network takes it."""
    with decoding(f"FOLDER: {str(files[index])!r}", "replace or remove it"), Image.open(files[index]) as image:
        return transform(cut_strip(eight_bits(image).convert("RGB")))


def _image_folder(folder: str | Path, size: int, config: Any) -> ImageSet:
    """Open the folder with the evaluation transform that `config`, timm's pretrained configuration, describes.

    EXIF orientation is ignored, as where the published figures come from.
    """
    transform = create_transform(size, **{key: config[key] for key in ("interpolation", "mean", "std", "crop_pct")})
    found, instead = find_classes(Path(folder), DataConfig().rules) if Path(folder).is_dir() else ({}, {})
    if not found or instead:
        reason = "; ".join(f"class {name!r} has no images, {why}" for name, why in list(instead.items())[:3])
        reason = reason or ("no class folders" if Path(folder).is_dir() else "no such folder")
        raise UserError(f"FOLDER: {str(folder)!r} does not contain one folder per class ({reason}).")
    files = [file for of_class in found.values() for file in of_class]
    labels = torch.repeat_interleave(torch.tensor([len(of_class) for of_class in found.values()]))
    return ImageSet(list(found), labels, partial(_read, files, transform), digest=str)
