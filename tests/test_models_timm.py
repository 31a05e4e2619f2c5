"""What timm's own models do, the classifier does too; each test names the one of timm that it stands for.

Left out with reasons: `torch.jit.script`, which torch deprecates (traces and `torch.export`: test_models_export.py);
`feature_cls` "list" and "dict", which timm's vision transformers do not have either.
"""

import argparse
from fractions import Fraction
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from called import call_convert
from timm.models import get_model_input_config, get_notrace_functions, get_notrace_modules, save_for_hf
from torch import Tensor
from torchvision.models.feature_extraction import create_feature_extractor, get_graph_node_names

from vit5gen.models import ViT5, load_vit5
from vit5gen.models.positions import resample_positions
from vit5gen.system.errors import UserError

SIZES = {"img_size": (32, 48), "patch_size": 8, "embed_dim": 32, "depth": 4, "num_heads": 2}


def create(**options: Any) -> Any:
    return timm.create_model("vit5_small", **(SIZES | options)).eval()


def images(height: int = 32, width: int = 48, channels: int = 3) -> Tensor:
    return torch.randn(2, channels, height, width, generator=torch.Generator().manual_seed(0))


def published(folder: Path, model: ViT5, arguments: Any) -> Path:
    """Save as ViT-5's authors do: under ``model``, with RoPE's buffers, and the arguments of the training."""
    state = dict(model.state_dict()) | {"blocks.0.attn.rope.freqs": torch.ones(3)}
    torch.save({"model": state, "args": arguments}, folder / "published.pth")
    return folder / "published.pth"


def test_forward() -> None:
    """timm: test_model_forward."""
    model = create()
    logits = model(images())
    model.set_grad_checkpointing()
    assert logits.shape == (2, 1000)
    assert torch.equal(model(images()), logits)


def test_backward() -> None:
    """timm: test_model_backward, test_model_backward_fx."""
    model = create(num_classes=42).train()
    logits = model(images())
    assert logits.shape == (2, 42)
    parameters = list(model.parameters())
    gradients = torch.autograd.grad(logits.mean(), parameters)
    again = torch.autograd.grad(traced(model)(images())["out"].mean(), parameters)
    assert all(torch.equal(a, b) for a, b in zip(gradients, again, strict=True))


def test_configuration() -> None:
    """timm: test_model_default_cfgs_non_std."""
    model = create()
    names, config = model.state_dict().keys(), model.default_cfg
    assert {config["classifier"] + ".weight", config["first_conv"] + ".weight"} <= names
    tokens = model.forward_features(images())
    assert tokens.shape[-1] == model.num_features == model.head_hidden_size
    features = model.forward_head(tokens, pre_logits=True)
    model.reset_classifier(0)
    assert torch.equal(model(images()), features)
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), tokens)
    assert create(num_classes=0)(images()).shape == features.shape


def test_pretrained_weights_of_other_channels_and_classes(tmp_path: Path) -> None:
    """timm: test_model_load_pretrained, test_model_features_pretrained."""
    source = create(num_classes=7)
    file = published(tmp_path, source, argparse.Namespace(lr=1.0))
    options = {"pretrained": True, "pretrained_cfg_overlay": {"file": str(file), "num_classes": 7}}
    for num_classes in (5, 0):
        model = create(in_chans=1, num_classes=num_classes, **options)
        assert torch.equal(model.patch_embed.proj.weight, source.patch_embed.proj.weight.sum(1, keepdim=True))
        assert torch.equal(model.cls_token, source.cls_token)
    features = create(features_only=True, **options)(images())
    assert torch.equal(features[-1], source.forward_intermediates(images(), intermediates_only=True)[-1])


@pytest.mark.parametrize(
    ("feature_cls", "shape"), [("getter", (2, 32, 4, 6)), ("hook", (2, 29, 32)), ("fx", (2, 29, 32))]
)
def test_features(feature_cls: str, shape: tuple[int, ...]) -> None:
    """timm: test_model_forward_features, test_model_forward_intermediates_features. Hook and fx see all tokens."""
    model = create(features_only=True, feature_cls=feature_cls, out_indices=(0, 2, 3))
    assert [o.shape for o in model(images())] == [shape] * 3
    assert (model.feature_info.channels(), model.feature_info.reduction()) == ([32] * 3, [8] * 3)


def test_intermediates() -> None:
    """timm: test_model_forward_intermediates, and what FeatureGetterNet does with `prune_intermediate_layers`."""
    model = create()
    tokens, found = model.forward_intermediates(images())
    assert [o.shape for o in found] == [(2, 32, 4, 6)] * 4
    assert torch.equal(tokens, model.forward_features(images()))
    model.set_grad_checkpointing()
    assert torch.equal(model.forward_intermediates(images())[0], tokens)
    assert model.prune_intermediate_layers([0, 2], prune_norm=True) == [0, 2]
    assert len(model.blocks) == 3
    pruned = model.forward_intermediates(images(), [0, 2], intermediates_only=True)
    assert all(torch.equal(a, b) for a, b in zip(pruned, found[::2], strict=True))


def traced(model: ViT5) -> Any:
    """Return the graph of the logits, ``graph(images)["out"]``, traced as timm's tests trace."""
    tracer = {
        "leaf_modules": get_notrace_modules(),
        "autowrap_functions": get_notrace_functions(),
        "param_shapes_constant": True,
    }
    train, evaluation = get_graph_node_names(model, tracer_kwargs=tracer)
    nodes = {"train_return_nodes": {train[-1]: "out"}, "eval_return_nodes": {evaluation[-1]: "out"}}
    return create_feature_extractor(model, **nodes, tracer_kwargs=tracer)


def test_graph() -> None:
    """timm: test_model_forward_fx. The graph takes other sizes; it has torch's own products, so a bit may differ."""
    model = create()
    graph = traced(model)
    for size in ((32, 48), (40, 24)):
        assert torch.equal(graph(images(*size))["out"], model(images(*size)))
        with torch.inference_mode():
            torch.testing.assert_close(graph(images(*size))["out"], model(images(*size)), rtol=1e-5, atol=1e-6)
    for make in (create_feature_extractor, timm.models.create_feature_extractor):
        state = make(model, ["blocks.1"])(images())["blocks.1"]
        patches = model.forward_intermediates(images(), [1], intermediates_only=True, output_fmt="NLC")[0]
        assert torch.equal(state[:, 1:25], patches)


def test_checkpoint_path_takes_published_files(tmp_path: Path) -> None:
    """timm: test_weights_only_allows_argparse_namespace; other sizes as for `pretrained`."""
    source = create(img_size=32)
    file = published(tmp_path, source, argparse.Namespace(lr=1.0))
    assert torch.equal(create(img_size=32, checkpoint_path=file).pos_embed, source.pos_embed)
    for size in ((32, 48), (64, 16)):  # the second has as many positions
        positions = resample_positions(source.pos_embed, (4, 4), (size[0] // 8, size[1] // 8))
        assert torch.equal(create(img_size=size, checkpoint_path=file).pos_embed, positions)
    own = create(img_size=(64, 16))
    torch.save(own.state_dict(), tmp_path / "own.pth")
    assert torch.equal(create(img_size=(64, 16), checkpoint_path=tmp_path / "own.pth").pos_embed, own.pos_embed)


def test_a_subclass_may_name_a_part_as_wrappers_do() -> None:
    class Segmenter(ViT5):
        def __init__(self) -> None:
            super().__init__(**SIZES)
            self.net = torch.nn.Linear(32, 2)

    source, other = Segmenter(), Segmenter()
    other.load_state_dict(source.state_dict())
    assert torch.equal(other.net.weight, source.net.weight)


def test_a_file_with_other_objects_is_converted(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """timm: test_weights_only_blocks_non_allowlisted_globals. Nothing of the file is run."""
    source = create(img_size=32)
    file = published(tmp_path, source, {"folder": tmp_path, "lr": Fraction(1, 3), "code": Code()})
    with pytest.raises(RuntimeError, match="weights_only"):
        create(img_size=32, checkpoint_path=file)
    with pytest.raises(UserError, match=rf"it contains \S+\); .*`vit5gen convert {file} --output FOLDER`") as error:
        load_vit5(file)
    assert "\n" not in str(error.value)
    call_convert(file, tmp_path / "converted")
    assert "code ran" not in capsys.readouterr().out
    weights = tmp_path / "converted" / "model.safetensors"
    for model in (create(img_size=32, checkpoint_path=weights), load_vit5(weights).eval()):
        assert torch.equal(model(images(32, 32)), source(images(32, 32)))
    with pytest.raises(UserError, match="is a classifier: --vae"):
        call_convert(file, tmp_path / "other", vae="none")
    assert not (tmp_path / "other").exists()


class Code:
    def __reduce__(self) -> tuple[Any, ...]:
        return (print, ("code ran",))


def test_device_and_dtype() -> None:
    """timm: create_model(device=, dtype=), which its models pass to every layer."""
    torch.manual_seed(0)
    model = create(dtype=torch.bfloat16, device="cpu")
    torch.manual_seed(0)
    for (name, p), wide in zip(model.named_parameters(), create().parameters(), strict=True):
        assert torch.equal(p, wide.bfloat16()), name
    assert model(images().bfloat16()).dtype == torch.bfloat16
    assert {p.device.type for p in create(device="meta").parameters()} == {"meta"}
    assert "device" not in model._model_args


def test_input_size(tmp_path: Path) -> None:
    """timm: set_input_size and dynamic_img_size of its vision transformers; what is saved after it is built alike."""
    model = create(in_chans=1)
    assert get_model_input_config(model)["input_size"] == (1, 32, 48)
    model.pos_embed.requires_grad_(False)
    positions = model.pos_embed
    model.set_input_size()
    assert model.pos_embed is positions
    model.set_input_size(img_size=(64, 32))
    assert torch.equal(model.pos_embed, resample_positions(positions, (4, 6), (8, 4)))
    assert (model.grid, model.pos_embed.requires_grad) == ((8, 4), False)
    assert model.forward_features(images(64, 32, 1)).shape == (2, 1 + 32 + 4, 32)
    model.set_input_size(img_size=128, patch_size=(16, 16))
    assert get_model_input_config(model)["input_size"] == (1, 128, 128)
    assert (model.grid, model.patch_embed.proj.weight.shape) == ((8, 8), (32, 1, 16, 16))
    assert model.forward_intermediates(images(128, 128, 1))[1][0].shape == (2, 32, 8, 8)
    assert {info["reduction"] for info in model.feature_info} == {16}
    save_for_hf(model, tmp_path)
    saved = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    assert torch.equal(saved(images(128, 128, 1)), model(images(128, 128, 1)))
    for options in ({"img_size": 40}, {"patch_size": (16, 8)}, {"patch_size": 0}):
        with pytest.raises(UserError, match=r"image size: 40x40 is not|patch_size: 16x8 is not square|patch_size: 0"):
            model.set_input_size(**options)
    assert create(dynamic_img_size=True)(images(16, 16)).shape == (2, 1000)
    with pytest.raises(AssertionError, match="Input height"):
        create(dynamic_img_size=False)(images(16, 16))
