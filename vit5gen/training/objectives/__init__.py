"""What a model is trained for: each module of this folder registers an objective. docs/extending.md is the contract."""

from vit5gen.registry import import_modules
from vit5gen.training.objectives.objective import (
    OBJECTIVES,
    Batch,
    Objective,
    Objectives,
    SharedOptions,
    build_objectives,
    needing_image,
    register_objective,
    shared_options,
)

import_modules(__name__)
