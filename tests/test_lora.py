"""What is trained: parameters by pattern, and low-rank adapters from the training to pipelines that load them."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import train_in
from peft import LoraConfig
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_training_processes import kill_test
from tiny import tiny_transformer
from tiny_run import assert_identical, losses, run, weights
from torch import Tensor, nn

from vit5gen import SiTPipeline, SiTScheduler, SiTTransformer2DModel
from vit5gen.cli import main
from vit5gen.config import Config, TrainingConfig, load_config, load_recorded
from vit5gen.generation import lora as adapters
from vit5gen.generation.lora import ADAPTER, FULL
from vit5gen.models.backbone import BACKBONES
from vit5gen.section import validate
from vit5gen.system.errors import UserError
from vit5gen.training import checkpoint, cost
from vit5gen.training.averages import EMA
from vit5gen.training.build import build_model, build_model_to_train, settle_auto
from vit5gen.training.dry_run import describe, run_cost
from vit5gen.training.export import export_pipeline
from vit5gen.training.optimizers import build_optimizer
from vit5gen.training.run_folder import RunFolder
from vit5gen.training.trainable import adapter_of, choose_trainable, fold

LORA = {"training__trainable": "lora", "training__lora": {"rank": 2, "full": ["label_embed", "head"], "dropout": 0.2}}
LORA |= {"training__learning_rate": 0.02}


def settings(**training: Any) -> TrainingConfig:
    return validate(TrainingConfig, training, "test")


def trained(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def inputs() -> tuple[Tensor, Tensor, Tensor]:
    latents = torch.randn(3, 4, 8, 8, generator=torch.Generator().manual_seed(1))
    return latents, torch.tensor([0.1, 0.5, 0.9]), torch.tensor([0, 4, 5])


def adapted(backbone: str = "vit5", seed: int = 0, **options: Any) -> tuple[SiTTransformer2DModel, TrainingConfig]:
    """Return a model whose adapters add something, and how it was made."""
    model, training = tiny_transformer(seed, backbone=backbone), settings(trainable="lora", lora=options)
    choose_trainable(model, training)
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        if ".lora_B." in name or name == "label_embed.weight":
            nn.init.normal_(parameter, std=0.1, generator=generator)
    return model, training


def pipeline(model: SiTTransformer2DModel) -> SiTPipeline:
    pipe = SiTPipeline(model.eval(), SiTScheduler(), id2label={0: "zero"})
    pipe.set_progress_bar_config(disable=True)
    return pipe


def save(folder: Path, **options: Any) -> Path:
    """Save an adapter of `adapted`, with classes of its own, and return its folder."""
    model, training = adapted(**options)
    adapter = adapter_of(model.state_dict(), trained(model), training)
    assert adapter is not None
    folder.mkdir(parents=True)
    adapter.save(folder, model.config, {0: "one", 4: "four"})
    return folder


def draw(pipe: SiTPipeline) -> Tensor:
    options = {"num_inference_steps": 2, "guidance_scale": 1.5, "output_type": "latent"}
    return pipe([0, 2], generator=torch.Generator().manual_seed(0), **options).images


def gap(one: Tensor, other: Tensor) -> float:
    return float(((one - other).norm() / other.norm()).detach())


@pytest.mark.parametrize("backbone", ["vit5", "sit"])
@torch.no_grad()
def test_adapters_begin_at_nothing_and_fold_in_exactly(backbone: str) -> None:
    base, model = tiny_transformer(backbone=backbone), tiny_transformer(backbone=backbone)
    training = settings(trainable="lora")
    choose_trainable(model, training)
    assert torch.equal(model(*inputs()), base(*inputs()))
    assert_identical(fold(model.state_dict(), training), dict(base.state_dict()))
    model, training = adapted(backbone, rank=4, alpha=6)
    base.load_state_dict(fold(model.state_dict(), training))
    assert gap(base(*inputs()), model(*inputs())) < 1e-6
    assert gap(base(*inputs()), tiny_transformer(backbone=backbone)(*inputs())) > 1e-2


def test_patterns_name_parameters_layers_and_modules() -> None:
    model = tiny_transformer(backbone="vit5")
    choose_trainable(model, settings(trainable=["label_embed", "head.linear.*", "backbone.blocks.1.attn"]))
    inner = {f"backbone.blocks.1.attn.{name}" for name in ("qkv.weight", "proj.weight", "proj.bias")}
    inner |= {f"backbone.blocks.1.attn.{name}_norm.weight" for name in "qk"}
    assert trained(model) == {"label_embed.weight", "head.linear.weight", "head.linear.bias"} | inner
    optimizer = build_optimizer(model, settings(weight_decay=0.1))
    assert sum(len(group["params"]) for group in optimizer.param_groups) == len(trained(model))


def test_adapters_are_for_linear_layers_of_the_backbone_and_begin_by_the_seed() -> None:
    for backbone in ("vit5", "sit"):
        model = tiny_transformer(backbone=backbone)
        layers = {name for name, module in model.backbone.named_modules() if isinstance(module, nn.Linear)}
        choose_trainable(model, settings(trainable="lora"))
        expected = {f"backbone.{name}.lora_{side}.default.weight" for name in layers for side in "AB"}
        assert trained(model) == {"label_embed.weight"} | expected
        assert len(layers) == 2 * 5
    again, other = tiny_transformer(backbone="sit"), tiny_transformer(backbone="sit")
    choose_trainable(again, settings(trainable="lora"))
    choose_trainable(other, settings(trainable="lora", seed=1))
    name = "backbone.blocks.0.mlp.fc1.lora_A.default.weight"
    assert torch.equal(again.state_dict()[name], model.state_dict()[name])
    assert not torch.equal(again.state_dict()[name], other.state_dict()[name])


def test_chosen_layers_have_adapters_and_chosen_parameters_are_trained_in_full() -> None:
    model = tiny_transformer(backbone="vit5")
    options = {"targets": ["*.attn", "*.1.mlp.fc1"], "full": ["*.0.attn.proj", "*.bias"]}
    choose_trainable(model, settings(trainable="lora", lora=options))
    assert {name for name in trained(model) if "lora_A" in name} == {
        f"backbone.blocks.{name}.lora_A.default.weight"
        for name in ("0.attn.qkv", "1.attn.qkv", "1.attn.proj", "1.mlp.fc1")
    }
    assert "backbone.blocks.0.attn.proj.weight" in trained(model)
    assert "backbone.blocks.1.attn.proj.base_layer.bias" in trained(model)


class Foreign(nn.Module):
    """A backbone of torch's own layers."""

    def __init__(self, hidden_size: int, num_layers: int, num_heads: int, mlp_ratio: float, grid: tuple[int, int]):
        super().__init__()
        self.attention = nn.MultiheadAttention(hidden_size, num_heads, batch_first=True)
        self.project = nn.Linear(hidden_size, hidden_size)

    def forward(self, tokens: Tensor, conditioning: Tensor, grid: tuple[int, int]) -> Tensor:
        return self.project(self.attention(tokens, tokens, tokens)[0]) + conditioning[:, None]


def test_a_backbone_of_ones_own_gets_adapters_where_they_have_an_effect(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(BACKBONES._known, "foreign", Foreign)
    model = tiny_transformer(backbone="foreign")
    choose_trainable(model, settings(trainable="lora"))
    assert {name for name in trained(model) if "lora_A" in name} == {"backbone.project.lora_A.default.weight"}


@pytest.mark.parametrize(
    ("training", "message"),
    [
        ({"trainable": "loar"}, r"trainable = 'loar'; expected all, lora or a list"),
        ({"trainable": []}, r"trainable = \[\]; expected all, lora or a list"),
        ({"lora": {"rank": 4}}, r"lora is given, but trainable = 'all'; set trainable to lora, or omit lora"),
        ({"trainable": "lora", "lora": {"rang": 4}}, r"unknown key 'lora.rang'.* Did you mean 'rank'"),
        ({"trainable": ["label_embd"]}, r"training.trainable: nothing is called 'label_embd'.* mean 'label_embed'"),
        ({"trainable": "lora", "lora": {"targets": ["*.atn"]}}, r"lora.targets: nothing is called '\*.atn'"),
        ({"trainable": "lora", "lora": {"full": ["haed"]}}, r"lora.full: nothing is called 'haed'.* mean 'head'"),
        ({"trainable": "lora", "lora": {"full": ["backbone"]}}, r"lora.targets: all are trained in full"),
    ],
)
def test_bad_values_are_told_in_one_line(training: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message) as told:
        choose_trainable(tiny_transformer(), settings(**training))
    assert "\n" not in str(told.value)


def test_a_new_run_behind_an_output_layer_of_zeros_is_refused(config_file: Path, tmp_path: Path) -> None:
    frozen = {"training.trainable": "lora"}, {"training.trainable": ["*.bias"]}
    for options in frozen:
        with pytest.raises(UserError, match=r"head.linear is zero in a new model .* set training.init_from"):
            RunFolder(tmp_path / "run").find_start(load_config(config_file, options), "auto", accept_changes=False)
        assert settle_auto(load_config(config_file, options), {"training": {}})  # resumed
    for options in ({"training.trainable": ["head"]}, frozen[0] | {"training.lora": {"targets": ["head"]}}):
        assert settle_auto(load_config(config_file, options), {})
    assert settle_auto(load_config(config_file, frozen[0] | {"training.init_from": "run"}), {})


def test_without_peft_the_command_says_what_to_install(
    config_file: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(adapters, "missing_packages", lambda names: dict.fromkeys(names, "absent"))
    with pytest.raises(SystemExit) as left:
        main(["train", str(config_file), "--dry-run", "--training.trainable", "lora"])
    assert left.value.code == 2
    assert 'run `pip install "vit5gen[lora]"`' in capsys.readouterr().err
    with pytest.raises(UserError, match=r"load_lora_weights needs peft"):
        pipeline(tiny_transformer()).load_lora_weights("folder")


@pytest.fixture(scope="module")
def runs(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Train with LoRA, at once and in two parts."""
    folder = tmp_path_factory.mktemp("lora")
    for name, steps in (("whole", 10), ("parts", 7), ("parts", 10)):
        assert run(config_file, folder / name, training__num_steps=steps, **LORA) == 0
    return folder


def base_of(folder: Path) -> SiTPipeline:
    """Return the pipeline of the weights with which a run began."""
    return pipeline(build_model(load_recorded(folder / "config.yaml")))


@pytest.mark.slow
def test_a_resumed_run_with_dropout_equals_a_whole_one_bit_for_bit(runs: Path) -> None:
    assert_identical(weights(runs / "whole", 10), weights(runs / "parts", 10))
    assert losses(runs / "whole") == losses(runs / "parts")


def test_what_is_frozen_stays_and_has_no_average_and_no_moments(runs: Path) -> None:
    found, base = weights(runs / "whole", 10), base_of(runs / "whole").transformer.state_dict()
    model = {name.removeprefix("model/"): value for name, value in found.items() if name.startswith("model/")}
    moving = {name.removeprefix("ema_0.9/") for name in found if name.startswith("ema_0.9/")}
    assert moving == {name.removeprefix("optimizer/").split("/")[0] for name in found if name.startswith("optimizer/")}
    assert {name for name in moving if ".lora_" not in name} == {
        "label_embed.weight", "head.linear.weight", "head.linear.bias", "head.modulation.weight", "head.modulation.bias"
    }  # fmt: skip
    for name, value in model.items():
        if name not in moving:
            assert torch.equal(value, base[name.replace(".base_layer.", ".")]), name
    assert all(model[name].abs().max() > 0 for name in moving if "lora_B" in name)


def test_the_pipeline_of_a_run_holds_merged_weights_and_the_adapter(runs: Path) -> None:
    folder, base = runs / "whole/pipeline", base_of(runs / "whole")
    merged, before = pipeline(SiTPipeline.from_pretrained(folder).transformer), draw(base)
    base.load_lora_weights(folder)
    assert gap(draw(base), draw(merged)) < 1e-6
    assert gap(draw(base), before) > 0.1
    with safe_open(folder / ADAPTER, "pt") as found:
        assert len(found.metadata()["base_sha256"]) == 64
        layer = "transformer.backbone.blocks.1.mlp.fc2"
        assert {f"{layer}.lora_A.weight", f"{layer}.lora_B.weight"} < set(found.keys())
    assert load_file(folder / FULL).keys() == {
        "label_embed.weight", "head.linear.weight", "head.linear.bias", "head.modulation.weight", "head.modulation.bias"
    }  # fmt: skip
    assert base.config.id2label == {0: "circle", 1: "square", 2: "star"}
    base.unload_lora_weights()
    assert torch.equal(draw(base), before)
    with pytest.raises(UserError, match="already folded into them; load the pipeline that its training began with"):
        merged.load_lora_weights(folder)


def test_convert_merges_as_training_does(runs: Path, tmp_path: Path) -> None:
    export_pipeline(runs / "whole/checkpoints/step_00000010", tmp_path / "out", None, None, None)
    for name in ("transformer/diffusion_pytorch_model.safetensors", ADAPTER, FULL):
        files = [safe_open(of / name, "pt") for of in (tmp_path / "out", runs / "whole/pipeline")]
        assert files[0].metadata() == files[1].metadata()
        assert_identical(*({key: file.get_tensor(key) for key in file.keys()} for file in files))  # noqa: SIM118
    export_pipeline(runs / "whole", tmp_path / "raw", None, "model", None)
    assert not torch.equal(*(load_file(tmp_path / of / FULL)["label_embed.weight"] for of in ("out", "raw")))


def test_other_options_of_lora_are_another_configuration(config_file: Path, runs: Path) -> None:
    for lora in ({"rank": 3}, {"rank": 2, "full": ["label_embed", "head"], "dropout": 0.1}):
        with pytest.raises(UserError, match=r"training.lora: .*'rank': 2"):
            run(config_file, runs / "whole", **{**LORA, "training__num_steps": 20, "training__lora": lora})
    with pytest.raises(UserError, match=r"training.trainable: 'lora' -> 'all'"):
        run(config_file, runs / "whole", training__learning_rate=0.02, training__num_steps=20)


def test_adapters_are_mixed_folded_in_and_removed_as_in_diffusers(tmp_path: Path) -> None:
    one, two = (save(tmp_path / name, seed=0, rank=rank) for name, rank in (("one", 2), ("two", 4)))
    pipe, model = pipeline(tiny_transformer(backbone="vit5")), adapted(rank=2)[0]
    before, wanted = draw(pipe), draw(pipeline(model))
    pipe.load_lora_weights(str(one), adapter_name="one")
    assert gap(draw(pipe), wanted) < 1e-6
    assert pipe.class_ids("four") == [4]
    pipe.load_lora_weights(two / ADAPTER, adapter_name="two")
    assert pipe.get_active_adapters() == ["two"]
    assert gap(draw(pipe), wanted) > 1e-3
    pipe.set_adapters("one")
    assert gap(draw(pipe), wanted) < 1e-6
    pipe.set_adapters(["one", "two"], [0.5, 0.5])
    assert gap(draw(pipe), wanted) > 1e-3
    for names, scales in ((["one", "two"], [1.0, 0.0]), (["two", "one"], [0.0, 1.0])):
        pipe.set_adapters(names, scales)
        assert gap(draw(pipe), wanted) < 1e-6
    pipe.set_adapters("one", 0.0)
    assert torch.equal(draw(pipe), before)
    assert pipe.config.id2label == {0: "zero"}
    pipe.delete_adapters("two")
    pipe.load_lora_weights(load_file(two / ADAPTER), adapter_name="two")
    assert pipe.config.id2label == {0: "zero"}
    pipe.delete_adapters("two")
    pipe.set_adapters("one")
    pipe.disable_lora()
    assert torch.equal(draw(pipe), before)
    assert pipe.config.id2label == {0: "zero"}
    pipe.enable_lora()
    assert gap(draw(pipe), wanted) < 1e-6
    state = {name: value.clone() for name, value in pipe.transformer.state_dict().items()}
    pipe.fuse_lora()
    assert gap(draw(pipe), wanted) < 1e-6
    pipe.unfuse_lora()
    assert_identical(dict(pipe.transformer.state_dict()), state)
    with pytest.raises(UserError, match="the transformer has adapters; fold them in"):
        pipe.save_pretrained(tmp_path / "saved")
    pipe = SiTPipeline.from_pipe(pipe)
    pipe.unload_lora_weights()
    assert torch.equal(draw(pipe), before)
    assert pipe.config.id2label == {0: "zero"}
    pipe.load_lora_weights(one)
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    assert gap(draw(pipe), wanted) < 1e-6
    pipe.save_pretrained(tmp_path / "saved")
    assert SiTPipeline.from_pretrained(tmp_path / "saved").config.id2label == {0: "one", 4: "four"}


def test_an_adapter_brings_the_number_of_its_classes_and_dropout_of_labels(tmp_path: Path) -> None:
    model, training = tiny_transformer(backbone="vit5"), settings(trainable="lora", lora={"rank": 2})
    few = tiny_transformer(backbone="vit5", num_classes=2)
    few.load_state_dict(model.state_dict() | {"label_embed.weight": torch.ones(3, 32)})
    choose_trainable(few, training)
    adapter = adapter_of(few.state_dict(), trained(few), training)
    assert adapter is not None
    adapter.save(tmp_path, few.config, {0: "left", 1: "right"})
    pipe = pipeline(model)
    pipe.load_lora_weights(tmp_path)
    assert (pipe.class_ids("right"), pipe.transformer.null_label, pipe.transformer.config.num_classes) == ([1], 2, 2)
    assert pipe(1, guidance_scale=2.0, num_inference_steps=1, output_type="latent").images.isfinite().all()
    with pytest.raises(UserError, match="class 2 does not exist"):
        draw(pipe)
    pipe.unload_lora_weights()
    assert draw(pipe).isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_base_is_known_in_any_precision_and_with_both_halves_of_its_head(tmp_path: Path, dtype: torch.dtype) -> None:
    pipe = pipeline(nn.Module.to(tiny_transformer(backbone="vit5"), dtype))
    pipe.load_lora_weights(save(tmp_path / "one", rank=2))
    both = tiny_transformer(backbone="vit5", learn_sigma=True)
    state = tiny_transformer(backbone="vit5").state_dict()
    for name in ("head.linear.weight", "head.linear.bias"):  # rows are (patch pixels, channels)
        used = state[name].unflatten(0, (4, 4))
        state[name] = torch.cat([used, torch.ones_like(used)], 1).flatten(0, 1)
    both.load_state_dict(state)
    pipes, folder = (pipeline(both), pipe), save(tmp_path / "two", rank=2, full=["label_embed", "head"])
    for one in pipes:
        one.load_lora_weights(folder)
    assert pipes[0].transformer.head.linear.bias.unflatten(0, (4, 8))[:, 4:].eq(1).all()
    assert gap(*map(draw, pipes)) < (1e-6 if dtype == torch.float64 else 0.1)
    with pytest.raises(UserError, match=r"for 16 outputs, this transformer's has 32; .* or learn_sigma"):
        pipes[0].load_lora_weights(save(tmp_path / "three", rank=2, targets=["head"], full=[]))


def test_an_adapter_of_the_head_is_refused_where_it_is_folded_in(tmp_path: Path) -> None:
    options: dict[str, Any] = {"rank": 2, "targets": ["head.linear"], "full": []}
    folder, (model, training) = save(tmp_path / "one", **options), adapted(**options)
    merged, base = tiny_transformer(backbone="vit5"), pipeline(tiny_transformer(backbone="vit5"))
    merged.load_state_dict(fold(model.state_dict(), training))
    base.load_lora_weights(folder)
    with pytest.raises(UserError, match="already folded into them"):
        pipeline(merged).load_lora_weights(folder)


def damage(change: Callable[[dict[str, Tensor]], None], folder: Path, name: str, **header: str) -> None:
    with safe_open(folder / name, "pt") as found:
        header = found.metadata() | header
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name, header)


def rewrite(folder: Path, name: str = ADAPTER, **header: str) -> None:
    damage(lambda found: None, folder, name, **header)


def rename(found: dict[str, Tensor]) -> None:
    for name in list(found):
        found[name.replace("lora_A", "lora_down").replace("lora_B", "lora_up")] = found.pop(name)


def halve(found: dict[str, Tensor], keep: int) -> None:
    """Keep so many rows of the first half of a pair."""
    name = next(name for name in sorted(found) if "lora_A" in name)
    found[name] = found[name][:keep].clone()
    if not keep:
        del found[name]


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lambda folder: (folder / ADAPTER).unlink(), r"pytorch_lora_weights.safetensors cannot be read"),
        (lambda folder: (folder / ADAPTER).write_bytes(b"0" * 100), r"cannot be read as safetensors"),
        (lambda folder: (folder / FULL).unlink(), r"trained_in_full.safetensors cannot be read"),
        (lambda folder: damage(lambda found: found.clear(), folder, ADAPTER), "has no weights of LoRA"),
        (
            lambda folder: damage(lambda found: next(iter(found.values())).fill_(float("nan")), folder, ADAPTER),
            r"adapter .* of the \d+ values of .*lora_A.weight are not finite",
        ),
        (
            lambda folder: damage(lambda found: found["label_embed.weight"].fill_(float("inf")), folder, FULL),
            r"values of label_embed.weight are not finite",
        ),
        (lambda folder: rewrite(folder, trained_in_full="{{"), "trained_in_full = '{{' in its header is no list"),
        (lambda folder: rewrite(folder, lora_adapter_metadata="[]"), r"lora_adapter_metadata = '\[\]' .* is no dict"),
        (lambda folder: rewrite(folder, FULL, config="{{"), "config = '{{' in its header is no dict"),
        (
            lambda folder: rewrite(folder, FULL, config='{"num_classes": 50, "class_dropout_prob": 0.1}'),
            "50, .* 6 rows",
        ),
        (lambda folder: save_file(load_file(folder / FULL), folder / FULL), "None, .* which 6 rows"),
        (
            lambda folder: damage(rename, folder, ADAPTER),
            r"no pair of matrices for .*expected transformer.LAYER.lora_A",
        ),
        (lambda folder: damage(lambda found: halve(found, 0), folder, ADAPTER), "no pair of matrices for backbone"),
        (lambda folder: damage(lambda found: halve(found, 1), folder, ADAPTER), r"lora_A of shape \(1, .* of .*, 2\)"),
    ],
)
def test_a_bad_adapter_is_told_in_one_line_and_changes_nothing(tmp_path: Path, harm: Any, message: str) -> None:
    folder, pipe = save(tmp_path / "one", rank=2), pipeline(tiny_transformer(backbone="vit5"))
    harm(folder)
    before = dict(pipe.transformer.state_dict())
    with pytest.raises(UserError, match=message) as told:
        pipe.load_lora_weights(folder)
    assert "\n" not in str(told.value)
    assert_identical(dict(pipe.transformer.state_dict()), before)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            {"hidden_size": 64},
            r"attn.proj is for 32 inputs, this transformer's has 64; it belongs to",
        ),
        ({"num_layers": 1}, r"this transformer has no layer backbone.blocks.1"),
        ({"seed": 1}, r"was trained on other weights than this pipeline has"),
        ({"backbone": "sit"}, r"was trained on other weights"),
    ],
)
def test_an_adapter_of_another_base_is_refused(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    pipe = pipeline(tiny_transformer(**{"backbone": "vit5", **options}))
    with pytest.raises(UserError, match=message) as told:
        pipe.load_lora_weights(save(tmp_path / "one", rank=2))
    assert "\n" not in str(told.value)


def test_adapters_of_diffusers_need_no_header(tmp_path: Path) -> None:
    model = tiny_transformer(backbone="sit")
    before = model(*inputs())
    model.add_adapter(LoraConfig(r=3, lora_alpha=6, target_modules=["qkv"], init_lora_weights=False))
    wanted = model(*inputs())
    assert gap(before, wanted) > 1e-3
    model.save_lora_adapter(tmp_path / "one")
    fresh = tiny_transformer(backbone="sit")
    fresh.load_lora_adapter(tmp_path / "one", prefix=None, use_safetensors=True)
    assert torch.equal(fresh(*inputs()), wanted)
    fresh.unload_lora()
    assert torch.equal(fresh(*inputs()), before)
    layers = load_file(tmp_path / "one" / ADAPTER)
    SiTPipeline.save_lora_weights(tmp_path / "two", transformer_lora_layers=layers)
    for source in (tmp_path / "two", {f"transformer.{name}": value for name, value in layers.items()}):
        pipe = pipeline(tiny_transformer(backbone="sit"))
        pipe.load_lora_weights(source)
        assert pipe.get_list_adapters() == {"transformer": ["default_0"]}
        pipe.set_adapters("default_0", 2.0)  # alpha is not in these files
        assert torch.allclose(pipe.transformer(*inputs()), wanted, atol=1e-5)


def small(preset: str = "S/2", **training: Any) -> Config:
    return validate(Config, {"model": {"preset": preset}, "training": {"precision": "fp32", **training}}, "test")


@pytest.mark.parametrize("trainable", ["lora", ["label_embed", "head"]])
def test_the_dry_run_counts_the_memory_of_what_is_trained(trainable: Any) -> None:
    config = small(trainable=trainable)
    model, found = build_model_to_train(config), run_cost(config)
    averages, optimizer = EMA(model, config.training.ema_decays), build_optimizer(model, config.training)
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    moments = [value for state in optimizer.state.values() for value in state.values() if value.ndim]
    assert cost.optimizer_bytes(found, config) == sum(value.nbytes for value in moments)
    kept = [*model.parameters(), *moments, *(one for some in averages.averages.values() for one in some)]
    kept += [parameter.grad for parameter in model.parameters() if parameter.grad is not None]
    assert cost.memory_bytes(found, config, 0, 1) == sum(tensor.nbytes for tensor in kept)
    assert found.parameters == run_cost(small()).parameters
    assert cost.checkpoint_bytes(found, config) < 0.4 * cost.checkpoint_bytes(run_cost(small()), small())
    line = next(line for line in describe(config, found) if line.startswith("trained:"))
    print(line)
    assert f"{found.trained:,} parameters" in line
    assert line.endswith(f"optimizer of {cost.optimizer_bytes(found, config):,} bytes")


@pytest.mark.slow
def test_a_step_with_adapters_alone_costs_the_optimizer_a_hundredth() -> None:
    config = small("XL/2", trainable="lora")
    whole, found = (run_cost(one) for one in (small("XL/2"), config))
    print(describe(config, found)[1])
    assert cost.optimizer_bytes(found, config) < 0.02 * cost.optimizer_bytes(whole, small("XL/2"))
    assert found.backward_flops < 0.6 * whole.backward_flops


def test_averages_of_frozen_parameters_in_older_checkpoints_are_left_out(tmp_path: Path) -> None:
    save_file({"moving": torch.ones(2), "frozen": torch.ones(2)}, tmp_path / "ema_0.9.safetensors")
    target = torch.zeros(2)
    checkpoint.fill([("moving", target)], tmp_path, "ema_0.9", {"frozen"})
    assert target.tolist() == [1, 1]
    with pytest.raises(UserError, match="has 'frozen', which this model lacks"):
        checkpoint.fill([("moving", target)], tmp_path, "ema_0.9")


@pytest.mark.slow
def test_accumulation_and_checkpointing_change_nothing(config_file: Path, tmp_path: Path) -> None:
    lora = {**LORA, "training__lora": {"rank": 2, "full": ["label_embed", "head"]}, "training__precision": "fp64"}
    more = {"micro": {"training__micro_batch_size": 1}, "again": {"training__gradient_checkpointing": True}}
    for name, options in {"plain": {}, **more}.items():
        assert run(config_file, tmp_path / name, **lora, **options) == 0
    assert losses(tmp_path / "again") == losses(tmp_path / "plain")
    np.testing.assert_allclose(losses(tmp_path / "micro"), losses(tmp_path / "plain"), rtol=1e-9)


def test_the_head_of_the_recipe_says_what_a_dry_run_prints() -> None:
    path = Path(__file__).parents[1] / "configs/finetune/folder-sit-xl-2-lora.yaml"
    config = load_config(path)
    head = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    assert set(describe(config, run_cost(config), 1)[:5]) <= set(head)


@pytest.mark.slow
def test_two_processes_and_shards_train_as_one(config_file: Path, tmp_path: Path) -> None:
    lora = {"rank": 2, "full": ["label_embed", "head"]}
    overrides = {"training.trainable": "lora", "training.lora": lora, "training.learning_rate": 0.02}
    overrides |= {"training.checkpoint_every": 10, "training.micro_batch_size": 1}

    def job(name: str, steps: int, **more: Any) -> dict[str, Any]:
        options = {**overrides, **more, "training.num_steps": steps}
        return {"config": config_file, "output": tmp_path / name, "overrides": options}

    assert (
        run(config_file, tmp_path / "one", **{key.replace(".", "__"): value for key, value in overrides.items()}) == 0
    )
    assert train_in(2, [job("two", 10)], tmp_path)[0] == [0]
    codes, sharded = train_in(2, [job("fsdp", 10), job("parts", 6), job("parts", 10)], tmp_path, fsdp=True)
    assert codes == [0, 0, 0]
    assert sharded[:3] == ["ViT5Block", "ViT5Block", "Learner"]
    assert_identical(weights(tmp_path / "fsdp", 10), weights(tmp_path / "parts", 10))
    for name in ("two", "fsdp"):
        np.testing.assert_allclose(losses(tmp_path / name), losses(tmp_path / "one"), atol=1e-5)
        folder, base = tmp_path / name / "pipeline", base_of(tmp_path / name)
        merged = pipeline(SiTPipeline.from_pretrained(folder).transformer)
        base.load_lora_weights(folder)
        assert gap(draw(base), draw(merged)) < 1e-6
        assert weights(tmp_path / name, 10).keys() == weights(tmp_path / "one", 10).keys()


@pytest.mark.slow
def test_a_compiled_run_trains_as_a_plain_one(config_file: Path, tmp_path: Path) -> None:
    lora = {**LORA, "training__lora": {"rank": 2, "full": ["label_embed", "head"]}}
    for name, compiled in (("plain", False), ("compiled", True)):
        assert run(config_file, tmp_path / name, **lora, training__compile=compiled) == 0
    np.testing.assert_allclose(losses(tmp_path / "compiled"), losses(tmp_path / "plain"), atol=1e-4)
    assert weights(tmp_path / "compiled", 10).keys() == weights(tmp_path / "plain", 10).keys()


@pytest.mark.slow
def test_a_run_killed_again_and_again_equals_an_undisturbed_one(config_file: Path, tmp_path: Path) -> None:
    options = ["--training.num_steps", "60", "--training.checkpoint_every", "5", "--training.trainable", "lora"]
    options += ["--training.lora", "{rank: 2, dropout: 0.2, full: [label_embed, head]}"]
    assert kill_test([str(config_file), "--kills", "4", "--output", str(tmp_path / "kills"), *options]) == 0
