"""Headless Chromium that is Debian's, driven by playwright: pages that must not fail, nor ask another machine."""

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

import pytest

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")
LOCAL = ("127.0.0.1", "localhost")


@contextmanager
def start_browser() -> Iterator["Browser"]:
    """Yield a headless Chromium that resolves no name of another machine; skip the test where there is none."""
    program = next(filter(None, map(shutil.which, PROGRAMS)), None)
    if program is None:
        pytest.skip("no chromium on this machine; Debian: apt-get install chromium")
    if find_spec("playwright") is None:
        pytest.skip('playwright is not installed: pip install "vit5gen[dev]"')
    from playwright.sync_api import sync_playwright

    closed = "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1"
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage", closed]
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=program, args=arguments)
        yield browser
        browser.close()


class Visitor:
    """Opens pages and collects what they do wrong: errors in the console, exceptions, requests to other machines."""

    def __init__(self, browser: "Browser") -> None:
        self.browser, self.faults = browser, list[str]()

    def open(self, url: str, width: int = 1600, height: int = 900, dark: bool = False, **options: Any) -> "Page":
        """Return a page of this width and height in pixels, in a context of its own, that has loaded ``url``."""
        scheme = "dark" if dark else "light"
        page = self.browser.new_context(
            viewport={"width": width, "height": height}, color_scheme=scheme, **options
        ).new_page()
        page.set_default_timeout(60_000)
        page.on("console", lambda message: self._note("console", message.text, message.type == "error"))
        page.on("pageerror", lambda error: self._note("exception", str(error)))
        page.on("request", lambda request: self._note("request", request.url, not is_local(request.url)))
        page.on("websocket", lambda socket: self._note("websocket", socket.url, not is_local(socket.url)))
        page.goto(url)
        return page

    def _note(self, kind: str, what: str, wrong: bool = True) -> None:
        if wrong:
            self.faults.append(f"{kind}: {what}")


def is_local(url: str) -> bool:
    """Whether a request for this URL stays on this machine."""
    parts = urlsplit(url)
    return parts.scheme in ("file", "data", "blob", "about") or parts.hostname in LOCAL
