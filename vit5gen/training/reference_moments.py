"""What generated images are compared with while training: statistics of real images, and their floor."""

import hashlib
import json
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from vit5gen.config import Config
from vit5gen.data.images import ImageSet, open_held_out, open_images, readable
from vit5gen.evaluation import Extractor, FrechetReference, frechet_of
from vit5gen.system.distributed import is_main, on_main, rank_and_world
from vit5gen.system.errors import UserError
from vit5gen.system.files import atomic, cache_folder
from vit5gen.training.held_out import check_count

# What decides, beside the images and the extractor, over the features of a split.
_PIXELS = {"source", "source_kwargs", "split", "resolution", "classes", "exif", "rules", "on_broken_image", "held_out"}
_CHOSEN = {"seed", "num_images", "num_reference", "held_out_split", "batch_size"}


@dataclass(frozen=True)
class TrainingReference:
    """Training images as `FrechetReference`, ``labels`` to generate, and ``floor``: the distance of held-out images.

    The floor belongs to the same number of images with the same labels; it is None where no images are held out.
    """

    distance: FrechetReference
    labels: list[int]
    floor: float | None


def build_reference(config: Config, extractor: Extractor) -> TrainingReference:
    """Score the real images, shared over the processes; what is scored once is found in the cache the next time.

    Raises:
        UserError: the images of the training data cannot be read.
    """
    evaluation = config.evaluation
    order = np.random.default_rng(evaluation.seed)

    def choose(images: ImageSet, most: int) -> ImageSet:
        return readable(images.select(torch.from_numpy(order.permutation(len(images))[:most])), config.data)

    def moments(images: ImageSet) -> tuple[Tensor, Tensor]:
        """Return mean and covariance of the features."""
        path, known = on_main(lambda: _recall(config, images, extractor))
        if known is not None:
            return known
        rank, world_size = rank_and_world()
        chunks = torch.arange(len(images)).split(evaluation.batch_size)[rank::world_size]
        found = frechet_of(map(images.stack, chunks), extractor).all_reduce()
        mean, covariance = found.mean, found.covariance
        if is_main():
            with suppress(OSError, SafetensorError), atomic(path) as temporary:
                save_file({"mean": mean.contiguous(), "covariance": covariance.contiguous()}, temporary)
        return mean, covariance

    training = choose(open_images(config.data), evaluation.num_reference)
    distance = FrechetReference(*moments(training))
    try:
        held_out = open_held_out(config.data, evaluation.held_out_split, training.class_names)
        held_out = choose(held_out, evaluation.num_images)
        check_count(held_out, config)
    except UserError:  # the monitor says so
        return TrainingReference(distance, training.labels[: evaluation.num_images].tolist(), floor=None)
    return TrainingReference(distance, held_out.labels.tolist(), distance.distance(*moments(held_out)))


def _recall(config: Config, images: ImageSet, extractor: Extractor) -> tuple[Path, tuple[Tensor, Tensor] | None]:
    """Return the file of the cache for the moments of ``images``, and what it holds, if anything."""
    settings = [config.data.model_dump(include=_PIXELS), config.evaluation.model_dump(include=_CHOSEN)]
    key = [images.digest(), images.labels.tolist(), settings, extractor.identity]
    name = hashlib.sha256(json.dumps(key, sort_keys=True).encode(errors="surrogateescape")).hexdigest()
    path = cache_folder() / f"reference-{name[:32]}.safetensors"
    with suppress(OSError, SafetensorError, KeyError):  # absent or damaged
        found = load_file(path)
        return path, (found["mean"], found["covariance"])
    return path, None
