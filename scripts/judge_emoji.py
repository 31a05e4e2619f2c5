"""Ask a classifier of real emoji at 64 x 64 whether it recognises the classes of samples.

A small residual network is trained from random weights on the real training pictures, every class drawn equally often,
shifted at random, not mirrored. It then names held-out pictures and samples. Samples are FILE.npz or a folder as
``sample.py`` writes them: their labels are in the output. Printed as JSON, for both sets and as a ratio: `share`, the
part that is recognised, with classes as frequent as among the held-out pictures; `class_mean`, where every class counts
the same; and the share of each class. Without samples the held-out pictures stand in, and all ratios are 1.
About four minutes of one core.

usage: python scripts/judge_emoji.py [SAMPLES ...] [--seed 0] [--steps 1200] [--output FILE.json]
"""

import argparse
import json
import math
import sys
from pathlib import Path

import numpy as np
import timm
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional

from vit5gen.data import load_emoji
from vit5gen.data.sources.emoji import CLASSES

SIDE, BATCH, SHIFT = 64, 64, 4
LEARNING_RATE, WEIGHT_DECAY, WARMUP = 2e-3, 0.05, 50


def read_samples(path: Path) -> tuple[Tensor, Tensor]:
    """Return images (N, 3, 64, 64) uint8 and labels (N,) of an npz or a folder that ``sample.py`` has written."""
    if path.is_dir():
        files = sorted(path.glob("[0-9]*_[0-9]*.png"))
        pixels = [np.asarray(Image.open(file).convert("RGB")) for file in files]
        images, labels = np.stack(pixels), np.array([int(file.stem.split("_")[1]) for file in files])
    else:
        with np.load(path) as arrays:
            images, labels = arrays["arr_0"], arrays["arr_1"]
    if images.shape[1:] != (SIDE, SIDE, 3) or labels.min() < 0 or labels.max() >= len(CLASSES):
        raise SystemExit(f"{path}: expected pictures of {SIDE} x {SIDE} with labels below {len(CLASSES)}")
    return torch.from_numpy(images).permute(0, 3, 1, 2), torch.from_numpy(labels).long()


def normalise(images: Tensor) -> Tensor:
    return images.float() / 127.5 - 1


def train(images: Tensor, labels: Tensor, steps: int, seed: int) -> nn.Module:
    """Train the classifier; equal seeds give equal weights on equal machines."""
    torch.manual_seed(seed)
    model = timm.create_model("resnet14t", num_classes=len(CLASSES), channels=(24, 48, 96, 192), drop_rate=0.2)
    optimizer = torch.optim.AdamW(model.parameters(), LEARNING_RATE, weight_decay=WEIGHT_DECAY)
    frequency = 1 / torch.bincount(labels, minlength=len(CLASSES))[labels]
    generator = torch.Generator().manual_seed(seed)
    model.train()
    for step in range(steps):
        for group in optimizer.param_groups:
            cosine = (1 + math.cos(math.pi * step / steps)) / 2
            group["lr"] = LEARNING_RATE * min(1, (step + 1) / WARMUP) * cosine
        chosen = torch.multinomial(frequency, BATCH, replacement=True, generator=generator)
        padded = functional.pad(normalise(images[chosen]), [SHIFT] * 4, value=1)
        offsets = torch.randint(2 * SHIFT + 1, (BATCH, 2), generator=generator).tolist()
        batch = [image[:, y : y + SIDE, x : x + SIDE] for image, (y, x) in zip(padded, offsets, strict=True)]
        loss = functional.cross_entropy(model(torch.stack(batch)), labels[chosen], label_smoothing=0.1)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if step % 100 == 0:
            print(f"step {step}: loss {loss.item():.3f}", file=sys.stderr, flush=True)
    return model.eval()


@torch.no_grad()
def shares(model: nn.Module, images: Tensor, labels: Tensor) -> Tensor:
    """Return which part of each class is recognised, (9,); nan for a class without images."""
    named = torch.cat([model(normalise(chunk)).argmax(1) for chunk in images.split(256)])
    return torch.stack([(named[labels == label] == label).double().mean() for label in range(len(CLASSES))])


def compared(real: Tensor, drawn: Tensor) -> dict[str, float | None]:
    ratio = round((drawn / real).item(), 4) if real > 0 else None
    return {"held_out": round(real.item(), 4), "samples": round(drawn.item(), 4), "ratio": ratio}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("samples", nargs="*", type=Path, help="FILE.npz or folders; default: the held-out pictures")
    parser.add_argument("--seed", type=int, default=0, help="fixes the classifier")
    parser.add_argument("--steps", type=int, default=1200, help=f"of its training, {BATCH} pictures each")
    parser.add_argument("--output", type=Path, help="write the JSON here, too")
    options = parser.parse_args()
    held_out = load_emoji(SIDE, "test")
    sets = {str(path): read_samples(path) for path in options.samples} or {"held-out pictures": held_out}
    for name, (_, labels) in sets.items():
        if missing := [word for label, word in enumerate(CLASSES) if label not in labels]:
            raise SystemExit(f"{name}: no pictures of {', '.join(missing)}")
    model = train(*load_emoji(SIDE, "train"), options.steps, options.seed)
    real, weights = shares(model, *held_out), torch.bincount(held_out[1]) / len(held_out[1])
    verdicts = {"seed": options.seed, "steps": options.steps}
    for name, (images, labels) in sets.items():
        drawn = shares(model, images, labels)
        rows = {"share": ((real * weights).sum(), (drawn * weights).sum()), "class_mean": (real.mean(), drawn.mean())}
        rows |= {word: (real[label], drawn[label]) for label, word in enumerate(CLASSES)}
        verdicts[name] = {"count": len(labels)} | {row: compared(*pair) for row, pair in rows.items()}
    text = json.dumps(verdicts, indent=1)
    print(text)
    if options.output:
        options.output.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
