"""The metrics that come with the package, one file each, in the order of a card; importing them registers them."""

from vit5gen.evaluation.metrics import (  # noqa: I001
    frechet,
    spatial_frechet,
    inception_score,
    precision_recall,
    kernel_distance,
)
