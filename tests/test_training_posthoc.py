"""Averages by power functions: their closed forms, snapshots, and lengths that are chosen after training."""

import json
import shutil
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from accelerate import Accelerator
from called import call_convert, call_evaluate
from launch import train_in
from PIL import Image
from safetensors.torch import load_file
from test_evaluation_card import pictures, write_folder
from tiny import tiny_autoencoder
from tiny_run import assert_identical, forget_processes, run
from torch import Tensor, nn

from vit5gen.cli import main
from vit5gen.config import Config, as_recorded, load_config, recorded_values
from vit5gen.evaluation.length_scan import find_best
from vit5gen.section import validate
from vit5gen.system.errors import UserError
from vit5gen.training import checkpoint
from vit5gen.training.averages import EMA, exponent_of, halve
from vit5gen.training.build import build_model_to_train, check_values
from vit5gen.training.cost import checkpoint_bytes, run_bytes
from vit5gen.training.dry_run import run_cost
from vit5gen.training.posthoc import combine, inner_products, rebuild
from vit5gen.training.run_folder import CHANGEABLE, differences, settle, to_yaml
from vit5gen.training.trainer import Outcome, Trainer

STEPS, EARLY, EVERY, SKIPPED = 96, 24, 4, 5
FILE = "transformer/diffusion_pytorch_model.safetensors"


def profile(t: float, gamma: float, tau: np.ndarray) -> np.ndarray:
    return np.where(tau <= t, (gamma + 1) / t * (np.minimum(tau, t) / t) ** gamma, 0)


def test_the_exponent_gives_the_length() -> None:
    """The two exponents that the paper names, and the standard deviation of the profile by the trapezoid rule."""
    assert [round(exponent_of(length), 2) for length in (0.05, 0.10)] == [16.97, 6.94]
    tau = np.linspace(0, 1, 200_001)
    for length in (0.01, 0.03, 0.05, 0.1, 0.2, 0.28):
        weight = profile(1, exponent_of(length), tau)
        mean = np.trapezoid(weight * tau, tau)
        assert np.trapezoid(weight, tau) == pytest.approx(1, abs=1e-6)
        assert np.sqrt(np.trapezoid(weight * (tau - mean) ** 2, tau)) == pytest.approx(length, rel=1e-4)


def test_products_of_profiles_are_their_integrals() -> None:
    kept, tau = [(40.0, 2.0), (100.0, 0.5), (100.0, 17.0), (70.0, 6.9)], np.linspace(0, 100, 400_001)
    found = inner_products(kept, kept)
    for i, a in enumerate(kept):
        for j, b in enumerate(kept):
            expected = np.trapezoid(profile(*a, tau) * profile(*b, tau), tau)
            assert found[i, j] == pytest.approx(expected, rel=1e-3), (a, b)
    assert found.shape == (4, 4)
    assert inner_products(kept, kept[:1]).shape == (4, 1)


def test_averages_follow_the_recursion_of_the_paper() -> None:
    model, lengths = nn.Linear(3, 1, bias=False).double(), [0.05, 0.2]
    ema = EMA(model, [0.9], lengths)
    expected = {length: np.full(3, np.nan) for length in lengths}  # the initial weights do not count
    rng = np.random.default_rng(0)
    for t in range(1, 31):
        weight = rng.normal(size=3)
        model.weight.data[0] = torch.from_numpy(weight)
        ema.update(t)
        for length in lengths:
            beta = (1 - 1 / t) ** (exponent_of(length) + 1)
            expected[length] = weight if t == 1 else beta * expected[length] + (1 - beta) * weight
    for length in lengths:
        found = dict(ema.items(f"power_{length}"))["weight"].detach()[0].numpy()
        np.testing.assert_allclose(found, expected[length], rtol=1e-12)


def test_what_fp16_cannot_hold_keeps_its_type() -> None:
    assert halve(torch.tensor([65504.0, 1e-3])).dtype == torch.float16
    large = torch.tensor([65536.0, 1e-3])
    assert torch.equal(halve(large), large)


def test_the_factors_sum_to_one_and_give_back_what_is_kept() -> None:
    times = np.repeat(np.arange(1, 65) * 10.0, 2)
    kept = list(zip(times, [exponent_of(0.05), exponent_of(0.1)] * 64, strict=True))
    factors, error = combine(kept, kept[-1])
    assert 1e-4 < error < 2**-11  # of rounding alone
    np.testing.assert_allclose(factors, np.eye(128)[-1], atol=1e-3)
    errors = {length: combine(kept, (640, exponent_of(length)))[1] for length in (0.021, 0.022, 0.07, 0.24, 0.25)}
    assert [error <= 0.01 for error in errors.values()] == [False, True, True, True, False]
    # The error is that of the profile, by the trapezoid rule, and of rounding.
    factors, error = combine(kept, (640, exponent_of(0.28)))
    assert factors.sum() == pytest.approx(1, abs=1e-12)
    tau = np.linspace(0, 640, 400_001)
    wanted = profile(640, exponent_of(0.28), tau)
    gap = sum(x * profile(*one, tau) for x, one in zip(factors, kept, strict=True)) - wanted
    assert error == pytest.approx(np.sqrt(np.trapezoid(gap**2, tau) / np.trapezoid(wanted**2, tau)), rel=0.02)


@pytest.mark.parametrize(("steps", "noise"), [(1, 0.1), (8, 0.1), (192, 0.1), (2000, 0.0)])
@pytest.mark.parametrize(
    "lengths",
    [[0.05, 0.1], [0.1, 0.11, 0.12, 0.13, 0.14, 0.15], [0.05, 0.051, 0.052, 0.053], [0.05, 0.05000000000000001]],
)
def test_the_error_covers_what_rounding_makes_of_close_lengths(lengths: list[float], steps: int, noise: float) -> None:
    """Of weights that drift and have noise; without it, rounding moves an average the same way in every update."""
    wanted, every, generator = [0.01, 0.02, 0.06, 0.2, 0.25], max(1, steps // 8), torch.Generator().manual_seed(0)
    model, exact, kept = nn.Linear(500, 1, bias=False), nn.Linear(500, 1, bias=False).double(), dict[Any, Tensor]()
    ema, direct, base = EMA(model, [], lengths), EMA(exact, [], wanted), torch.randn(1, 500, generator=generator)
    for step in range(1, steps + 1):
        with torch.no_grad():
            model.weight.copy_(base * (1 + step / steps / 10) + noise * torch.randn(1, 500, generator=generator))
            exact.weight.copy_(model.weight)
        ema.update(step)
        direct.update(step)
        for key, exponent in ema.exponents.items() if step % every == 0 else ():
            value = ema.averages[key][0].clone()
            kept[step, exponent, key] = value if step == steps else halve(value).float()
    profiles = [(step, exponent) for step, exponent, _ in kept]
    for length in wanted:
        factors, error = combine(profiles, (steps, exponent_of(length)))
        found = sum(value * float(factor) for value, factor in zip(kept.values(), factors, strict=True))
        own = direct.averages[f"power_{length}"][0]
        assert (found - own).norm() / own.norm() <= error + 1e-6, length


class Simulated:
    """A training whose weights are a random walk from 0, a function of the step, with what it would leave behind."""

    def __init__(self, folder: Path, vae: str, lengths: list[float], **training: Any) -> None:
        forget_processes()
        sections = {
            "model": {"backbone": "sit", "hidden_size": 16, "num_layers": 1, "num_attention_heads": 2, "patch_size": 2},
            "data": {"resolution": 16, "num_classes": 3},
            "vae": {"name": vae, "downsample": 2},
            "training": {"ema_decays": [0.9], "ema_lengths": lengths, "precision": "fp32", **training},
        }
        self.folder, self.config = folder, Config.model_validate(sections)
        model = build_model_to_train(self.config)
        optimizer = torch.optim.AdamW(model.parameters())
        self.trainer = Trainer(
            Accelerator(cpu=True), model, optimizer, {"model": model}, *self.config.training.averages
        )
        self.weights = {name: one for name, one in self.trainer.model.named_parameters() if one.requires_grad}
        size = sum(value.numel() for value in self.weights.values())
        walk = np.random.default_rng(0).standard_normal((STEPS, size), dtype=np.float32).cumsum(0) / np.sqrt(STEPS)
        self.walk = torch.from_numpy(walk)

    def train(self, until: int = STEPS, every: int | None = EVERY) -> "Simulated":
        """Go on to a step; one step is not finite and leaves the weights alone."""
        while (step := self.trainer.step) < until:
            if step != SKIPPED:
                sizes = [value.numel() for value in self.weights.values()]
                for value, new in zip(self.weights.values(), self.walk[step].split(sizes), strict=True):
                    value.data.copy_(new.view_as(value))
                self.trainer.average()
            self.trainer.count(Outcome({"flow": float("nan") if step == SKIPPED else 1.0}, 1.0))
            self.trainer.snapshot(self.folder / "averages", every)
        assert self.trainer.save(self.folder / "checkpoints", to_yaml(self.config), keep_last=2)
        return self

    def direct(self, length: float) -> dict[str, Tensor]:
        """The average of a length over all updates, as the recursion's closed form gives it in float64."""
        walk = np.delete(self.walk[: self.trainer.step].double().numpy(), SKIPPED, axis=0)
        edges = (np.arange(len(walk) + 1) / len(walk)) ** (exponent_of(length) + 1)
        flat = torch.from_numpy(np.diff(edges) @ walk)
        sizes = [value.numel() for value in self.weights.values()]
        parts = zip(self.weights.items(), flat.split(sizes), strict=True)
        return {name: part.view_as(value) for (name, value), part in parts}

    @property
    def newest(self) -> Path:
        return checkpoint.steps(self.folder / "checkpoints")[-1]


@pytest.fixture(scope="module")
def vae(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("vae")
    tiny_autoencoder().save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory, vae: str) -> Simulated:
    run = Simulated(tmp_path_factory.mktemp("run"), vae, [0.05, 0.1]).train(EARLY).train()
    (run.folder / "pipeline").mkdir()
    (run.folder / "pipeline/model_index.json").write_text(json.dumps({"id2label": {"0": "a", "1": "b", "2": "c"}}))
    return run


def gap(found: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the norm of the difference over the norm of what is expected."""
    assert found.keys() == expected.keys()
    squares = [
        sum(float(one.double().square().sum()) for one in values)
        for values in (
            [found[name] - expected[name] for name in expected],
            list(expected.values()),
        )
    ]
    return float(np.sqrt(squares[0] / squares[1]))


def test_a_length_that_was_not_kept_is_rebuilt_from_fp16(kept: Simulated) -> None:
    lengths = [0.04, 0.05, 0.07, 0.1, 0.15, 0.19]
    found = rebuild(kept.newest, lengths)
    gaps = {length: gap(found[length], kept.direct(length)) for length in lengths}
    print(gaps)
    assert max(gaps.values()) < 0.01
    assert max(gaps[0.05], gaps[0.1]) < 1e-5  # these are in the checkpoint
    # Neighbours differ by more than that.
    assert all(gap(kept.direct(a), kept.direct(b)) > 0.02 for a, b in pairwise(lengths))
    # An earlier snapshot holds fp16, is whole, and knows the updates.
    folder = kept.folder / "averages/step_00000008"
    assert sorted(file.name for file in folder.glob("ema*")) == [
        "ema_power_0.05.safetensors",
        "ema_power_0.1.safetensors",
    ]
    assert checkpoint.find_damage(folder) is None
    assert {value.dtype for value in load_file(folder / "ema_power_0.1.safetensors").values()} == {torch.float16}
    state = checkpoint.read_state(folder)
    assert (state["step"], state["skipped"]) == (8, 1)
    assert len(checkpoint.steps(kept.folder / "averages")) == STEPS // EVERY


def test_a_tracked_length_is_given_back_as_it_is(tmp_path: Path, vae: str) -> None:
    run = Simulated(tmp_path, vae, [0.05, 0.1]).train(SKIPPED + 1, every=1)
    states = [checkpoint.read_state(folder) for folder in (tmp_path / f"averages/step_{SKIPPED:08d}", run.newest)]
    assert len({state["step"] - state["skipped"] for state in states}) == 1  # the last snapshot has as many updates
    for length, found in rebuild(run.newest, [0.05, 0.1]).items():
        assert_identical(found, checkpoint.load_tensors(run.newest, f"ema_power_{length}"))


def test_resumed_averages_and_snapshots_are_bit_equal(kept: Simulated, tmp_path: Path, vae: str) -> None:
    Simulated(tmp_path, vae, [0.05, 0.1]).train(14)
    resumed = Simulated(tmp_path, vae, [0.05, 0.1])
    resumed.trainer.restore(tmp_path / "checkpoints/step_00000014")
    resumed.train(EARLY)
    files = [file.relative_to(tmp_path) for file in tmp_path.rglob("*.safetensors") if "14" not in str(file.parent)]
    assert len(files) == 2 * EARLY // EVERY + 5
    for file in files:
        assert (tmp_path / file).read_bytes() == (kept.folder / file).read_bytes(), file


def test_without_lengths_a_checkpoint_is_what_it_was(kept: Simulated, tmp_path: Path, vae: str) -> None:
    off = Simulated(tmp_path, vae, []).train(EARLY)
    tensors = ["ema_0.9.safetensors", "model.safetensors", "optimizer.safetensors"]
    assert sorted(file.name for file in off.newest.iterdir()) == [
        "checksums.json",
        "config.yaml",
        *tensors,
        "state.json",
    ]
    assert not (tmp_path / "averages").exists()
    for name in tensors:
        assert (off.newest / name).read_bytes() == (kept.folder / f"checkpoints/step_{EARLY:08d}" / name).read_bytes()
    with pytest.raises(
        UserError, match=r"has no 'ema_power_0.05': averages and objectives cannot begin in a run; .*init_from"
    ):
        Simulated(tmp_path, vae, [0.05]).trainer.restore(off.newest)
    with pytest.raises(UserError, match=r"keeps no averages .*; set training.ema_lengths, e.g. to \[0.05, 0.1\]"):
        rebuild(off.newest, [0.05])


def test_a_checkpoint_of_a_run_without_what_came_later_does_not_record_it(config_file: Path) -> None:
    later: dict[str, Any] = {
        "optimizer_kwargs": {"eps": 1e-6},
        "ema_lengths": [0.05, 0.1],
        "ema_snapshot_every": 2,
    }
    plain = settle(load_config(config_file))
    given = load_config(config_file, {f"training.{key}": value for key, value in later.items()})
    without, with_all = yaml.safe_load(to_yaml(plain)), yaml.safe_load(to_yaml(given))
    assert list(without["training"]) == [key for key in with_all["training"] if key not in later]
    assert {key: with_all["training"][key] for key in later} == later
    assert validate(Config, recorded_values(without), "") == plain
    # Setting one and omitting one are changes all the same.
    for recorded, asked in ((without, given), (with_all, plain)):
        found = {line.split(":")[0] for line in differences(recorded, asked, changeable=())}
        assert found >= {f"training.{key}" for key in later}


def test_a_full_disk_costs_a_snapshot_alone(
    tmp_path: Path, vae: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def full(*args: object, **kwargs: object) -> None:
        raise OSError(28, "No space left on device")

    simulated = Simulated(tmp_path, vae, [0.05])
    with monkeypatch.context() as patch:
        patch.setattr("safetensors.torch.save_file", full)
        simulated.trainer.step = 4
        simulated.trainer.snapshot(tmp_path / "averages", 4)
    assert "warning: averages of step 4 not saved: [Errno 28] No space left" in capsys.readouterr().out
    assert not any((tmp_path / "averages").iterdir())


def test_a_damaged_snapshot_is_passed_over(kept: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(kept.folder, tmp_path / "run")
    (tmp_path / "run/averages/step_00000048/ema_power_0.1.safetensors").write_bytes(b"short")
    found = rebuild(tmp_path / "run/checkpoints/step_00000096", [0.07])[0.07]
    assert "step_00000048: ema_power_0.1.safetensors is damaged" in capsys.readouterr().out
    assert gap(found, kept.direct(0.07)) < 0.01
    # Without any, only what the checkpoint holds.
    shutil.rmtree(tmp_path / "run/averages")
    assert gap(rebuild(tmp_path / "run/checkpoints/step_00000096", [0.1])[0.1], kept.direct(0.1)) < 1e-5
    with pytest.raises(UserError, match=r"from the 2 averages of .*run; these can: 0.05, 0.1; choose one of them"):
        rebuild(tmp_path / "run/checkpoints/step_00000096", [0.07])


def test_a_tracked_length_between_those_tried_is_named(tmp_path: Path, vae: str) -> None:
    run = Simulated(tmp_path, vae, [0.0525]).train(EARLY, every=EARLY)
    with pytest.raises(UserError, match=r"these can: 0.0525; choose one of them"):
        rebuild(run.newest, [0.2])


def test_convert_writes_one_pipeline_or_several(kept: Simulated, tmp_path: Path) -> None:
    call_convert(kept.folder, tmp_path / "one", ema_length=["0.07"])
    call_convert(kept.newest, tmp_path / "two", ema_length=["0.07,0.10", [0.1, 0.07]])
    assert sorted(path.name for path in (tmp_path / "two").iterdir()) == ["length_0.07", "length_0.1"]
    one, two = (load_file(tmp_path / name / FILE) for name in ("one", "two/length_0.07"))
    assert all(torch.equal(one[name], two[name]) for name in two)
    found = rebuild(kept.newest, [0.07])[0.07]
    assert all(torch.equal(one[name], value) for name, value in found.items())
    assert "the average of length 0.07 of" in (tmp_path / "one/README.md").read_text()


@pytest.mark.parametrize("trainable", [["label_embed", "head"], "lora"])
def test_what_is_not_trained_comes_from_the_model(tmp_path: Path, vae: str, trainable: Any) -> None:
    part = Simulated(tmp_path / "run", vae, [0.1], trainable=trainable).train(EARLY)
    call_convert(part.folder, tmp_path / "out", vae="none", ema_length=[0.1])
    found, started = load_file(tmp_path / "out" / FILE), part.trainer.model.state_dict()
    average, name = part.direct(0.1), "backbone.blocks.0.attn.qkv.weight"
    torch.testing.assert_close(found["label_embed.weight"], average["label_embed.weight"].float())
    if trainable != "lora":
        assert torch.equal(found[name], started[name])
        return
    a, b = (average[f"{name.removesuffix('weight')}lora_{x}.default.weight"] for x in "AB")
    expected = started[f"{name.removesuffix('weight')}base_layer.weight"].double() + b @ a
    torch.testing.assert_close(found[name], expected.float())


@pytest.mark.parametrize(
    ("given", "parts"),
    [
        ("0", ["--ema-length = 0.0", "0.01"]),
        ("-0.1", ["--ema-length = -0.1", "0.01"]),
        ("nan", ["--ema-length = nan", "finite"]),
        ("[]", ["--ema-length = []", "number"]),
        ("0.05,long", ["--ema-length", "'0.05,long'", "number"]),
        ("0.05,0.28", ["--ema-length 0.28: cannot be rebuilt from the 48 averages", "these can: 0.04 to 0.19;"]),
    ],
)
def test_bad_lengths_are_told_in_a_line(
    kept: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str], given: str, parts: list[str]
) -> None:
    with pytest.raises(SystemExit, match="2"):
        main(["convert", str(kept.folder), f"--ema-length={given}", "--output", str(tmp_path / "out")])
    message = capsys.readouterr().err
    assert all(part in message for part in parts), message
    assert message.count("\n") == 1
    assert not any(tmp_path.iterdir())


def test_lengths_are_of_runs_alone(kept: Simulated, tmp_path: Path) -> None:
    (tmp_path / "file.pt").touch()
    with pytest.raises(UserError, match="--ema-length is only for runs"):
        call_convert(tmp_path / "file.pt", tmp_path / "out", ema_length=[0.05])
    with pytest.raises(UserError, match="--weights has no effect with --ema-length"):
        call_convert(kept.folder, tmp_path / "out", ema_length=[0.05], weights="model")
    for samples, match in (([tmp_path], "neither a run nor"), ([kept.folder, tmp_path], "--ema-length: 2 sets")):
        with pytest.raises(UserError, match=match):
            call_evaluate(*samples, reference=tmp_path, ema_length=[0.05])


def test_evaluate_scans_lengths(kept: Simulated, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    real = write_folder(tmp_path / "real", pictures(16, side=16))
    how = {"reference": real, "extractor": "colours", "num_images": 8, "num_inference_steps": 2, "metrics": ["fid"]}
    lengths = [0.05, 0.15]
    assert call_evaluate(kept.folder, **how, ema_length=["0.15,0.05"], output=tmp_path / "a.json") == 0
    card = json.loads((tmp_path / "a.json").read_text())
    scan = card["scan"]
    assert scan["ema_lengths"] == lengths
    values = [model["metrics"]["FD-Colours"]["value"] for model in card["models"]]
    assert [score["value"] for score in scan["metrics"]["FD-Colours"]] == values
    assert len(set(values)) == 2
    best = scan["best"]["FD-Colours"]
    assert best == lengths[values.index(min(values))]
    assert card["metrics"] == card["models"][lengths.index(best)]["metrics"]
    assert [(one["ema_length"], one["sampling"]["seed"]) for one in card["samples"]] == [(0.05, 0), (0.15, 0)]
    assert card["samples"][0]["sampling"]["vae"] == f"of {kept.folder}"
    assert not any("models:" in warning for warning in card["warnings"])
    with Image.open(tmp_path / "a.png") as picture:
        assert picture.size == (840, 336)
    # The scores of one length are those of its pipeline.
    call_convert(kept.folder, tmp_path / "b", ema_length=[0.05])
    call_evaluate(tmp_path / "b", **how, output=tmp_path / "b.json")
    assert json.loads((tmp_path / "b.json").read_text())["metrics"] == card["models"][0]["metrics"]


def test_the_best_is_where_a_score_says_which_way_is_better() -> None:
    models: list[dict[str, Any]] = []
    for x in (2, 1, 3):
        low, high, same = {"value": x, "better": "lower"}, {"better": "higher"}, {"value": 0, "better": "lower"}
        of_seeds = {"value": x, "deviation": 1, "runs": [high, high]}
        models.append({"low": low, "of seeds": of_seeds, "undirected": {"value": x}, "same": same})
    assert find_best(models) == {"low": 1, "of seeds": 2}


def test_the_configuration_settles_and_checks_snapshots(config_file: Path) -> None:
    config = load_config(config_file, {"training.ema_lengths": [0.05, 0.1], "training.num_steps": 640})
    settled = settle(config)
    assert settled.training.ema_snapshot_every == 10
    assert settle(load_config(config_file)).training.ema_snapshot_every is None
    assert settle(as_recorded(load_config(config_file), settled.model_dump())).training.ema_snapshot_every is None
    # A longer run keeps the distance that it began with.
    longer = load_config(config_file, {"training.ema_lengths": [0.05, 0.1], "training.num_steps": 6400})
    assert as_recorded(longer, settled.model_dump()).training.ema_snapshot_every == 10
    assert "training.ema_snapshot_every" in CHANGEABLE
    with pytest.raises(UserError, match="ema_snapshot_every: has no effect"):
        check_values(load_config(config_file, {"training.ema_snapshot_every": 3}))
    # What they take: an average in memory and in a checkpoint, and 64 halves of each on the disk.
    cost, off = run_cost(config), settle(load_config(config_file, {"training.num_steps": 640}))
    more = checkpoint_bytes(cost, settled) - checkpoint_bytes(cost, off)
    assert more == 2 * 4 * cost.parameters
    checkpoints = settled.training.keep_last + 1
    assert run_bytes(cost, settled) - run_bytes(cost, off) == checkpoints * more + 2 * 64 * 2 * cost.parameters


@pytest.mark.slow
def test_real_runs_resume_and_shard_their_averages(config_file: Path, tmp_path: Path) -> None:
    settings = {"training.ema_lengths": [0.05, 0.1], "training.ema_snapshot_every": 4}
    here = {key.replace(".", "__"): value for key, value in settings.items()}
    run(config_file, tmp_path / "whole", training__num_steps=20, **here)
    run(config_file, tmp_path / "parts", training__num_steps=11, **here)
    (tmp_path / "parts/averages/step_00000012").mkdir()  # of another run that came so far
    run(config_file, tmp_path / "parts", training__num_steps=11, resume="auto", **here)
    run(config_file, tmp_path / "parts", training__num_steps=20, **here)
    files = [file.relative_to(tmp_path / "whole") for file in (tmp_path / "whole/averages").rglob("*.safetensors")]
    assert len(files) == 10
    for file in (*files, Path("checkpoints/step_00000020/ema_power_0.05.safetensors")):
        assert (tmp_path / "parts" / file).read_bytes() == (tmp_path / "whole" / file).read_bytes()
    # Two processes, as they are and sharded.
    for name, fsdp in (("ddp", False), ("fsdp", True)):
        overrides = {"training.num_steps": 20, "training.ema_lengths": [0.05, 0.1], "training.ema_snapshot_every": 4}
        job = {"config": config_file, "output": tmp_path / name, "overrides": overrides}
        assert train_in(2, [job], tmp_path, fsdp=fsdp)[0] == [0]
        for file in files:
            ours, theirs = load_file(tmp_path / name / file), load_file(tmp_path / "whole" / file)
            assert gap({k: v.float() for k, v in ours.items()}, {k: v.float() for k, v in theirs.items()}) < 1e-3
