"""Generators that ship with the package: each a folder of a pipeline, which `scripts/ship.py` has made of a run."""

from pathlib import Path

from vit5gen.system.errors import choose

FOLDER = Path(__file__).parents[1] / "shipped"


def shipped_names() -> list[str]:
    """Return the names of the generators that ship."""
    return sorted(index.parent.name for index in FOLDER.glob("*/model_index.json"))


def shipped(name: str) -> str:
    """Return the folder of a generator that ships, for ``from_pretrained``; raise `UserError` for another name."""
    return str(FOLDER / choose("shipped generator", name, shipped_names()))
