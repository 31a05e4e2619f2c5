import importlib
import sys
from pathlib import Path

import pytest
import timm
import torch
from benchmark_peers import write_sit, write_vit5

from vit5gen.lab.benchmark.peers import SIT, VIT5, load, without_cuda
from vit5gen.models import ViT5
from vit5gen.system.errors import UserError


def test_a_peer_leaves_nothing_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mine = importlib.import_module("json")
    monkeypatch.setitem(sys.modules, "utils", mine)
    monkeypatch.setitem(sys.modules, "models", mine)
    path, modules, precision = list(sys.path), set(sys.modules), torch.get_float32_matmul_precision()
    convolutions = torch.backends.cudnn.allow_tf32
    sit, vit5 = load(SIT, write_sit(tmp_path / "sit")), load(VIT5, write_vit5(tmp_path / "vit5"))
    assert callable(sit.update_ema)
    assert sys.path == path
    assert torch.get_float32_matmul_precision() == precision
    assert torch.backends.cudnn.allow_tf32 is convolutions
    assert sys.modules["utils"] is sys.modules["models"] is mine
    own = {"models", "models_vit5", "rope", "train", "transport", "transport.transport", "wandb", "wandb_utils"}
    assert not own & (set(sys.modules) - modules)
    assert type(timm.create_model("vit5_small")) is ViT5
    assert isinstance(vit5.vit5_small(32), ViT5)


def test_what_it_imports_of_others_stays(tmp_path: Path) -> None:
    folder = write_sit(tmp_path)
    sys.modules.pop("this", None)
    (folder / "models.py").write_text("import this\n" + (folder / "models.py").read_text())
    load(SIT, folder)
    assert "this" in sys.modules  # taken out, it would be imported twice


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    folder = write_vit5(tmp_path)
    (folder / "rope.py").write_text("import no_such_package\nclass VisionRotaryEmbedding: pass\n")
    with pytest.raises(UserError, match="no_such_package"):
        load(VIT5, folder)


def test_cuda_means_here_only_within() -> None:
    before, x = torch.Tensor.cuda, torch.zeros(1)
    with without_cuda():
        assert x.cuda() is x
    assert torch.Tensor.cuda is before
