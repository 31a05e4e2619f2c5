"""Alignment with an encoder: its loss in numpy, what it trains, and the images or features beside the latents."""

import pickle
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import timm
import torch
from accelerate import Accelerator
from tiny import tiny_transformer
from tiny_run import assert_identical, forget_processes, losses, make_inputs, run

from vit5gen.config import load_config
from vit5gen.data.autoencoders.codec import encode
from vit5gen.data.encoding import encode_images
from vit5gen.data.images import ImageSet
from vit5gen.evaluation import load_extractor
from vit5gen.evaluation.encoders import OFFLINE, Encoder, ToMap, find_encoder
from vit5gen.evaluation.extractors import timm_space
from vit5gen.flow import Flow
from vit5gen.models import SiTTransformer2DModel
from vit5gen.system.errors import UserError
from vit5gen.training.batches import TrainingSet, WithMore, open_training_data
from vit5gen.training.dry_run import missing, run_cost
from vit5gen.training.monitor import Monitor
from vit5gen.training.objectives import OBJECTIVES, Batch, Objective, build_objectives
from vit5gen.training.objectives.alignment import encode_to_grid

CPU = torch.device("cpu")


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Yield the configuration of a run whose data and cache are this test's own, and whose image 4 of 21 is broken."""
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Monitor, "due", lambda self, step: False)
    file = make_inputs(tmp_path)
    broken = tmp_path / "data/train/circle/4.png"
    broken.write_bytes(broken.read_bytes()[:80])
    text = file.read_text().replace("log_every: 1", "log_every: 1\n  trackers: []")
    file.write_text(text.replace("num_classes: 3", "num_classes: 3\n  on_broken_image: skip"))
    return file


def aligned(**options: Any) -> dict[str, Any]:
    return {"flow": {}, "alignment": {"encoder": "fashion-judge", "tap": 1, "width": 16, "side": 64} | options}


def make_objective(model: SiTTransformer2DModel, **options: Any) -> Objective:
    return OBJECTIVES.get("alignment")(model, Flow(), **aligned(**options)["alignment"])


def make_batch(model: SiTTransformer2DModel, side: int, count: int = 3) -> Batch:
    generator = torch.Generator().manual_seed(0)
    x1, x0 = torch.randn(2, count, 4, 8, 8, generator=generator)
    t, labels = torch.rand(count, generator=generator), torch.arange(count)
    image = torch.randint(256, (count, 3, side, side), generator=generator, dtype=torch.uint8)
    x_t, velocity = Flow().interpolate(x0, x1, t)
    return Batch(x1, x0, labels, t, t, 0, image, t, x_t, velocity)


def resize(values: np.ndarray, size: int) -> np.ndarray:
    """Filter both axes of (..., n, n) with a triangle one pixel of the coarser grid wide; pixels have centres."""
    scale = values.shape[-1] / size
    places = (np.arange(values.shape[-1]) + 0.5)[None] - (np.arange(size) + 0.5)[:, None] * scale
    weights = np.maximum(0, 1 - np.abs(places) / max(scale, 1))
    weights /= weights.sum(1, keepdims=True)
    return np.einsum("iy,jx,bcyx->bcij", weights, weights, values)


def project(objective: Objective, tokens: np.ndarray) -> np.ndarray:
    """Return (B, C, h, w) of tokens (B, h w, D)."""
    state = {key: value.double().numpy() for key, value in objective.projector.state_dict().items()}
    grid = tokens.transpose(0, 2, 1).reshape(len(tokens), -1, 4, 4)
    if "weight" in state:
        padded, weight = np.pad(grid, ((0, 0), (0, 0), (1, 1), (1, 1))), state["weight"]
        shifted = [(y, x, padded[:, :, y : y + 4, x : x + 4]) for y in range(3) for x in range(3)]
        return (
            sum(np.einsum("bdij,cd->bcij", part, weight[:, :, y, x]) for y, x, part in shifted)
            + state["bias"][None, :, None, None]
        )
    x = tokens
    for layer in (0, 2, 4):
        x = x @ state[f"{layer}.weight"].T + state[f"{layer}.bias"]
        x = x if layer == 4 else x / (1 + np.exp(-x))
    return x.transpose(0, 2, 1).reshape(len(x), -1, 4, 4)


@pytest.mark.parametrize("options", [{}, {"projector": "conv", "spatial_norm": True}, {"side": 256}])
def test_the_loss_is_that_of_numpy(options: dict[str, Any]) -> None:
    model = tiny_transformer(backbone="vit5")
    objective, side = make_objective(model, **options), options.get("side", 64)
    batch = make_batch(model, side)
    prediction, hidden = model(batch.x_t, batch.t, batch.labels, taps=(1,))
    with torch.no_grad():
        found = objective(prediction, hidden, batch, 0)
        # Images of the encoder's side need no resizing: its own network sees them normalised.
        assert batch.image is not None
        mean, std = (torch.tensor(v).view(3, 1, 1) for v in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        network: Any = load_extractor("fashion-judge").network
        raw = network.forward_features((batch.image / 255 - mean) / std).double().numpy()
    assert raw.shape == (3, 768, side // 32, side // 32)  # coarser than the grid of 4 x 4 tokens, or finer
    target = resize(raw, 4)
    if options.get("spatial_norm"):
        means, deviations = target.mean((2, 3), keepdims=True), target.std((2, 3), ddof=1, keepdims=True)
        target = (target - 0.6 * means) / (deviations + 1e-6)
    mine = project(objective, hidden[1].detach().double().numpy())
    cosine = (mine * target).sum(1) / np.sqrt((mine**2).sum(1) * (target**2).sum(1))
    np.testing.assert_allclose(found.numpy(), -cosine.mean((1, 2)), atol=1e-5)


def test_the_features_of_one_token_can_be_normalised() -> None:
    model = tiny_transformer(backbone="vit5", patch_size=8)
    objective, batch = make_objective(model, spatial_norm=True), make_batch(model, 64)
    _, hidden = model(batch.x_t, batch.t, batch.labels, taps=(1,))
    assert objective(batch.x1, hidden, batch, 0).isfinite().all()  # the deviation over one place is 0


def test_the_gradient_reaches_what_is_below_the_tap_and_the_projector() -> None:
    model = tiny_transformer(backbone="vit5", num_layers=3)
    objective, batch = make_objective(model, tap=2), make_batch(model, 16)
    prediction, hidden = model(batch.x_t, batch.t, batch.labels, taps=(2,))
    objective(prediction, hidden, batch, 0).mean().backward()
    reached = {name for name, weight in model.named_parameters() if weight.grad is not None and weight.grad.any()}
    assert reached == {n for n, _ in model.named_parameters() if not n.startswith(("head.", "backbone.blocks.2."))}
    assert all(weight.grad is not None and weight.grad.any() for weight in objective.parameters())
    assert {name.split(".")[0] for name in objective.state_dict()} == {"projector"}  # nothing of the encoder


def test_the_encoder_is_there_in_the_steps_of_the_objective_alone(
    inputs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded, load = list[weakref.ref](), Encoder.load

    def keep(self: Encoder, device: torch.device) -> tuple[ToMap, str]:
        found = load(self, device)
        loaded.append(weakref.ref(found[0]))
        return found

    monkeypatch.setattr(Encoder, "load", keep)
    config, model = load_config(inputs), tiny_transformer(backbone="vit5")
    training = config.training.model_copy(update={"objectives": aligned(start=1, stop_at=3)})
    objectives, batch = build_objectives(training, model, Flow()), make_batch(model, 16)
    prediction, hidden = model(batch.x_t, batch.t, batch.labels, taps=(1,))
    for step in range(5):
        loss = objectives(prediction, hidden, batch, step)[1]
        assert bool(loss) == any(one() for one in loaded) == (1 <= step < 3)
    assert len(loaded) == 1


@pytest.mark.parametrize("name", OFFLINE)
def test_the_mean_of_an_extractors_map_is_its_feature(name: str) -> None:
    encoder, extractor = find_encoder(name, 4, None, None), load_extractor(name)
    images = torch.randint(256, (2, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        found = encoder.load(CPU)[0](images)
    assert found.shape[1] == encoder.channels == extractor.dim
    torch.testing.assert_close(found.mean((2, 3)), extractor(images).pooled)


def test_a_model_of_timm_gives_a_feature_for_each_token(tmp_path: Path) -> None:
    name, file = "test_vit3.r160_in1k", str(tmp_path / "weights.safetensors")
    network = timm.create_model("test_vit3", img_size=64).eval()
    safetensors.torch.save_file(network.state_dict(), file)
    encoder = find_encoder(name, 4, None, file)
    assert (encoder.side, encoder.missing()) == (64, {})
    to_map, digest = encoder.load(CPU)
    images = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    mean, std = (torch.tensor(network.pretrained_cfg[key])[:, None, None] for key in ("mean", "std"))
    with torch.no_grad():
        tokens = network.forward_features((images / 255 - mean) / std)[:, network.num_prefix_tokens :]
        torch.testing.assert_close(to_map(images).flatten(2).transpose(1, 2), tokens, atol=1e-4, rtol=1e-4)
    assert encoder.channels == tokens.shape[2]
    assert len(digest) == 64


def test_an_encoder_has_as_many_channels_as_its_map() -> None:
    encoder = find_encoder("samvit_base_patch16.sa1b", 4, None, None)  # whose neck has fewer than its blocks
    images = torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device="meta")
    assert encoder.load(images.device)[0](images).shape == (1, encoder.channels, 4, 4)


def open_data(file: Path, **options: Any) -> tuple[TrainingSet, Any]:
    forget_processes()
    config = load_config(file, options)
    source, vae, _ = open_training_data(config, Accelerator(cpu=True), None, False)
    return TrainingSet(source, config), vae


@pytest.mark.parametrize("given", [pytest.param(False, marks=pytest.mark.slow), True])
def test_images_are_those_of_the_latents(inputs: Path, tmp_path: Path, given: bool) -> None:
    options: dict[str, Any] = {"training.objectives": aligned(start=2, stop_at=12)}
    if given:
        encode_images(load_config(inputs), tmp_path / "latents")
        options["data.latents"] = str(tmp_path / "latents")
    samples, vae = open_data(inputs, **options)
    assert isinstance(samples.source, WithMore)
    assert len(samples.source) == 20  # one is broken, after which rows and images differ
    samples, flipped = pickle.loads(pickle.dumps(samples)), set()  # noqa: S301 (as data workers receive it)
    for step in range(2, 6):
        for position in range(4):
            sample = samples[step, position]
            mean, _ = encode(vae, sample["image"][None])
            stored = [samples.source.get(sample["index"], flip)[0] for flip in (False, True)]
            distances = [(mean[0] - one).abs().max().item() for one in stored]
            flipped.add(distances[1] < distances[0])
            assert min(distances) < 2e-3  # fp16
    assert flipped == {False, True}
    assert not {"image", "features"} & (samples[1, 0].keys() | samples[12, 0].keys())


def test_other_images_than_those_of_the_latents_are_refused(inputs: Path, tmp_path: Path) -> None:
    encode_images(load_config(inputs), tmp_path / "latents")
    options = {"data.latents": str(tmp_path / "latents"), "training.objectives": aligned()}
    (tmp_path / "data/train/star/3.png").write_bytes((tmp_path / "data/train/star/2.png").read_bytes())
    with pytest.raises(UserError, match=r"made of other images than those of data.*images_sha256 differ.*encode again"):
        open_data(inputs, **options)


class Pictures(Objective):
    """Another objective that needs the images."""

    needs_image = True


def test_features_of_shards_are_those_of_the_images(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES._known, "pictures", Pictures)
    images, _ = open_data(inputs, **{"training.objectives": aligned()})
    both = aligned(features="shards", start=1) | {"pictures": {"stop_at": 3}}
    stored, _ = open_data(inputs, **{"training.objectives": both})
    # Each is read while what needs it is active.
    found = [{"image", "features"} & stored[step, 0].keys() for step in (0, 2, 3)]
    assert found == [{"image"}, {"image", "features"}, {"features"}]
    to_map, _ = find_encoder("fashion-judge", 4, 64, None).load(CPU)
    for position in range(8):
        sample, other = images[3, position], stored[3, position]
        assert "image" not in other
        expected = encode_to_grid(to_map, sample["image"][None], (4, 4))[0]
        torch.testing.assert_close(other["features"].float(), expected, rtol=1e-3, atol=1e-4)
        assert torch.equal(sample["x1"], other["x1"])


@pytest.mark.slow
def test_training_reads_images_until_stop_at_and_resumes_bit_for_bit(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    read: list[int] = []
    view = ImageSet.view
    monkeypatch.setattr(ImageSet, "view", lambda self, index, flip: (read.append(index), view(self, index, flip))[1])
    options: dict[str, Any] = {"training__objectives": aligned(stop_at=3), "training__checkpoint_every": 2}
    assert run(inputs, tmp_path / "whole", training__num_steps=4, **options) == 0
    assert len(read) == 3 * 4
    assert run(inputs, tmp_path / "parts", training__num_steps=2, **options) == 0
    assert run(inputs, tmp_path / "parts", training__num_steps=4, **options) == 0
    for name in ("model", "optimizer", "objectives", "objectives_ema_0.9"):
        whole, parts = (
            safetensors.torch.load_file(tmp_path / one / f"checkpoints/step_00000004/{name}.safetensors")
            for one in ("whole", "parts")
        )
        assert_identical(whole, parts)
        if name == "objectives":
            assert {key.rsplit(".", 2)[0] for key in whole} == {"alignment.projector"}

    # Features that were encoded before, of both mirror images, are those of the step but for fp16.
    read.clear()
    stored = options | {"training__objectives": aligned(stop_at=3, features="shards")}
    assert run(inputs, tmp_path / "stored", training__num_steps=4, **stored) == 0
    assert not read
    np.testing.assert_allclose(losses(tmp_path / "stored"), losses(tmp_path / "whole"), rtol=1e-4)
    assert losses(tmp_path / "stored")[:3] != losses(tmp_path / "whole")[:3]
    (features,) = (tmp_path / "cache").glob("features-*/")
    before = {file: file.stat().st_mtime_ns for file in features.iterdir()}
    open_data(inputs, **{"training.objectives": stored["training__objectives"]})
    assert before == {file: file.stat().st_mtime_ns for file in features.iterdir()}  # encoded once
    shutil.rmtree(features)
    monkeypatch.delattr(Encoder, "load")  # past stop_at nothing is loaded, and nothing encoded
    assert run(inputs, tmp_path / "stored", training__num_steps=5, **stored) == 0
    assert run(inputs, tmp_path / "whole", training__num_steps=5, **options) == 0
    assert not features.exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"encoder": "effnet-lite"}, r"alignment: encoder = 'effnet-lite' is not known.*Did you mean 'effnet-lite0'"),
        ({"encoder": "vit_base_patch14_dinov2"}, "weights' tag. Did you mean 'vit_base_patch14_dinov2.lvd142m'"),
        ({"encoder": "vit_base_patch14_dinov2.lvd142m", "side": 4}, "no features by place of images of side = 4 "),
        ({"encoder": "hiera_base_224.mae", "side": None}, "hiera_base_224.mae' has no features by place in timm; "),
        ({"tap": 3}, "alignment: tap 3 does not exist; expected 1 to 2"),
        ({"encoder_weights": "own.safetensors"}, "encoder_weights = 'own.safetensors': fashion-judge has its own; "),
        (
            {"encoder": "test_vit3.r160_in1k", "encoder_weights": "absent.safetensors"},
            "alignment: extractor weights: 'absent.safetensors' is not a file",
        ),
        ({"encoder": "vit_base_patch14_dinov2.lvd142m"}, "not downloadable .no network.; pass model.safetensors of .*"),
        (
            {"encoder": "vit_base_patch14_dinov2.lvd142m", "features": "shards"},
            "training.objectives.alignment: .* not downloadable .no network.; pass model.safetensors of .*",
        ),
    ],
)
def test_what_does_not_fit_is_refused_before_data_are_opened(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any], message: str
) -> None:
    def fail(*args: Any, **kwargs: Any) -> str:
        raise OSError("no network")

    monkeypatch.setattr(timm_space, "hf_hub_download", fail)
    with pytest.raises(UserError, match=message) as raised:
        run(inputs, tmp_path / "run", training__objectives=aligned(**options), data__path=str(tmp_path / "absent"))
    assert "\n" not in str(raised.value)


def test_the_dry_run_tells_what_alignment_costs_and_lacks(inputs: Path) -> None:
    chosen = aligned(side=None), aligned(features="shards")
    configs = [load_config(inputs, {"training.objectives": one}) for one in chosen]
    encoded, stored = (run_cost(config) for config in configs)
    width = 32
    products = 16 * (width * 16 + 16 * 16 + 16 * 768)  # of the projector, on 16 tokens
    assert stored.objective_flops == 3 * 2 * products
    of_scores = 2 * 768 * 10  # which the features do not need
    assert (
        encoded.objective_flops - stored.objective_flops
        == load_extractor("fashion-judge", "meta").flops(16) - of_scores
    )
    assert encoded.of_objectives == width * 16 + 16 + 16 * 16 + 16 + 16 * 768 + 768
    name = "vit_base_patch14_dinov2.lvd142m"
    lacks = missing(load_config(inputs, {"training.objectives": aligned(encoder=name)}))
    assert lacks == {f"timm/{name}/model.safetensors": "weights: will be downloaded on first use"}
    given = aligned(encoder=name, encoder_weights="absent.pth")
    assert "absent.pth" in missing(load_config(inputs, {"training.objectives": given}))
