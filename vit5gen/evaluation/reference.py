"""One pass over images and what it leaves; references made of such a pass, of ADM's npz or of a statistics file."""

import json
import zipfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vit5gen.config import ReadConfig
from vit5gen.evaluation.adm_batches import ADM_BATCHES, ADM_SHAPES, fetch_adm_batch
from vit5gen.evaluation.distances import SPLIT_SIZE, FrechetReference, ScoreSums
from vit5gen.evaluation.features import Extractor
from vit5gen.evaluation.samples import Samples, broken_npz, indices_of, open_image_set, open_npz
from vit5gen.evaluation.statistics import GROUPS, FeatureStatistics, Grouped
from vit5gen.generation.card import versions
from vit5gen.system.distributed import gather_rows, on_main, sum_over_processes
from vit5gen.system.errors import UserError
from vit5gen.system.files import atomic, sha256

FORMAT = "vit5gen statistics 1"
# The size of ADM's reference batch, on which it computes precision and recall.
REFERENCE_ROWS = 10_000


@dataclass(frozen=True)
class Scan:
    """What a pass over ``count`` images of ``size`` (H, W) leaves: score sums, pooled ``rows (K, D)``, and moments.

    ``moments``: of each space of the extractor, by the names of `Extractor.dims`.
    ``named`` (C, C) counts images by their class and the one that the extractor names; None when classes are unknown.
    The same on every process, but for ``rows``, which only the main process has whole. ``row_labels``: the classes of
    the rows, where they are known.
    """

    count: int
    size: list[int]
    moments: Mapping[str, Grouped]
    score: ScoreSums | None
    rows: Tensor
    named: Tensor | None = None
    row_labels: Sequence[str] = ()

    @property
    def pooled(self) -> Grouped:
        """Moments of the pooled features."""
        return self.moments["pooled"]

    def leave_one_out(self) -> Iterator["Scan"]:
        """Yield the scan without the images of each group, with one group, so that metrics need not know; not empty.

        ``rows`` must be those of all images, or none.
        """
        parts = (found.leave_one_out(found.total()) for found in self.moments.values())
        groups, index = len(self.pooled.groups), torch.arange(len(self.rows))
        for group, rest in enumerate(zip(*parts, strict=True)):
            yield Scan(
                rest[0].count,
                self.size,
                {name: Grouped.of([part]) for name, part in zip(self.moments, rest, strict=True)},
                self.score.without(group) if self.score is not None else None,
                self.rows[index % groups != group],
                row_labels=[label for i, label in enumerate(self.row_labels) if i % groups != group],
            )


def scan(
    chunks: Iterable[tuple[int | Tensor, Tensor]],
    total: int,
    extractor: Extractor,
    rows: int = 0,
    groups: int = GROUPS,
    labels: Tensor | None = None,
    row_labels: Sequence[str] = (),
) -> Scan:
    """Extract features of this process's ``(first index, uint8 images)`` and join them with those of the others.

    ``total`` images in all; pooled features of ``rows`` of them, evenly spaced, are kept. ``labels`` (N,) are places
    among the extractor's classes, ``row_labels`` the N images' own.
    Raises `UserError` when an image has features that are not finite, or when images are missing.
    """
    # What an image adds to: sums whose size does not grow with the number of images, and the rows that are kept.
    moments = {name: Grouped(dim, groups) for name, dim in extractor.dims.items()}
    score = ScoreSums(total, extractor.num_classes, SPLIT_SIZE, groups) if extractor.num_classes else None
    # Filled in place: a list of batches would take twice the memory when it is joined.
    kept, seen = torch.empty(rows, extractor.dim), torch.zeros(rows, dtype=torch.bool)
    size: list[int] = []
    named = None if labels is None else torch.zeros(extractor.num_classes**2, dtype=torch.int64)

    def add(found: Mapping[str, Tensor], indices: Tensor) -> None:
        for name, values in found.items():
            moments[name].update(values, indices)

    # One pass; an image whose features are no numbers would spoil all sums. A thread adds moments meanwhile.
    with ThreadPoolExecutor(1) as worker:
        added = worker.submit(add, {}, torch.empty(0))
        for first, images in chunks:
            size = list(images.shape[2:])
            features = extractor(images)
            indices = indices_of(first, len(images))
            found = {name: values.cpu() for name, values in features.spaces.items() if name in moments}
            for values in found.values():
                if (broken := ~values.isfinite().all(dim=1)).any():
                    number = int(indices[broken][0])
                    raise UserError(f"image {number}: NaN or infinity in its features; check that image")
            added.result()
            added = worker.submit(add, found, indices)
            if score is not None and features.logits is not None:
                score.update(features.logits.double().softmax(dim=1), indices)
            if named is not None and labels is not None and features.logits is not None:
                pairs = labels[indices] * extractor.num_classes + features.logits.argmax(dim=1).cpu()
                named += torch.bincount(pairs, minlength=len(named))
            slots = indices * rows // total
            chosen = slots != (indices + 1) * rows // total
            kept[slots[chosen]] = found["pooled"][chosen].float()
            seen[slots[chosen]] = True
        added.result()

    # Join the processes, of which each has read a part.
    for sums in (*moments.values(), score):
        if sums is not None:
            sums.all_reduce()
    count = sum(group.count for group in moments["pooled"].groups)
    if count != total:
        raise UserError(f"images: {count} of {total} were read; pass all of them")
    kept = gather_rows(kept if seen.all() else kept[seen], seen.nonzero()[:, 0])
    named = None if named is None else sum_over_processes(named).view(extractor.num_classes, -1)
    classes = [row_labels[((i + 1) * total - 1) // rows] for i in range(rows)] if row_labels else []
    return Scan(count, size, moments, score, kept, named, classes)


@dataclass(frozen=True)
class Reference:
    """What samples are compared with: ``moments`` of ``count`` images (None: unknown), ``rows`` of pooled features.

    Moments are those of a `Scan`, where they are known.  ``hashes``: those of the images, see `Samples`, and
    ``row_labels``: the classes of the rows, where they are known.  ``denominators``: distances of validation images to
    it by space, where FDr^6 is to be in proportion to these.
    """

    moments: Mapping[str, FrechetReference]
    count: int | None
    rows: Tensor | None
    identity: dict[str, Any]
    hashes: Tensor | None = None
    row_labels: Sequence[str] = ()
    denominators: Mapping[str, float] | None = None

    @property
    def pooled(self) -> FrechetReference:
        """Moments of the pooled features."""
        return self.moments["pooled"]

    def floor(self, count: int) -> float | None:
        """Return the Frechet distance of ``count`` of the reference's own images to the rest of it.

        None when it has fewer than twice as many images, or when their features are not at hand.
        ADM's statistics are of the whole training set, in which the images of its batch do not matter.
        """
        if self.rows is None or not 2 <= count <= len(self.rows) or (self.count or 2 * count) < 2 * count:
            return None
        held_out = FeatureStatistics(self.rows.shape[1])
        held_out.update(self.rows[torch.arange(count) * len(self.rows) // count])
        rest = self.pooled
        if self.count is not None:
            everything = FeatureStatistics.from_moments(self.pooled.mean, self.pooled.covariance, self.count)
            rest = FrechetReference.of(everything.without(held_out))
        return rest.distance(held_out.mean, held_out.covariance)


def open_reference(
    path: str | Path, extractor: Extractor, batch_size: int, protocol: str | None = None, read: ReadConfig | None = None
) -> Reference:
    """Open what samples are compared with: ADM's npz or its name, a statistics file, or images of `open_image_set`."""
    file = Path(path)
    if str(path) in ADM_BATCHES and not file.exists():
        file = on_main(lambda: fetch_adm_batch(str(path)))
    if _is_statistics(file):
        return read_statistics(file, extractor)
    is_npz = file.suffix.lower() == ".npz" and zipfile.is_zipfile(file)
    adm = read_adm_reference(file, extractor, batch_size) if is_npz else None
    return adm or reference_of(open_image_set(file, batch_size, protocol, read or ReadConfig()), extractor)


def reference_of(images: Samples, extractor: Extractor) -> Reference:
    """Extract a reference from images."""
    kept = min(images.count, REFERENCE_ROWS)
    found = scan(images.watch(), images.count, extractor, kept, groups=1, row_labels=images.class_names)
    moments = {name: FrechetReference.of(one.total()) for name, one in found.moments.items()}
    identity, (hashes,) = images.identity | {"size": found.size}, images.hashes
    return Reference(moments, found.count, found.rows, identity, hashes, found.row_labels)


def read_adm_reference(path: Path, extractor: Extractor, batch_size: int) -> Reference | None:
    """Read ADM's reference batch: ``mu, sigma``, perhaps ``mu_s, sigma_s``, perhaps images ``arr_0`` for precision.

    None for an npz without ``mu``.
    """
    with broken_npz(path), np.load(path, allow_pickle=False) as archive:
        names = set(archive.files)
        arrays = {name: torch.from_numpy(archive[name].astype(np.float64)) for name in names & set(ADM_SHAPES)}
    if "mu" not in names:
        return None
    if extractor.metric != "FID":
        advice = f"extractor {extractor.name} needs images or a statistics file made with it"
        raise UserError(f"reference {path}: its mu and sigma are of Inception features; {advice}")
    for name, shape in ADM_SHAPES.items():
        if name in arrays and (arrays[name].shape != shape or not arrays[name].isfinite().all()):
            raise UserError(f"reference {path}: {name} is {tuple(arrays[name].shape)}; expected {shape}, all finite")
    if "sigma" not in arrays:
        raise UserError(f"reference {path}: has mu but no sigma; download it again")
    batch = reference_of(open_npz(path, batch_size), extractor) if "arr_0" in names else None
    identity: dict[str, Any] = {"kind": "adm", "path": str(path), "sha256": sha256(path), "images": 0}
    moments = {"pooled": FrechetReference(arrays["mu"], arrays["sigma"])}
    if {"mu_s", "sigma_s"} <= arrays.keys():
        moments["spatial"] = FrechetReference(arrays["mu_s"], arrays["sigma_s"])
    if batch is None:
        return Reference(moments, None, None, identity)
    identity |= {"images": batch.count, "size": batch.identity["size"]}
    return Reference(moments, None, batch.rows, identity, batch.hashes, batch.row_labels)


def save_statistics(reference: Reference, extractor: Extractor, path: Path) -> None:
    """Write a reference as safetensors, with the extractor that it belongs to."""
    tensors: dict[str, Tensor] = {}
    for space, found in reference.moments.items():
        tensors |= {f"{_prefix(space)}mean": found.mean, f"{_prefix(space)}covariance": found.covariance}
    if reference.rows is not None:
        tensors["rows"] = reference.rows
    if reference.hashes is not None:
        tensors["hashes"] = reference.hashes
    content = {"count": reference.count, "source": reference.identity, "row_labels": reference.row_labels}
    content["versions"] = versions()
    metadata = {"format": FORMAT, "extractor": json.dumps(extractor.identity), "content": json.dumps(content)}
    with atomic(path) as temporary:
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, temporary, metadata)


def _prefix(space: str) -> str:
    """Return what stands before "mean" and "covariance" of a space in a statistics file."""
    return "" if space == "pooled" else f"{space}_"


def _is_statistics(path: Path) -> bool:
    """Whether ``path`` is a safetensors file, by its name or its first bytes: a header's length and its brace."""
    if path.suffix == ".safetensors" or not path.is_file():
        return path.suffix == ".safetensors"
    with path.open("rb") as file:
        start = file.read(9)
    return start[8:] == b"{" and int.from_bytes(start[:8], "little") < path.stat().st_size


def read_statistics(path: Path, extractor: Extractor) -> Reference:
    """Read a file of `save_statistics`; raise `UserError` when another extractor made it."""
    # Only a file that `save_statistics` wrote,
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  # not a dict
    except (OSError, SafetensorError) as error:
        raise UserError(f"reference {path} cannot be read ({error}); create it with --save-statistics") from error
    if metadata.get("format") != FORMAT:
        raise UserError(f"reference {path}: not a statistics file; create one with --save-statistics")

    # from features of the same extractor,
    made_with = json.loads(metadata["extractor"])
    for key, value in extractor.identity.items():
        if made_with.get(key) != value:
            found = f"from another extractor ({key} {made_with.get(key)!r}, now {value!r})"
            advice = "create it again with --save-statistics and this extractor"
            raise UserError(f"reference {path}: {found}; {advice}")

    # and what it holds of them.
    content = json.loads(metadata["content"])
    moments = {
        space: FrechetReference(tensors[f"{_prefix(space)}mean"], tensors[f"{_prefix(space)}covariance"])
        for space in extractor.dims
        if f"{_prefix(space)}mean" in tensors
    }
    identity = {"kind": "statistics", "path": str(path), "sha256": sha256(path), "source": content["source"]}
    hashes, labels = tensors.get("hashes"), content.get("row_labels", ())
    return Reference(moments, content["count"], tensors.get("rows"), identity, hashes, labels)
