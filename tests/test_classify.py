"""Top-1 and top-5 over a folder, with the published crop."""

import functools
import pickle
import shutil

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torchvision.transforms import functional as T

import vit5gen.models  # noqa: F401 (registers vit5_small with timm)
from vit5gen.commands.classify import ClassifyOptions
from vit5gen.evaluation import accuracy
from vit5gen.system.errors import UserError

NUM_CLASSES = 7
classify = functools.partial(accuracy.classify, batch_size=4, num_workers=0)


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """Twelve images of seven classes, and a tiny checkpoint under a published name."""
    root = tmp_path_factory.mktemp("classify")
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = root / "images" / f"class{i % NUM_CLASSES}"
        folder.mkdir(parents=True, exist_ok=True)
        pixels = rng.integers(0, 256, (40 + i, 60 - 3 * i, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
    model = timm.create_model("vit5_small", img_size=32, num_classes=NUM_CLASSES).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(0, 0.1, generator=torch.Generator().manual_seed(1))
    torch.save({"model": model.state_dict()}, root / "model.pth")
    return root, model


def test_accuracy_equals_one_image_at_a_time(data):
    root, model = data
    images = accuracy._image_folder(root / "images", 32, model.pretrained_cfg)
    ranks, place = [], 0
    for label in range(NUM_CLASSES):
        for path in sorted((root / "images" / f"class{label}").iterdir()):
            image = T.resize(Image.open(path), 32, T.InterpolationMode.BICUBIC)  # crop ratio 1.0: no margin
            pixels = T.to_tensor(T.center_crop(image, 32))
            pixels = T.normalize(pixels, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            assert torch.equal(images[place][0], pixels)
            place += 1
            with torch.no_grad():
                order = model(pixels[None])[0].argsort(descending=True).tolist()
            ranks.append(order.index(label))
    result = classify(root / "images", "vit5_small", root / "model.pth", batch_size=5)
    assert result["num_images"] == 12
    assert result["top1"] == pytest.approx(100 * sum(r < 1 for r in ranks) / 12)
    assert result["top5"] == pytest.approx(100 * sum(r < 5 for r in ranks) / 12)
    assert 0 < result["top5"] < 100


def test_a_constant_network_is_at_chance(data, tmp_path):
    root, model = data
    state = {key: torch.zeros_like(value) for key, value in model.state_dict().items()}
    torch.save(state, tmp_path / "zero.pth")
    result = classify(root / "images", "vit5_small", tmp_path / "zero.pth")
    assert result["top1"] < 50


def test_bad_input(data, tmp_path, monkeypatch):
    root, _ = data
    checkpoint, images = root / "model.pth", root / "images"
    with pytest.raises(UserError, match=r"--model: 'vit5_smal' is not known.*Did you mean 'vit5_small'"):
        classify(images, "vit5_smal", checkpoint)
    with pytest.raises(UserError, match="12 blocks of width 384, but vit5_base has 12 of 768"):
        classify(images, "vit5_base", checkpoint)
    with pytest.raises(UserError, match="does not contain one folder per class"):
        classify(tmp_path / "absent", "vit5_small", checkpoint)
    with pytest.raises(UserError, match="does not contain one folder per class"):
        classify(tmp_path, "vit5_small", checkpoint)
    (tmp_path / "images" / "only").mkdir(parents=True)
    (tmp_path / "images" / "only" / "broken.png").write_bytes(b"no image")
    with pytest.raises(UserError, match="has 1 classes, the checkpoint 7"):
        classify(tmp_path / "images", "vit5_small", checkpoint)
    for label in range(1, NUM_CLASSES):
        (tmp_path / "images" / f"z{label}").mkdir()
        (tmp_path / "images" / f"z{label}" / "broken.png").write_bytes(b"no image")
    for num_workers in (0, 1):
        with pytest.raises(UserError, match=r"^FOLDER: .*broken.png' does not decode") as error:
            classify(tmp_path / "images", "vit5_small", checkpoint, num_workers=num_workers)
        assert "\n" not in str(error.value)
    monkeypatch.setattr("PIL.Image.MAX_IMAGE_PIXELS", 4)
    Image.new("RGB", (9, 9)).save(tmp_path / "images" / "only" / "broken.png")
    with pytest.raises(UserError, match=r"broken.png' does not decode \(Image size"):
        classify(tmp_path / "images", "vit5_small", checkpoint)


def test_hidden_folders_and_copies_are_not_scored(data, tmp_path):
    root, _ = data
    images = tmp_path / "images"
    shutil.copytree(root / "images", images)
    shutil.copytree(images / "class0", images / ".ipynb_checkpoints")
    shutil.copytree(images / "class0", images / "class0" / ".ipynb_checkpoints")
    shutil.copytree(images / "class0", images / "__MACOSX")
    result = classify(images, "vit5_small", root / "model.pth")
    assert result == classify(root / "images", "vit5_small", root / "model.pth")
    shutil.rmtree(images / "class3")
    with pytest.raises(UserError, match=r"has 6 classes, the checkpoint 7 \(class0, class1, class2, class4"):
        classify(images, "vit5_small", root / "model.pth")


def test_images_can_be_handed_to_workers(data):
    root, model = data
    images = accuracy._image_folder(root / "images", 32, model.pretrained_cfg)
    pixels, label = pickle.loads(pickle.dumps(images))[11]  # noqa: S301
    assert label == images[11][1] == 6
    assert torch.equal(pixels, images[11][0])


@pytest.mark.slow
@pytest.mark.parametrize("method", ["spawn", "forkserver"])
def test_workers_start_by_every_method(data, method, monkeypatch):
    root, _ = data
    with_method = functools.partial(accuracy.DataLoader, multiprocessing_context=method)
    monkeypatch.setattr(accuracy, "DataLoader", with_method)
    scored = classify(root / "images", "vit5_small", root / "model.pth", num_workers=2)
    monkeypatch.undo()
    assert scored == classify(root / "images", "vit5_small", root / "model.pth")


def test_help_names_the_expected_figures():
    for figure in ("82.2", "84.2", "85.4", "84.9", "86.0"):
        assert figure in ClassifyOptions.__doc__
