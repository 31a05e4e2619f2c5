"""Make a judge that ships out of a run of examples/train_classifier.py: its weights in fp16, its card beside them.

Prints the hash that vit5gen/evaluation/extractors/judge.py pins. The command that trained a judge is in its card.

usage: python scripts/ship_judge.py RUN NAME
"""

import argparse
from pathlib import Path

from safetensors.torch import load_file, save_file

from vit5gen.cli import exit_on_bad_input
from vit5gen.models.weights import check_finite
from vit5gen.system.errors import UserError
from vit5gen.system.files import atomic, read_json, sha256, write_json
from vit5gen.system.shipped import FOLDER

MOST_BYTES = 3e6


def ship_judge(run: Path, name: str) -> Path:
    """Write ``vit5gen/shipped/NAME``; raise `UserError` for a run that is not finished, or weights too large."""
    card = read_json(run / "card.json", "card of the run")
    if len(card["log"]) != card["settings"]["epochs"]:
        raise UserError(f"{run}: {len(card['log'])} of {card['settings']['epochs']} epochs; finish the run first")
    state = {
        key: value.half() if value.is_floating_point() else value
        for key, value in load_file(run / "weights.safetensors").items()
    }
    check_finite("weights in fp16", state)
    weights = FOLDER / name / "weights.safetensors"
    with atomic(weights) as temporary:
        save_file(state, temporary)
        if (size := temporary.stat().st_size) >= MOST_BYTES:
            raise UserError(f"{name}: {size / 1e6:.2f} MB; expected under {MOST_BYTES / 1e6:g}: train a smaller model")
    write_json(FOLDER / name / "card.json", card | {"sha256": sha256(weights)})
    print(f"{weights}: {size / 1e6:.2f} MB, {sha256(weights)}")
    return weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("name", metavar="NAME")
    with exit_on_bad_input():
        ship_judge(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
