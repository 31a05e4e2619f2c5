"""The metrics that come with the package: each module of this folder registers one, in the order of a card."""

from vit5gen.registry import import_modules

import_modules(__name__, first=("frechet", "spatial_frechet", "inception_score", "precision_recall", "kernel_distance"))
