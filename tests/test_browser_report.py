"""report.html in a real browser: plots that tell their values, the slider, the keyboard, both themes, two widths."""

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
from browser import Visitor, start_browser
from made_run import METRIC, make_run

from vit5gen.report.report_page import build_report
from vit5gen.training.run_report import read_run

if TYPE_CHECKING:
    from playwright.sync_api import Browser

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def browser() -> Iterator["Browser"]:
    with start_browser() as browser:
        yield browser


@pytest.fixture(scope="module")
def pages(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write the page of a run, one.html, and that of two, two.html."""
    folder = tmp_path_factory.mktemp("pages")
    one, two = (read_run(make_run(config_file, folder / name, count)) for name, count in (("a", 3), ("b" * 90, 5)))
    (folder / "one.html").write_text(build_report([one]))
    (folder / "two.html").write_text(build_report([one, two]))
    return folder


def test_plots_tell_their_values_by_pointer_and_keyboard(browser: "Browser", pages: Path) -> None:
    visitor = Visitor(browser)
    page = visitor.open((pages / "one.html").as_uri())
    assert page.locator("figure.chart svg").count() == 5
    chart = page.locator(f'figure[data-chart="distance {METRIC}"]')
    told = chart.locator(":scope > output")
    assert told.inner_text() == f"step 20 · {METRIC} 200 · floor 100.1"
    box = chart.locator("svg").bounding_box()
    assert box is not None
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    assert told.inner_text() == f"step 10 · {METRIC} 250 · floor 100.125"
    chart.locator("svg").focus()
    page.keyboard.press("Home")
    assert told.inner_text() == f"step 0 · {METRIC} 333.333 · floor 100.125"
    page.keyboard.press("ArrowRight")
    assert chart.locator("svg").get_attribute("aria-valuetext") == f"step 10 · {METRIC} 250 · floor 100.125"
    assert chart.locator(".cursor circle").count() == 2
    assert visitor.faults == []


def test_the_slider_changes_the_samples_of_every_run(browser: "Browser", pages: Path) -> None:
    visitor = Visitor(browser)
    page = visitor.open((pages / "two.html").as_uri())
    shown = "filter(image => !image.hidden && image.naturalWidth)"
    steps = f"[...document.querySelectorAll('img[data-step]')].{shown}.map(image => image.dataset.step)"
    assert page.evaluate(steps) == ["20", "40"]
    page.locator("input[type=range]").focus()
    page.keyboard.press("ArrowLeft")
    assert page.evaluate(steps) == ["20", "30"]
    page.keyboard.press("Home")
    assert page.evaluate(steps) == ["0", "0"]
    assert page.locator(".slider output").inner_text() == "step 0"
    assert page.locator(".at").first.inner_text() == f"step 0 · {METRIC} 333.3"
    page.get_by_role("button", name="play").click()
    page.get_by_role("button", name="stop").wait_for()
    page.get_by_role("button", name="play").wait_for()  # again, at the end
    assert page.evaluate(steps) == ["20", "40"]
    assert visitor.faults == []


@pytest.mark.parametrize("width", [400, 1600])
@pytest.mark.parametrize("dark", [False, True])
def test_a_page_fits_its_window_in_both_themes(browser: "Browser", pages: Path, width: int, dark: bool) -> None:
    visitor = Visitor(browser)
    for name in ("one.html", "two.html"):
        page = visitor.open((pages / name).as_uri(), width, dark=dark)
        assert page.evaluate("document.documentElement.scrollWidth") == width
        ground = "getComputedStyle(document.body).backgroundColor"
        grounds = ["rgb(255, 255, 255)", "rgb(20, 24, 27)"]
        assert page.evaluate(ground) == grounds[dark]
        page.locator("#theme").click()
        assert page.evaluate(ground) == grounds[not dark]
    assert visitor.faults == []


def test_a_page_can_be_read_without_its_script(browser: "Browser", pages: Path) -> None:
    page = Visitor(browser).open((pages / "one.html").as_uri(), java_script_enabled=False)
    assert page.locator("img:visible").count() == 1
    assert page.locator("figure.chart svg:visible").count() == 5
    assert page.locator("button:visible, input:visible").count() == 0
    assert "above its floor" in page.locator(".verdict").inner_text()
