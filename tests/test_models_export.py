"""Graphs of classifier and generator for use outside: traces, `torch.export` and ONNX, at a batch of another size."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from test_models_classifier import tiny
from test_models_transformer import make
from torch import Tensor, nn

import vit5gen
from vit5gen.data.autoencoders.codec import decode

NETWORKS = ("sit", "vit5", "classifier")


def network(name: str) -> nn.Module:
    return tiny() if name == "classifier" else make(name).eval()


def inputs(name: str, batch: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(batch)
    if name == "classifier":
        return {"x": torch.randn(batch, 3, 32, 32, generator=generator)}
    latents, times = torch.randn(batch, 4, 8, 8, generator=generator), torch.rand(batch, generator=generator)
    return {"latents": latents, "timestep": times, "class_labels": torch.arange(batch)}


def compare_at_another_batch(name: str, graph: Any, model: nn.Module) -> None:
    with torch.no_grad():
        for batch in (5, 3):
            given = inputs(name, batch)
            torch.testing.assert_close(graph(**given), model(**given), rtol=1e-4, atol=1e-4)


@pytest.mark.filterwarnings("ignore")  # of the tracer, that sizes become constants
@pytest.mark.parametrize("name", NETWORKS)
def test_a_trace_takes_another_batch(name: str) -> None:
    """Stands for timm's test_model_forward_torchscript, which scripts."""
    model = network(name)
    graph = torch.jit.trace(model, example_kwarg_inputs=inputs(name, 2), check_trace=False)
    compare_at_another_batch(name, graph, model)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_an_export_takes_any_batch(name: str) -> None:
    """Stands for timm's test_naflexvit_direct_grid_sample_export and diffusers' test_compile_works_with_aot."""
    model = network(name)
    free = {key: {0: torch.export.Dim("batch")} for key in inputs(name, 2)}
    program = torch.export.export(model, (), inputs(name, 2), dynamic_shapes=free)
    compare_at_another_batch(name, program.module(), model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_the_recipe_writes_onnx_files_of_the_generator_that_ships(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stands for diffusers' OnnxPipelineTesterMixin, which runs files of the hub."""
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    page = (Path(__file__).parents[1] / "docs" / "sampling.md").read_text()
    recipe = re.findall(r"```python\n(.*?)```", page.split("\n## Without this package\n")[1], re.S)[0]
    monkeypatch.chdir(tmp_path)
    exec(compile(recipe, "sampling.md", "exec"), {})
    pipe = vit5gen.SiTPipeline.from_pretrained(vit5gen.shipped("emoji-64"))
    latents = torch.randn(5, 4, 16, 16)
    given = {"latents": latents, "timestep": torch.rand(5), "class_labels": torch.tensor([0, 9, 3, 8, 1])}
    with torch.no_grad():
        expected = {"transformer": (given, pipe.transformer(**given))}
        expected["decoder"] = ({"latents": latents}, decode(pipe.vae, latents))
    for name, (feed, tensor) in expected.items():
        session = onnxruntime.InferenceSession(f"{name}.onnx", providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {key: value.numpy() for key, value in feed.items()})
        assert np.abs(found - tensor.numpy()).max() < 1e-4, name
