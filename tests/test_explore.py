"""Exploring a generator: mixed and absent classes, images to begin with, sweeps, morphs, nearest training pictures."""

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from called import call_sample
from diffusers import FlowMatchEulerDiscreteScheduler, FlowMatchHeunDiscreteScheduler
from PIL import Image
from tiny import NAMES, tiny_pipeline, tiny_transformer
from torch.nn.functional import one_hot

import vit5gen
from vit5gen import SiTPipeline
from vit5gen.data.autoencoders.codec import decode, encode, to_uint8
from vit5gen.evaluation import load_extractor
from vit5gen.evaluation.nearest_images import nearest_pictures
from vit5gen.generation.find_pipeline import PIPELINE
from vit5gen.generation.scheduler import SAMPLERS
from vit5gen.system.errors import UserError

DRAWN: dict[str, Any] = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"}
FAST: dict[str, Any] = {"num_images": 3, "seed": 3, "sampler": "ode-euler", "num_inference_steps": 2}


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, pipe: SiTPipeline) -> Path:
    """Return a folder like that of a run: a pipeline, and the configuration that names 16 pictures of two classes."""
    folder, rng = tmp_path_factory.mktemp("explore") / "run", np.random.default_rng(0)
    for i in range(16):
        file = folder.parent / "data" / "train" / ("cat", "dog")[i % 2] / f"{i:02d}.png"
        file.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (16, 16, 3), dtype=np.uint8)).save(file)
    pipe.save_pretrained(folder / PIPELINE)
    data = {"source": "folder", "path": str(folder.parent / "data"), "resolution": 16, "num_classes": 2}
    config = {"data": data, "model": {"preset": "S/2"}, "evaluation": {"extractor": "effnet-lite0"}}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))
    return folder


def noise(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def pictures(count: int) -> torch.Tensor:
    return torch.randint(0, 256, (count, 3, 16, 16), dtype=torch.uint8, generator=noise(9))


# --- labels


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_weights_of_one_class_are_that_class_bit_for_bit(dtype: torch.dtype) -> None:
    model = tiny_transformer().to(dtype)
    x, t, ids = torch.randn(4, 4, 8, 8, generator=noise()), torch.rand(4, generator=noise()), torch.tensor([0, 3, 5, 2])
    rows, alone = one_hot(ids, 6).float(), model(x, t, ids)
    assert torch.equal(model(x, t, rows), alone)
    rows[1] = torch.tensor([0.25, 0, 0.75, 0, 0, 0])
    mixed = model(x, t, rows)
    assert torch.equal(mixed[[0, 2, 3]], alone[[0, 2, 3]])
    assert not torch.equal(mixed[1], alone[1])
    for width in (4, 7):
        with pytest.raises(UserError, match=rf"class_labels: {width} weights; expected one for each of the 5 classes"):
            model(x, t, torch.full((4, width), 1 / width))


def test_mixed_embeddings_are_the_weighted_mean() -> None:
    model = tiny_transformer()
    table = model.label_embed.weight.detach().clone()
    x, t = torch.randn(1, 4, 8, 8, generator=noise()), torch.tensor([0.3])
    mixed = model(x, t, torch.tensor([[0.5, 0, 0.25, 0, 0.25]]))
    with torch.no_grad():
        model.label_embed.weight[1] = 0.5 * table[0] + 0.25 * table[2] + 0.25 * table[4]
    torch.testing.assert_close(mixed, model(x, t, torch.tensor([1])))


@pytest.mark.parametrize("options", [{}, {"guidance_interval": (0.2, 0.7)}, {"autoguidance_scale": 1.5}])
def test_rows_of_weights_as_labels(pipe: SiTPipeline, options: dict[str, Any]) -> None:
    pipe = SiTPipeline(**pipe.components | {"guide": tiny_transformer(7, class_dropout_prob=0.0)}, id2label=NAMES)
    pipe.set_progress_bar_config(disable=True)
    rows = np.eye(5)[[4, 1]]
    want = pipe([4, 1], generator=noise(), num_images_per_label=2, **DRAWN, **options).images
    for given in (rows, rows.tolist(), torch.tensor(rows), [torch.tensor(row) for row in rows], np.eye(6)[[4, 1]]):
        found = pipe(given, generator=noise(), num_images_per_label=2, **DRAWN, **options).images
        assert torch.equal(found, want)
    rows[0] = 0.2
    mixed = pipe(rows, generator=noise(), num_images_per_label=2, **DRAWN, **options).images
    assert torch.equal(mixed[2:], want[2:])
    assert not torch.equal(mixed[:2], want[:2])


def test_no_class_is_the_null_label(pipe: SiTPipeline) -> None:
    plain = DRAWN | {"guidance_scale": 1.0}
    found = pipe(None, num_images_per_label=2, generator=noise(), **plain).images
    assert torch.equal(found, pipe([[0, 0, 0, 0, 0, 1]] * 2, generator=noise(), **plain).images)
    assert torch.allclose(found, pipe(None, num_images_per_label=2, generator=noise(), **DRAWN).images, atol=1e-5)
    assert not torch.equal(found, pipe([0, 0], generator=noise(), **plain).images)
    with pytest.raises(UserError, match=r"None: the model has no null label.*; give a class"):
        tiny_pipeline(class_dropout_prob=0.0)(None, **plain)
    guided = SiTPipeline(**pipe.components | {"guide": tiny_transformer(7, class_dropout_prob=0.0)})
    with pytest.raises(UserError, match="guide: has no null label"):
        guided(None, autoguidance_scale=2.0, **plain)


# --- images to begin with


@pytest.mark.parametrize("sampler", SAMPLERS.names())
def test_strength_goes_from_the_image_to_plain_sampling(pipe: SiTPipeline, sampler: str) -> None:
    images, options = pictures(2), DRAWN | {"sampler": sampler}
    plain = pipe([0, 3], generator=noise(), **options).images
    assert torch.equal(pipe([0, 3], generator=noise(), image=images, strength=1, **options).images, plain)
    near, far = (pipe([0, 3], generator=noise(), image=images, strength=s, **options).images for s in (0.1, 0.9))
    assert pipe.num_evaluations > 0
    latents = encode(pipe.vae, images)[0]
    assert torch.equal(pipe([0, 3], image=images, strength=0.0, **options).images, latents)
    assert pipe.num_evaluations == 0
    assert (near - latents).abs().mean() < (far - latents).abs().mean()


def test_an_image_starts_where_its_strength_says(pipe: SiTPipeline) -> None:
    images, seen = pictures(1), list[float]()
    x0 = torch.randn(2, 4, 8, 8, generator=noise())
    x = 0.4 * encode(pipe.vae, images)[0] + 0.6 * x0
    for t in (0.4, 0.7):  # two Euler steps by hand
        x = x + 0.3 * pipe.transformer(x, torch.tensor([t]), torch.tensor([0, 3]))

    def callback(_: SiTPipeline, step: int, t: float, given: dict[str, Any]) -> dict[str, Any]:
        seen.append(t)
        return given

    options = {"num_inference_steps": 2, "sampler": "ode-euler", "output_type": "latent"}
    drawn = pipe([0, 3], latents=x0, image=images, strength=0.6, callback_on_step_end=callback, **options).images
    torch.testing.assert_close(drawn, x.detach())
    assert seen == pytest.approx([0.7, 1.0])


def test_strength_zero_is_the_round_trip_of_the_autoencoder(pipe: SiTPipeline) -> None:
    images = pictures(2)
    want = to_uint8(decode(pipe.vae, encode(pipe.vae, images)[0]))
    assert torch.equal(pipe([0, 1], image=images, strength=0, output_type="uint8").images, want)


def test_every_kind_of_image_gives_the_same(pipe: SiTPipeline) -> None:
    tensor = pictures(2)
    arrays = tensor.permute(0, 2, 3, 1).numpy()
    picture = [Image.fromarray(one) for one in arrays]
    want = pipe([0, 3], generator=noise(), image=tensor, **DRAWN).images
    for given in (arrays, picture, list(arrays), list(tensor), tensor.double() / 255):
        found = pipe([0, 3], generator=noise(), image=given, **DRAWN).images
        torch.testing.assert_close(found, want, rtol=0, atol=1e-5)
    assert torch.equal(want, pipe([0, 3], generator=noise(), image=tensor, strength=0.8, **DRAWN).images)
    several = pipe([0, 3], generator=noise(), image=picture[0], num_images_per_label=2, **DRAWN).images
    assert several.shape == (4, 4, 8, 8)
    larger = Image.new("RGBA", (90, 64))  # scaled and cut; what is transparent is white
    white = torch.full((1, 3, 16, 16), 255, dtype=torch.uint8)
    images = [pipe(0, generator=noise(), image=given, **DRAWN).images for given in (larger, white)]
    assert torch.equal(*images)
    assert pipe(0, image=Image.new("RGB", (50, 50)), height=24, width=16, **DRAWN).images.shape == (1, 4, 12, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"strength": 0.5}, "strength = 0.5 has no effect without an image; give image, or omit strength"),
        ({"image": pictures(1), "strength": 1.5}, "strength = 1.5; expected a number from 0"),
        ({"image": pictures(1), "strength": float("nan")}, "strength = nan; expected"),
        ({"image": pictures(1), "strength": True}, "strength = True; expected"),
        ({"image": pictures(3)}, "image: 3 images; expected one, or one for each of the 2 labels"),
        ({"image": pictures(1)[..., :8]}, r"image: shape \(1, 3, 16, 8\); expected 16x16 pixels, a tensor"),
        ({"image": pictures(1), "height": 32}, r"shape \(1, 3, 16, 16\); expected 16x32 pixels"),
        ({"image": pictures(1).long()}, "values of torch.int64; expected uint8, or floats in"),
        ({"image": pictures(1).float()}, "values of torch.float32; expected uint8, or floats in"),
        ({"image": np.full((16, 16, 3), np.nan)}, "values of torch.float64"),
        ({"image": np.zeros((16, 16))}, "image: ndarray; expected a picture of PIL"),
        ({"image": "cat.png"}, "image: str; expected a picture of PIL"),
        ({"image": []}, "image: empty"),
        ({"image": Image.new("F", (16, 16), 9)}, r"image does not decode \(mode F with values from 9 to 9; .*to RGB"),
        ({"image": pictures(1), "strength": 0.02, "sampler": "sde-euler"}, "t = 0.98, but the steps .* end at 0.96"),
    ],
)
def test_images_that_cannot_be_begun_with(pipe: SiTPipeline, options: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe([0, 3], **DRAWN, **options)


def test_images_with_schedulers_of_diffusers(pipe: SiTPipeline) -> None:
    ours = pipe([0, 3], generator=noise(), image=pictures(2), strength=0.4, sampler="ode-euler", **DRAWN).images
    theirs = SiTPipeline(pipe.transformer, FlowMatchEulerDiscreteScheduler(), pipe.vae)
    found = theirs([0, 3], generator=noise(), image=pictures(2), strength=0.4, **DRAWN).images
    torch.testing.assert_close(found, ours, rtol=1e-4, atol=1e-4)
    theirs.scheduler = FlowMatchHeunDiscreteScheduler()
    with pytest.raises(UserError, match=r"strength: FlowMatchHeunDiscreteScheduler has times of its own .* at t = 0.6"):
        theirs([0, 3], image=pictures(2), strength=0.4, **DRAWN)
    theirs([0, 3], image=pictures(2), strength=0, **DRAWN)  # without a step
    with pytest.raises(UserError, match="image needs an autoencoder"):
        SiTPipeline(pipe.transformer, pipe.scheduler)(0, image=pictures(1), output_type="latent")


# --- where a pipeline lies


def test_from_pretrained_takes_a_run_and_a_generator_that_ships(run: Path, pipe: SiTPipeline, tmp_path: Path) -> None:
    for folder in (run, str(run), run / PIPELINE):
        again = SiTPipeline.from_pretrained(folder)
        assert torch.equal(again(0, generator=noise(), **DRAWN).images, pipe(0, generator=noise(), **DRAWN).images)
    names = SiTPipeline.from_pretrained("emoji-64").config.id2label
    assert names == SiTPipeline.from_pretrained(vit5gen.shipped("emoji-64")).config.id2label
    with pytest.raises(UserError, match="neither a run nor a pipeline folder"):
        SiTPipeline.from_pretrained(tmp_path)
    for name in ("config.yaml", "data.json"):
        (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match="this run has no pipeline/ yet; it is written when"):
        SiTPipeline.from_pretrained(tmp_path)


# --- the command


def test_sweeps_draw_equal_noise_with_each_value(run: Path, tmp_path: Path) -> None:
    sheet = tmp_path / "sweep.png"
    call_sample(run, sheet, **FAST, classes=[0, 3], sweep=["guidance_scale=1,2.5", "num-inference-steps=1,2"])
    card = json.loads((tmp_path / "sweep.png.card.json").read_text())
    assert card["settings"]["sweep"] == {"guidance_scale": [1.0, 2.5], "num_inference_steps": [1, 2]}
    assert card["network_evaluations"]["total"] == 3 * (1 + 2 + 2 + 4)
    cells = cells_of(sheet, 2, 2)

    # Each cell is what the command draws with these settings.
    for place, (steps, scale) in enumerate([(1, 1.0), (1, 2.5), (2, 1.0), (2, 2.5)]):
        options = FAST | {"num_inference_steps": steps, "guidance_scale": scale, "classes": [0, 3]}
        call_sample(run, tmp_path / f"{place}.npz", **options)
        images = np.load(tmp_path / f"{place}.npz")["arr_0"]
        assert all(shows(cells[place], image) for image in images)
    before = sheet.read_bytes()
    call_sample(run, sheet, **FAST, classes=[0, 3], sweep=["guidance_scale=1,2.5", "num-inference-steps=1,2"])
    assert sheet.read_bytes() == before
    with pytest.raises(UserError, match=r"sweep is .* in the card"):
        call_sample(run, sheet, **FAST, classes=[0, 3], sweep=["guidance_scale=1,3"])


def cells_of(file: Path, rows: int, columns: int) -> list[np.ndarray]:
    """Return the cells of a sheet, which are square and end at its right and lower edge, row by row."""
    pixels = np.asarray(Image.open(file))
    side = (pixels.shape[0] - 44) // rows
    tops, lefts = ([pixels.shape[i] - (n - k) * side for k in range(n)] for i, n in enumerate((rows, columns)))
    return [pixels[y : y + side, x : x + side] for y in tops for x in lefts]


def shows(pixels: np.ndarray, image: np.ndarray) -> bool:
    """Tell whether an image, enlarged, is somewhere in these pixels."""
    large = image.repeat(6, 0).repeat(6, 1)
    h, w = large.shape[:2]
    corners = np.argwhere((pixels[: -h + 1, : -w + 1] == large[0, 0]).all(-1))
    return any(np.array_equal(pixels[y : y + h, x : x + w], large) for y, x in corners)


def test_a_sweep_of_one_option_has_a_row_for_each_image(run: Path, tmp_path: Path) -> None:
    call_sample(run, tmp_path / "seeds.png", **FAST, sweep=["seed=3,4"])
    call_sample(run, tmp_path / "three.npz", **FAST)
    pixels = np.asarray(Image.open(tmp_path / "seeds.png"))
    assert all(shows(pixels, image) for image in np.load(tmp_path / "three.npz")["arr_0"])
    call_sample(run, tmp_path / "limits.png", **FAST, guidance_scale=2, sweep=["guidance_interval=[0,1],[0.5,1]"])


@pytest.mark.parametrize(
    "options",
    [
        {"guide": True, "sweep": ["autoguidance_scale=1,2"]},
        {"guide": True, "autoguidance_scale": 2, "sweep": ["guidance_interval=[0,1],[0.5,1]"]},
        {"guidance_interval": [0.2, 0.8], "sweep": ["guidance_scale=1,2"]},
    ],
)
def test_a_scale_that_is_swept_is_not_off(run: Path, tmp_path: Path, options: dict[str, Any]) -> None:
    options |= {"guide": str(run)} if "guide" in options else {}
    call_sample(run, tmp_path / "out.png", **FAST, **options)
    with pytest.raises(UserError, match="has no effect at"):
        call_sample(run, tmp_path / "x.png", **FAST, **options | {"autoguidance_scale": 1, "sweep": ["seed=1,2"]})


def test_morphs_go_from_one_class_to_the_other(run: Path, tmp_path: Path) -> None:
    one = FAST | {"num_images": 2}
    call_sample(run, tmp_path / "morph.gif", **one, morph=["0", "none"], frames=3)
    call_sample(run, tmp_path / "morph.png", **one, morph=["0", "none"], frames=3)
    film, strip = Image.open(tmp_path / "morph.gif"), np.asarray(Image.open(tmp_path / "morph.png"))
    assert film.n_frames == 3
    assert json.loads(film.info["comment"])["frames"] == 3
    assert (tmp_path / "morph.gif.card.json").is_file()
    for place, given in enumerate(("0", "0=0.5,none=0.5", "none")):
        call_sample(run, tmp_path / f"{place}.npz", **one, classes=[given])
        film.seek(place)
        frame = np.asarray(film.convert("RGB")).astype(int)
        for i, image in enumerate(np.load(tmp_path / f"{place}.npz")["arr_0"]):
            assert shows(strip, image)
            shown = frame[:96, 100 * i : 100 * i + 96]
            assert np.abs(shown - image.repeat(6, 0).repeat(6, 1)).mean() < 16  # a film has 256 colours


def test_classes_may_be_mixed_or_absent(run: Path, tmp_path: Path, pipe: SiTPipeline) -> None:
    call_sample(run, tmp_path / "out.npz", **FAST, classes=["none", "crane=0.5,7=0.5", "retriever"])
    card = json.loads((tmp_path / "out.card.json").read_text())
    assert card["class_names"] == {"5": "none", "6": "crane=0.5,7=0.5", "0": NAMES[0]}
    assert card["settings"]["mixtures"] == ["none", "crane=0.5,7=0.5"]
    with np.load(tmp_path / "out.npz") as file:
        assert sorted(file["arr_1"].tolist()) == [0, 5, 6]
        images = dict(zip(file["arr_1"].tolist(), file["arr_0"], strict=True))
        order = file["arr_1"].tolist()
    from vit5gen.generation.many import image_generator

    rows = {0: [1, 0, 0, 0, 0, 0], 5: [0, 0, 0, 0, 0, 1], 6: [0, 0.5, 0, 0.5, 0, 0]}  # "crane" is 1: case counts
    settings = {"sampler": "ode-euler", "num_inference_steps": 2, "output_type": "uint8"}
    drawn = pipe([rows[i] for i in order], generator=[image_generator(3, i) for i in range(3)], **settings).images
    for label, image in zip(order, drawn, strict=True):
        assert np.array_equal(images[label], image.permute(1, 2, 0).numpy())


def test_an_image_to_begin_with(run: Path, tmp_path: Path) -> None:
    Image.fromarray(pictures(1)[0].permute(1, 2, 0).numpy()).save(tmp_path / "in.png")
    call_sample(run, tmp_path / "out.npz", **FAST, image=tmp_path / "in.png", strength=0.0)
    first, *others = np.load(tmp_path / "out.npz")["arr_0"]
    assert all(np.array_equal(first, other) for other in others)
    assert json.loads((tmp_path / "out.card.json").read_text())["settings"]["strength"] == 0
    call_sample(run, tmp_path / "s.png", **FAST, image=tmp_path / "in.png", sweep=["strength=0,1"])
    assert shows(np.asarray(Image.open(tmp_path / "s.png")), first)
    with pytest.raises(UserError, match=r"no.png: no such file"):
        call_sample(run, tmp_path / "x.png", **FAST, image=tmp_path / "no.png")
    with pytest.raises(UserError, match=r"config.yaml does not decode"):
        call_sample(run, tmp_path / "x.png", **FAST, image=run / "config.yaml")
    Image.new("F", (16, 16), 9).save(tmp_path / "f.tif")
    with pytest.raises(UserError, match=r"image does not decode \(mode F with values from 9 to 9"):
        call_sample(run, tmp_path / "x.png", **FAST, image=tmp_path / "f.tif")
    assert not (tmp_path / ".x.png.part").exists()


def test_nearest_pictures_are_those_of_least_distance() -> None:
    extractor = load_extractor("effnet-lite0")
    images = torch.randint(0, 256, (12, 3, 32, 32), dtype=torch.uint8, generator=noise(1))
    samples = torch.cat([images[[7, 2]], pictures(1).repeat(1, 1, 2, 2)])
    found = nearest_pictures(samples, [(0, images[:5]), (5, images[5:])], extractor)
    assert [one.index for one in found[:2]] == [7, 2]
    assert max(one.distance for one in found[:2]) < 1e-3 < found[2].distance
    for one in found:
        assert torch.equal(one.picture, images[one.index])
    features = extractor(images).pooled.double(), extractor(samples).pooled.double()
    assert [one.index for one in found] == torch.cdist(features[1], features[0]).argmin(1).tolist()


def test_nearest_training_pictures_stand_below(run: Path, tmp_path: Path) -> None:
    call_sample(run, tmp_path / "near.png", **FAST, nearest=True)
    card, pixels = json.loads((tmp_path / "near.png.card.json").read_text()), Image.open(tmp_path / "near.png")
    files = sorted((run.parent / "data/train").rglob("*.png"))
    assert len(card["nearest"]) == 3
    for one in card["nearest"]:
        assert shows(np.asarray(pixels), np.asarray(Image.open(files[one["training_image"]])))
    call_sample(run, tmp_path / "near.png", **FAST, nearest=True)  # already finished
    with pytest.raises(UserError, match=r"nearest is .* in the card, None now"):
        call_sample(run, tmp_path / "near.png", **FAST)
    with pytest.raises(UserError, match="--nearest: emoji-64 is not the folder of a run"):
        call_sample(Path("emoji-64"), tmp_path / "x.png", **FAST, nearest=True)
    lost = shutil.copytree(run, tmp_path / "lost")
    config = (lost / "config.yaml").read_text()
    (lost / "config.yaml").write_text(config.replace(str(run.parent / "data"), "gone"))
    with pytest.raises(UserError, match=r"--nearest: no training images of .*lost: data.path gone"):
        call_sample(lost, tmp_path / "x.png", **FAST, nearest=True)
    assert not (tmp_path / ".x.png.part").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sweep": ["guidance_scal=1,2"]}, "--sweep: 'guidance_scal' is not known.*Did you mean 'guidance_scale'"),
        ({"sweep": ["guidance_scale=1,x"]}, "--sweep: --guidance-scale = 'x': set it to a valid number"),
        ({"sweep": ["num_inference_steps=0"]}, "--sweep: --num-inference-steps = 0: set it to a number greater"),
        ({"sweep": ["sampler=ode-heun,ode-hein"]}, "'ode-hein' is not known.*Did you mean 'ode-heun'"),
        ({"sweep": ["guidance_interval=[0.5,1]"]}, "--guidance-interval: has no effect at guidance_scale = 1"),
        ({"sweep": ["guidance_interval=[1,0.5]"], "guidance_scale": 2}, "set it to the start, then the end"),
        ({"sweep": ["guidance_scale="]}, "--sweep: --guidance-scale = '': set it to a valid number"),
        ({"sweep": ["guidance_interval=[0,1"]}, "not valid YAML"),
        ({"sweep": ["seed=1", "seed=2"]}, "expected one option, or two different ones"),
        ({"sweep": ["seed=1", "sampler=ode-heun", "guidance_scale=1"]}, "expected one option, or two different ones"),
        ({"sweep": ["strength=0,1"]}, "--strength has no effect without --image"),
        ({"sweep": ["seed=1,2"], "output": "out.npz"}, "a sheet of images is one picture; expected FILE.png$"),
        ({"sweep": ["seed=1,2"], "num_images": 2000}, "4000 images are too many for one picture"),
        ({"sweep": ["seed=1,2"], "morph": ["0", "1"]}, "--morph has no effect with --sweep; omit it"),
        ({"sweep": ["seed=1,2"], "nearest": True}, "--nearest has no effect with --sweep; omit it"),
        ({"sweep": ["autoguidance_scale=1,2"]}, "autoguidance_scale = 2.0 needs a second transformer; set --guide"),
        ({"morph": ["0"]}, "--morph: 1 classes; expected two"),
        ({"morph": ["0", "retriever"]}, "--morph: both are the class 'golden retriever, retriever'; give two"),
        ({"morph": ["0", "1"], "output": "out"}, "expected FILE.png or FILE.gif"),
        ({"morph": ["0", "1"], "classes": ["0"]}, "--class has no effect with --morph; omit it"),
        ({"frames": 4}, "--frames has no effect without --morph; omit it"),
        ({"strength": 0.4}, "--strength has no effect without --image; omit it"),
        ({"nearest": True, "output": "out.npz"}, "--nearest: .*expected --output FILE.png, not"),
        ({"output": "out.gif"}, "unknown format; expected FILE.npz, FILE.png or a folder"),
        ({"classes": ["0=0.5,1=0.6"]}, "class '0=0.5,1=0.6': its weights sum to 1.1; expected 1"),
        ({"classes": ["0=0.5,1=x"]}, "class '0=0.5,1=x': could not convert string to float: 'x'; expected e.g. cat"),
        ({"classes": ["0=0.5,cat=0.5"]}, "class 'cat' does not exist"),
        (
            {"classes": ["0==1"]},
            "^class '0==1': class '0=' does not exist; expected one of",
        ),
        ({"classes": ["0=1.5,1=-0.5"]}, "has the weight -0.5; expected finite numbers"),
    ],
)
def test_options_that_make_no_sense(run: Path, tmp_path: Path, options: dict[str, Any], message: str) -> None:
    output = tmp_path / str(options.get("output", "out.png"))
    with pytest.raises(UserError, match=message):
        call_sample(run, output, **FAST | {key: value for key, value in options.items() if key != "output"})
    assert not list(tmp_path.iterdir())
