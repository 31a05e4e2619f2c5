"""The browser of the tests notices what it is there for."""

from pathlib import Path

import pytest
from browser import Visitor

FAULTS = {
    "": "",
    "<script>console.error('spilt')</script>": "console: spilt",
    "<script>undefined_name</script>": "exception: undefined_name is not defined",
    "<img src='http://example.invalid/x.png'>": "request: http://example.invalid/x.png",
}


@pytest.mark.slow
@pytest.mark.parametrize("content", FAULTS, ids=["none", "console", "exception", "request"])
def test_faults_of_a_page_are_noticed(visitor: Visitor, tmp_path: Path, content: str) -> None:
    (tmp_path / "page.html").write_text(f"<!doctype html><title>page</title>{content}")
    page = visitor.open(f"file://{tmp_path}/page.html", width=400, dark=True)
    assert page.evaluate("innerWidth") == 400
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches")
    found, visitor.faults = visitor.faults, []
    assert any(FAULTS[content] in fault for fault in found) == bool(content)
