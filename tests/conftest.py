"""One thread a test process and no GPU, whatever the machine has; fixtures for training.

Spinning threads make a loaded machine several times slower, and the processes that accelerate forks hang with more.
On a GPU the bits that many tests compare depend on the batch.
"""

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the configuration of a complete tiny run, whose latents are encoded once in a session."""
    from tiny_run import make_inputs

    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT5GEN_CACHE", str(folder / "cache"))
        yield make_inputs(folder)
