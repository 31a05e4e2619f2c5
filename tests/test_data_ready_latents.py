"""Latents of other programs become shards that a run sees as it sees its own."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL
from safetensors.torch import save_file

from vit5gen.config import Config, DataConfig, ModelConfig, VaeConfig
from vit5gen.data import encoding
from vit5gen.data.latents import LatentDataset
from vit5gen.data.ready_latents import import_latents
from vit5gen.system.errors import UserError

SCALE, SHIFT = 0.5, 0.25


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """A tiny autoencoder of 4x4x4 latents; three of them make a shard."""
    monkeypatch.setattr(encoding, "SHARD_SIZE", 3)
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
    blocks = {"down_block_types": ["DownEncoderBlock2D"] * 2, "up_block_types": ["UpDecoderBlock2D"] * 2}
    sizes = {"block_out_channels": [4, 8], "norm_num_groups": 4}
    AutoencoderKL(**blocks, **sizes, scaling_factor=SCALE, shift_factor=SHIFT).save_pretrained(tmp_path / "vae")
    return Config(
        model=ModelConfig(preset="S/2"),
        data=DataConfig(resolution=8, shard_dtype="float32"),
        vae=VaeConfig(name=str(tmp_path / "vae"), downsample=2),
    )


def change(config: Config, **values: object) -> Config:
    return config.model_copy(update={"data": config.data.model_copy(update=values)})


def raw(seed: int) -> torch.Tensor:
    """Eight latents whose mean and deviation are far from 0 and 1, and differ by channel."""
    noise = torch.randn(8, 4, 4, 4, generator=torch.Generator().manual_seed(seed))
    return noise * torch.tensor([1.0, 2, 3, 4]).view(-1, 1, 1) + torch.tensor([5.0, 0, -5, 9]).view(-1, 1, 1)


LABELS = torch.tensor([0, 1, 2, 0, 1, 2, 0, 0])


def write_shards(folder: Path, **changes: torch.Tensor) -> Path:
    """Write what LightningDiT's extraction does: two files, and the statistics of what is in them."""
    folder.mkdir()
    tensors = {"latents": raw(0), "latents_flip": raw(1), "labels": LABELS} | changes
    for name, part in (("latents_rank00_shard000", slice(0, 5)), ("latents_rank01_shard000", slice(5, None))):
        save_file({key: value[part].contiguous() for key, value in tensors.items()}, folder / f"{name}.safetensors")
    mean, std = raw(0).mean((0, 2, 3), keepdim=True), raw(0).std((0, 2, 3), keepdim=True)
    torch.save({"mean": mean, "std": std}, folder / "latents_stats.pt")
    return folder


def test_shards_of_lightningdit_are_normalised_as_the_autoencoder_says(config: Config, tmp_path: Path) -> None:
    source = write_shards(tmp_path / "theirs")
    config = change(config, classes=["cat", "dog", "fox"])
    import_latents(config, source, tmp_path / "out")
    latents = LatentDataset(tmp_path / "out")
    latents.verify()
    latents.check(config, AutoencoderKL.from_pretrained(tmp_path / "vae"))
    assert (latents.class_names, latents.labels.tolist()) == (["cat", "dog", "fox"], LABELS.tolist())
    assert [shard["images"] for shard in latents.manifest["shards"]] == [3, 3, 2]
    for index in range(8):
        for flip in (False, True):
            mean, std, _ = latents.get(index, flip)
            torch.testing.assert_close(mean, (raw(int(flip))[index] - SHIFT) * SCALE)
            assert not std.any()

    # A second call changes nothing; without mirror images they are left out; other latents are refused.
    before = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    import_latents(config, source, tmp_path / "out")
    assert {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()} == before
    import_latents(change(config, horizontal_flip=False), source, tmp_path / "plain")
    assert LatentDataset(tmp_path / "plain").get(7)[0].equal(latents.get(7)[0])
    with pytest.raises(UserError, match="contains latents made with images_sha256"):
        import_latents(config, write_shards(tmp_path / "others", latents=raw(2)), tmp_path / "out")


def test_a_pair_of_arrays_has_no_mirror_images(config: Config, tmp_path: Path) -> None:
    np.save(tmp_path / "latents.npy", raw(0).half().numpy())
    np.save(tmp_path / "labels.npy", LABELS.numpy())
    with pytest.raises(UserError, match="no mirror images; set"):
        import_latents(config, tmp_path, tmp_path / "out")
    import_latents(change(config, horizontal_flip=False), tmp_path, tmp_path / "out")
    latents = LatentDataset(tmp_path / "out")
    assert latents.class_names == ["0", "1", "2"]
    torch.testing.assert_close(latents.get(6)[0], (raw(0)[6].half().float() - SHIFT) * SCALE)


def spoil_statistics(folder: Path, **values: torch.Tensor) -> None:
    stored = torch.load(folder / "latents_stats.pt", weights_only=True)
    torch.save(stored | values, folder / "latents_stats.pt")


def cut(folder: Path) -> None:
    file = next(folder.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


ZERO, NAN = torch.tensor([1.0, 0, 1, 1]), torch.tensor([1.0, torch.nan, 1, 1])
INFINITE = torch.where(torch.arange(8).view(-1, 1, 1, 1) == 6, torch.inf, raw(1))
BAD: list[tuple[dict, Callable[[Path], object], dict, str]] = [
    ({}, lambda folder: spoil_statistics(folder, std=ZERO), {}, "std that is zero"),
    ({}, lambda folder: spoil_statistics(folder, mean=NAN), {}, "mean that is not finite"),
    ({}, lambda folder: spoil_statistics(folder, mean=torch.zeros(4)), {}, "statistics of other latents"),
    ({}, lambda folder: spoil_statistics(folder, std=torch.ones(5)), {}, "no mean and std of 4 channels"),
    ({}, lambda folder: (folder / "latents_stats.pt").write_bytes(b"x"), {}, "no mean and std of 4 channels"),
    ({}, lambda folder: [file.unlink() for file in folder.glob("*.safe*")], {}, "has no latents.npy; expected Lightn"),
    ({}, cut, {}, "expected whole files"),
    ({}, lambda folder: None, {"resolution": 16}, r"expected \[5, 4, 8, 8\]"),
    ({}, lambda folder: None, {"classes": ["a", "b"]}, "labels from 0 to 2, expected 0 to 1"),
    ({}, lambda folder: None, {"num_classes": 4}, "class '3' has no images"),
    ({}, lambda folder: None, {"held_out": 0.1}, "data.held_out: has no effect"),
    ({"labels": LABELS[:, None]}, lambda folder: None, {}, r"labels torch.int64 \[5, 1\]"),
    ({"labels": LABELS - 1}, lambda folder: None, {}, "labels from -1 to 1"),
    ({"latents_flip": INFINITE}, lambda folder: None, {}, "latent 6: .*not finite"),
    ({"latents": raw(0) * 1e5}, lambda folder: None, {}, "latents_stats.pt: statistics of other latents"),
    (
        {"latents": raw(0) * 1e6},
        lambda folder: (folder / "latents_stats.pt").unlink(),
        {"shard_dtype": "float16"},
        "latent 0: .*overflows float16",
    ),
]


@pytest.mark.parametrize(("tensors", "spoil", "settings", "message"), BAD)
def test_bad_input_is_one_line(
    config: Config,
    tmp_path: Path,
    tensors: dict,
    spoil: Callable[[Path], object],
    settings: dict,
    message: str,
) -> None:
    folder = write_shards(tmp_path / "theirs", **tensors)
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        import_latents(change(config, **settings), folder, tmp_path / "out")
    assert "\n" not in str(error.value)
    assert not list((tmp_path / "out").glob("*.safetensors")) or "finite" in message
