"""The scheduler of `SiTPipeline`: the path from noise to data, and the steps of a scheduler of diffusers instead."""

import copy
from collections.abc import Callable
from functools import partial
from inspect import signature
from typing import Any

import numpy as np
import torch
from diffusers import ConfigMixin, SchedulerMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor

from vit5gen.config import FlowConfig
from vit5gen.flow import ODE_METHODS, SDE_METHODS, Flow, Steps, ode_steps, offer, sde_steps, shift_time, to_diffusers
from vit5gen.flow.flow import ModelFn
from vit5gen.models.layers import check_positive
from vit5gen.registry import Registry
from vit5gen.system.errors import UserError

SAMPLERS: Registry[Callable[..., Steps]] = Registry("sampler")
for _kind, _solver, _methods in (("ode", ode_steps, ODE_METHODS), ("sde", sde_steps, SDE_METHODS)):
    for _method in _methods:
        SAMPLERS.register(f"{_kind}-{_method}")(partial(_solver, method=_method))

_FLOW = FlowConfig()
_DEFAULT = {
    name: one.default for solver in (ode_steps, sde_steps) for name, one in signature(solver).parameters.items()
}

Generators = torch.Generator | list[torch.Generator] | None


class SiTScheduler(SchedulerMixin, ConfigMixin):
    """The path from noise to data and what the network predicts, with the finer settings of the solvers.

    shift: of the time grid towards noise (above 1).  rtol, atol: of dopri5.  diffusion, last_step, last_step_size: of
    the SDE solvers, see `vit5gen.flow.sde_steps`.  Change one with ``SiTScheduler.from_config(config, shift=2.0)``.
    """

    @register_to_config
    def __init__(
        self,
        path: str = _FLOW.path,
        prediction: str = _FLOW.prediction,
        shift: float = _DEFAULT["shift"],
        rtol: float = _DEFAULT["rtol"],
        atol: float = _DEFAULT["atol"],
        diffusion: str = _DEFAULT["diffusion"],
        last_step: str = _DEFAULT["last_step"],
        last_step_size: float = _DEFAULT["last_step_size"],
    ) -> None:
        shift_time(0.5, shift)  # raises where shift is no shift
        check_positive(rtol=rtol, atol=atol, **({} if last_step_size == 0 else {"last_step_size": last_step_size}))
        self.flow = Flow(path, prediction)

    def steps(
        self, sampler: str, model_fn: ModelFn, x: Tensor, num_steps: int, noise: Generators, start: float | None
    ) -> tuple[int, Steps]:
        """Return the number of steps, 0 for dopri5 which cannot know, and (i, t, x) after each of them.

        sampler: ``ode-<method>`` or ``sde-<method>``, which takes one more step unless ``last_step`` is none.
        start: the time of ``x``, where it is not the solver's first.
        """
        solver = SAMPLERS.get(sampler)
        options = dict(self.config) | {"noise": noise, "start": start}
        settings = {name: options[name] for name in signature(solver).parameters.keys() & options}
        last = "noise" in settings and str(self.config.last_step).lower() != "none"
        return 0 if sampler == "ode-dopri5" else num_steps + last, solver(self.flow, model_fn, x, num_steps, **settings)


def foreign_steps(
    scheduler: Any, flow: Flow, model_fn: ModelFn, x: Tensor, num_steps: int, noise: Generators, start: float | None
) -> tuple[int, Steps]:
    """Return the number of steps, and (i, t, x) after each ``step``, of a flow-match scheduler of diffusers.

    It works in sigma = 1 - t, and on a copy of the scheduler, whose state two calls must not share.
    The grid is uniform in t, as ours is, if the scheduler takes sigmas; otherwise its own.
    start: the time of ``x``, if it is not 0. Raises `UserError` for a scheduler that is not made for flow matching or
    cannot begin there, and for a path that is not linear.
    """
    # Refuse what is not for flow matching on the linear path.
    name = type(scheduler).__name__
    if not (name.startswith("FlowMatch") or scheduler.config.get("prediction_type") == "flow_prediction"):
        other = "one with prediction_type='flow_prediction' and use_flow_sigmas=True"
        expected = f"SiTScheduler, a FlowMatch one, or {other}"
        raise UserError(f"scheduler: {name} is not made for flow matching; expected {expected}")
    if scheduler.config.get("use_dynamic_shifting"):
        raise UserError(f"scheduler: {name} with use_dynamic_shifting needs an image size; set it to False")
    if flow.path != "linear":
        raise UserError(f"scheduler: {name} supports only the linear path, not {flow.path!r}; use SiTScheduler")

    # Its own copy, set to the grid of times.
    scheduler = copy.deepcopy(scheduler)
    if "sigmas" in signature(scheduler.set_timesteps).parameters:
        sigmas = (1 - (start or 0)) * (1 - np.arange(num_steps) / num_steps)
        scheduler.set_timesteps(sigmas=sigmas, device=x.device)
    else:
        scheduler.set_timesteps(num_steps, device=x.device)
    scheduler.set_begin_index(0)
    options = {"generator": noise} if "generator" in signature(scheduler.step).parameters else {}
    sigmas = scheduler.sigmas.tolist()  # not the timesteps: some schedulers round them
    if start is not None and abs(sigmas[0] - (1 - start)) > 1e-6:
        raise UserError(f"strength: {name} has times of its own and cannot begin at t = {start:.6g}; use SiTScheduler")

    def steps(x: Tensor) -> Steps:
        for i, timestep in enumerate(scheduler.timesteps):
            _, output = to_diffusers(sigmas[i], flow.velocity(model_fn, x, to_diffusers(sigmas[i], x)[0]))
            x = scheduler.step(output, timestep, x, return_dict=False, **options)[0]
            x = yield from offer(i, to_diffusers(sigmas[i + 1], x)[0], x)

    return len(scheduler.timesteps), steps(x)
