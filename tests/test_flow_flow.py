"""Paths, conversions, losses and draws of t."""

import math

import pytest
import torch
from flow_mixture import Mixture, normal

from vit5gen.flow import Flow, draw_timesteps, shift_time, to_diffusers
from vit5gen.flow.flow import PATHS as FORMULAS
from vit5gen.system.errors import UserError

PATHS = ("linear", "gvp", "vp")
TARGETS = ("x0", "x1", "velocity", "score")


@pytest.mark.parametrize("path", PATHS)
def test_derivatives_are_the_slopes_of_the_coefficients(path: str) -> None:
    t, h = torch.linspace(0.05, 0.95, 19, dtype=torch.float64), 1e-6
    flow = Flow(path)
    before, here, after = flow.coefficients(t - h), flow.coefficients(t), flow.coefficients(t + h)
    torch.testing.assert_close(here.d_alpha, (after.alpha - before.alpha) / (2 * h), rtol=1e-6, atol=1e-8)
    torch.testing.assert_close(here.d_sigma, (after.sigma - before.sigma) / (2 * h), rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("path", PATHS)
def test_a_path_is_the_same_for_scalars_and_for_tensors(path: str) -> None:
    t = torch.linspace(0, 1, 9, dtype=torch.float64)
    for value, expected in zip(FORMULAS[path](t, torch), Flow(path).coefficients(t), strict=True):
        torch.testing.assert_close(torch.as_tensor(value, dtype=torch.float64).expand(9), expected)


def test_a_prediction_in_half_precision_leaves_the_state_in_its_own() -> None:
    x = normal(2, 3).float()
    assert Flow("vp", "noise").velocity(lambda x, t: x.bfloat16(), x, 0.5).dtype == torch.float32
    assert Flow().velocity(lambda x, t: x.bfloat16(), x, 0.5).dtype == torch.float32


@pytest.mark.parametrize("path", PATHS)
def test_every_path_goes_from_noise_to_data(path: str) -> None:
    c = Flow(path).coefficients(torch.tensor([0.0, 1.0]))
    torch.testing.assert_close(c.alpha, torch.tensor([0.0, 1.0], dtype=torch.float64), atol=7e-3, rtol=0)
    torch.testing.assert_close(c.sigma, torch.tensor([1.0, 0.0], dtype=torch.float64), atol=3e-5, rtol=0)


@pytest.mark.parametrize("path", PATHS)
def test_sigma_of_vp_keeps_its_digits_near_data(path: str) -> None:
    single, double = Flow(path).coefficients(torch.tensor(0.999)), Flow(path).coefficients(float(torch.tensor(0.999)))
    assert all(a == b for a, b in zip(single, double, strict=True))
    t = 1 - 1e-5
    if path == "vp":  # sigma^2 = 1 - exp(-x) = x - x^2 / 2 + x^3 / 6
        x = 0.5 * (1 - t) ** 2 * 19.9 + (1 - t) * 0.1
        series = math.sqrt(x - x**2 / 2 + x**3 / 6)
        assert Flow(path).coefficients(t).sigma.item() == pytest.approx(series, rel=1e-12)


@pytest.mark.parametrize("prediction", ["velocity", "score", "noise", "data"])
@pytest.mark.parametrize("path", PATHS)
def test_any_prediction_gives_every_quantity(path: str, prediction: str) -> None:
    flow, x0, x1 = Flow(path, prediction), normal(5, 2, 3, seed=1), normal(5, 2, 3, seed=2)
    t = torch.tensor([0.1, 0.35, 0.5, 0.8, 0.97], dtype=torch.float64)
    x, velocity = flow.interpolate(x0, x1, t)
    truth = {"x0": x0, "x1": x1, "velocity": velocity, "score": -x0 / flow.coefficients(t).sigma.reshape(-1, 1, 1)}
    given = truth[{"noise": "x0", "data": "x1"}.get(prediction, prediction)]
    for target in TARGETS:
        torch.testing.assert_close(flow.convert(given, x, t, target), truth[target], rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(flow.convert(given[2:3], x[2:3], 0.5, target), truth[target][2:3])


@pytest.mark.parametrize("prediction", ["score", "noise"])
@pytest.mark.parametrize("path", ["linear", "gvp"])
def test_the_velocity_of_a_score_or_noise_is_finite_at_data(path: str, prediction: str) -> None:
    x = normal(2, 3)
    assert Flow(path, prediction).velocity(lambda x, t: x.sin(), x, 1.0).isfinite().all()


@pytest.mark.parametrize("path", PATHS)
def test_score_is_the_gradient_of_the_log_density(path: str) -> None:
    flow = Flow(path)
    mixture, x = Mixture(flow), normal(6, 2).requires_grad_()
    expected = torch.autograd.grad(mixture.log_density(x, 0.4).sum(), x)[0]
    torch.testing.assert_close(flow.score(mixture.predict, x.detach(), 0.4), expected)


@pytest.mark.parametrize("path", PATHS)
def test_the_velocity_weight_makes_every_loss_that_of_the_velocity(path: str) -> None:
    x0, x1, t = normal(4, 3, seed=1), normal(4, 3, seed=2), torch.tensor([0.1, 0.4, 0.7, 0.95], dtype=torch.float64)
    guess = normal(4, 3, seed=3)
    for prediction in ("score", "noise"):
        flow = Flow(path, prediction, "velocity")
        x, velocity = flow.interpolate(x0, x1, t)
        expected = (flow.convert(guess, x, t, "velocity") - velocity).square().mean(1)
        torch.testing.assert_close(flow.loss(lambda x, t: guess, x1, x0, t), expected)


def test_the_loss_of_data_is_that_of_the_velocity_with_the_published_clamp() -> None:
    x0, x1, guess = normal(4, 3, seed=1), normal(4, 3, seed=2), normal(4, 3, seed=3)
    t = torch.tensor([0.0, 0.4, 0.97, 1.0], dtype=torch.float64)
    flow = Flow("linear", "data", direction_weight=0.0)
    assert flow.interval(training=True) == (0, 1)
    # JiT's published code: prediction and target are divided by the same clamped 1 - t.
    x, share = flow.interpolate(x0, x1, t)[0], (1 - t).clamp(min=0.05)[:, None]
    expected = ((guess - x) / share - (x1 - x) / share).square().mean(1)
    torch.testing.assert_close(flow.loss(lambda x, t: guess, x1, x0, t), expected)
    # On every path it is the loss of the velocity up to the clamp, and the direction's loss is finite at the end, too.
    for path in PATHS:
        flow, turned, early = Flow(path, "data"), Flow(path, "data", direction_weight=0.5), t[:2] + 0.1
        x, velocity = flow.interpolate(x0[:2], x1[:2], early)
        expected = (flow.convert(guess[:2], x, early, "velocity") - velocity).square().mean(1)
        torch.testing.assert_close(flow.loss(lambda x, t: guess[:2], x1[:2], x0[:2], early), expected)
        assert turned.loss(lambda x, t: guess, x1, x0, t).isfinite().all()
        assert flow.loss(lambda x, t: x1, x1, x0, t).abs().max() < 1e-12


def test_loss_with_everything_given_is_pure_and_has_the_weights_it_names() -> None:
    x0, x1, t = normal(3, 2, 4, 4, seed=1), normal(3, 2, 4, 4, seed=2), torch.tensor([0.2, 0.5, 0.9]).double()
    flow, seen = Flow("Linear", "Noise", "Likelihood"), []
    state = torch.get_rng_state()
    loss = flow.loss(lambda x, t: seen.append(t) or x, x1, x0, t)
    assert torch.equal(state, torch.get_rng_state())
    x = t.reshape(-1, 1, 1, 1) * x1 + (1 - t.reshape(-1, 1, 1, 1)) * x0
    torch.testing.assert_close(loss, (x - x0).square().mean((1, 2, 3)) / (t * (1 - t)))  # gain = (1 - t) / t
    assert seen[0].dtype == x1.dtype
    assert Flow().loss(lambda x, t: x, x1.float()).shape == (3,)


def test_direction_weight_adds_the_cosine_of_the_velocity() -> None:
    x0, x1, t = normal(3, 2, 4, seed=1), normal(3, 2, 4, seed=2), torch.tensor([0.2, 0.5, 0.9]).double()
    right, turned = Flow(), Flow(direction_weight=0.5)
    # Half the target has the right direction; the opposite has cosine -1 everywhere.
    for factor, extra in ((0.5, 0.0), (-1.0, 1.0)):
        loss, base = (f.loss(lambda x, t, s=factor: s * (x1 - x0), x1, x0, t) for f in (turned, right))
        torch.testing.assert_close(loss - base, torch.full_like(loss, extra))
    score, velocity = (Flow("gvp", p, direction_weight=1.0) for p in ("score", "velocity"))
    c = score.coefficients(t).sigma.reshape(-1, 1, 1)
    assert score.loss(lambda x, t: -x0 / c, x1, x0, t).abs().max() < 1e-12
    assert velocity.loss(lambda x, t: velocity.interpolate(x0, x1, t)[1], x1, x0, t).abs().max() < 1e-12


def test_intervals_are_the_published_ones() -> None:
    assert Flow().interval() == Flow("gvp").interval(training=True) == (0, 1)
    assert Flow("linear", "score").interval() == Flow("gvp", "noise").interval(training=True) == (1e-3, 1 - 1e-3)
    assert Flow("vp").interval() == (0, 1 - 1e-3)
    assert Flow("gvp", "data").interval() == Flow("linear", "data").reversed_interval() == (0, 1 - 1e-3)
    assert Flow("vp", "data").reversed_interval() == (0, 1 - 1e-3)
    assert Flow("linear", "data").sde_interval("sigma", 0.04, True) == (0, 0.96)
    assert Flow("vp", "noise").interval(training=True) == (0, 1 - 1e-5)
    assert Flow().sde_interval("sigma", 0.04, True) == (0, 0.96)
    assert Flow().sde_interval("SBDM", 0.04, True) == (1e-3, 0.96)
    assert Flow("vp").reversed_interval() == pytest.approx((1e-3, 1 - 1e-5), rel=1e-12)
    assert Flow("vp").sde_interval("sbdm", 0.0, True) == (0, 1 - 1e-3)
    assert Flow().sde_interval("sigma", 0.0, True) == (0, 1 - 1e-3)
    assert Flow().sde_interval("sigma", 0.0, False) == (0, 1)
    assert Flow("gvp", "score").sde_interval("linear", 0.1, False) == (1e-3, 0.9)


def test_draws_of_t() -> None:
    u = (torch.arange(10000, dtype=torch.float64) + 0.5) / 10000
    assert torch.equal(draw_timesteps(Flow(), u), u)
    assert draw_timesteps(Flow("linear", "score"), u).max() < 1 - 1e-3 < draw_timesteps(Flow("vp", "score"), u).max()
    t = draw_timesteps(Flow(), u, "logit_normal", logit_mean=0.5, logit_std=2.0)
    assert t.logit().mean().item() == pytest.approx(0.5, abs=1e-3)
    assert t.logit().std().item() == pytest.approx(2.0, abs=1e-2)
    # A shift of 3 at noise level 1/2 gives noise level 3/4 (arXiv 2403.03206, eq. 23).
    assert draw_timesteps(Flow(), torch.tensor([0.5]), time_shift=3.0).item() == pytest.approx(0.25)
    assert [shift_time(u, 7.0) for u in (0, 1)] == [0, 1]
    positions = torch.tensor([5, 0, 7, 2])
    t = draw_timesteps(Flow(), torch.tensor([0.0, 0.5, 0.999, 0.25]), stratum=(positions, 8))
    assert torch.equal((t * 8).floor().long(), positions)


def test_conversion_to_diffusers_is_its_own_inverse() -> None:
    v = normal(2, 3)
    sigma, output = to_diffusers(0.3, v)
    assert (sigma, output[0, 0]) == (0.7, -v[0, 0])
    t, velocity = to_diffusers(sigma, output)
    assert t == pytest.approx(0.3)
    assert torch.equal(velocity, v)


def test_bad_input() -> None:
    x1 = normal(3, 4)
    for build in (
        lambda: Flow("cosine"),
        lambda: Flow(prediction="x0"),
        lambda: Flow(loss_weight="snr"),
        lambda: Flow(direction_weight=-1.0),
        lambda: Flow().diffusion(0.5, "sgima", 1.0),
        lambda: Flow().diffusion(0.5, "sigma", math.nan),
        lambda: draw_timesteps(Flow(), torch.rand(3), "normal"),
        lambda: draw_timesteps(Flow(), torch.rand(3), "logit_normal", logit_std=0.0),
        lambda: draw_timesteps(Flow(), torch.rand(3), time_shift=0.0),
        lambda: Flow().loss(lambda x, t: x[:, :2], x1),
        lambda: Flow().loss(lambda x, t: x, x1, x0=x1[:2]),
        lambda: Flow().loss(lambda x, t: x, x1, t=torch.rand(2)),
        lambda: Flow().loss(lambda x, t: x, x1, t=torch.tensor(0.5)),
        lambda: Flow().interpolate(x1[:1], x1, torch.rand(3)),
        lambda: Flow().velocity(lambda x, t: x, x1, torch.rand(2)),
        lambda: Flow("gvp", "noise").score(lambda x, t: x, x1, torch.rand(3, 1)),
        lambda: Flow().convert(x1, x1, 0.5, "image"),
    ):
        with pytest.raises(UserError, match="expected"):
            build()
    with pytest.raises(UserError, match=r"'Cosine'.*linear, gvp, vp"):
        Flow("Cosine")
    with pytest.raises(UserError, match=r"'sgima'.*Did you mean 'sigma'"):
        Flow().diffusion(0.5, "sgima", 1.0)


@pytest.mark.parametrize("path", PATHS)
@pytest.mark.parametrize("prediction", ["velocity", "score", "noise", "data"])
def test_states_may_be_one_number_a_sample(path: str, prediction: str) -> None:
    x1, x0, t = normal(5), normal(5, seed=1), torch.linspace(0.2, 0.9, 5, dtype=torch.float64)
    flow = Flow(path, prediction, "velocity", direction_weight=0.5)
    model, column = (lambda x, t: 0.3 * x + t), (lambda x, t: 0.3 * x + t[:, None])
    torch.testing.assert_close(flow.loss(model, x1, x0, t), flow.loss(column, x1[:, None], x0[:, None], t))
    assert flow.loss(model, x1).shape == (5,)
