"""Log-likelihood against closed forms."""

import pytest
import torch
from flow_mixture import Mixture, normal
from torch import Tensor

from vit5gen.flow import Flow, log_likelihood
from vit5gen.system.errors import UserError


def gaussian(flow: Flow, mean: Tensor, variance: float) -> Mixture:
    return Mixture(flow, torch.ones(1).double(), mean[None], torch.tensor([variance], dtype=torch.float64))


@pytest.mark.parametrize(
    ("dim", "variance", "prediction"),
    [(2, 0.2, "velocity"), (16, 0.05, "velocity"), (5, 3.0, "velocity"), (5, 3.0, "data")],
)
@pytest.mark.parametrize("path", ["linear", "gvp", "vp"])
def test_gaussian(path: str, dim: int, variance: float, prediction: str) -> None:
    # At t = 0 the VP path still holds 0.7 % of the data, so that only a centred Gaussian flows from N(0, 1) there.
    mixture = gaussian(Flow(path, prediction), normal(dim, seed=1) * (path != "vp"), variance)
    x1 = mixture.sample(1.0, 4, torch.Generator().manual_seed(2))
    logp, x0 = log_likelihood(mixture.flow, mixture.predict, x1, probes="exact", rtol=1e-7, atol=1e-7)
    # Where data are predicted, the way ends before 1, and the density is that of its end.
    end = mixture.flow.reversed_interval()[1] if prediction == "data" else 1.0
    torch.testing.assert_close(logp, mixture.log_density(x1, end), rtol=0, atol=1e-3)
    mean, covariance = mixture.moments(end)
    torch.testing.assert_close(x0, (x1 - mean) / covariance[0, 0].sqrt(), rtol=0, atol=1e-3)


def test_fixed_probes_make_an_unbiased_estimate_that_the_solver_can_follow() -> None:
    mixture = Mixture(Flow())
    x1 = mixture.sample(1.0, 1, torch.Generator().manual_seed(2))
    exact, _ = log_likelihood(mixture.flow, mixture.predict, x1, probes="exact", rtol=1e-6)
    estimates, _ = log_likelihood(
        mixture.flow, mixture.predict, x1.expand(400, 2), generator=torch.Generator().manual_seed(3), rtol=1e-6
    )
    assert estimates.std() > 0  # the Jacobian of a mixture is not diagonal
    assert abs(estimates.mean() - exact) < 4 * estimates.std() / 20


def test_probes_follow_the_generator_and_solvers_agree() -> None:
    mixture, x1 = Mixture(Flow("gvp")), normal(3, 2)
    logp = [
        log_likelihood(mixture.flow, mixture.predict, x1, 200, method, generator=torch.Generator().manual_seed(5))[0]
        for method in ("dopri5", "heun", "dopri5")
    ]
    assert torch.equal(logp[0], logp[2])
    torch.testing.assert_close(logp[0], logp[1], rtol=0, atol=5e-3)


def test_a_model_that_ignores_its_input_keeps_the_density() -> None:
    x1 = normal(3, 2, 2)
    for probes in ("rademacher", "exact"):
        logp, x0 = log_likelihood(Flow(), lambda x, t: torch.ones_like(x), x1, 4, "euler", probes)
        torch.testing.assert_close(x0, x1 - 1)
        torch.testing.assert_close(logp, torch.distributions.Normal(0, 1).log_prob(x1 - 1).flatten(1).sum(1))


def test_bad_input() -> None:
    for options in ({"probes": "gaussian"}, {"num_steps": 0}, {"method": "rk5"}, {"rtol": -1.0}):
        with pytest.raises(UserError, match="expected"):
            log_likelihood(Flow(), lambda x, t: x, normal(2, 3), **options)


@pytest.mark.parametrize("method", ["dopri5", "heun"])
@pytest.mark.parametrize("probes", ["exact", "rademacher"])
def test_states_may_be_one_number_a_sample(method: str, probes: str) -> None:
    x, generator = normal(3), torch.Generator
    options = {"num_steps": 4, "method": method, "probes": probes}
    flat = log_likelihood(Flow(), lambda x, t: t - x, x, generator=generator().manual_seed(0), **options)
    model = lambda x, t: t[:, None] - x  # noqa: E731
    column = log_likelihood(Flow(), model, x[:, None], generator=generator().manual_seed(0), **options)
    assert torch.equal(flat[0], column[0])
    assert torch.equal(flat[1], column[1][:, 0])
