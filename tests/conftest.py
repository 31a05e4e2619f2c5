"""One thread a test process (a loaded machine with spinning threads is several times slower); fixtures for training."""

import os
from pathlib import Path

import pytest

os.environ.setdefault("OMP_NUM_THREADS", "1")


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return the configuration of a complete tiny run."""
    from tiny_run import make_inputs

    return make_inputs(tmp_path_factory.mktemp("tiny"))


@pytest.fixture
def fresh_accelerate(config_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forget the accelerator of an earlier test; encode latents once in a session."""
    from accelerate.state import AcceleratorState, GradientState

    monkeypatch.setenv("VIT5GEN_CACHE", str(config_file.parent / "cache"))
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
