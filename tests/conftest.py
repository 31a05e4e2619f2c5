"""One thread a test process and no GPU, whatever the machine has; fixtures for training and for pages.

Spinning threads make a loaded machine several times slower, and the processes that accelerate forks hang with more.
On a GPU the bits that many tests compare depend on the batch.
"""

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    from browser import Visitor
    from playwright.sync_api import Browser

os.environ |= {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}


@pytest.fixture(scope="session")
def config_file(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield the configuration of a complete tiny run, whose latents are encoded once in a session."""
    from tiny_run import make_inputs

    folder = tmp_path_factory.mktemp("tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VIT5GEN_CACHE", str(folder / "cache"))
        yield make_inputs(folder)


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    """Yield a headless Chromium; skip where there is none."""
    from browser import start_browser

    with start_browser() as browser:
        yield browser


@pytest.fixture
def visitor(browser: "Browser") -> Iterator["Visitor"]:
    """Yield what opens pages (``visitor.open(url, width, height, dark)``); their faults fail the test at its end."""
    from browser import Visitor

    yield (visitor := Visitor(browser))
    for context in browser.contexts:
        context.close()
    assert not visitor.faults
