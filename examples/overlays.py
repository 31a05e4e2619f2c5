"""Pictures of masks for segment.py: a colour for each class, laid over the image, and a legend of them."""

import colorsys
import itertools
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from pairs import read_rgb
from PIL import Image, ImageDraw
from torch import Tensor

from vit5gen.data.pictures import find_images
from vit5gen.generation.fonts import write_as
from vit5gen.system.errors import UserError, listed
from vit5gen.system.files import atomic

ROW = 20  # pixels of a line of the legend


def colours(classes: int) -> np.ndarray:
    """Return a colour for each class (K, 3) uint8: matplotlib's ten, or hues a golden section apart where more."""
    if classes <= 10:
        return np.array(colormaps["tab10"](range(classes), bytes=True)[:, :3])
    hues = [(i * 0.618034 % 1, 0.55 + 0.4 * (i % 2), 1 - 0.3 * (i % 3 == 2)) for i in range(classes)]
    return np.array([[round(255 * part) for part in colorsys.hsv_to_rgb(*hue)] for hue in hues], np.uint8)


def index_picture(classes: Tensor, palette: np.ndarray) -> Image.Image:
    """Return a picture whose pixels are the numbers of the classes (H, W), with the palette's colours."""
    picture = Image.fromarray(classes.cpu().numpy().astype(np.uint8))
    picture.putpalette(palette.tobytes())
    return picture


def overlay(image: Tensor, classes: Tensor, palette: np.ndarray) -> Image.Image:
    """Return an image (3, H, W) uint8 behind the colours of its classes (H, W)."""
    mixed = 0.4 * image.permute(1, 2, 0).cpu().numpy() + 0.6 * palette[classes.cpu().numpy()]
    return Image.fromarray(mixed.round().astype(np.uint8))


def legend(names: list[str], palette: np.ndarray) -> Image.Image:
    """Return the classes' numbers and names beside their colours, one a line."""
    picture = Image.new("RGB", (16 * ROW, ROW * len(names)), "white")
    draw = ImageDraw.Draw(picture)
    for i, name in enumerate(names):
        draw.rectangle((2, ROW * i + 2, 30, ROW * i + 17), tuple(palette[i].tolist()))
        text, font = write_as(f"{i} {name}", str(i), 13)
        draw.text((38, ROW * i + 2), text, "black", font)
    return picture


def write_masks(paths: list[Path], predict: Callable[[Tensor], Tensor], names: list[str], output: Path) -> None:
    """Write NAME.png (class numbers) and NAME.overlay.png of every image at these paths, and legend.png.

    predict: image (3, H, W) uint8 -> classes (H, W). Raises `UserError` where there are no images, where two would be
    one file, or where one of them would be written over.
    """
    files = [file for path in paths for file in (find_images(path, Counter(), 2) if path.is_dir() else [path])]
    if not files:
        raise UserError(f"--predict {listed(map(str, paths))}: no images there; give images, or folders of them")
    # All that will be written, before anything is: nothing twice, and nothing over an image that is to be read.
    written = [(output / f"{file.stem}.png", output / f"{file.stem}.overlay.png") for file in files]
    targets = [output / "legend.png", *itertools.chain(*written)]
    if twice := [path.name for path, count in Counter(targets).items() if count > 1]:
        raise UserError(f"--predict: several files would be {listed(twice, 3)}; give them one by one, or rename")
    read = {file.resolve() for file in files}
    if over := [str(path) for path in targets if path.resolve() in read]:
        raise UserError(f"--predict: would write over {listed(over, 3)}, to be read; choose another --output")
    palette = colours(len(names))
    save(legend(names, palette), targets[0])
    for file, (classes_path, overlay_path) in zip(files, written, strict=True):
        image = read_rgb(file)
        classes = predict(image)
        save(index_picture(classes, palette), classes_path)
        save(overlay(image, classes, palette), overlay_path)


def save(picture: Image.Image, path: Path) -> None:
    with atomic(path) as temporary:
        picture.save(temporary, "PNG")
