"""The labelled grid: its places, its titles and its bytes."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit5gen.generation.grid import save_grid


def test_rows_are_titled_classes(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name in ("a.png", "b.png"):
        save_grid(tmp_path / name, images, ["flags", "smileys", "flags", "flags", "smileys"])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape[0] == 4 + 2 * 68
    left = grid.shape[1] - 3 * 68
    for i, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (0, 2), (1, 1)]):
        tile = grid[4 + 68 * row :, left + 68 * column :][:64, :64]
        assert np.array_equal(tile, images[i].permute(1, 2, 0).numpy().repeat(4, 0).repeat(4, 1))
    for top in (4, 72):
        assert (grid[top : top + 64, :left] < 128).any(), "no title"
    assert (grid[72:136, -64:] == 255).all(), "a short row ends in white"


def test_long_titles_are_cut_and_large_images_kept(tmp_path: Path) -> None:
    save_grid(tmp_path / "a.png", torch.zeros(1, 3, 100, 80, dtype=torch.uint8), ["long" * 100])
    width, height = Image.open(tmp_path / "a.png").size
    assert height == 108
    assert width < 500


def test_one_label_an_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 given, expected one for each of 2 images"):
        save_grid(tmp_path / "a.png", torch.zeros(2, 3, 4, 4, dtype=torch.uint8), ["x"])


def test_many_images_of_a_label_go_on_in_the_next_row(tmp_path: Path) -> None:
    images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1).expand(40, 3, 8, 8)
    save_grid(tmp_path / "a.png", images, ["x"] * 20 + ["y"] * 20)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    left = grid.shape[1] - 16 * 68
    tiles = grid[36::68, left + 32 :: 68, 0]
    assert tiles.shape == (4, 16)
    assert tiles[tiles < 255].tolist() == list(range(40))
