"""Training an autoencoder: it learns, repeats itself, and resumes in the middle of an epoch after a signal."""

import json
import os
import signal
from pathlib import Path

import pytest
import torch
from PIL import Image

from vit5gen.config import AutoencoderTraining, DataConfig
from vit5gen.data.autoencoders.codec import encode
from vit5gen.data.autoencoders.find_autoencoder import load_autoencoder
from vit5gen.data.images import open_images
from vit5gen.system.errors import UserError
from vit5gen.training.process import STOPPED
from vit5gen.training.train_autoencoder import Shuffle, train_autoencoder

FILES = ("config.json", "diffusion_pytorch_model.safetensors", "round_trips.png")


@pytest.fixture
def config(tmp_path: Path) -> AutoencoderTraining:
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "test"):
        for i in range(8):
            path = tmp_path / "images" / split / "plain" / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (8, 8), tuple(torch.randint(256, (3,), generator=generator).tolist())).save(path)
    return AutoencoderTraining(
        data=DataConfig(path=str(tmp_path / "images"), resolution=8),
        block_out_channels=[8, 16],
        num_steps=5,
        batch_size=4,
        precision="fp32",
    )


def score(text: str) -> float:
    return float(text.split("held-out PSNR ")[1].split()[0])


def test_training_learns_and_resumes_bit_for_bit(
    config: AutoencoderTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vit5gen.data.sources.folder.FolderSource.attribution", "Pictures by a friend")
    assert train_autoencoder(config, tmp_path / "a") == 0
    told = json.loads(Image.open(tmp_path / "a" / "round_trips.png").info["settings"])
    assert told["attribution"] == "Pictures by a friend"
    first = score(capsys.readouterr().out)
    batch = Shuffle.batch

    def signalled(self: Shuffle, step: int) -> torch.Tensor:
        if step == 2:  # the second epoch has begun
            os.kill(os.getpid(), signal.SIGTERM)
        return batch(self, step)

    with monkeypatch.context() as patch:
        patch.setattr(Shuffle, "batch", signalled)
        assert train_autoencoder(config, tmp_path / "b") == STOPPED
    (saved,) = (tmp_path / "b/checkpoints").iterdir()
    assert saved.name == "step_00000003"
    with pytest.raises(UserError, match="has another batch_size; restore the old value"):
        train_autoencoder(config.model_copy(update={"batch_size": 2}), tmp_path / "b")
    assert train_autoencoder(config, tmp_path / "b") == 0
    assert not (tmp_path / "b/checkpoints").exists()
    for name in FILES:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
    capsys.readouterr()
    assert train_autoencoder(config.model_copy(update={"num_steps": 100, "learning_rate": 1e-2}), tmp_path / "c") == 0
    assert score(capsys.readouterr().out) > first + 3
    images = open_images(config.data)
    mean, std = encode(load_autoencoder(str(tmp_path / "c")), torch.stack([image for image, _ in images]))
    assert mean.mean().item() == pytest.approx(0, abs=0.01)
    assert (mean.square() + std.square()).mean().item() == pytest.approx(1, abs=0.02)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"block_out_channels": [10, 20]}, "expected multiples of norm_num_groups 8"),
        ({"block_out_channels": [8, 8, 8, 8, 8]}, "data.resolution = 8: expected a multiple of 16"),
        ({}, "a folder; choose another path"),
    ],
)
def test_bad_sizes_and_outputs_are_refused_before_any_work(
    config: AutoencoderTraining, tmp_path: Path, changes: dict[str, list[int]], message: str
) -> None:
    (tmp_path / "out" / "config.json").mkdir(parents=True)
    with pytest.raises(UserError, match=message):
        train_autoencoder(config.model_copy(update=changes), tmp_path / "out")


def test_what_comes_after_the_last_step_may_be_cut_and_a_trained_one_is_left_alone(
    config: AutoencoderTraining, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def killed(*_: object) -> None:
        raise SystemExit(143)

    with monkeypatch.context() as patch:
        patch.setattr("vit5gen.training.train_autoencoder._finish", killed)
        with pytest.raises(SystemExit):
            train_autoencoder(config, tmp_path / "a")
    assert [path.name for path in (tmp_path / "a/checkpoints").iterdir()] == ["step_00000005"]
    with monkeypatch.context() as patch:
        patch.setattr(Shuffle, "batch", None)  # no step is left
        assert train_autoencoder(config, tmp_path / "a") == 0
    before = {name: (tmp_path / "a" / name).read_bytes() for name in FILES}
    assert train_autoencoder(config, tmp_path / "a") == 0
    assert "holds a trained autoencoder; nothing to do" in capsys.readouterr().out
    assert before == {name: (tmp_path / "a" / name).read_bytes() for name in FILES}
