"""What is wrong with an array of images that cannot be read as ADM's, and the expression of numpy that converts it."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np

from vit5gen.system.errors import UserError


def find_conversion(
    shape: tuple[int, ...], fortran: bool, dtype: np.dtype[Any], lowest: float, highest: float
) -> tuple[str, str]:
    """Return what is wrong with an array ``a`` and the expression that converts it, empty where there is none.

    ``lowest`` and ``highest`` are of its first image. Both are empty for uint8 images of 3 channels.
    """
    axes, (_, second, third, last) = len(shape), (*shape, 0, 0, 0, 0)[:4]
    side, kind = math.isqrt(second // 3), dtype.kind
    scaled = "a * 127.5 + 128" if lowest < 0 else "a * 255 + 0.5" if highest <= 1 else "a + 0.5"
    cases = (
        (fortran, "it is column-major", "np.ascontiguousarray(a)"),
        (axes == 5, "it has five axes", "a.reshape(-1, *a.shape[2:])"),
        (axes == 3 and third == 3, "it is one image", "a[None]"),
        (axes == 3, "it is grey", "np.repeat(a[..., None], 3, axis=3)"),
        (axes == 2 and 0 < second == 3 * side**2, "its images are flat", f"a.reshape(-1, 3, {side}, {side})"),
        (axes != 4 or not shape[0], "it is no array of images", ""),
        (last == 1, "it is grey", "np.repeat(a, 3, axis=3)"),
        (second == 1, "it is grey", "np.repeat(a, 3, axis=1)"),
        (last == 4 and second != 3, "it has four channels", "a[..., :3]"),
        (second == 4 and last != 3, "it has four channels", "a[:, :3]"),
        (3 not in (second, last), "it does not have three channels", ""),
        (kind == "f", f"its first image has values from {lowest:g} to {highest:g}", f"({scaled}).clip(0, 255)"),
        (kind == "b", "it is not uint8", "a * np.uint8(255)"),
        (dtype != np.uint8, "it is not uint8", "a.clip(0, 255)" if kind in "iu" else ""),
    )
    wrong, expression = next((case[1:] for case in cases if case[0]), ("", ""))
    return wrong, f"{expression}.astype('uint8')" if expression.endswith("clip(0, 255)") else expression


def quantised(values: np.ndarray, limits: Sequence[int], what: str) -> np.ndarray:
    """Return floats within ``limits`` as uint8, rounded as ADM does; raise `UserError` for others, naming ``what``.

    What lies beyond by less than half a level is rounding.
    """
    low, high = limits
    found, slack = (float(values.min()), float(values.max())), (high - low) / 510
    if not (low - slack <= found[0] and found[1] <= high + slack):  # nor NaN
        advice = f"give the other range, or clip them with numpy: a.clip({low}, {high})"
        raise UserError(f"{what}: values from {found[0]:g} to {found[1]:g} do not fit --range {low} {high}; {advice}")
    levels = (values.astype(np.float32) - low) * (255 / (high - low)) + 0.5
    return levels.clip(0, 255).astype(np.uint8)
