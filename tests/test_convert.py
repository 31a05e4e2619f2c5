"""Checkpoints of others and of our own trainer become pipelines."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from called import call_convert
from diffusers import AutoencoderKL
from safetensors import safe_open
from safetensors.torch import load_file
from tiny import tiny_autoencoder

from vit5gen import SiTPipeline
from vit5gen.config import Config
from vit5gen.models import load_sit
from vit5gen.system.errors import UserError
from vit5gen.training.build import build_model
from vit5gen.training.checkpoint import save
from vit5gen.training.run_folder import to_yaml

FIXTURES = Path(__file__).with_name("fixtures")


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    tiny_autoencoder().save_pretrained(folder)
    return str(folder)


def published(name: str, folder: Path) -> tuple[Path, int]:
    """Write an oracle's weights as SiT publishes them: a pickle with its averaged weights under ``ema``."""
    with safe_open(FIXTURES / f"{name}.safetensors", "pt") as file:
        heads = json.loads(file.metadata()["config"])["num_heads"]
        state = {key.removeprefix("state."): file.get_tensor(key) for key in file.keys() if key.startswith("state.")}  # noqa: SIM118
    torch.save({"ema": state}, folder / f"{name}.pt")
    return folder / f"{name}.pt", heads


@pytest.mark.parametrize("name", ["sit_tiny", "sit_tiny_learn_sigma"])
def test_published_sit_equals_an_euler_loop(name: str, tmp_path: Path, vae: str) -> None:
    file, heads = published(name, tmp_path)
    call_convert(file, tmp_path / "pipeline", vae=vae, num_attention_heads=heads)
    pipe = SiTPipeline.from_pretrained(tmp_path / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    model = load_sit(file, num_attention_heads=heads)
    x = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    settings = {"guidance_scale": 1.5, "guidance_channels": 3, "num_inference_steps": 10, "sampler": "ode-euler"}
    result = pipe([1, 2], latents=x, output_type="latent", **settings).images
    labels, null = torch.tensor([1, 2]), torch.tensor([model.null_label] * 2)
    for i in range(10):
        t = torch.full((2,), i / 10)
        with torch.no_grad():
            given, free = model(x, t, labels), model(x, t, null)
        velocity = given.clone()
        velocity[:, :3] = free[:, :3] + 1.5 * (given - free)[:, :3]
        x = x + velocity / 10
    torch.testing.assert_close(result, x, rtol=0, atol=1e-5)
    assert pipe.vae.config.latent_channels == 4


def test_a_thousand_classes_get_imagenets_names(tmp_path: Path) -> None:
    file, heads = published("sit_tiny", tmp_path)
    state = torch.load(file, weights_only=True)["ema"]
    table = state["y_embedder.embedding_table.weight"]
    state["y_embedder.embedding_table.weight"] = torch.zeros(1001, table.shape[1])
    torch.save({"ema": state, "args": {"folder": tmp_path}}, file)  # an object beside the tensors is left out
    call_convert(file, tmp_path / "pipeline", vae="none", num_attention_heads=heads)
    pipe = SiTPipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.class_ids(["golden retriever", 207]) == [207, 207]
    assert pipe.vae is None
    assert len(pipe.config.id2label) == 1000


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, vae: str) -> Path:
    sections = {
        "model": {"backbone": "sit", "hidden_size": 32, "num_layers": 1, "num_attention_heads": 2, "patch_size": 2},
        "data": {"resolution": 16, "num_classes": 3},
        "vae": {"name": vae, "downsample": 2},
        "flow": {"path": "gvp", "prediction": "noise"},
        "training": {"ema_decays": [0.9, 0.99]},
    }
    config = Config.model_validate(sections)
    model = build_model(config)
    sets = {}
    for number, name in enumerate(["model", "ema_0.9", "ema_0.99"]):
        sets[name] = {key: torch.full_like(value, number + 1) for key, value in model.state_dict().items()}
    run = tmp_path_factory.mktemp("run")
    for step in (10, 20):
        save(run / "checkpoints", step, sets | {"optimizer": {"a": torch.zeros(1)}}, {}, to_yaml(config))
    (run / "pipeline").mkdir()
    (run / "pipeline" / "model_index.json").write_text(json.dumps({"id2label": {"0": "cat", "1": "dog", "2": "owl"}}))
    return run


@pytest.mark.parametrize(("weights", "value"), [(None, 2), ("ema_0.9", 2), ("ema_0.99", 3), ("model", 1)])
def test_any_average_of_a_training_checkpoint(run: Path, tmp_path: Path, weights: str | None, value: int) -> None:
    call_convert(run / "checkpoints" / "step_00000010", tmp_path / "out", weights=weights)
    pipe = SiTPipeline.from_pretrained(tmp_path / "out")
    assert all((parameter == value).all() for parameter in pipe.transformer.parameters())
    assert (pipe.flow.path, pipe.flow.prediction) == ("gvp", "noise")
    assert pipe.class_ids("owl") == [2]
    assert pipe.image_size == (16, 16)
    card = (tmp_path / "out" / "README.md").read_text()
    assert f"converted from {weights or 'ema_0.9'} of step_00000010\n" in card


def test_a_run_gives_its_newest_checkpoint(run: Path, tmp_path: Path) -> None:
    copy = tmp_path / "run"
    shutil.copytree(run, copy)
    shutil.rmtree(copy / "checkpoints" / "step_00000020")
    call_convert(copy, tmp_path / "out")
    assert load_file(tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors")


def test_bad_checkpoints_leave_nothing_behind(run: Path, tmp_path: Path, vae: str) -> None:
    file, heads = published("sit_tiny", tmp_path)
    (tmp_path / "notes.pt").write_text("no weights")
    (tmp_path / "empty").mkdir()
    vae_of_eight = AutoencoderKL.from_config({**tiny_autoencoder().config, "latent_channels": 8})
    vae_of_eight.save_pretrained(tmp_path / "wide")
    broken = tmp_path / "broken"
    shutil.copytree(run / "checkpoints" / "step_00000010", broken)
    (broken / "ema_0.9.safetensors").write_bytes(b"short")
    cases: list[tuple[Path, dict, str]] = [
        (tmp_path / "absent.pt", {}, "absent.pt"),
        (tmp_path / "notes.pt", {}, "notes.pt"),
        (tmp_path / "empty", {}, "neither a run nor a checkpoint folder"),
        (broken, {}, "ema_0.9.safetensors is damaged"),
        (file, {"vae": vae}, "set num_attention_heads"),
        (
            file,
            {"num_attention_heads": heads, "weights": "model"},
            "--weights has no effect with --num-attention-heads|--weights model is only for",
        ),
        (file, {"num_attention_heads": heads, "vae": str(tmp_path / "empty")}, "no autoencoder can be loaded"),
        (run, {"weights": "ema_0.5"}, "weights: 'ema_0.5' is not known; expected one of ema_0.9, ema_0.99, model"),
        (run, {"weights": "optimizer"}, "weights: 'optimizer' is not known"),
        (run, {"num_attention_heads": 2}, "--num-attention-heads is only for"),
        (run, {"vae": str(tmp_path / "wide")}, "8 latent channels, the model takes 4"),
    ]
    before = set(tmp_path.iterdir())
    for checkpoint, options, message in cases:
        with pytest.raises(UserError, match=message) as caught:
            call_convert(checkpoint, tmp_path / "out", **options)
        assert "\n" not in str(caught.value)
        assert set(tmp_path.iterdir()) == before
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").touch()
    with pytest.raises(UserError, match="exists; choose another --output"):
        call_convert(file, tmp_path / "out")


def test_what_is_missing_is_no_error(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(run, tmp_path / "run")
    (tmp_path / "run" / "pipeline" / "model_index.json").write_text("{}")
    call_convert(tmp_path / "run", tmp_path / "out", vae="none")
    assert "try" not in capsys.readouterr().out
    assert SiTPipeline.from_pretrained(tmp_path / "out").config.id2label == {}


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_published_weights_that_are_not_finite_are_refused(tmp_path: Path, value: float) -> None:
    file, heads = published("sit_tiny", tmp_path)
    state = torch.load(file, weights_only=True)
    state["ema"]["blocks.0.mlp.fc1.bias"][3] = value
    torch.save(state, file)
    with pytest.raises(
        UserError, match=r"1 of the \d+ values of backbone\.blocks\.0\.mlp\.fc1\.bias are not"
    ) as caught:
        call_convert(file, tmp_path / "pipeline", vae="none", num_attention_heads=heads)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "pipeline").exists()


def test_an_average_that_is_not_finite_is_refused(run: Path, tmp_path: Path) -> None:
    broken = shutil.copytree(run / "checkpoints" / "step_00000010", tmp_path / "checkpoints" / "step_00000010")
    state = load_file(broken / "ema_0.9.safetensors")
    name = next(iter(state))
    state[name].view(-1)[:2] = torch.nan
    save(
        tmp_path / "checkpoints",
        30,
        {"model": load_file(broken / "model.safetensors"), "ema_0.9": state},
        {},
        (broken / "config.yaml").read_text(),
    )
    with pytest.raises(UserError, match=rf"2 of the \d+ values of {name} are not finite.* use an earlier checkpoint"):
        call_convert(tmp_path, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    call_convert(broken, tmp_path / "out")


def test_an_autoencoder_that_is_not_finite_is_refused(tmp_path: Path) -> None:
    file, heads = published("sit_tiny", tmp_path)
    vae = tiny_autoencoder()
    vae.decoder.conv_in.bias.data[0] = torch.nan
    vae.save_pretrained(tmp_path / "vae")
    with pytest.raises(UserError, match=r"vae .*values of decoder\.conv_in\.bias are not finite"):
        call_convert(file, tmp_path / "pipeline", vae=str(tmp_path / "vae"), num_attention_heads=heads)
