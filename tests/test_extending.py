"""The plugs that docs/extending.md writes down, and packages that offer plugs."""

import functools
import importlib.metadata
import json
import os
import pickle
import re
import subprocess
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
import yaml
from PIL import Image
from safetensors.torch import load_file
from tiny_run import make_inputs

from vit5gen.config import Config, DataConfig
from vit5gen.data.images import SOURCES, make_source, open_images
from vit5gen.evaluation import Extractor, load_extractor, metrics
from vit5gen.evaluation.features import EXTRACTORS
from vit5gen.evaluation.metric import METRICS
from vit5gen.registry import Registry, import_modules
from vit5gen.section import validate
from vit5gen.system.errors import UserError
from vit5gen.training.dry_run import describe_plugs

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "extending.md").read_text()


def load(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the code of a section of the page."""
    code = re.findall(r"```python\n(.*?)```", PAGE.split(f"\n## {section}\n")[1], re.S)[0]
    (tmp_path / f"plug_{section.lower()}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (SOURCES, EXTRACTORS, METRICS):
        monkeypatch.setattr(registry, "_known", dict(registry._known))
    monkeypatch.delitem(sys.modules, f"plug_{section.lower()}", raising=False)
    __import__(f"plug_{section.lower()}")


def test_the_source_of_the_page_opens_a_csv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("Source", tmp_path, monkeypatch)
    for number, color in enumerate(("red", "lime")):
        Image.new("RGB", (20, 16), color).save(tmp_path / f"{number}.png")
    (tmp_path / "set.csv").write_text("file;label;split\n1.png;dog;train\n0.png;cat;train\n0.png;cat;test\n")
    data = DataConfig(
        source="csv", source_kwargs={"delimiter": ";"}, path=str(tmp_path / "set.csv"), resolution=8, num_classes=2
    )
    images = open_images(data)
    assert (images.class_names, images.labels.tolist()) == (["cat", "dog"], [1, 0])
    assert pickle.loads(pickle.dumps(images))[0][0][:, 0, 0].tolist() == [0, 255, 0]  # noqa: S301
    assert len(open_images(data, "test")) == 1
    assert make_source(data).image_bytes() == sum((tmp_path / f"{i}.png").stat().st_size for i in range(2))
    assert images.digest() != open_images(data, "test").digest()
    with pytest.raises(UserError, match=r"source_kwargs: 'delimeter' is not an option .* Did you mean 'delimiter'"):
        open_images(data.model_copy(update={"source_kwargs": {"delimeter": ";"}}))
    with pytest.raises(UserError, match=r"data.source: 'cvs' is not known; .* Did you mean 'csv'"):
        open_images(data.model_copy(update={"source": "cvs"}))


def test_the_metric_of_the_page_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("Metric", tmp_path, monkeypatch)
    assert METRICS.build("mean-shift", {"scale": "1e-2"}, "metric").scale == 0.01
    assert METRICS.get("mean-shift").feature_bytes(50_000, 10_000, 2048) == 0  # it streams


def test_the_dry_run_tells_what_the_extractor_and_the_metrics_of_the_page_cost(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    load("Extractor", tmp_path, monkeypatch)
    load("Metric", tmp_path, monkeypatch)
    sections = {
        "model": {"preset": "S/2"},
        "data": {"source": "folder", "path": str(tmp_path), "resolution": 64},
        "training": {"num_steps": 100},
        "evaluation": {"every": 30, "num_images": 2**20, "num_reference": 10**6, "extractor": "random-conv"},
    }
    config = validate(Config, sections, "test")
    flops = 2 * 16 * 3 * 5**2 * 30**2  # of one convolution, at 30 x 30 places
    assert load_extractor("random-conv", "meta").flops(64) == flops
    rows = f"{4 * 16 * (2**20 + 10**6) / 1e9:.3g} GB"
    assert describe_plugs(config, make_source(config.data)) == [
        "evaluate: 5 x 1,048,576 images at most, <0.01 G FLOPs each in random-conv",
        f"metrics:  features of these and of 1,000,000 real images: pr {rows}, kid {rows}, dc {rows}",
    ]  # at steps 0, 30, 60, 90 and 100
    monkeypatch.setattr(METRICS, "_known", {})
    monkeypatch.setattr(Extractor, "flops", lambda self, side: self.network.weight.sum().item())
    (line,) = describe_plugs(config, make_source(config.data))
    where = "FLOPs not counted on torch's meta device"
    assert line.startswith(f"evaluate: 5 x 1,048,576 images at most, in random-conv ({where}: Tensor.item() cannot be")


def test_a_broken_package_is_named_and_hinders_nobody_else(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        importlib.metadata.EntryPoint("broken", "no_such_module:Plug", "group"),
        importlib.metadata.EntryPoint("exits", "antigravity_that_exits:Plug", "group"),
        importlib.metadata.EntryPoint("number", "math:pi", "group"),
        importlib.metadata.EntryPoint("own too", "math:floor", "group"),
        importlib.metadata.EntryPoint("twice", "torch:nn", "group"),
        importlib.metadata.EntryPoint("twice", "torch:optim", "group"),
    ]

    def entry_points(group: str, **params: str) -> importlib.metadata.EntryPoints:
        return importlib.metadata.EntryPoints(entries).select(group=group, **params)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    registry: Registry = Registry("plug", "group")
    registry.register("own")(torch.add)
    registry.register("own too")(torch.add)
    assert registry.names() == ["own", "own too", "broken", "exits", "number", "twice"]
    assert registry.get("own") is torch.add
    with pytest.raises(UserError, match=r"'broken' of the package no_such_module cannot be imported .*ModuleNotFound"):
        registry.get("broken")
    with pytest.raises(UserError, match=r"'twice' is offered by the packages"):
        registry.get("twice")
    with pytest.raises(UserError, match=r"'own too' is offered by the packages math and torch"):
        registry.get("own too")
    with pytest.raises(
        UserError, match=r"'number' of the package math cannot be imported \(TypeError: it is neither a class"
    ):
        registry.get("number")
    (tmp_path / "antigravity_that_exits.py").write_text("import sys\nsys.exit(0)\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match=r"'exits' of the package .* cannot be imported \(SystemExit: 0\)"):
        registry.get("exits")


def test_a_package_may_offer_what_its_inner_module_defines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by its entry point again and again, and no function or class."""
    entry = importlib.metadata.EntryPoint("relay", "torch.nn.functional:relu", "group")
    monkeypatch.setattr(
        importlib.metadata, "entry_points", lambda **params: importlib.metadata.EntryPoints([entry]).select(**params)
    )
    registry: Registry = Registry("plug", "group")
    assert registry.get("relay") is registry.get("relay") is torch.nn.functional.relu
    registry.register("part")(functools.partial(torch.add))
    with pytest.raises(UserError, match=r"'part' is already registered by functools; rename yours"):
        registry.register("part")(functools.partial(torch.mul))


def test_a_table_without_a_group_looks_into_no_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "entry_points", None)
    table: Registry = Registry("table")
    table.register("one")(torch.add)
    assert table.get("one") is torch.add
    assert table.names() == ["one"]


def test_two_packages_that_offer_one_plug_are_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("first", "second"):
        folder = tmp_path / f"{name}-1.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (folder / "entry_points.txt").write_text("[vit5gen.tests]\nsame = torch:add\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(UserError, match="'same' is offered by the packages first and second"):
        Registry("plug", "vit5gen.tests").get("same")


def test_the_kinds_of_options_that_a_checker_alone_can_read_are_those_of_the_defaults() -> None:
    registry: Registry = Registry("plug")
    code = "from __future__ import annotations\ndef plug(*, size: Unknown = 3, alpha: Unknown = 0.5): pass\n"
    names: dict = {"__name__": "plugs"}
    exec(compile(code, "plugs", "exec"), names)
    registry.register("plug")(names["plug"])
    assert registry.check("plug", {"alpha": "1e-4"}, "where") == {"alpha": 1e-4}
    with pytest.raises(UserError, match=r"where: size.* = 'x'"):
        registry.check("plug", {"size": "x"}, "where")


def test_a_module_in_the_folder_is_a_plug_and_no_other_file_names_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(METRICS, "_known", dict(METRICS._known))
    code = re.findall(r"```python\n(.*?)```", PAGE.split("\n## Metric\n")[1], re.S)[0]
    (tmp_path / "a_mean_shift.py").write_text(code)
    monkeypatch.setattr(metrics, "__path__", [*metrics.__path__, str(tmp_path)])
    import_modules(metrics.__name__)
    added = ["class-fd", "cmmd", "dc", "fd-infinity", "fdr6", "recognised", "mean-shift"]
    assert METRICS.registered() == ["fid", "sfid", "is", "pr", "kid", *added]  # the order of a card, then its own
    for kind in ("data.sources", "evaluation.extractors", "evaluation.metrics", "training.objectives", "models"):
        folder = ROOT / "vit5gen" / kind.replace(".", "/")
        assert "import_modules(__name__" in (folder / "__init__.py").read_text()


def test_options_that_cannot_be_read_or_checked_are_refused() -> None:
    registry: Registry = Registry("plug")
    registry.register("mapping")(dict)
    with pytest.raises(UserError, match=r"plug: 'mapping' does not tell its arguments; register a class or function"):
        registry.check("mapping", {}, "where")

    def hidden(*, _a: int = 1) -> None: ...

    registry.register("hidden")(hidden)
    with pytest.raises(UserError, match=r"plug: 'hidden' has the option '_a'; rename it"):
        registry.check("hidden", {"_a": 2}, "where")


PACKAGE = {
    "Source": ("vit5gen.sources", "csv", "CsvSource"),
    "Extractor": ("vit5gen.extractors", "random-conv", "random_conv"),
    "Metric": ("vit5gen.metrics", "mean-shift", "MeanShift"),
    "Objective": ("vit5gen.objectives", "look-ahead", "LookAhead"),
    "A backbone of your own": ("vit5gen.backbones", "conv", "ConvBackbone"),
}


@pytest.mark.slow
def test_a_package_with_one_of_each_plug_trains_resumes_samples_and_evaluates(tmp_path: Path) -> None:
    # The page is the package, plug by plug; no decorator registers anything, the entry points do.
    source, tables = tmp_path / "package", ""
    source.mkdir()
    for number, (section, (group, name, plug)) in enumerate(PACKAGE.items()):
        code = re.findall(r"```python\n(.*?)```", re.split(rf"\n##+ {section}\n", PAGE)[1], re.S)[0]
        (source / f"plug_{number}.py").write_text(re.sub(r"^@register_.*\n", "", code, flags=re.M))
        tables += f'[project.entry-points."{group}"]\n{name} = "plug_{number}:{plug}"\n'
    modules = [f"plug_{number}.py" for number in range(len(PACKAGE))]
    (source / "pyproject.toml").write_text(
        '[build-system]\nrequires = ["hatchling"]\nbuild-backend = "hatchling.build"\n'
        f'[project]\nname = "plugs"\nversion = "1"\n{tables}'
        f"[tool.hatch.build.targets.wheel]\nonly-include = {modules}\n"
    )
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(tmp_path / "site")]
    subprocess.run([*pip, str(source)], check=True)

    # Pictures in a CSV, and a run that uses everything.
    config = yaml.safe_load(make_inputs(tmp_path).read_text())
    lines = ["file,label,split"]
    for file in sorted((tmp_path / "data").rglob("*.png")):
        split, label, _ = file.relative_to(tmp_path / "data").parts
        lines.append(f"{file.relative_to(tmp_path)},{label},{split}")
    (tmp_path / "set.csv").write_text("\n".join(lines))
    config["data"] |= {"source": "csv", "path": str(tmp_path / "set.csv")}
    config["model"] |= {"backbone": "conv", "backbone_kwargs": {"kernel_size": 5}}
    config["training"] |= {"num_steps": 12, "checkpoint_every": 3, "ema_decays": [0.9]}
    config["training"]["objectives"] = {"flow": {}, "look-ahead": {"weight": 0.5, "early": 1, "late": 2}}
    config["evaluation"]["extractor"] = "random-conv"
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))

    def command(*words: object, until: Path | None = None, output: Path | None = None) -> None:
        variables = {"PYTHONPATH": f"{tmp_path / 'site'}:{ROOT}", "VIT5GEN_CACHE": str(tmp_path / "cache")}
        argv = [sys.executable, "-c", "from vit5gen.cli import main; main()", *map(str, words)]
        with nullcontext() if output is None else output.open("w") as printed:
            process = subprocess.Popen(argv, env=os.environ | variables, stdout=printed)
        while until is not None and process.poll() is None and not until.exists():
            time.sleep(0.01)
        if until is not None:
            process.kill()
        assert (process.wait() == 0) or until is not None

    run, killed = tmp_path / "whole", tmp_path / "killed"
    command("train", tmp_path / "run.yaml", "--dry-run", output=tmp_path / "printed")
    told = (tmp_path / "printed").read_text()
    assert re.search(r"^data: .* GB of images in csv\nevaluate: .* G FLOPs each in random-conv\nmetrics: ", told, re.M)
    command("train", tmp_path / "run.yaml", "--output", run)
    command("train", tmp_path / "run.yaml", "--output", killed, until=killed / "checkpoints/step_00000006")
    command("train", tmp_path / "run.yaml", "--output", killed)
    for name in ("model", "objectives", "objectives_ema_0.9", "optimizer"):
        one, other = (load_file(of / f"checkpoints/step_00000012/{name}.safetensors") for of in (run, killed))
        assert one.keys() == other.keys()
        assert all(torch.equal(value, other[key]) for key, value in one.items()), name
    command("sample", "--checkpoint", run, "--num-images", 6, "--output", tmp_path / "six.npz")
    words = ["--reference", tmp_path / "run.yaml", "--extractor", "random-conv", "--metrics", "fid"]
    words += ["mean-shift: {scale: 1e-2}"]
    command("evaluate", tmp_path / "six.npz", *words, "--output", tmp_path / "card.json")
    metrics = json.loads((tmp_path / "card.json").read_text())["metrics"]
    assert set(metrics) == {"FD-RandomConv", "shift-RandomConv"}
    assert json.loads((tmp_path / "card.json").read_text())["metric_options"] == {"mean-shift": {"scale": 0.01}}
    assert "FD-RandomConv" in (run / "metrics.json").read_text()
