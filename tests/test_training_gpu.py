"""What a GPU would meet in a step, checked without one: whole graphs, one read, no copy, no attention backend forced.

Tensors of a fake GPU have shapes and a device, no values, so that what would be copied or read shows. Each test names
the one that it stands for, most of which need a GPU.
"""

import ast
import math
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from accelerate import PartialState
from tiny import tiny_pipeline, tiny_transformer
from tiny_run import forget_processes
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from vit5gen.config import Config
from vit5gen.section import validate
from vit5gen.system.precision import PRECISIONS
from vit5gen.training import process
from vit5gen.training.averages import EMA
from vit5gen.training.batches import RandomLatents, micro_batches
from vit5gen.training.loop import build_trainer, train_step
from vit5gen.training.objectives import Batch
from vit5gen.training.process import make_accelerator
from vit5gen.training.trainer import Trainer

PACKAGE = Path(__file__).parents[1] / "vit5gen"
STEPS = 3
SIZES = {"hidden_size": 32, "num_layers": 2, "num_attention_heads": 2, "patch_size": 2, "class_dropout_prob": 0.5}


def config(backbone: str, **training: Any) -> Config:
    settings = {"global_batch_size": 4, "num_steps": STEPS, "precision": "fp32", "trackers": []}
    sections = {"model": {"backbone": backbone, **SIZES}, "data": {"resolution": 64}}
    return validate(Config, sections | {"training": settings | training}, "test")


class Traffic(TorchDispatchMode):
    """Counts operators, and those with a tensor on the CPU in or out."""

    def __init__(self) -> None:
        super().__init__()
        self.operators: Counter[str] = Counter()
        self.on_cpu: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.operators[func.__name__] += 1
        devices = {leaf.device.type for leaf in tree_leaves((args, kwargs, out)) if isinstance(leaf, Tensor)}
        self.on_cpu[func.__name__] += "cpu" in devices
        return out


@pytest.fixture
def reads(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    """A fake GPU; what is read of its tensors is noted, and 0."""
    seen: list[str] = []
    for name, answer in {"tolist": lambda x: [0.0] * x.numel(), "item": lambda x: 0.0, "cpu": lambda x: x}.items():
        monkeypatch.setattr(FakeTensor, name, lambda x, name=name, answer=answer: seen.append(name) or answer(x))
    # What needs a real one: its random state, and autograd's threads.
    monkeypatch.setattr(process, "seeded", lambda *_: nullcontext())
    monkeypatch.setattr(nn.init, "trunc_normal_", lambda weight, std: weight)
    with FakeTensorMode(allow_non_fake_inputs=True), torch.device("cuda"):
        yield seen
    forget_processes()


def fake_trainer(settings: Config, monkeypatch: pytest.MonkeyPatch) -> tuple[Trainer, Iterator[Batch]]:
    """Return the trainer of a run, and its batches, on the fake GPU."""
    forget_processes()
    accelerator = make_accelerator(settings.training, Path())
    PartialState().device = accelerator.state.device = torch.device("cuda")
    accelerator.device_placement = False  # all is there already
    trainer = build_trainer(settings, accelerator)
    assert {parameter.device.type for parameter in trainer.network.parameters()} == {"cuda"}

    def backward(loss: Tensor) -> None:
        for parameter in trainer.network.parameters():
            parameter.grad = torch.zeros_like(parameter)

    monkeypatch.setattr(Tensor, "backward", backward)

    def batches() -> Iterator[Batch]:
        while True:
            x1, x0 = torch.randn(2, 4, *settings.latent_shape)
            labels, empty = torch.zeros(4, dtype=torch.int64), torch.empty(0)
            yield Batch(x1, x0, labels, torch.rand(4), torch.arange(4), 0, None, empty, empty, empty)

    return trainer, batches()


def test_a_step_reads_the_gpu_once_and_copies_nothing_to_it(reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for torch's `test_sync_warning` (test_torch.py) and `test_fused_matches_forloop` (test_optim.py)."""
    settings = config("sit", ema_decays=[0.9, 0.99])
    trainer, batches = fake_trainer(settings, monkeypatch)
    with Traffic() as traffic:
        for _ in range(STEPS):
            train_step(trainer, settings, batches)
    assert trainer.step == STEPS
    assert trainer.skipped == 0
    assert reads == ["tolist"] * STEPS
    assert not +traffic.on_cpu
    # One kernel for each group of the optimizer and for each average; no gradient is written but by the backward pass.
    assert traffic.operators["_fused_adamw_.default"] == 2 * STEPS
    assert traffic.operators["_foreach_lerp_.Scalar"] == 2 * STEPS
    assert traffic.operators["_foreach_mul_.Tensor"] == 0


@pytest.mark.parametrize("backbone", ["sit", "vit5"])
@pytest.mark.parametrize("side", [8, 12])
def test_a_compiled_network_has_no_part_on_the_cpu(
    backbone: str, side: int, reads: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Such a part is copied in every call, and refused by CUDA graphs.

    Stands for `test_multiple_devices_msg` of torch's test_cudagraph_trees.py.
    """
    model = tiny_transformer(backbone=backbone)
    monkeypatch.setattr(torch.compiler, "is_compiling", lambda: True)
    with Traffic() as traffic:
        out = model(torch.randn(4, 4, side, side), torch.rand(4), torch.zeros(4, dtype=torch.int64))
    assert out.device.type == "cuda"
    assert not +traffic.on_cpu
    assert not reads


def test_no_attention_backend_is_forced(reads: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Stands for `test_fused_sdp_choice` of torch's test_transformers.py: torch chooses."""
    settings = config("vit5")
    trainer, batches = fake_trainer(settings, monkeypatch)
    whole, allowed = F.scaled_dot_product_attention, []

    def attend(*tensors: Tensor, **options: Any) -> Tensor:
        backends = torch.backends.cuda
        allowed.append((backends.flash_sdp_enabled(), backends.cudnn_sdp_enabled()))
        allowed.append((backends.mem_efficient_sdp_enabled(), backends.math_sdp_enabled()))
        assert not options
        return whole(*tensors)

    monkeypatch.setattr(F, "scaled_dot_product_attention", attend)
    train_step(trainer, settings, batches)
    assert allowed == [(True, True)] * 2 * settings.model.num_layers  # type: ignore[operator]


def test_only_what_counts_flops_chooses_how_attention_is_computed() -> None:
    """It does so on the meta device, where nothing is computed."""
    found = {}
    for file in PACKAGE.rglob("*.py"):
        if "sdp" not in (code := file.read_text()):
            continue
        names = {getattr(node, "attr", getattr(node, "id", "")) for node in ast.walk(ast.parse(code))}
        if chosen := {name for name in names if name == "sdpa_kernel" or name.endswith("_sdp")}:
            found[file.relative_to(PACKAGE).as_posix()] = chosen
            assert "FlopCounterMode" in names
    assert found.keys() == {"training/cost.py", "training/objectives/objective.py"}


def test_the_norm_of_a_gradient_that_is_not_clipped_is_that_of_clipping_to_infinity() -> None:
    """Stands for `test_clip_grad_norm` of torch's test_nn.py."""
    settings = config("vit5")
    trainer = build_trainer(settings, make_accelerator(settings.training, Path()))
    for parameter in trainer.network.parameters():
        parameter.grad = torch.randn_like(parameter)
    before = [parameter.grad.clone() for parameter in trainer.network.parameters()]
    norm = trainer.clip(None)
    for parameter, gradient in zip(trainer.network.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)
    assert torch.equal(norm, nn.utils.clip_grad_norm_(trainer.network.parameters(), math.inf))
    for parameter, gradient in zip(trainer.network.parameters(), before, strict=True):
        assert torch.equal(parameter.grad, gradient)
    trainer.clip(1.0)
    assert trainer.clip(None) == pytest.approx(1)


def test_averages_in_one_pass_are_those_of_one_by_one() -> None:
    """Stands for `test_training_with_ema` of diffusers' models, which tests that a step works."""
    model = tiny_transformer(backbone="vit5")
    ema = EMA(model, [0.9])
    expected = [weight.detach().clone() for weight in model.parameters()]
    for step in range(2):
        with torch.no_grad():
            for weight, average in zip(model.parameters(), expected, strict=True):
                weight += step + 1
                average.lerp_(weight, 1 - 0.9)
        ema.update(step + 1)
    assert all(torch.equal(a, b) for a, b in zip(ema.averages[0.9], expected, strict=True))


def graphs() -> int:
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def losses(settings: Config, compiled: bool) -> list[float]:
    """Return the loss of each step of the loop; compiled: model and objectives are one graph."""
    forget_processes()
    accelerator = make_accelerator(settings.training, Path())
    trainer = build_trainer(settings, accelerator)
    if compiled:
        trainer.network = torch.compile(trainer.network, fullgraph=True, backend="aot_eager")
    source = RandomLatents(settings.latent_shape, settings.num_classes)
    batches = micro_batches(settings, source, None, accelerator)
    return [train_step(trainer, settings, batches).loss for _ in range(STEPS)]


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["sit", "vit5"])
def test_training_is_one_graph(backbone: str, precision: str) -> None:
    """With dropped labels and a backward pass; a graph break raises, and a second graph would be for another step.

    Stands for `test_torch_compile_recompilation_and_graph_break` of diffusers' models, which has no backward pass.
    """
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    settings = config(backbone, precision=precision, learning_rate=1e-2)
    assert losses(settings, compiled=True) == pytest.approx(losses(settings, compiled=False), rel=1e-5)
    assert graphs() == 1


@pytest.mark.slow
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["sit", "vit5"])
def test_sampling_is_one_graph(backbone: str, precision: str) -> None:
    """With guidance at some of the times, by the pipeline; stands for the same test of diffusers' models."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    pipe = tiny_pipeline(backbone=backbone)
    PRECISIONS[precision].cast_for_sampling(pipe.transformer)
    words: dict[str, Any] = {"guidance_scale": 2.0, "guidance_interval": (0.2, 1.0), "output_type": "latent"}
    words |= {"class_labels": [0, 1, 2], "num_inference_steps": 4}

    def draw() -> Tensor:
        generator = [torch.Generator().manual_seed(i) for i in range(3)]
        return pipe(generator=generator, **words).images

    expected = draw()
    pipe.transformer = torch.compile(pipe.transformer, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(draw(), expected, rtol=1e-4, atol=1e-2 if precision == "bf16" else 1e-4)
    assert graphs() == 2  # with and without the rows of the null label
