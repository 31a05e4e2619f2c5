"""Score ADM's published samples of ImageNet 256x256 and compare the result with ADM's published figures.

Needs a GPU, 10 GB of disk and two files in FOLDER, both below
https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/ :
VIRTUAL_imagenet256_labeled.npz and admnet_guided_upsampled_imagenet256.npz.

usage: python scripts/check_adm_figures.py FOLDER
"""

import sys
import tempfile
from pathlib import Path
from typing import Any

from vit5gen.commands import evaluate
from vit5gen.system.errors import UserError
from vit5gen.system.files import read_json

REFERENCE = "VIRTUAL_imagenet256_labeled.npz"
SAMPLES = "admnet_guided_upsampled_imagenet256.npz"
# Value and tolerance. Values: output of ADM's TensorFlow evaluator for these two files, as printed in
# https://github.com/openai/guided-diffusion/blob/main/evaluations/README.md
EXPECTED = {
    "FID": (3.9425574129223264, 0.005),
    "sFID": (6.140433703346162, 0.005),
    "IS": (215.8370361328125, 0.3),
    "precision": (0.8265, 0.003),
    "recall": (0.5309, 0.003),
}


def deviations(metrics: dict[str, dict[str, Any]]) -> list[str]:
    """Return a line for each published figure that ``metrics`` of a card does not match."""
    return [
        f"{name}: {metrics[name]['value']:.6g}, published {value:.6g}, tolerance {tolerance}"
        for name, (value, tolerance) in EXPECTED.items()
        if not abs(metrics[name]["value"] - value) <= tolerance
    ]


def main(arguments: list[str]) -> int:
    if len(arguments) != 1:
        print(__doc__, file=sys.stderr)
        return 2
    folder = Path(arguments[0])
    with tempfile.TemporaryDirectory() as temporary:
        card = Path(temporary) / "card.json"
        try:
            files = {"samples": [str(folder / SAMPLES)], "reference": str(folder / REFERENCE), "output": str(card)}
            evaluate.run(evaluate.EvaluateOptions(**files, protocol="adm"))
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        found = deviations(read_json(card, "card")["metrics"])
    print("\n".join(found) or "all figures within their tolerances")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
