"""The ViT-5 classifier under timm's conventions."""

import argparse

import pytest
import timm
import torch

from vit5gen.models import ViT5
from vit5gen.models.classifier import checkpoint_filter_fn, default_cfgs
from vit5gen.system.errors import UserError

COUNTS = {
    "vit5_small": 22_039_144,
    "vit5_base": 86_543_080,
    "vit5_large": 304_258_024,
    "vit5_xlarge": 448_505_128,
}


def tiny(**sizes):
    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": 32, "depth": 3, "num_heads": 2, "num_classes": 5} | sizes
    return ViT5(**sizes).eval()


def images(height=32, width=32):
    return torch.randn(2, 3, height, width, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(("name", "count"), COUNTS.items())
def test_timm_creates_the_published_sizes(name, count):
    assert timm.is_model(name)
    with torch.device("meta"):
        model = timm.create_model(name)
        assert timm.create_model(name, num_classes=10, img_size=384).pos_embed.shape[1] == 576
    assert isinstance(model, ViT5)
    assert sum(p.numel() for p in model.parameters()) == count
    assert model.no_weight_decay() == {"pos_embed", "cls_token", "reg_token"}


def test_pretrained_configurations_point_at_the_published_files():
    published = {
        "vit5_small": ["vit5_small_patch16_224.pth"],
        "vit5_base": ["vit5_base_patch16_224.pth", "vit5_base_patch16_384.pth"],
        "vit5_large": ["vit5_large_patch16_224.pth", "vit5_large_patch16_384.pth"],
        "vit5_xlarge": [""],
    }
    for name, files in published.items():
        configs = list(default_cfgs[name].cfgs.values())
        assert [config.url.split("/")[-1] for config in configs] == files
        assert all((c.crop_pct, c.interpolation) == (1.0, "bicubic") for c in configs)
    with torch.device("meta"):
        assert timm.create_model("vit5_base.in1k_384").grid == (24, 24)


def test_pretrained_file_of_another_size_and_head(tmp_path):
    """A file as published (RoPE buffers, pickled arguments) at 32 goes into a model at 48 with a head of its own."""
    source = timm.create_model("vit5_small", depth=1, img_size=32, num_classes=7)
    state = dict(source.state_dict()) | {"blocks.0.attn.rope.freqs": torch.ones(16)}
    torch.save({"model": state, "args": argparse.Namespace(lr=1)}, tmp_path / "file.pth")
    overlay = {"file": str(tmp_path / "file.pth"), "num_classes": 7}
    make = {"depth": 1, "pretrained": True, "pretrained_cfg_overlay": overlay}
    model = timm.create_model("vit5_small", img_size=48, num_classes=7, **make)
    assert torch.equal(model.head.weight, source.head.weight)
    assert model.pos_embed.shape[1] == 9
    other = timm.create_model("vit5_small", img_size=32, num_classes=3, **make)
    assert torch.equal(other.pos_embed, source.pos_embed)
    assert other.head.weight.shape == (3, 384)


@pytest.mark.parametrize(("old", "new"), [(192, 224), (224, 384), (384, 192), (224, 224)])
def test_checkpoint_filter_resamples_positions(old, new):
    from timm.layers import resample_abs_pos_embed

    state = tiny(img_size=old, patch_size=16).state_dict() | {"blocks.0.attn.rope_reg.freqs": torch.ones(1)}
    model = tiny(img_size=new, patch_size=16)
    filtered = checkpoint_filter_fn({"model": {f"module.{key}": value for key, value in state.items()}}, model)
    model.load_state_dict(filtered)
    expected = resample_abs_pos_embed(state["pos_embed"], [new // 16] * 2, num_prefix_tokens=0)
    torch.testing.assert_close(filtered["pos_embed"], expected, rtol=1e-4, atol=1e-6)


def test_heads_and_pooling():
    model = tiny()
    tokens = model.forward_features(images())
    assert tokens.shape == (2, 1 + 16 + 4, 32)
    assert torch.equal(model(images()), model.head(tokens[:, 0]))
    assert torch.equal(model.forward_head(tokens, pre_logits=True), tokens[:, 0])
    assert torch.equal(tiny(num_classes=0).get_classifier()(tokens), tokens)
    model.reset_classifier(9)
    assert model(images()).shape == (2, 9)
    model.reset_classifier(0, "avg")
    assert torch.equal(model(images()), tokens[:, 1:17].mean(1))
    model.reset_classifier(0, "")
    assert torch.equal(model(images()), tokens)


def test_intermediates():
    model = tiny()
    tokens, found = model.forward_intermediates(images(40, 24), norm=True, return_prefix_tokens=True)
    assert torch.equal(tokens, model.forward_features(images(40, 24)))
    assert [(patches.shape, extra.shape) for patches, extra in found] == [((2, 32, 5, 3), (2, 5, 32))] * 3
    patches, extra = found[-1]
    assert torch.equal(patches.flatten(2).transpose(1, 2), tokens[:, 1:16])
    assert torch.equal(extra, torch.cat([tokens[:, :1], tokens[:, 16:]], dim=1))
    (one,) = model.forward_intermediates(
        images(), indices=[0], stop_early=True, output_fmt="NLC", intermediates_only=True
    )
    assert one.shape == (2, 16, 32)
    features = timm.create_model("vit5_small", depth=3, img_size=32, features_only=True)
    assert [f.shape for f in features(images())] == [(2, 384, 2, 2)] * 3


def test_gradient_checkpointing_changes_no_bit():
    model, grads = tiny(), []
    for enable in (False, True):
        model.set_grad_checkpointing(enable)
        model.zero_grad()
        model(images()).square().mean().backward()
        grads.append([p.grad for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))


def test_every_parameter_gets_a_gradient_and_drop_path_drops_in_training_only():
    model = tiny(drop_path_rate=0.5, num_registers=9)
    assert torch.equal(model(images()), model(images()))
    model.train()
    torch.manual_seed(0)
    outs = torch.stack([model(images()) for _ in range(4)])
    assert not torch.equal(outs[0], outs[1])
    outs.square().mean().backward()
    assert all(p.grad.any() for p in model.parameters())


def test_compiles_without_a_graph_break():
    torch.compiler.reset()
    model = tiny(depth=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(images()), model(images()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ({"num_registers": 3}, "num_registers: 3 is not a square"),
        ({"num_heads": 3}, "num_heads: 3 does not divide embed_dim 32"),
        ({"num_heads": 16}, "num_heads: 16 gives heads of 2 channels"),
        ({"patch_size": 0}, "patch_size: 0"),
        ({"depth": 0}, "depth: 0"),
        ({"img_size": 33}, "image size: 33x33 is not divisible by patch_size 8"),
        ({"global_pool": "map"}, "global_pool: 'map'"),
    ],
)
def test_bad_arguments(sizes, message):
    with pytest.raises(UserError, match=message):
        tiny(**sizes)


def test_bad_image_size():
    with pytest.raises(UserError, match="image size: 32x33"):
        tiny()(images(32, 33))
