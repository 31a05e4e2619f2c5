"""examples/segment.py: its decoder, its measure, its data, and trainings that are killed and shared."""

import colorsys
import hashlib
import json
import re
import signal
import subprocess
import sys
import time
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from launch import environment, free_ports
from PIL import Image, ImageDraw
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from test_models_parity import read_oracle, relative
from tiny_run import forget_processes
from torch import Tensor, nn

from vit5gen.models import ViT5
from vit5gen.system.errors import UserError

ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT / "examples"), str(ROOT / "scripts")]
import overlays  # noqa: E402
import pairs  # noqa: E402
import scenes  # noqa: E402
import segment  # noqa: E402
import segment_study  # noqa: E402

TINY = ["--sizes", "32", "2", "2", "8", "--crop", "32", "--channels", "8", "--batch-size", "2", "--num-steps", "4"]
TINY += ["--every", "2", "--warmup", "1", "--rate", "1e-3", "--precision", "fp32"]


def randomise(module: nn.Module) -> nn.Module:
    """Draw weights and the statistics of norms, so that no part of a head could be left out unseen."""
    generator = torch.Generator().manual_seed(0)
    for name, value in module.state_dict().items():
        if value.is_floating_point():
            value.normal_(1.0 if "var" in name else 0.0, 0.1, generator=generator).abs_()
    return module.eval()


def features(width: int, *sides: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(2, width, side, side + 1, generator=generator) for side in sides]


def test_the_decoder_and_the_auxiliary_head_equal_those_of_transformers() -> None:
    upernet = pytest.importorskip("transformers.models.upernet.modeling_upernet")
    from transformers import UperNetConfig

    heads = {"hidden_size": 16, "auxiliary_channels": 8, "auxiliary_num_convs": 1, "num_labels": 5}
    config = UperNetConfig(**heads)
    ours = randomise(segment.Segmenter(ViT5(32, 8, embed_dim=24, depth=2, num_heads=2), 16, 5))
    theirs = upernet.UperNetHead(config, [24] * 4).eval()
    auxiliary = upernet.UperNetFCNHead(config, [24] * 4).eval()

    def renamed(state: dict[str, Tensor], names: dict[str, str]) -> dict[str, Tensor]:
        for pattern, replacement in names.items():
            state = {re.sub(pattern, replacement, key): value for key, value in state.items()}
        return state

    names = {r"^pools\.": "psp_modules.", r"^laterals": "lateral_convs", r"^outputs": "fpn_convs"}
    names |= {r"^join": "fpn_bottleneck", r"^classify\.1": "classifier"}
    parts = {r"\.0\.(weight)$": r".conv.\1", r"\.1\.(\w+)$": r".batch_norm.\1"}
    theirs.load_state_dict(renamed(ours.head.state_dict(), names | parts))
    auxiliary.load_state_dict(renamed(ours.auxiliary.state_dict(), {r"^1\.1": "classifier", r"^0": "convs.0"} | parts))
    levels = features(24, 16, 8, 4, 2)
    with torch.inference_mode():
        assert relative(ours.head(levels), theirs(levels)) < 1e-5
        assert relative(ours.auxiliary(levels[2]), auxiliary(levels)) < 1e-5


def test_every_parameter_gets_a_gradient_and_the_levels_have_four_scales() -> None:
    torch.manual_seed(0)
    model = segment.Segmenter(ViT5(32, 8, embed_dim=24, depth=3, num_heads=2), 16, 5)
    seen: list[tuple[int, ...]] = []
    model.head.register_forward_pre_hook(lambda _, inputs: seen.extend(tuple(x.shape[2:]) for x in inputs[0]))
    logits, auxiliary = model(torch.randint(0, 256, (2, 3, 32, 48), dtype=torch.uint8))
    assert seen == [(16, 24), (8, 12), (4, 6), (2, 3)]
    assert logits.shape == (2, 5, 16, 24)
    assert auxiliary.shape == (2, 5, 4, 6)
    (logits.square().mean() + auxiliary.square().mean()).backward()
    assert all(parameter.grad is not None and parameter.grad.any() for parameter in model.parameters())


@pytest.mark.parametrize(("depth", "after"), [(12, [3, 5, 7, 11]), (24, [7, 11, 15, 23]), (4, [0, 1, 1, 3])])
def test_features_are_taken_where_the_recipe_says(depth: int, after: list[int]) -> None:
    with torch.device("meta"):
        model = segment.Segmenter(ViT5(32, embed_dim=32, depth=depth, num_heads=2), 8, 3)
    assert model.blocks == after


def test_mean_iou_of_a_matrix_made_by_hand() -> None:
    truth = torch.tensor([[0, 0, 1], [1, 1, 255]], dtype=torch.uint8)
    matrix = segment.confusion(torch.tensor([[0, 1, 1], [1, 2, 2]]), truth, 4)
    assert matrix.dtype == torch.int64
    assert matrix.tolist() == [[1, 1, 0, 0], [0, 2, 1, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert segment.class_iou(matrix) == [1 / 2, 2 / 4, 0.0, None]  # the last is neither there nor predicted
    assert segment.mean_iou(matrix) == pytest.approx(1 / 3)


def test_ignored_pixels_never_count() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 3, 8, 8, generator=generator).requires_grad_()
    mask = torch.randint(0, 3, (2, 8, 8), generator=generator)
    mask[:, :4] = segment.IGNORED
    loss = segment.cross_entropy(logits, mask)
    assert loss.item() == pytest.approx(segment.cross_entropy(logits[:, :, 4:], mask[:, 4:]).item(), rel=1e-6)
    loss.backward()
    assert not logits.grad[:, :, :4].any()
    assert logits.grad[:, :, 4:].all()
    assert segment.cross_entropy(logits, torch.full_like(mask, segment.IGNORED)) == 0
    assert segment.confusion(mask[0], torch.full((8, 8), 255, dtype=torch.uint8), 3).sum() == 0


class Constant(nn.Module):
    """Answers every pixel with the same logits."""

    patch_size = 8
    logits = torch.tensor([0.1, -1.7, 3.3])

    def forward(self, images: Tensor) -> Tensor:
        return self.logits[None, :, None, None].expand(1, 3, *images.shape[2:])


class PixelWise(nn.Module):
    """Sees one pixel at a time: windows must change nothing."""

    patch_size = 8

    def forward(self, images: Tensor) -> Tensor:
        return images.double().sin().float()


@pytest.mark.parametrize(("height", "width"), [(32, 32), (57, 33), (20, 101)])
@pytest.mark.parametrize("stride", [0, 7, 21, 32])
def test_a_sliding_window_of_a_constant_model_is_exact(height: int, width: int, stride: int) -> None:
    image = torch.randint(0, 256, (3, height, width), dtype=torch.uint8)
    found = segment.logits_of(Constant(), image, 32, stride)
    assert torch.equal(found, Constant.logits[:, None, None].expand(3, height, width))
    assert torch.equal(segment.logits_of(PixelWise(), image, 32, stride), PixelWise()(image[None])[0])


class Sided(nn.Module):
    """Prefers class 0 in the left half strongly, and class 1 in the right half a little."""

    patch_size = 8

    def forward(self, images: Tensor) -> Tensor:
        left = torch.arange(images.shape[3]) < images.shape[3] // 2
        first = torch.where(left, 2.0, -1.0).expand(images.shape[2:])
        return torch.stack([first, torch.zeros_like(first)])[None]


def test_a_flip_averages_both_views_where_the_image_is() -> None:
    image = torch.randint(0, 256, (3, 31, 50), dtype=torch.uint8)
    options = Namespace(crop=31, stride=0, flip=False, precision="fp32", device=torch.device("cpu"))
    alone, sided = segment.predict(PixelWise(), options, image), segment.predict(Sided(), options, image)
    assert alone.shape == (31, 50)
    assert not sided[:, :20].any()
    assert sided[:, 30:].all()
    options.flip = True
    assert torch.equal(segment.predict(PixelWise(), options, image), alone)
    assert not segment.predict(Sided(), options, image)[:, 10:40].any()


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    """Stand-ins for emoji: drawing those takes long."""

    def load_emoji(side: int, split: str, alpha: bool) -> tuple[Tensor, Tensor]:
        assert alpha
        random = np.random.default_rng(split == "test")
        pictures = [Image.new("RGBA", (side, side)) for _ in range(36)]
        for picture in pictures:
            box = (int(random.integers(4, 20)), 6, 58, int(random.integers(30, 60)))
            ImageDraw.Draw(picture).ellipse(box, tuple(random.integers(0, 256, 3)), "black", 3)
        return torch.from_numpy(np.stack(pictures)).permute(0, 3, 1, 2), torch.arange(36) % 9

    scenes.sprites.cache_clear()
    monkeypatch.setattr(scenes, "load_emoji", load_emoji)
    monkeypatch.setattr(scenes, "COUNTS", {"training": 6, "validation": 3})


def test_a_scene_is_a_function_of_seed_split_and_index(drawn: None) -> None:
    def digest(scene: tuple[Tensor, Tensor]) -> str:
        return hashlib.sha256(b"".join(part.contiguous().numpy().tobytes() for part in scene)).hexdigest()

    first, again = scenes.Scenes("training", 48), scenes.Scenes("training", 48)
    digests = [digest(first[i]) for i in range(6)]
    assert digests == [digest(again[i]) for i in reversed(range(6))][::-1]
    others = [digest(scenes.Scenes("validation", 48)[0]), digest(scenes.Scenes("training", 48, seed=1)[0])]
    assert len({*digests, *others}) == 8
    # The same for ever: numpy keeps its streams.
    _, objects = scenes.Scenes("training", 48).layout(0)
    assert [(one.label, one.size, one.left, one.top) for one in objects] == LAYOUT


LAYOUT = [(6, 15, 32, 6), (9, 25, 11, -5), (5, 18, 29, 31), (6, 23, 2, -6), (4, 28, 5, -5), (3, 22, 1, 28)]


def test_masks_say_which_object_is_seen(drawn: None) -> None:
    """From the foremost object backwards, pixel by pixel: the first that is half opaque there has the pixel."""
    covered, data = 0, scenes.Scenes("training", 32)
    for index in range(3):
        image, mask = data[index]
        background, objects = data.layout(index)
        pictures = [np.asarray(scenes.draw("training", one)) for one in objects]
        for y in range(32):
            for x in range(32):
                owners, colour = [], background[y, x].astype(float)
                for one, picture in zip(objects, pictures, strict=True):
                    if 0 <= y - one.top < one.size and 0 <= x - one.left < one.size:
                        *rgb, alpha = picture[y - one.top, x - one.left].astype(float)
                        colour += (np.array(rgb) - colour) * alpha / 255
                        owners += [one.label] if alpha >= 128 else []
                assert int(mask[y, x]) == (owners[-1] if owners else 0)
                assert np.abs(image[:, y, x].numpy() - colour).max() <= len(objects)  # each is rounded
                covered += len(set(owners)) > 1
    assert covered > 20


def test_an_image_and_its_mask_stay_together(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pairs, "distort", lambda image: image)
    mask = torch.zeros(40, 60, dtype=torch.uint8)
    mask[10:30, 5:25], mask[20:38, 30:55] = 1, 2
    image = (60 * mask).expand(3, -1, -1).contiguous()
    ignored, flipped = 0, 0
    for seed in range(20):
        torch.manual_seed(seed)
        crop, labels = pairs.augment(image, mask, 64)
        assert crop.shape == (3, 64, 64)
        shown = labels != segment.IGNORED
        ignored += int((~shown).sum())
        assert all((crop[i][~shown] == pairs.GREY[i]).all() for i in range(3))
        wrong = (crop[0][shown].int() - 60 * labels[shown]).abs() > 30
        assert wrong.float().mean() < 0.05  # pixels at edges
        flipped += int((labels == 2).nonzero()[:, 1].float().mean() < (labels == 1).nonzero()[:, 1].float().mean())
    assert ignored
    assert 2 < flipped < 18


def test_a_crop_gets_distorted_colours(monkeypatch: pytest.MonkeyPatch) -> None:
    image, mask = torch.randint(0, 256, (3, 40, 60), dtype=torch.uint8), torch.zeros(40, 60, dtype=torch.uint8)
    crops = []
    for change in (lambda image: image, lambda image: 255 - image):
        monkeypatch.setattr(pairs, "distort", change)
        torch.manual_seed(0)
        crops.append(pairs.augment(image, mask, 32)[0])
    assert torch.equal(crops[1], 255 - crops[0])


def test_colours_are_distorted_as_in_the_recipe() -> None:
    """Brightness adds up to 32, contrast multiplies by 0.5 to 1.5, hue turns by up to 36 degrees, each in half."""
    torch.manual_seed(0)
    grey = torch.full((3, 1, 1), 100, dtype=torch.uint8)
    levels = [int(pairs.distort(grey)[0]) for _ in range(2000)]  # which neither saturation nor hue changes
    assert min(levels) < 40
    assert 190 < max(levels) <= 198  # (100 + 32) * 1.5
    same = sum(abs(level - 100) <= 1 for level in levels) / 2000  # neither brightness nor contrast; saturation rounds
    assert 0.22 < same < 0.32
    red = torch.tensor([90, 30, 30], dtype=torch.uint8)[:, None, None]  # which nothing brings to 255
    hues = [colorsys.rgb_to_hsv(*(pairs.distort(red).flatten() / 255).tolist())[0] for _ in range(2000)]
    turned = [360 * min(hue, 1 - hue) for hue in hues]
    assert 33 < max(turned) < 38
    assert 0.4 < sum(turn > 1 for turn in turned) / 2000 < 0.55


def test_a_crop_of_nearly_one_class_is_drawn_again() -> None:
    mask = torch.zeros(64, 256, dtype=torch.uint8)
    mask[:, :128] = 1
    fine = []
    for seed in range(60):
        torch.manual_seed(seed)
        _, labels = pairs.augment(torch.zeros(3, 64, 256, dtype=torch.uint8), mask, 32)
        counts = labels[labels != segment.IGNORED].bincount(minlength=2)
        fine.append(bool(counts.max() <= 0.75 * counts.sum()))
    assert np.mean(fine) > 0.7  # where both classes suffice 0.53


def write_pairs(root: Path, names: str = "classes.txt", shift: int = 0) -> Path:
    """Write a few images of one or two coloured boxes, with masks of three classes and some ignored pixels."""
    random = np.random.default_rng(0)
    for split, count in (("training", 4), ("validation", 3)):
        for i in range(count):
            mask = np.zeros((40, 36 + 5 * i), np.uint8)
            mask[5:25, 4:20], mask[18:36, 12:30], mask[:2] = 1, 2, 255
            image = random.integers(0, 60, (*mask.shape, 3)) + 90 * np.where(mask == 255, 0, mask)[..., None]
            for part, array in (("images", image), ("annotations", np.where(mask == 255, 255, mask + shift))):
                (root / part / split).mkdir(parents=True, exist_ok=True)
                Image.fromarray(array.astype(np.uint8)).save(root / part / split / f"{i}.png")
    header = "Idx\tRatio\tTrain\tVal\tStuff\tName\n"
    lines = ["wall", "building, edifice", "sky"]
    table = header + "".join(f"{i}\t0.1\t1\t1\t1\t{name}\n" for i, name in enumerate(lines, 1))
    (root / names).write_text(table if shift else "\n".join(lines) + "\n")
    return root


def test_ade20k_begins_at_one_and_zero_is_no_class(tmp_path: Path) -> None:
    plain = pairs.Folder(write_pairs(tmp_path / "plain"), "training")
    ade20k = pairs.Folder(write_pairs(tmp_path / "ade20k", "objectInfo150.txt", shift=1), "training")
    assert plain.names == ade20k.names == ["wall", "building, edifice", "sky"]
    assert all(torch.equal(a[1], b[1]) and torch.equal(a[0], b[0]) for a, b in zip(plain, ade20k, strict=False))
    (path,) = (tmp_path / "ade20k/annotations/training").glob("0.png")
    Image.fromarray(np.zeros((40, 36), np.uint8)).save(path)
    assert (ade20k[0][1] == segment.IGNORED).all()


def test_the_published_layout_loads_with_every_key_accounted_for(tmp_path: Path) -> None:
    _, _, state = read_oracle("vit5_tiny")
    torch.save({"model": state}, tmp_path / "published.pth")
    patch = state["patch_embed.proj.weight"].shape[-1]
    crop = 2 * patch * int(state["pos_embed"].shape[1] ** 0.5)
    options = Namespace(classifier=tmp_path / "published.pth", sizes=None, crop=crop, drop_path=0.0, channels=8)
    model, facts = segment.start(options, ["a", "b"])
    own = {key.removeprefix("backbone."): value for key, value in model.state_dict().items() if "backbone." in key}
    left = {key for key in state if key not in own}
    assert own.keys() <= state.keys()
    assert all(re.match(r"head\.|norm\.|blocks\.\d+\.attn\.rope(_reg)?\.freqs", key) for key in left), left
    assert [key for key in own if not torch.equal(own[key], state[key])] == ["pos_embed"]
    assert own["pos_embed"].shape[1] == 4 * state["pos_embed"].shape[1]
    assert facts["backbone"]["img_size"] == crop


def run(*arguments: str | Path) -> None:
    forget_processes()
    segment.main([str(argument) for argument in arguments])


def other_classes(file: Path, folder: Path) -> list[str | Path]:
    """Write a segmenter of classes by other names; return the option that measures it."""
    with safe_open(file, "pt") as opened:
        facts = json.loads(opened.metadata()["segmenter"])
    facts["names"] = [name.upper() for name in facts["names"]]
    save_file(load_file(file), folder / "other.safetensors", {"segmenter": json.dumps(facts)})
    return ["--weights", folder / "other.safetensors"]


def read_card(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "card.json").read_text())


def test_the_step_is_that_of_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The auxiliary head's loss counts 0.4; rates warm up, then fall linearly to zero; norms and positions keep all."""
    models: list[nn.Module] = []
    steps: list[list[tuple[float, float]]] = []
    undecayed: set[int] = set()

    class Noted(torch.optim.AdamW):
        def step(self, *given: Any, **named: Any) -> Any:
            steps.append([(group["lr"], group["weight_decay"]) for group in self.param_groups])
            for group in self.param_groups:
                undecayed.update(id(weight) for weight in group["params"] if group["weight_decay"] == 0)
            return super().step(*given, **named)

    def build(*given: Any) -> nn.Module:
        models.append(original(*given))
        return models[-1]

    def loss(logits: Tensor, mask: Tensor) -> Tensor:
        return 0 * logits.sum() + (1.0 if logits.shape[-1] == 16 else 10.0)  # the auxiliary head's are coarser

    original = segment.Segmenter
    monkeypatch.setattr(segment, "Segmenter", build)
    monkeypatch.setattr(segment, "cross_entropy", loss)
    monkeypatch.setattr(torch.optim, "AdamW", Noted)
    changes = ["--rate", "1e-3", "--warmup", "2", "--weight-decay", "0.03", "--num-steps", "5", "--every", "5"]
    run("--data", write_pairs(tmp_path / "data"), *TINY, *changes, "--output", tmp_path / "run")
    assert read_card(tmp_path / "run")["evaluations"][0]["loss"] == pytest.approx(1 + 0.4 * 10)
    assert [lr for (lr, _), _ in steps] == pytest.approx([0.5e-3, 0.8e-3, 0.6e-3, 0.4e-3, 0.2e-3])
    assert [lr for (lr, _), _ in steps] == [lr for _, (lr, _) in steps]
    assert {decay for groups in steps for _, decay in groups} == {0.0, 0.03}
    kept = {name for name, weight in models[0].named_parameters() if id(weight) in undecayed}
    tokens = {f"backbone.{name}" for name in ("cls_token", "pos_embed", "reg_token")}
    assert kept == tokens | {name for name, weight in models[0].named_parameters() if weight.ndim == 1}


def picture(path: Path) -> Path:
    pixels = np.random.default_rng(0).integers(0, 255, (40, 50, 3), dtype=np.uint8)
    path.parent.mkdir(exist_ok=True)
    Image.fromarray(pixels).save(path)
    return path


@pytest.mark.parametrize(
    ("names", "output", "message"),
    [
        (["a.png", "b.png"], "images", r"would write over .*images/a\.png, .*images/b\.png"),
        (["a.png"], "link", r"would write over .*link/a\.png"),
        (["a.jpg", "a.png"], "masks", r"several files would be a\.png, a\.overlay\.png"),
        (["a.jpg", "a.overlay.jpg"], "masks", r"several files would be a\.overlay\.png"),
        (["legend.jpg"], "masks", r"several files would be legend\.png"),
    ],
)
def test_pictures_of_masks_write_over_nothing(names: list[str], output: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("images")
    files = [picture(tmp_path / "images" / name) for name in names]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    for paths in (files, [tmp_path / "images"]):
        with pytest.raises(UserError, match=message):
            overlays.write_masks(paths, lambda image: image[0] // 128, ["one", "two"], tmp_path / output)
    assert before == {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}


def test_scenes_are_drawn_into_a_new_folder(drawn: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(scenes, "COUNTS", {"training": 8, "validation": 3})
    path = tmp_path / "new" / "scenes.png"
    monkeypatch.setattr(sys, "argv", ["scenes.py", "--output", str(path)])
    scenes.main()
    picture = Image.open(path)
    assert picture.size == (2 * 8 * 96, 2 * 2 * 96)
    assert "OpenMoji" in json.loads(picture.text["settings"])["attribution"]
    monkeypatch.setattr(sys, "argv", ["scenes.py", "--output", str(path / "below")])
    with pytest.raises(SystemExit) as ended:
        scenes.main()
    assert ended.value.code == 2


def test_train_measure_and_predict(drawn: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = ["--data", "scenes", *TINY, "--output", tmp_path / "run"]
    run(*command)
    card = read_card(tmp_path / "run")
    assert [one["step"] for one in card["evaluations"]] == [2, 4]
    assert card["evaluations"][-1]["miou"] == card["miou"]
    assert list(card["iou"]) == scenes.CLASSES
    assert {"settings", "commit", "command", "versions"} <= card.keys()
    assert "OpenMoji" in card["attribution"]
    matrix = np.loadtxt(tmp_path / "run/confusion.csv", dtype=np.int64, delimiter=",")
    assert matrix.sum() == card["pixels"] == 3 * 32 * 32

    # A finished run stays as it is; the file alone gives the same matrix; other settings are refused.
    before = {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    run(*command)
    assert before == {path: path.read_bytes() for path in (tmp_path / "run").rglob("*") if path.is_file()}
    weights = ["--weights", tmp_path / "run/segmenter.safetensors", "--precision", "fp32"]
    run(*weights, "--data", "scenes", "--output", tmp_path / "again")
    assert (tmp_path / "again/confusion.csv").read_bytes() == (tmp_path / "run/confusion.csv").read_bytes()
    # Its card has what was used, and nothing of a training that was not.
    settings = read_card(tmp_path / "again")["settings"]
    file = tmp_path / "run/segmenter.safetensors"
    assert settings.pop("weights_sha256") == hashlib.sha256(file.read_bytes()).hexdigest()
    used = {"data": "scenes", "weights": str(file), "crop": 32, "stride": 0, "flip": False, "precision": "fp32"}
    assert settings == used
    refusals = {
        "began with other seed": [*command, "--seed", "1"],
        "omit --batch-size, --crop": [*weights, "--crop", "32", "--batch-size", "2"],
        "omit --classifier": [*weights, "--classifier", file],
        "predicting needs no data": [*weights, "--data", "scenes", "--predict", file],
        "--data is not given, so that scenes are taken: its classes": [*other_classes(file, tmp_path)],
    }
    for message, words in refusals.items():
        with pytest.raises(SystemExit):
            run(*words, *([] if "--output" in words else ["--output", tmp_path / "refused"]))
        assert message in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()

    (tmp_path / "images").mkdir()
    image = scenes.Scenes("validation", 40)[0][0]
    Image.fromarray(image.permute(1, 2, 0).numpy()).resize((70, 50)).save(tmp_path / "images/a.jpg")
    run(*weights, "--predict", tmp_path / "images", "--output", tmp_path / "masks")
    assert sorted(path.name for path in (tmp_path / "masks").iterdir()) == ["a.overlay.png", "a.png", "legend.png"]
    mask = Image.open(tmp_path / "masks/a.png")
    assert (mask.mode, mask.size) == ("P", (70, 50))
    model, _ = segment.load(tmp_path / "run/segmenter.safetensors")
    options = Namespace(crop=32, stride=0, flip=False, precision="fp32", device=torch.device("cpu"))
    found = segment.predict(model, options, pairs.read_rgb(tmp_path / "images/a.jpg"))
    assert np.array_equal(np.asarray(mask), found.numpy())


def test_the_study_keeps_finished_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trained: list[tuple[str, int]] = []

    def train(start: str, seed: int, arguments: Namespace) -> dict[str, Any]:
        if len(trained) == 3:
            raise KeyboardInterrupt
        trained.append((start, seed))
        measured = {"evaluations": [{"step": 5, "miou": 0.25 + seed / 8}], "iou": {"flags": 0.5, "food": None}}
        return segment_study.plan(start, seed, arguments) | measured

    monkeypatch.setattr(segment_study, "train", train)
    (file := tmp_path / "classifier").write_text("one")
    monkeypatch.setattr(
        sys, "argv", ["study", "--classifier", str(file), "--output", str(tmp_path), "--num-steps", "5"]
    )
    with pytest.raises(KeyboardInterrupt):
        segment_study.main()
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 3
    monkeypatch.setattr(segment_study, "train", lambda *given: trained.pop() and train(*given))
    segment_study.main()
    assert trained[-1] == ("classifier", 1)
    assert (tmp_path / "table.md").read_text().splitlines()[2:] == [
        "| 5 | 25.0% | 25.0% | 37.5% | 37.5% |",
        "| flags | 50.0% | 50.0% | 50.0% | 50.0% |",
        "| food |  |  |  |  |",
    ]
    assert Image.open(tmp_path / "miou.png").size == (720, 480)
    segment_study.main()  # nothing is left to train
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 4
    # Rows of other settings, or of another classifier, are kept, but are not those that are asked for.
    monkeypatch.setattr(segment_study, "train", train)
    for change in (lambda: monkeypatch.setitem(segment_study.SETTINGS, "rate", 1.0), lambda: file.write_text("two")):
        change()
        trained.clear()
        with pytest.raises(KeyboardInterrupt):
            segment_study.main()
        assert len(trained) == 3
    assert len((tmp_path / "rows.jsonl").read_text().splitlines()) == 10


@pytest.mark.parametrize("classes", [2, 10, 11, 150])
def test_colours_differ(classes: int) -> None:
    assert len({tuple(colour) for colour in overlays.colours(classes)}) == classes


def damage(root: Path, fault: str) -> list[str | Path]:
    """Write what is wrong into a folder of pairs; return the options that read it."""
    command: list[str | Path] = ["--data", root, *TINY, "--output", root / "run"]
    mask = root / "annotations/training/0.png"
    if fault == "size":
        Image.fromarray(np.zeros((40, 40), np.uint8)).save(mask)
    elif fault == "colour":
        Image.fromarray(np.zeros((40, 36, 3), np.uint8)).save(mask)
    elif fault == "value":
        Image.fromarray(np.full((40, 36), 3, np.uint8)).save(mask)
    elif fault == "missing":
        mask.unlink()
    elif fault == "empty":
        for path in (root / "images/validation").iterdir():
            path.unlink()
    elif fault == "names":
        (root / "classes.txt").unlink()
    elif fault == "broken":
        mask.write_bytes(mask.read_bytes()[:40])
    elif fault == "ignored":
        for path in (root / "annotations/validation").iterdir():
            Image.fromarray(np.full_like(np.asarray(Image.open(path)), 255)).save(path)
    elif fault == "width":
        torch.save(ViT5(32, 8, embed_dim=48, depth=2, num_heads=2).state_dict(), root / "wide.pth")
        command += ["--classifier", root / "wide.pth"]
    elif fault == "weights":
        torch.save({"a": torch.zeros(1)}, root / "other.pt")
        command = ["--weights", root / "other.pt", "--output", root / "run"]
    elif fault == "nothing":
        command = ["--data", root, "--output", root / "run"]
    elif fault == "batch":
        command += ["--batch-size", "1"]
    elif fault == "stride":
        command += ["--stride", "33"]
    elif fault.startswith("--"):
        command += fault.split()
    return command


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        ("size", r"0\.png: mask of shape \(40, 40\); expected .*\(40, 36\)"),
        ("colour", r"0\.png: mask of shape \(40, 36, 3\)"),
        ("value", r"0\.png: mask value 3 is no class; expected 0 to 2, or 255"),
        ("missing", r"images without masks; missing: .*0\.png"),
        ("empty", r"no pairs, for there are no images in .*validation"),
        ("names", r"has neither classes\.txt .* nor ADE20K's objectInfo150\.txt"),
        ("broken", r"0\.png does not decode"),
        ("ignored", r"every pixel of the validation masks is ignored"),
        ("width", r"--classifier .*: has .*'embed_dim': 48.*; expected .*'embed_dim': 32"),
        ("weights", r"--weights .*other\.pt: is no segmenter"),
        ("nothing", r"training needs --data and --classifier or --sizes"),
        ("batch", r"--batch-size 1: expected a multiple of 1, 2 or more"),
        ("stride", r"--stride = 33; expected .* at most 32"),
        ("--rate nan", r"--rate nan: expected"),
        ("--rate -1", r"--rate -1\.0: expected"),
        ("--weight-decay -1", r"--weight-decay -1\.0: expected"),
        ("--drop-path 2", r"--drop-path 2\.0: expected 0 to 1"),
        ("--drop-path inf", r"--drop-path inf: expected 0 to 1"),
    ],
)
def test_bad_input_is_one_line(fault: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command = damage(write_pairs(tmp_path), fault)
    with pytest.raises(SystemExit) as ended:
        run(*command)
    error = capsys.readouterr().err
    assert ended.value.code == 2
    assert re.search(message, error), error
    assert error.count("\n") == 1
    assert not list(tmp_path.glob("run/*.*"))


def launch(output: Path, *arguments: str | Path, world: int = 1) -> list[subprocess.Popen[str]]:
    """Start the script in its own process, or in several joined ones."""
    joined = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0]), "WORLD_SIZE": str(world)}
    command = [sys.executable, str(ROOT / "examples/segment.py"), *map(str, arguments), "--output", str(output)]
    started = []
    for rank in range(world):
        variables = {**joined, "RANK": str(rank), "LOCAL_RANK": str(rank)} if world > 1 else {}
        log = output.with_suffix(f".{rank}.txt").open("a")
        variables["ACCELERATE_USE_CPU"] = "true"
        started.append(subprocess.Popen(command, env=environment(**variables), stdout=log, stderr=log, text=True))
    return started


def finish(started: list[subprocess.Popen[str]]) -> None:
    codes = [process.wait(timeout=240) for process in started]
    assert codes == [0] * len(started)


@pytest.mark.slow
def test_a_killed_training_ends_as_an_undisturbed_one(tmp_path: Path) -> None:
    command = ["--data", write_pairs(tmp_path / "data"), *TINY, "--num-steps", "12", "--drop-path", "0.3"]
    finish(launch(tmp_path / "whole", *command))
    (process,) = launch(tmp_path / "killed", *command)
    while not list((tmp_path / "killed").glob("checkpoints/step_0000000[4-8]")):
        assert process.poll() is None, (tmp_path / "killed.0.txt").read_text()
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    process.wait()
    finish(launch(tmp_path / "killed", *command))
    assert "resuming from" in (tmp_path / "killed.0.txt").read_text()
    whole, killed = (load_file(tmp_path / name / "segmenter.safetensors") for name in ("whole", "killed"))
    assert all(torch.equal(whole[key], killed[key]) for key in whole | killed)
    assert read_card(tmp_path / "whole")["evaluations"] == read_card(tmp_path / "killed")["evaluations"]


@pytest.mark.slow
def test_two_processes_count_the_same_matrix_as_one(tmp_path: Path) -> None:
    data = ["--data", write_pairs(tmp_path / "data")]
    finish(launch(tmp_path / "run", *data, *TINY, "--batch-size", "4", world=2))
    for world in (1, 2):
        weights = ["--weights", tmp_path / "run/segmenter.safetensors", "--precision", "fp32"]
        finish(launch(tmp_path / f"by{world}", *data, *weights, "--stride", "16", "--flip", world=world))
    matrices = [(tmp_path / name / "confusion.csv").read_text() for name in ("by1", "by2")]
    assert matrices[0] == matrices[1]
    assert read_card(tmp_path / "run")["pixels"] == read_card(tmp_path / "by2")["pixels"] > 0


def test_the_study_on_the_page_is_that_of_its_rows() -> None:
    folder = ROOT / "docs" / "study" / "segmentation"
    table = segment_study.table([json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()])
    assert (folder / "table.md").read_text() == table
    assert table in (ROOT / "docs" / "study.md").read_text()
