"""docs/training.md: the table of memory is computed, and the launch files that it lists exist."""

import re
from pathlib import Path

import pytest

from vit5gen.config import load_config
from vit5gen.training import cost
from vit5gen.training.dry_run import run_cost

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/training.md").read_text()


def test_the_memory_table_is_computed() -> None:
    bf16 = {"training.precision": "bf16"}
    recomputed = bf16 | {"training.gradient_checkpointing": True}
    columns = [({}, False), (bf16, False), (recomputed, False), (recomputed, True)]
    rows = re.findall(r"^\| (\w+)/2 \|(.*)\|$", PAGE, flags=re.MULTILINE)
    assert [size for size, _ in rows] == ["S", "B", "L", "XL"]
    for size, cells in rows:
        for cell, (changes, sharded) in zip(cells.split("|"), columns, strict=True):
            config = load_config(ROOT / f"configs/imagenet256/vit5-{size.lower()}-2.yaml", changes)
            computed = cost.memory_bytes(run_cost(config), config, 32, 8, sharded) / 1e9
            assert float(cell) == pytest.approx(computed, rel=0.005)


def test_the_launch_files_are_those_of_the_table() -> None:
    listed = re.findall(r"^\| `(\w+\.yaml)`", PAGE, flags=re.MULTILINE)
    assert sorted(listed) == sorted(file.name for file in ROOT.glob("configs/accelerate/*.yaml"))
