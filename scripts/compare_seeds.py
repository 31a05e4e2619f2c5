"""How often does `vit5gen compare` call one training seed of a recipe better than another, and one recipe than another?

RUNS is a folder of runs called "RECIPE, seed N", as a study leaves them. Each run is drawn and scored once, by
`vit5gen evaluate --keep-groups`; a rerun skips what is there. Then all pairs of seeds of one recipe are compared, and
all recipes: seed by seed, and over all seeds with the paired interval of a study. FOLDER/table.md has the counts.

usage: python scripts/compare_seeds.py RUNS --reference REF --output FOLDER [--extractor NAME] [--num-images N]
"""

import argparse
import json
from collections.abc import Iterator
from itertools import combinations
from pathlib import Path

from vit5gen.cli import main
from vit5gen.evaluation.significance import FEWEST_SEEDS, Estimate
from vit5gen.system.files import write_text


def vit5gen(*words: str | Path) -> None:
    """Run a command of the package; end with its exit code where that is not 0."""
    try:
        main([str(word) for word in words])
    except SystemExit as ended:
        if ended.code:
            raise


def evaluate(runs: Path, output: Path, scoring: list[str], sampling: list[str]) -> dict[str, dict[int, Path]]:
    """Return the card of each run by recipe and seed; evaluate those that have none."""
    cards: dict[str, dict[int, Path]] = {}
    for run in sorted(runs.glob("*, seed *")):
        recipe, _, seed = run.name.rpartition(", seed ")
        card = cards.setdefault(recipe, {})[int(seed)] = output / f"{run.name}.json"
        if not card.exists():
            vit5gen("evaluate", run, *scoring, *sampling, "--metrics", "fid", "--keep-groups", "--output", card)
    if not cards:
        raise SystemExit(f'{runs}: no folders called "RECIPE, seed N"; expected the runs of a study')
    return cards


def verdicts(pairs: list[tuple[Path, Path]], output: Path, scoring: list[str]) -> list[str]:
    """Compare pairs of cards; return the verdicts on the Frechet distance."""
    found = []
    for a, b in pairs:
        card = output / "comparisons" / f"{a.stem} - {b.stem}.json"
        if not card.exists():
            vit5gen("compare", a, b, *scoring, "--metrics", "fid", "--output", card)
        found += json.loads(card.read_text())["verdicts"].values()
    return found


def table(cards: dict[str, dict[int, Path]], output: Path, scoring: list[str]) -> Iterator[str]:
    """Yield the lines of the table: recipes against themselves, then against each other."""
    yield "| A | B | pairs of runs | A is better | B is better | undecided | B - A over training seeds [95 %] |"
    yield "|---|---|---|---|---|---|---|"
    for a, b in [*zip(cards, cards, strict=True), *combinations(cards, 2)]:
        shared = sorted(cards[a].keys() & cards[b].keys())
        seeds = list(combinations(shared, 2)) if a == b else [(seed, seed) for seed in shared]
        found = verdicts([(cards[a][i], cards[b][j]) for i, j in seeds], output, scoring)
        counts = [str(found.count(verdict)) for verdict in ("better_a", "better_b", "undecided")]
        over_seeds = "" if a == b or len(shared) < 2 else difference(cards[a], cards[b], shared)
        yield f"| {' | '.join([a, b, str(len(seeds)), *counts, over_seeds])} |"


def difference(a: dict[int, Path], b: dict[int, Path], seeds: list[int]) -> str:
    """Return the mean difference of the scores of runs of equal seed, with its interval and p."""
    metrics = [[json.loads(side[seed].read_text())["metrics"] for seed in seeds] for side in (a, b)]
    values = [[next(iter(scores.values()))["value"] for scores in own] for own in metrics]
    found = Estimate.of_pairs([y - x for x, y in zip(*values, strict=True)])
    p = f", p = {found.p:.2g}" if found.p is not None and len(seeds) >= FEWEST_SEEDS else ""
    return f"{found.difference:+.3g} [{found.interval[0]:+.3g}, {found.interval[1]:+.3g}]{p}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path)
    parser.add_argument("--reference", required=True)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--extractor", default="effnet-lite0")
    parser.add_argument("--num-images", default="2000")
    parser.add_argument("--num-inference-steps", default="50")
    given = parser.parse_args()
    sampling = ["--num-images", given.num_images, "--num-inference-steps", given.num_inference_steps]
    statistics, extractor = given.output / "reference.safetensors", ["--extractor", given.extractor]
    if not statistics.exists():
        vit5gen("evaluate", given.reference, *extractor, "--save-statistics", statistics)
    scoring = ["--reference", str(statistics), *extractor]
    cards = evaluate(given.runs, given.output, scoring, sampling)
    lines = list(table(cards, given.output, scoring))
    write_text(given.output / "table.md", "\n".join(lines) + "\n")
    print("\n".join(lines))
