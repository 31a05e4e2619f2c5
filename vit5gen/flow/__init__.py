"""The flow from noise to data: paths, losses, solvers, guidance and likelihood. It knows no network."""

from vit5gen.flow.flow import Flow, NonFiniteError, draw_timesteps, shift_time, to_diffusers
from vit5gen.flow.guidance import guide
from vit5gen.flow.likelihood import log_likelihood
from vit5gen.flow.solvers import (
    ODE_METHODS,
    SDE_METHODS,
    CountingModel,
    ode_steps,
    sample_ode,
    sample_sde,
    sde_steps,
    time_grid,
)

__all__ = [
    "ODE_METHODS",
    "SDE_METHODS",
    "CountingModel",
    "Flow",
    "NonFiniteError",
    "draw_timesteps",
    "guide",
    "log_likelihood",
    "ode_steps",
    "sample_ode",
    "sample_sde",
    "sde_steps",
    "shift_time",
    "time_grid",
    "to_diffusers",
]
