"""Where training samples come from: latent shards, or images that are encoded again in every step."""

import math
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import ModelMixin
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from vit5gen.config import Config, TrainingConfig
from vit5gen.data.autoencoders.codec import Normalization, check_normalization, codec_of, encode, normalization_of
from vit5gen.data.autoencoders.find_autoencoder import find_sizes, load_autoencoder
from vit5gen.data.channel_moments import moments, normalization_from, statistics
from vit5gen.data.encoding import ensure_latents
from vit5gen.data.feature_shards import ensure_features
from vit5gen.data.images import ImageSet, check_classes, check_num_classes, drop_broken, open_images
from vit5gen.data.latents import (
    LatentDataset,
    check_autoencoder,
    fetch_data,
    identity,
    images_of,
    open_latents,
    recorded_normalization,
    settings_of,
)
from vit5gen.system.distributed import on_main, rank_and_world, sum_over_processes
from vit5gen.system.precision import PRECISIONS
from vit5gen.system.progress import Progress
from vit5gen.training.build import build_objectives_on_meta, check_values
from vit5gen.training.checkpoint import read_state
from vit5gen.training.objectives import Batch, SharedOptions, needing_image
from vit5gen.training.process import batch_sizes, signals_blocked
from vit5gen.training.random import data_index, sample_draws
from vit5gen.training.run_folder import check_data


@dataclass(frozen=True)
class RandomLatents:
    """Normal latents, in place of encoded images."""

    shape: tuple[int, int, int]
    num_classes: int

    def __len__(self) -> int:
        return 1000

    def get(self, index: int, flip: bool) -> tuple[Tensor, Tensor, int]:
        """Return (mean, standard deviation, label)."""
        return torch.zeros(self.shape), torch.ones(self.shape), index % self.num_classes


@dataclass(frozen=True)
class WithMore:
    """Latents or images, and what each of some objectives needs beside them while it is active."""

    samples: ImageSet | LatentDataset
    more: list[tuple[SharedOptions, str, Callable[[int, bool], Tensor]]]  # str: its name in `Batch`

    @property
    def class_names(self) -> list[str]:
        return self.samples.class_names

    def __len__(self) -> int:
        return len(self.samples)

    def get(self, index: int, flip: bool) -> tuple[Any, ...]:
        return self.samples.get(index, flip)

    def beside(self, step: int, index: int, flip: bool) -> dict[str, Tensor]:
        """Return what the step needs of this image, or of its mirror image."""
        wanted = {name: read for shared, name, read in self.more if shared.active(step)}
        return {name: read(index, flip) for name, read in wanted.items()}


# What training reads: latents ``(mean, std, label)`` or images ``(uint8 image, label)``.
SampleSource = ImageSet | LatentDataset | RandomLatents | WithMore


def prepare(config: Config) -> Config:
    """Return the configuration with the sizes of its autoencoder; check its values, and copy data from their URL.

    Processes wait here for a copy without a time limit. Raises `UserError` for wrong values and a copy that fails.
    """
    config = on_main(partial(find_sizes, config))
    check_values(config)
    fetch_data(config.data)
    return config


def open_training_data(
    config: Config, accelerator: Accelerator, start: Path | None, accept_changes: bool
) -> tuple[ImageSet | LatentDataset | WithMore, ModelMixin, dict[str, Any]]:
    """Open what a run trains on, encoding latents and features first where there are none yet, and its autoencoder.

    Returned last is what a checkpoint records of the data: their `identity`, and ``broken``, the number of images left
    out. Either is compared with that of ``start`` as early as it is known, the first before anything is encoded.
    Raises `UserError` when data or autoencoder are absent or do not fit the configuration, or ``start`` had others.
    """

    def check(data: dict[str, Any]) -> None:
        on_main(partial(check_data, start, accept_changes, data))

    def early(settings: dict[str, Any]) -> dict[str, Any]:
        found = identity(settings)
        return found if config.vae.normalize == "config" else {k: v for k, v in found.items() if k != "autoencoder"}

    # Encoders: their weights are missed now, not after hours of encoding; kept are those whose features will be read.
    first_step = 0 if start is None else read_state(start)["step"]
    wanted = {k: one for k, one in needing_image(config.training).items() if (one.stop_at or math.inf) > first_step}
    built: Any = build_objectives_on_meta(config) if wanted else {}
    encoders = {name: built[name].load_encoder(accelerator.device) for name in wanted}
    encoders = {name: one for name, one in encoders.items() if built[name].stored}

    # Latents on disk, whose manifest tells at once of what they are.
    vae = load_autoencoder(config.vae.name).to(accelerator.device)
    source: ImageSet | LatentDataset
    if config.data.latents is not None and not config.data.from_images:
        source = latents = open_latents(config.data.latents)
        check({"classes": latents.class_names})
        latents.check(config, vae)
        settings = latents.manifest
        check(early(settings))
        latents.verify()

    # Images: used as they are, each decoded once to find the broken ones, or encoded into the cache.
    else:
        check_autoencoder(config, vae)
        images = open_images(config.data)
        check({"classes": images.class_names})
        check_num_classes(images, config.data)
        with accelerator.main_process_first():  # the others find in the cache what it has read
            images = replace(images, digest=partial(str, images.digest()))
        settings = settings_of(images, vae, config)
        check(early(settings))
        if config.data.from_images:
            if config.data.on_broken_image == "skip":
                images, faults = drop_broken(images)
                for fault in faults:
                    accelerator.print(f"warning: skipped: {fault}")
                check_classes(images, config.data, why="all are broken")
            source = images
        else:
            source = LatentDataset(ensure_latents(images, vae, config))

    # How the transformer sees the latents, which the autoencoder undoes from now on.
    chosen = _normalization(config, source, vae, start)
    data = identity(settings | dict(zip(("scaling_factor", "shift_factor"), chosen, strict=True)))
    if config.vae.normalize != "config":
        codec_of(vae).record(vae, check_normalization(chosen, f"vae.normalize = {config.vae.normalize}", vae))
        check(data)
    if isinstance(source, LatentDataset):
        source.normalize(chosen)

    # How many images were left out is known only now.
    broken = {"broken": data["samples"] - len(source)}
    check(broken)
    return _with_more(config, accelerator, source, wanted, encoders), vae, data | broken


def _with_more(
    config: Config,
    accelerator: Accelerator,
    source: ImageSet | LatentDataset,
    wanted: Mapping[str, SharedOptions],
    encoders: Mapping[str, tuple[Callable[[Tensor], Tensor], dict[str, Any]]],
) -> ImageSet | LatentDataset | WithMore:
    """Return what a run trains on, with the images, or their features of ``encoders``, that objectives will need."""
    if not wanted:
        return source
    images = source if isinstance(source, ImageSet) else open_images(config.data)
    if isinstance(source, LatentDataset):
        with accelerator.main_process_first():  # the others find in the cache what it has read
            images = images_of(source, replace(images, digest=partial(str, images.digest())), config)
    more: list[tuple[SharedOptions, str, Callable[[int, bool], Tensor]]] = []
    for name, shared in wanted.items():
        if name in encoders:
            more += [(shared, "features", ensure_features(images, *encoders[name], config).features)]
        elif isinstance(source, LatentDataset):
            more += [(shared, "image", images.view)]
    return WithMore(source, more)


def _normalization(
    config: Config, source: ImageSet | LatentDataset, vae: ModelMixin, start: Path | None
) -> Normalization:
    """Return the normalisation of a run's latents; images are encoded for it once, when the run begins."""
    if config.vae.normalize == "config":
        return normalization_of(vae)
    if config.vae.normalize == "none":
        return Normalization()
    recorded = None if start is None else recorded_normalization(read_state(start).get("data", {}))
    if isinstance(source, LatentDataset):
        found = source.measured()
        return found if recorded is None or not recorded.agrees(found) else recorded
    if recorded is not None:
        return recorded
    rank, world = rank_and_world()
    total = torch.zeros(3, config.latent_shape[0], dtype=torch.float64)
    chunks = torch.arange(len(source)).split(config.vae.batch_size)[rank::world]
    with Progress("measure latents", len(chunks), "batch", silent=rank > 0) as progress:
        for chunk in chunks:
            pixels = source.stack(chunk).to(vae.device)
            for view in (pixels, pixels.flip(-1))[: 1 + config.data.horizontal_flip]:
                total += moments(*encode(vae, view))
            progress.update()
    measured = statistics(sum_over_processes(total), normalization_of(vae))
    return normalization_from(measured, "the training latents")


def nonfinite_fault(
    config: Config, source: ImageSet | LatentDataset | WithMore, vae: ModelMixin, step: int, in_a_row: int, saved: Path
) -> str:
    """Say what to do about so many steps up to ``step`` that were not finite, after which the state was ``saved``.

    If the latents of the last one's samples are not finite either, they are to blame.
    """
    what = f"\nerror: loss or gradient was not finite in {in_a_row} steps in a row, up to step {step}"
    what += f"; state saved in {saved}"
    size = config.training.global_batch_size
    indices = [data_index(config.training.seed, step - 1, i, size, len(source)) for i in range(size)]

    def finite(index: int, flip: bool) -> bool:
        *data, _ = source.get(index, flip)
        values = data if len(data) == 2 else encode(vae, data[0][None].to(vae.device))
        return all(bool(value.isfinite().all()) for value in values)

    spoilt = [i for i in indices if not all(finite(i, flip) for flip in (False, *[True] * config.data.horizontal_flip))]
    if spoilt:
        return f"{what}; the latents of samples {spoilt} are not finite: check these images and the weights of vae.name"
    return f"{what}; this step's samples: {indices}; lower training.learning_rate, or set training.max_grad_norm"


@dataclass(frozen=True)
class TrainingSet(Dataset[dict[str, Any]]):
    """Samples by (step, position): the data with the draws that belong to it.

    Yields ``x1`` (C, h, w) drawn from the latent's posterior, or ``image`` (3, H, W) uint8 and ``posterior`` noise;
    and ``x0`` noise, ``uniform`` in [0, 1), ``label`` (already null where dropped) and ``index`` of the sample; beside
    latents also ``image``, or ``features``, in steps that need them.
    """

    source: SampleSource
    config: Config

    def __getitem__(self, key: tuple[int, int]) -> dict[str, Any]:
        (step, position), config, seed = key, self.config, self.config.training.seed
        draws = sample_draws(seed, step, position, config.latent_shape)
        index = data_index(seed, step, position, config.training.global_batch_size, len(self.source))
        *data, label = self.source.get(index, config.data.horizontal_flip and draws.flip)
        sample = {"x0": draws.noise, "uniform": draws.uniform, "position": position, "index": index}
        sample["label"] = config.num_classes if draws.drop < config.model.class_dropout_prob else int(label)
        if isinstance(self.source, WithMore):
            sample |= self.source.beside(step, index, config.data.horizontal_flip and draws.flip)
        if len(data) == 2:
            mean, std = data
            return sample | {"x1": mean + std * draws.posterior}
        return sample | {"image": data[0], "posterior": draws.posterior}


def batch_keys(settings: TrainingConfig, first_step: int, rank: int, world: int) -> Iterator[list[tuple[int, int]]]:
    """Yield the (step, position) keys of one process, micro-batch after micro-batch."""
    size, accumulation = batch_sizes(settings, world)
    for step in range(first_step, settings.num_steps):
        for micro in range(rank * accumulation, (rank + 1) * accumulation):
            yield [(step, micro * size + k) for k in range(size)]


def micro_batches(
    config: Config, source: SampleSource, vae: ModelMixin | None, accelerator: Accelerator, first_step: int = 0
) -> Generator[Batch]:
    """Yield this process's micro-batches (see `TrainingSet`) from ``first_step`` to the last, images encoded."""
    settings, workers, on_gpu = config.training, config.data.num_workers, accelerator.device.type == "cuda"
    dtype = PRECISIONS[settings.precision].weights
    keeps_image = bool(needing_image(settings))
    keys = batch_keys(settings, first_step, accelerator.process_index, accelerator.num_processes)
    # Forked, workers would inherit the state of CUDA and of the trainer's threads.
    start: dict[str, Any] = {"num_workers": workers, "multiprocessing_context": "spawn"} if workers else {}
    with signals_blocked():
        batches = iter(DataLoader(TrainingSet(source, config), batch_sampler=keys, pin_memory=on_gpu, **start))
    try:
        for sample in batches:
            first = int(sample["position"][0])
            sample = {name: value.to(accelerator.device, non_blocking=True) for name, value in sample.items()}
            if "posterior" in sample and vae is not None:  # the image's latents, drawn with the given noise
                mean, std = encode(vae, sample["image"])
                sample["x1"] = mean + std * sample["posterior"]
            x1, x0, empty = sample["x1"].to(dtype), sample["x0"].to(dtype), sample["x1"].new_empty(0)
            draws = (sample["uniform"], sample["position"], first)
            image = sample.get("image") if keeps_image else None
            yield Batch(x1, x0, sample["label"], *draws, image, empty, empty, empty, sample.get("features"))
    finally:
        if workers:
            # Left to garbage collection, workers that SIGTERM does not reach would keep a failed trainer from exiting.
            batches._shutdown_workers()  # type: ignore[attr-defined]
