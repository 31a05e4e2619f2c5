"""Latents on disk: what their manifest says, and memory-mapped reading."""

import hashlib
import json
from bisect import bisect_right
from functools import cached_property
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch
from diffusers import ModelMixin
from safetensors import safe_open

from vit5gen.config import DEFAULTS_BEFORE, Config, DataConfig
from vit5gen.data.autoencoders.codec import Normalization, normalization_of, sizes_of
from vit5gen.data.channel_moments import moments_of_shards, normalization_from, statistics
from vit5gen.data.images import ImageSet, make_source, open_images, open_training_images
from vit5gen.data.remote import RemoteFile, discard, fetch, fetch_folder
from vit5gen.system.distributed import processes, rank_and_world
from vit5gen.system.errors import UserError, check_whole, distinct, listed, short
from vit5gen.system.files import atomic, read_json, sha256

MANIFEST = "manifest.json"
# How pixels of files were read, of which manifests of earlier versions do not tell.
READ_BEFORE = {key: DEFAULTS_BEFORE[f"data.{key}"] for key in ("exif", "rules")}
_COPY_AGAIN = "it was removed; run the same command again to copy it again"
_FIXED_BY_VAE = ("vae_sha256", "resolution", "latent_shape", "scaling_factor", "shift_factor")


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
        "autoencoder": " ".join([manifest["vae_sha256"], *map(_dense, recorded_in(manifest))]),
    }


def recorded_in(manifest: dict[str, Any]) -> Normalization:
    """Return how the latents in shards were normalised."""
    return Normalization(manifest["scaling_factor"], manifest["shift_factor"])


def recorded_normalization(data: dict[str, Any]) -> Normalization | None:
    """Return how latents were normalised, from an `identity` that a checkpoint recorded, which may lack it."""
    values = data.get("autoencoder", "").split()[1:]
    return Normalization(*map(json.loads, values)) if values else None


def _dense(value: Any) -> str:
    return json.dumps(value, separators=(",", ":"))


def find_class_names(config: Config) -> list[str]:
    """Return the classes of a run's data by label; raise `UserError` when these are absent, or not `num_classes`."""
    if config.data.latents is not None and not config.data.from_images:
        return open_latents(config.data.latents).class_names
    return open_training_images(config.data).class_names


def fetch_data(data: DataConfig) -> None:
    """Copy what a run trains on into the cache, if it is at a URL."""
    if data.latents is not None and not data.from_images:
        open_latents(data.latents)
    elif data.path is not None:
        fetch_folder(data.path)


def open_latents(place: str) -> "LatentDataset":
    """Open the latents in a folder; copy them first from a URL, by the checksums of their manifest."""
    return LatentDataset(fetch("data.latents", place, _list_shards))


def _list_shards(system: Any, root: str, folder: Path) -> list[RemoteFile]:
    with atomic(folder / MANIFEST) as temporary:
        system.get_file(f"{root}/{MANIFEST}", str(temporary))
    shards = read_json(folder / MANIFEST, "latents").get("shards")
    if shards is None:
        raise UserError("encoding was interrupted; run `vit5gen encode` again to finish")
    try:
        return [RemoteFile(f"{root}/{one['file']}", one["file"], one["bytes"], one["sha256"]) for one in shards]
    except (LookupError, TypeError) as error:
        raise UserError(f"{MANIFEST} is not a manifest of latents ({error!r}); encode again") from error


def images_beside(data: DataConfig) -> tuple[ImageSet | None, str]:
    """Open the images of latents that are given, without which a machine can train; or return None, and why."""
    try:
        return open_images(data), ""
    except UserError as error:
        return None, str(error)


def open_for(config: Config, vae: ModelMixin) -> ImageSet:
    """Open a run's images; raise `UserError` when classes, resolution or autoencoder are not as configured."""
    check_autoencoder(config, vae)
    return open_training_images(config.data)


def check_autoencoder(config: Config, vae: ModelMixin) -> None:
    """Raise `UserError` unless the autoencoder is as configured and takes images of the configured resolution."""
    sizes = sizes_of(vae)
    for key, expected, found in [
        ("latent_channels", config.vae.latent_channels, sizes.channels),
        ("downsample", config.vae.downsample, sizes.downsample),
    ]:
        if expected not in (None, found):
            raise UserError(f"vae.{key} = {expected}, but {config.vae.name} has {found}; set vae.{key} to {found}")
    if sizes.side not in (None, side := config.data.resolution):
        raise UserError(f"data.resolution = {side}, but {config.vae.name} takes {sizes.side}; set it to {sizes.side}")
    _ = config.latent_shape  # raises where the resolution does not fit


def images_of(latents: "LatentDataset", images: ImageSet, config: Config) -> ImageSet:
    """Return the images of which latents were made, in their order, without those that were left out as broken.

    Only shards from which some were left out are decoded. Raises `UserError` where ``images`` are others.
    """
    manifest, found = latents.manifest, settings_of_images(images, config)
    differ = [key for key, value in found.items() if manifest.get(key, READ_BEFORE.get(key, value)) != value]
    kept: list[int] = []
    start = 0
    for shard in manifest["shards"] if not differ else ():
        rows = range(start, start + shard["images"] + len(shard.get("broken", ())))
        start = rows.stop
        kept += rows if len(rows) == shard["images"] else filter(images.decodes, rows)
    chosen = images if kept == list(range(len(images))) else images.select(kept)
    if differ or not torch.equal(chosen.labels, latents.labels):
        fault = f"were made of other images than those of data, which an objective needs ({[*differ, 'labels'][0]}"
        raise UserError(f"latents {latents.folder}: {fault} differ); correct data.path and data.split, or encode again")
    return chosen


class LatentDataset:
    """Latents on disk; opening reads the manifest alone, `get` maps and reads one sample.

    Raises `UserError` when the manifest is absent, unfinished, empty or broken, or a shard has not the size recorded.
    """

    def __init__(self, folder: str | Path) -> None:
        # The manifest, whose values are those of a file that anyone may have changed.
        self.folder = Path(folder)
        self.manifest: dict[str, Any] = read_json(self.folder / MANIFEST, "latents")
        try:
            id2label, shards = self.manifest["id2label"], self.manifest["shards"]
            names = [id2label[str(label)] for label in range(len(id2label))]
            self.class_names = distinct(f"latents {self.folder}, classes", names)
            self._ends = list(accumulate(check_whole("images =", shard["images"], 0) for shard in shards or []))
            sizes = {self.folder / shard["file"]: shard["bytes"] for shard in shards or []}
        except (KeyError, TypeError, AttributeError, UserError) as error:
            fault = f"{MANIFEST} is not a manifest of latents ({error!r})"
            raise UserError(f"latents {self.folder}: {fault}; encode again") from error
        if shards is None:
            raise UserError(f"latents {self.folder}: encoding was interrupted; run `vit5gen encode` again to finish")

        # Its shards, as whole as their sizes tell; `verify` reads them.
        for path, size in sizes.items():
            found = path.stat().st_size if path.is_file() else "none"
            if found != size:
                advice = _COPY_AGAIN if discard(path) else "encode again to fix it"
                raise UserError(f"latents: {path} has {found} of {size} bytes; {advice}")
        if not sum(shard["images"] for shard in shards):
            raise UserError(f"latents {self.folder}: no images; encode again")
        self._open: dict[int, Any] = {}  # shards by number; a process maps one when it first reads there
        self._change: tuple[torch.Tensor, torch.Tensor] | None = None  # of values that are read: factor and offset

    def __len__(self) -> int:
        return self._ends[-1]

    def get(self, index: int, flip: bool = False) -> tuple[torch.Tensor, torch.Tensor, int]:
        """Return mean and std (C, h, w) in fp32 and the label of one image, or of its mirror image."""
        shard, row = self._place(index)
        mean, std = (shard.get_slice(name)[row, int(flip)].float() for name in ("mean", "std"))
        if self._change is not None:
            factor, offset = self._change
            mean, std = mean * factor + offset, std * factor
        return mean, std, int(shard.get_slice("labels")[row : row + 1])

    def features(self, index: int, flip: bool) -> torch.Tensor:
        """Return the features (C, h, w) fp16 of one image, where the shards hold those of an encoder."""
        shard, row = self._place(index)
        return shard.get_slice("features")[row, int(flip)]

    def measured(self) -> Normalization:
        """Return the normalisation to mean 0 and deviation 1 by the manifest's statistics, or those of the shards.

        All processes take part. Raises `UserError` for statistics that are none.
        """
        found = self.manifest.get("statistics")
        if found is None:
            files = [self.folder / shard["file"] for shard in self.manifest["shards"]]
            found = statistics(moments_of_shards(files), recorded_in(self.manifest))
        return normalization_from(found, f"latents {self.folder}")

    def normalize(self, wanted: Normalization) -> None:
        """Have latents read as ``wanted``, whatever the normalisation of the shards."""
        there = recorded_in(self.manifest)
        if wanted != there:
            both = (torch.tensor(values, dtype=torch.float64).view(-1, 1, 1) for values in (*there, *wanted))
            scale, shift, new_scale, new_shift = both
            self._change = (new_scale / scale).float(), ((shift - new_shift) * new_scale).float()

    @cached_property
    def labels(self) -> torch.Tensor:
        """All labels (N,) int64, read on first use."""
        labels = torch.cat([read_labels(self.folder / shard["file"]) for shard in self.manifest["shards"]])
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
            if damage := find_shard_damage(path, shard["sha256"]):
                damage = f"does not match its checksum; {_COPY_AGAIN}" if discard(path) else damage
                raise UserError(f"latents: {path} {damage}")
            with safe_open(path, framework="pt") as file:
                found = [file.get_slice(name).get_shape() for name in ("mean", "std", "labels")]
            if found != [expected, expected, expected[:1]]:
                shapes = f"shapes {found}, its manifest says {expected}"
                raise UserError(f"latents: {path} has means, deviations, labels of {shapes}; encode again")
            self._check_labels(read_labels(path))

    def _check_labels(self, labels: torch.Tensor) -> None:
        least, most, last = int(labels.min()), int(labels.max()), len(self.class_names) - 1
        if not 0 <= least <= most <= last:
            raise UserError(f"latents {self.folder}: labels from {least} to {most}, expected 0 to {last}; encode again")

    def check(self, config: Config, vae: ModelMixin) -> None:
        """Raise `UserError` naming both values unless a run of this configuration can train on these latents."""
        # What the transformer sees: latents of the same autoencoder, classes and views.
        check_autoencoder(config, vae)
        wanted = _latent_settings(vae, config)
        for key in _FIXED_BY_VAE:
            names = f" ({self.manifest.get('vae')}, not {wanted['vae']})" if key == "vae_sha256" else ""
            self._compare(key, self.manifest.get(key), wanted[key], names)
        names = f" (classes of the latents: {listed(self.class_names)})"
        self._compare("num_classes", len(self.class_names), config.data.num_classes or len(self.class_names), names)
        self._compare("held_out", self.manifest.get("held_out"), config.data.held_out)
        images, _ = images_beside(config.data)
        classes = config.data.classes or (self.class_names if images is None else images.class_names)
        self._compare("classes", self.class_names, classes)
        if self.manifest.get("horizontal_flip") not in ([True] if config.data.horizontal_flip else [True, False]):
            self._compare("horizontal_flip", False, True)

        # What only evaluations see: images that may have changed since, and are read as the run is configured.
        if images is not None and len(images) != (count := self.manifest.get("images")):
            found = f"latents {self.folder} are of {count} images, but the data set has {len(images)}"
            processes().print(f"note: {found}; distances are computed to the data set")
        for key, value in _reading(config).items():
            if (found := self.manifest.get(key, READ_BEFORE[key])) != value:
                made = f"latents {self.folder} were made with data.{key} {found}, the run has {value}"
                processes().print(f"note: {made}, which it uses to read the images for evaluation")

    def _compare(self, key: str, found: Any, wanted: Any, more: str = "") -> None:
        if found != wanted:
            made = f"made with {key} {short(found)}, the run has {short(wanted)}{more}"
            raise UserError(f"latents {self.folder}: {made}; encode again or change the configuration")

    def _place(self, index: int) -> tuple[Any, int]:
        """Return the shard of a sample, and its row there."""
        if not 0 <= index < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        number = bisect_right(self._ends, index)
        row = index - (self._ends[number - 1] if number else 0)
        if number not in self._open:
            self._open[number] = safe_open(self.folder / self.manifest["shards"][number]["file"], framework="pt")
        return self._open[number], row

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_open": {}}  # maps stay with their process


def _latent_settings(vae: ModelMixin, config: Config) -> dict[str, Any]:
    """Everything about a run that the numbers in its shards depend on, but the images."""
    digest = hashlib.sha256()
    for name, tensor in sorted(vae.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.float().cpu().contiguous().numpy())
    scale, shift = normalization_of(vae)
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
    return config.data.model_dump(include=set(READ_BEFORE)) if make_source(config.data).reads_files else {}


def settings_of(images: ImageSet, vae: ModelMixin, config: Config) -> dict[str, Any]:
    """Return what a manifest of these images' latents records of how they were made."""
    return _latent_settings(vae, config) | settings_of_images(images, config)


def settings_of_images(images: ImageSet, config: Config) -> dict[str, Any]:
    """Return what a manifest records of the images, and of how they are read."""
    of_images: dict[str, Any] = {
        "source": config.data.source,
        "split": config.data.split,
        "images": len(images),
        "images_sha256": images.digest(),
        "id2label": {str(label): name for label, name in enumerate(images.class_names)},
    }
    for key in ("source_kwargs", "held_out"):
        if value := getattr(config.data, key):
            of_images[key] = value
    return _reading(config) | of_images


def read_labels(path: Path) -> torch.Tensor:
    with safe_open(path, framework="pt") as shard:
        return shard.get_tensor("labels")


def all_finite(values: torch.Tensor) -> bool:
    return all(bool(bound.isfinite()) for bound in values.aminmax())  # NaN is both bounds


def find_shard_damage(path: Path, checksum: str | None) -> str:
    """Return what is wrong with the bytes or numbers of a shard, and what to do; nothing if it is sound."""
    if not path.is_file() or sha256(path) != checksum:
        return "does not match its checksum; encode again to fix it"
    with safe_open(path, framework="pt") as shard:
        finite = all(all_finite(shard.get_tensor(name)) for name in shard.keys())  # noqa: SIM118 (no mapping)
    return "" if finite else "has values that are not finite; run `vit5gen encode` again; it will name the image"
