"""Which parameters are decayed, at which rate they learn, and the table of optimizers."""

import math
from collections.abc import Callable

import torch
from torch import nn

from vit5gen.config import TrainingConfig
from vit5gen.registry import Registry

# From a module and groups of its parameters with their weight decay to an optimizer.
OPTIMIZERS: Registry[Callable[..., torch.optim.Optimizer]] = Registry("optimizer")


def build_optimizer(module: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Construct the optimizer ``training.optimizer``, which decays the matrices of layers.

    Not decayed are vectors (norms, biases, LayerScale), parameters that are no layer's ``weight`` (positions,
    registers), and what a submodule's ``no_weight_decay()`` names, if it has that method. Raises `UserError` for
    options that do not fit.
    """
    excluded = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, part in module.named_modules()
        for name in getattr(part, "no_weight_decay", list)()
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in module.named_parameters():
        if parameter.requires_grad:
            groups[parameter.ndim >= 2 and name.endswith(".weight") and name not in excluded].append(parameter)
    decay = {True: training.weight_decay, False: 0.0}
    decayed = [{"params": params, "weight_decay": decay[kind]} for kind, params in groups.items() if params]
    options, where = training.optimizer_kwargs, "training.optimizer_kwargs"
    return OPTIMIZERS.build(training.optimizer, options, where, module, decayed, training)


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Return the learning rate of ``step`` (0-based): linear warm-up, then constant or a cosine to 0 at the end."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    done = (step - training.warmup_steps) / max(1, training.num_steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
