"""The recipes: SiT's settings, pairs that differ in the backbone alone, head comments that stay true, and --dry-run."""

import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from accelerate.commands.config.config_args import load_config_from_file
from tiny_run import forget_processes, make_inputs

from vit5gen.cli import main
from vit5gen.config import Config, load_config
from vit5gen.training.averages import exponent_of
from vit5gen.training.dry_run import utilisation
from vit5gen.training.posthoc import combine
from vit5gen.training.run_folder import RunFolder

ROOT = Path(__file__).parents[1]
RECIPES = sorted(ROOT.glob("configs/imagenet*/*.yaml"))
OTHER_LATENTS = {"xl-1-rae": "nyu-visionx/RAE-dinov2-wReg-base-ViTXL-n08", "xl-1-vavae": "data/vavae-f16d32"}
OTHER_LATENTS |= {"xl-1-dcae": "mit-han-lab/dc-ae-f32c32-in-1.0-diffusers", "b-16-pixels": "pixels"}
SIT = [path for path in RECIPES if path.stem.startswith("sit-") and path.stem[4:] not in OTHER_LATENTS]
SPEEDRUNS = [path for path in RECIPES if path.stem.endswith("-speedrun")]
VIT5 = [path for path in RECIPES if path.stem.startswith("vit5-") and path not in SPEEDRUNS]


@pytest.fixture(autouse=True)
def _fresh(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path_factory.getbasetemp() / "cache"))
    forget_processes()


def without_backbone(config: Config) -> dict[str, Any]:
    plain = config.model_dump()
    for key in ("backbone", "backbone_kwargs"):
        del plain["model"][key]
    return plain


def name(path: Path) -> str:
    return f"{path.parent.name}-{path.stem}"


def dry_run(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[str]:
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["train", *map(str, arguments), "--dry-run"])
    printed = capsys.readouterr()
    assert ended.value.code == 0, printed.err
    return printed.out.splitlines()


def tree(folder: Path) -> dict[Path, int]:
    return {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


def test_every_recipe_is_there() -> None:
    expected = {f"imagenet256-{kind}-{size}-2" for kind in ("sit", "vit5") for size in ("s", "b", "l", "xl")}
    expected |= {f"imagenet512-{kind}-xl-{which}" for kind in ("sit", "vit5") for which in ("2", "1-dcae")}
    which = ("xl-1-rae", "xl-1-vavae", "b-16-pixels")
    expected |= {f"imagenet256-{kind}-{one}" for kind in ("sit", "vit5") for one in which}
    expected |= {"imagenet256-vit5-b-2-gamma1", "imagenet256-vit5-b-2-gate"}
    expected |= {f"imagenet256-vit5-{size}-2-speedrun" for size in ("b", "xl")}
    assert {name(path) for path in RECIPES} == expected


@pytest.mark.parametrize("path", VIT5, ids=name)
def test_a_pair_differs_in_the_backbone_alone(path: Path) -> None:
    partner = path.with_name(re.sub(r"^vit5-", "sit-", re.sub(r"-2-.*", "-2.yaml", path.name)))
    assert without_backbone(load_config(path)) == without_backbone(load_config(partner))


def test_what_the_backbones_are_given() -> None:
    given = {name(path): load_config(path).model.backbone_kwargs for path in RECIPES}
    assert given.pop("imagenet256-vit5-b-2-gamma1") == {"gamma_init": 1.0}
    assert given.pop("imagenet256-vit5-b-2-gate") == {"layer_scale": "none"}
    assert set(map(str, given.values())) == {"{}"}


@pytest.mark.parametrize("path", SPEEDRUNS, ids=name)
def test_a_speedrun_changes_how_it_is_trained_not_what(path: Path) -> None:
    plain = load_config(path.with_name(path.name.replace("-speedrun", "")))
    config = load_config(path)
    assert (config.model, config.data, config.vae) == (plain.model, plain.data, plain.vae)
    assert config.evaluation == plain.evaluation
    for key in ("num_steps", "global_batch_size", "learning_rate", "weight_decay", "ema_decays", "seed"):
        assert getattr(config.training, key) == getattr(plain.training, key)
    alignment = config.training.objectives["alignment"]
    assert alignment["tap"] == {"B/2": 4, "XL/2": 8}[str(config.model.preset)]
    assert alignment["stop_at"] < config.training.num_steps
    assert (config.flow.time_distribution, config.flow.direction_weight) == ("logit_normal", 1)
    # The lengths that its head tells to compare can be rebuilt.
    steps, every = config.training.num_steps, config.training.ema_snapshot_every or 0
    assert steps % every == 0
    tracked = [exponent_of(length) for length in config.training.ema_lengths]
    kept = [(float(step), exponent) for step in range(every, steps + 1, every) for exponent in tracked]
    (told,) = re.findall(r"--ema-length (\S+)", path.read_text())
    for length in map(float, told.split(",")):
        assert combine(kept, (steps, exponent_of(length)))[1] <= 0.01, length


@pytest.mark.parametrize("path", SIT, ids=name)
def test_settings_are_those_of_sit(path: Path) -> None:
    config = load_config(path)
    model, training, data = config.model, config.training, config.data
    assert model.preset == f"{path.stem.split('-')[1].upper()}/2"
    assert (model.class_dropout_prob, model.mlp_ratio, model.learn_sigma) == (0.1, 4.0, False)
    assert (config.flow.path, config.flow.prediction, config.flow.loss_weight) == ("linear", "velocity", None)
    assert (config.flow.time_distribution, config.flow.time_shift, config.flow.stratified) == ("uniform", 1.0, False)
    assert config.flow.direction_weight == 0
    assert (training.num_steps, training.global_batch_size, training.precision) == (400_000, 256, "tf32")
    assert (training.learning_rate, training.adam_betas, training.weight_decay) == (1e-4, [0.9, 0.999], 0.0)
    assert (training.schedule, training.warmup_steps, training.max_grad_norm) == ("constant", 0, None)
    assert (training.ema_decays, training.seed) == ([0.9999], 0)
    assert (config.vae.name, config.vae.latent_channels, config.vae.downsample) == ("stabilityai/sd-vae-ft-ema", 4, 8)
    assert (data.horizontal_flip, data.num_classes) == (True, 1000)
    assert data.exif == "ignore"  # as ADM, of whose preprocessing the published latents are
    assert data.resolution == int(path.parent.name.removeprefix("imagenet"))


@pytest.mark.parametrize("stem", OTHER_LATENTS)
def test_other_latents_change_what_is_seen_and_nothing_else(stem: str) -> None:
    (path,) = (path for path in RECIPES if path.stem == f"vit5-{stem}")
    config, plain = load_config(path), load_config(ROOT / "configs/imagenet256/vit5-xl-2.yaml")
    assert config.vae.name == OTHER_LATENTS[stem]
    assert config.latent_shape == {"b-16-pixels": (3, 256, 256), "xl-1-rae": (768, 16, 16)}.get(stem, (32, 16, 16))
    assert config.time_shift == (pytest.approx(6.928, abs=1e-3) if stem == "xl-1-rae" else 1)
    assert config.vae.normalize == ("measured" if stem == "xl-1-vavae" else "config")
    assert config.flow.prediction == ("data" if stem == "b-16-pixels" else "velocity")
    assert (config.training, config.evaluation, config.sampling) == (plain.training, plain.evaluation, plain.sampling)


@pytest.mark.parametrize("path", RECIPES, ids=name)
def test_dry_run_is_green_and_prints_what_the_head_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HF_HOME", str(tmp_path))
    head = [line.removeprefix("#").strip() for line in path.read_text().splitlines() if line.startswith("#")]
    relative = path.relative_to(ROOT)
    assert any(line.startswith(f"{relative} --output runs/") for line in head)
    for steps in (400_000,) if path in SPEEDRUNS else (400_000, 7_000_000):
        printed = dry_run(capsys, path, "--training.num_steps", steps)
        facts = [line for line in printed if not line.startswith(("missing: ", "trial: "))]
        assert len(facts) == 6
        assert set(facts) <= set(head)
        assert sum(f"{steps:,} steps" in line for line in facts) == 2
        latents = load_config(path).data.latents
        assert (latents is None) == (path.stem[-3:] == "rae" or path.stem.endswith("pixels"))
        if latents is not None:
            assert f"missing: {latents} (vit5gen encode CONFIG --output {latents})" in printed
        assert any(line.startswith("missing: data/imagenet (") for line in printed)
    assert not list(tmp_path.iterdir())


def test_heads_and_page_give_the_same_published_figures() -> None:
    page = (ROOT / "docs/reproduction.md").read_text()
    for path in RECIPES:
        figures = re.search(r"([\d.]+) at 200K steps, ([\d.]+) at 400K", path.read_text())
        if figures is None:
            others = ("gamma1", "gate", "speedrun")
            assert path.stem.endswith(others) or "512" in str(path) or "-2" not in path.stem
            continue
        row = next(line for line in page.splitlines() if line.startswith(f"| `{path.stem}`"))
        assert [cell.strip() for cell in row.split("|")[2:5:2]] == list(figures.groups()), path


def test_the_extractor_of_adm_is_known_to_a_training() -> None:
    """In an interpreter of its own: an evaluation imports what a training may not know of."""
    config = ROOT / "configs/imagenet256/vit5-s-2.yaml"
    command = [sys.executable, "train.py", config, "--dry-run", "--evaluation.extractor", "inception"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert "weights of Inception" in done.stdout


def test_dry_run_tries_real_steps_where_the_data_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_inputs(tmp_path)
    trial = r"trial:    3 real steps: peak memory [\d.]+ GB, [\d.,]+ images/s; on this machine: \S+ seconds, 10 steps"
    before = tree(tmp_path)
    assert re.fullmatch(trial.replace("real", "synthetic"), dry_run(capsys, config)[-1])
    assert re.fullmatch(trial, dry_run(capsys, config, "--data.from_images", "true")[-1])
    with pytest.raises(SystemExit):
        main(["encode", str(config), "--output", str(tmp_path / "latents")])
    before = tree(tmp_path)
    accumulated = ["--data.latents", tmp_path / "latents", "--training.micro_batch_size", 2]
    assert re.fullmatch(trial, dry_run(capsys, config, *accumulated, "--output", tmp_path / "run")[-1])
    assert tree(tmp_path) == before
    shutil.rmtree(tmp_path / "vae")
    printed = dry_run(capsys, config, *accumulated)
    assert printed[-2].startswith(f"missing: {tmp_path / 'vae'} (")
    assert printed[-1].startswith("trial:    3 synthetic steps: ")
    assert not any(line.startswith("time:") for line in printed)  # GPU-hours


def test_dry_run_tells_where_a_run_would_start(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_inputs(tmp_path)
    settings = ["--training.trackers", "[]", "--data.from_images", "true", "--evaluation.every", "null"]
    output = ["--output", str(tmp_path / "run"), "--training.num_steps"]

    def refused(*arguments: object) -> str:
        with pytest.raises(SystemExit) as ended:
            main(["train", str(config), *settings, *map(str, arguments)])
        assert ended.value.code == 2
        return capsys.readouterr().err

    assert dry_run(capsys, config, *settings, *output, 2)[0] == f"start:    a new run in {tmp_path / 'run'}"
    with pytest.raises(SystemExit):
        main(["train", str(config), *settings, *output, "2"])
    before, last = tree(tmp_path), tmp_path / "run/checkpoints/step_00000002"
    assert dry_run(capsys, config, *settings, *output, 2)[-1].endswith("already trained to step 2; nothing to do")
    printed = dry_run(capsys, config, *settings, *output, 3)
    assert printed[0] == f"start:    resumes from {last} in {tmp_path / 'run'}"
    assert printed[-1].startswith("trial:    3 real steps")
    # Stands for test_text_to_image_checkpointing of diffusers' examples (--resume_from_checkpoint).
    for place in (
        "latest",
        last,
        last / "model.safetensors",
        last.parent,
        tmp_path / "run",
        tmp_path / "run/log.jsonl",
    ):
        assert dry_run(capsys, config, *settings, *output, 3, "--resume", str(place))[0] == printed[0], place
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes/a.txt").touch()
    for bad, message in [
        ([*output, 3, "--resume", "never"], "contains a run"),
        ([*output, 3, "--resume", tmp_path / "notes"], "expected auto, latest, never, RUN, or RUN/checkpoints/step_"),
        ([*output, 3, "--training.seed", 1], "training.seed: 0 -> 1"),
        ([*output, 1], "past training.num_steps = 1"),
        (["--output", tmp_path / "notes"], "contains files that are not a run"),
        (["--resume", last], "required: --output"),
    ]:
        assert message in refused(*bad, "--dry-run")
    (tmp_path / "notes/a.txt").unlink()
    (tmp_path / "notes").rmdir()
    assert tree(tmp_path) == before
    with RunFolder(tmp_path / "run").locked():
        assert "another process is training" in refused(*output, 3, "--dry-run")


@pytest.mark.parametrize("absent", ["nothing", "vae", "latents"])
def test_dry_run_looks_into_the_class_folders(absent: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = make_inputs(tmp_path)
    if absent == "vae":
        shutil.rmtree(tmp_path / "vae")
    arguments = ["--data.latents", str(tmp_path / "latents")] if absent == "latents" else []
    shutil.rmtree(tmp_path / "data" / "train" / "star")
    with pytest.raises(SystemExit) as ended:
        main(["train", str(config), "--dry-run", *arguments])
    assert ended.value.code == 2
    assert "the data set has 2 (circle, square)" in capsys.readouterr().err
    (tmp_path / "data" / "train" / "star").mkdir()
    (tmp_path / "data" / "train" / "star" / "1.svg").touch()
    with pytest.raises(SystemExit) as ended:
        main(["train", str(config), "--dry-run", *arguments])
    assert ended.value.code == 2
    assert "class 'star' has no images (found: 1 .svg)" in capsys.readouterr().err


def test_utilisation_of_a_known_gpu() -> None:
    config = load_config(ROOT / "configs/imagenet256/sit-xl-2.yaml")
    # 711.7 GFLOPs an image, forward and backward, over 495 TFLOP/s in tf32
    assert utilisation(config, 100, "NVIDIA H100 80GB HBM3") == " (MFU 14.4% of H100)"
    assert utilisation(config, 100, "some other") == ""


@pytest.mark.parametrize(
    ("option", "value", "named"),
    [
        ("--sampling.sampler", "ode-hune", "ode-heun"),
        ("--evaluation.extractor", "resnet", "effnet-lite0"),
        ("--model.backbone", "vitt5", "vit5"),
        ("--model.backbone_kwargs", "{gama_init: 1}", "gamma_init"),
        ("--data.resolution", "260", "resolution"),
        ("--training.micro_batch_size", "3", "must divide"),
        ("--data.source", "emojis", "emoji"),
    ],
)
def test_dry_run_refuses_bad_values(option: str, value: str, named: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["train", str(ROOT / "configs/imagenet256/vit5-s-2.yaml"), "--dry-run", option, value])
    assert ended.value.code == 2
    message = capsys.readouterr().err
    assert named in message
    assert len(message.splitlines()) == 1


@pytest.mark.parametrize(
    ("file", "num_processes"), [("one_gpu", 1), ("eight_gpus", 8), ("two_nodes", 16), ("fsdp2", 8)]
)
def test_accelerate_reads_its_configurations(file: str, num_processes: int) -> None:
    config = load_config_from_file(str(ROOT / f"configs/accelerate/{file}.yaml"))
    assert config.num_processes == num_processes
    if file == "fsdp2":
        assert config.fsdp_config["fsdp_version"] == 2
