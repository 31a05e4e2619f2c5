"""Compare fine-tuning, whole and LoRA, with training from scratch, when two classes are added to a generator.

For each seed a generator of `smileys`, `people` and `flags` is trained first (1,200 steps of configs/quickstart.yaml).
Then `animals` and `food` are added: for 300 and for 600 steps all weights are trained from it, or a LoRA, or a new
model. What decides is the Frechet distance of the new classes alone, less its floor; that of the old classes, less
theirs, tells what is forgotten. Each finished run is a line of FOLDER/rows.jsonl, which a rerun skips; FOLDER/table.md
has the means.

usage: python scripts/finetune_study.py --output FOLDER [--seeds 0 1 2]
"""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from torch import Tensor

from vit5gen.config import Config, find_config, load_config
from vit5gen.evaluation import frechet_of, frechet_report, load_extractor
from vit5gen.evaluation.significance import Estimate
from vit5gen.generation.card import commit
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.many import SamplingJob, generate
from vit5gen.training.loop import train
from vit5gen.training.reference_moments import build_reference

OLD, NEW = ["smileys", "people", "flags"], ["animals", "food"]
PRETRAINING, STEPS = 1200, (300, 600)
STARTS: dict[str, dict[str, Any]] = {
    "from scratch": {},
    "whole": {"training.learning_rate": 1e-3},
    "LoRA rank 8": {"training.trainable": "lora"},  # and the label table in full
}


def settings(classes: list[str], steps: int, seed: int, more: dict[str, Any]) -> Config:
    values = {"data.classes": classes, "data.num_classes": len(classes), "training.num_steps": steps}
    values |= {"training.seed": seed, "training.compile": False, "training.checkpoint_every": None, **more}
    few = {"evaluation.num_images": 2, "evaluation.num_reference": 2}  # this script measures
    return load_config(find_config("quickstart"), values | few)


def learn(config: Config, folder: Path) -> None:
    """Train to the end, or continue a run that was interrupted."""
    if code := train(config, folder, "auto", accept_changes=False):
        raise SystemExit(code)


def measure(folder: Path, classes: list[str]) -> dict[str, float]:
    """Return the distance of samples of some classes to real pictures of these, its floor, and how many were drawn."""
    config = load_config(find_config("quickstart"), {"data.classes": classes, "data.num_classes": len(classes)})
    extractor = load_extractor(config.evaluation.extractor)
    reference, pipe = build_reference(config, extractor), load_pipeline(folder)
    ids = {name: number for number, name in pipe.id2label.items()}
    labels = [ids[classes[label]] for label in reference.labels]

    def images() -> Iterator[Tensor]:
        job = SamplingJob(labels, config.evaluation.seed, config.evaluation.batch_size, config.sampling)
        yield from (part for _, part in generate(pipe, job))

    report = frechet_report(frechet_of(images(), extractor), reference.distance, reference.floor)
    return {"distance": report["value"], "floor": report["floor"], "n": report["n"]}


def table(rows: list[dict[str, Any]]) -> str:
    """Return the means over seeds, and the gain over a start from scratch, paired by seed, with 95 % intervals."""
    over = {
        (row["start"], row["steps"], row["seed"], group): row[group]["distance"] - row[group]["floor"]
        for row in rows
        for group in ("new", "old")
        if group in row
    }
    lines = [
        "| start | steps | seeds | new classes, over floor | less than from scratch | old classes, over floor |",
        "|---|---|---|---|---|---|",
    ]
    for start, steps in dict.fromkeys((row["start"], row["steps"]) for row in rows):
        seeds = [row["seed"] for row in rows if (row["start"], row["steps"]) == (start, steps)]

        def mean(values: list[float | None]) -> str:
            if None in values or len(values) < 2:
                return ""
            found = Estimate.of_pairs([value for value in values if value is not None])
            return f"{found.difference:.1f} ± {found.margin():.1f}"

        new, old = ([over.get((start, steps, seed, group)) for seed in seeds] for group in ("new", "old"))
        scratch = [over.get(("from scratch", steps, seed, "new")) for seed in seeds]
        pairs = list(zip(scratch, new, strict=True))
        gain = [None if x is None or y is None else x - y for x, y in pairs] if start != "from scratch" else [None]
        lines.append(f"| {start} | {steps} | {len(seeds)} | {mean(new)} | {mean(gain)} | {mean(old)} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    arguments = parser.parse_args()
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    file = output / "rows.jsonl"
    rows = [json.loads(line) for line in file.read_text().splitlines()] if file.exists() else []

    def keep(row: dict[str, Any]) -> None:
        rows.append(row | {"commit": commit()})
        file.write_text("".join(json.dumps(one) + "\n" for one in rows))
        (output / "table.md").write_text(table(rows))
        print(rows[-1], flush=True)

    done = {(row["start"], row["steps"], row["seed"]) for row in rows}
    for seed in arguments.seeds:
        # What is started from.
        source = output / "runs" / f"pretrained-{seed}"
        learn(settings(OLD, PRETRAINING, seed, {}), source)
        if ("pretrained", PRETRAINING, seed) not in done:
            row = {"start": "pretrained", "steps": PRETRAINING, "seed": seed}
            keep(row | {"old": measure(source, OLD)})

        # The new classes beside the old ones.
        for start, more in STARTS.items():
            for steps in STEPS:
                if (start, steps, seed) in done:
                    continue
                folder = output / "runs" / f"{start}-{steps}-{seed}".replace(" ", "-")
                init = {} if start == "from scratch" else {"training.init_from": str(source)}
                learn(settings(OLD + NEW, steps, seed, more | init), folder)
                row = {"start": start, "steps": steps, "seed": seed}
                keep(row | {"new": measure(folder, NEW), "old": measure(folder, OLD)})


if __name__ == "__main__":
    main()
