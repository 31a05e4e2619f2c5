"""The options of train_classifier.py: their defaults, their ranges, and those that make a run what it is."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from checks import check_ranges, dashed, reading
from timm.utils import ParseKwargs

from vit5gen.cli import Parser

# Of images: timm's policy, least area of a crop, copies in an epoch of fewer images, so many alone, classes evened out.
IMAGES = {"img_size": 224, "augment": "3a", "color_jitter": 0.3, "hflip": 0.5, "least_crop": 0.08, "repeats": 3}
IMAGES |= {"mixup": 0.8, "cutmix": 1.0, "train_images": 0, "balanced": 0}
# Weights to start from, of any size and with any head; the average's decay, and whether it grows to that from 0.
MODEL = {"model": "vit5_small", "initial": "", "drop_path": 0.05, "average": 0.99996, "average_warmup": 1}
# Images of a step, of all processes together; lamb, adamw or another of timm's; bce or ce, which may be smoothed.
LEARNING = {"epochs": 800, "batch_size": 2048, "optimizer": "lamb", "lr": 4e-3, "weight_decay": 0.05}
LEARNING |= {"layer_decay": 1.0, "warmup_epochs": 5.0, "loss": "bce", "smoothing": 0.0, "seed": 0}
MACHINE = {"data_path": "", "accumulate": 1, "num_workers": 0}  # may change when a run is resumed
# The least and the most that an option may be.
RANGES = dict.fromkeys(("epochs", "batch_size", "accumulate", "img_size", "repeats"), (1, 1e9))
RANGES |= dict.fromkeys(("num_workers", "train_images", "seed", "warmup_epochs", "mixup", "cutmix"), (0, 1e9))
RANGES |= dict.fromkeys(("weight_decay", "color_jitter"), (0, 1e9)) | {"lr": (1e-12, 1e38)}
RANGES |= dict.fromkeys(("average", "average_warmup", "balanced", "hflip", "smoothing", "drop_path"), (0, 1))
RANGES |= dict.fromkeys(("layer_decay", "least_crop"), (1e-6, 1))


def parse(words: Sequence[str], description: str | None = None) -> Namespace:
    """Return the options; raise `UserError` for unknown ones and numbers out of range."""
    parser = Parser(description=description)
    parser.add_argument("--data", required=True, help="folder of train/CLASS and val/CLASS, or emoji, or fashion-mnist")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="e.g. patch_size=4 depth=6")
    for name, default in {**IMAGES, **MODEL, **LEARNING, **MACHINE}.items():
        parser.add_argument(dashed(name), type=type(default), default=default, help=f"default: {default!r}")
    with reading("--model-kwargs, expected NAME=VALUE"):
        options = parser.parse_args(words)
    check_ranges(options, {**RANGES, "warmup_epochs": (0, options.epochs)})
    return options


def settings_of(options: Namespace) -> dict[str, Any]:
    """Return what a run that is resumed must have had from the beginning."""
    return {key: value for key, value in vars(options).items() if key not in {*MACHINE, "output"}}


def same_settings(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Tell whether a run has these settings; those of earlier versions had no choice of the average's warm-up."""
    return {"average_warmup": 1} | found == wanted
