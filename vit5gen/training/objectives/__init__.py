"""What a model is trained for: objectives, one file each, each a plug. docs/extending.md is their contract in prose."""

from vit5gen.training.objectives import flow  # registers itself
from vit5gen.training.objectives.objective import OBJECTIVES, Batch, Objective, build_objectives, register_objective
