"""Training: the loop, what it carries from step to step, and what a run leaves in its folder."""

from vit5gen.training.objectives import Batch, Objective, register_objective
