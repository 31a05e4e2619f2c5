"""Loaders of published checkpoints: sizes from shapes, safe reading, and refusal of what does not fit."""

import argparse
import pickle

import pytest
import torch
from safetensors.torch import save_file
from test_models_parity import read_oracle, relative

from vit5gen.models import ViT5, load_sit, load_vit5
from vit5gen.models.weights import read_checkpoint
from vit5gen.system.errors import UserError


def published_vit5(img_size=24, patch_size=8, **sizes):
    """A state dict in the published layout, RoPE buffers included."""
    sizes = {"embed_dim": 24, "depth": 2, "num_heads": 2, "num_classes": 5} | sizes
    model = ViT5(img_size=img_size, patch_size=patch_size, **sizes)
    state = dict(model.state_dict())
    for i in range(sizes["depth"]):
        state[f"blocks.{i}.attn.rope.freqs"] = state[f"blocks.{i}.attn.rope_reg.freqs"] = torch.ones(3)
    return model.eval(), state


@pytest.mark.parametrize("wrap", [lambda s: {"ema": s, "model": {}, "opt": {}}, lambda s: {"model": s}, dict])
@pytest.mark.parametrize("prefix", ["", "module.", "_orig_mod.", "module._orig_mod."])
def test_sit_file_with_pickled_arguments(tmp_path, wrap, prefix):
    _, oracle, state = read_oracle("sit_tiny")
    wrapped = wrap({prefix + key: value for key, value in state.items()})
    if "ema" in wrapped or "model" in wrapped:
        wrapped["args"] = argparse.Namespace(model="SiT-XL/2", lr=1e-4)
    torch.save(wrapped, tmp_path / "sit.pt")
    model = load_sit(tmp_path / "sit.pt", num_attention_heads=3)
    assert relative(model(oracle["in.x"], oracle["in.t"], oracle["in.y"]), oracle["out"]) < 1e-5
    config = {
        key: model.config[key] for key in ("sample_size", "patch_size", "num_classes", "learn_sigma", "num_layers")
    }
    assert config == {"sample_size": 8, "patch_size": 4, "num_classes": 7, "learn_sigma": False, "num_layers": 2}


def test_sit_safetensors(tmp_path):
    _, _, state = read_oracle("sit_tiny_learn_sigma")
    save_file(state, tmp_path / "sit.safetensors")
    model = load_sit(tmp_path / "sit.safetensors", num_attention_heads=4)
    assert model.config.learn_sigma
    assert model.config.mlp_ratio == 4.0


def test_sit_without_a_null_row():
    _, _, state = read_oracle("sit_tiny")
    model = load_sit(state, num_attention_heads=3, class_dropout_prob=0.0)
    assert model.null_label == model.config.num_classes == 8


@pytest.mark.parametrize(
    ("img_size", "sizes"),
    [
        (24, {}),
        (32, {"num_registers": 9, "depth": 3, "num_classes": 2}),
        (16, {"num_registers": 0, "in_chans": 1, "mlp_ratio": 2.7}),
        (40, {"num_registers": 16, "num_heads": 3, "num_classes": 0}),
    ],
)
def test_vit5_sizes_are_read_from_the_shapes(img_size, sizes):
    published, state = published_vit5(img_size, **sizes)
    model = load_vit5({"model": state}).eval()
    images = torch.randn(2, sizes.get("in_chans", 3), img_size, img_size)
    assert torch.equal(model(images), published(images))


def test_vit5_at_another_size():
    published, state = published_vit5(32)
    images = torch.randn(2, 3, 48, 48)
    model = load_vit5(state, img_size=48).eval()
    assert model.pos_embed.shape == (1, 36, 24)
    assert model.grid == (6, 6)
    # positions are the same as when the model built at 32 is fed 48, the rotation is not: it runs over 0..5 now
    assert relative(model(images), published(images)) > 1e-6
    non_square = load_vit5(state, img_size=(24, 48), drop_path_rate=0.1)
    assert non_square(torch.randn(1, 3, 24, 48)).shape == (1, 5)


def test_surplus_and_missing_keys_are_listed_five_at_most():
    _, state = published_vit5(depth=12)
    state |= {f"head_dist.{i}": torch.ones(1) for i in range(7)}
    for key in [key for key in state if key.endswith("fc2.bias")]:
        del state[key]
    with pytest.raises(UserError) as error:
        load_vit5(state)
    message = str(error.value)
    assert "\n" not in message
    assert message.count("fc2.bias") == message.count("head_dist.") == 5
    assert "and 7 more" in message
    assert "and 2 more" in message
    assert "Likely cause" in message


def test_what_is_unsafe_is_named(tmp_path):
    _, _, state = read_oracle("sit_tiny")
    torch.save({"ema": state, "args": argparse.Namespace(data=tmp_path)}, tmp_path / "sit.pt")
    advice = rf"save only its state dict, as `vit5gen convert {tmp_path}/sit\.pt --output FOLDER` does\.$"
    with pytest.raises(UserError, match=rf"it contains pathlib\S*PosixPath\); {advice}") as error:
        load_sit(tmp_path / "sit.pt")
    assert "\n" not in str(error.value)


class Unsafe:
    def __reduce__(self):
        return (print, ("code ran",))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (pickle.dumps({"model": Unsafe()}), "cannot be read safely"),
        (b"not a checkpoint", "cannot be read safely"),
        (b"Repository not found", "cannot be read safely"),  # its letters are instructions to an unpickler
        (b"hello", "cannot be read safely"),
        (b"", "cannot be read safely"),
        (None, "is not a file"),
    ],
)
@pytest.mark.parametrize("load", [load_sit, load_vit5])
def test_bad_files(tmp_path, capsys, content, message, load):
    path = tmp_path / "file.pt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(UserError, match=message) as error:
        load(path)
    assert "\n" not in str(error.value)
    assert "code ran" not in capsys.readouterr().out


def test_bad_safetensors(tmp_path):
    (tmp_path / "file.safetensors").write_bytes(b"nonsense")
    with pytest.raises(UserError, match="cannot be read safely"):
        read_checkpoint(tmp_path / "file.safetensors")


def test_other_layouts_are_named():
    _, _, sit = read_oracle("sit_tiny")
    _, vit5 = published_vit5()
    with pytest.raises(UserError, match=r"no 'x_embedder.proj.weight', so it is not SiT's published layout"):
        load_sit(vit5)
    with pytest.raises(UserError, match=r"no 'patch_embed.proj.weight', so it is not ViT-5's published layout"):
        load_vit5(sit)
    with pytest.raises(UserError, match="contains no state dict"):
        load_sit({"epoch": 3})
    with pytest.raises(UserError, match="contains no state dict"):
        load_vit5({0: torch.ones(1)})


def test_sit_arguments_that_do_not_fit():
    _, _, state = read_oracle("sit_tiny")
    with pytest.raises(UserError, match="no preset has hidden_size 48; set num_attention_heads"):
        load_sit(state)
    with pytest.raises(UserError, match="num_attention_heads: 5 does not divide"):
        load_sit(state, num_attention_heads=5)
    with pytest.raises(UserError, match=r"wrong shape: label_embed.weight \(8, 48\) for \(11, 48\)"):
        load_sit(state, num_attention_heads=3, num_classes=10)
    cut = {key: value for key, value in state.items() if "blocks.1" not in key}
    with pytest.raises(UserError, match="missing: "):
        load_sit(cut, num_attention_heads=3, num_layers=2)
    del cut["y_embedder.embedding_table.weight"]
    with pytest.raises(UserError, match="y_embedder"):
        load_sit(cut, num_attention_heads=3)


def test_vit5_arguments_that_do_not_fit():
    _, state = published_vit5()
    with pytest.raises(UserError, match="wrong shape: patch_embed"):
        load_vit5(state, patch_size=4)
    with pytest.raises(UserError, match=r"wrong shape: .*q_norm"):
        load_vit5(state, num_heads=1)
    with pytest.raises(UserError, match="num_heads: 0 does not divide embed_dim 24"):
        load_vit5(state, num_heads=0)
    with pytest.raises(UserError, match="image size: 25x25"):
        load_vit5(state, img_size=25)
    state["pos_embed"] = state["pos_embed"][:, :6]
    with pytest.raises(UserError, match="6 positions do not form a square"):
        load_vit5(state)
    assert load_vit5(state, img_size=(16, 24)).grid == (2, 3)
