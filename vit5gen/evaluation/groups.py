"""The moments of a scan's groups in a file beside an evaluation card: enough to compare its samples with others."""

import math
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from vit5gen.evaluation.distances import SPLIT_SIZE, ScoreSums
from vit5gen.evaluation.features import Extractor
from vit5gen.evaluation.reference import Reference, Scan
from vit5gen.evaluation.statistics import FeatureStatistics, Grouped
from vit5gen.system.errors import UserError
from vit5gen.system.files import atomic, read_json, sha256

_ROUNDING = 1e-3  # of a score, more than another machine or batch size changes


def save_groups(scan: Scan, reference: Reference, card: str | Path) -> dict[str, Any]:
    """Write moments and score sums of a scan's groups beside its card; return what the card records of the file."""
    tensors = {name: torch.stack([one.state for one in found.groups]) for name, found in scan.moments.items()}
    if scan.score is not None:
        tensors["score"] = scan.score.sums
    with atomic(file := Path(card).with_suffix(".groups.safetensors")) as temporary:
        save_file(tensors, temporary)
    return {"file": file.name, "sha256": sha256(file), "distance": _distance(scan, reference)}


def _distance(scan: Scan, reference: Reference) -> float:
    """Return what tells a reference from others; paths and kinds of files need not be the same."""
    total = scan.pooled.total()
    return reference.pooled.distance(total.mean, total.covariance)


def read_groups(path: str, reference: Reference, extractor: Extractor) -> tuple[dict[str, Any], Scan]:
    """Return an evaluation card and the scan of its samples, but for the rows.

    Raises `UserError` for a card without groups, a file that is not the card's, another extractor or reference.
    """
    # The card, whose extractor decides what the file holds.
    card, again = read_json(path, "card"), "evaluate again with --keep-groups"
    if not {"groups", "samples", "extractor", "reference", "protocol"} <= card.keys():
        raise UserError(f"card {path} has no groups to compare; {again}, or give the samples themselves")
    if card["extractor"] != extractor.identity:
        names = f"extractor {card['extractor']['name']}, not this {extractor.name}"
        raise UserError(f"card {path} was made with {names}; give its extractor, options and weights")
    file = Path(path).parent / Path(card["groups"]["file"]).name
    if not file.is_file() or sha256(file) != card["groups"]["sha256"]:
        raise UserError(f"card {path}: {file} is not the file that the card names; restore it, or {again}")
    try:
        tensors = load_file(file)
    except SafetensorError as error:
        raise UserError(f"card {path}: {file} cannot be read ({error}); {again}") from error

    # The scan that was kept.
    moments = {
        name: Grouped.of([FeatureStatistics.from_state(dim, state) for state in tensors[name]])
        for name, dim in extractor.dims.items()
    }
    (samples,), total, score = card["samples"], moments["pooled"].total(), None
    if extractor.num_classes:
        score = ScoreSums(total.count, extractor.num_classes, SPLIT_SIZE)
        score.sums = tensors["score"]
    found = Scan(total.count, samples["size"], moments, score, torch.empty(0, extractor.dim))

    # The reference is the same if it gives the same distance; cards of earlier versions have it among the metrics.
    made_with, here = card["reference"], _distance(found, reference)
    there = card["groups"].get("distance", card["metrics"].get(extractor.metric, {}).get("value", here))
    if made_with["count"] != reference.count or not math.isclose(there, here, rel_tol=_ROUNDING, abs_tol=1e-9):
        problem = f"{made_with['path']}, {extractor.metric} {there:.6g}; here it is {here:.6g}"
        raise UserError(f"card {path} was made with another reference ({problem}); give that one")
    return card, found
