"""Compare a tiny ViT-5 with a DeiT-III-like and a plain ViT of equal size as classifiers of Fashion-MNIST.

Equal for all: 16 patches of 8 x 8 (28 x 28 pixels padded to 32), 6 blocks of width 96 with 3 heads, the same 50,000
training images for 3 epochs, AdamW, an average of the weights, and the 10,000 test images. DeiT-III is the plain ViT
with LayerScale, which starts at 1e-4 as ViT-5's does, and, in timm, without a position for the class token. Each
finished run is a line of FOLDER/rows.jsonl, which a rerun with the same settings skips; FOLDER/table.md has the means.
About 40 minutes of one core in all.

usage: OMP_NUM_THREADS=1 python scripts/classifier_study.py --output FOLDER [--seeds 0 1 2] [--data-path IDX_FILES]
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from scipy import stats

from vit5gen.system.files import write_text

sys.path.insert(0, str(Path(__file__).parents[1] / "examples"))
import train_classifier
from classifier_options import parse, same_settings, settings_of

FIRST = "ViT-5"
MODELS = {
    FIRST: ["--model", "vit5_small"],
    "DeiT-III": ["--model", "deit3_small_patch16_224"],
    "plain ViT": ["--model", "deit_small_patch16_224"],
}
SIZES = ["patch_size=8", "embed_dim=96", "depth=6", "num_heads=3"]
COMMON = [
    "--data",
    "fashion-mnist",
    "--img-size",
    "32",
    "--train-images",
    "50000",
    "--epochs",
    "3",
    "--batch-size",
    "64",
]
COMMON += ["--optimizer", "adamw", "--lr", "1e-3", "--warmup-epochs", ".2", "--drop-path", "0", "--loss", "ce"]
COMMON += [
    "--mixup",
    "0",
    "--cutmix",
    "0",
    "--augment",
    "",
    "--color-jitter",
    "0",
    "--least-crop",
    ".5",
    "--repeats",
    "1",
]


def words(name: str, seed: int, output: Path) -> list[str]:
    scale = ["init_values=1e-4"] if name == "DeiT-III" else []
    model = [*MODELS[name], "--model-kwargs", *SIZES, *scale]
    return [*COMMON, *model, "--seed", str(seed), "--output", str(output)]


def is_current(row: dict[str, Any]) -> bool:
    """Tell whether a row is of a run with the settings that this script has now."""
    if row["model"] not in MODELS:
        return False
    wanted = settings_of(parse(words(row["model"], row["seed"], Path())))
    return same_settings(row["settings"], wanted)


def train(name: str, seed: int, data_path: str, work: Path) -> dict[str, Any]:
    """Train one model, or resume where it was killed; return its row."""
    arguments = words(name, seed, work / f"{name.replace(' ', '-')}-{seed}")
    card = train_classifier.main([*arguments, "--data-path", data_path])
    row = {"model": name, "seed": seed, "commit": card["commit"], **card["counts"]}
    log = [entry["top1"] for entry in card["log"]]
    return row | {"epochs": len(log), "top1": card["top1"], "top1_by_epoch": log, "settings": card["settings"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Return Markdown: accuracy with Student's 95 % interval over the seeds, and the paired difference to ViT-5."""
    accuracy = {
        name: {row["seed"]: 100 * row["top1"]["value"] for row in rows if row["model"] == name} for name in MODELS
    }
    size = {row["model"]: row["parameters"] for row in rows}
    lines = [f"| model | parameters | seeds | top-1, % | {FIRST} ahead by |", "|---|---|---|---|---|"]
    for name, found in accuracy.items():
        pairs = [accuracy[FIRST][seed] - value for seed, value in found.items() if seed in accuracy[FIRST]]
        if found:
            ahead = "" if name == FIRST else interval(pairs, "+")
            lines.append(f"| {name} | {size[name]:,} | {len(found)} | {interval(list(found.values()))} | {ahead} |")
    return "\n".join(lines) + "\n"


def interval(values: list[float], sign: str = "") -> str:
    if len(values) < 2:
        return " ".join(f"{value:{sign}.2f}" for value in values)
    half = stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    mean = np.mean(values)
    return f"{mean:{sign}.2f} [{mean - half:{sign}.2f}, {mean + half:{sign}.2f}]"


def read_rows(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()] if file.exists() else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--data-path", default="", help="folder of the four idx files; default: Debian's package")
    parser.add_argument("--work", type=Path, default=Path("runs/classifier-study"), help="where the runs are kept")
    options = parser.parse_args()
    file = options.output / "rows.jsonl"
    for seed in options.seeds:
        for name in MODELS:
            rows = read_rows(file)
            if any((row["model"], row["seed"]) == (name, seed) and is_current(row) for row in rows):
                continue
            rows.append(train(name, seed, options.data_path, options.work))
            write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
            shown = table([row for row in rows if is_current(row)])
            write_text(options.output / "table.md", shown)
            print(shown, flush=True)


if __name__ == "__main__":
    main()
