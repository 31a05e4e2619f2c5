"""Many images: labels, noise, processes, kills, outputs, cards and conversion."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import time
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import PartialState, debug_launcher
from called import call_sample
from diffusers import AutoencoderKL
from PIL import Image
from tiny import NAMES, tiny_autoencoder, tiny_pipeline, tiny_transformer

from vit5gen import SiTPipeline, SiTScheduler
from vit5gen.config import SamplingConfig
from vit5gen.generation.many import SamplingJob, draw_labels, generate, image_generator
from vit5gen.generation.outputs import Output, open_output
from vit5gen.generation.scheduler import SAMPLERS
from vit5gen.system.errors import UserError

FAST = SamplingConfig(sampler="sde-euler", num_inference_steps=3, guidance_scale=1.5)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    tiny_pipeline().save_pretrained(folder / "pipeline")
    return folder


def draw(checkpoint: Path, output: Path, **options: object) -> None:
    arguments = {"num_images": 23, "seed": 3, "batch_size": 5, "settings": FAST, **options}
    call_sample(checkpoint, output, **arguments)


def launched(*arguments: object, **options: object) -> None:
    """Run `draw` in a process that was forked from one that may have a state of its own."""
    PartialState._reset_state()
    draw(*arguments, **options)


# --- labels and noise


def test_labels_are_fixed_by_the_seed_balanced_and_shuffled() -> None:
    labels = draw_labels(103, range(10), seed=1, mode="balanced")
    assert labels == draw_labels(103, range(10), seed=1, mode="balanced")
    assert labels != draw_labels(103, range(10), seed=2, mode="balanced")
    assert sorted(Counter(labels).values()) == [10] * 7 + [11] * 3
    assert labels != sorted(labels)
    assert set(draw_labels(20, [7, 3], seed=1, mode="balanced")) == {3, 7}
    random_labels = draw_labels(10_000, range(10), seed=1, mode="random")
    counts = np.bincount(random_labels, minlength=10)
    assert len(set(counts)) > 1
    assert abs(counts - 1000).max() < 150
    with pytest.raises(UserError, match="labels: 'ordered'"):
        draw_labels(1, [0], 0, "ordered")


def test_every_image_has_noise_of_its_own() -> None:
    first = [torch.rand((), dtype=torch.float64, generator=image_generator(0, i)).item() for i in range(20_000)]
    assert len(set(first)) == len(first)
    assert torch.equal(*(torch.randn(3, generator=image_generator(5, 7)) for _ in range(2)))
    assert not torch.equal(
        torch.randn(3, generator=image_generator(5, 7)), torch.randn(3, generator=image_generator(7, 5))
    )


def test_image_depends_on_its_seed_index_and_label_alone() -> None:
    pipe, labels = tiny_pipeline(), draw_labels(23, range(5), 3, mode="balanced")
    batches = [
        torch.cat([images for _, images in generate(pipe, SamplingJob(labels, 3, size, FAST))]).int()
        for size in (23, 5, 1)
    ]
    for other in batches[1:]:
        # another batch size: kernels may round otherwise
        assert (other - batches[0]).abs().max() <= 1
        assert (other != batches[0]).float().mean() <= 1e-3
    changed = [label if i != 4 else (label + 1) % 5 for i, label in enumerate(labels)]
    images = torch.cat([images for _, images in generate(pipe, SamplingJob(changed, 3, 5, FAST))]).int()
    differs = (images != batches[1]).flatten(1).any(1)
    assert differs.nonzero().flatten().tolist() == [4]


def test_generate_leaves_out_what_is_done_and_restores_the_bar() -> None:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=True, desc="mine")
    done = np.array([True] * 4 + [False] * 2 + [True] * 3)
    parts = [indices for indices, _ in generate(pipe, SamplingJob([0] * 9, 0, 3, FAST), done)]
    assert parts == [range(3, 6)]
    assert pipe._progress_bar_config == {"disable": True, "desc": "mine"}


# --- processes and kills


@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_one_and_two_processes_give_the_same_bytes(checkpoint: Path, tmp_path: Path, name: str) -> None:
    draw(checkpoint, tmp_path / "one" / name)
    debug_launcher(launched, (checkpoint, tmp_path / "two" / name), num_processes=2)
    one, two = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.suffix in (".png", ".npz")}
        for root in (tmp_path / "one", tmp_path / "two")
    )
    assert one == two
    assert len(one) == (1 if name == "out.npz" else 23)
    cards = [json.loads(next((tmp_path / n).rglob("*card.json")).read_text()) for n in ("one", "two")]
    assert [card["run"].pop("num_processes") for card in cards] == [1, 2]
    assert cards[0] == cards[1]


@pytest.mark.parametrize("name", ["out.npz", "out.png", "out"])
def test_killed_runs_go_on_where_they_stopped(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    draw(checkpoint, tmp_path / "whole" / name, batch_size=2)
    moments, target = random.Random(0), tmp_path / "killed" / name
    write, seen = Output.write, multiprocessing.get_context("fork").Queue()

    def slow(self: Output, indices: range, *arguments: object) -> None:
        seen.put(indices.start)
        write(self, indices, *arguments)
        time.sleep(0.05)

    monkeypatch.setattr(Output, "write", slow)
    for _ in range(3):
        process = multiprocessing.get_context("fork").Process(
            target=launched, args=(checkpoint, target), kwargs={"batch_size": 2}
        )
        process.start()
        seen.get(timeout=60)
        time.sleep(moments.uniform(0, 0.2))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        assert not (tmp_path / "killed" / "out.card.json").exists()
    part = open_output(target, (23, 16, 16, 3)).part
    done = np.fromfile(part / "evaluations", dtype="<u4") > 0
    assert done.any()
    assert not done.all()
    drawn: list[int] = []
    monkeypatch.setattr(
        Output, "write", lambda self, indices, *rest: (drawn.extend(indices), write(self, indices, *rest))
    )
    draw(checkpoint, target, batch_size=2)
    assert not set(drawn) & set(np.flatnonzero(done))
    assert not part.exists()
    whole, killed = (
        {file.relative_to(root): file.read_bytes() for file in root.rglob("*") if file.is_file()}
        for root in (tmp_path / "whole", tmp_path / "killed")
    )
    assert whole == killed


def test_kill_while_the_hidden_folder_is_removed(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "out.npz"
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda folder: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            draw(checkpoint, target)
    (tmp_path / ".out.npz.part" / "evaluations").unlink()
    before = target.read_bytes()
    monkeypatch.setattr("vit5gen.generation.many.generate", None)
    draw(checkpoint, target)
    assert target.read_bytes() == before
    assert sorted(file.name for file in tmp_path.iterdir()) == ["out.card.json", "out.npz"]


@pytest.mark.parametrize("name", ["out.npz", "out"])
def test_kill_before_the_card_is_written(checkpoint: Path, tmp_path: Path, name: str) -> None:
    target = open_output(tmp_path / name, (3, 16, 16, 3))
    target.part.mkdir(parents=True)
    draw(checkpoint, target.path, num_images=3)
    assert target.finished


def test_batch_size_may_change_on_resume(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write, target = Output.write, tmp_path / "out.npz"

    def fail(self: Output, indices: range, *arguments: object) -> None:
        if indices.start >= 10:
            raise OSError(28, "No space left on device")
        write(self, indices, *arguments)

    with monkeypatch.context() as patch:
        patch.setattr(Output, "write", fail)
        with pytest.raises(UserError, match="No space left on device; images drawn so far are kept"):
            draw(checkpoint, target)
    assert not target.exists()
    draw(checkpoint, target, batch_size=4)
    draw(checkpoint, tmp_path / "whole.npz")
    resumed, whole = (np.load(tmp_path / name)["arr_0"].astype(int) for name in ("out.npz", "whole.npz"))
    assert np.array_equal(resumed[:8], whole[:8])
    assert abs(resumed - whole).max() <= 1


# --- outputs and cards


def test_npz_is_in_adms_form(checkpoint: Path, tmp_path: Path) -> None:
    draw(checkpoint, tmp_path / "out.npz")
    file = np.load(tmp_path / "out.npz", allow_pickle=False)
    images, labels = file["arr_0"], file["arr_1"]
    assert images.shape == (23, 16, 16, 3)
    assert images.dtype == np.uint8
    assert labels.tolist() == draw_labels(23, range(5), 3, mode="balanced")
    pipe = SiTPipeline.from_pretrained(checkpoint / "pipeline")
    expected = pipe(labels[5:10], generator=[image_generator(3, i) for i in range(5, 10)], **FAST.model_dump()).images
    assert np.array_equal(images[5:10], np.stack(expected))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out.card.json", "out.npz"]


def test_folder_and_grid(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("out.npz", "out.png", "folder"):
        draw(checkpoint, tmp_path / name, classes=["retriever", 4, 0])
    images, labels = (np.load(tmp_path / "out.npz")[key] for key in ("arr_0", "arr_1"))
    assert set(labels) == {0, 4}
    files = sorted((tmp_path / "folder").glob("*.png"))
    assert [file.name for file in files] == [f"{i:06d}_{label}.png" for i, label in enumerate(labels)]
    assert np.array_equal(images, np.stack([np.asarray(Image.open(file)) for file in files]))
    assert (tmp_path / "folder" / "card.json").is_file()
    grid = np.asarray(Image.open(tmp_path / "out.png"))
    first = grid[4 : 4 + 96, -12 * 100 : -12 * 100 + 96][::6, ::6]
    assert np.array_equal(first, images[labels == 0][0])
    card = json.loads((tmp_path / "out.png.card.json").read_text())
    told = card["settings"] | {"checkpoint_sha256": card["checkpoint_sha256"]}
    for file, more in ((tmp_path / "out.png", {}), (files[3], {"index": 3, "label": int(labels[3])})):
        assert json.loads(Image.open(file).text["settings"]) == told | more  # type: ignore[attr-defined]


def test_rows_of_a_grid_come_in_the_order_of_the_classes_that_are_given(checkpoint: Path, tmp_path: Path) -> None:
    for name in ("out.npz", "out.png"):
        draw(checkpoint, tmp_path / name, classes=[4, 0])
    images, labels = (np.load(tmp_path / "out.npz")[key] for key in ("arr_0", "arr_1"))
    grid = np.asarray(Image.open(tmp_path / "out.png"))
    for row, label in enumerate((4, 0)):
        first = grid[4 + 100 * row :, -12 * 100 :][:96, :96][::6, ::6]
        assert np.array_equal(first, images[labels == label][0])


def test_outputs_of_one_name_have_cards_of_their_own(checkpoint: Path, tmp_path: Path) -> None:
    draw(checkpoint, tmp_path / "out.npz")
    draw(checkpoint, tmp_path / "out.png", seed=4)
    seeds = [json.loads((tmp_path / f"out.{kind}card.json").read_text())["settings"]["seed"] for kind in ("", "png.")]
    assert seeds == [3, 4]


def test_what_is_no_output_is_refused_before_any_image(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.npz").mkdir()
    with pytest.raises(UserError, match=r"out.npz is a folder"):
        draw(checkpoint, tmp_path / "out.npz")
    (tmp_path / "folder.card.json").mkdir()
    with pytest.raises(UserError, match=r"folder.card.json is a folder"):
        draw(checkpoint, tmp_path / "folder.npz")
    (tmp_path / "list.card.json").write_text("[]")
    with pytest.raises(UserError, match=r"list.card.json contains a list; expected an object"):
        draw(checkpoint, tmp_path / "list.npz")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder.card.json", "list.card.json", "out.npz"]


def test_card(checkpoint: Path, tmp_path: Path) -> None:
    draw(checkpoint, tmp_path / "out.npz", labels="random")
    card = json.loads((tmp_path / "out.card.json").read_text())
    settings = card["settings"]
    assert {key: settings[key] for key in ("num_images", "seed", "labels")} == {
        "num_images": 23,
        "seed": 3,
        "labels": "random",
    }
    assert settings["sampler"] == "sde-euler"
    assert settings["scheduler"]["last_step"] == "mean"
    assert settings["precision"] == "fp32"
    assert len(card["checkpoint_sha256"]) == 64
    assert card["versions"]["torch"] == torch.__version__
    assert card["run"]["batch_size"] == 5
    # three steps and the last one, guided: two evaluations each
    assert card["network_evaluations"] == {"total": 23 * 8, "per_image": 8.0}


def test_finished_output_is_left_alone(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    draw(checkpoint, tmp_path / "out.npz")
    before = {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}
    monkeypatch.setattr("vit5gen.generation.many.generate", None)
    draw(checkpoint, tmp_path / "out.npz", batch_size=7)
    assert before == {file: (file.read_bytes(), file.stat().st_mtime_ns) for file in tmp_path.iterdir()}


@pytest.mark.parametrize("name", ["out.npz", "out.png", "out"])
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"seed": 4}, "seed is 3 in the card, 4 now"),
        ({"num_images": 24}, "num_images is 23 in the card, 24 now"),
        ({"classes": [1]}, r"classes is \[0, 1, 2, 3, 4\] in the card, \[1\] now"),
        (
            {"settings": SamplingConfig(sampler="sde-euler", num_inference_steps=4)},
            "num_inference_steps is 3 in the card",
        ),
        ({"precision": "bf16"}, "precision is 'fp32' in the card"),
    ],
)
def test_output_of_another_run_is_refused_and_untouched(
    checkpoint: Path, tmp_path: Path, name: str, options: dict, message: str
) -> None:
    draw(checkpoint, tmp_path / name)
    before = {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}
    with pytest.raises(UserError, match=message):
        draw(checkpoint, tmp_path / name, **options)
    assert before == {file: file.read_bytes() for file in tmp_path.rglob("*") if file.is_file()}


def test_output_of_another_checkpoint_is_refused(checkpoint: Path, tmp_path: Path) -> None:
    draw(checkpoint, tmp_path / "out.npz")
    SiTPipeline(tiny_transformer(seed=8), SiTScheduler(), tiny_autoencoder()).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match="checkpoint_sha256 is"):
        draw(tmp_path / "other", tmp_path / "out.npz")
    draw(checkpoint, tmp_path / "neighbour.npz", seed=9)  # only the card of that very output counts


def test_files_without_a_card_are_not_overwritten(checkpoint: Path, tmp_path: Path) -> None:
    (tmp_path / "out.npz").write_bytes(b"mine")
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "photo.png").write_bytes(b"mine")
    for name in ("out.npz", "folder"):
        with pytest.raises(UserError, match="exists and has no card"):
            draw(checkpoint, tmp_path / name)
    assert (tmp_path / "out.npz").read_bytes() == b"mine"
    (tmp_path / "empty").mkdir()
    draw(checkpoint, tmp_path / "empty")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_images": 0}, "num-images = 0"),
        ({"batch_size": 0}, "batch-size = 0"),
        ({"seed": -1}, "seed = -1"),
        ({"classes": ["retreiver"]}, "Did you mean"),
        ({"labels": "ordered"}, "labels = 'ordered'"),
        ({"precision": "fp8"}, "precision = 'fp8'"),
        ({"autoguidance_scale": float("nan")}, "autoguidance-scale = nan"),
        ({"guide": "weak"}, r"guide: has no effect at autoguidance_scale = 1"),
        ({"guide": "weak", "autoguidance_scale": 2.0}, "weak is neither a run nor a pipeline folder"),
        ({"settings": SamplingConfig(sampler="ode-hen")}, "Did you mean 'ode-heun'"),
    ],
)
def test_bad_values_leave_nothing_behind(checkpoint: Path, tmp_path: Path, options: dict, message: str) -> None:
    for name in ("out.npz", "out"):
        with pytest.raises(UserError, match=message):
            draw(checkpoint, tmp_path / name, **options)
    assert not list(tmp_path.iterdir())


def test_bad_outputs(checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"expected FILE\.npz, FILE\.png or a folder"):
        draw(checkpoint, tmp_path / "out.jpg")
    with pytest.raises(UserError, match="too many for a grid"):
        draw(checkpoint, tmp_path / "out.png", num_images=3000)
    monkeypatch.setattr(shutil, "disk_usage", lambda folder: shutil._ntuple_diskusage(10, 10, 1000))
    with pytest.raises(UserError, match=r"out\.npz needs 3\.5e-05 GB, 1e-06 GB are free; free some"):
        draw(checkpoint, tmp_path / "out.npz")
    with pytest.raises(UserError, match="neither a run nor a pipeline folder"):
        draw(tmp_path, tmp_path / "out.npz")
    assert not list(tmp_path.iterdir())


def test_launcher_that_starts_one_process_only(
    checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ACCELERATE_MIXED_PRECISION", "no")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with pytest.raises(UserError, match="ACCELERATE_USE_CPU=true accelerate launch --multi_gpu"):
        draw(checkpoint, tmp_path / "out.npz")


@pytest.mark.parametrize("options", [{"precision": "bf16"}, {"precision": "tf32"}, {"compile": True}])
def test_fast_paths(
    checkpoint: Path,
    tmp_path: Path,
    options: dict,
    monkeypatch: pytest.MonkeyPatch,
    request: pytest.FixtureRequest,
    capsys: pytest.CaptureFixture[str],
) -> None:
    warnings: list[str] = []
    monkeypatch.setattr("diffusers.models.modeling_utils.logger.warning", warnings.append)
    monkeypatch.setattr("vit5gen.system.cpu.has_bf16", lambda: False)
    request.addfinalizer(lambda: torch.set_float32_matmul_precision("highest"))
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: setattr(self, "_compiled_call_impl", self._call_impl))
    settings = SamplingConfig(num_inference_steps=2, sampler="ode-euler")
    draw(checkpoint, tmp_path / "plain.npz", settings=settings)
    draw(checkpoint, tmp_path / "fast.npz", settings=settings, **options)
    plain, fast = (np.load(tmp_path / f"{name}.npz")["arr_0"].astype(int) for name in ("plain", "fast"))
    assert ("slower than fp32 on this CPU" in capsys.readouterr().out) is ("bf16" in options.values())
    assert not warnings
    assert abs(plain - fast).max() <= (8 if "bf16" in options.values() else 1)


def test_autoguidance(checkpoint: Path, tmp_path: Path) -> None:
    weak = SiTPipeline(tiny_transformer(seed=8), SiTScheduler())
    weak.save_pretrained(tmp_path / "weak")
    options = {"settings": FAST, "batch_size": 23, "autoguidance_scale": 2.5}
    draw(checkpoint, tmp_path / "out.npz", guide=tmp_path / "weak", **options)
    pipe = SiTPipeline.from_pretrained(checkpoint / "pipeline", guide=weak.transformer)
    labels = draw_labels(23, range(5), 3, mode="balanced")
    generators = [image_generator(3, i) for i in range(23)]
    expected = pipe(labels, generator=generators, autoguidance_scale=2.5, **FAST.model_dump()).images
    assert np.array_equal(np.load(tmp_path / "out.npz")["arr_0"], np.stack(expected))
    card = json.loads((tmp_path / "out.card.json").read_text())
    assert card["settings"]["autoguidance_scale"] == 2.5
    assert card["network_evaluations"]["per_image"] == 12  # four steps: with label, without, and the weaker one's
    SiTPipeline(tiny_transformer(seed=9), SiTScheduler()).save_pretrained(tmp_path / "weaker")
    with pytest.raises(UserError, match="guide_sha256 is"):
        draw(checkpoint, tmp_path / "out.npz", guide=tmp_path / "weaker", **options)
    pipe.save_pretrained(tmp_path / "both")  # a folder may bring its guide
    draw(tmp_path / "both", tmp_path / "both.npz", **options)
    assert (tmp_path / "both.npz").read_bytes() == (tmp_path / "out.npz").read_bytes()
    with pytest.raises(UserError, match="needs a second transformer"):
        draw(checkpoint, tmp_path / "other.npz", **options)


def test_a_foreign_scheduler_in_the_folder(tmp_path: Path) -> None:
    from diffusers import FlowMatchEulerDiscreteScheduler

    pipe = tiny_pipeline()
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    pipe.save_pretrained(tmp_path / "pipeline")
    draw(tmp_path, tmp_path / "out.npz", settings=SamplingConfig(num_inference_steps=3))
    card = json.loads((tmp_path / "out.card.json").read_text())
    assert card["settings"]["sampler"] is None
    assert card["settings"]["scheduler"]["_class_name"] == "FlowMatchEulerDiscreteScheduler"
    assert card["network_evaluations"]["per_image"] == 3
    with pytest.raises(UserError, match="sampler = 'sde-euler': the scheduler is FlowMatchEulerDiscreteScheduler"):
        draw(tmp_path, tmp_path / "other.npz")


def _measure(folder: Path, count: int, peak: object) -> None:
    PartialState._reset_state()
    settings = SamplingConfig(sampler="ode-euler", num_inference_steps=1)
    call_sample(folder, folder / f"{count}.npz", num_images=count, seed=0, batch_size=32, settings=settings)
    # Not getrusage's maximum, which a process inherits from the one that started it.
    status = Path("/proc/self/status").read_text()
    peak.value = int(status.split("VmHWM:")[1].split()[0]) * 1024  # type: ignore[attr-defined]


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # What is freed is given back at once: peaks of equal runs differ by up to 90 MB otherwise.
    monkeypatch.setenv("MALLOC_MMAP_THRESHOLD_", "65536")
    monkeypatch.setenv("MALLOC_ARENA_MAX", "1")
    vae = AutoencoderKL(
        down_block_types=["DownEncoderBlock2D"] * 6,
        up_block_types=["UpDecoderBlock2D"] * 6,
        block_out_channels=[2] * 6,
        norm_num_groups=1,
        layers_per_block=1,
        latent_channels=4,
        mid_block_add_attention=False,
    )
    pipe = SiTPipeline(tiny_transformer(), SiTScheduler(), vae, id2label=NAMES)
    assert pipe.image_size == (256, 256)
    pipe.save_pretrained(tmp_path)
    context, peaks = multiprocessing.get_context("spawn"), []
    for count in (32, 500, 2000):
        peak = context.Value("d", 0.0)
        process = context.Process(target=_measure, args=(tmp_path, count, peak))
        process.start()
        process.join()
        assert process.exitcode == 0
        peaks.append(peak.value)
    slope = (peaks[2] - peaks[1]) / 1500
    print(f"peak {[f'{peak / 1e6:.0f} MB' for peak in peaks]} at 32, 500, 2000 images; {slope / 1e3:.2f} kB an image")
    assert peaks[2] - peaks[0] < 50e6
    assert peaks[0] + 50_000 * slope < 1e9 + peaks[0]


def test_the_documentation_lists_all_samplers() -> None:
    text = Path(__file__).parent.with_name("docs").joinpath("sampling.md").read_text()
    assert all(f"`{sampler}`" in text for sampler in SAMPLERS.names())
