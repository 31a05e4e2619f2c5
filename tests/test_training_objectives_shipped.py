"""The objectives that ship, against numpy, and when an objective takes part: weight, start and stop_at."""

import math
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from launch import train_in
from safetensors.torch import load_file
from tiny_run import assert_identical, forget_processes, losses, make_inputs
from torch import Tensor

from vit5gen.config import Config, load_config
from vit5gen.flow import Flow
from vit5gen.models import SiTTransformer2DModel
from vit5gen.system.errors import UserError
from vit5gen.training.batches import RandomLatents, micro_batches
from vit5gen.training.build import check_values
from vit5gen.training.dry_run import describe, run_cost
from vit5gen.training.loop import Learner, build_trainer, train_step
from vit5gen.training.objectives import OBJECTIVES, Batch, Objective, shared_options
from vit5gen.training.run_folder import to_yaml
from vit5gen.training.trainer import Trainer

Objectives = dict[str, dict[str, Any]]
WINDOW: Objectives = {"flow": {}, "self_alignment": {"start": 1, "stop_at": 3}}


def configure(file: Path, objectives: Objectives, **more: Any) -> Config:
    return load_config(file, {"training.objectives": objectives, **more})


def begin(config: Config, start: Path | None = None) -> tuple[Trainer, Iterator[Batch]]:
    """Return a trainer and its batches of random latents."""
    forget_processes()
    accelerator = Accelerator(cpu=True)
    trainer = build_trainer(config, accelerator)
    if start is not None:
        trainer.restore(start)
    source = RandomLatents(config.latent_shape, config.num_classes)
    return trainer, micro_batches(config, source, None, accelerator, trainer.step)


def state(trainer: Trainer) -> dict[str, Tensor]:
    """Return every tensor that a checkpoint would hold, as it is now."""
    files = trainer._gather([*trainer._files(), ("optimizer", trainer._moments())])
    return {f"{file}/{name}": value.clone() for file, found in files.items() for name, value in found.items()}


def train_states(config: Config, steps: int) -> tuple[list[dict[str, float]], list[dict[str, Tensor]]]:
    """Return the losses of each step, and the state before the first and after each."""
    trainer, batches = begin(config)
    found, states = [], [state(trainer)]
    for _ in range(steps):
        found.append(train_step(trainer, config, batches).losses)
        states.append(state(trainer))
    return found, states


def draw(**more: Any) -> tuple[SiTTransformer2DModel, Batch, Tensor]:
    """Return a small model, a batch of four and a state of its tokens."""
    model = SiTTransformer2DModel(
        "vit5", 4, 2, 3, num_classes=2, hidden_size=8, num_layers=8, num_attention_heads=2, **more
    )
    torch.manual_seed(1)
    x1, hidden, t = torch.randn(4, 3, 4, 4), torch.randn(4, 4, 8, requires_grad=True), torch.rand(4)
    return model, Batch(x1, x1, t.long(), t, t.long(), 0, None, t, x1, x1), hidden


@pytest.mark.parametrize("tau", [0.5, 2.0])
def test_dispersive_is_the_mean_over_all_pairs(tau: float) -> None:
    model, batch, hidden = draw()
    objective = OBJECTIVES.get("dispersive")(model, Flow(), tau=tau)
    assert objective.taps == (2,)  # a quarter of the depth
    assert not list(objective.parameters())
    z = hidden.detach().double().numpy().reshape(4, -1)
    pairs = [np.exp(-np.mean((z[i] - z[j]) ** 2) / tau) for i in range(4) for j in range(4)]
    found = objective(batch.x1, {2: hidden}, batch, 0)
    np.testing.assert_allclose(found.detach(), [np.log(np.mean(pairs))] * 4, rtol=1e-5)
    # Autocast rounds nothing of it; doubles stay; one image has no other.
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(objective(batch.x1, {2: hidden}, batch, 0), found)
    assert objective(batch.x1, {2: hidden.double()}, batch, 0).dtype == torch.float64
    alone = objective(batch.x1[:1], {2: hidden[:1]}, batch, 0)
    assert alone.item() == 0
    # Its gradient against central differences in fp64.
    double = hidden.detach().double().requires_grad_()
    assert torch.autograd.gradcheck(lambda h: objective(batch.x1, {2: h}, batch, 0).mean(), double)


def test_self_alignment_is_smooth_l1_to_the_latents_of_each_patch() -> None:
    model, batch, hidden = draw()
    objective = OBJECTIVES.get("self_alignment")(model, Flow(), beta=0.3)
    x = hidden.detach().double().numpy()
    layers = [one for one in objective.projector if isinstance(one, torch.nn.Linear)]
    assert [layer.weight.shape for layer in layers] == [(16, 8), (16, 16), (16, 16), (16, 16), (12, 16)]
    for number, layer in enumerate(layers):
        x = x if number == 0 else x / (1 + np.exp(-x))
        x = x @ layer.weight.detach().double().numpy().T + layer.bias.detach().double().numpy()
    expected = np.zeros(4)
    for i in range(4):
        for row in range(2):
            for column in range(2):
                patch = batch.x1[i, :, 2 * row : 2 * row + 2, 2 * column : 2 * column + 2].double().numpy()
                d = np.abs(x[i, 2 * row + column] - patch.reshape(-1))
                expected[i] += np.where(d <= 0.3, d**2 / 0.6, d - 0.15).sum() / 48
    found = objective(batch.x1, {2: hidden}, batch, 0)
    np.testing.assert_allclose(found.detach(), expected, rtol=1e-5)


def test_the_projector_has_the_published_size() -> None:
    with torch.device("meta"):
        model = SiTTransformer2DModel.from_preset("XL/2", backbone="sit", sample_size=32, in_channels=4)
        objective = OBJECTIVES.get("self_alignment")(model, Flow())
    assert sum(one.numel() for one in objective.parameters()) == pytest.approx(18.6e6, rel=5e-3)


@pytest.mark.parametrize(("name", "tap"), [("dispersive", 2), ("self_alignment", 1)])
@pytest.mark.parametrize("backbone", ["vit5", "sit"])
def test_gradients_reach_what_is_before_the_tap_alone(config_file: Path, name: str, tap: int, backbone: str) -> None:
    kwargs = {"model.backbone": backbone, "model.num_layers": 3, "model.backbone_kwargs": {}}
    config = configure(config_file, {"flow": {"start": 1}, name: {"tap": tap}}, **kwargs)
    trainer, batches = begin(config)
    learner = trainer.module
    with torch.no_grad():
        for parameter in learner.parameters():  # gates that begin at 0 let nothing through
            parameter.add_(0.1 * torch.randn_like(parameter))
    batch = next(batches)
    t = torch.rand(len(batch.x1))
    learner(Batch(**vars(batch) | {"t": t, "x_t": batch.x1, "velocity": batch.x0}), 0).sum().backward()
    reached = {key for key, one in learner.named_parameters() if one.grad is not None and one.grad.any()}
    after = tuple(f"model.backbone.blocks.{k}." for k in range(tap, 3))
    every = {key for key, _ in learner.named_parameters()}
    assert reached == {key for key in every if not key.startswith((*after, "model.head.", "model.backbone.norm."))}
    assert any(key.startswith("objectives.") for key in reached) == (name == "self_alignment")


def test_weight_0_is_absence(config_file: Path) -> None:
    off = {"weight": 0, "start": 1}
    for plain, more in (
        ({"flow": {}}, {"self_alignment": off, "flow": {}, "dispersive": off}),
        ({"flow": {}, "self_alignment": {}}, {"flow": {}, "dispersive": off, "self_alignment": {}}),
    ):
        (one, before), (two, after) = (train_states(configure(config_file, chosen), 3) for chosen in (plain, more))
        assert one == two
        assert all(loss.keys() == plain.keys() for loss in two)
        assert_identical(before[-1], after[-1])


def test_an_objective_is_called_in_its_steps_alone(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    called: list[int] = []
    kind = OBJECTIVES.get("self_alignment")
    forward = kind.forward

    def count(self: Objective, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch, step: int) -> Tensor:
        called.append(step)
        assert hidden.keys() == {2}
        return forward(self, prediction, hidden, batch, step)

    monkeypatch.setattr(kind, "forward", count)
    config = configure(config_file, WINDOW)
    found, states = train_states(config, 5)
    assert called == [1, 2]
    assert [loss["self_alignment"] > 0 for loss in found] == [False, True, True, False, False]
    assert [Learner(config).objectives.taps_at(step) for step in range(4)] == [(), (2,), (2,), ()]
    # The projector moves in these steps alone, without decay outside them.
    names = [name for name in states[0] if name.startswith("objectives/")]
    moved = [any(not torch.equal(a[name], b[name]) for name in names) for a, b in pairwise(states)]
    assert moved == [False, True, True, False, False]
    # Before its first step the run is that without it.
    plain, other = train_states(configure(config_file, {"flow": {}}), 2)
    assert found[0]["flow"] == plain[0]["flow"]
    assert_identical({k: v for k, v in states[1].items() if k in other[1]}, other[1])
    assert found[2]["flow"] != pytest.approx(plain[1]["flow"], abs=1e-9)


@pytest.mark.parametrize("saved_at", [2, 4])
def test_a_run_resumes_bit_for_bit_across_the_window(config_file: Path, tmp_path: Path, saved_at: int) -> None:
    config = configure(config_file, WINDOW)
    trainer, batches = begin(config)
    for _ in range(saved_at):
        train_step(trainer, config, batches)
    assert trainer.save(tmp_path / "checkpoints", to_yaml(config))
    resumed, rest = begin(config, tmp_path / f"checkpoints/step_{saved_at:08d}")
    for _ in range(saved_at, 6):
        assert train_step(trainer, config, batches) == train_step(resumed, config, rest)
    assert_identical(state(trainer), state(resumed))


def test_an_option_that_a_plug_declares_is_its_own(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Stops(Objective):
        def __init__(self, model: SiTTransformer2DModel, flow: Flow, *, stop_at: int = 0, weight: float = 1) -> None:
            super().__init__(model, flow)
            self.stop_at, self.weight = stop_at, weight

        def forward(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch, step: int) -> Tensor:
            return prediction.flatten(1).mean(1) * (step < self.stop_at)

    monkeypatch.setitem(OBJECTIVES._known, "stops", Stops)
    config = configure(config_file, {"stops": {"weight": 2, "stop_at": 3, "start": 0}})
    built: Any = Learner(config).objectives
    assert (built["stops"].stop_at, built["stops"].weight) == (3, 1)  # the weight was always that of the sum
    (shared,) = shared_options(config.training).values()
    assert (shared.weight, shared.always) == (2, True)


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"dispersive": {"tap": 3}}, "training.objectives.dispersive: tap 3 does not exist; expected 1 to 2"),
        ({"self_alignment": {"tap": 3}}, "self_alignment: tap 3 does not exist; expected 1 to 2"),
        ({"self_alignment": {"tap": 0}}, "self_alignment: tap = 0"),
        ({"dispersive": {"tau": 0}}, "dispersive: tau = 0: set it to a number greater than 0"),
        ({"dispersive": {"weight": -0.5}}, "dispersive: weight = -0.5: set it to a number greater than or equal to 0"),
        ({"dispersive": {"start": -1}}, "dispersive: start = -1: set it to a number greater than or equal to 0"),
        (
            {"dispersive": {"start": 5, "stop_at": 3}},
            "training.objectives.dispersive: stop_at = 3: comes before start = 5; set it to a later step",
        ),
        ({"dispersive": {"start": 5, "stop_at": 5}}, "stop_at = 5: equals start = 5; set it to a later step"),
        ({"dispersive": {"weight": 0, "tau": -1}}, "dispersive: tau = -1"),
        ({"dispersive": {"start": 5}}, "training.objectives: none is active at step 0; set start or stop_at"),
        (
            {"flow": {"stop_at": 3}, "dispersive": {"start": 4}},
            "training.objectives: none is active at step 3; set start or stop_at so that one is",
        ),
        ({"flow": {"weight": 0}, "dispersive": {"weight": 0}}, "training.objectives: every weight is 0; set one"),
    ],
)
def test_what_does_not_fit_is_told(config_file: Path, objectives: Objectives, message: str) -> None:
    with pytest.raises(UserError, match=message.replace("(", r"\(")):
        check_values(configure(config_file, objectives))


def test_the_dry_run_counts_flops_for_the_steps_of_an_objective(config_file: Path) -> None:
    plain = run_cost(configure(config_file, {"flow": {}}))
    config = configure(config_file, {"flow": {}, "self_alignment": {"start": 2, "stop_at": 5}})
    found, width, (channels, height, side) = run_cost(config), 32, config.latent_shape
    products = width * 2 * width + 3 * (2 * width) ** 2 + 2 * width * channels * 4
    whole = 3 * 2 * height * side // 4 * products  # forward, and backward to input and weights
    assert found.objective_flops == whole
    assert found.training_flops - plain.training_flops == whole - round(0.7 * whole)  # 3 of 10 steps
    assert "G in objectives while active (<0.01 G on average), per image" in describe(config, found)[1]
    longer = configure(config_file, {"flow": {}, "self_alignment": {"stop_at": 50}})
    assert run_cost(longer).training_flops - plain.training_flops == whole
    assert run_cost(configure(config_file, {"flow": {}, "dispersive": {}})).uncounted == ()


@pytest.mark.slow
def test_two_processes_train_alike_across_the_window(tmp_path: Path) -> None:
    objectives = {"flow": {}, "self_alignment": {"start": 2, "stop_at": 6}}
    settings = {"training.num_steps": 9, "training.objectives": objectives, "training.checkpoint_every": 3}
    config = make_inputs(tmp_path)
    jobs = [
        {"config": config, "output": tmp_path / name, "overrides": settings | {"training.micro_batch_size": size}}
        for name, size in (("whole", None), ("accumulated", 1))
    ]
    assert train_in(2, jobs, tmp_path) == ([0, 0], [])
    (tmp_path / "one").mkdir()
    assert train_in(1, [job | {"output": tmp_path / "one/run"} for job in jobs[:1]], tmp_path / "one") == ([0], [])
    sharded = [job | {"output": tmp_path / "fsdp"} for job in jobs[:1]]
    assert train_in(2, sharded, tmp_path, fsdp=True)[0] == [0]

    def projector(run: str, step: int) -> dict[str, Tensor]:
        return load_file(tmp_path / run / f"checkpoints/step_{step:08d}/objectives.safetensors")

    for run in ("whole", "accumulated", "fsdp"):
        np.testing.assert_allclose(losses(tmp_path / run), losses(tmp_path / "one/run"), atol=1e-4)
        mine, other = projector(run, 9), projector("one/run", 9)
        assert max(float((mine[name] - other[name]).abs().max()) for name in mine) < 1e-4
        assert math.isfinite(losses(tmp_path / run)[-1])
