"""examples/train_classifier.py: a few steps on coloured squares, and the points at which other trainings fell short."""

import importlib
import json
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from argparse import Namespace
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from launch import environment, free_ports
from PIL import Image
from safetensors.torch import load_file
from timm.utils import ModelEmaV3
from torch import nn
from torchvision.transforms import functional as T

from vit5gen.evaluation.accuracy import classify
from vit5gen.models import load_vit5
from vit5gen.system.errors import UserError

ROOT = Path(__file__).parents[1]
FILE = "weights.safetensors"
CLASSES = ["10", "2", "grey"]  # in the order of their labels, which is not that of timm's folders
SIZES = {"img_size": 16, "patch_size": 8, "embed_dim": 16, "depth": 2, "num_heads": 2}
TINY = ["--img-size", "16", "--model-kwargs", "patch_size=8", "embed_dim=16", "depth=2", "num_heads=2"]
TINY += ["--batch-size", "8", "--epochs", "3", "--warmup-epochs", "0"]


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(str(ROOT / "examples"))
        yield importlib.import_module("train_classifier")


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder in ImageNet's layout: 30 images to train on, 9 held out."""
    root, rng = tmp_path_factory.mktemp("classifier"), np.random.default_rng(0)
    for part, count in (("train", 10), ("val", 3)):
        for label, name in enumerate(CLASSES):
            (root / part / name).mkdir(parents=True)
            for i in range(count):
                pixels = rng.integers(0, 120, (18, 20, 3), dtype=np.uint8)
                pixels[..., label] += 120
                Image.fromarray(pixels).save(root / part / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def run(script: Any, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the folder of a run without interruption."""
    folder = tmp_path_factory.mktemp("run")
    script.main(["--data", str(data), "--output", str(folder), *TINY])
    return folder


def card_of(folder: Path) -> dict[str, Any]:
    return json.loads((folder / "card.json").read_text())


def options(script: Any, **changes: Any) -> Namespace:
    defaults = vars(script.parse(["--data", "", "--output", ""]))
    return Namespace(**{**defaults, **changes})


def test_the_card_tells_what_the_weights_recognise(run: Path, data: Path) -> None:
    card, file = card_of(run), run / "weights.safetensors"
    model = timm.create_model("vit5_small", num_classes=3, checkpoint_path=str(file), **SIZES).eval()
    hits = []
    for label, name in enumerate(CLASSES):
        for path in sorted((data / "val" / name).iterdir()):
            image = T.center_crop(T.resize(Image.open(path), 16, T.InterpolationMode.BICUBIC), 16)  # crop ratio 1
            pixels = T.normalize(T.to_tensor(image), [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
            with torch.no_grad():
                hits.append(int(model(pixels[None]).argmax()) == label)
    assert card["top1"]["value"] == pytest.approx(sum(hits) / 9)
    assert list(card["classes"].values()) == [sum(hits[i : i + 3]) / 3 for i in (0, 3, 6)]
    assert (list(card["classes"]), card["top5"]["value"]) == (CLASSES, 1.0)
    # Wilson's interval of 9 in 9 is [9 / (9 + z^2), 1].
    assert card["top5"]["low"] == pytest.approx(9 / (9 + 1.959964**2), rel=1e-5)
    assert card["counts"] == {"train": 30, "held_out": 9, "parameters": sum(p.numel() for p in model.parameters())}
    assert card["command"].endswith("--epochs 3 --warmup-epochs 0")
    state = load_vit5(file, num_classes=3).state_dict()  # as `vit5gen classify` does
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())


def test_linear_layers_start_as_published(script: Any) -> None:
    torch.manual_seed(0)
    model = script.create_model(options(script, model_kwargs={"depth": 2}, img_size=32), 1000)
    linear = {name: layer for name, layer in model.named_modules() if isinstance(layer, nn.Linear)}
    assert len(linear) == 2 * 4 + 1
    for name, layer in linear.items():
        # Normal with deviation 0.02: a uniform (Kaiming's) would end at 1.7 deviations.
        assert layer.weight.std().item() == pytest.approx(0.02, rel=0.01), name
        assert layer.weight.abs().max() > 3.5 * 0.02, name
    for token in (model.cls_token, model.pos_embed, model.reg_token):
        assert token.std().item() == pytest.approx(0.02, rel=0.1)


def test_biases_are_where_published_and_start_at_zero(script: Any) -> None:
    model = script.create_model(options(script, model_kwargs={"depth": 1}), 10)
    block = model.blocks[0]
    for layer in (block.attn.proj, block.mlp.fc1, block.mlp.fc2, model.head):
        assert not layer.bias.any()
    assert block.attn.qkv.bias is None
    assert model.patch_embed.proj.bias is not None  # a convolution, which the published code leaves as torch starts it


def test_attention_is_scaled_although_queries_and_keys_are_normed(script: Any) -> None:
    changes = {"img_size": 16, "model_kwargs": {"patch_size": 8, "embed_dim": 32, "depth": 1, "num_heads": 2}}
    attention = script.create_model(options(script, **changes), 3).blocks[0].attn.double()
    for parameter in attention.parameters():
        nn.init.normal_(parameter, generator=torch.Generator().manual_seed(0))
    x = torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    q, k, v = (part.unflatten(-1, (2, 16)).transpose(1, 2) for part in (x @ attention.qkv.weight.T).chunk(3, -1))
    normed = (
        part * (part.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * norm.weight
        for part, norm in ((q, attention.q_norm), (k, attention.k_norm))
    )
    q, k = normed
    expected = attention.proj(((q @ k.mT * 16**-0.5).softmax(-1) @ v).transpose(1, 2).flatten(2))
    torch.testing.assert_close(attention(x), expected)


def test_what_is_kept_and_tested_is_an_average(run: Path) -> None:
    state = torch.load(run / "last.pt", weights_only=True)
    kept = load_file(run / "weights.safetensors")
    assert kept.keys() == state["model"].keys()
    assert all(torch.equal(value, state["average"][name]) for name, value in kept.items())
    assert not torch.equal(kept["blocks.0.mlp.fc1.weight"], state["model"]["blocks.0.mlp.fc1.weight"])


@pytest.mark.parametrize(("decay", "warm"), [(0.25, 0), (0.75, 0), (0.99996, 1), (0.5, 1)])
def test_the_average_has_the_decay_that_was_asked_for(
    decay: float, warm: int, script: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Constant from the first step, as published; or growing as timm has it, which counts steps from 0."""
    name, seen = "blocks.0.mlp.fc1.weight", []

    class Noted(ModelEmaV3):
        def update(self, model: nn.Module, step: int | None = None) -> None:
            seen.append([self.module.state_dict()[name].clone(), model.state_dict()[name].clone()])
            super().update(model, step)

    monkeypatch.setattr(script, "ModelEmaV3", Noted)
    options = ["--epochs", "2", "--average", str(decay), "--average-warmup", str(warm), "--lr", "0.05"]
    script.main(["--data", str(data), "--output", str(tmp_path), *TINY, *options])
    decays = [min(decay, 1 - (1 + step) ** (-2 / 3)) if warm else decay for step in range(6)]
    expected = seen[0][0]
    for (_, weight), one in zip(seen, decays, strict=True):
        expected = one * expected + (1 - one) * weight
    torch.testing.assert_close(load_file(tmp_path / "weights.safetensors")[name], expected)


def test_the_warm_up_of_the_average_is_too_slow_for_the_published_one() -> None:
    average = ModelEmaV3(nn.Linear(1, 1), 0.99996, use_warmup=True)
    assert average.get_decay(500_001) == pytest.approx(0.999841, abs=1e-6)
    assert average.get_decay(None) == 0.99996


def test_the_optimizer_is_timms_with_layers_and_what_decays(script: Any, data: Path, tmp_path: Path) -> None:
    arguments = ["--data", str(data), "--output", str(tmp_path), *TINY, "--epochs", "1", "--layer-decay", "0.5"]
    script.main([*arguments, "--lr", "0.01"])
    groups = torch.load(tmp_path / "last.pt", weights_only=True)["optimizer"]["param_groups"]
    assert {group["lr_scale"] for group in groups} == {1, 0.5, 0.25, 0.125}  # head, blocks, what stands before them
    assert {group["weight_decay"] for group in groups} == {0.0, 0.05}
    assert {(group["eps"], group["max_grad_norm"]) for group in groups} == {(1e-8, 1.0)}  # LAMB's own clipping
    # The last of 3 steps: 2/3 along a cosine from 0.01 to 1e-5.
    assert max(group["lr"] for group in groups) == pytest.approx(1e-5 + (0.01 - 1e-5) * 0.25)


def test_augmentation_mixing_and_loss_are_those_asked_for(
    script: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: dict[str, list[Any]] = {}

    def note(name: str) -> None:
        original: Callable[..., Any] = getattr(script, name)

        def noted(*args: Any, **kwargs: Any) -> Any:
            seen.setdefault(name, []).append(original(*args, **kwargs))
            return seen[name][-1]

        monkeypatch.setattr(script, name, noted)

    for name in ("create_transform", "Mixup", "RepeatAugSampler", "BinaryCrossEntropy"):
        note(name)
    script.main(["--data", str(data), "--output", str(tmp_path), *TINY, "--epochs", "1"])
    (training, tested), (mix,), (sampler,) = seen["create_transform"], seen["Mixup"], seen["RepeatAugSampler"]
    for part in ("Solarize", "Desaturate", "GaussianBlurRand", "brightness=(0.7", "RandomHorizontalFlip(p=0.5)"):
        assert part in str(training).replace("0.7,", "0.7"), part
    assert "(0.08, 1.0)" in str(training)
    assert "AutoAugment" not in str(tested)
    assert (mix.mixup_alpha, mix.cutmix_alpha, mix.label_smoothing) == (0.8, 1.0, 0.0)
    counts = np.bincount(list(sampler))
    assert (len(sampler), counts.max()) == (30, 3)
    # BCE asks whether a class is in the mixture, whatever its share.
    (criterion,), logits = seen["BinaryCrossEntropy"], torch.tensor([[2.0, -1.0, 0.5]])
    found = criterion(logits, torch.tensor([[0.9, 0.1, 0.0]]))
    assert found == nn.functional.binary_cross_entropy_with_logits(logits, torch.tensor([[1.0, 1.0, 0.0]]))


def test_a_run_that_was_stopped_resumes_bit_for_bit(
    script: Any, data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(data), "--output", str(tmp_path), *TINY]
    calls, evaluate = [], script.evaluate

    def stop(*args: Any) -> torch.Tensor:
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt  # in the second epoch
        return evaluate(*args)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(script, "evaluate", stop)
        with pytest.raises(KeyboardInterrupt):
            script.main(arguments)
    assert len(card_of(tmp_path)["log"]) == 1
    script.main(arguments)
    assert_same_run(tmp_path, run)
    before = (tmp_path / "last.pt").stat().st_mtime_ns
    assert script.main(arguments) == card_of(tmp_path)  # a finished run: nothing changes
    assert (tmp_path / "last.pt").stat().st_mtime_ns == before
    assert "holds a run with other settings" in refused(script, [*arguments, "--lr", "0.1"], capsys)


def assert_same_run(folder: Path, other: Path) -> None:
    assert (folder / "weights.safetensors").read_bytes() == (other / "weights.safetensors").read_bytes()
    assert card_of(folder) | {"command": ""} == card_of(other) | {"command": ""}


def refused(script: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    with pytest.raises(SystemExit) as stopped:
        script.main(arguments)
    assert stopped.value.code == 2
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (["--model", "vit6"], "--model vit6: not known to timm"),
        (["--data", "nowhere"], "--data nowhere: expected folders train/CLASS and val/CLASS"),
        (["--batch-size", "9"], "--batch-size 9: 1 parts of it must be whole, even"),
        (["--accumulate", "3"], "--batch-size 8: 3 parts of it must be whole, even"),
        (["--batch-size", "64"], "--batch-size 64: more than the 30 training images"),
        (["--loss", "bec"], "--loss: 'bec' is not known; expected one of bce, ce. Did you mean 'bce'?"),
        (["--smoothing", ".1"], "--smoothing 0.1: is for --loss ce"),
        (["--initial", "nowhere.pth"], "'nowhere.pth' is not a file"),
        (["--data", "fashion-mnist", "--data-path", "nowhere"], "data.path nowhere: no such folder; install Debian's"),
        (["--data-path", "nowhere"], "--data-path nowhere: is for --data fashion-mnist"),
        (["--epochs", "0"], "--epochs 0: expected 1 to"),
        (["--accumulate", "0"], "--accumulate 0: expected 1 to"),
        (["--lr", "nan"], "--lr nan: expected"),
        (["--seed", "-1"], "--seed -1: expected 0 to"),
        (["--average-warmup", "2"], "--average-warmup 2: expected 0 to 1"),
        (["--warmup-epochs", "5"], "--warmup-epochs 5.0: expected 0 to 3"),
        (["--optimizer", "lambda"], "--optimizer, --weight-decay, --layer-decay: Optimizer lambda not found"),
        (["--augment", "foo"], "--augment, --color-jitter, --hflip, --least-crop: Unknown AA policy foo"),
        (["--model-kwargs", "foo=1"], "unexpected keyword argument 'foo'"),
        (["--model-kwargs", "patch_size"], "--model-kwargs, expected NAME=VALUE"),
        (["--model", "vgg11", "--model-kwargs"], "this model has none: give --drop-path 0"),
    ],
)
def test_bad_options_are_one_line(
    script: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], changed: list[str], said: str
) -> None:
    arguments = ["--data", str(data), "--output", str(tmp_path / "new"), *TINY, *changed]
    assert said in refused(script, arguments, capsys)
    assert not (tmp_path / "new").exists()


def test_a_loss_that_is_no_number_keeps_what_there_was(
    script: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--data", str(data), "--output", str(tmp_path / "new"), *TINY, "--optimizer", "sgd", "--lr", "1e30"]
    assert "the loss is nan; lower --lr" in refused(script, arguments, capsys)
    assert not (tmp_path / "new" / "last.pt").exists()


def test_a_later_stage_starts_from_weights_of_another_size_or_head(script: Any, run: Path) -> None:
    changes = {"initial": str(run / "weights.safetensors"), "img_size": 24}
    changes["model_kwargs"] = {key: value for key, value in SIZES.items() if key != "img_size"}
    old = load_file(run / "weights.safetensors")
    same, other = (script.create_model(options(script, **changes), count) for count in (3, 4))
    assert same.pos_embed.shape == (1, 9, 16)
    for model in (same, other):
        assert torch.equal(model.blocks[1].mlp.fc2.weight, old["blocks.1.mlp.fc2.weight"])
    assert torch.equal(same.head.weight, old["head.weight"])
    assert other.head.weight.shape == (4, 16)


@pytest.mark.parametrize("classes", [3, 4])
@pytest.mark.parametrize("fault", ["depth", "width", "prefix", "part", "excess"])
def test_weights_that_do_not_fit_are_refused(script: Any, run: Path, tmp_path: Path, fault: str, classes: int) -> None:
    """Also where the classes differ, when timm itself would start from scratch in silence."""
    sizes, state = {key: value for key, value in SIZES.items() if key != "img_size"}, load_file(run / FILE)
    sizes |= {"depth": {"depth": 3}, "width": {"embed_dim": 32}}.get(fault, {})
    if fault == "prefix":
        state = {f"backbone.{key}": value for key, value in state.items()}
    elif fault == "part":
        del state["blocks.1.mlp.fc2.weight"]
    elif fault == "excess":
        state["blocks.2.mlp.fc2.weight"] = state["blocks.1.mlp.fc2.weight"]
    torch.save(state, tmp_path / "other.pth")
    changes = {"initial": str(tmp_path / "other.pth"), "img_size": 16, "model_kwargs": sizes}
    with pytest.raises(UserError, match=r"--initial .*other\.pth, --model, --model-kwargs: ") as refusal:
        script.create_model(options(script, **changes), classes)
    assert "\n" not in str(refusal.value)


def copied(data: Path, folder: Path) -> Path:
    return Path(shutil.copytree(data, folder))


def test_held_out_images_are_the_ones_that_are_there(
    script: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(data, tmp_path / "data")
    arguments = ["--data", str(folder), "--output", str(tmp_path / "new"), *TINY, "--num-workers"]
    (folder / "val" / "2" / "1.png").write_bytes(b"no image")
    for workers in ("0", "1"):
        assert "val/2/1.png does not decode" in refused(script, [*arguments, workers], capsys)
    (folder / "val" / "2" / "1.png").unlink()
    (folder / "val" / "mauve").mkdir()
    assert "val has mauve, which train lacks" in refused(script, [*arguments, "0"], capsys)
    shutil.rmtree(folder / "val" / "mauve")
    for path in (folder / "val").glob("*/*"):
        path.unlink()
    assert "Found 0 images in subfolders" in refused(script, [*arguments, "0"], capsys)
    assert not (tmp_path / "new").exists()


def test_what_is_left_of_a_run_is_told(
    script: Any, data: Path, run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = copied(run, tmp_path / "run")
    arguments = ["--data", str(data), "--output", str(folder), *TINY]
    (folder / "card.json").unlink()
    assert "card.json: is missing beside a finished run; delete last.pt" in refused(script, arguments, capsys)
    state = torch.load(folder / "last.pt", weights_only=True)
    del state["settings"]["average_warmup"]  # of an earlier version
    torch.save(state, folder / "last.pt")
    assert "card.json: is missing" in refused(script, arguments, capsys)
    (folder / "last.pt").write_bytes((folder / "last.pt").read_bytes()[:1000])
    assert "last.pt: is damaged; delete it to begin again" in refused(script, arguments, capsys)


@pytest.mark.parametrize("balanced", ["0", "1"])
def test_pictures_of_the_package(balanced: str, script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    images = torch.randint(0, 256, (20, 3, 16, 16), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    labels = torch.tensor([0] * 12 + list(range(1, 9)))
    monkeypatch.setattr("vit5gen.data.sources.emoji.load_emoji", lambda resolution, split: (images, labels))
    arguments = ["--data", "emoji", "--output", str(tmp_path), *TINY, "--epochs", "1", "--balanced", balanced]
    card = script.main([*arguments, "--accumulate", "2", "--loss", "ce", "--smoothing", ".1"])
    assert (card["counts"]["train"], card["counts"]["held_out"]) == (108 if balanced == "1" else 20, 20)
    assert "OpenMoji" in card["attribution"]
    assert (card["input"]["crop_pct"], len(card["classes"])) == (1.0, 9)


def test_the_study_says_what_its_rows_say(script: Any) -> None:
    study = runpy.run_path(str(ROOT / "scripts" / "classifier_study.py"))
    seeds = [
        {"model": "ViT-5", "seed": seed, "parameters": 7, "top1": {"value": top1}}
        for seed, top1 in ((0, 0.5), (1, 0.7))
    ]
    rows = [*seeds, *({**row, "model": "plain ViT", "top1": {"value": 0.5}} for row in seeds)]
    # Two seeds: Student's quantile is 12.71, the standard error of 50 and 70 is 10.
    assert "| ViT-5 | 7 | 2 | 60.00 [-67.06, 187.06] |  |" in study["table"](rows)
    assert "| plain ViT | 7 | 2 | 50.00 [50.00, 50.00] | +10.00 [-117.06, +137.06] |" in study["table"](rows)
    folder = ROOT / "docs" / "study" / "classifier"
    if rows := study["read_rows"](folder / "rows.jsonl"):
        table = study["table"](rows)
        assert (folder / "table.md").read_text() == table
        assert table in (ROOT / "docs" / "study.md").read_text()


def test_the_study_keeps_rows_of_its_settings(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    study = runpy.run_path(str(ROOT / "scripts" / "classifier_study.py"))
    trained: list[str] = []

    def train(name: str, seed: int, data_path: str, work: Path) -> dict[str, Any]:
        trained.append(name)
        settings = study["settings_of"](study["parse"](study["words"](name, seed, work)))
        return {"model": name, "seed": seed, "parameters": 7, "top1": {"value": 0.5}, "settings": settings}

    monkeypatch.setitem(study["main"].__globals__, "train", train)
    monkeypatch.setattr(sys, "argv", ["study", "--output", str(tmp_path), "--seeds", "0"])
    for _ in range(2):
        study["main"]()
        assert trained == list(study["MODELS"])
    # Rows of a version without the average's warm-up count; those of another rate do not, nor does the table show them.
    rows = study["read_rows"](tmp_path / "rows.jsonl")
    del rows[0]["settings"]["average_warmup"]
    rows[1]["settings"]["lr"] = rows[1]["top1"]["value"] = 0.25
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study["main"]()
    assert trained[3:] == [rows[1]["model"]]
    assert "25.00" not in (tmp_path / "table.md").read_text()


def command(data: Path, output: Path, *more: str) -> list[str]:
    return [
        sys.executable,
        str(ROOT / "examples" / "train_classifier.py"),
        "--data",
        str(data),
        "--output",
        str(output),
        *TINY,
        *more,
    ]


@pytest.mark.slow
def test_killed_with_workers_and_resumed(script: Any, data: Path, tmp_path: Path) -> None:
    for name in ("whole", "killed"):
        process = subprocess.Popen(
            command(data, tmp_path / name, "--num-workers", "1"), env=environment(), start_new_session=True
        )
        while name == "killed" and process.poll() is None:
            if (tmp_path / name / "last.pt").exists():
                os.killpg(process.pid, signal.SIGKILL)
            time.sleep(0.01)
        process.wait(timeout=120)
    assert len(card_of(tmp_path / "killed")["log"]) < 3
    subprocess.run(command(data, tmp_path / "killed", "--num-workers", "1"), env=environment(), check=True)
    assert_same_run(tmp_path / "killed", tmp_path / "whole")


# Trains, and keeps what this process has in the end.
ONE_OF_TWO = """
import sys, torch, train_classifier
folder, *words = sys.argv[1:]
class Kept(train_classifier.ModelEmaV3):
    def update(self, model, step=None):
        super().update(model, step)
        kept.update(model=model.state_dict(), average=self.module.state_dict())
kept, train_classifier.ModelEmaV3 = {}, Kept
train_classifier.main(words)
torch.save(kept, folder)
"""


@pytest.mark.slow
def test_two_processes(data: Path, tmp_path: Path) -> None:
    """Both test every held-out image once between them, and their weights stay equal."""
    common = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_ports(1)[0])}
    common |= {"ACCELERATE_USE_CPU": "true", "PYTHONPATH": f"{ROOT / 'examples'}:{ROOT}"}
    words = command(data, tmp_path, "--lr", "0.02")[2:]
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", ONE_OF_TWO, str(tmp_path / f"{rank}.pt"), *words],
            env=environment(RANK=str(rank), LOCAL_RANK=str(rank), **common),
        )
        for rank in range(2)
    ]
    assert [process.wait(timeout=240) for process in processes] == [0, 0]
    card = card_of(tmp_path)
    assert card["counts"]["held_out"] == 9  # the sum of what both have tested
    assert card["top1"]["value"] * 9 == pytest.approx(round(card["top1"]["value"] * 9))
    assert len(card["log"]) == 3
    first, second = (torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(2))
    for part in ("model", "average"):
        assert all(torch.equal(value, second[part][name]) for name, value in first[part].items())


@pytest.mark.slow
def test_its_file_is_one_that_classify_reads(script: Any, data: Path, tmp_path: Path) -> None:
    arguments = [
        "--data",
        str(data),
        "--output",
        str(tmp_path),
        "--img-size",
        "16",
        "--batch-size",
        "8",
        "--epochs",
        "1",
        "--warmup-epochs",
        "0",
    ]
    card = script.main(arguments)
    found = classify(data / "val", "vit5_small", tmp_path / "weights.safetensors", 4, 0)
    assert found == {"top1": pytest.approx(100 * card["top1"]["value"]), "top5": 100.0, "num_images": 9}
