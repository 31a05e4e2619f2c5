"""Objectives: the default one, and one of a user's own with taps, options and parameters."""

import json
from pathlib import Path
from typing import Annotated, Any

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from pydantic import Field
from tiny_run import assert_identical, make_inputs, run, weights
from torch import Tensor, nn

from vit5gen.config import load_config
from vit5gen.flow import Flow
from vit5gen.models import SiTTransformer2DModel
from vit5gen.system.errors import UserError
from vit5gen.training import register_objective
from vit5gen.training.cost import checkpoint_bytes
from vit5gen.training.dry_run import describe, run_cost
from vit5gen.training.objectives import OBJECTIVES, Batch, Objective
from vit5gen.training.random import sample_draws


@register_objective("test-look-ahead")
class LookAhead(Objective):
    """Early states, projected, point where late ones do; until ``stop_at``."""

    def __init__(
        self,
        model: SiTTransformer2DModel,
        flow: Flow,
        *,
        early: Annotated[int, Field(ge=1)] = 1,
        late: int = 2,
        stop_at: int | None = None,
    ) -> None:
        super().__init__(model, flow)
        width = model.config.hidden_size
        self.taps, self.stop_at = (early, late), stop_at
        self.projector = nn.Linear(width, width)

    def forward(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch, step: int) -> Tensor:
        if self.stop_at is not None and step >= self.stop_at:
            return prediction.new_zeros(len(prediction))
        assert batch.x1.shape == batch.x0.shape == batch.x_t.shape == prediction.shape
        early, late = (hidden[k] for k in self.taps)
        return (1 - F.cosine_similarity(self.projector(early), late.detach(), dim=-1)).mean(1)


@register_objective("test-reads-values")
class ReadsValues(Objective):
    """What no meta tensor lets one do."""

    def forward(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch, step: int) -> Tensor:
        return prediction.mean((1, 2, 3)) * float(batch.t.sum())


@register_objective("test-tells-flops")
class TellsFlops(ReadsValues):
    """What tells its cost itself."""

    def flops(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch) -> int:
        return 5 * 10**9


@register_objective("test-image")
class NeedsImage(Objective):
    """Sees the images of the batch."""

    needs_image = True

    def forward(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch, step: int) -> Tensor:
        assert batch.image is not None
        assert batch.image.dtype == torch.uint8
        return batch.image.float().mean((1, 2, 3)) + 0 * prediction.mean((1, 2, 3))


BOTH = {"flow": {}, "test-look-ahead": {"weight": 0.5, "stop_at": 7}}


@pytest.fixture
def config_file(tmp_path: Path) -> Path:
    return make_inputs(tmp_path)


def test_an_objective_with_parameters_trains_resumes_and_stays_out_of_the_pipeline(
    config_file: Path, tmp_path: Path
) -> None:
    steps: dict[str, Any] = {"training__num_steps": 9, "training__checkpoint_every": 3, "training__objectives": BOTH}
    assert run(config_file, tmp_path / "whole", **steps) == 0
    assert run(config_file, tmp_path / "parts", **steps | {"training__num_steps": 6}) == 0
    assert run(config_file, tmp_path / "parts", **steps) == 0
    checkpoint = tmp_path / "whole/checkpoints/step_00000009"
    names = {file.stem for file in checkpoint.glob("*.safetensors")}
    assert names == {"model", "optimizer", "objectives"} | {
        f"{of}ema_{d}" for of in ("", "objectives_") for d in (0.9, 0.99)
    }
    for name in names:
        mine, other = (
            safetensors.torch.load_file(tmp_path / run_name / f"checkpoints/step_00000009/{name}.safetensors")
            for run_name in ("whole", "parts")
        )
        assert_identical(mine, other)
    projector = safetensors.torch.load_file(checkpoint / "objectives.safetensors")
    assert set(projector) == {"test-look-ahead.projector.weight", "test-look-ahead.projector.bias"}
    pipeline = tmp_path / "whole/pipeline/transformer/diffusion_pytorch_model.safetensors"
    assert not any("projector" in name for name in safetensors.torch.load_file(pipeline))
    with pytest.raises(UserError, match=r"training.objectives: \{.*look-ahead.*\} -> \{'flow': \{\}\}"):
        run(config_file, tmp_path / "whole", training__num_steps=10)


def test_the_weighted_sum_is_what_the_log_shows(config_file: Path, tmp_path: Path) -> None:
    run(config_file, tmp_path / "run", training__num_steps=8, training__log_every=1, training__objectives=BOTH)
    lines = [json.loads(line) for line in (tmp_path / "run/log.jsonl").read_text().splitlines()]
    for line in lines:
        assert line["loss"] == pytest.approx(line["loss_flow"] + line["loss_test-look-ahead"], rel=1e-6)
    assert lines[6]["loss_test-look-ahead"] > 0 == lines[7]["loss_test-look-ahead"]
    run(config_file, tmp_path / "plain", training__num_steps=1)
    assert "loss_flow" not in (tmp_path / "plain/log.jsonl").read_text()
    assert weights(tmp_path / "plain", 1)


def test_the_images_are_there_for_the_objective_that_asks(config_file: Path, tmp_path: Path) -> None:
    both = {"flow": {}, "test-image": {"weight": 1e-3}}
    for name, from_images in (("encoded", True), ("beside", False)):
        run(
            config_file,
            tmp_path / name,
            training__objectives=both,
            data__from_images=from_images,
            training__num_steps=2,
        )
    seen = [
        [json.loads(line)["loss_test-image"] for line in (tmp_path / name / "log.jsonl").read_text().splitlines()]
        for name in ("encoded", "beside")
    ]
    assert seen[0] == seen[1]  # of the same images, and mirror images


@pytest.mark.parametrize(
    ("objectives", "message"),
    [
        ({"flwo": {}}, "objective: 'flwo' is not known; expected one of .*Did you mean 'flow'"),
        ({"flow": {"tap": 1}}, r"training.objectives.flow: 'tap' is not an option of 'flow'"),
        ({"flow": {"weight": -1}}, "training.objectives.flow: weight = -1: set it to a number greater than or equal"),
        ({"flow": {"weight": 0}}, "training.objectives: every weight is 0; set one to a number greater than 0"),
        ({"test-look-ahead": {"early": 0}}, r"training.objectives.test-look-ahead: early = 0"),
        ({"test-look-ahead": {"early": "one"}}, r"training.objectives.test-look-ahead: early = 'one'"),
        ({"test-look-ahead": {"late": 3}}, r"test-look-ahead: tap 3 does not exist; expected 1 to 2"),
        ({}, "training.objectives"),
    ],
)
def test_what_does_not_fit_is_refused_before_data_are_opened(
    config_file: Path, tmp_path: Path, objectives: dict[str, Any], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        run(config_file, tmp_path / "run", training__objectives=objectives, data__path=str(tmp_path / "absent"))
    assert not (tmp_path / "run").exists()


def test_the_default_objective_is_the_loss_of_the_flow(config_file: Path) -> None:
    flow = Flow("gvp", "noise", "velocity", direction_weight=0.5)
    model = SiTTransformer2DModel("sit", 4, 2, 3, num_classes=2, hidden_size=32, num_layers=1, num_attention_heads=2)
    draws = [sample_draws(0, step, 0, (3, 4, 4)) for step in range(2)]
    x1, x0 = torch.stack([d.posterior for d in draws]), torch.stack([d.noise for d in draws])
    t, labels = torch.tensor([0.3, 0.7]), torch.tensor([0, 1])
    nn.init.normal_(model.head.linear.weight)
    x_t, velocity = flow.interpolate(x0, x1, t)
    prediction = model(x_t, t, labels)
    objective = OBJECTIVES.get("flow")(model, flow)
    batch = Batch(x1, x0, labels, t, t, 0, None, t, x_t, velocity)
    expected = flow.loss(lambda x, t: model(x, t, labels), x1, x0, t)
    assert torch.equal(objective(prediction, {}, batch, 0), expected)
    assert load_config(config_file).training.objectives == {"flow": {}}


def test_an_objective_follows_the_models_type_and_its_leaving_is_told(config_file: Path, tmp_path: Path) -> None:
    both: dict[str, Any] = {"flow": {}, "test-look-ahead": {"weight": "1e-1"}}
    options: dict[str, Any] = {"training__precision": "fp64", "training__objectives": both}
    assert run(config_file, tmp_path / "run", training__num_steps=2, **options) == 0
    saved = safetensors.torch.load_file(tmp_path / "run/checkpoints/step_00000002/objectives.safetensors")
    assert {value.dtype for value in saved.values()} == {torch.float64}
    with pytest.raises(UserError, match="which this run lacks; resume with the same optimizer"):
        run(config_file, tmp_path / "run", accept=True, training__num_steps=3, training__precision="fp64")


def test_the_dry_run_counts_the_parameters_of_objectives(config_file: Path) -> None:
    plain, both = (load_config(config_file, {"training.objectives": chosen}) for chosen in ({"flow": {}}, BOTH))
    width, one, two = plain.model.hidden_size, run_cost(plain), run_cost(both)
    assert width is not None
    assert (one.of_objectives, two.of_objectives) == (0, width * width + width)
    assert (
        checkpoint_bytes(two, both) - checkpoint_bytes(one, plain) == 5 * 4 * two.of_objectives
    )  # weights, 2 averages, 2 moments
    assert f"{one.parameters:,} parameters, {two.of_objectives:,} more in objectives" in describe(both, two)[0]


def test_the_dry_run_counts_the_flops_of_objectives(config_file: Path) -> None:
    names = (None, "test-look-ahead", "test-image", "test-tells-flops", "test-reads-values")
    chosen = [{"flow": {}} | ({} if name is None else {name: {}}) for name in names]
    configs = [load_config(config_file, {"training.objectives": one}) for one in chosen]
    plain, ahead, image, told, unknown = (run_cost(config) for config in configs)
    (_, height, side), patch, width = configs[0].latent_shape, configs[0].model.patch_size, configs[0].model.hidden_size
    assert patch is not None
    assert width is not None
    # A linear layer on each token: one product forward, two backward, a multiply-add being two.
    tokens = height * side // patch**2
    assert ahead.training_flops - plain.training_flops == ahead.objective_flops == 3 * 2 * tokens * width**2
    assert (plain.objective_flops, image.objective_flops, told.objective_flops) == (0, 0, 5 * 10**9)
    assert (image.uncounted, told.uncounted, unknown.uncounted) == ((), (), ("test-reads-values",))
    assert "G backward, per image" in describe(configs[0], plain)[1]
    assert "5 G in objectives, per image" in describe(configs[3], told)[1]
    assert "not counted: test-reads-values" in describe(configs[4], unknown)[1]
