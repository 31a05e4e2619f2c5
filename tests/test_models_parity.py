"""Outputs, guidance and gradients against recordings of the published code, and the classifier against timm's Eva."""

import functools
import json
from pathlib import Path

import pytest
import timm
import torch
from safetensors import safe_open
from timm.layers import RotaryEmbeddingCat
from timm.models.eva import Eva

from vit5gen.models import load_sit, load_vit5

FIXTURES = Path(__file__).parent / "fixtures"


def read_oracle(name):
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (not a mapping)
        config = json.loads(file.metadata()["config"])
    return config, tensors, {key[6:]: value for key, value in tensors.items() if key.startswith("state.")}


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


def gradients(model, loss, renamed):
    loss.backward()
    return {name: model.get_parameter(ours).grad for name, ours in renamed.items()}


@pytest.mark.parametrize("name", ["sit_tiny", "sit_tiny_learn_sigma"])
def test_sit_equals_the_published_code(name):
    config, oracle, state = read_oracle(name)
    model = load_sit(state, num_attention_heads=config["num_heads"])
    out = model(oracle["in.x"], oracle["in.t"], oracle["in.y"])
    assert relative(out, oracle["out"]) < 1e-5
    renamed = {
        "blocks.0.attn.qkv.weight": "backbone.blocks.0.attn.qkv.weight",
        "final_layer.linear.weight": "head.linear.weight",
        "x_embedder.proj.weight": "patch_embed.weight",
    }
    for theirs, grad in gradients(model, out.pow(2).mean(), renamed).items():
        recorded = oracle[f"grad.{theirs}"]
        assert relative(grad.view_as(recorded), recorded) < 1e-5, theirs


@pytest.mark.parametrize("name", ["sit_tiny", "sit_tiny_learn_sigma"])
def test_guidance_on_three_channels_equals_the_published_code(name):
    config, oracle, state = read_oracle(name)
    model = load_sit(state, num_attention_heads=config["num_heads"])
    x, t = torch.cat([oracle["in.x"]] * 2), torch.cat([oracle["in.t"]] * 2)
    out = model(x, t, oracle["cfg1.5.in.y"])
    conditional, unconditional = out[:, :3].chunk(2)
    guided = torch.cat([unconditional + 1.5 * (conditional - unconditional)] * 2)
    assert relative(torch.cat([guided, out[:, 3:]], dim=1), oracle["cfg1.5.out"]) < 1e-5


def test_vit5_equals_the_published_code():
    config, oracle, state = read_oracle("vit5_tiny")
    model = load_vit5(state)
    assert model.head_dim * config["num_heads"] == config["embed_dim"]
    logits = model(oracle["in.x"])
    assert relative(model.forward_features(oracle["in.x"])[:, 0], oracle["features"]) < 1e-5
    assert relative(logits, oracle["logits"]) < 1e-5
    names = [key[5:] for key in oracle if key.startswith("grad.")]
    for name, grad in gradients(model, logits.pow(2).mean(), {name: name for name in names}).items():
        assert relative(grad, oracle[f"grad.{name}"]) < 1e-5, name


class EvaWithRegisterRope(Eva):
    """timm's Eva as an independent ViT-5: registers, put before the patches, turn on a 2x2 grid of their own."""

    def _pos_embed(self, x):
        x, rope = super()._pos_embed(x)
        return x, torch.cat([self.register_rope.get_embed((2, 2)), rope])


def make_eva(size):
    norm = functools.partial(torch.nn.RMSNorm, eps=1e-6)
    eva = EvaWithRegisterRope(
        img_size=size, embed_dim=384, depth=12, num_heads=6, qkv_bias=False, qk_norm=True, norm_layer=norm,
        init_values=1e-4, num_reg_tokens=4, no_embed_class=True, use_rot_pos_emb=True, rope_type="cat",
        ref_feat_shape=(size // 16, size // 16), dynamic_img_size=True, global_pool="token", use_fc_norm=False,
    )  # fmt: skip
    eva.register_rope = RotaryEmbeddingCat(
        64, temperature=100.0, in_pixels=False, feat_shape=None, ref_feat_shape=(2, 2)
    )
    for block in eva.blocks:
        block.attn.num_prefix_tokens = 1  # only cls keeps still
    return eva.eval()


@pytest.mark.parametrize(("built", "fed"), [(224, (224, 224)), (384, (384, 384)), (224, (384, 384)), (224, (160, 288))])
def test_vit5_small_equals_eva(built, fed):
    generator = torch.Generator().manual_seed(0)
    ours = timm.create_model("vit5_small", img_size=built).eval()
    with torch.no_grad():
        for name, parameter in ours.named_parameters():
            parameter.normal_(1.0 if "norm" in name else 0.0, 0.05, generator=generator)
    eva = make_eva(built)
    assert sorted(eva.state_dict()) == sorted(ours.state_dict())
    eva.load_state_dict(ours.state_dict())
    images = torch.randn(1, 3, *fed, generator=generator)
    with torch.inference_mode():
        assert relative(ours(images), eva(images)) < 1e-5
