"""Does a segmenter learn faster on a classifier's weights than from scratch? Emoji scenes, two seeds.

First train the classifier, on the emoji that the scenes for training are made of, at the scenes' size (9 minutes of one
core that has bf16 instructions):

    ACCELERATE_MIXED_PRECISION=bf16 python examples/train_classifier.py --data emoji --img-size 64 --loss ce \\
        --epochs 40 --warmup-epochs 2 --batch-size 32 --optimizer adamw --lr 1e-3 --repeats 1 --mixup 0 --cutmix 0 \\
        --least-crop 0.3 --average 0.99 --drop-path 0 --output runs/emoji-classifier \\
        --model-kwargs patch_size=8 embed_dim=128 depth=6 num_heads=4

Then both segmenters are trained for 1,000 steps of 16 scenes with the same settings, order and augmentation, and the
mIoU on 300 scenes of emoji that neither has seen is measured every 200 steps: about 5 minutes a run on one core.
Each finished run is a line of FOLDER/rows.jsonl, which a rerun with the same settings and classifier skips; table.md,
miou.png and overlays.png follow from the rows. FOLDER/runs has the segmenters, and what interrupted runs resume from.

usage: python scripts/segment_study.py --classifier runs/emoji-classifier/weights.safetensors --output FOLDER
"""

import argparse
import json
import sys
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from vit5gen.cli import exit_on_bad_input
from vit5gen.generation.card import commit
from vit5gen.models import load_vit5
from vit5gen.system.files import atomic, read_json, sha256, write_text

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import overlays
import scenes
import segment

STARTS = {"scratch": "tab:gray", "classifier": "tab:blue"}  # and the colours of their curves
SIDE, SHOWN = 64, 8
SETTINGS = {"crop": SIDE, "channels": 48, "batch-size": 16, "rate": 2e-3, "warmup": 50}


def plan(start: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what makes a row: the settings, and the classifier by its hash."""
    settings = SETTINGS | {"num-steps": arguments.num_steps, "every": arguments.every, "seed": seed}
    return {"start": start, "seed": seed, "settings": settings, "classifier": sha256(arguments.classifier)}


def train(start: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one segmenter, or continue an interrupted training; return its row."""
    model = load_vit5(arguments.classifier)
    sizes = [model.embed_dim, len(model.blocks), model.embed_dim // model.head_dim, model.patch_size]
    folder, row = arguments.output / "runs" / f"{start}-{seed}", plan(start, seed, arguments)
    words = ["--data", "scenes", "--sizes", *sizes, "--output", folder]
    words += ["--classifier", arguments.classifier] if start == "classifier" else []
    words += [word for name, value in row["settings"].items() for word in (f"--{name}", value)]
    segment.main([str(word) for word in words])
    card = read_json(folder / "card.json", "card")
    row |= {"sizes": sizes, "commit": commit()}
    return row | {key: card[key] for key in ("evaluations", "miou", "iou", "pixel_accuracy")}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the mIoU by step, and the last IoU of each class, as Markdown; a column for each run."""
    heads = [f"{row['start']}, seed {row['seed']}" for row in rows]
    lines = [["step or class", *heads], ["---"] * (1 + len(rows))]
    for i, one in enumerate(rows[0]["evaluations"]):
        lines.append([f"{one['step']}", *(f"{row['evaluations'][i]['miou']:.1%}" for row in rows)])
    for name in rows[0]["iou"]:
        lines.append([name, *("" if row["iou"][name] is None else f"{row['iou'][name]:.1%}" for row in rows)])
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def draw_curves(rows: list[dict[str, Any]], path: Path) -> None:
    figure = Figure((6, 4), layout="constrained")
    axes = figure.subplots()
    for row in rows:
        steps, values = zip(*((one["step"], 100 * one["miou"]) for one in row["evaluations"]), strict=True)
        label = f"from {row['start']}, seed {row['seed']}"
        axes.plot(steps, values, "o-" if row["seed"] % 2 == 0 else "s--", color=STARTS[row["start"]], label=label)
    axes.set(xlabel="step", ylabel="mIoU on held-out scenes, %", ylim=(0, None))
    axes.legend(frameon=False)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)


def draw_overlays(output: Path, seed: int) -> None:
    """Write held-out scenes, their true classes, and those that each segmenter of a seed finds, one below the other."""
    held_out, palette = scenes.Scenes("validation", SIDE), overlays.colours(len(scenes.CLASSES))
    palette[0] = 0  # dark backgrounds
    examples = [held_out[i] for i in range(SHOWN)]
    rows = [[Image.fromarray(image.permute(1, 2, 0).numpy()) for image, _ in examples]]
    rows.append([overlays.overlay(image, mask, palette) for image, mask in examples])
    for start in STARTS:
        model, _ = segment.load(output / "runs" / f"{start}-{seed}" / "segmenter.safetensors")
        options = argparse.Namespace(crop=SIDE, stride=0, flip=False, precision="fp32", device=model.mean.device)
        found = [segment.predict(model, options, image) for image, _ in examples]
        rows.append([overlays.overlay(image, mask, palette) for (image, _), mask in zip(examples, found, strict=True)])
    grid = Image.fromarray(np.concatenate([np.concatenate([np.asarray(one) for one in row], 1) for row in rows]))
    grid = grid.resize((2 * grid.width, 2 * grid.height), Image.Resampling.NEAREST)
    legend = overlays.legend(scenes.CLASSES, palette).crop((0, 0, 160, overlays.ROW * len(scenes.CLASSES)))
    picture = Image.new("RGB", (grid.width + legend.width, grid.height), "white")
    picture.paste(grid)
    picture.paste(legend, (grid.width, 0))
    info = PngInfo()
    info.add_text("attribution", held_out.attribution)
    with atomic(output / "overlays.png") as temporary:
        picture.save(temporary, "PNG", pnginfo=info)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--classifier", type=Path, required=True, metavar="FILE")
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1])
    parser.add_argument("--num-steps", type=int, default=1000)
    parser.add_argument("--every", type=int, default=200)
    arguments = parser.parse_args()
    output: Path = arguments.output
    file = output / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def is_current(row: dict[str, Any]) -> bool:
        return plan(row["start"], row["seed"], arguments).items() <= row.items()

    done = {(row["start"], row["seed"]) for row in rows if is_current(row)}
    for seed, start in product(arguments.seeds, STARTS):
        if (start, seed) not in done:
            rows.append(train(start, seed, arguments))
            write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    shown = [row for row in rows if is_current(row)]
    write_text(output / "table.md", table(shown))
    draw_curves(shown, output / "miou.png")
    if (output / "runs").is_dir():  # not kept beside the rows for ever
        draw_overlays(output, arguments.seeds[0])


if __name__ == "__main__":
    with exit_on_bad_input():
        main()
