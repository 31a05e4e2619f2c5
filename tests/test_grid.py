"""The labelled grid: its places, its titles in any script, what its metadata tell, and its bytes."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from vit5gen.generation import fonts
from vit5gen.generation.fonts import write_as
from vit5gen.generation.grid import save_grid


def test_rows_are_titled_classes(tmp_path: Path) -> None:
    images = torch.randint(0, 256, (5, 3, 16, 16), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    for name in ("a.png", "b.png"):
        labels = [7, 2, 7, 7, 2]
        save_grid(tmp_path / name, images, labels, [{7: "flags", 2: "smileys"}[label] for label in labels])
    assert (tmp_path / "a.png").read_bytes() == (tmp_path / "b.png").read_bytes()
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape[0] == 4 + 2 * 100
    left = grid.shape[1] - 3 * 100
    for i, (row, column) in enumerate([(0, 0), (1, 0), (0, 1), (0, 2), (1, 1)]):
        tile = grid[4 + 100 * row :, left + 100 * column :][:96, :96]
        assert np.array_equal(tile, images[i].permute(1, 2, 0).numpy().repeat(6, 0).repeat(6, 1))
    for top in (4, 104):
        assert (grid[top : top + 96, :left] < 128).any(), "no title"
    assert (grid[104:200, -96:] == 255).all(), "a short row ends in white"


def test_single_images_stand_side_by_side(tmp_path: Path) -> None:
    images = torch.arange(7, dtype=torch.uint8).reshape(7, 1, 1, 1).expand(7, 3, 8, 8)
    save_grid(tmp_path / "a.png", images, list(range(7)), ["x"] * 7)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    assert grid.shape[0] == 4 + 3 * 100
    tiles = grid[52::100, grid.shape[1] // 3 - 52 :: grid.shape[1] // 3, 0]
    assert tiles.ravel().tolist() == [*range(7), 255, 255]


def test_long_titles_are_cut_and_large_images_kept(tmp_path: Path) -> None:
    save_grid(tmp_path / "a.png", torch.zeros(1, 3, 100, 80, dtype=torch.uint8), [0], ["long" * 100])
    width, height = Image.open(tmp_path / "a.png").size
    assert height == 108
    assert width < 500


def test_one_label_an_image(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="1 given, expected one for each of 2 images"):
        save_grid(tmp_path / "a.png", torch.zeros(2, 3, 4, 4, dtype=torch.uint8), [0], ["x"])


def test_many_images_of_a_label_go_on_in_the_next_row(tmp_path: Path) -> None:
    images = torch.arange(40, dtype=torch.uint8).reshape(40, 1, 1, 1).expand(40, 3, 8, 8)
    save_grid(tmp_path / "a.png", images, [0] * 20 + [1] * 20, ["x"] * 40)
    grid = np.asarray(Image.open(tmp_path / "a.png"))
    left = grid.shape[1] - 16 * 100
    tiles = grid[52::100, left + 48 :: 100, 0]
    assert tiles.shape == (4, 16)
    assert tiles[tiles < 255].tolist() == list(range(40))


def test_real_pictures_begin_a_row_below_the_caption(tmp_path: Path) -> None:
    images = torch.full((2, 3, 32, 32), 10, dtype=torch.uint8)
    real = {4: [torch.full((3, 32, 32), 90, dtype=torch.uint8)], 1: []}
    facts = ["step 3 of 8", "guidance 2", "ode-heun, 50 steps", "seed 0"]
    settings = {"step": 3, "classes": ["日本"]}
    save_grid(tmp_path / "a.png", images, [4, 1], ["a", "b"], real, facts, settings)
    picture = Image.open(tmp_path / "a.png")
    assert json.loads(picture.text["settings"]) == settings  # type: ignore[attr-defined]
    grid = np.asarray(picture)
    top = grid.shape[0] - 200
    assert (grid[top : top + 96, -100:-4] == 10).all()
    (columns,) = (grid[top + 48, :, 0] == 90).nonzero()
    assert len(columns) == 96
    assert columns[-1] < grid.shape[1] - 100
    assert not (grid[top + 100 :, columns[0] : columns[-1] + 1] == 90).any(), "the other class has none"
    assert (grid[: top - 20] < 128).any(), "no caption"


@pytest.mark.parametrize("name", ["smileys", "naïve café", "Ελληνικά", "Кириллица", "العربية", "😀"])
def test_titles_of_many_scripts_are_shown(name: str) -> None:
    text, font = write_as(name, "3", 20)
    assert text == name
    absent = np.asarray(font.getmask("\ufffe"))
    for letter in set(name):
        assert not np.array_equal(np.asarray(font.getmask(letter)), absent), f"{letter} is a box"


def test_a_script_that_no_font_shows_gives_way_to_the_id(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", list)
    for name in ("日本語", "mixed 花", "two\nlines"):
        assert write_as(name, "3", 20)[0] == "3"
    monkeypatch.setattr("PIL.features.check", lambda feature: False)
    assert write_as("العربية", "3", 20)[0] == "3", "its letters would stand apart and in reverse"
    assert write_as("Ελληνικά", "3", 20)[0] == "Ελληνικά"


def test_a_font_of_the_system_serves_where_the_own_lacks_letters(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "broken.ttf").write_bytes(b"no font")
    own, known = fonts._dejavu(), fonts._characters
    other = str(Path(own).with_name("DejaVuSansMono.ttf"))
    monkeypatch.setattr("matplotlib.font_manager.findSystemFonts", lambda: [other, str(tmp_path / "broken.ttf")])
    monkeypatch.setattr(fonts, "_characters", lambda path: frozenset() if path == own else known(path))
    text, font = write_as("abc", "3", 20)
    assert (text, font.path) == ("abc", other)
