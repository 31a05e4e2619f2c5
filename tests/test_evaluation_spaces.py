"""Feature spaces of timm's networks: preprocessing, positions, weights; tiny networks with random weights."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file
from scipy.spatial.distance import cdist
from test_evaluation_card import card_of, pictures, write_npz

from vit5gen.evaluation import Extractor, distances, load_extractor
from vit5gen.evaluation.distances import gaussian_discrepancy
from vit5gen.evaluation.extractors.timm_space import SPACES, Space
from vit5gen.evaluation.features import EXTRACTORS
from vit5gen.registry import missing
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256

CPU = torch.device("cpu")
SIZES = {"embed_dim": 16, "depth": 2, "num_heads": 2}
ODD = [(3, 5), (37, 53), (224, 224), (301, 260)]


def noise(height: int, width: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(height)
    return torch.randint(0, 256, (2, 3, height, width), generator=generator, dtype=torch.uint8)


def tiny(name: str, **options) -> Space:
    """The space with a network of a few thousand weights."""
    space = SPACES[name]
    return replace(space, options={**space.options, **SIZES, **options})


def write_weights(path: Path, space: Space, **options) -> dict[str, torch.Tensor]:
    """Write random weights of the network, as published before any change of its size."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        network = timm.create_model(space.model, pretrained=False, **SIZES, **options)
        state = {key: torch.randn_like(value) * 0.1 for key, value in network.state_dict().items()}
    save_file(state, path)
    return state


@pytest.fixture
def dinov2(tmp_path: Path) -> Extractor:
    write_weights(tmp_path / "model.safetensors", SPACES["dinov2"])
    return tiny("dinov2")(CPU, tmp_path / "model.safetensors", None)


@pytest.mark.parametrize(("height", "width"), ODD)
def test_images_reach_dinov2_as_pillow_resizes_them(height: int, width: int) -> None:
    images = noise(height, width)
    for image, found in zip(images, SPACES["dinov2"].pixels(images), strict=True):
        picture = Image.fromarray(np.moveaxis(image.numpy(), 0, 2), "RGB").resize((224, 224), Image.BICUBIC)
        expected = np.asarray(picture, dtype=np.float64) / 255
        np.testing.assert_allclose(found.permute(1, 2, 0).numpy(), expected, atol=1e-6)


@pytest.mark.parametrize(("height", "width"), ODD)
def test_images_reach_clip_through_an_antialiased_bicubic_filter_of_floats(height: int, width: int) -> None:
    images = noise(height, width)
    for image, found in zip(images.flatten(0, 1), SPACES["clip"].pixels(images).flatten(0, 1), strict=True):
        expected = filtered(filtered(image.double().numpy() / 255, 336).T, 336).T
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-6)


def filtered(values: np.ndarray, size: int) -> np.ndarray:
    """Resize the rows (N, W) by Keys' cubic filter (a = -1/2), widened by the scale where they shrink."""
    scale = values.shape[1] / size
    distance = np.abs((np.arange(values.shape[1]) + 0.5 - (np.arange(size)[:, None] + 0.5) * scale) / max(scale, 1))
    near, far = 1.5 * distance**3 - 2.5 * distance**2 + 1, -0.5 * distance**3 + 2.5 * distance**2 - 4 * distance + 2
    weights = np.where(distance < 1, near, np.where(distance < 2, far, 0))
    return values @ (weights / weights.sum(axis=1, keepdims=True)).T


def test_dinov2_gives_its_class_token_after_the_last_norm(dinov2: Extractor) -> None:
    assert (dinov2.name, dinov2.metric, dinov2.dim) == ("DINOv2-L14@224", "FD-DINOv2", 16)
    images = noise(40, 30)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (SPACES["dinov2"].pixels(images) - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    network: timm.models.VisionTransformer = dinov2.network
    with torch.no_grad():
        tokens = network.patch_embed.proj(pixels).flatten(2).mT
        tokens = torch.cat([network.cls_token.expand(2, 1, 16), tokens], dim=1) + network.pos_embed
        expected = network.norm(network.blocks(tokens))[:, 0]
    found = dinov2(images).pooled
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
    assert found.std(dim=0).min() > 0
    assert "state_dict" not in network.pretrained_cfg  # which would hold all weights twice


def test_positions_are_resampled_as_dinov2_does_itself(tmp_path: Path, dinov2: Extractor) -> None:
    # From 37 x 37 places to 16 x 16: output place i lies at (i + 1/2) 37 / 16.1 - 1/2, its filter is not widened.
    old = write_weights(tmp_path / "model.safetensors", SPACES["dinov2"])["pos_embed"].double()
    at = (np.arange(16) + 0.5) * 37 / 16.1 - 0.5
    distance = at[:, None] - np.floor(at)[:, None] - np.arange(-1, 3)
    d, weights = np.abs(distance), np.zeros((16, 37))
    # Its filter is that of convolution by a = -3/4.
    values = np.where(d <= 1, 1.25 * d**3 - 2.25 * d**2 + 1, -0.75 * d**3 + 3.75 * d**2 - 6 * d + 3)
    for i in range(16):
        for j, value in zip(np.floor(at[i]) + np.arange(-1, 3), values[i], strict=True):
            weights[i, int(np.clip(j, 0, 36))] += value
    grid = old[0, 1:].numpy().reshape(37, 37, 16)
    expected = np.einsum("ia,jb,abc->ijc", weights, weights, grid).reshape(256, 16)
    positions = dinov2.network.pos_embed[0].detach().numpy()
    np.testing.assert_allclose(positions[1:], expected, atol=1e-6)
    np.testing.assert_array_equal(positions[0], old[0, 0].float().numpy())


def test_clip_gives_its_projection_of_length_one(tmp_path: Path) -> None:
    write_weights(tmp_path / "model.safetensors", SPACES["clip"], img_size=28)
    space = replace(tiny("clip", img_size=28), side=28)
    clip = space(CPU, tmp_path / "model.safetensors", None)
    found = clip(noise(30, 50)).pooled
    assert (clip.metric, clip.dim, found.shape) == ("FD-CLIP-L14@336", 768, (2, 768))
    torch.testing.assert_close(found.norm(dim=1), torch.ones(2))
    network, published = clip.network, clip.network.pretrained_cfg
    mean, std = (torch.tensor(published[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        embedded = network.head(network.forward_features((space.pixels(noise(30, 50)) - mean) / std)[:, 0])
    torch.testing.assert_close(found, embedded / embedded.norm(dim=1, keepdim=True))
    assert network.blocks[0].mlp.act(torch.tensor(1.0)) == pytest.approx(1 / (1 + np.exp(-1.702)))  # OpenAI's GELU


def kernel_mean(x: np.ndarray, y: np.ndarray) -> float:
    return np.exp(-cdist(x, y, "sqeuclidean") / 200).mean()


def test_cmmd_is_the_biased_discrepancy_in_features_of_clip_alone(
    tmp_path: Path, dinov2: Extractor, monkeypatch
) -> None:
    rows = [
        torch.nn.functional.normalize(torch.randn(count, 9, dtype=torch.float64) + 0.3, dim=1) for count in (31, 50)
    ]
    x, y = (one.numpy() for one in rows)
    expected = 1000 * (kernel_mean(x, x) + kernel_mean(y, y) - 2 * kernel_mean(x, y))
    assert gaussian_discrepancy(*rows) == pytest.approx(expected, rel=1e-9)
    monkeypatch.setattr(distances, "_BLOCK_BYTES", 4 * 7 * 31)
    assert gaussian_discrepancy(*rows) == pytest.approx(expected, rel=1e-9)
    # Of two points at distance d: 1000 (2 - 2 exp(-d^2 / 200)).
    points = torch.tensor([[0.0, 0.0]]), torch.tensor([[3.0, 4.0]])
    assert gaussian_discrepancy(*points) == pytest.approx(2000 * (1 - np.exp(-25 / 200)), rel=1e-12)

    # As a metric of the command.
    write_weights(tmp_path / "model.safetensors", SPACES["clip"], img_size=28)
    clip = replace(tiny("clip", img_size=28), side=28)(CPU, tmp_path / "model.safetensors", None)
    files = [write_npz(tmp_path / f"{seed}.npz", pictures(20, seed=seed, side=40)) for seed in (0, 1)]
    card = card_of(*files, clip, metrics=["cmmd"])
    real, made = (clip(pictures(20, seed=seed, side=40)).pooled.double().numpy() for seed in (1, 0))
    expected = 1000 * (kernel_mean(real, real) + kernel_mean(made, made) - 2 * kernel_mean(real, made))
    assert card["metrics"] == {
        "CMMD": {"value": pytest.approx(expected, rel=1e-4), "n": 20, "reference_n": 20, "better": "lower"}
    }
    assert card["licences"] == {"CLIP-L14@336": clip.network.pretrained_cfg["license"]}
    with pytest.raises(UserError, match="cmmd: it is defined for features of CLIP-L14@336 alone, not of DINOv2"):
        card_of(*files, dinov2, metrics=["cmmd"])


def test_networks_have_the_published_sizes() -> None:
    for name, dim in {"dinov2": 1024, "clip": 768}.items():
        with torch.device("meta"):
            network = timm.create_model(SPACES[name].model, **SPACES[name].options)
        assert dim == (network.num_classes or network.num_features)
        side = SPACES[name].side
        assert network.patch_embed.img_size == (side, side)
        assert (len(network.blocks), network.num_prefix_tokens, network.num_reg_tokens) == (24, 1, 0)
        assert network.patch_embed.patch_size == (14, 14)


def test_weights_of_facebook_fit_as_those_of_timm_do(tmp_path: Path) -> None:
    state = write_weights(tmp_path / "model.safetensors", SPACES["dinov2"])
    torch.save(state | {"mask_token": torch.zeros(1, 16)}, tmp_path / "model.pth")
    images, space = noise(40, 30), tiny("dinov2")
    files = [tmp_path / f"model.{suffix}" for suffix in ("safetensors", "pth")]
    one, other = (space(CPU, file, sha256(file)) for file in files)
    torch.testing.assert_close(one(images).pooled, other(images).pooled, rtol=0, atol=0)
    assert (one.weights_sha256, other.weights_sha256) == tuple(map(sha256, files))
    assert one.licences == {"DINOv2-L14@224": "apache-2.0"}


def test_weights_that_are_absent_or_do_not_fit_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = write_weights(tmp_path / "model.safetensors", SPACES["dinov2"])
    with pytest.raises(UserError, match=r"sha256 .* expected 00000000"):
        tiny("dinov2")(CPU, tmp_path / "model.safetensors", "0" * 64)
    with pytest.raises(UserError, match="is not a file"):
        tiny("dinov2")(CPU, tmp_path / "absent.safetensors", None)
    for broken in ({"pos_embed": state["pos_embed"]}, {key: state[key] for key in state if "blocks.1" not in key}):
        save_file(broken, tmp_path / "broken.safetensors")
        with pytest.raises(
            UserError, match=r"broken.safetensors: do not fit .*give the weights of timm's vit_large_pat"
        ):
            tiny("dinov2")(CPU, tmp_path / "broken.safetensors", None)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))

    def offline(*arguments: object, **options: object) -> str:
        raise OSError("no route\nto host")

    monkeypatch.setattr("vit5gen.evaluation.extractors.timm_space.hf_hub_download", offline)
    with pytest.raises(
        UserError, match=r"not downloadable \(no route to host\); pass model.safetensors of the hub's timm/vi"
    ):
        load_extractor("dinov2")
    assert list(missing(EXTRACTORS.get("dinov2"))) == ["timm/vit_large_patch14_dinov2.lvd142m/model.safetensors"]


def test_batch_order_and_autocast_change_no_features(dinov2: Extractor) -> None:
    images = pictures(5)
    whole = dinov2(images).pooled
    with torch.autocast("cpu", dtype=torch.bfloat16):
        parts = torch.cat([dinov2(part).pooled for part in images.flip(0).split(2)]).flip(0)
    torch.testing.assert_close(parts, whole, rtol=1e-5, atol=1e-6)
