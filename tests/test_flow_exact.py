"""Every sampler reaches the exact mean and covariance of a Gaussian mixture, from the exact marginal at its start.

An estimate from n samples may miss by 4 standard errors plus a term that halves when the steps double.
"""

import math
from contextlib import nullcontext
from unittest.mock import patch

import pytest
import torch
from flow_mixture import Mixture
from torch import Tensor

from vit5gen.flow import Flow, sample_ode, sample_sde

END = 1 - 1e-3
COUNT = 4000
DISCRETISATION = 3.0  # over the number of steps
FORMS = ("constant", "SBDM", "sigma", "linear", "decreasing", "increasing-decreasing")


def excess(mixture: Mixture, x: Tensor) -> float:
    """Return by how much the worst moment misses beyond its 4 standard errors."""
    mean, covariance = mixture.moments(END)
    centred = x - mean
    products = centred[:, :, None] * centred[:, None]
    misses = [(centred.mean(0), centred.std(0)), (products.mean(0) - covariance, products.std(0))]
    return max((miss.abs() - 4 * std / math.sqrt(len(x))).max().item() for miss, std in misses)


@pytest.mark.parametrize("prediction", ["velocity", "score", "noise", "data"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_ode(path: str, prediction: str) -> None:
    mixture = Mixture(Flow(path, prediction))
    start = mixture.flow.interval()[0]
    x0 = mixture.sample(start, COUNT, torch.Generator().manual_seed(1))
    for steps in (50, 100):
        x = sample_ode(mixture.flow, mixture.predict, x0, steps, "euler", (start, END), shift=4.0)
        assert excess(mixture, x) < DISCRETISATION / steps


def sde_excess(path: str, form: str, method: str, steps: int, prediction: str = "velocity") -> float:
    mixture = Mixture(Flow(path, prediction))
    start = 1e-3 if form == "SBDM" and path != "vp" else 0.0
    generator = torch.Generator().manual_seed(2)
    x0 = mixture.sample(start, COUNT, generator)
    options = {"last_step": None, "t_span": (start, END), "noise": generator}
    growing = torch.logspace(math.log10(start or END), math.log10(END), steps + 1, dtype=torch.float64).tolist()
    # SBDM is 1 / t there: let every step grow with t.
    with patch("vit5gen.flow.solvers.time_grid", lambda *_: growing) if start else nullcontext():
        x = sample_sde(mixture.flow, mixture.predict, x0, steps, method, form, **options)
    return excess(mixture, x)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_sde(path: str, form: str) -> None:
    for method, steps in (("euler", 50), ("euler", 100), ("heun", 50)):
        assert sde_excess(path, form, method, steps) < DISCRETISATION / steps


@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_sde_of_predicted_data(path: str) -> None:
    for form, method in (("sigma", "euler"), ("SBDM", "euler"), ("linear", "heun")):
        assert sde_excess(path, form, method, 50, "data") < DISCRETISATION / 50


@pytest.mark.parametrize("method", ["heun", "rk4"])
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_a_solver_does_not_magnify_the_error_of_predicted_data_at_its_end(path: str, method: str) -> None:
    mixture, times = Mixture(Flow(path, "data")), []

    def network(x: Tensor, t: Tensor) -> Tensor:
        times.append(t[0].item())
        return mixture.predict(x, t) + 0.01 * (-1) ** len(times)

    x0 = mixture.sample(0.0, 500, torch.Generator().manual_seed(1))
    found = sample_ode(mixture.flow, network, x0, 50, method)
    exact = sample_ode(mixture.flow, mixture.predict, x0, 200, "rk4", (0.0, END))
    assert (found - exact).square().mean().sqrt() < 0.012  # with the method's own last step at least 0.018
    assert max(times) < END  # there the velocity would have a hundred or a thousand times the error


@pytest.mark.slow
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_sbdm_needs_2000_uniform_steps_from_eps(path: str) -> None:
    mixture, generator = Mixture(Flow(path)), torch.Generator().manual_seed(3)
    start = mixture.flow.sde_interval("sbdm", 0.0, False)[0]
    x0 = mixture.sample(start, COUNT, generator)
    x = sample_sde(mixture.flow, mixture.predict, x0, 2000, diffusion="SBDM", last_step=None, noise=generator)
    assert excess(mixture, x) < DISCRETISATION / 2000 + 5e-3
