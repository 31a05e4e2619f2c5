"""Latents that other programs have encoded, written again as shards of ours."""

from bisect import bisect_right
from collections.abc import Callable
from functools import partial
from itertools import accumulate
from pathlib import Path
from pickle import UnpicklingError

import numpy as np
import torch
from diffusers import ModelMixin
from safetensors import SafetensorError, safe_open
from timm.data import ImageNetInfo
from torch import Tensor

from vit5gen.config import ASSUMED_CLASSES, Config
from vit5gen.data.autoencoders.codec import normalise
from vit5gen.data.autoencoders.find_autoencoder import find_sizes, load_autoencoder
from vit5gen.data.encoding import encode_dataset, explain_nonfinite
from vit5gen.data.images import ImageSet, check_classes, check_num_classes
from vit5gen.data.latents import LatentDataset, all_finite, check_autoencoder, images_beside
from vit5gen.data.pictures import content_digest
from vit5gen.data.sources.folder import imagenet_names
from vit5gen.system.distributed import start_processes
from vit5gen.system.errors import UserError
from vit5gen.system.progress import Progress

STATISTICS = "latents_stats.pt"  # LightningDiT's: {"mean": (1, C, 1, 1), "std": (1, C, 1, 1)} of raw latents
_LOOKED_AT = 256  # latents, spread over all, that are compared with the statistics beside them
# How many deviations the mean may differ, and by what factor the deviation, before they are of other latents.
_MEAN_OFF, _STD_OFF = 0.5, 1.5


def import_latents(config: Config, folder: str | Path, output: str | Path) -> None:
    """Write the latents in ``folder`` into ``output`` as `encode_dataset` writes those of images; say what is next.

    They are samples that are not normalised, so that their standard deviation is 0. Raises `UserError` where shapes,
    labels, values, statistics or classes do not fit the configuration.
    """
    if config.data.held_out is not None:
        raise UserError("data.held_out: has no effect on latents that are ready; omit it")
    state, vae, config = start_processes(), load_autoencoder(config.vae.name), find_sizes(config)
    check_autoencoder(config, vae)
    encode_dataset(open_ready_latents(Path(folder), config), vae, output, config, _take_shard)
    if state.is_main_process:
        print(f"{output}: {len(LatentDataset(output))} latents. Next: train with --data.latents {output}")


def open_ready_latents(folder: Path, config: Config) -> ImageSet:
    """Open LightningDiT's shards (arXiv 2501.01423), or ``latents.npy`` and ``labels.npy``, without reading latents.

    ``read(i)`` is (F, C, h, w) fp32, original and, with `data.horizontal_flip`, mirrored. Files are in the order of
    their names. Classes have the names of `data.classes`, else of the images of the configuration where these are here,
    else, if there are 1,000, ImageNet's, else their numbers. Raises `UserError` for what does not fit.
    """
    # The files, and what each holds.
    files = sorted(folder.glob("*.safetensors")) or [folder / "latents.npy", folder / "labels.npy"]
    if absent := [file for file in files if not file.is_file()]:
        expected = "expected LightningDiT's *.safetensors, or latents.npy and labels.npy"
        raise UserError(f"--from {folder}: has no {absent[0].name}; {expected}")
    flip, shape = config.data.horizontal_flip, config.latent_shape
    try:
        of_numpy = files[0].suffix == ".npy"
        opened = [_open_pair(*files)] if of_numpy else [_open_shard(file, flip) for file in files]
    except (OSError, ValueError, EOFError, SafetensorError) as error:
        raise UserError(f"--from {folder}: {error}; expected whole files of latents and labels") from error
    if of_numpy and flip:
        raise UserError(f"--from {folder}: has no mirror images; set data.horizontal_flip to false")
    for file, (views, labels, _) in zip(files, opened, strict=not of_numpy):
        if labels.ndim != 1 or labels.is_floating_point() or not len(labels):
            raise UserError(f"--from {file}: labels {labels.dtype} {list(labels.shape)}; expected whole numbers (N,)")
        if any(found != [len(labels), *shape] for found in views):
            shapes = f"latents of shapes {views} with {len(labels)} labels"
            raise UserError(f"--from {file}: {shapes}; expected {[len(labels), *shape]}, by resolution and vae")

    # Their labels, and the names of these.
    labels = torch.cat([labels for _, labels, _ in opened]).long()
    data, (images, _) = config.data, images_beside(config.data)
    names = data.classes or (images.class_names if images is not None else [])
    if not names:
        count = data.num_classes or int(labels.max()) + 1
        of_imagenet = count == ASSUMED_CLASSES
        names = imagenet_names(ImageNetInfo().label_names()) if of_imagenet else [str(i) for i in range(count)]
    if not 0 <= int(labels.min()) <= int(labels.max()) < len(names):
        found = f"labels from {int(labels.min())} to {(top := int(labels.max()))}"
        raise UserError(f"--from {folder}: {found}, expected 0 to {len(names) - 1}; set data.num_classes to {top + 1}")
    ends = list(accumulate(len(labels) for _, labels, _ in opened))
    read = partial(_read, [0, *ends], [read for *_, read in opened])
    ready = ImageSet(names, labels, read, partial(content_digest, folder, files), f"{folder}: latent {{}}".format)
    check_num_classes(ready, data)
    check_classes(ready, data)
    if (folder / STATISTICS).exists():
        _check_statistics(folder / STATISTICS, ready, shape[0])
    return ready


Opened = tuple[list[list[int]], Tensor, Callable[[int], Tensor]]  # shapes of the views, labels, and what reads a latent


def _open_shard(file: Path, flip: bool) -> Opened:
    opened, names = safe_open(file, framework="pt"), ["latents", "latents_flip"][: 1 + flip]
    if absent := {*names, "labels"} - set(opened.keys()):
        raise ValueError(f"{file.name} has no {min(absent)} (tensors: {', '.join(sorted(opened.keys()))})")
    views = [opened.get_slice(name) for name in names]
    shapes = [view.get_shape() for view in views]
    return shapes, opened.get_tensor("labels"), lambda row: torch.stack([view[row] for view in views])


def _open_pair(latents: Path, labels: Path) -> Opened:
    values = np.load(latents, mmap_mode="r", allow_pickle=False)
    numbers = np.load(labels, allow_pickle=False)
    if numbers.dtype.kind not in "iu" or values.dtype.kind != "f":
        raise ValueError(f"latents are {values.dtype} and labels {numbers.dtype}, not floating and whole numbers")
    return [list(values.shape)], torch.from_numpy(numbers.astype(np.int64)), lambda row: torch.tensor(values[row][None])


def _read(starts: list[int], reads: list[Callable[[int], Tensor]], index: int) -> Tensor:
    number = bisect_right(starts, index) - 1
    return reads[number](index - starts[number]).float()


def _check_statistics(file: Path, ready: ImageSet, channels: int) -> None:
    """Raise `UserError` unless the statistics are finite, no deviation is 0, and they are those of the latents."""
    try:
        stored = torch.load(file, map_location="cpu", weights_only=True)
        mean, std = (stored[name].double().reshape(channels) for name in ("mean", "std"))
    except (OSError, EOFError, UnpicklingError, RuntimeError, LookupError, TypeError, AttributeError) as error:
        detail = " ".join(str(error).split())[:120]
        raise UserError(
            f"{file}: no mean and std of {channels} channels ({detail}); remove it or write it again"
        ) from error
    if not (all_finite(mean) and all_finite(std) and bool((std > 0).all())):
        raise UserError(f"{file}: a mean that is not finite, or a std that is zero or not finite; write it again")
    chosen = torch.linspace(0, len(ready) - 1, min(_LOOKED_AT, len(ready))).long()
    found = torch.stack([ready.read(int(i))[0] for i in chosen]).transpose(0, 1).flatten(1).double()
    off, factor = ((found.mean(1) - mean).abs() / std).max(), (found.std(1) / std).log().abs().max().exp()
    if not (off < _MEAN_OFF and factor < _STD_OFF):
        differs = f"means differ by {off:.3g} deviations, deviations by a factor of {factor:.3g}"
        raise UserError(
            f"{file}: statistics of other latents ({differs}); remove it if it is wrong, or check the folder"
        )


def _take_shard(
    ready: ImageSet, vae: ModelMixin, config: Config, progress: Progress
) -> tuple[dict[str, Tensor], list[str]]:
    """Return the tensors of one shard, normalised; as `encoding.encode_shard` does of images."""
    dtype = getattr(torch, config.data.shard_dtype)
    means = []
    for index in range(len(ready)):
        exact, _ = normalise(vae, raw := ready.read(index), torch.zeros_like(raw))
        means.append(exact.to(dtype))
        if not all_finite(means[-1]):
            raise UserError(f"{ready.name(index)}: {explain_nonfinite(exact, dtype)}")
        progress.update()
    mean = torch.stack(means)
    return {"mean": mean, "std": torch.zeros_like(mean), "labels": ready.labels}, []
