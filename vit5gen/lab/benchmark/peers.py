"""Published repositories, imported from the folder into which a user has checked them out."""

import importlib
import importlib.machinery
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock, patch

import torch

from vit5gen.system.errors import UserError


class PeerError(UserError):
    """A folder that is not the peer it was given as."""


@dataclass(frozen=True)
class Repository:
    """A repository on GitHub, and how to recognise a checkout: files, each with a name that it defines."""

    name: str
    files: dict[str, str]


SIT = Repository(
    "willisma/SiT",
    {"models.py": "SiT_models", "transport/__init__.py": "create_transport", "train.py": "update_ema"},
)
VIT5 = Repository("wangf3014/ViT-5", {"models_vit5.py": "vit5_small", "rope.py": "VisionRotaryEmbedding"})
# Imported by train.py of SiT, of no use to a training step.
_NEEDLESS = ("torchdiffeq", "wandb")


def load(repository: Repository, folder: Path) -> SimpleNamespace:
    """Run the repository's own code and return everything that the modules of its files define.

    Neither its folder nor its modules stay on Python's paths, nor what it sets of torch, and it registers no model with
    timm.
    Raises `PeerError` when it is no checkout, or needs a package that is not installed.
    """
    for name, text in repository.files.items():
        file = folder / name
        if not file.is_file() or text not in file.read_text(encoding="utf-8", errors="replace"):
            expected = f"expected a checkout of {repository.name}, with {text} in {name}"
            raise PeerError(f"peer folder {folder}: {expected}; {_advice(repository)}")
    with (
        warnings.catch_warnings(action="ignore"),
        patch("timm.models.registry.register_model", lambda function: function),
        _modules_of(folder.resolve()),
        ExitStack() as after,
        running(repository, folder),
    ):
        # SiT's train.py lowers the precision of fp32 products for GPUs.
        after.callback(torch.set_float32_matmul_precision, torch.get_float32_matmul_precision())
        after.callback(setattr, torch.backends.cudnn, "allow_tf32", torch.backends.cudnn.allow_tf32)
        modules = [importlib.import_module(Path(name).parts[0].removesuffix(".py")) for name in repository.files]
    found = SimpleNamespace(**{name: value for module in modules for name, value in vars(module).items()})
    for name in repository.files.values():
        if not hasattr(found, name):
            raise PeerError(f"peer folder {folder}: its code defines no {name}; {_advice(repository)}")
    return found


@contextmanager
def running(repository: Repository, folder: Path) -> Iterator[None]:
    """Turn whatever fails in a peer's code into a `PeerError`."""
    try:
        yield
    except PeerError:
        raise
    except ImportError as error:
        raise PeerError(f"peer folder {folder}: {error}; install the requirements of {repository.name}") from error
    except (Exception, SystemExit) as error:
        raise PeerError(f"peer folder {folder}: {error!r} in its code; {_advice(repository)}") from error


def check_equal(folder: Path, model: str, difference: float, of_what: str, tolerance: float) -> None:
    """Raise `PeerError` unless a peer's model computes what ours does with its weights; NaN is a difference."""
    if not difference <= tolerance:
        reason = f"its {model} differs from ours by {difference:.2g} {of_what}; expected the published model"
        raise PeerError(f"peer folder {folder}: {reason}")


def _advice(repository: Repository) -> str:
    return f"run `git clone https://github.com/{repository.name}` and pass that folder"


@contextmanager
def _modules_of(folder: Path) -> Iterator[None]:
    """Let names such as ``models`` and ``utils`` mean those of ``folder`` for a while."""
    # Others ask for a module's specification to know whether it is there.
    needless = {name: MagicMock(__spec__=importlib.machinery.ModuleSpec(name, None)) for name in _NEEDLESS}
    names = needless.keys() | {path.stem for path in folder.iterdir()}

    def take_out() -> dict[str, Any]:
        return {name: sys.modules.pop(name) for name in list(sys.modules) if name.split(".")[0] in names}

    hidden = take_out()
    sys.modules.update(needless)
    try:
        with patch.object(sys, "path", [str(folder), *sys.path]):
            yield
    finally:
        take_out()
        sys.modules.update(hidden)


def without_cuda() -> AbstractContextManager[object]:
    """Let ``tensor.cuda()``, which the published ViT-5 calls in its forward pass, return the tensor itself."""
    return patch.object(torch.Tensor, "cuda", lambda tensor: tensor)
