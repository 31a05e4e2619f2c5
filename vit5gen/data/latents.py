"""Images encoded once: shards of latent means and deviations, their manifest, and memory-mapped reading."""

import hashlib
import json
import shutil
from bisect import bisect_right
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cached_property
from itertools import accumulate
from math import prod
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm

from vit5gen.config import DEFAULTS_BEFORE, Config, DataConfig
from vit5gen.data.autoencoders.kl import downsample, encode, load_autoencoder, scaling
from vit5gen.data.images import BrokenImage, ImageSet, make_source, open_images, open_training_images
from vit5gen.system.distributed import gather_objects, processes, rank_and_world, start_processes
from vit5gen.system.errors import UserError, check_whole, distinct, listed, short
from vit5gen.system.files import atomic, cache_folder, locked_file, read_json, sha256, write_json

MANIFEST = "manifest.json"
SHARD_SIZE = 4096  # images
# How pixels of files were read, of which manifests of earlier versions do not tell.
_BEFORE = {key: DEFAULTS_BEFORE[f"data.{key}"] for key in ("exif", "rules")}
_FIXED_BY_VAE = ("vae_sha256", "resolution", "latent_shape", "scaling_factor", "shift_factor")


def encode_dataset(images: ImageSet, vae: AutoencoderKL, folder: str | Path, config: Config) -> None:
    """Encode images and, with `data.horizontal_flip`, their mirror images into shards with a manifest.

    A shard holds ``mean`` and ``std`` (n, F, C, h, w) in `data.shard_dtype`, scaled as the transformer sees them, with
    F = 2 (original, mirrored) or 1, and ``labels`` (n,) int64. Process i of n writes shards i, i + n, ...; each appears
    whole or not at all. A second call keeps shards whose checksum is right, makes the others and ends the manifest.
    Raises `UserError` when the folder holds other latents, the disk is short, an image is broken and
    `data.on_broken_image` is ``"fail"``, or has latents that are not finite in the shard's type.
    """
    state, folder = processes(), Path(folder)
    vae = vae.to(state.device)
    settings = settings_of(images, vae, config)
    chunks = torch.arange(len(images)).split(SHARD_SIZE)
    mine = range(state.process_index, len(chunks), state.num_processes)
    records = _finished(folder, settings, mine)
    ours = sum(len(chunks[k]) for k in mine if k not in records)
    missing = sum(gather_objects(ours))  # every process has looked at the folder before any writes there
    if missing and state.is_main_process:
        _reserve(folder, missing, settings)
        if not _begun(folder):
            write_json(folder / MANIFEST, settings | {"shards": None})
    state.wait_for_everyone()
    with tqdm(
        desc="encode", unit="image", total=ours, disable=not (ours and state.is_main_process), delay=1
    ) as progress:
        for k in mine:
            if k not in records:
                tensors, broken = _encode_shard(images.select(chunks[k]), vae, config, progress)
                records[k] = _write_shard(folder / _shard_name(k), tensors, broken)
    every = {k: record for part in gather_objects(records) for k, record in part.items()}
    shards = [every[k] for k in range(len(chunks))]
    if state.is_main_process:
        _finish(folder, settings, shards)
    state.wait_for_everyone()


def ensure_latents(images: ImageSet, vae: AutoencoderKL, config: Config) -> Path:
    """Return a folder in the cache that holds the latents of these images of `data`, encoding them if need be."""
    path = None if config.data.path is None else str(Path(config.data.path).expanduser().resolve())
    settings = settings_of(images, vae, config)
    # What earlier versions did without saying so has no part in the name: their latents are found.
    told = {key: value for key, value in settings.items() if _BEFORE.get(key, ...) != value}
    key = json.dumps(told | {"path": path}, sort_keys=True)
    folder = cache_folder() / f"latents-{hashlib.sha256(key.encode()).hexdigest()[:16]}"
    with _alone(folder.with_suffix(".lock")):
        encode_dataset(images, vae, folder, config)
    return folder


@contextmanager
def _alone(file: Path) -> Iterator[None]:
    """Wait until no other run fills this part of the cache: it would remove what is half written."""
    state = processes()
    with ExitStack() as stack:
        if state.is_main_process:
            with suppress(OSError):  # what cannot be written may be complete; if not, the encoding says so
                file.parent.mkdir(parents=True, exist_ok=True)
                stack.enter_context(locked_file(file, wait=True))
        state.wait_for_everyone()
        yield


def identity(manifest: dict[str, Any]) -> dict[str, Any]:
    """Return by what a run knows its data again, from the manifest of latents or from `settings_of` images.

    ``samples`` and ``classes`` are those listed, broken images included; ``digest`` is `ImageSet.digest`, None in the
    manifest of an earlier version; ``autoencoder`` its weights and scale.
    """
    id2label = manifest["id2label"]
    return {
        "samples": manifest["images"],
        "classes": [id2label[str(label)] for label in range(len(id2label))],
        "digest": manifest.get("images_sha256"),
        "autoencoder": " ".join(str(manifest[key]) for key in ("vae_sha256", "scaling_factor", "shift_factor")),
    }


def images_beside(data: DataConfig) -> tuple[ImageSet | None, str]:
    """Open the images of latents that are given, without which a machine can train; or return None, and why."""
    try:
        return open_images(data), ""
    except UserError as error:
        return None, str(error)


def encode_images(config: Config, output: str | Path) -> None:
    """Encode the images of a configuration into ``output``, and say how to go on with them."""
    state, vae = start_processes(), load_autoencoder(config.vae.name)
    encode_dataset(open_for(config, vae), vae, output, config)
    if state.is_main_process:
        print(f"{output}: {len(LatentDataset(output))} images. Next: train with --data.latents {output}")


def open_for(config: Config, vae: AutoencoderKL) -> ImageSet:
    """Open a run's images; raise `UserError` when classes, resolution or autoencoder are not as configured."""
    check_autoencoder(config, vae)
    return open_training_images(config.data)


def check_autoencoder(config: Config, vae: AutoencoderKL) -> None:
    """Raise `UserError` unless the autoencoder is as configured and takes images of the configured resolution."""
    for key, expected, found in [
        ("latent_channels", config.vae.latent_channels, vae.config.latent_channels),
        ("downsample", config.vae.downsample, downsample(vae)),
    ]:
        if expected != found:
            raise UserError(f"vae.{key} = {expected}: the autoencoder {config.vae.name} has {found}; set that")
    _ = config.latent_shape  # raises where the resolution does not fit


class LatentDataset:
    """Latents on disk; opening reads the manifest alone, `get` maps and reads one sample.

    Raises `UserError` when the manifest is absent, unfinished, empty or broken, or a shard has not the size it says.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_json(self.folder / MANIFEST, "latents")
        try:
            id2label, shards = self.manifest["id2label"], self.manifest["shards"]
            names = [id2label[str(label)] for label in range(len(id2label))]
            self.class_names = distinct(f"latents {self.folder}, classes", names)
            self._ends = list(accumulate(check_whole("images =", shard["images"], 0) for shard in shards or []))
            sizes = {self.folder / shard["file"]: shard["bytes"] for shard in shards or []}
        except (KeyError, TypeError, AttributeError, UserError) as error:
            raise UserError(
                f"latents {self.folder}: {MANIFEST} is not one of latents ({error!r}); encode again"
            ) from error
        if shards is None:
            raise UserError(f"latents {self.folder}: encoding was interrupted; run the same `vit5gen encode` to end it")
        for path, size in sizes.items():
            found = path.stat().st_size if path.is_file() else "no file"
            if found != size:
                raise UserError(f"latents: {path} has {found} bytes, its manifest says {size}; encode again to mend it")
        if not sum(shard["images"] for shard in shards):
            raise UserError(f"latents {self.folder}: hold no images; encode again")
        self._open: dict[int, Any] = {}  # shards by number; a process maps one when it first reads there

    def __len__(self) -> int:
        return self._ends[-1]

    def get(self, index: int, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return mean and std (C, h, w) in fp32 and the label of one image, or of its mirror image."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        shard, row = self._shard(number), index - (self._ends[number - 1] if number else 0)
        mean, std = (shard.get_slice(name)[row, int(flip)].float() for name in ("mean", "std"))
        return mean, std, int(shard.get_slice("labels")[row : row + 1])

    @cached_property
    def labels(self) -> torch.Tensor:
        """All labels (N,) int64, read on first use."""
        labels = torch.cat([_read_labels(self.folder / shard["file"]) for shard in self.manifest["shards"]])
        self._check_labels(labels)
        return labels

    def verify(self) -> None:
        """Compare this process's share of the shards with the manifest; raise `UserError` when one differs.

        Compared are checksums, shapes, and labels with the classes; all values are finite. The manifest has passed
        `check`.
        """
        views = [1 + self.manifest["horizontal_flip"], *self.manifest["latent_shape"]]
        rank, world = rank_and_world()
        for shard in self.manifest["shards"][rank::world]:
            path, expected = self.folder / shard["file"], [shard["images"], *views]
            if sha256(path) != shard["sha256"]:
                raise UserError(f"latents: {path} does not match its checksum; encode again to mend it")
            with safe_open(path, framework="pt") as file:
                found = [file.get_slice(name).get_shape() for name in ("mean", "std", "labels")]
            if found != [expected, expected, expected[:1]]:
                raise UserError(
                    f"latents: {path} has means, deviations, labels of shapes {found}, its manifest says {expected}; "
                    "encode again"
                )
            if not _is_finite(path):
                raise UserError(f"latents: {path} has values that are not finite; encode again, which names the image")
            self._check_labels(_read_labels(path))

    def _check_labels(self, labels: torch.Tensor) -> None:
        if not 0 <= int(labels.min()) <= int(labels.max()) < len(self.class_names):
            raise UserError(
                f"latents {self.folder}: labels from {labels.min()} to {labels.max()}, expected 0 to"
                f" {len(self.class_names) - 1}; encode again"
            )

    def check(self, config: Config, vae: AutoencoderKL) -> None:
        """Raise `UserError` naming both values unless a run of this configuration can train on these latents."""
        check_autoencoder(config, vae)
        wanted = _latent_settings(vae, config)
        for key in _FIXED_BY_VAE:
            if self.manifest.get(key) != wanted[key]:
                names = f" ({self.manifest.get('vae')} there, {wanted['vae']} here)" if key == "vae_sha256" else ""
                self._refuse(key, self.manifest.get(key), wanted[key], names)
        if len(self.class_names) != config.data.num_classes:
            names = f" (there: {listed(self.class_names)})"
            self._refuse("num_classes", len(self.class_names), config.data.num_classes, names)
        images, _ = images_beside(config.data)
        classes = config.data.classes or (self.class_names if images is None else images.class_names)
        if self.class_names != classes:
            self._refuse("classes", self.class_names, classes)
        if self.manifest.get("horizontal_flip") not in ([True] if config.data.horizontal_flip else [True, False]):
            self._refuse("horizontal_flip", False, True)
        if images is not None and len(images) != (count := self.manifest.get("images")):
            processes().print(
                f"note: latents {self.folder} are of {count} images, but the data have {len(images)}: the distances "
                "compare with these"
            )
        for key, value in _reading(config).items():
            if (found := self.manifest.get(key, _BEFORE[key])) != value:
                processes().print(
                    f"note: latents {self.folder} were made with data.{key} {found}, the run has {value}: so it reads "
                    "the images that it compares with"
                )

    def _refuse(self, key: str, found: Any, wanted: Any, more: str = "") -> None:
        raise UserError(
            f"latents {self.folder}: made with {key} {short(found)}, the run has {short(wanted)}{more};"
            f" encode again or change the configuration"
        )

    def _shard(self, number: int) -> Any:
        if number not in self._open:
            self._open[number] = safe_open(self.folder / self.manifest["shards"][number]["file"], framework="pt")
        return self._open[number]

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # maps stay with their process


def _latent_settings(vae: AutoencoderKL, config: Config) -> dict[str, Any]:
    """Everything about a run that the numbers in its shards depend on, but the images."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    scale, shift = scaling(vae)
    return {
        "vae": config.vae.name,
        "vae_sha256": digest.hexdigest(),
        "scaling_factor": scale,
        "shift_factor": shift,
        "resolution": config.data.resolution,
        "latent_shape": list(config.latent_shape),
        "horizontal_flip": config.data.horizontal_flip,
        "dtype": config.data.shard_dtype,
    }


def _reading(config: Config) -> dict[str, Any]:
    """How the pixels of files are read."""
    return config.data.model_dump(include=set(_BEFORE)) if make_source(config.data).reads_files else {}


def settings_of(images: ImageSet, vae: AutoencoderKL, config: Config) -> dict[str, Any]:
    """Return what a manifest of these images' latents tells of how they were made."""
    of_images: dict[str, Any] = {
        "source": config.data.source,
        "split": config.data.split,
        "images": len(images),
        "images_sha256": images.digest(),
        "id2label": {str(label): name for label, name in enumerate(images.class_names)},
    }
    if config.data.source_kwargs:
        of_images["source_kwargs"] = config.data.source_kwargs
    return _latent_settings(vae, config) | _reading(config) | of_images


def _finished(folder: Path, settings: dict[str, Any], numbers: range) -> dict[int, dict[str, Any]]:
    """Return the records of those shards, by number, that exist and match their checksum."""
    if not _begun(folder):
        return {}
    manifest = read_json(folder / MANIFEST, "latents")
    for key, value in settings.items():
        found = manifest.get(key, _BEFORE.get(key))
        if key == "vae" or found == value:
            continue
        if key == "images_sha256" and (found is None or manifest.get("shards") is None):
            if found is not None:  # a broken image was repaired, say
                processes().print(f"note: {folder}: images have changed since its shards were begun; whole ones stay")
            continue
        raise UserError(
            f"output {folder}: holds latents made with {key} {short(found)}, not {short(value)};"
            f" choose another folder or remove this one"
        )
    records = (manifest.get("shards") or []) + [read_json(path, "record") for path in folder.glob("shard_*.json")]
    by_file = {record.get("file"): record for record in records}
    found = {k: by_file[_shard_name(k)] for k in numbers if _shard_name(k) in by_file}
    return {
        k: record
        for k, record in found.items()
        if (path := folder / record["file"]).is_file() and sha256(path) == record.get("sha256") and _is_finite(path)
    }


def _begun(folder: Path) -> bool:
    """Whether the folder has a manifest, and any shard that it speaks of."""
    return (folder / MANIFEST).exists() and any(folder.glob("shard_*"))


def _finish(folder: Path, settings: dict[str, Any], shards: list[dict[str, Any]]) -> None:
    """Write the manifest unless it is there already, remove what interrupted calls left, and report broken images."""
    labels = torch.cat([_read_labels(folder / shard["file"]) for shard in shards])
    counts = torch.bincount(labels, minlength=len(settings["id2label"])).tolist()
    if settings.get("rules", 1) > 1 and 0 in counts:
        name = settings["id2label"][str(counts.index(0))]
        raise UserError(
            f"output {folder}: all images of class {name!r} are broken; replace them, or leave it out of data.classes, "
            "and encode into a new folder"
        )
    there = read_json(folder / MANIFEST, "latents")
    # Of which images the shards of an earlier version were made, and how they were read, is not known.
    unknown = {"images_sha256", *_BEFORE} - there.keys()
    manifest = {k: v for k, v in settings.items() if k not in unknown} | {"counts": counts, "shards": shards}
    if there != manifest:
        write_json(folder / MANIFEST, manifest)
    for leftover in [*folder.glob("shard_*.json"), *folder.glob(".*.tmp")]:
        leftover.unlink(missing_ok=True)
    if broken := [problem for shard in shards for problem in shard["broken"]]:
        print(f"{folder}: left out {len(broken)} broken images, listed in {MANIFEST}; the first: {broken[0]}")


def _shard_name(number: int) -> str:
    return f"shard_{number:05d}.safetensors"


def _read_labels(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as shard:
        return shard.get_tensor("labels")


def _finite(values: torch.Tensor) -> bool:
    return all(bool(bound.isfinite()) for bound in values.aminmax())  # NaN is both bounds


def _is_finite(path: Path) -> bool:
    with safe_open(path, framework="pt") as shard:
        return all(_finite(shard.get_tensor(name)) for name in ("mean", "std"))


def _reserve(folder: Path, count: int, settings: dict[str, Any]) -> None:
    """Print how much the shards of ``count`` images will take; raise `UserError` unless the disk has as much."""
    needed = shard_bytes(count, settings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"output {folder}: {error.strerror}; choose a folder that can be written") from error
    free = shutil.disk_usage(folder).free
    print(f"encode: {count} images -> {needed / 1e9:.3f} GB in {folder} ({free / 1e9:.1f} GB free)")
    if needed > free:
        raise UserError(
            f"output {folder}: needs {needed / 1e9:.3f} GB, the disk has {free / 1e9:.3f} GB; free some or go elsewhere"
        )


def shard_bytes(count: int, settings: dict[str, Any]) -> int:
    """Return the size of ``count`` images' means, deviations and labels, with or without mirror images."""
    width = getattr(torch, settings["dtype"]).itemsize
    return count * (2 * (1 + settings["horizontal_flip"]) * prod(settings["latent_shape"]) * width + 8)


class _Decoded(Dataset):
    """Images with labels; a broken one becomes its error message, so that a worker can hand it over."""

    def __init__(self, images: ImageSet) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int] | str:
        try:
            return self.images[index]
        except BrokenImage as error:
            return str(error)


def _encode_shard(
    images: ImageSet, vae: AutoencoderKL, config: Config, progress: tqdm
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Return the tensors of one shard and what is wrong with the images that it leaves out."""
    data, dtype = config.data, getattr(torch, config.data.shard_dtype)
    tensors: dict[str, list[torch.Tensor]] = {"mean": [], "std": [], "labels": []}
    broken: list[str] = []
    loader = DataLoader(_Decoded(images), config.vae.batch_size, num_workers=data.num_workers, collate_fn=list)
    for start, batch in zip(range(0, len(images), config.vae.batch_size), loader, strict=True):
        good = [item for item in batch if not isinstance(item, str)]
        broken += [item for item in batch if isinstance(item, str)]
        if broken and data.on_broken_image == "fail":
            raise BrokenImage(broken[0])
        if good:
            pixels = torch.stack([image for image, _ in good]).to(vae.device)
            views = [encode(vae, pixels)] + ([encode(vae, pixels.flip(-1))] if data.horizontal_flip else [])
            for name, values in zip(("mean", "std"), zip(*views, strict=True), strict=True):
                exact = torch.stack(values, 1).to("cpu")
                tensors[name].append(exact.to(dtype))
                if not _finite(tensors[name][-1]):
                    numbers = [start + k for k, item in enumerate(batch) if not isinstance(item, str)]
                    spoilt = next(k for k in range(len(good)) if not _finite(tensors[name][-1][k]))
                    raise UserError(f"{images.name(numbers[spoilt])}: {_why(exact[spoilt], dtype)}")
            tensors["labels"].append(torch.tensor([label for _, label in good]))
        progress.update(len(batch))
    if not tensors["labels"]:
        raise UserError(f"data: none of {len(broken)} images decodes; {broken[0]}")
    return {name: torch.cat(parts) for name, parts in tensors.items()}, broken


def _why(latents: torch.Tensor, dtype: torch.dtype) -> str:
    """Return why latents (F, C, h, w) are not finite in ``dtype``, and what to do."""
    if not _finite(latents):
        return "the autoencoder makes latents of it that are not finite; check vae.name and its weights"
    name, most = str(dtype).removeprefix("torch."), torch.finfo(dtype).max
    return (
        f"a latent of {latents.abs().max():.4g} overflows {name}, which ends at {most:g}; "
        "set data.shard_dtype to bfloat16 or float32"
    )


def _write_shard(path: Path, tensors: dict[str, torch.Tensor], broken: list[str]) -> dict[str, Any]:
    """Write a shard and, beside it, the record that lets an interrupted encoding go on; return the record."""
    try:
        with atomic(path) as temporary:
            save_file(tensors, temporary)
    except (OSError, SafetensorError) as error:
        raise UserError(f"shard {path} cannot be written ({error}); make room or choose another folder") from error
    record = {
        "file": path.name,
        "images": len(tensors["labels"]),
        "bytes": path.stat().st_size,
        "sha256": sha256(path),
        "broken": broken,
    }
    write_json(path.with_suffix(".json"), record)
    return record
