"""The flow from noise to data: paths, losses, solvers, guidance and likelihood. It knows no network."""

from vit5gen.flow.flow import Flow, NonFiniteError, draw_timesteps
from vit5gen.flow.guidance import GuidedModel
from vit5gen.flow.likelihood import log_likelihood
from vit5gen.flow.solvers import ODE_METHODS, SDE_METHODS, Steps, ode_steps, offer, sample_ode, sample_sde, sde_steps
from vit5gen.flow.times import shift_time, time_grid, to_diffusers
