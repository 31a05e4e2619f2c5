"""`auto`: the precision and the compilation that suit a machine, settled when a run begins and kept from then on."""

import re
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny_run import assert_identical, make_inputs, run, weights
from torch._inductor import cpp_builder

from vit5gen.commands.convert import ConvertOptions
from vit5gen.commands.convert import run as convert
from vit5gen.config import Config, load_config
from vit5gen.data.images import open_images
from vit5gen.evaluation import load_extractor
from vit5gen.flow import draw_timesteps
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.section import validate
from vit5gen.system import cpu
from vit5gen.system.errors import UserError
from vit5gen.system.precision import find_compiler_fault
from vit5gen.training import build, loop
from vit5gen.training.build import check_values, settle_auto
from vit5gen.training.dry_run import TRIAL_STEPS, plan
from vit5gen.training.reference_moments import _recall, build_reference

AUTO = {"precision": "auto", "compile": "auto"}


def settled(recorded: dict | None = None, **training: object) -> tuple[str, object]:
    config = validate(Config, {"model": {"preset": "S/2"}, "training": training}, "test")
    found = settle_auto(config, {} if recorded is None else {"training": recorded}).training
    return found.precision, found.compile


@pytest.mark.parametrize(
    ("bf16", "compiler", "expected"),
    [(True, True, ("bf16", True)), (True, False, ("bf16", False)), (False, True, ("fp32", False))],
)
def test_auto_is_what_the_cpu_is_fast_at(
    bf16: bool,
    compiler: bool,
    expected: tuple[str, bool],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cpu, "has_bf16", lambda: bf16)
    monkeypatch.setattr(build, "find_compiler_fault", lambda device: "" if compiler else "none found")
    assert settled(**AUTO) == expected
    assert capsys.readouterr().out.count("no compiler for cpu on this machine: none found") == bf16 - compiler * bf16
    assert settled({"precision": "fp32", "compile": False}, **AUTO) == ("fp32", False)  # a resumed run
    assert settled(precision="tf32") == ("tf32", False)
    if not compiler:
        with pytest.raises(UserError, match=r"training\.compile: no compiler for cpu"):
            settled({"precision": "bf16", "compile": True}, **AUTO)


@pytest.mark.parametrize(
    ("channels", "resolution", "downsample", "shift"),
    [(768, 256, 16, 48**0.5), (4, 256, 8, 1.0), (3, 32, 1, 0.75**0.5)],
)
def test_an_auto_shift_follows_the_size_of_the_latents(
    channels: int, resolution: int, downsample: int, shift: float
) -> None:
    data, vae = {"resolution": resolution}, {"latent_channels": channels, "downsample": downsample}
    values = {"model": {"preset": "S/2"}, "data": data, "vae": vae, "flow": {"time_shift": "auto"}}
    assert validate(Config, values, "test").time_shift == pytest.approx(shift, rel=1e-12)
    assert validate(Config, values | {"flow": {"time_shift": 2.5}}, "test").time_shift == 2.5
    with pytest.raises(UserError, match=r"flow\.time_shift = 0\.0: set it to X > 0 or auto"):
        validate(Config, values | {"flow": {"time_shift": 0.0}}, "test")


def test_a_step_of_training_draws_its_times_with_an_auto_shift(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shifts, config = [], load_config(make_inputs(tmp_path), {"flow.time_shift": "auto"})

    def draw(*args: object) -> torch.Tensor:
        shifts.append(args[5])
        return draw_timesteps(*args)

    monkeypatch.setattr(loop, "draw_timesteps", draw)
    assert plan(config, None, "auto", False) == 0
    assert shifts == [0.25] * TRIAL_STEPS  # 4x8x8 latents
    assert "images/s" in capsys.readouterr().out


@pytest.mark.parametrize(("shift", "of_samplers"), [("auto", 0.25), (0.5, 1.0)])
def test_samplers_have_an_auto_shift_too(tmp_path: Path, shift: object, of_samplers: float) -> None:
    """As in RAE; the pipelines of runs with a number keep the unshifted times that they always had."""
    run(make_inputs(tmp_path), tmp_path / "run", flow__time_shift=shift, training__num_steps=1)
    convert(ConvertOptions(checkpoint=str(tmp_path / "run"), output=str(tmp_path / "converted")))
    for folder in (tmp_path / "run", tmp_path / "converted"):
        assert load_pipeline(folder).scheduler.config.shift == of_samplers


@pytest.mark.parametrize(("patch_size", "channels", "noted"), [(1, 40, True), (1, 32, False), (2, 40, False)])
def test_a_model_narrower_than_its_latents_is_noted(
    patch_size: int, channels: int, noted: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 1, "patch_size": patch_size}
    values = {"model": sizes, "data": {"source": "emoji", "resolution": 32}, "vae": {"latent_channels": channels}}
    check_values(validate(Config, values, "test"))
    assert ("hidden_size = 32 is below the 40 channels" in capsys.readouterr().out) == noted


def test_a_compiler_is_what_torch_finds_with_the_headers_of_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu_device, include = torch.device("cpu"), tmp_path / "include"
    monkeypatch.setattr(cpp_builder.config.cpp, "cxx", (None, "g++"))
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(include))
    for name, fault in (
        ("clang++", "finds no C\\+\\+ compiler"),
        ("g++", "there is no .*Python.h"),
        ("Python.h", "^$"),
    ):
        file = (include if name == "Python.h" else tmp_path / "bin") / name
        file.parent.mkdir(exist_ok=True)
        file.write_text("#!/bin/sh\n")
        file.chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))
        cpp_builder.cpp_compiler_search.cache_clear()
        assert re.search(fault, find_compiler_fault(cpu_device))
    cpp_builder.cpp_compiler_search.cache_clear()


def test_a_resumed_run_says_that_this_machine_is_slow_at_its_precision(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    assert settled({"precision": "bf16", "compile": False}, **AUTO) == ("bf16", False)
    assert capsys.readouterr().out.count("slower than fp32") == 1


def test_auto_is_settled_at_the_first_step_and_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config_file, auto = make_inputs(tmp_path), {f"training__{key}": value for key, value in AUTO.items()}
    monkeypatch.setattr(cpu, "has_bf16", lambda: False)
    run(config_file, tmp_path / "plain", training__num_steps=5)
    run(config_file, tmp_path / "auto", training__num_steps=3, **auto)
    recorded = yaml.safe_load((tmp_path / "auto/config.yaml").read_text())["training"]
    assert (recorded["precision"], recorded["compile"]) == ("fp32", False)

    # Resumed on a machine that is fast at bf16: what was recorded holds, bit for bit.
    monkeypatch.setattr(cpu, "has_bf16", lambda: True)
    run(config_file, tmp_path / "auto", training__num_steps=5, **auto)
    assert_identical(weights(tmp_path / "plain", 5), weights(tmp_path / "auto", 5))


def test_real_images_are_scored_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
    config, extractor = load_config(make_inputs(tmp_path)), load_extractor("effnet-lite0")
    first = build_reference(config, extractor)
    files = sorted((tmp_path / "cache").glob("reference-*.safetensors"))
    assert len(files) == 2  # training images, held-out images
    with monkeypatch.context() as patch:
        patch.setattr("vit5gen.training.reference_moments.frechet_of", None)  # nothing is extracted again
        again = build_reference(config, extractor)
    assert (again.floor, again.labels) == (first.floor, first.labels)
    assert torch.equal(again.distance.mean, first.distance.mean)
    assert torch.equal(again.distance.covariance, first.distance.covariance)

    # Another choice or another picture is another entry; a damaged one is made again.
    build_reference(
        config.model_copy(update={"evaluation": config.evaluation.model_copy(update={"seed": 1})}), extractor
    )
    assert len(list((tmp_path / "cache").glob("reference-*"))) == 4
    for file in files:
        file.write_bytes(b"damaged")
    assert build_reference(config, extractor).floor == first.floor
    assert set(load_file(files[0])) == {"mean", "covariance"}


def test_what_is_held_out_decides_over_the_cached_moments(tmp_path: Path) -> None:
    config, extractor = load_config(make_inputs(tmp_path)), load_extractor("effnet-lite0")
    images = open_images(config.data)
    parts = [None, 0.3, 0.4]  # which may well leave as many images of each class
    changed = (config.model_copy(update={"data": config.data.model_copy(update={"held_out": p})}) for p in parts)
    assert len({_recall(one, images, extractor)[0] for one in changed}) == 3
