"""The optimizers by name, one file each."""

from vit5gen.training.optimizers import adamw  # registers itself
from vit5gen.training.optimizers.optimizer import OPTIMIZERS, build_optimizer, learning_rate
