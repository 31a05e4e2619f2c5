"""Costs against sums over the weights, against what autograd keeps, and against published sizes."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vit5gen import SiTTransformer2DModel
from vit5gen.config import Config
from vit5gen.models import layers
from vit5gen.models.backbone import BACKBONES
from vit5gen.section import validate
from vit5gen.system.errors import UserError
from vit5gen.training import cost
from vit5gen.training.averages import EMA
from vit5gen.training.optimizers import build_optimizer

SMALL = {"sample_size": 8, "hidden_size": 64, "num_layers": 3, "num_attention_heads": 4, "num_classes": 10}
SWITCHES = [
    {"activation": "swiglu"},
    {"num_registers": 0, "rope": False},
    {"layer_scale": "gamma_only", "qkv_bias": True, "num_registers": 16},
]
MODELS: dict[str, dict[str, Any]] = {
    **{f"{name}-small": {"backbone": name, **SMALL} for name in ("sit", "vit5")},
    **{f"vit5-small-{i}": {"backbone": "vit5", "backbone_kwargs": k, **SMALL} for i, k in enumerate(SWITCHES)},
    **{f"{name}-{size}": {"backbone": name, "preset": size} for name in ("sit", "vit5") for size in ("S/2", "XL/2")},
    "sit-512": {"backbone": "sit", "preset": "S/4", "sample_size": 64, "learn_sigma": True},
    "sit-wide-patches": {"backbone": "sit", "preset": "S/8", "in_channels": 32, "sample_size": 32},
    "vit5-oblong": {"backbone": "vit5", **SMALL, "sample_size": (8, 16)},
}


def build(preset: str | None = None, **arguments: Any) -> SiTTransformer2DModel:
    return (
        SiTTransformer2DModel(**arguments) if preset is None else SiTTransformer2DModel.from_preset(preset, **arguments)
    )


def inputs(model: SiTTransformer2DModel, batch: int) -> tuple[Tensor, Tensor, Tensor]:
    size = model.config.sample_size
    shape = (size, size) if isinstance(size, int) else size
    latents = torch.zeros(batch, model.config.in_channels, *shape)
    return latents, torch.zeros(batch), torch.zeros(batch, dtype=torch.int64)


@pytest.mark.parametrize("name", MODELS)
def test_flops_are_those_of_weights_and_attention(name: str) -> None:
    with torch.device("meta"):
        model = build(**MODELS[name])
    found, config = cost.model_cost(model, "fp32", False), model.config
    forward, entrance = 4 * found.tokens**2 * config.hidden_size * config.num_layers, 0
    for layer, module in model.named_modules():
        if isinstance(module, nn.Linear):
            once = layer.endswith("modulation") or layer.startswith("time_embed")
            patches = found.tokens - getattr(model.backbone, "num_registers", 0)
            rows = 1 if once else found.tokens if layer.startswith("backbone.") else patches
            forward += 2 * rows * module.weight.numel()
            entrance += 2 * rows * module.weight.numel() * (layer in ("patch_embed", "time_embed.fc1"))
    assert found.forward_flops == forward
    assert found.backward_flops == 2 * forward - entrance  # latents and times need no gradient


class Windows(nn.Module):
    """A backbone of none of our layers: attention within pairs of tokens."""

    def __init__(self, hidden_size: int, num_layers: int, num_heads: int, mlp_ratio: float, grid: tuple[int, int]):
        super().__init__()
        self.project = nn.Linear(hidden_size, hidden_size, bias=False)

    def forward(self, tokens: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        q = self.project(tokens).unflatten(1, (-1, 2))
        return F.scaled_dot_product_attention(q, q, q).flatten(1, 2) + conditioning[:, None]


class Undecided(Windows):
    """A backbone that reads a value in its forward pass."""

    def forward(self, tokens: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        return tokens if tokens.sum().item() > 0 else -tokens


def built_with(backbone: type[nn.Module], monkeypatch: pytest.MonkeyPatch) -> SiTTransformer2DModel:
    monkeypatch.setitem(BACKBONES._known, backbone.__name__, backbone)
    with torch.device("meta"):
        return build(backbone=backbone.__name__, **SMALL)


def test_flops_of_a_backbone_of_other_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    model = built_with(Windows, monkeypatch)
    own, found = (
        cost.model_cost(model, "fp32", False),
        2 * 16 * 64 * 64 + 2 * 2 * 16 * 2 * 64,
    )  # a product of 16 tokens; 8 windows
    model.backbone.forward = lambda tokens, conditioning, grid: tokens + conditioning[:, None]
    assert own.forward_flops - cost.model_cost(model, "fp32", False).forward_flops == found
    assert own.tokens == 16


def test_a_backbone_that_reads_values_is_told_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match="'Undecided' cannot run on torch's meta device") as told:
        cost.model_cost(built_with(Undecided, monkeypatch), "fp32", False)
    assert "\n" not in str(told.value)


def test_published_sizes() -> None:
    with torch.device("meta"):
        sit, vit5 = (build("XL/2", backbone=name) for name in ("sit", "vit5"))
    assert cost.model_cost(sit, "fp32", False).forward_flops / 2 == pytest.approx(
        119e9, rel=0.01
    )  # arXiv 2401.08740: multiply-adds
    assert cost.model_cost(vit5, "fp32", False).parameters == 675_087_568
    positions = 256 * 1152  # a fixed table, counted in the published number and not trained
    assert cost.model_cost(sit, "fp32", False).parameters + positions == 675_111_184


def kept_bytes(model: SiTTransformer2DModel, batch: int, precision: str) -> int:
    """Return the bytes that autograd keeps of a forward pass, beyond the parameters."""
    kept: dict[int, Tensor] = {}

    def note(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    with (
        torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"),
    ):
        output = model(*inputs(model, batch))  # alive, so that no storage is used twice
    own = {parameter.untyped_storage().data_ptr() for parameter in model.parameters()}
    assert output.requires_grad
    return sum(tensor.untyped_storage().nbytes() for address, tensor in kept.items() if address not in own)


@pytest.mark.parametrize("recomputes", [False, True])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("backbone", ["sit", "vit5"])
def test_activations_are_what_autograd_keeps(
    backbone: str, precision: str, recomputes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layers, "attention", F.scaled_dot_product_attention)  # as on GPUs, whatever the precision
    model = build(backbone=backbone, **SMALL | {"sample_size": 16, "hidden_size": 192})
    found = cost.model_cost(model, precision, recomputes)
    if recomputes:
        model.enable_gradient_checkpointing()
        whole = cost.model_cost(model, precision, False)
        block = whole.activation_bytes // found.num_blocks
        assert found.activation_bytes < whole.activation_bytes
    image = kept_bytes(model, 4, precision) - kept_bytes(model, 3, precision)
    if recomputes:  # the hooks see what stays, not the one block that is alive in the backward pass
        image += block
    assert found.activation_bytes == pytest.approx(image, rel=0.1)


def config(**training: Any) -> Config:
    return validate(Config, {"model": {"preset": "S/2"}, "training": training}, "test")


def test_states_are_what_a_step_leaves() -> None:
    settings = config(ema_decays=[0.9, 0.99])
    model = build(backbone="sit", **SMALL)
    optimizer, ema = build_optimizer(model, settings.training), EMA(model, settings.training.ema_decays)
    model(*inputs(model, 2)).sum().backward()
    optimizer.step()
    tensors = [*model.parameters(), *(p.grad for p in model.parameters() if p.grad is not None)]
    tensors += [average for averages in ema.averages.values() for average in averages]
    tensors += [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    found = cost.model_cost(model, "fp32", False)
    assert cost.memory_bytes(found, settings, 0, 1) == sum(tensor.nbytes for tensor in tensors)


def test_memory_and_traffic_by_hand() -> None:
    found = cost.Cost(
        parameters=1000,
        num_blocks=10,
        tokens=4,
        forward_flops=50,
        backward_flops=100,
        activation_bytes=300,
        recomputes=False,
    )
    fp32, bf16 = config(precision="fp32"), config(precision="bf16")
    assert cost.memory_bytes(found, fp32, 2, 1) == 20_000 + 600
    assert cost.memory_bytes(found, fp32, 2, 4) == 24_000 + 600
    assert cost.memory_bytes(found, bf16, 2, 4) == 26_000 + 600
    assert cost.memory_bytes(found, fp32, 2, 4, sharded=True) == 5_000 + 2 * 400 + 600
    assert cost.memory_bytes(found, bf16, 2, 4, sharded=True) == 5_000 + 2 * 400 + 2_000 + 600
    assert cost.largest_micro_batch(found, fp32, 1, 20_700e-9) == 2
    assert cost.largest_micro_batch(found, fp32, 1, 19_000e-9) == 0
    assert cost.communication_bytes(found, bf16, 4) == 6_000
    assert cost.communication_bytes(found, fp32, 1) == 0
    assert cost.checkpoint_bytes(found, fp32) == 16_000
    kept = config(num_steps=1000, keep_every=100, keep_last=2)
    assert cost.run_bytes(found, kept) == (2 + 10 + 1) * 16_000 + 8_000


@pytest.mark.parametrize("recomputes", [False, True])
def test_time_and_utilisation_are_inverse(recomputes: bool) -> None:
    found = cost.Cost(
        1000, 10, 4, forward_flops=10**9, backward_flops=2 * 10**9, activation_bytes=300, recomputes=recomputes
    )
    passes = 3 + recomputes
    images = 10**9
    hours = cost.gpu_hours(found, images, "A100", "bf16")
    assert hours == pytest.approx(passes * 1e18 / (312e12 * cost.ASSUMED_UTILISATION) / 3600)
    speed = images * found.training_flops / (hours * 3600)
    utilisation = cost.mfu(speed, "A100", "bf16") * passes / 3  # recomputed: no work
    assert utilisation == pytest.approx(cost.ASSUMED_UTILISATION)
