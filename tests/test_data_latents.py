"""Shards of latents: right numbers, whole or absent, resumable, checked, and cheap to open at any size."""

import json
import os
import re
import resource
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import debug_launcher
from accelerate.state import AcceleratorState
from diffusers import AutoencoderKL
from PIL import Image
from safetensors import safe_open
from safetensors.torch import save_file

from vit5gen.config import Config, DataConfig, ModelConfig, VaeConfig
from vit5gen.data import encoding
from vit5gen.data.autoencoders.codec import encode
from vit5gen.data.encoding import encode_dataset, encode_images, ensure_latents
from vit5gen.data.latents import LatentDataset, identity, open_for
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256


def tiny_vae(seed: int = 0) -> AutoencoderKL:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        vae = AutoencoderKL(
            down_block_types=["DownEncoderBlock2D"] * 2,
            up_block_types=["UpDecoderBlock2D"] * 2,
            block_out_channels=[4, 8],
            norm_num_groups=4,
            scaling_factor=0.5,
            shift_factor=0.25,
        )
    return vae.eval().requires_grad_(False)


@pytest.fixture
def config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """Eleven noisy images of two classes and a tiny autoencoder on disk; three images make a shard."""
    monkeypatch.setattr(encoding, "SHARD_SIZE", 3)
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
    generator = torch.Generator().manual_seed(0)
    for i in range(11):
        path = tmp_path / "images" / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(torch.randint(256, (8, 8, 3), generator=generator, dtype=torch.uint8).numpy()).save(path)
    tiny_vae().save_pretrained(tmp_path / "vae")
    return Config(
        model=ModelConfig(preset="S/2"),
        data=DataConfig(source="folder", path=str(tmp_path / "images"), resolution=8, num_classes=2),
        vae=VaeConfig(name=str(tmp_path / "vae"), downsample=2, batch_size=2),
    )


def change(config: Config, section: str, **values: object) -> Config:
    return config.model_copy(update={section: getattr(config, section).model_copy(update=values)})


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 1e-3), ("bfloat16", 8e-3), ("float32", 0)])
def test_shards_hold_scaled_mean_and_std_of_both_mirror_images(
    config: Config, tmp_path: Path, dtype: str, tolerance: float
) -> None:
    config = change(config, "data", shard_dtype=dtype)
    encode_images(config, tmp_path / "out")
    dataset, vae = LatentDataset(tmp_path / "out"), tiny_vae()
    images = open_for(config, vae)
    dataset.check(config, vae)
    dataset.verify()
    assert len(dataset) == len(images) == 11
    assert dataset.class_names == ["cat", "dog"]
    assert dataset.manifest["counts"] == [6, 5]
    assert dataset.labels.tolist() == images.labels.tolist() == [0] * 6 + [1] * 5
    for index in (0, 2, 3, 10):
        for flip in (False, True):
            pixels = images[index][0].flip(-1) if flip else images[index][0]
            posterior = vae.encode(pixels[None] / 127.5 - 1).latent_dist
            mean, std, label = dataset.get(index, flip)
            torch.testing.assert_close(
                mean, (posterior.mean[0] - 0.25) * 0.5, rtol=tolerance, atol=max(tolerance, 1e-6)
            )
            torch.testing.assert_close(std, posterior.std[0] * 0.5, rtol=tolerance, atol=max(tolerance, 1e-6))
            assert mean.dtype == std.dtype == torch.float32
            assert label == images[index][1]
    with pytest.raises(IndexError):
        dataset.get(11)


def test_without_flips(config: Config, tmp_path: Path) -> None:
    plain = change(config, "data", horizontal_flip=False)
    encode_images(plain, tmp_path / "out")
    encode_images(config, tmp_path / "both")
    dataset = LatentDataset(tmp_path / "out")
    assert torch.equal(dataset.get(4)[0], LatentDataset(tmp_path / "both").get(4)[0])
    with pytest.raises(UserError, match="horizontal_flip False, the run has True"):
        dataset.check(config, tiny_vae())


def test_size_is_printed_before_the_start(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encode_images(config, tmp_path / "out")
    # images x mirror images x (mean, std) x 4x4x4 numbers x 2 bytes, and labels
    assert f"11 images -> {(11 * 2 * 2 * 64 * 2 + 11 * 8) / 1e9:.3f} GB" in capsys.readouterr().out
    assert encoding.shard_bytes(
        1_281_167, {"horizontal_flip": True, "latent_shape": [4, 32, 32], "dtype": "float16"}
    ) / 1e9 == (
        pytest.approx(42, abs=0.1)  # ImageNet-256
    )


def test_refuses_when_the_disk_is_short(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = type("Usage", (), {"free": 5000})
    monkeypatch.setattr(encoding.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(UserError, match=r"needs 0\.000 GB, the disk has 0\.000 GB"):
        encode_images(config, tmp_path / "out")
    assert not list((tmp_path / "out").iterdir())


def test_goes_on_after_a_kill(config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    encode_images(config, tmp_path / "undisturbed")
    write, written = encoding._write_shard, []

    def killed_at_the_third(path: Path, *arguments: object) -> dict:
        if len(written) == 2:
            raise KeyboardInterrupt
        written.append(path)
        return write(path, *arguments)

    monkeypatch.setattr(encoding, "_write_shard", killed_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        encode_images(config, tmp_path / "out")
    with pytest.raises(UserError, match="interrupted; run `vit5gen encode` again"):
        LatentDataset(tmp_path / "out")
    (tmp_path / "out" / ".shard_00002.safetensors.1.tmp").write_bytes(b"half")
    written[1].write_bytes(b"damaged")
    kept = written[0].stat().st_mtime_ns
    monkeypatch.setattr(encoding, "_write_shard", write)
    encode_images(config, tmp_path / "out")
    assert written[0].stat().st_mtime_ns == kept
    assert contents(tmp_path / "out") == contents(tmp_path / "undisturbed")


def test_goes_on_after_a_kill_before_the_manifest(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def killed(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_finish", killed)
        with pytest.raises(KeyboardInterrupt):
            encode_images(config, tmp_path / "out")
    encode_images(config, tmp_path / "out")
    assert len(LatentDataset(tmp_path / "out")) == 11
    assert not list((tmp_path / "out").glob("shard_*.json"))


def test_two_processes_share_the_work_and_write_the_same_bytes(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = encoding._write_shard

    def noted(path: Path, *arguments: Any) -> dict[str, Any]:
        (tmp_path / f"{path.stem}.{os.getpid()}.note").touch()
        return write(path, *arguments)

    AcceleratorState._reset_state(reset_partial_state=True)  # the two are forked from here
    with monkeypatch.context() as patch:
        patch.setattr(encoding, "_write_shard", noted)
        debug_launcher(encode_images, (config, tmp_path / "two"), num_processes=2)
    encode_images(config, tmp_path / "one")
    assert contents(tmp_path / "two") == contents(tmp_path / "one")
    notes = [note.name.split(".") for note in tmp_path.glob("*.note")]
    assert (len(notes), len({process for _, process, _ in notes})) == (4, 2)


def test_other_pictures_of_the_same_names_are_encoded_anew(config: Config, tmp_path: Path) -> None:
    vae = tiny_vae()
    before = ensure_latents(open_for(config, vae), vae, config)
    assert ensure_latents(open_for(config, vae), vae, config) == before
    (tmp_path / "images").rename(tmp_path / "others")
    moved = change(config, "data", path=str(tmp_path / "others"))
    assert ensure_latents(open_for(moved, vae), vae, moved) != before  # files of equal names and sizes may be others
    (tmp_path / "others").rename(tmp_path / "images")
    Image.new("RGB", (8, 8)).save(tmp_path / "images" / "cat" / "00.png")
    assert ensure_latents(open_for(config, vae), vae, config) != before


def test_a_broken_image_that_is_removed_stands_in_no_ones_way(config: Config, tmp_path: Path) -> None:
    broken = tmp_path / "images" / "cat" / "00.png"
    broken.write_bytes(b"no image")
    with pytest.raises(UserError, match=r"00\.png does not decode"):
        encode_images(config, tmp_path / "out")
    broken.unlink()
    encode_images(config, tmp_path / "out")
    assert len(LatentDataset(tmp_path / "out")) == 10


def test_a_run_waits_while_another_fills_its_cache(config: Config, tmp_path: Path) -> None:
    file, entered = tmp_path / "cache" / "latents-x.lock", threading.Event()

    def other() -> None:
        with encoding._waiting_lock(file):
            entered.set()

    with encoding._waiting_lock(file):
        waiting = threading.Thread(target=other)
        waiting.start()
        assert not entered.wait(0.2)
    waiting.join()
    assert entered.is_set()


@pytest.mark.parametrize("damage", ["flip a bit", "truncate", "delete"])
def test_damage_is_found_and_mended(config: Config, tmp_path: Path, damage: str) -> None:
    folder = tmp_path / "out"
    encode_images(config, folder)
    whole, shard = contents(folder), folder / "shard_00001.safetensors"
    if damage == "flip a bit":
        content = bytearray(shard.read_bytes())
        content[-1] ^= 1
        shard.write_bytes(content)
    elif damage == "truncate":
        os.truncate(shard, 100)
    else:
        shard.unlink()
    with pytest.raises(UserError, match=r"shard_00001.*(checksum|of \d+ bytes)"):
        LatentDataset(folder).verify()
    encode_images(config, folder)
    assert contents(folder) == whole


def test_broken_images_are_fatal_or_listed(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "images" / "cat" / "02.png").write_bytes(b"no png")
    with pytest.raises(UserError, match=r"02\.png does not decode"):
        encode_images(config, tmp_path / "out")
    encode_images(change(config, "data", on_broken_image="skip"), tmp_path / "out")
    dataset = LatentDataset(tmp_path / "out")
    assert (len(dataset), dataset.manifest["counts"]) == (10, [5, 5])
    assert "02.png" in dataset.manifest["shards"][0]["broken"][0]
    assert "skipped 1 broken image," in capsys.readouterr().out
    images = open_for(config, tiny_vae())
    mean, _ = encode(tiny_vae(), images[3][0][None])
    torch.testing.assert_close(dataset.get(2)[0], mean[0], rtol=1e-3, atol=1e-3)  # the next one moves up


def spoil(config: Config, **values: float) -> None:
    """Give the autoencoder on disk other weights or another scale."""
    vae = tiny_vae()
    if (bias := values.pop("bias", None)) is not None:
        vae.quant_conv.bias[0] = bias
    vae.register_to_config(**values)
    vae.save_pretrained(config.vae.name)


@pytest.mark.parametrize(
    ("dtype", "spoilt", "message"),
    [
        (
            "float16",
            {"scaling_factor": 1e6},
            r"a latent of \d.* overflows float16, whose maximum is 65504; set data\.shard_d",
        ),
        ("float16", {"bias": float("nan")}, "the autoencoder's latents of this image are not finite; check vae.name"),
        pytest.param("bfloat16", {"bias": float("inf")}, "the autoencoder's latents", marks=pytest.mark.slow),
        ("bfloat16", {"scaling_factor": 1e6}, None),
        pytest.param("float32", {"scaling_factor": 1e6}, None, marks=pytest.mark.slow),
    ],
)
def test_latents_that_are_not_finite_in_their_shard_are_not_written(
    config: Config, tmp_path: Path, dtype: str, spoilt: dict[str, float], message: str | None
) -> None:
    config = change(config, "data", shard_dtype=dtype)
    spoil(config, **spoilt)
    if message is None:
        encode_images(config, tmp_path / "out")
        LatentDataset(tmp_path / "out").verify()
        return
    with pytest.raises(UserError, match=rf"image .*cat.00\.png: {message}") as raised:
        encode_images(config, tmp_path / "out")
    assert "\n" not in str(raised.value)
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["manifest.json"]
    with pytest.raises(UserError, match="encoding was interrupted"):
        LatentDataset(tmp_path / "out")


def test_the_image_that_is_not_finite_is_named_behind_a_broken_one(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One image alone, of which only the mirror image or the deviation is spoilt, in the second shard."""
    (tmp_path / "images" / "cat" / "06.png").write_bytes(b"no image")
    pixels = open_for(config, tiny_vae())[4][0]

    def encode_badly(vae: AutoencoderKL, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        mean, std = encode(vae, images)
        std[[bool((image == pixels.flip(-1)).all()) for image in images]] = float("nan")
        return mean, std

    monkeypatch.setattr(encoding, "encode", encode_badly)
    config = change(change(config, "data", on_broken_image="skip"), "vae", batch_size=3)
    with pytest.raises(UserError, match=r"image .*cat.08\.png: the autoencoder's latents"):
        encode_images(config, tmp_path / "out")


def test_shards_of_earlier_versions_that_are_not_finite_are_made_again(config: Config, tmp_path: Path) -> None:
    folder = tmp_path / "out"
    encode_images(config, folder)
    whole, shard = contents(folder), folder / "shard_00001.safetensors"
    with safe_open(shard, framework="pt") as file:
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (no mapping)
    tensors["std"][1, 0, 0, 0] = float("inf")
    save_file(tensors, shard)
    manifest = json.loads((folder / "manifest.json").read_text())
    manifest["shards"][1]["sha256"] = sha256(shard)
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(
        UserError, match=r"shard_00001\.safetensors has values that are not finite; run `vit5gen encode`"
    ):
        LatentDataset(folder).verify()
    encode_images(config, folder)
    assert contents(folder) == whole


def test_shards_are_kept_for_the_images_they_were_made_of(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder, manifest = tmp_path / "out", tmp_path / "out" / "manifest.json"
    encode_images(config, folder)
    content = json.loads(manifest.read_text())
    assert content["images_sha256"] == open_for(config, tiny_vae()).digest()
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "dog" / "09.png")
    with pytest.raises(UserError, match="contains latents made with images_sha256"):
        encode_images(config, folder)
    # A manifest of the version before says nothing, and is neither refused nor given what is not known.
    del content["images_sha256"]
    manifest.write_text(json.dumps(content, indent=2) + "\n")
    before = contents(folder)
    encode_images(config, folder)
    assert contents(folder) == before
    assert identity(LatentDataset(folder).manifest)["digest"] is None
    # A broken image may be repaired on the way.
    (tmp_path / "images" / "dog" / "09.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"09\.png does not decode"):
        encode_images(config, tmp_path / "again")
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "dog" / "09.png")
    encode_images(config, tmp_path / "again")
    assert "note: " in capsys.readouterr().out
    assert LatentDataset(tmp_path / "again").manifest["images_sha256"] == open_for(config, tiny_vae()).digest()


def test_a_class_of_broken_images_alone_ends_no_encoding(
    config: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for file in (tmp_path / "images" / "dog").iterdir():
        file.write_bytes(b"no png")
    skip = change(config, "data", on_broken_image="skip")
    monkeypatch.setattr(encoding, "SHARD_SIZE", 11)  # in smaller shards none would decode
    with pytest.raises(UserError, match="all images of class 'dog' are broken") as raised:
        encode_images(skip, tmp_path / "out")
    assert "\n" not in str(raised.value)
    with pytest.raises(UserError, match="interrupted"):
        LatentDataset(tmp_path / "out")


def test_manifest_says_how_files_are_read(config: Config, tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    encode_images(config, tmp_path / "out")
    manifest = LatentDataset(tmp_path / "out").manifest
    assert (manifest["exif"], manifest["rules"]) == ("apply", 2)
    LatentDataset(tmp_path / "out").check(config, tiny_vae())
    assert "note:" not in capsys.readouterr().out
    with pytest.raises(UserError, match="exif 'apply', not 'ignore'"):
        encode_images(change(config, "data", exif="ignore"), tmp_path / "out")
    del manifest["exif"], manifest["rules"]  # as the earlier version wrote it
    (tmp_path / "out" / "manifest.json").write_text(json.dumps(manifest))
    LatentDataset(tmp_path / "out").check(change(config, "data", exif="ignore", rules=1), tiny_vae())
    assert "note:" not in capsys.readouterr().out
    LatentDataset(tmp_path / "out").check(config, tiny_vae())
    assert "were made with data.exif ignore, the run has apply" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("wanted", "seed", "message"),
    [
        ({}, 1, "vae_sha256 .*the run has .*, not "),
        ({"resolution": 16}, 0, "resolution 8, the run has 16"),
        ({"classes": ["dog", "cat"]}, 0, r"classes \['cat', 'dog'\], the run has \['dog', 'cat'\]"),
        ({"num_classes": 3}, 0, "num_classes 2, the run has 3"),
    ],
)
def test_latents_of_another_run_are_refused(
    config: Config, tmp_path: Path, wanted: dict, seed: int, message: str
) -> None:
    encode_images(config, tmp_path / "out")
    with pytest.raises(UserError, match=message) as raised:
        LatentDataset(tmp_path / "out").check(change(config, "data", **wanted), tiny_vae(seed))
    assert "\n" not in str(raised.value)


def test_never_overwrites_other_latents(config: Config, tmp_path: Path) -> None:
    encode_images(config, tmp_path / "out")
    before = contents(tmp_path / "out")
    with pytest.raises(UserError, match="dtype 'float16', not 'float32'"):
        encode_images(change(config, "data", shard_dtype="float32"), tmp_path / "out")
    assert contents(tmp_path / "out") == before


def test_cache_is_used_again(config: Config, tmp_path: Path) -> None:
    vae = tiny_vae()
    folder = ensure_latents(open_for(config, vae), vae, config)
    assert folder.parent == tmp_path / "cache"
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert ensure_latents(open_for(config, vae), vae, config) == folder
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == before
    dogs = change(config, "data", classes=["dog"], num_classes=1)
    assert ensure_latents(open_for(dogs, vae), vae, dogs) != folder


@pytest.mark.parametrize(
    ("section", "values", "message"),
    [
        ("data", {"num_classes": 5}, "num_classes = 5: the data set has 2"),
        ("vae", {"downsample": 8}, r"vae\.downsample = 8, .* has 2"),
        ("vae", {"latent_channels": 16}, r"vae\.latent_channels = 16, .* has 4"),
        ("data", {"resolution": 9}, r"resolution = 9 is not a multiple of vae\.downsample = 2"),
    ],
)
def test_settings_that_do_not_fit(config: Config, section: str, values: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_for(change(config, section, **values), tiny_vae())


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda text: "{", "is not valid JSON"),
        (lambda text: "[]", "contains a list; expected an object"),
        (lambda text: text.replace("id2label", "names"), "not a manifest of latents"),
        (lambda text: text.replace('"images": 3', '"images": "3"'), "not a manifest of latents"),
    ],
)
def test_bad_manifests(config: Config, tmp_path: Path, spoil: Callable[[str], str], message: str) -> None:
    encode_images(config, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(spoil(manifest.read_text()))
    with pytest.raises(UserError, match=message):
        LatentDataset(tmp_path / "out")


def test_labels_out_of_range_and_no_folder(config: Config, tmp_path: Path) -> None:
    encode_images(config, tmp_path / "out")
    manifest = tmp_path / "out" / "manifest.json"
    manifest.write_text(manifest.read_text().replace(',\n    "1": "dog"', ""))
    with pytest.raises(UserError, match="labels from 0 to 1, expected 0 to 0"):
        _ = LatentDataset(tmp_path / "out").labels
    with pytest.raises(UserError, match="expected 0 to 0"):
        LatentDataset(tmp_path / "out").verify()
    manifest.write_text(re.sub(r'"images": \d+,(\s+"bytes")', r'"images": 2,\1', manifest.read_text()))
    with pytest.raises(UserError, match=r"its manifest says \[2, "):
        LatentDataset(tmp_path / "out").verify()
    with pytest.raises(UserError, match="No such file"):
        LatentDataset(tmp_path / "nowhere")


@pytest.fixture
def synthetic(tmp_path: Path) -> Callable[[int], Path]:
    """Make a folder of n samples 4x8x8, all shards being links to one file."""
    shard = tmp_path / "shard.safetensors"
    numbers = torch.zeros(4096, 2, 4, 8, 8, dtype=torch.float16)
    save_file({"mean": numbers, "std": numbers.clone(), "labels": torch.zeros(4096, dtype=torch.int64)}, shard)

    def make(samples: int) -> Path:
        folder = tmp_path / str(samples)
        folder.mkdir()
        shards = []
        for number in range(-(-samples // 4096)):
            name = encoding._shard_name(number)
            os.link(shard, folder / name)
            shards.append({"file": name, "images": 4096, "bytes": shard.stat().st_size, "sha256": "", "broken": []})
        (folder / "manifest.json").write_text(json.dumps({"id2label": {"0": "a"}, "shards": shards}))
        return folder

    return make


def test_opening_a_million_samples_costs_no_more(synthetic: Callable[[int], Path]) -> None:
    seconds, grown = {}, {}
    for samples in (10_000, 1_000_000):
        folder = synthetic(samples)
        memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        start = time.perf_counter()
        dataset = LatentDataset(folder)
        mean, _, _ = dataset.get(samples - 1, True)
        seconds[samples] = time.perf_counter() - start
        grown[samples] = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) / 1024
        assert mean.shape == (4, 8, 8)
        assert len(dataset) >= samples
    assert seconds[1_000_000] < 0.1  # 245 sizes to compare; reading the 2 GB would take seconds
    assert grown[1_000_000] < 16  # MiB


def test_published_autoencoder_encodes(tmp_path: Path) -> None:
    # The configuration of stabilityai/sd-vae-ft-ema with random weights: 84 M parameters, 256 px -> 4x32x32.
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 4,
        up_block_types=["UpDecoderBlock2D"] * 4,
        block_out_channels=[128, 256, 512, 512],
        layers_per_block=2,
        sample_size=256,
    ).eval()
    assert sum(parameter.numel() for parameter in vae.parameters()) == 83_653_863
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        Image.new("RGB", (300, 260), "red").save(tmp_path / "images" / name / "1.png")
    config = Config(
        model=ModelConfig(preset="S/2"),
        data=DataConfig(path=str(tmp_path / "images"), num_classes=2, horizontal_flip=False),
    )
    encode_dataset(open_for(config, vae), vae, tmp_path / "out", config)
    dataset = LatentDataset(tmp_path / "out")
    dataset.check(config, vae)
    assert dataset.manifest["scaling_factor"] == 0.18215
    assert dataset.get(1)[0].shape == (4, 32, 32)


@pytest.mark.parametrize(
    "damage",
    [
        {"id2label": ["cat"]},
        {"id2label": {"0": 5}},
        {"shards": [{"file": "x", "bytes": 1, "images": "5"}]},
        {"shards": ["x"]},
        {"shards": 5},
    ],
)
def test_a_manifest_with_values_of_other_types_is_refused(tmp_path: Path, damage: dict) -> None:
    manifest = {"id2label": {"0": "cat"}, "shards": [], "counts": [0]}
    (tmp_path / "manifest.json").write_text(json.dumps(manifest | damage))
    with pytest.raises(UserError, match="not a manifest of latents") as refused:
        LatentDataset(tmp_path)
    assert "\n" not in str(refused.value)
