"""Fonts for labels in any script: DejaVu Sans, which comes with matplotlib, then whatever the system has."""

import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import matplotlib
from matplotlib.ft2font import FT2Font
from PIL import ImageFont, features


def plain_font(size: int) -> ImageFont.FreeTypeFont:
    """Return DejaVu Sans: Latin, Greek, Cyrillic, Arabic, symbols and the older emoji."""
    return ImageFont.truetype(_dejavu(), size)


def write_as(text: str, instead: str, size: int) -> tuple[str, ImageFont.FreeTypeFont]:
    """Return ``text`` and the first font here that has all of its characters; where none has, ``instead``."""
    characters = frozenset(map(ord, text))
    # Only raqm joins letters, orders them from right to left, and sets marks on others.
    plain = all(unicodedata.bidirectional(c) not in ("R", "AL") and unicodedata.category(c) != "Mn" for c in text)
    for path in _fonts() if plain or features.check("raqm") else ():
        if characters <= _characters(path):
            try:
                return text, ImageFont.truetype(path, size)
            except OSError:  # pictures of a fixed size, such as colour emoji
                continue
    return instead, plain_font(size)


def _dejavu() -> str:
    return str(Path(matplotlib.get_data_path(), "fonts", "ttf", "DejaVuSans.ttf"))


def _fonts() -> Iterator[str]:
    """Yield DejaVu Sans, then the system's fonts, upright and regular ones first."""
    yield _dejavu()
    from matplotlib import font_manager  # which lists the fonts of the system when it is imported first

    styles = ("bold", "italic", "oblique", "mono", "serif", "condensed")
    yield from sorted(font_manager.findSystemFonts(), key=lambda path: (any(s in path.lower() for s in styles), path))


@cache
def _characters(path: str) -> frozenset[int]:
    try:
        return frozenset(FT2Font(path).get_charmap())
    except (OSError, RuntimeError):
        return frozenset()
