"""The plugs that docs/extending.md writes down, and packages that offer plugs."""

import importlib.metadata
import pickle
import re
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from vit5gen.config import DataConfig
from vit5gen.data.images import SOURCES, open_images
from vit5gen.evaluation.metric import METRICS
from vit5gen.registry import Registry
from vit5gen.system.errors import UserError

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text()


def load(section: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Import the code of a section of the page."""
    code = re.findall(r"```python\n(.*?)```", PAGE.split(f"\n## {section}\n")[1], re.S)[0]
    (tmp_path / f"plug_{section.lower()}.py").write_text(code)
    monkeypatch.syspath_prepend(tmp_path)
    for registry in (SOURCES, METRICS):
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
    assert images.digest() != open_images(data, "test").digest()
    with pytest.raises(UserError, match=r"source_kwargs: 'delimeter' is not an option .* Did you mean 'delimiter'"):
        open_images(data.model_copy(update={"source_kwargs": {"delimeter": ";"}}))
    with pytest.raises(UserError, match=r"data.source: 'cvs' is not known; .* Did you mean 'csv'"):
        open_images(data.model_copy(update={"source": "cvs"}))


def test_the_metric_of_the_page_is_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    load("Metric", tmp_path, monkeypatch)
    assert METRICS.build("mean-shift", {"scale": "1e-2"}, "metric").scale == 0.01


def test_a_broken_package_is_named_and_hinders_nobody_else(monkeypatch: pytest.MonkeyPatch) -> None:
    entries = [
        importlib.metadata.EntryPoint("broken", "no_such_module:Plug", "group"),
        importlib.metadata.EntryPoint("twice", "torch:nn", "group"),
        importlib.metadata.EntryPoint("twice", "torch:optim", "group"),
    ]

    def entry_points(group: str, **params: str) -> importlib.metadata.EntryPoints:
        return importlib.metadata.EntryPoints(entries).select(group=group, **params)

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    registry: Registry = Registry("plug", "group")
    registry.register("own")(torch.add)
    assert registry.names() == ["own", "broken", "twice"]
    assert registry.get("own") is torch.add
    with pytest.raises(UserError, match=r"'broken' of the package no_such_module cannot be imported .*ModuleNotFound"):
        registry.get("broken")
    with pytest.raises(UserError, match=r"'twice' is offered by the packages"):
        registry.get("twice")
