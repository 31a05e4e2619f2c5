"""The step that is timed is the step that trains."""

from pathlib import Path

import pytest
import torch
from benchmark_peers import write_sit
from tiny_run import make_inputs, run, weights

from vit5gen.config import load_config
from vit5gen.lab.benchmark.engine import FULL, QUICK
from vit5gen.lab.benchmark.steps import OurStep, published_step, step_config
from vit5gen.training.batches import open_training_data
from vit5gen.training.build import build_model
from vit5gen.training.process import make_accelerator


def test_our_step_is_that_of_the_loop(tmp_path: Path) -> None:
    file, overrides = make_inputs(tmp_path), {"training.num_steps": 3, "training.warmup_steps": 2}
    run(file, tmp_path / "run", training__num_steps=3, training__warmup_steps=2)
    config = load_config(file, overrides)
    source, *_ = open_training_data(config, make_accelerator(config.training, tmp_path), None, False)
    step = OurStep(config, source)
    for _ in range(3):
        step()
    trained = weights(tmp_path / "run", 3)
    for name, weight in step.trainer.model.named_parameters():
        assert torch.equal(weight, trained[f"model/{name}"]), name
    for name, average in step.trainer.averages["model"].items(0.9):
        assert torch.equal(average, trained[f"ema_0.9/{name}"]), name


def test_our_model_has_all_that_the_published_one_has() -> None:
    with torch.device("meta"):
        model = build_model(step_config(FULL))
    positions = 256 * 384  # a fixed table there, counted in the published number
    assert sum(p.numel() for p in model.parameters()) + positions == 32_963_360


@pytest.mark.parametrize("autocast", [False, True])
def test_the_published_step_trains_and_averages(autocast: bool, tmp_path: Path) -> None:
    step = published_step(write_sit(tmp_path), QUICK, autocast)
    cells = dict(zip(step.__code__.co_freevars, (cell.cell_contents for cell in step.__closure__), strict=True))
    before = [weight.clone() for weight in cells["model"].parameters()]
    met: list[bool] = []
    cells["model"].register_forward_hook(lambda *_: met.append(torch.is_autocast_enabled("cpu")))
    step()
    step()
    assert met == [autocast] * 2
    for old, new, average in zip(before, cells["model"].parameters(), cells["ema"].parameters(), strict=True):
        assert not torch.equal(old, new)
        assert torch.allclose(average, old + (new - old) * 1e-4, atol=1e-6)
        assert not torch.equal(average, new)
