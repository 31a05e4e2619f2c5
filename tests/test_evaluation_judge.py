"""The recognised share by hand, and the judges that ship: small, pinned, and as good as their cards say."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from called import call_sample
from PIL import Image
from test_evaluation_card import colours, pictures
from tiny import NAMES, tiny_pipeline

from vit5gen.config import DrawConfig
from vit5gen.data import load_emoji
from vit5gen.data.sources.emoji import CLASSES, EmojiSource
from vit5gen.data.sources.fashion_mnist import FashionMnistSource
from vit5gen.evaluation import load_extractor, register_extractor
from vit5gen.evaluation.evaluation_card import evaluation_card, open_samples
from vit5gen.evaluation.features import Extractor
from vit5gen.evaluation.reference import open_reference
from vit5gen.evaluation.samples import Samples, open_image_set
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256
from vit5gen.system.shipped import FOLDER

JUDGES = ("emoji-judge", "fashion-judge")
HELD_OUT = {"red": 1.0, "green": 0.0, "blue": 0.75, "four": 0.0, "five": 0.0}


@register_extractor("namer")
def namer(device: torch.device, weights: Path | None, weights_sha256: str | None) -> Extractor:
    """Name the largest of the first five mean colours of a grid."""
    return replace(colours(device, weights, weights_sha256), name="Namer", metric="FD-Namer", classes=HELD_OUT)


def bright(*named: int) -> torch.Tensor:
    """Return an image of 8 x 8 for each number, in which `namer` sees that class."""
    images = torch.zeros(len(named), 3, 2, 2, dtype=torch.uint8)
    images.flatten(1)[range(len(named)), list(named)] = 255
    return images.repeat_interleave(4, 2).repeat_interleave(4, 3)


def labelled(folder: Path, named: dict[str, list[int]]) -> Path:
    for label, numbers in named.items():
        (folder / label).mkdir(parents=True)
        for i, image in enumerate(bright(*numbers)):
            Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / label / f"{i}.png")
    return folder


@pytest.mark.parametrize("batch_size", [1, 4, 50])
def test_the_share_counts_every_class_the_same(batch_size: int, tmp_path: Path) -> None:
    extractor = load_extractor("namer")
    drawn = labelled(tmp_path / "drawn", {"red": [0, 0, 0, 1], "blue": [2, 0]})
    reference = open_reference(drawn, extractor, batch_size)
    card = evaluation_card([open_image_set(drawn, batch_size)], reference, extractor, ["recognised"])
    score = card["metrics"]["recognised-Namer"]
    assert score["value"] == (3 / 4 + 1 / 2) / 2
    assert score["classes"] == {"red": 3 / 4, "blue": 1 / 2}
    # Green is not drawn: how well it is recognised has no say.
    assert (score["held_out"], score["ratio"]) == ((1 + 3 / 4) / 2, (5 / 8) / (7 / 8))
    # The variance of a share is p (1 - p) / n; of the mean of two, a quarter of their sum.
    assert score["standard_error"] == pytest.approx(((3 / 16) / 4 + (1 / 4) / 2) ** 0.5 / 2)


def test_the_share_has_no_ratio_to_nothing(tmp_path: Path) -> None:
    extractor = load_extractor("namer")
    drawn = labelled(tmp_path / "drawn", {"green": [1, 0]})
    card = evaluation_card([open_image_set(drawn, 4)], open_reference(drawn, extractor, 4), extractor, ["recognised"])
    score = card["metrics"]["recognised-Namer"]
    assert (score["value"], score["held_out"], score["ratio"]) == (0.5, 0.0, None)


def test_the_share_needs_to_know_classes(tmp_path: Path) -> None:
    extractor, unnamed = load_extractor("namer"), load_extractor("colours")
    drawn = labelled(tmp_path / "drawn", {"red": [0, 0, 0, 1], "mauve": [2, 0]})
    samples, reference = open_image_set(drawn, 4), open_reference(drawn, extractor, 4)
    card = evaluation_card([samples], reference, extractor)
    assert card["skipped"]["recognised"] == "the samples' classes are unknown, or not all among " + ", ".join(HELD_OUT)
    assert {"IS-Namer", "FD-Namer"} <= card["metrics"].keys()  # IS and FID are names of Inception's
    with pytest.raises(UserError, match="metric recognised: the samples' classes are unknown"):
        evaluation_card([samples], reference, extractor, ["recognised"])
    with pytest.raises(UserError, match="metric recognised: extractor Colours names no classes; use emoji-judge"):
        evaluation_card([samples], open_reference(drawn, unnamed, 4), unnamed, ["recognised"])
    assert "recognised" not in evaluation_card([samples], open_reference(drawn, unnamed, 4), unnamed)["skipped"]


def test_labels_come_from_folders_cards_pipelines_and_data(tmp_path: Path) -> None:
    """An npz has numbers, to which its card gives the names; without it they mean nothing."""
    pipe, names = tiny_pipeline(), list(NAMES.values())
    pipe.save_pretrained(tmp_path / "pipe")
    options = {"num_images": 5, "num_inference_steps": 1, "seed": 3}
    call_sample(tmp_path / "pipe", tmp_path / "drawn.npz", **options)
    draw = DrawConfig(num_inference_steps=1)
    (from_file,) = open_samples(str(tmp_path / "drawn.npz"), draw, 5, [3], 2)
    (from_pipe,) = open_samples(str(tmp_path / "pipe"), draw, 5, [3], 2)
    numbers = np.load(tmp_path / "drawn.npz")["arr_1"].tolist()
    assert list(from_file.labels) == list(from_pipe.labels) == [NAMES[i] for i in numbers]
    assert from_file.labels_among(names).tolist() == numbers
    assert from_file.labels_among(names[:-1]) is None
    (tmp_path / "drawn.card.json").unlink()
    (bare,) = open_samples(str(tmp_path / "drawn.npz"), draw, 5, [3], 2)
    assert bare.labels_among(names) is None
    assert Samples(2, lambda: [], {}).labels_among(names) is None
    folder = open_image_set(labelled(tmp_path / "x", {"red": [0], "blue": [1, 2]}), 2)
    assert folder.labels_among(HELD_OUT).tolist() == [2, 2, 0]


@pytest.mark.parametrize("name", JUDGES)
def test_judges_are_small_and_pinned(name: str, tmp_path: Path) -> None:
    judge, folder = load_extractor(name), FOLDER / name
    card = json.loads((folder / "card.json").read_text())
    assert judge.weights_sha256 == card["sha256"] == sha256(folder / "weights.safetensors")
    assert (folder / "weights.safetensors").stat().st_size < 3e6
    assert card["command"].startswith(f"python examples/train_classifier.py --data {card['settings']['data']} ")
    assert not card["commit"].endswith("-dirty")
    source = {"emoji": EmojiSource, "fashion-mnist": FashionMnistSource}[card["settings"]["data"]]
    assert card["attribution"] == source.attribution
    assert judge.classes == card["classes"]
    (tmp_path / "other.safetensors").write_bytes(b"other")
    with pytest.raises(UserError, match=f"sha256 .* expected {judge.weights_sha256[:8]}"):
        load_extractor(name, weights=tmp_path / "other.safetensors")


@pytest.mark.parametrize("name", JUDGES)
def test_a_judge_names_by_the_features_that_it_returns(name: str) -> None:
    judge = load_extractor(name)
    side = judge.settings["input_size"]
    images = pictures(3, side=side)
    found = judge(images)
    assert found.pooled.shape == (3, judge.dim)
    mean, std = (torch.tensor(judge.settings[key]).view(3, 1, 1) for key in ("mean", "std"))
    with torch.no_grad():
        torch.testing.assert_close(found.logits, judge.network((images / 255 - mean) / std))
        torch.testing.assert_close(found.logits, judge.network.get_classifier()(found.pooled))


@pytest.mark.slow
def test_the_emoji_judge_recognises_what_its_card_says(tmp_path: Path) -> None:
    judge = load_extractor("emoji-judge")
    card = json.loads((FOLDER / "emoji-judge" / "card.json").read_text())
    images, labels = load_emoji(64, "test")
    named = torch.cat([judge(part).logits.argmax(1) for part in images.split(64)])
    assert list(judge.classes) == CLASSES
    assert (named == labels).double().mean().item() == pytest.approx(card["top1"]["value"], abs=0.003)  # fp16
