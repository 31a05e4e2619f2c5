"""Make a generator that ships out of a finished run: average (EMA) and autoencoder in fp16, README.md, card.json.

The figures are those of metrics.json and of the cards of `vit5gen evaluate RUN` (or NAME, once it ships), each with its
extractor; the held-out PSNR of the autoencoder is computed here. A run gives the same weights every time: ship it,
evaluate NAME, and ship it again with those cards.

usage: python scripts/ship.py RUN NAME --command "..." --commit HASH [--evaluation CARD.json ...]
"""

import argparse
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL

from vit5gen.cli import exit_on_bad_input
from vit5gen.config import SamplingConfig, load_recorded
from vit5gen.data.autoencoders.codec import round_trip_psnr
from vit5gen.data.images import ImageSet, make_source, open_images, readable
from vit5gen.generation.card import TrainingFacts, pipeline_hash
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.models.weights import check_finite
from vit5gen.system.errors import UserError
from vit5gen.system.files import read_json, write_json
from vit5gen.system.shipped import FOLDER
from vit5gen.training.run_folder import RunFolder

MOST_BYTES = 12e6  # of all files
LICENCE = "cc-by-sa-4.0"  # of weights that have learned from OpenMoji's drawings
REMARK = (
    "The distance of the evaluation in training and that of the images drawn are not comparable: they are of different "
    "numbers of images, and fewer give a larger one, with other guidance and precision."
)
_DRAWN = {*SamplingConfig.model_fields, "seed", "precision"}


def ship(run: RunFolder, name: str, command: str, commit: str, evaluation: Sequence[Path] = ()) -> Path:
    """Write ``vit5gen/shipped/NAME``, whole or not at all, in place of an earlier one; return it.

    Raises `UserError` for a run that is not finished, evaluations of other weights or of unlike samples, or too many
    bytes.
    """
    config = load_recorded(run.config)
    if not run.evaluated(config.training.num_steps):
        raise UserError(f"{run}: no evaluation of step {config.training.num_steps}; finish the run first")
    last = next(entry for entry in run.evaluations() if entry["step"] == config.training.num_steps)
    pipe = load_pipeline(run.pipeline)
    scored = [read_json(card, "evaluation card") for card in evaluation]

    # The weights, rounded: loaded again they compute in fp32.
    networks = {"transformer": pipe.transformer, "vae": pipe.vae}
    for parameter in (one for network in networks.values() for one in network.parameters()):
        parameter.data = parameter.data.half().float()
    for part, network in networks.items():
        check_finite(f"{part} in fp16", network.state_dict())

    # What is told of them, in README.md and card.json.
    attribution = make_source(config.data).attribution
    held_out = readable(open_images(config.data, config.evaluation.held_out_split), config.data)
    figures = {
        "evaluation in training": last,
        "autoencoder, held-out PSNR (dB)": _psnr(pipe.vae, held_out),
        **_figures(scored),
    }
    made = {"command": command, "commit": commit, "seed": config.training.seed, "attribution": attribution}
    for part in (pipe, *networks.values()):
        part.register_to_config(_name_or_path=name)  # instead of this machine's folder
    pipe.register_to_config(attribution=attribution)
    for parameter in (one for network in networks.values() for one in network.parameters()):
        parameter.data = parameter.data.half()
    FOLDER.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir=FOLDER) as temporary:
        new = Path(temporary) / name
        told = f"{command}\n# commit {commit}, seed {config.training.seed}"
        licence, remark = LICENCE if attribution else None, REMARK if scored else None
        facts = TrainingFacts(command=told, metrics=figures, licence=licence, remark=remark)
        pipe.save_pretrained(new, facts=facts)
        write_json(new / "card.json", {**made, "figures": figures, "checkpoint_sha256": pipeline_hash(new)})
        for card in scored:
            _check_weights(card, {pipeline_hash(run.pipeline), pipeline_hash(new)})
        if (size := sum(file.stat().st_size for file in new.rglob("*") if file.is_file())) >= MOST_BYTES:
            raise UserError(f"{name}: {size / 1e6:.2f} MB; expected under {MOST_BYTES / 1e6:g}: train a smaller model")
        load_pipeline(new)
        shutil.rmtree(FOLDER / name, ignore_errors=True)
        os.replace(new, FOLDER / name)
    print(f"{FOLDER / name}: {size / 1e6:.2f} MB")
    return FOLDER / name


def _psnr(vae: AutoencoderKL, images: ImageSet) -> float:
    """Return the mean PSNR of round trips in dB."""
    chunks = torch.arange(len(images)).split(64)
    return torch.cat([round_trip_psnr(vae, images.stack(chunk)) for chunk in chunks]).mean().item()


def _figures(scored: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Return the scores of evaluation cards, and how the first set of their samples was drawn; no path of a machine."""
    figures: dict[str, Any] = {}
    for card in scored:
        one = card["samples"][0]
        drawn = (one["sampling"] or {}).get("settings", one["sampling"] or {})
        told = {"images": one["count"], **{key: value for key, value in drawn.items() if key in _DRAWN}}
        if figures.setdefault("drawn", told) != told:
            raise UserError(f"evaluation of {one['path']}: other samples than those of the first card; draw them alike")
        figures |= card["metrics"]
    return figures


def _check_weights(scored: dict[str, Any], expected: set[str]) -> None:
    for one in scored["samples"]:
        if (one.get("sha256") or (one["sampling"] or {}).get("checkpoint_sha256")) not in expected:
            raise UserError(f"evaluation of {one['path']}: of other weights; score RUN, or what ships")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("run", type=RunFolder, metavar="RUN")
    parser.add_argument("name", metavar="NAME")
    parser.add_argument("--command", required=True, help="that trained the run, as it is typed in a clone")
    parser.add_argument("--commit", required=True, help="of the code that trained it")
    parser.add_argument(
        "--evaluation", type=Path, nargs="+", default=(), metavar="CARD.json", help="of vit5gen evaluate"
    )
    with exit_on_bad_input():
        ship(**vars(parser.parse_args()))


if __name__ == "__main__":
    main()
