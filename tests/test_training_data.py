"""A run and its data: what a resume compares, what an earlier version recorded, training without the images."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from called import call_convert
from diffusers import AutoencoderKL
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_run import assert_identical, forget_processes, make_inputs, run, weights

from vit5gen.config import DEFAULTS_BEFORE, load_config, load_recorded, read_yaml
from vit5gen.data.encoding import encode_images
from vit5gen.lab.study.plan import Row
from vit5gen.report.history import floor_note
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256
from vit5gen.training.dry_run import missing, plan
from vit5gen.training.monitor import Monitor
from vit5gen.training.process import NONFINITE
from vit5gen.training.run_folder import differences


@pytest.fixture
def inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Yield the configuration of a run whose data and cache are this test's own; it takes no evaluations."""
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(Monitor, "due", lambda self, step: False)
    file = make_inputs(tmp_path)
    file.write_text(file.read_text().replace("log_every: 1", "log_every: 1\n  trackers: []"))
    return file


def slow(*values: Any) -> Any:
    return pytest.param(*values, marks=pytest.mark.slow)


def picture(file: Path, side: int = 16) -> None:
    Image.new("RGB", (side, side), "red").save(file)


def add(folder: Path) -> None:
    picture(folder / "data/train/star/new.png")


def resize(folder: Path) -> None:
    picture(folder / "data/train/star/3.png", 20)


def overwrite(folder: Path) -> None:
    """Change the pixels of an image whose file stays as long."""
    file = folder / "data/train/star/3.png"
    length = file.stat().st_size
    picture(file)
    file.write_bytes(file.read_bytes().ljust(length, b"\0"))


def rename_file(folder: Path) -> None:
    (folder / "data/train/star/3.png").rename(folder / "data/train/star/33.png")


def replace_autoencoder(folder: Path) -> None:
    vae = AutoencoderKL.from_pretrained(folder / "vae")
    vae.register_to_config(scaling_factor=0.5)
    vae.save_pretrained(folder / "vae")


@pytest.mark.parametrize(
    ("source", "change", "message"),
    [
        ("cache", add, "samples 21 -> 22; digest of other files or contents"),
        slow("cache", rename_file, "digest of other files or contents"),
        ("cache", overwrite, "digest of other files or contents"),
        slow("images", resize, "digest of other files or contents"),
        slow("images", replace_autoencoder, "autoencoder of other weights or scale"),
        slow("latents", add, "samples 21 -> 22; digest of other files or contents"),
    ],
)
def test_a_resume_on_other_data_is_refused_until_accepted(
    inputs: Path,
    tmp_path: Path,
    change: Callable[[Path], None],
    message: str,
    source: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    options: dict[str, Any] = {"data__from_images": True} if source == "images" else {}
    run(inputs, tmp_path / "run", training__num_steps=2, **options)
    change(tmp_path)
    if source == "latents":
        encode_images(load_config(inputs), tmp_path / "latents")
        options["data__latents"] = str(tmp_path / "latents")
    passing = (".lock", ".txt")  # the cache remembers digests
    files = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match=f"step_00000002 was made with other data: {message}") as raised:
        run(inputs, tmp_path / "run", training__num_steps=3, **options)
    assert "\n" not in str(raised.value)
    left = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file() and path.suffix not in passing}
    assert left == {
        path: content for path, content in files.items() if path.suffix not in passing
    }  # nothing is encoded
    # The checkpoint of another run is compared alike.
    older = str(tmp_path / "run/checkpoints/step_00000002")
    with pytest.raises(UserError, match="was made with other data"):
        run(inputs, tmp_path / "other", older, training__num_steps=3, **options)
    assert not (tmp_path / "other").exists()
    capsys.readouterr()
    assert run(inputs, tmp_path / "run", accept=True, training__num_steps=3, **options) == 0
    notes = [line for line in capsys.readouterr().out.splitlines() if line.startswith("note: resuming with")]
    assert len(notes) == message.count(";") + 1
    assert run(inputs, tmp_path / "run", training__num_steps=4, **options) == 0  # it knows the new data by now


@pytest.mark.slow
def test_images_that_break_on_the_way_are_noticed(inputs: Path, tmp_path: Path) -> None:
    options: dict[str, Any] = {"data__from_images": True, "data__on_broken_image": "skip", "data__rules": 1}
    run(inputs, tmp_path / "run", training__num_steps=2, **options)
    file = tmp_path / "data/train/star/3.png"
    file.write_bytes(bytes(file.stat().st_size))  # name and size stay, of which alone rules 1 know
    with pytest.raises(UserError, match="other data: broken 0 -> 1"):
        run(inputs, tmp_path / "run", training__num_steps=3, **options)


@pytest.mark.slow
@pytest.mark.parametrize("images", [True, False])
def test_latents_of_the_same_images_take_over(inputs: Path, tmp_path: Path, images: bool) -> None:
    run(inputs, tmp_path / "whole", training__num_steps=4)
    run(inputs, tmp_path / "parts", training__num_steps=2)
    encode_images(load_config(inputs), tmp_path / "latents")
    if not images:
        shutil.rmtree(tmp_path / "data")
    latents = {"data__latents": str(tmp_path / "latents")}
    assert run(inputs, tmp_path / "parts", training__num_steps=4, **latents) == 0
    assert_identical(weights(tmp_path / "whole", 4), weights(tmp_path / "parts", 4))


def make_old(run_folder: Path) -> None:
    """Take from a run what the version before did not record."""
    for folder in (run_folder, *(run_folder / "checkpoints").iterdir()):
        config = read_yaml(folder / "config.yaml")
        for dotted in DEFAULTS_BEFORE.keys() - {"data.num_classes"}:  # which every version recorded
            section, key = dotted.split(".")
            config[section].pop(key, None)
        config["training"]["checkpoint_every"] = 10_000
        (folder / "config.yaml").write_text(yaml.safe_dump(config))
        if (state := folder / "state.json").exists():
            content = json.loads(state.read_text())
            del content["data"]
            state.write_text(json.dumps(content))
            names = json.loads((folder / "checksums.json").read_text())
            (folder / "checksums.json").write_text(json.dumps({name: sha256(folder / name) for name in names}))
    (run_folder / "data.json").unlink()


def test_a_run_of_the_version_before_is_resumed_with_its_defaults(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = yaml.safe_load(inputs.read_text())
    del settings["training"]["checkpoint_every"]
    inputs.write_text(yaml.safe_dump(settings))
    run(inputs, tmp_path / "whole", training__num_steps=4)
    run(inputs, tmp_path / "old", training__num_steps=2)
    make_old(tmp_path / "old")
    (manifest,) = (tmp_path / "cache").glob("*/manifest.json")
    content = json.loads(manifest.read_text())
    del content["images_sha256"]
    manifest.write_text(json.dumps(content, indent=2) + "\n")
    before = manifest.stat().st_mtime_ns
    call_convert(tmp_path / "old", tmp_path / "pipeline")
    assert load_recorded(tmp_path / "old/config.yaml").training.checkpoint_minutes is None
    # A key whose default has changed, and which counts; the table knows others that this version may lack.
    monkeypatch.setitem(DEFAULTS_BEFORE, "flow.stratified", False)
    for name in ("old", "old/checkpoints/step_00000002"):
        text = (tmp_path / name / "config.yaml").read_text().replace("  stratified: false\n", "")
        (tmp_path / name / "config.yaml").write_text(text)
    sums = tmp_path / "old/checkpoints/step_00000002/checksums.json"
    sums.write_text(json.dumps({name: sha256(sums.parent / name) for name in json.loads(sums.read_text())}))
    with pytest.raises(UserError, match=r"flow\.stratified: False -> True"):
        run(inputs, tmp_path / "old", training__num_steps=4, flow__stratified=True)
    capsys.readouterr()
    assert run(inputs, tmp_path / "old", training__num_steps=3) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "does not record its data" in line]
    assert "step_00000002" in line
    assert run(inputs, tmp_path / "old", training__num_steps=4) == 0
    assert "does not record" not in capsys.readouterr().out
    assert_identical(weights(tmp_path / "whole", 4), weights(tmp_path / "old", 4))
    recorded = load_config(tmp_path / "old/config.yaml").training
    assert (recorded.checkpoint_every, recorded.checkpoint_minutes) == (10_000, None)
    assert manifest.stat().st_mtime_ns == before  # its latents are used as they are
    add(tmp_path)
    with pytest.raises(UserError, match="samples 21 -> 22"):
        run(inputs, tmp_path / "old", training__num_steps=5)


def test_a_row_of_the_version_before_keeps_its_defaults(inputs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    settings = load_config(inputs).model_dump(mode="json")
    del settings["flow"]["stratified"]
    monkeypatch.setitem(DEFAULTS_BEFORE, "flow.stratified", True)
    numbers: dict[str, Any] = dict.fromkeys(("seed", "steps", "parameters", "training_flops", "n"), 1)
    numbers |= dict.fromkeys(("loss", "held_out_loss", "distance", "floor", "seconds"), 1.0)
    row = Row(run="a", levels={}, commit="", metric="", settings=settings, **numbers)  # type: ignore[arg-type]
    assert row.settings.flow.stratified
    assert not differences(row.settings.model_dump(mode="json"), load_config(inputs), changeable=())
    other = load_config(inputs, {"flow.stratified": False})
    assert differences(row.settings.model_dump(mode="json"), other, changeable=()) == ["flow.stratified: True -> False"]


@pytest.mark.parametrize(("floor", "told"), [(2.0, False), (2.0001, False), (2.1, True), (None, True)], ids=str)
def test_an_evaluation_with_another_floor_than_the_last_says_so(floor: float | None, told: bool) -> None:
    earlier = [{"step": 0, "FD": {"value": 9.0, "floor": 1.0}}, {"step": 5, "FD": {"value": 9.0, "floor": 2.0}}]
    note = floor_note([*earlier, {"step": 6}], {"step": 7, "FD": {"value": 8.0, "floor": floor}})
    assert (note is not None and "but was 2.0 at step 5" in note) is told
    assert floor_note([], {"step": 7, "FD": {"value": 8.0, "floor": floor}}) is None


@pytest.mark.parametrize("change", [slow(None), add, slow(replace_autoencoder)])
def test_a_run_killed_before_its_first_checkpoint_keeps_no_evaluation_of_other_data(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: Callable[[Path], None] | None
) -> None:
    def killed(self: Monitor, outcome: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Monitor, "write", killed)
        with pytest.raises(KeyboardInterrupt):
            run(inputs, tmp_path / "run", training__num_steps=2)
    evaluated = {"evaluations": [{"step": 0, "FD": {"value": 1.0}}]}
    (tmp_path / "run/metrics.json").write_text(json.dumps(evaluated))
    if change is not None:
        change(tmp_path)
    assert run(inputs, tmp_path / "run", training__num_steps=2) == 0
    kept = json.loads((tmp_path / "run/metrics.json").read_text())
    assert kept == (evaluated if change is None else {"evaluations": []})


def test_latents_train_without_the_images(
    inputs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    config = load_config(inputs, {"data.latents": str(tmp_path / "latents")})
    encode_images(config, tmp_path / "latents")
    shutil.rmtree(tmp_path / "data")
    monkeypatch.undo()
    latents = {"data__latents": str(tmp_path / "latents")}
    assert run(inputs, tmp_path / "run", training__num_steps=2, **latents) == 0
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "no distance" in line]
    assert str(tmp_path / "data") in line
    assert json.loads((tmp_path / "run/metrics.json").read_text()) == {"evaluations": [{"step": 0}, {"step": 2}]}
    for file in ("samples.png", "loss.png", "pipeline/model_index.json"):
        assert (tmp_path / "run" / file).exists(), file
    assert missing(config) == {}
    forget_processes()
    plan(config, None, "auto", False)
    printed = capsys.readouterr().out
    assert f"not found ({tmp_path / 'data'})" in printed
    assert "3 real steps" in printed
    for keys, message in [
        ({"data__classes": ["square", "circle", "star"]}, r"made with classes \['circle', .*has \['square'"),
        ({"data__num_classes": 4}, "made with num_classes 3, the run has 4"),
    ]:
        with pytest.raises(UserError, match=message):
            run(inputs, tmp_path / "other", training__num_steps=2, **latents, **keys)
    assert missing(load_config(inputs)).keys() == {str(tmp_path / "data")}
    absent = load_config(inputs, {"data.latents": str(tmp_path / "nowhere")})
    assert missing(absent).keys() == {str(tmp_path / "data"), str(tmp_path / "nowhere")}


@pytest.mark.slow
def test_images_that_are_not_those_of_the_latents_are_told(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    encode_images(load_config(inputs), tmp_path / "latents")
    add(tmp_path)
    assert run(inputs, tmp_path / "run", training__num_steps=1, data__latents=str(tmp_path / "latents")) == 0
    assert "are of 21 images, but the data set has 22" in capsys.readouterr().out


def test_an_autoencoder_that_is_not_finite_is_blamed_for_losses_that_are_not(
    inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "vae/diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["quant_conv.bias"][0] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    options: dict[str, Any] = {"data__from_images": True, "training__max_nonfinite_steps": 2}
    assert run(inputs, tmp_path / "run", training__num_steps=5, **options) == NONFINITE
    printed = capsys.readouterr().out
    assert "are not finite: check these images and the weights of vae.name" in printed
    assert "learning_rate" not in printed
    # A run too short for the usual limit does not end as if it had learnt.
    assert run(inputs, tmp_path / "short", training__num_steps=1, data__from_images=True) == NONFINITE
