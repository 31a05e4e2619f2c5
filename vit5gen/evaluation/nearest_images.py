"""Are samples copies? How near they are to training images, and to images that no training has seen."""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit5gen.config import load_recorded
from vit5gen.evaluation.distances import nearest
from vit5gen.evaluation.features import Extractor, load_extractor
from vit5gen.evaluation.reference import scan
from vit5gen.evaluation.samples import Samples, indices_of, open_data
from vit5gen.generation.grid import save_pairs, with_attribution
from vit5gen.system.distributed import gather_objects, is_main, sum_over_processes
from vit5gen.system.errors import LARGEST, UserError

Chunks = Iterable[tuple[int | Tensor, Tensor]]

_SHOWN = 12  # pairs in the picture
_BATCH = 50  # images whose features are computed at once
_QUANTILES = {"minimum": 0.0, "1 %": 0.01, "10 %": 0.1, "median": 0.5}


@dataclass(frozen=True)
class Nearest:
    """A training image: its index in the data, the distance of its features, and its picture (3, H, W) uint8."""

    index: int
    distance: float
    picture: Tensor


def nearest_pictures(images: Tensor, training: Chunks, extractor: Extractor, shared: bool = True) -> list[Nearest]:
    """Return the training image that is nearest to each of ``images (N, 3, H, W)`` uint8, in the extractor's space.

    training: ``Samples.chunks()`` of the training images; all processes share the pass, each has all that it found.
    shared: False for one process that passes over them without the others.
    Raises `UserError` when the images differ in size, or have features that are not finite.
    """
    rows = torch.cat([extractor(part).pooled.cpu() for part in images.split(_BATCH)])
    found = _nearest(rows, training, list(images.shape[2:]), extractor, shown=len(rows))
    distances, indices, pictures = _of_all(*found) if shared else found
    return [Nearest(int(indices[i]), float(distances[i]), pictures[i]) for i in range(len(rows))]


def open_training_set(run: str | Path, batch_size: int, device: torch.device) -> tuple[Samples, Extractor]:
    """Return the images that a run was trained on, as its recorded configuration says, and the extractor it scores by.

    Raises `UserError` for what is no run, or a run whose images are not here.
    """
    if not (file := Path(run) / "config.yaml").is_file():
        raise UserError(f"--nearest: {run} is not the folder of a run, which tells its training images; give a run")
    config = load_recorded(file)
    try:
        return open_data(config.data, batch_size), load_extractor(config.evaluation.extractor, device)
    except UserError as error:
        raise UserError(f"--nearest: no training images of {run}: {error}") from error


def check_apart(samples: Samples, training: Samples, held_out: Samples) -> None:
    """Raise `UserError` where the samples lie among the images they are compared with, or these are one set."""
    own = Path(samples.identity["path"]).resolve()
    for images in (training, held_out):
        there = Path(images.identity["path"]).resolve()
        if there == own or there in own.parents:
            advice = "each would be its own nearest image; move them elsewhere"
            raise UserError(f"{there} contains the samples' own files, {own}: {advice}")
    if training.identity == held_out.identity:
        raise UserError(f"{training.identity['path']} is given as training and as held-out images; give other ones")


def find_copies(
    samples: Samples, training: Samples, held_out: Samples, extractor: Extractor
) -> tuple[dict[str, Any], list[tuple[Tensor, Tensor]]]:
    """Return what a card tells of the nearest training image of each sample, and the closest pairs of pictures.

    Closest is where the distance is least in proportion to that of the nearest held-out image: plain images are near to
    all others. Were training and held-out images alike to the model, a sample would be nearer to training images as
    often as these are many: ``by_chance``. All processes share three passes, and one more over the samples.
    Raises `UserError` when every sample is a training image, or when images differ in size.
    """
    # The samples' features, whole on every process.
    found = scan(samples.watch(), samples.count, extractor, rows=samples.count, groups=1)
    rows = sum_over_processes(found.rows if is_main() else torch.zeros(samples.count, extractor.dim))

    # The nearest images; a training image that is a sample, pixel by pixel, needs no features to be found.
    unseen, _, _ = _of_all(*_nearest(rows, held_out.watch(), found.size, extractor))
    seen, indices, pictures = _of_all(*_nearest(rows, training.watch(), found.size, extractor, unseen, _SHOWN))
    identical = int(torch.isin(samples.hashes[0], training.hashes[0]).sum())
    if identical == samples.count:
        path = training.identity["path"]
        raise UserError(f"{path} contains the samples' own files, pixel by pixel; give the images of the training")

    # The closest pairs.
    closest, shown = _closest(seen, unseen, _SHOWN), dict[int, Tensor]()
    for first, images in samples.chunks():
        here = indices_of(first, len(images)).tolist()
        shown |= {i: image for i, image in zip(here, images, strict=True) if i in closest}
    for part in gather_objects(shown):
        shown |= part
    told = [(i, int(indices[i]), float(seen[i]), float(unseen[i])) for i in closest]
    names = ("sample", "training_image", "distance", "distance_to_held_out")
    result = {
        "distances": {"training": _quantiles(seen), "held_out": _quantiles(unseen)},
        "nearer_to_training": int((seen < unseen).sum()),
        "by_chance": samples.count * training.count / (training.count + held_out.count),
        "identical": identical,
        "closest": [dict(zip(names, one, strict=True)) for one in told],
    }
    return result, [(shown[i], pictures[i]) for i in closest]


def save_closest(path: Path, card: dict[str, Any], pairs: list[tuple[Tensor, Tensor]]) -> None:
    """Write the closest pairs, sample and training image, each with its distance over that of held-out images."""
    closest, settings = card["closest"], {"closest": card["closest"]}
    ratios = [one["distance"] / max(one["distance_to_held_out"], 1e-300) for one in closest]
    titles = [
        (f"{one['sample']} | {one['training_image']}", one["sample"], f"{ratio:.2f}")
        for one, ratio in zip(closest, ratios, strict=True)
    ]
    facts = ["left a sample, right its nearest training image", "distance over that of the nearest held-out image"]
    save_pairs(path, pairs, titles, facts, with_attribution(settings, card["training"].get("attribution")))


def _nearest(
    rows: Tensor, chunks: Chunks, size: list[int], extractor: Extractor, scale: Tensor | None = None, shown: int = 0
) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Return the distance ``(N,)`` of each row to the nearest image of this process, and its index.

    Also the pictures nearest to as many rows as are ``shown``: those closest in proportion to ``scale (N,)``.
    """
    # Whichever row ends among the closest was so when its picture came by.
    rows, pictures = rows.to(extractor.device), dict[int, Tensor]()
    best, indices = torch.full((len(rows),), torch.inf, dtype=torch.float64), torch.full((len(rows),), LARGEST)
    for first, images in chunks:
        if list(images.shape[2:]) != size:
            sizes = f"{list(images.shape[2:])} against {size} of the samples (height, width)"
            raise UserError(f"images of {sizes}; give the configuration of the run, which crops them alike")
        features, here = extractor(images).pooled, indices_of(first, len(images))
        if not features.isfinite().all():
            raise UserError(f"images from {int(here[0])} on: NaN or infinity in their features; check those images")
        distances, where = (one.cpu() for one in nearest(rows, features))
        closer = distances < best
        best, indices = torch.where(closer, distances, best), torch.where(closer, here[where], indices)
        near = _closest(best, torch.ones(()) if scale is None else scale, shown)
        pictures = {i: images[where[i]] if closer[i] else pictures[i] for i in near}
    return best, indices, pictures


def _of_all(best: Tensor, indices: Tensor, pictures: dict[int, Tensor]) -> tuple[Tensor, Tensor, dict[int, Tensor]]:
    """Return the same of the images of all processes: of equally near images the least index."""
    parts = gather_objects((best, indices, pictures))
    best = torch.stack([part[0] for part in parts]).amin(dim=0)
    indices = torch.stack([part[1].where(part[0] == best, LARGEST) for part in parts]).amin(dim=0)
    return best, indices, {i: one for part in parts for i, one in part[2].items() if part[1][i] == indices[i]}


def _closest(distances: Tensor, scale: Tensor, count: int) -> list[int]:
    ratios = distances / scale.clamp(min=torch.finfo(torch.float64).tiny)
    found: list[int] = ratios.argsort(stable=True)[:count].tolist()
    return found


def _quantiles(distances: Tensor) -> dict[str, float]:
    values = distances.sort().values
    return {name: float(values[round(part * (len(values) - 1))]) for name, part in _QUANTILES.items()}
