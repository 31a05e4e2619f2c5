"""The page of `vit5gen demo` as its visitors meet it: headless Chromium draws, stops, morphs and is refused."""

import io
import re
import signal
import subprocess
import sys
from base64 import b64decode
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pytest
from browser import Visitor
from launch import environment, free_ports
from PIL import Image
from tiny import tiny_pipeline

from vit5gen.cli import main

if TYPE_CHECKING:
    from playwright.sync_api import Page

pytestmark = pytest.mark.slow
# Runs a command, and reports on standard error what it calls on other machines.
WATCHED = """
import sys

def watch(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo"):
        host = arguments[1] if event == "socket.connect" else arguments[0]
        host = host[0] if isinstance(host, tuple) else host
        if host not in (None, "", "localhost", "127.0.0.1"):
            print("foreign:", event, host, file=sys.stderr, flush=True)

sys.addaudithook(watch)
from vit5gen.cli import main
main(sys.argv[1:])
"""
HOSTILE = "<img src=http://example.invalid/x onerror=alert(1)>${1+1}"
NAMES = {0: "cat", 1: "dog", 2: HOSTILE, 3: "7", 4: "bird"}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo") / "tiny"
    pipe = tiny_pipeline()
    pipe.register_to_config(id2label=NAMES, attribution=HOSTILE)
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def url(folder: Path) -> Iterator[str]:
    """Yield the page's address; Ctrl-C must end it quietly while it draws, and it must not call other machines."""
    command = [sys.executable, "-c", WATCHED, "demo", str(folder), "--port", str(free_ports(1)[0])]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(command, env=environment(), text=True, **pipes) as process:
        try:
            line = process.stdout.readline()
            assert line, process.stderr.read()
            yield re.fullmatch(r"(http://127\.0\.0\.1:\d+/) \(Ctrl-C ends\)\n", line)[1]
        finally:
            process.send_signal(signal.SIGINT)
            printed, errors = process.communicate(timeout=60)
    assert (process.returncode, printed, errors) == (0, "", "")


def fill(page: "Page", **values: object) -> None:
    for label, value in values.items():
        page.get_by_label(label.replace("_", " "), exact=True).fill(str(value))


def press(page: "Page", name: str) -> None:
    page.get_by_role("button", name=name, exact=True).click()


def wait(page: "Page", progress: str) -> None:
    """Wait until the line of progress matches a pattern."""
    page.wait_for_function(f"/{progress}/.test(document.querySelector('#progress textarea, #progress input').value)")


def pictures(page: "Page") -> np.ndarray:
    """Return the pixels (B, H, W, 3) of the images on the page."""
    sources = [image.get_attribute("src") for image in page.locator(".pictures img").all()]
    return np.stack([np.array(Image.open(io.BytesIO(b64decode(source.split(",")[1])))) for source in sources])


def code(page: "Page", label: str) -> str:
    return page.locator(f"#{label} .cm-content").inner_text()


def test_draws_what_its_code_draws(visitor: Visitor, url: str) -> None:
    page = visitor.open(url, width=400, dark=True)
    for name in ("dog", HOSTILE):
        page.get_by_label("Classes").fill(name[:20])
        page.get_by_role("option", name=name).click()
    fill(page, Images=3, Steps=1500, Seed=7)
    press(page, "Draw")
    wait(page, "^step ")
    early = pictures(page)
    wait(page, "^took ")
    drawn = pictures(page)
    assert early.shape == drawn.shape == (3, 16, 16, 3)
    assert not np.array_equal(early, drawn)
    assert page.locator("figure", has_text=HOSTILE).count() in (1, 2)
    assert page.evaluate("document.documentElement.scrollWidth") <= 400
    exec(code(page, "python"), found := {})
    assert np.array_equal(np.stack(found["images"]), drawn)
    assert "--num-inference-steps 1500" in code(page, "command")


def test_morphs(visitor: Visitor, url: str) -> None:
    page = visitor.open(url)
    page.get_by_role("tab", name="Morph").click()
    page.get_by_label("To", exact=True).fill("do")
    page.get_by_role("option", name="dog").click()
    fill(page, Frames=5, Steps=4)
    press(page, "Morph")
    wait(page, "^took ")
    assert page.locator("figcaption").all_inner_texts() == ["0%", "25%", "50%", "75%", "100%"]
    exec(code(page, "python"), found := {})
    assert np.array_equal(np.stack(found["images"]), pictures(page))
    assert "--morph cat dog --frames 5" in " ".join(code(page, "command").split())


def test_stops_while_a_second_visitor_waits(visitor: Visitor, url: str) -> None:
    first, second = visitor.open(url), visitor.open(url)
    fill(first, Steps=100_000)
    fill(second, Steps=3, Images=2)
    press(first, "Draw")
    wait(first, "^step ")
    press(second, "Draw")
    press(second, "Stop")  # its own, not the other's
    wait(first, "^step [0-9]{3}")
    assert second.locator(".pictures img").count() == 0
    press(first, "Stop")
    wait(first, "^stopped after step [0-9]+ of 100000$")
    wait(second, "^took ")
    assert len(pictures(second)) == 2


def test_a_visitor_who_leaves_makes_way(visitor: Visitor, url: str) -> None:
    first, second = visitor.open(url), visitor.open(url)
    fill(first, Steps=100_000)
    press(first, "Draw")
    wait(first, "^step ")
    first.close()
    press(second, "Draw")
    wait(second, "^took ")


def test_refuses_in_the_words_of_the_pipeline(visitor: Visitor, url: str) -> None:
    page = visitor.open(url)
    fill(page, Steps=0)
    press(page, "Draw")
    toast = page.get_by_text("num_inference_steps = 0; expected a whole number of at least 1")
    toast.wait_for()
    fill(page, Steps=2)
    press(page, "Draw")
    wait(page, "^took ")


def test_a_port_that_is_taken(url: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    port = url.rstrip("/").rpartition(":")[2]
    with pytest.raises(SystemExit) as ended:
        main(["demo", str(folder), "--port", port])
    assert ended.value.code == 2
    assert f"error: port {port} is in use" in capsys.readouterr().err


def test_ctrl_c_ends_it_while_it_draws(visitor: Visitor, url: str) -> None:
    page = visitor.open(url)  # the last test: the fixture's end is what is tested
    fill(page, Steps=100_000)
    press(page, "Draw")
    wait(page, "^step ")
