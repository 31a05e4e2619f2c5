"""The plug: registration, entry points, and the package that docs/extending.md writes down."""

import re
import tomllib
from pathlib import Path

import pytest
import torch
from test_models_transformer import batch, make
from torch import nn

from vit5gen.models import Backbone, SiTTransformer2DModel, backbone_names, register_backbone
from vit5gen.models.backbone import BACKBONES
from vit5gen.system.errors import UserError

PAGE = (Path(__file__).parents[1] / "docs" / "extending.md").read_text().split("## Backbone", 1)[1]


@pytest.fixture(autouse=True)
def registry(monkeypatch):
    monkeypatch.setattr(BACKBONES, "_known", dict(BACKBONES._known))


@pytest.fixture
def conv_package(tmp_path, monkeypatch):
    """Install the page's package: its module, and the metadata that an installer makes of its pyproject.toml."""
    (code,) = re.findall(r"`conv_backbone.py`:\n\n```python\n(.*?)```", PAGE, re.S)
    (toml,) = re.findall(r"```toml\n(.*?)```", PAGE, re.S)
    project = tomllib.loads(toml)["project"]
    assert len([line for line in code.splitlines() if line.strip()]) <= 30
    info = tmp_path / f"conv_backbone-{project['version']}.dist-info"
    info.mkdir()
    (tmp_path / "conv_backbone.py").write_text(code)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {project['name']}\nVersion: {project['version']}\n")
    lines = [f"{name} = {value}" for name, value in project["entry-points"]["vit5gen.backbones"].items()]
    (info / "entry_points.txt").write_text("\n".join(["[vit5gen.backbones]", *lines]))
    monkeypatch.syspath_prepend(tmp_path)
    yield
    monkeypatch.delitem(__import__("sys").modules, "conv_backbone", raising=False)


def test_installed_package_trains_and_round_trips(conv_package, tmp_path):
    assert {"conv", "sit", "vit5"} <= set(backbone_names())
    model = make("conv", activate=False, backbone_kwargs={"kernel_size": 5})
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(8):
        loss = (model(*batch()) - 1).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.5 * losses[0]
    model.save_pretrained(tmp_path / "saved")
    again = SiTTransformer2DModel.from_pretrained(tmp_path / "saved")
    assert torch.equal(again(*batch(height=12)), model(*batch(height=12)))
    _, hidden = model(*batch(), taps=(2,))
    assert hidden[2].shape == (3, 16, 48)
    assert model._no_split_modules == ["ConvBlock"]
    with pytest.raises(UserError, match=r"'kernel' is not an option of 'conv'; expected kernel_size"):
        make("conv", backbone_kwargs={"kernel": 5})


def test_decorator_and_the_plain_contract():
    @register_backbone("average")
    class Average(nn.Module):
        def __init__(self, hidden_size, num_layers, num_attention_heads, mlp_ratio, grid):
            super().__init__()
            self.built = grid

        def forward(self, tokens, conditioning, grid):
            assert tokens.shape[1] == grid[0] * grid[1]
            return tokens.mean(1, keepdim=True) + 0 * tokens + conditioning[:, None]

    model = make("average", sample_size=(8, 12))
    assert model.backbone.built == (4, 6)
    assert model(*batch(height=4)).shape == (3, 4, 4, 8)


def test_a_name_is_taken_once():
    with pytest.raises(UserError, match=r"'vit5' is already registered by vit5gen.models.vit5"):

        @register_backbone("vit5")
        class Other(Backbone):
            pass


def test_the_page_names_every_switch():
    import inspect

    from vit5gen.models.vit5 import ViT5Backbone

    options = [p.name for p in inspect.signature(ViT5Backbone).parameters.values() if p.kind is p.KEYWORD_ONLY]
    table = PAGE.split("the switches")[1].split("\n\n")[1]
    assert re.findall(r"`(\w+)`", " ".join(line.split("|")[1] for line in table.splitlines())) == options
    assert inspect.signature(ViT5Backbone).parameters["gamma_init"].default == 1e-4


def test_the_first_example_runs():
    code = re.findall(r"```python\n(.*?)```", PAGE, re.S)[0]
    names: dict = {}
    with torch.device("meta"):
        exec(code, names)
    assert names["model"].config.backbone_kwargs == {"gamma_init": 1.0}
