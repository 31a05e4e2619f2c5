"""Muon against its formula in the singular values of float64; which parameters it gets; a run of it, resumed."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import registered_backbones  # noqa: F401
import torch
from tiny_run import assert_identical, forget_processes
from torch import Tensor, nn

from vit5gen import SiTTransformer2DModel
from vit5gen.config import TrainingConfig, load_config
from vit5gen.models import register_backbone
from vit5gen.system.errors import UserError
from vit5gen.training import cost
from vit5gen.training.batches import RandomLatents, micro_batches
from vit5gen.training.build import check_values
from vit5gen.training.checkpoint import load_tensors
from vit5gen.training.dry_run import run_cost
from vit5gen.training.loop import build_trainer, train_step
from vit5gen.training.optimizers import build_optimizer
from vit5gen.training.process import make_accelerator
from vit5gen.training.run_folder import RunFolder, to_yaml

RATE, DECAY = 0.02, 0.1
OPTIONS: list[dict[str, Any]] = [{}, {"nesterov": False}, {"scale": "original"}, {"momentum": 0.5}]


class Attention(nn.Module):
    """What a block of a user's own may hold: torch's attention, a table, a kernel, a loose matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.attention, self.conv = nn.MultiheadAttention(width, 2), nn.Conv1d(width, width, 3)
        self.table, self.loose = nn.Embedding(5, width), nn.Parameter(torch.zeros(width, width))


@register_backbone("test-own-blocks")
class OwnBlocks(nn.Module):
    def __init__(self, hidden_size, num_layers, num_attention_heads, mlp_ratio, grid) -> None:  # type: ignore[no-untyped-def]
        super().__init__()
        self.blocks = nn.ModuleList(Attention(hidden_size) for _ in range(num_layers))
        self.entry = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.entry(tokens)


@register_backbone("test-no-blocks")
class NoBlocks(OwnBlocks):
    def __init__(self, *sizes) -> None:  # type: ignore[no-untyped-def]
        super().__init__(*sizes)
        del self.blocks


def make(backbone: str, **options: Any) -> SiTTransformer2DModel:
    sizes: dict[str, Any] = {"hidden_size": 24, "num_layers": 2, "num_attention_heads": 2, "mlp_ratio": 2.0}
    return SiTTransformer2DModel(backbone=backbone, sample_size=4, num_classes=3, **sizes, **options)


def settings(precision: str = "fp32", **options: Any) -> TrainingConfig:
    values = {"learning_rate": RATE, "weight_decay": DECAY, "precision": precision, "adam_betas": [0.8, 0.95]}
    return TrainingConfig(optimizer="muon", optimizer_kwargs=options, **values)  # type: ignore[arg-type]


def expected(weight: Any, gradients: list[Any], momentum: float, nesterov: bool, scale: str) -> Any:
    """Return the weight after a step for each gradient, in float64: the polynomial of each singular value."""
    total = 0.0
    for gradient in gradients:
        total = momentum * total + gradient
        direction = gradient + momentum * total if nesterov else total
        left, values, right = np.linalg.svd(direction, full_matrices=False)
        values = values / np.sqrt((values**2).sum())
        for _ in range(5):
            values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
        rows, columns = weight.shape
        factor = 0.2 * np.sqrt(max(rows, columns)) if scale == "match_rms_adamw" else np.sqrt(max(1, rows / columns))
        weight = (1 - RATE * DECAY) * weight - RATE * factor * (left * values) @ right
    return weight


@pytest.mark.parametrize("options", OPTIONS, ids=str)
@pytest.mark.parametrize(("precision", "most"), [("fp64", 1e-7), ("fp32", 1e-5)])
def test_three_steps_are_those_of_the_formula(options: dict[str, Any], precision: str, most: float) -> None:
    model, rng = make("vit5"), np.random.default_rng(0)
    kind = torch.float64 if precision == "fp64" else torch.float32
    optimizer = build_optimizer(model.to(kind), settings(precision, **options))
    block = model.backbone.blocks[0]
    tall, wide, square = block.mlp.fc1.weight, block.mlp.fc2.weight, block.attn.proj.weight
    assert [tuple(one.shape) for one in (tall, wide, square)] == [(48, 24), (24, 48), (24, 24)]
    before = {one: one.detach().double().numpy().copy() for one in (tall, wide, square)}
    gradients = {one: [rng.normal(size=one.shape) for _ in range(3)] for one in before}
    for step in range(3):
        for one, given in gradients.items():
            one.grad = torch.from_numpy(given[step]).to(one)
        optimizer.step()
    asked = {"momentum": 0.95, "nesterov": True, "scale": "match_rms_adamw"} | options
    for one, start in before.items():
        after = expected(start, gradients[one], **asked)
        assert np.abs(after - start).max() > 1e-3
        assert np.abs(one.detach().double().numpy() - after).max() < most


def test_all_else_is_adamw_bit_for_bit_and_no_gradient_means_no_step() -> None:
    torch.manual_seed(0)
    one, other = make("vit5"), make("vit5")
    other.load_state_dict(one.state_dict())
    adamw = settings().model_copy(update={"optimizer": "adamw", "optimizer_kwargs": {}})
    optimizers = build_optimizer(one, settings()), build_optimizer(other, adamw)
    for _ in range(2):
        for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
            mine.grad = theirs.grad = None if "blocks.1" in name or "head" in name else torch.randn_like(mine)
        for optimizer in optimizers:
            optimizer.step()
    muon = {id(p) for group in optimizers[0].param_groups if group["muon"] for p in group["params"]}
    for (name, mine), theirs in zip(one.named_parameters(), other.parameters(), strict=True):
        assert torch.equal(mine, theirs) == (id(mine) not in muon or "blocks.1" in name), name
        state = optimizers[0].state[mine]
        assert state.keys() == ({"momentum_buffer"} if id(mine) in muon else {"step", "exp_avg", "exp_avg_sq"}) or (
            not state and ("blocks.1" in name or "head" in name)
        )


def test_bf16_rounds_the_products_alone() -> None:
    steps = []
    for precision in ("fp32", "bf16"):
        torch.manual_seed(0)
        model = make("sit")
        optimizer, weight = build_optimizer(model, settings(precision)), model.backbone.blocks[0].attn.qkv.weight
        before, weight.grad = weight.detach().clone(), torch.randn_like(weight)
        optimizer.step()
        steps.append(weight.detach() - before)
        assert {value.dtype for value in optimizer.state[weight].values()} == {torch.float32}
    error = ((steps[1] - steps[0]).norm() / steps[0].norm()).item()
    assert 1e-4 < error < 0.05  # 0.033: a number in bf16 is off by up to 0.004, and the polynomial cancels


LAYERS = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2", "modulation")


@pytest.mark.parametrize(
    ("backbone", "layers"),
    [
        ("vit5", [f"{layer}.weight" for layer in LAYERS]),
        ("sit", [f"{layer}.weight" for layer in LAYERS]),
        ("dropout", ["mlp.0.weight", "mlp.3.weight"]),
        ("test-own-blocks", ["attention.in_proj_weight", "attention.out_proj.weight"]),
    ],
)
def test_muon_gets_the_matrices_of_blocks_and_nothing_else(backbone: str, layers: list[str]) -> None:
    model = make(backbone)
    learner = nn.ModuleDict({"model": model, "objectives": nn.Linear(24, 24)})
    groups = build_optimizer(learner, settings()).param_groups
    names = {id(p): name for name, p in learner.named_parameters()}
    found = [names[id(p)] for group in groups if group["muon"] for p in group["params"]]
    assert sorted(found) == sorted(f"model.backbone.blocks.{i}.{layer}" for i in (0, 1) for layer in layers)
    every = [id(p) for group in groups for p in group["params"]]
    assert sorted(every) == sorted(names)
    plain = build_optimizer(learner, settings().model_copy(update={"optimizer": "adamw", "optimizer_kwargs": {}}))
    decays = [{id(p): g["weight_decay"] for g in one for p in g["params"]} for one in (groups, plain.param_groups)]
    assert decays[0] == decays[1]


def test_a_resumed_run_is_the_undisturbed_one_and_keeps_its_optimizer(config_file: Path, tmp_path: Path) -> None:
    forget_processes()
    config, plain = (
        load_config(config_file, {"training.optimizer": name, "training.trackers": []}) for name in ("muon", "adamw")
    )
    accelerator = make_accelerator(config.training, tmp_path)

    def train(start: int, end: int, folder: Path) -> Path:
        trainer = build_trainer(config, accelerator)
        if start:
            trainer.restore(folder / f"step_{start:08d}")
        batches = micro_batches(config, RandomLatents(config.latent_shape, 3), None, accelerator, start)
        for _ in range(start, end):
            train_step(trainer, config, batches)
        assert trainer.save(folder, to_yaml(config), keep_last=9)
        return folder / f"step_{end:08d}"

    whole = train(0, 10, tmp_path / "run/checkpoints")
    train(0, 5, tmp_path / "parts")
    parts = train(5, 10, tmp_path / "parts")
    files = {file: load_tensors(whole, file) for file in ("model", "ema_0.9", "ema_0.99", "optimizer")}
    for file, tensors in files.items():
        assert_identical(tensors, load_tensors(parts, file))
    assert {name for name in files["optimizer"] if ".mlp.fc1.weight/" in name} == {
        f"backbone.blocks.{i}.mlp.fc1.weight/momentum_buffer" for i in (0, 1)
    }

    # What the dry run tells of it is what is there.
    size = {file: sum(value.nbytes for value in tensors.values() if value.ndim) for file, tensors in files.items()}
    found, other = run_cost(config), run_cost(plain)
    assert cost.optimizer_bytes(found, config) == size["optimizer"]
    assert cost.checkpoint_bytes(found, config) == sum(size.values())
    saving = sum(value.nbytes for name, value in files["optimizer"].items() if name.endswith("momentum_buffer"))
    assert cost.checkpoint_bytes(other, plain) - cost.checkpoint_bytes(found, config) == saving
    assert cost.memory_bytes(other, plain, 1, 1) - cost.memory_bytes(found, config, 1, 1) == saving

    # Another optimizer would find no moments of its own, whatever the user accepts.
    fault = (
        r"training.optimizer: 'muon' -> 'adamw'; .* its moments are of its optimizer\. Restore them, or begin a new run"
    )
    with pytest.raises(UserError, match=fault):
        RunFolder(tmp_path / "run").find_start(plain, "auto", accept_changes=True)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "moun"}, "training.optimizer: 'moun' is not known; expected one of adamw, muon.* 'muon'"),
        ({"optimizer_kwargs": {"momentum": 0.9}}, "training.optimizer_kwargs: 'momentum' is not an option of 'adamw'"),
        ({"momentum": 1}, "training.optimizer_kwargs: momentum = 1: set it to a number less than 1"),
        ({"momentun": 0.9}, "training.optimizer_kwargs: 'momentun' is not an option of 'muon'.*'momentum'"),
        ({"scale": "none"}, "training.optimizer_kwargs: scale = 'none'"),
        ({"nesterov": 1}, "training.optimizer_kwargs: nesterov = 1: set it to true or false"),
        ({"trainable": ["head"]}, "training.optimizer = muon: no 2-D weight of the backbone's .blocks. is trained"),
        ({"backbone": "test-no-blocks"}, "training.optimizer = muon: no 2-D weight of the backbone's .blocks."),
    ],
)
def test_what_does_not_fit_is_refused(config_file: Path, changes: dict[str, Any], message: str) -> None:
    values: dict[str, Any] = {"training.optimizer": "muon"}
    match changes:
        case {"backbone": name}:
            values |= {"model.backbone": name, "model.backbone_kwargs": {}}
        case {"optimizer": _} | {"trainable": _}:
            values |= {f"training.{key}": value for key, value in changes.items()}
        case {"optimizer_kwargs": _}:
            values = {"training.optimizer_kwargs": changes["optimizer_kwargs"]}
        case _:
            values["training.optimizer_kwargs"] = changes
    with pytest.raises(UserError, match=message):
        check_values(load_config(config_file, values))
