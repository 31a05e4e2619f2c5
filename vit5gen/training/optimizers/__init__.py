"""The optimizers by name: each module of this folder registers one."""

from vit5gen.registry import import_modules
from vit5gen.training.optimizers.optimizer import OPTIMIZERS, build_optimizer, learning_rate

import_modules(__name__)
