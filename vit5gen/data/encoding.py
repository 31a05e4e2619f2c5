"""Images encoded once: shards of latent means and deviations, and their manifest."""

import hashlib
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch.utils.data import DataLoader

from vit5gen.config import Config
from vit5gen.data.autoencoders.codec import encode
from vit5gen.data.autoencoders.find_autoencoder import find_sizes, load_autoencoder
from vit5gen.data.channel_moments import moments_of_shards, statistics
from vit5gen.data.images import BrokenImage, ImageSet
from vit5gen.data.latents import (
    MANIFEST,
    READ_BEFORE,
    LatentDataset,
    all_finite,
    find_shard_damage,
    open_for,
    read_labels,
    recorded_in,
    settings_of,
)
from vit5gen.data.remote import local_path
from vit5gen.system.distributed import gather_objects, processes, start_processes
from vit5gen.system.errors import UserError, short
from vit5gen.system.files import atomic, cache_folder, locked_file, read_json, sha256, write_json
from vit5gen.system.progress import Progress

SHARD_SIZE = 4096  # images
MakeShard = Callable[[ImageSet, ModelMixin, Config, Progress], tuple[dict[str, torch.Tensor], list[str]]]


def encode_dataset(
    images: ImageSet,
    vae: ModelMixin,
    folder: str | Path,
    config: Config,
    make_shard: MakeShard | None = None,
) -> None:
    """Encode images and, with `data.horizontal_flip`, their mirror images into shards with a manifest.

    A shard holds ``mean`` and ``std`` (n, F, C, h, w) in `data.shard_dtype`, scaled as the transformer sees them, with
    F = 2 (original, mirrored) or 1, and ``labels`` (n,) int64. Process i of n writes shards i, i + n, ...; each appears
    whole or not at all. A second call keeps shards whose checksum is right, makes the others and ends the manifest.
    make_shard: does what `encode_shard`, the default, does.
    Raises `UserError` when the folder has other latents, the disk is too small, an image is broken and
    `data.on_broken_image` is ``"fail"``, or has latents that are not finite in the shard's type.
    """
    vae = vae.to(processes().device)
    settings = settings_of(images, vae, config)

    def make(chosen: ImageSet, progress: Progress) -> tuple[dict[str, torch.Tensor], list[str]]:
        return (make_shard or encode_shard)(chosen, vae, config, progress)

    write_shards(images, settings, shard_bytes(1, settings), make, folder, config.vae.normalize == "measured")


def write_shards(
    images: ImageSet,
    settings: dict[str, Any],
    size: int,
    make: Callable[[ImageSet, Progress], tuple[dict[str, torch.Tensor], list[str]]],
    folder: str | Path,
    measure: bool = False,
) -> None:
    """Write shards of what ``make`` returns for their images, and a manifest; see `encode_dataset`.

    settings: what the manifest says of how they were made.  size: of an image, in bytes.  measure: add the statistics
    of latents to the manifest.
    """
    # What this process still has to encode: shards that are there and sound are kept.
    state, folder = processes(), Path(folder)
    chunks = torch.arange(len(images)).split(SHARD_SIZE)
    mine = range(state.process_index, len(chunks), state.num_processes)
    records = _finished(folder, settings, mine)
    todo = [k for k in mine if k not in records]
    ours = sum(len(chunks[k]) for k in todo)

    # Room for it, and the folder's manifest, by which an interrupted encoding is known.
    missing = sum(gather_objects(ours))  # every process has looked at the folder before any writes there
    if missing and state.is_main_process:
        _reserve(folder, missing, size)
        if not _begun(folder):
            write_json(folder / MANIFEST, settings | {"shards": None})
    state.wait_for_everyone()

    # The shards, each with a record of its own until the manifest has all of them.
    silent = not (todo and state.is_main_process)
    with Progress("encode", ours, "image", silent=silent) as progress:
        for k in todo:
            tensors, broken = make(images.select(chunks[k]), progress)
            records[k] = _write_shard(folder / _shard_name(k), tensors, broken)
    every = {k: record for part in gather_objects(records) for k, record in part.items()}
    shards = [every[k] for k in range(len(chunks))]

    # Their statistics, where these are asked for, and the manifest.
    measured = {}
    if measure:
        found = moments_of_shards([folder / shard["file"] for shard in shards])
        measured = {"statistics": statistics(found, recorded_in(settings))}
    if state.is_main_process:
        _finish(folder, settings, shards, measured)
    state.wait_for_everyone()


def ensure_latents(images: ImageSet, vae: ModelMixin, config: Config) -> Path:
    """Return a folder in the cache that holds the latents of these images of `data`, encoding them if need be."""
    settings = settings_of(images, vae, config)
    return in_cache("latents", settings, config, partial(encode_dataset, images, vae, config=config))


def in_cache(kind: str, settings: dict[str, Any], config: Config, write: Callable[..., None]) -> Path:
    """Return the folder in the cache for shards of these settings, which ``write(folder=...)`` has filled."""
    path = None if config.data.path is None else str(local_path(config.data.path).resolve())
    # What earlier versions did without recording it is not part of the name, so that their latents are found.
    recorded = {key: value for key, value in settings.items() if READ_BEFORE.get(key, ...) != value}
    key = json.dumps(recorded | {"path": path}, sort_keys=True)
    folder = cache_folder() / f"{kind}-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with _waiting_lock(folder.with_suffix(".lock")):
        write(folder=folder)
    return folder


@contextmanager
def _waiting_lock(file: Path) -> Iterator[None]:
    """Wait until no other run fills this part of the cache: it would remove what is half written."""
    state = processes()
    with ExitStack() as stack:
        if state.is_main_process:
            with suppress(OSError):  # what cannot be written may be complete; if not, the encoding says so
                file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked_file(file, wait=True))
        state.wait_for_everyone()
        yield


def encode_images(config: Config, output: str | Path) -> None:
    """Encode the images of a configuration into ``output``, and say what to do next."""
    state, vae, config = start_processes(), load_autoencoder(config.vae.name), find_sizes(config)
    encode_dataset(open_for(config, vae), vae, output, config)
    if state.is_main_process:
        print(f"{output}: {len(LatentDataset(output))} images. Next: train with --data.latents {output}")


def _finished(folder: Path, settings: dict[str, Any], numbers: range) -> dict[int, dict[str, Any]]:
    """Return the records of those shards, by number, that exist and match their checksum."""
    if not _begun(folder):
        return {}
    manifest = read_json(folder / MANIFEST, "latents")
    for key, value in settings.items():
        found = manifest.get(key, READ_BEFORE.get(key))
        if key == "vae" or found == value:
            continue
        if key == "images_sha256" and (found is None or manifest.get("shards") is None):
            if found is not None:  # a broken image was repaired, say
                processes().print(f"note: {folder}: images have changed since encoding began; finished shards are kept")
            continue
        made = f"contains latents made with {key} {short(found)}, not {short(value)}"
        raise UserError(f"output {folder}: {made}; choose another folder or delete this one")
    records = (manifest.get("shards") or []) + [read_json(path, "record") for path in folder.glob("shard_*.json")]
    known = {record.get("file"): record for record in records}
    found = {k: known[name] for k in numbers if (name := _shard_name(k)) in known}
    return {k: one for k, one in found.items() if not find_shard_damage(folder / one["file"], one.get("sha256"))}


def _begun(folder: Path) -> bool:
    """Whether the folder has a manifest and at least one shard."""
    return (folder / MANIFEST).exists() and any(folder.glob("shard_*"))


def _finish(folder: Path, settings: dict[str, Any], shards: list[dict[str, Any]], measured: dict[str, Any]) -> None:
    """Write the manifest unless it is there already, remove what interrupted calls left, and report broken images."""
    labels = torch.cat([read_labels(folder / shard["file"]) for shard in shards])
    counts = torch.bincount(labels, minlength=len(settings["id2label"])).tolist()
    if settings.get("rules", READ_BEFORE["rules"]) > 1 and 0 in counts:
        name = settings["id2label"][str(counts.index(0))]
        advice = "replace them or omit the class from data.classes, and encode into a new folder"
        raise UserError(f"output {folder}: all images of class {name!r} are broken; {advice}")
    there = read_json(folder / MANIFEST, "latents")
    # Of which images the shards of an earlier version were made, and how they were read, is not known.
    unknown = {"images_sha256", *READ_BEFORE} - there.keys()
    if not measured and there.get("shards") == shards:
        measured = {k: v for k, v in there.items() if k == "statistics"}
    known = {k: v for k, v in settings.items() if k not in unknown}
    manifest = known | measured | {"counts": counts, "shards": shards}
    if there != manifest:
        write_json(folder / MANIFEST, manifest)
    for leftover in [*folder.glob("shard_*.json"), *folder.glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)
    if broken := [fault for shard in shards for fault in shard["broken"]]:
        skipped = f"{len(broken)} broken image{'s' * (len(broken) > 1)}"
        print(f"{folder}: skipped {skipped}, listed in {MANIFEST}; the first: {broken[0]}")


def _shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def _reserve(folder: Path, count: int, size: int) -> None:
    """Print what the shards of ``count`` images of ``size`` bytes will take; `UserError` unless the disk has that."""
    needed = count * size / 1e9
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {folder}: {error.strerror}; choose a writable folder") from error
    free = shutil.disk_usage(folder).free / 1e9
    print(f"encode: {count} images -> {needed:.3f} GB in {folder} ({free:.1f} GB free)")
    if needed > free:
        advice = "free some space or choose another folder"
        raise UserError(f"output {folder}: needs {needed:.3f} GB, the disk has {free:.3f} GB; {advice}")


def shard_bytes(count: int, settings: dict[str, Any]) -> int:
    """Return the size of ``count`` images' means, deviations and labels, with or without mirror images."""
    width = getattr(torch, settings["dtype"]).itemsize
    return count * (2 * (1 + settings["horizontal_flip"]) * prod(settings["latent_shape"]) * width + 8)


def _decode(images: ImageSet, indices: list[int]) -> tuple[dict[int, tuple[torch.Tensor, int]], list[str]]:
    """Return the images that decode, with labels, by index, and what is wrong with the others."""
    good, broken = {}, []
    for index in indices:
        try:
            good[index] = images[index]
        except BrokenImage as error:
            broken.append(str(error))
    return good, broken


def encode_shard(
    images: ImageSet, vae: ModelMixin, config: Config, progress: Progress
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors of one shard and what is wrong with the images that it leaves out."""
    data, dtype = config.data, getattr(torch, config.data.shard_dtype)
    tensors: dict[str, list[torch.Tensor]] = {"mean": [], "std": [], "labels": []}
    broken: list[str] = []
    indices: Any = range(len(images))  # which the workers turn into images, so that they can report broken ones
    collate, size = partial(_decode, images), config.vae.batch_size
    for good, bad in DataLoader(indices, size, num_workers=data.num_workers, collate_fn=collate):
        broken += bad
        if broken and data.on_broken_image == "fail":
            raise BrokenImage(broken[0])
        # Means and deviations of the images and, if they are mirrored, of their mirror images.
        if good:
            pixels = torch.stack([image for image, _ in good.values()]).to(vae.device)
            views = [encode(vae, pixels)] + ([encode(vae, pixels.flip(-1))] if data.horizontal_flip else [])
            for name, values in zip(("mean", "std"), zip(*views, strict=True), strict=True):
                exact = torch.stack(values, 1).to("cpu")
                tensors[name].append(exact.to(dtype))
                for index, latents, kept in zip(good, exact, tensors[name][-1], strict=True):
                    if not all_finite(kept):
                        raise UserError(f"{images.name(index)}: {explain_nonfinite(latents, dtype)}")
            tensors["labels"].append(torch.tensor([label for _, label in good.values()]))
        progress.update(len(good) + len(bad))
    if not tensors["labels"]:
        raise UserError(f"data: none of {len(broken)} images can be decoded; {broken[0]}")
    return {name: torch.cat(parts) for name, parts in tensors.items()}, broken


def explain_nonfinite(latents: torch.Tensor, dtype: torch.dtype) -> str:
    """Return why latents (F, C, h, w) are not finite in ``dtype``, and what to do."""
    if not all_finite(latents):
        return "the autoencoder's latents of this image are not finite; check vae.name and its weights"
    limit = f"{str(dtype).removeprefix('torch.')}, whose maximum is {torch.finfo(dtype).max:g}"
    return f"a latent of {latents.abs().max():.4g} overflows {limit}; set data.shard_dtype to bfloat16 or float32"


def _write_shard(path: Path, tensors: dict[str, torch.Tensor], broken: list[str]) -> dict[str, Any]:
    """Write a shard and, next to it, the record that lets an interrupted encoding resume; return the record."""
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"shard {path} not written ({error}); free some space or choose another folder") from error
    count, size = len(tensors["labels"]), path.stat().st_size
    record = {"file": path.name, "images": count, "bytes": size, "sha256": sha256(path), "broken": broken}
    write_json(path.with_suffix(".json"), record)
    return record
