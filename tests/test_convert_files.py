"""Files as users have them: wrapped by trainers, with parts of a training, of another kind, or of another model."""

import json
import re
import zipfile
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from called import call_convert
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from vit5gen import SiTPipeline
from vit5gen.models import load_sit
from vit5gen.models.weights import read_checkpoint, read_tensors
from vit5gen.system.errors import UserError
from vit5gen.training.initial import open_origin

FIXTURES = Path(__file__).with_name("fixtures")
HEADS = 3
TABLE, HEAD = "y_embedder.embedding_table.weight", "final_layer.linear.weight"


def published(name: str = "sit_tiny") -> dict[str, Tensor]:
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        keys = [key for key in file.keys() if key.startswith("state.")]  # noqa: SIM118
        return {key.removeprefix("state."): file.get_tensor(key) for key in keys}


def zeros(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: torch.zeros_like(value) for key, value in state.items()}


def prefixed(state: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {prefix + key: value for key, value in state.items()}


def convert(state: dict[str, Any], folder: Path, file: str = "sit.pt", **options: Any) -> SiTPipeline:
    torch.save(state, folder / file)
    call_convert(folder / file, folder / "out", vae="none", num_attention_heads=HEADS, **options)
    return SiTPipeline.from_pretrained(folder / "out")


HOLDERS: dict[str, Callable[[dict[str, Tensor]], dict[str, Any]]] = {
    "model.": lambda s: prefixed(s, "model."),
    "net.": lambda s: prefixed(s, "net."),
    "compiled, then wrapped": lambda s: prefixed(s, "module._orig_mod."),
    "Lightning": lambda s: {"state_dict": prefixed(s, "model.net."), "epoch": 3},
    "Lightning with an average": lambda s: {"state_dict": prefixed(zeros(s), "model.") | prefixed(s, "ema_model.")},
    "ema-pytorch": lambda s: prefixed(zeros(s), "online_model.") | prefixed(s, "ema_model.") | {"step": torch.ones(1)},
    "ema_model": lambda s: {"model": zeros(s), "ema_model": s},
    "net": lambda s: {"net": s, "optimizer": {"state": {}}},
    "timm's average": lambda s: {"state_dict": zeros(s), "state_dict_ema": s, "arch": "SiT"},
    "a holder in a holder": lambda s: {"model": {"ema": prefixed(s, "module."), "net": zeros(s)}},
}


@pytest.mark.parametrize("name", HOLDERS)
def test_the_usual_holders_are_opened_and_averages_preferred(name: str, tmp_path: Path) -> None:
    """Stands for timm's test_resume_checkpoint_default_weights_only_namespace, whose weights lie under a key."""
    state = published()
    torch.save(HOLDERS[name](state), tmp_path / "sit.pt")
    found = read_checkpoint(tmp_path / "sit.pt")
    assert found.keys() == state.keys()
    assert all(torch.equal(found[key], state[key]) for key in state)


def test_a_file_that_holds_itself_ends_in_one_line() -> None:
    state: dict[str, Any] = {"epoch": 1}
    state["model"] = {"ema": state}
    with pytest.raises(UserError, match="contains no state dict"):
        read_checkpoint(state)


def test_two_models_in_one_file_are_not_mixed() -> None:
    state = published()
    with pytest.raises(UserError, match=r"holds several models, one with model\.\S+; save"):
        read_checkpoint(prefixed(state, "model.") | prefixed(zeros(state), "net."))


@pytest.mark.parametrize("protocol", [2, 4])
def test_what_cannot_be_read_past_is_told(protocol: int, tmp_path: Path) -> None:
    """A dictionary of another class, and pickles of a later protocol, which torch cannot read in safety."""
    torch.save({"ema": {}, "args": defaultdict(int, a=1)}, tmp_path / "a.pt", pickle_protocol=protocol)
    with pytest.raises(UserError, match=r"it holds more than can be read past\); save only its state dict\.$"):
        read_tensors(tmp_path / "a.pt", "checkpoint", leave_out=True)


def test_parts_of_the_training_are_named_and_left_out_when_asked_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stands for what a strict `load_state_dict` tells of unexpected keys (timm's and diffusers' loading tests)."""
    state = published()
    repa = {f"projectors.0.{i}.weight": torch.ones(2, 2) for i in (0, 2, 4)}
    told = r"does not have: projectors\.0\.0\.weight, .*--drop-prefix projectors\.`$"
    with pytest.raises(UserError, match=told):
        convert(state | repa, tmp_path)
    with pytest.raises(UserError, match=told):
        open_origin(str(tmp_path / "sit.pt"), num_attention_heads=HEADS)  # as training.init_from does
    with pytest.raises(UserError, match=r"--drop-prefix projector_: no weight has a name that begins so"):
        convert(state | repa, tmp_path, drop_prefix=["projectors.", "projector_"])
    assert not (tmp_path / "out").exists()
    pipe = convert(state | repa, tmp_path, drop_prefix=["projectors."])
    assert "add --reversed-time" in capsys.readouterr().out
    expected = load_sit(state, HEADS).state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in pipe.transformer.state_dict().items())


def test_reversed_time_is_turned_exactly(tmp_path: Path) -> None:
    """REPA's networks predict noise - data at the time 1 - t; here that is data - noise at t."""
    state = published()
    pipe, there = convert({"ema": state}, tmp_path, reversed_time=True), load_sit(state, HEADS)
    x, t, labels = torch.randn(4, 4, 8, 8), torch.tensor([0.0, 0.3, 0.9, 1.0]), torch.tensor([0, 3, 6, 7])
    with torch.no_grad():
        ours, theirs = pipe.transformer(x, t, labels), there(x, 1 - t, labels)
    assert theirs.std() > 0.01
    assert (ours + theirs).abs().max() < 1e-5 * theirs.abs().max()
    assert (ours + there(x, t, labels)).abs().max() > 1e-3 * theirs.abs().max()


def html(path: Path) -> None:
    path.write_text("\n<!DOCTYPE html><html><head><title>Sign in</title></head></html>")


def pointer(path: Path) -> None:
    path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 2700611775\n")


def other_zip(path: Path) -> None:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("SiT/README.md", "read me")
        archive.writestr("SiT/last.pt", b"weights")


@pytest.mark.parametrize(
    ("name", "write", "message"),
    [
        ("a.pt", pointer, r"is a Git LFS pointer, not the weights; run `git lfs pull`"),
        ("a.safetensors", pointer, r"is a Git LFS pointer"),
        ("a.pt", html, r"is an HTML page, not the weights .*; download the file itself"),
        ("a.safetensors", html, r"is an HTML page"),
        ("a.pt", lambda path: path.write_text("\ufeff<!-- Error -->\r\n<html>"), r"is an HTML page"),
        ("a.pt", lambda path: save_file(published(), path), r"is a safetensors file .*; rename it to a\.safetensors"),
        ("a.safetensors", lambda path: torch.save(published(), path), r"is a torch file .*; rename it to a\.pt"),
        ("a.pt", lambda path: path.write_bytes(b"PK\x05\x06" + b"\xff" * 16 + b"\0\0"), r"cannot be read safely"),
        ("a.pth", other_zip, r"is a zip archive of SiT/README\.md, SiT/last\.pt, not a torch file; unpack it"),
    ],
)
def test_a_file_that_is_no_weights_is_named_for_what_it_is(
    tmp_path: Path, name: str, write: Callable[[Path], Any], message: str
) -> None:
    """Stands for huggingface_hub's and diffusers' tests of files that are pointers, pages, or damaged."""
    write(tmp_path / name)
    for read in (read_checkpoint, lambda path: read_tensors(path, "extractor weights")):
        with pytest.raises(UserError, match=message) as raised:
            read(tmp_path / name)
        assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match=message):
        call_convert(tmp_path / name, tmp_path / "out", vae="none")
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_a_dit_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """DiT's file has SiT's names and shapes; its variance, which SiT never trains, tells. diffusers has other names."""
    dit = published("sit_tiny_learn_sigma")
    channels, patch = dit["x_embedder.proj.weight"].shape[1:3]
    torch.save(dit, tmp_path / "DiT-XL-2-256x256.pt")
    told = "DiT, which predicts noise and is no flow; draw from it with diffusers' DiTPipeline"
    with pytest.raises(UserError, match=rf"DiT-XL-2-256x256\.pt is {told}"):
        call_convert(tmp_path / "DiT-XL-2-256x256.pt", tmp_path / "out", vae="none", num_attention_heads=4)
    torch.save({"transformer_blocks.0.attn1.to_q.weight": torch.ones(2, 2)}, tmp_path / "diffusers.bin")
    with pytest.raises(UserError, match=rf"in diffusers' layout, e\.g\. of {told}"):
        call_convert(tmp_path / "diffusers.bin", tmp_path / "out", vae="none")
    assert not (tmp_path / "out").exists()

    # Under another name it is a warning; a SiT, whose second half of outputs is zero as it began, gets none.
    for trained in (True, False):
        if not trained:
            rows = dit[HEAD].unflatten(0, (patch**2, 2 * channels))
            rows[:, channels:] = 0
        torch.save(dit, tmp_path / "mine.pt")
        options = {"vae": "none", "num_attention_heads": 4}
        call_convert(tmp_path / "mine.pt", tmp_path / f"out{trained}", **options)
        assert ("note: its outputs include a trained variance" in capsys.readouterr().out) == trained


def test_weights_without_a_null_row(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A table of as many rows as classes has none; ImageNet's is known by its 1000 rows, another by --num-classes."""
    state = published()
    wide = state | {TABLE: torch.randn(1000, state[TABLE].shape[1])}
    pipe = convert(wide, tmp_path)
    assert "note: the label table has 1000 rows, none of which is the null row" in capsys.readouterr().out
    assert (pipe.transformer.has_null_label, len(pipe.config.id2label)) == (False, 1000)
    with pytest.raises(UserError, match=r"guidance_scale = 2.*; use 1"):
        pipe([999], guidance_scale=2.0, num_inference_steps=1, output_type="latent")
    for classes, null in ((8, False), (7, True)):
        model = load_sit(state, HEADS, num_classes=classes)
        assert (model.null_label, model.has_null_label) == (classes, null)
        assert torch.equal(model.label_embed.weight, state[TABLE])
    with pytest.raises(UserError, match=re.escape("wrong shape: label_embed.weight (8, 48) for (12, 48)")):
        load_sit(state, HEADS, num_classes=11)


def test_options_of_files_have_no_effect_on_a_run(tmp_path: Path) -> None:
    for options in ({"num_classes": 3}, {"drop_prefix": ["a."]}, {"reversed_time": True}):
        (name,) = options
        with pytest.raises(UserError, match=f"--{name.replace('_', '-')} is only for published SiT files"):
            call_convert(tmp_path, tmp_path / "out", **options)
    assert json.dumps([path.name for path in tmp_path.iterdir()]) == "[]"
