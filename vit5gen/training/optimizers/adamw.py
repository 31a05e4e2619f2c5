"""AdamW (arXiv 1711.05101), fused."""

from typing import Any

import torch

from vit5gen.config import TrainingConfig
from vit5gen.training.optimizers.optimizer import OPTIMIZERS


@OPTIMIZERS.register("adamw")
def adamw(module: torch.nn.Module, groups: list[dict[str, Any]], training: TrainingConfig) -> torch.optim.Optimizer:
    """Construct torch's AdamW, all of whose updates are one kernel."""
    betas = (training.adam_betas[0], training.adam_betas[1])
    return torch.optim.AdamW(groups, lr=training.learning_rate, betas=betas, fused=True)
