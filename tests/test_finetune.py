"""training.init_from: what a new run begins with, which classes it knows, and what is refused in one line."""

import json
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from diffusers import AutoencoderKL
from launch import environment, train_in
from safetensors.torch import load_file, save_file
from test_convert import published
from tiny import tiny_pipeline, tiny_transformer
from tiny_run import assert_identical, forget_processes, run, weights

from vit5gen import SiTPipeline, SiTTransformer2DModel, shipped
from vit5gen.cli import main
from vit5gen.config import Config, VaeConfig, load_config, load_recorded
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.models import load_sit
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256
from vit5gen.training import initial
from vit5gen.training.build import build_model, build_model_to_train
from vit5gen.training.export import export_pipeline
from vit5gen.training.initial import begin_from, class_rows, describe, fit, initial_weights, open_origin
from vit5gen.training.run_folder import to_yaml

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def source(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a finished run of three classes."""
    output = tmp_path_factory.mktemp("source") / "run"
    assert run(config_file, output, training__num_steps=6) == 0
    return output


def tuned(config_file: Path, folder: Path, **changes: Any) -> Path:
    """Write the tiny configuration without its model section, with ``section__key=value`` changed; return the file."""
    settings = yaml.safe_load(config_file.read_text())
    settings["training"] |= {"trackers": [], "num_steps": 0}
    settings["model"] = {}
    for dotted, value in changes.items():
        section, key = dotted.split("__")
        settings[section][key] = value
    folder.mkdir(exist_ok=True)
    (folder / "tune.yaml").write_text(yaml.safe_dump(settings))
    return folder / "tune.yaml"


def settled(file: Path) -> Config:
    forget_processes()
    return begin_from(load_config(file))


def images(folder: Path) -> np.ndarray:
    pipe = load_pipeline(folder)
    pipe.set_progress_bar_config(disable=True)
    generator = [torch.Generator().manual_seed(i) for i in range(4)]
    settings = {"guidance_scale": 2.0, "num_inference_steps": 3, "generator": generator, "output_type": "np"}
    return pipe(class_labels=[0, 1, 2, 0], **settings).images


@pytest.mark.parametrize("what", ["", "pipeline", "checkpoints/step_00000006"])
def test_step_0_with_the_same_classes_is_the_source(
    config_file: Path, source: Path, tmp_path: Path, what: str, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tuned(config_file, tmp_path, training__init_from=str(source / what))
    assert run(file, tmp_path / "run") == 0
    assert "3 of 3 classes found by name\n" in capsys.readouterr().out
    assert np.array_equal(images(tmp_path / "run"), images(source))
    ours, theirs = (
        load_file(one / "pipeline/transformer/diffusion_pytorch_model.safetensors")
        for one in (tmp_path / "run", source)
    )
    assert_identical(ours, theirs)

    # What it began with stands in the configuration, also in that of its checkpoints, and on the card.
    recorded = load_recorded(tmp_path / "run/config.yaml")
    digest = recorded.training.init_digest
    assert digest is not None
    assert (recorded.model.hidden_size, recorded.model.backbone_kwargs) == (32, {"gamma_init": 1.0})
    if what.startswith("checkpoints"):
        assert digest == sha256(source / what / "ema_0.9.safetensors")
    card = (tmp_path / "run/pipeline/README.md").read_text()
    assert f"It began with the weights of {(source / what).name}, SHA-256 {digest}." in card
    assert "It began" not in (source / "pipeline/README.md").read_text()


@pytest.mark.parametrize("chosen", ["ema_0.99", "model"])
def test_other_weights_of_a_run(config_file: Path, source: Path, tmp_path: Path, chosen: str) -> None:
    file = tuned(config_file, tmp_path, training__init_from=str(source), training__init_weights=chosen)
    found, _ = initial_weights(settled(file))
    saved = load_file(source / f"checkpoints/step_00000006/{chosen}.safetensors")
    assert found is not None
    assert_identical({name: found[name] for name in saved}, saved)


@pytest.mark.slow
def test_it_is_a_new_run_that_resumes_bit_for_bit_without_its_source(
    config_file: Path, source: Path, tmp_path: Path
) -> None:
    copy = shutil.copytree(source, tmp_path / "copy")
    file = tuned(
        config_file, tmp_path, training__init_from=str(copy), training__num_steps=6, training__ema_decays=[0.9, 0.99]
    )
    assert run(file, tmp_path / "whole") == 0
    assert run(file, tmp_path / "parts", training__num_steps=3) == 0
    shutil.rmtree(copy)
    assert run(file, tmp_path / "parts") == 0
    assert_identical(weights(tmp_path / "whole", 6), weights(tmp_path / "parts", 6))
    assert load_recorded(tmp_path / "parts/checkpoints/step_00000006/config.yaml").training.init_digest is not None
    assert run(file, tmp_path / "parts") == 0  # already trained
    with pytest.raises(UserError, match="init_from"):
        run(file, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_the_first_step_differs_from_the_source_by_the_optimizer_alone(
    config_file: Path, source: Path, tmp_path: Path
) -> None:
    file = tuned(
        config_file, tmp_path, training__init_from=str(source), training__num_steps=1, training__learning_rate=1e-9
    )
    assert run(file, tmp_path / "run") == 0
    saved = weights(tmp_path / "run", 1)
    before = load_file(source / "checkpoints/step_00000006/ema_0.9.safetensors")
    for name, value in before.items():
        for kind in ("model", "ema_0.9", "ema_0.99"):
            assert (saved[f"{kind}/{name}"] - value).abs().max() < 1e-8, name
    assert {value.item() for name, value in saved.items() if name.endswith("/step")} == {1.0}
    export_pipeline(tmp_path / "run", tmp_path / "converted", "none", None, None)
    assert f"It began with the weights of {source.name}, SHA-256 " in (tmp_path / "converted/README.md").read_text()


def test_classes_are_found_by_name(config_file: Path, source: Path, tmp_path: Path, capsys: Any) -> None:
    data = shutil.copytree(config_file.parent / "data", tmp_path / "data")
    for split in ("train", "test"):
        (data / split / "circle").rename(data / split / "zebra")
        shutil.copytree(data / split / "square", data / split / "arrow")
    file = tuned(config_file, tmp_path, training__init_from=str(source), data__path=str(data), data__num_classes=4)
    found, _ = initial_weights(settled(file))
    assert found is not None
    begins = capsys.readouterr().out.splitlines()[-1]
    assert begins.endswith("; 2 of 4 classes found by name; new: arrow, zebra (from the null row)")
    old = open_origin(str(source)).pipe.transformer.label_embed.weight  # circle, square, star, null
    assert torch.equal(found["label_embed.weight"], old[[3, 1, 2, 3, 3]])
    forget_processes()
    with pytest.raises(SystemExit) as ended:
        main(["train", str(file), "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    at = printed.index(begins)
    assert printed[at + 1 : at + 5] == [
        "row null -> 0 arrow",
        "row 1 -> 1 square",
        "row 2 -> 2 star",
        "row null -> 3 zebra",
    ]


def pipeline(folder: Path, names: dict[int, str] | None, **options: Any) -> Path:
    """Save a pipeline of the tiny run's size, with random weights and without autoencoder."""
    sizes = {"backbone": "vit5", "num_classes": 3, "backbone_kwargs": {"gamma_init": 1.0}, "class_dropout_prob": 0.1}
    pipe = SiTPipeline(tiny_transformer(**{**sizes, **options}), tiny_pipeline().scheduler, None, id2label=names)
    pipe.save_pretrained(folder)
    return folder


@pytest.mark.parametrize(
    ("names", "classes", "expected"),
    [
        (None, ["circle", "square", "star"], [3, 3, 3]),  # not known to be the same
        (None, ["0", "1", "2"], [0, 1, 2]),
        ({0: "star", 1: "circle", 2: "square"}, ["circle", "square", "star"], [1, 2, 0]),
        ({0: "Star, sun", 1: "b", 2: "c"}, ["circle", "square", "star"], [3, 3, 0]),
        ({0: "star, a", 1: "star, b", 2: "square"}, ["circle", "square", "star"], [3, 2, 3]),  # of two meanings
        ({0: "star", 1: "star", 2: "c"}, ["star", "star", "c"], [0, 1, 2]),  # equal lists
        ({0: "0", 1: "1", 2: "2"}, ["1", "2", "3"], [1, 2, 3]),  # by name, not by id
    ],
)
def test_rows(
    names: dict[int, str] | None, classes: list[str], expected: list[int], tmp_path: Path, config_file: Path
) -> None:
    origin = open_origin(str(pipeline(tmp_path / "pipe", names)))
    rows = class_rows(origin, classes)
    assert [3 if row is None else row for row in rows] == expected
    config = settled(tuned(config_file, tmp_path, training__init_from=str(tmp_path / "pipe")))
    table = origin.pipe.transformer.label_embed.weight
    assert torch.equal(fit(config, origin, rows)["label_embed.weight"], table[[*expected, 3]])


def test_without_a_null_row_new_classes_begin_at_the_mean(config_file: Path, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipe", {0: "star", 1: "b", 2: "c"}, class_dropout_prob=0.0)
    file = tuned(config_file, tmp_path, training__init_from=str(folder), model__class_dropout_prob=0.1)
    found, _ = initial_weights(settled(file))
    table = open_origin(str(folder)).pipe.transformer.label_embed.weight
    assert found is not None
    expected = torch.stack([table.mean(0), table.mean(0), table[0], table.mean(0)])
    assert torch.equal(found["label_embed.weight"], expected)
    (tmp_path / "tune.yaml").write_text(file.read_text().replace("class_dropout_prob: 0.1", "class_dropout_prob: 0.0"))
    found, _ = initial_weights(settled(file))
    assert found is not None
    assert torch.equal(found["label_embed.weight"], expected[:3])


def started(config: Config) -> SiTTransformer2DModel:
    """Return the model with the weights that a run of this configuration begins with."""
    found, _ = initial_weights(config)
    assert found is not None
    model = build_model(config).eval()
    model.load_state_dict(found, strict=False)
    return model


def predict(model: SiTTransformer2DModel, side: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(2, 4, side, side, generator=generator)
    with torch.no_grad():
        return model(x, torch.tensor([0.2, 0.7]), torch.tensor([0, 2]))


@pytest.mark.parametrize("switches", [{}, {"absolute_position": "none"}, {"rope": False}])
def test_another_resolution_is_what_the_source_draws_there(
    config_file: Path, tmp_path: Path, switches: dict[str, Any]
) -> None:
    names = {0: "circle", 1: "square", 2: "star"}
    folder = pipeline(tmp_path / "pipe", names, backbone_kwargs={"gamma_init": 1.0, **switches})
    file = tuned(config_file, tmp_path, training__init_from=str(folder), data__resolution=24)
    config = settled(file)
    assert config.model.backbone_kwargs == {"gamma_init": 1.0, **switches, "rope_grid": 4}
    old = open_origin(str(folder)).pipe.transformer
    torch.testing.assert_close(predict(started(config), 12), predict(old, 12), rtol=1e-5, atol=1e-5)
    # Without that, rotary positions would be other ones.
    (tmp_path / "tune.yaml").write_text(to_yaml(config).replace("rope_grid: 4", "rope_grid: 6"))
    same = predict(started(settled(file)), 12)
    assert torch.allclose(same, predict(old, 12), rtol=1e-5, atol=1e-5) is (switches == {"rope": False})


def test_fixed_positions_are_computed_for_another_resolution(config_file: Path, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipe", None, backbone="sit", backbone_kwargs=None)
    file = tuned(config_file, tmp_path, training__init_from=str(folder), data__resolution=24)
    model, old = started(settled(file)), open_origin(str(folder)).pipe.transformer
    assert torch.equal(
        model.backbone.pos_embed, SiTTransformer2DModel(**{**old.config, "sample_size": 12}).backbone.pos_embed
    )
    assert torch.equal(model.patch_embed.weight, old.patch_embed.weight)


@pytest.mark.parametrize("kept", [False, True])
def test_a_file_with_learn_sigma_loses_its_unused_half(config_file: Path, tmp_path: Path, kept: bool) -> None:
    path, heads = published("sit_tiny_learn_sigma", tmp_path)
    old = load_sit(path, heads)
    changes = {
        "training__init_from": str(path),
        "model__num_attention_heads": heads,
        "data__resolution": 2 * old.config.sample_size,
    }
    file = tuned(config_file, tmp_path, **changes, **({"model__learn_sigma": True} if kept else {}))
    model = started(settled(file))
    assert model.head.linear.out_features == old.config.patch_size**2 * 4 * (2 if kept else 1)
    null = {"head.linear.weight": old.head.linear.weight} if kept else {}
    assert all(torch.equal(model.state_dict()[name], value) for name, value in null.items())
    x, t = torch.randn(2, 4, old.config.sample_size, old.config.sample_size), torch.tensor([0.2, 0.7])
    with torch.no_grad():
        expected = old(x, t, torch.full((2,), old.null_label))
        torch.testing.assert_close(model(x, t, torch.full((2,), model.null_label)), expected, rtol=1e-6, atol=1e-6)
    assert settled(file).training.init_digest == sha256(path)


def test_switches_come_from_the_file_unless_overridden(
    config_file: Path, source: Path, tmp_path: Path, capsys: Any
) -> None:
    def tune(switches: dict[str, Any], **more: Any) -> Config:
        file = tuned(config_file, tmp_path, training__init_from=str(source), model__backbone_kwargs=switches, **more)
        return settled(file)

    assert tune({}).model.backbone_kwargs == {"gamma_init": 1.0}
    assert tune({"rope_theta": 50.0}).model.backbone_kwargs == {"gamma_init": 1.0, "rope_theta": 50.0}
    tune({"qkv_bias": True})  # starts at zero
    capsys.readouterr()
    tune({"gamma_init": 1.0})
    assert "note:" not in capsys.readouterr().out
    tune({"gamma_init": 0.5, "rope_theta": 50.0})
    told = "note: model.backbone_kwargs: gamma_init = 0.5 (there 1.0), rope_theta = 50.0 (there 10000.0): step 0 may"
    assert capsys.readouterr().out.startswith(told)
    for switches, told in [
        ({"num_registers": 9}, "backbone.reg_token would start anew and backbone.reg_token would be left out; set"),
        ({"qk_norm": False}, r"backbone.blocks.0.attn.k_norm.weight, .* would be left out"),
        ({"affine_norms": True}, "norm1.weight, .* and 1 more would start anew"),
        ({"absolute_position": "sincos_fixed"}, "backbone.pos_embed would be left out"),
    ]:
        with pytest.raises(UserError, match=told) as raised:
            tune(switches)
        assert "\n" not in str(raised.value)
        assert "set training.init_partial to true" in str(raised.value)
        model = started(tune(switches, training__init_partial=True))
        assert torch.equal(model.patch_embed.weight, open_origin(str(source)).pipe.transformer.patch_embed.weight)


class Unsafe:
    def __reduce__(self) -> tuple:
        return (os.system, ("touch unsafe",))


def bad_file(kind: str, folder: Path) -> str:
    """Write a file that no run can begin with."""
    if kind == "classifier":
        state = load_file(ROOT / "tests/fixtures/vit5_tiny.safetensors")
        save_file(
            {k.removeprefix("state."): v for k, v in state.items() if k.startswith("state.")},
            folder / "bad.safetensors",
        )
        return str(folder / "bad.safetensors")
    path, _ = published("sit_tiny", folder)
    state = torch.load(path, weights_only=True)
    if kind == "code":
        torch.save({**state, "args": Unsafe()}, path)
    elif kind == "truncated":
        path.write_bytes(path.read_bytes()[:-1000])
    elif kind == "nan":
        state["ema"]["final_layer.linear.bias"][0] = torch.nan
        torch.save(state, path)
    return str(path)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("classifier", "so it is not SiT's published layout"),
        ("code", "it contains posix.system.*save only its state dict"),
        ("truncated", "cannot be read safely as tensors"),
        ("nan", "1 of the .* values of head.linear.bias are not finite"),
    ],
)
def test_bad_files_are_one_line(
    config_file: Path, tmp_path: Path, kind: str, message: str, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tuned(config_file, tmp_path, training__init_from=bad_file(kind, tmp_path), model__num_attention_heads=4)
    refused(["train", str(file), "--output", "run"], message, capsys)
    assert not (tmp_path / "unsafe").exists()
    assert not (tmp_path / "run").exists()


def refused(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    forget_processes()
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    told = capsys.readouterr().err
    assert ended.value.code == 2, told
    assert len(told.strip().splitlines()) == 1
    assert re.search(message, told), told


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vae__latent_channels": 8}, "vae.latent_channels = 8, but training.init_from .* has 4"),
        ({"model__patch_size": 4}, "model.patch_size = 4, but training.init_from .* has 2"),
        ({"model__hidden_size": 48}, "model.hidden_size = 48, but .* has 32"),
        ({"model__num_layers": 3}, "model.num_layers = 3, but .* has 2"),
        ({"model__num_attention_heads": 4}, "model.num_attention_heads = 4, but .* has 2"),
        ({"model__preset": "S/2"}, "model.hidden_size = 384, but .* has 32"),
        ({"model__backbone": "sit"}, "model.backbone = sit, but .* has vit5"),
        ({"model__mlp_ratio": 2.0}, "model.mlp_ratio = 2.0, but .* has 4.0"),
        ({"flow__prediction": "noise"}, "flow.prediction = noise, but .* has velocity"),
        ({"training__init_digest": "0" * 64}, "training.init_digest = 0000"),
        (
            {"training__init_weights": "ema_0.5"},
            "weights: 'ema_0.5' is not known; expected one of ema_0.9, ema_0.99, model",
        ),
        ({"model__backbone_kwargs": {"gama_init": 1}}, "gamma_init"),
    ],
)
def test_what_must_agree(
    config_file: Path, source: Path, tmp_path: Path, changes: dict[str, Any], message: str, capsys: Any
) -> None:
    settings = yaml.safe_load(config_file.read_text())
    settings.setdefault("flow", {})
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(settings))
    file = tuned(tmp_path / "base.yaml", tmp_path, training__init_from=str(source), **changes)
    for more in (["--output", str(tmp_path / "run")], ["--dry-run"]):
        refused(["train", str(file), *more], message, capsys)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("what", ["", "pipeline"])
def test_a_run_of_another_autoencoder(config_file: Path, source: Path, tmp_path: Path, what: str, capsys: Any) -> None:
    vae = AutoencoderKL.from_pretrained(config_file.parent / "vae")
    vae.register_to_config(shift_factor=0.25)
    vae.save_pretrained(tmp_path / "vae")
    file = tuned(config_file, tmp_path, training__init_from=str(source / what), vae__name=str(tmp_path / "vae"))
    refused(
        ["train", str(file), "--output", str(tmp_path / "run")],
        r"scale and shift \(0.18215, 0.25\), but .*\(0.18215, 0.0\)",
        capsys,
    )


def test_other_things_that_are_no_weights(config_file: Path, source: Path, tmp_path: Path, capsys: Any) -> None:
    broken = shutil.copytree(source / "checkpoints/step_00000006", tmp_path / "broken")
    (broken / "ema_0.9.safetensors").write_bytes(b"short")
    cut = shutil.copytree(source / "pipeline", tmp_path / "cut")
    file = cut / "transformer/diffusion_pytorch_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])
    (tmp_path / "empty").mkdir()
    for what, message in [
        (broken, "ema_0.9.safetensors is damaged"),
        (cut, "does not load"),
        (tmp_path / "empty", "it is none of these; expected RUN"),
        ("gone/model.pt", "there is no such file or folder; expected RUN"),
        (source / "config.yaml", "damaged, or holds something else.; give a file of tensors"),
        (source / "samples.png", "damaged, or holds something else.; give a file of tensors"),
        ("emoji-46", "expected RUN, a checkpoint, a pipeline folder, a SiT file, a hub name, or emoji-64"),
    ]:
        file = tuned(config_file, tmp_path, training__init_from=str(what))
        refused(["train", str(file), "--output", str(tmp_path / "run")], message, capsys)
    refused(
        ["train", str(config_file), "--model.hidden_size", "null", "--dry-run"],
        r"set model\.preset.* or training\.init_from",
        capsys,
    )


def test_without_init_from_nothing_of_it_counts(config_file: Path, source: Path, tmp_path: Path, capsys: Any) -> None:
    file = tuned(config_file, tmp_path, training__init_from=str(source))
    text = to_yaml(settled(file))
    (tmp_path / "began.yaml").write_text(text)
    forget_processes()
    with pytest.raises(SystemExit) as ended:
        main(["train", str(tmp_path / "began.yaml"), "--training.init_from", "null", "--dry-run"])
    assert ended.value.code == 0
    assert "begins:" not in capsys.readouterr().out
    for key, value in (("init_weights", "model"), ("init_partial", "true")):
        arguments = ["train", str(config_file), f"--training.{key}", value, "--dry-run"]
        refused(arguments, f"{key} is given, but no init_from; set init_from, or omit", capsys)
    # Earlier runs may have recorded what had no effect.
    text = text.replace(f"init_from: {source}", "init_from: null").replace("init_partial: false", "init_partial: true")
    (tmp_path / "began.yaml").write_text(text)
    recorded = load_recorded(tmp_path / "began.yaml").training
    assert (recorded.init_from, recorded.init_partial, recorded.init_digest) == (None, False, None)


def test_names_and_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    pipeline(tmp_path / "some/pipe", None)
    hub = {"nobody/model-1.5": True, "nobody/model.pt": False, "some/pipe": False, "some/pipe2": True, "a/b/c": False}
    assert {name: initial._is_hub_name(name) for name in hub} == hub
    monkeypatch.setenv("HOME", str(tmp_path))
    assert open_origin("~/some/pipe").digest == open_origin("some/pipe").digest
    assert open_origin("some/pipe").vae == VaeConfig().name

    # A download that ended half-way lacks weights.
    index = tmp_path / "some/pipe/model_index.json"
    monkeypatch.setattr(initial, "try_to_load_from_cache", lambda name, file: str(index))
    assert initial._is_fetched("nobody/model-1.5")
    (tmp_path / "some/pipe/transformer/diffusion_pytorch_model.safetensors").unlink()
    assert not initial._is_fetched("nobody/model-1.5")


def test_the_hash_of_a_partly_trained_source_covers_all_its_weights(config_file: Path, tmp_path: Path) -> None:
    assert run(config_file, tmp_path / "run", training__num_steps=1, training__trainable=["head"]) == 0
    folder = tmp_path / "run/checkpoints/step_00000001"
    before, file = open_origin(str(folder)).digest, folder / "model.safetensors"
    state = load_file(file)
    state["patch_embed.weight"] += 1  # which is not trained
    save_file(state, file)
    sums = json.loads((folder / "checksums.json").read_text())
    (folder / "checksums.json").write_text(json.dumps({**sums, file.name: sha256(file)}))
    assert open_origin(str(folder)).digest != before
    assert open_origin(str(folder), "model").digest == sha256(file)


def test_the_source_is_read_once(
    config_file: Path, source: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[Any] = []
    monkeypatch.setattr(initial, "open_origin", lambda *arguments: calls.append(arguments) or open_origin(*arguments))
    config = settled(tuned(config_file, tmp_path, training__init_from=str(source)))
    initial_weights(config)
    assert len(calls) == 1
    initial_weights(config)  # which keeps nothing
    assert len(calls) == 2


def test_long_tables_show_all_that_is_new_or_moved(config_file: Path, tmp_path: Path) -> None:
    names = {i: f"c{i}" for i in range(60)}
    origin = open_origin(str(pipeline(tmp_path / "pipe", names, num_classes=60)))
    config = settled(tuned(config_file, tmp_path, training__init_from=str(tmp_path / "pipe")))
    ours = [*list(names.values())[:30], *(f"c{i}" for i in range(31, 60)), "new"]
    _, *table = describe(config, origin, ours)
    moved = [f"row {i + 1} -> {i} c{i + 1}" for i in range(30, 59)]
    assert table[20:] == [*moved, "row null -> 59 new", "... and 10 more that keep their row"]


def test_unknown_weights_are_no_silence(config_file: Path) -> None:
    with pytest.raises(AssertionError):
        build_model_to_train(load_config(config_file), {"other": torch.zeros(1)})


def test_dry_run_without_the_weights_lists_them(config_file: Path, tmp_path: Path, capsys: Any) -> None:
    sizes = {"hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "patch_size": 2}
    changes = {f"model__{key}": value for key, value in sizes.items()}
    file = tuned(config_file, tmp_path, training__init_from="SiT-XL-2-256x256.pt", model__backbone="sit", **changes)
    forget_processes()
    with pytest.raises(SystemExit) as ended:
        main(["train", str(file), "--dry-run"])
    printed = capsys.readouterr().out
    assert ended.value.code == 0
    assert "missing: SiT-XL-2-256x256.pt (weights to begin with" in printed
    assert "sit 1x32" in printed
    unsized = tuned(config_file, tmp_path, training__init_from="SiT-XL-2-256x256.pt")
    refused(
        ["train", str(unsized), "--dry-run"],
        "SiT-XL-2-256x256.pt is not here; download it, or set model.preset",
        capsys,
    )


def test_resume_with_other_classes_points_to_init_from(
    config_file: Path, source: Path, tmp_path: Path, capsys: Any
) -> None:
    data = shutil.copytree(config_file.parent / "data", tmp_path / "data")
    renamed = shutil.copytree(data, tmp_path / "renamed")
    for split in ("train", "test"):
        shutil.copytree(data / split / "star", data / split / "zebra")
        (renamed / split / "star").rename(renamed / split / "heart")
    settings = yaml.safe_load(config_file.read_text())
    del settings["data"]["num_classes"]
    (tmp_path / "any.yaml").write_text(yaml.safe_dump(settings))
    last = source / "checkpoints/step_00000006"
    advice = f"begin a new run with --training.init_from {last}"
    for folder, more, told in [
        (data, [], r"classes added \['zebra'\]"),
        (data, ["--data.from_images", "true"], r"classes added \['zebra'\]"),
        (renamed, [], r"classes removed \['star'\], added \['heart'\]"),
        (data, ["--data.num_classes", "4"], "data.num_classes: 3 -> 4"),
    ]:
        options = ["--data.path", str(folder), "--output", str(tmp_path / "run"), "--resume", str(last), *more]
        accepted = ["train", str(tmp_path / "any.yaml"), *options, "--accept-changes"]
        refused(accepted, f"{told}.*{advice}", capsys)
    options = ["--output", str(tmp_path / "new"), "--resume", str(source / "pipeline")]
    refused(["train", str(config_file), *options], f"set --training.init_from {source / 'pipeline'}", capsys)


@pytest.mark.slow
def test_the_attribution_goes_with_the_weights(config_file: Path, tmp_path: Path) -> None:
    folder = pipeline(tmp_path / "pipe", None)
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps({**index, "attribution": "by others"}))
    file = tuned(config_file, tmp_path, training__init_from=str(folder), training__num_steps=1)
    assert run(file, tmp_path / "run") == 0
    shutil.rmtree(folder)
    assert run(file, tmp_path / "run", training__num_steps=2) == 0
    assert load_pipeline(tmp_path / "run").config.attribution == "by others"


def test_the_shipped_generator_is_a_source(tmp_path: Path) -> None:
    origin = open_origin("emoji-64")
    assert (origin.vae, len(origin.pipe.config.id2label)) == ("emoji-64", 9)
    assert origin.digest == open_origin(shipped("emoji-64")).digest


@pytest.mark.slow
def test_a_published_file_starts_a_run_that_is_killed_and_resumed(config_file: Path, tmp_path: Path) -> None:
    path, heads = published("sit_tiny", tmp_path)
    changes = {"training__init_from": str(path), "model__num_attention_heads": heads, "training__checkpoint_every": 4}
    file = tuned(config_file, tmp_path, **changes, data__resolution=24, training__num_steps=20)
    command = [sys.executable, str(ROOT / "train.py"), str(file), "--output"]
    whole = subprocess.run([*command, str(tmp_path / "whole")], env=environment(), capture_output=True, text=True)
    assert whole.returncode == 0, whole.stderr
    assert "0 of 3 classes found by name; new: circle, square, star (from the null row)" in whole.stdout
    process = subprocess.Popen([*command, str(tmp_path / "killed")], env=environment(), stdout=subprocess.DEVNULL)
    while not (tmp_path / "killed/checkpoints/step_00000004").exists():
        assert process.poll() is None
    process.send_signal(signal.SIGKILL)
    process.wait()
    path.unlink()
    resumed = subprocess.run([*command, str(tmp_path / "killed")], env=environment(), capture_output=True, text=True)
    assert resumed.returncode == 0, resumed.stderr
    assert "resuming from" in resumed.stdout
    assert_identical(weights(tmp_path / "whole", 20), weights(tmp_path / "killed", 20))


@pytest.mark.slow
@pytest.mark.parametrize("file", sorted(ROOT.glob("configs/finetune/*.yaml")), ids=lambda file: file.stem)
def test_the_heads_of_the_recipes_say_what_the_dry_run_does(
    file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    forget_processes()
    with pytest.raises(SystemExit) as ended:
        main(["train", str(file), "--dry-run"])
    printed = capsys.readouterr().out.splitlines()
    assert ended.value.code == 0
    head = [line.removeprefix("#").strip() for line in file.read_text().splitlines() if line.startswith("#")]
    kinds = ("model:", "FLOPs:", "memory:   1 GPU", "time:", "disk:")
    facts = [line for line in printed if line.startswith(kinds)]
    assert len(facts) >= 4
    assert set(facts) <= set(head)
    assert any(line.startswith(f"missing: {load_config(file).training.init_from} (") for line in printed)


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [False, True])
def test_two_processes_begin_with_the_same_weights(config_file: Path, source: Path, tmp_path: Path, fsdp: bool) -> None:
    file = tuned(config_file, tmp_path, training__init_from=str(source), training__num_steps=1)
    settings = yaml.safe_load(file.read_text())
    settings["training"]["learning_rate"] = 1e-9
    file.write_text(yaml.safe_dump(settings))
    assert train_in(2, [{"config": file, "output": tmp_path / "run"}], tmp_path, fsdp=fsdp)[0] == [0]
    saved = weights(tmp_path / "run", 1)
    for name, value in load_file(source / "checkpoints/step_00000006/ema_0.9.safetensors").items():
        assert (saved[f"model/{name}"] - value).abs().max() < 1e-8, name
        assert (saved[f"ema_0.9/{name}"] - value).abs().max() < 1e-8, name


def test_the_study_on_the_page_is_that_of_its_rows() -> None:
    study = runpy.run_path(str(ROOT / "scripts" / "finetune_study.py"))
    folder = ROOT / "docs" / "study" / "finetune"
    table = study["table"]([json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()])
    assert (folder / "table.md").read_text() == table
    assert table in (ROOT / "docs" / "finetuning.md").read_text()
    # Two seeds, over floor 6 and 4 against 3 and 3 from scratch: gains of -3 and -1, Student's quantile is 12.71.
    values = {"from scratch": (3, 3), "whole": (6, 4)}
    rows = [
        {"start": start, "steps": 1, "seed": seed, "new": {"distance": 1 + value, "floor": 1}}
        for start, both in values.items()
        for seed, value in enumerate(both)
    ]
    assert "| whole | 1 | 2 | 5.0 ± 12.7 | -2.0 ± 12.7 |  |" in study["table"](rows)
