"""What generated images are compared with while training: statistics of real images, and the floor beside them."""

from dataclasses import dataclass

import numpy as np
import torch

from vit5gen.config import Config
from vit5gen.data.images import ImageSet, open_held_out, open_images, readable
from vit5gen.evaluation import Extractor, FeatureStatistics, FrechetReference, frechet_of
from vit5gen.system.distributed import rank_and_world
from vit5gen.system.errors import UserError


@dataclass(frozen=True)
class Reference:
    """Training images as `FrechetReference`, ``labels`` to generate, and ``floor``: the distance of held-out images.

    The floor belongs to the same number of images with the same labels; it is None where no images are held out.
    """

    distance: FrechetReference
    labels: list[int]
    floor: float | None


def build_reference(config: Config, extractor: Extractor) -> Reference:
    """Score the real images, shared over the processes.

    Raises:
        UserError: the images of the training data cannot be read.
    """
    evaluation = config.evaluation
    order = np.random.default_rng(evaluation.seed)

    def choose(images: ImageSet, most: int) -> ImageSet:
        return readable(images.select(torch.from_numpy(order.permutation(len(images))[:most])), config.data)

    def statistics(images: ImageSet) -> FeatureStatistics:
        rank, world_size = rank_and_world()
        chunks = torch.arange(len(images)).split(evaluation.batch_size)[rank::world_size]
        batches = (torch.stack([images.read(int(i)) for i in chunk]) for chunk in chunks)
        return frechet_of(batches, extractor).all_reduce()

    training = choose(open_images(config.data), evaluation.num_reference)
    distance = FrechetReference.of(statistics(training))
    try:
        split = evaluation.held_out_split
        held_out = choose(open_held_out(config.data, split, training.class_names), evaluation.num_images)
        if len(held_out) < 2:
            raise UserError(f"data: split {split!r} has {len(held_out)} images; expected at least 2")
    except UserError:  # the monitor tells it
        return Reference(distance, training.labels[: evaluation.num_images].tolist(), floor=None)
    real = statistics(held_out)
    return Reference(distance, held_out.labels.tolist(), distance.distance(real.mean, real.covariance))
