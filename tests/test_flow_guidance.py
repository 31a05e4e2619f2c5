"""Guidance: what it computes, where, on which channels, at what cost."""

import math

import pytest
import torch
from flow_mixture import CountingModel
from torch import Tensor

from vit5gen.flow import Flow, GuidedModel, sample_ode
from vit5gen.system.errors import UserError

NULL = 9


def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    """Answer elementwise, differently for every label."""
    return x * (labels + 1).reshape(-1, 1, 1, 1) / 10 + t.reshape(-1, 1, 1, 1)


def weak(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
    return 0.5 * model(x, t, labels) + 0.1


@pytest.fixture
def batch() -> tuple[Tensor, Tensor, Tensor]:
    x = torch.randn(7, 4, 3, 3, generator=torch.Generator().manual_seed(0))
    return x, torch.linspace(0, 1, 7), torch.tensor([0, 1, 2, 3, 4, 5, NULL])


def test_formula(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, y = batch
    c, u, w = model(x, t, y), model(x, t, torch.full_like(y, NULL)), weak(x, t, y)
    cfg = GuidedModel(model, y, 2.5, NULL)(x, t)
    torch.testing.assert_close(cfg, u + 2.5 * (c - u))
    auto = GuidedModel(model, y, weak_model=weak, weak_scale=1.7)(x, t)
    torch.testing.assert_close(auto, w + 1.7 * (c - w))
    both = GuidedModel(model, y, 2.5, NULL, weak_model=weak, weak_scale=1.7)(x, t)
    torch.testing.assert_close(both, c + 1.5 * (c - u) + 0.7 * (c - w))


def test_only_the_first_channels_are_guided_if_so_asked(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, y = batch
    three, every = GuidedModel(model, y, 4.0, NULL, channels=3)(x, t), GuidedModel(model, y, 4.0, NULL)(x, t)
    assert torch.equal(three[:, :3], every[:, :3])
    assert torch.equal(three[:, 3:], model(x, t, y)[:, 3:])


def test_each_sample_is_guided_at_its_own_times(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, y = batch
    guided = GuidedModel(model, y, 3.0, NULL, interval=(0.3, 0.7))(x, t)
    inside = (t >= 0.3) & (t <= 0.7)
    assert torch.equal(guided[inside], GuidedModel(model, y, 3.0, NULL)(x, t)[inside])
    assert torch.equal(guided[~inside], model(x, t, y)[~inside])
    for i in range(7):
        alone = GuidedModel(model, y[i : i + 1], 3.0, NULL, interval=(0.3, 0.7))
        assert torch.equal(alone(x[i : i + 1], t[i : i + 1]), guided[i : i + 1])


def test_the_ends_of_the_interval_belong_to_it(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, _, y = batch
    for end in (0.1, 0.7):  # in float32 the one is above, the other below its decimal
        t = torch.full((7,), end)
        assert not torch.equal(GuidedModel(model, y, 3.0, NULL, interval=(0.1, 0.7))(x, t), model(x, t, y))


@pytest.mark.parametrize(
    ("options", "calls", "rows"),
    [
        ({}, 1, 7),
        ({"scale": 1}, 1, 7),
        ({"scale": 2.0}, 1, 14),
        ({"scale": 2.0, "interval": (0.0, 0.4)}, 1, 7),
        ({"weak_model": weak, "weak_scale": 2.0}, 1, 7),
        ({"scale": 0.0}, 1, 14),
    ],
)
def test_cost(batch: tuple[Tensor, Tensor, Tensor], options: dict, calls: int, rows: int) -> None:
    counted, (x, _, y) = CountingModel(model), batch
    guided = GuidedModel(counted, y, null_label=NULL, **options)
    guided(x, torch.full((7,), 0.5))
    assert (counted.calls, counted.rows) == (calls, rows)
    assert guided.rows == rows + 7 * ("weak_model" in options)


@pytest.mark.parametrize("method", ["heun", "dopri5"])
def test_a_scale_of_one_is_unguided_bit_for_bit(batch: tuple[Tensor, Tensor, Tensor], method: str) -> None:
    x, _, y = batch
    plain = sample_ode(Flow(), lambda x, t: model(x, t, y), x, 5, method)
    assert torch.equal(plain, sample_ode(Flow(), GuidedModel(model, y, 1.0, NULL), x, 5, method))
    assert torch.equal(plain, sample_ode(Flow(), GuidedModel(model, y, 1.0, weak_model=weak), x, 5, method))


@pytest.mark.parametrize("prediction", ["score", "noise", "data"])
def test_guiding_a_prediction_is_guiding_its_velocity(batch: tuple[Tensor, Tensor, Tensor], prediction: str) -> None:
    x, _, y = batch
    flow = Flow("gvp", prediction)
    c, u = (flow.velocity(lambda x, t, y=y: model(x, t, y), x, 0.4) for y in (y, torch.full_like(y, NULL)))
    torch.testing.assert_close(flow.velocity(GuidedModel(model, y, 2.5, NULL), x, 0.4), u + 2.5 * (c - u))


def test_the_null_label_is_the_models_own(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, y = batch
    owner = CountingModel(model)
    owner.null_label = NULL
    assert torch.equal(GuidedModel(owner, y, 2.0)(x, t), GuidedModel(model, y, 2.0, NULL)(x, t))


def test_bad_input(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, y = batch
    for options in (
        {"scale": math.nan},
        {"scale": math.inf},
        {"weak_model": weak, "weak_scale": -math.inf},
        {"interval": (0.7, 0.3)},
        {"interval": (-0.1, 0.3)},
        {"interval": (0.5,)},
        {"interval": (0.0, 1.5)},
        {"channels": 0},
        {"weak_scale": 2.0},
    ):
        with pytest.raises(UserError, match=next(reversed(options))):
            GuidedModel(model, y, null_label=NULL, **options)
    with pytest.raises(UserError, match="null_label"):
        GuidedModel(model, y, 2.0)
    with pytest.raises(UserError, match="only 4"):
        GuidedModel(model, y, 2.0, NULL, channels=5)(x, t)
    with pytest.raises(UserError, match=r"class_labels: shape \(6,\)"):
        GuidedModel(model, y[:6], 2.0, NULL)(x, t)


def test_a_model_of_the_wrong_shape_is_noticed(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, y = batch
    for wrong in (lambda x, t, y: model(x, t, y)[:, :1], lambda x, t, y: x[:1]):
        with pytest.raises(UserError, match="model output: shape"):
            Flow().velocity(GuidedModel(wrong, y, 2.0, NULL), x, t)


def test_states_may_be_one_number_a_sample() -> None:
    x, t, y = torch.randn(3, generator=torch.Generator().manual_seed(0)), torch.rand(3), torch.tensor([0, 1, 2])
    options = {"scale": 2.0, "null_label": NULL, "interval": (0.1, 0.9), "channels": 1}
    flat = GuidedModel(lambda x, t, y: x * (y + 1) + t, y, **options)(x, t)
    column = GuidedModel(lambda x, t, y: x * (y + 1)[:, None] + t[:, None], y, **options)(x[:, None], t)
    assert torch.equal(flat, column[:, 0])
    with pytest.raises(UserError, match="guidance_channels: 2; the model has only 1"):
        GuidedModel(lambda x, t, y: x, y, **options | {"channels": 2})(x, t)


def test_a_scale_may_change_between_evaluations(batch: tuple[Tensor, Tensor, Tensor]) -> None:
    x, t, y = batch
    scale = 1.0
    guided = GuidedModel(model, y, lambda: scale, NULL)
    for scale in (1.0, 3.0, 0.0, 1.0):
        assert torch.equal(guided(x, t), GuidedModel(model, y, scale, NULL)(x, t))
    for bad in (math.nan, math.inf, "2"):
        scale = bad
        with pytest.raises(UserError, match=r"guidance_scale: .*expected a finite number"):
            guided(x, t)
    scale = 2.0
    with pytest.raises(UserError, match="the model has no null label"):
        GuidedModel(model, y, lambda: scale)


def test_one_time_stays_one_time() -> None:
    times = []

    def model(x: Tensor, t: Tensor, labels: Tensor) -> Tensor:
        times.append(t.shape)
        return x

    x, y = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    for method, shape in (("heun", (1,)), ("dopri5", (6,))):
        times.clear()
        sample_ode(Flow(), GuidedModel(model, y, 2.0, NULL), x, 2, method)
        assert set(times) == {shape}
