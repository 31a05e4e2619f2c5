"""Many images: their labels, their noise, and their division over processes."""

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from vit5gen.config import DrawConfig, SamplingConfig
from vit5gen.generation.card import pipeline_hash
from vit5gen.generation.find_pipeline import pipeline_folder
from vit5gen.generation.labels import NONE, one_hot, read_mixture
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.generation.scheduler import SAMPLERS, SiTScheduler
from vit5gen.system.distributed import processes
from vit5gen.system.errors import UserError, choose
from vit5gen.system.precision import PRECISIONS, precision_of


@dataclass(frozen=True)
class SamplingJob:
    """What is drawn: image i depends on (seed, i, labels[i]) and the settings alone; batch_size is per process.

    names: of the classes.  weights: over the classes and the null label, of each label that is no class.
    image: what drawing begins with, of this strength.
    """

    labels: Sequence[int]
    seed: int
    batch_size: int
    settings: SamplingConfig = field(default_factory=SamplingConfig)
    classes: Sequence[int] = ()
    names: Mapping[int, str] = field(default_factory=dict)
    weights: Mapping[int, list[float]] = field(default_factory=dict)
    image: Image.Image | None = None
    strength: float | None = None


def draw_labels(num_images: int, classes: Sequence[int], seed: int, mode: str) -> list[int]:
    """Return the class of every image, fixed by the seed and shuffled.

    mode: balanced (each of ``classes`` as often as the others, or once more) | random (independent draws).
    Raises `UserError` for an unknown mode.
    """
    # The second word keeps this stream apart from others of the same seed.
    rng = np.random.default_rng([seed, 0x1ABE1])
    if choose("labels", mode, ["balanced", "random"]) == "random":
        return rng.choice(classes, num_images).tolist()
    return rng.permutation(np.resize(classes, num_images)).tolist()


def image_generator(seed: int, index: int) -> torch.Generator:
    """Return the CPU generator of image ``index``: its first noise, then what an SDE solver draws.

    torch's CPU generator keeps 32 bits of a seed. Hashes of (seed, index) would give two of 50,000 images the same
    noise in one run out of four; counting on from a hash of the seed never does.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed((start + index) % 2**32)


def generate(pipe: SiTPipeline, job: SamplingJob, done: np.ndarray | None = None) -> Iterator[tuple[range, Tensor]]:
    """Yield (indices, images (B, 3, H, W) uint8 on the CPU) for this process's share of the job.

    Chunks of ``batch_size`` consecutive indices that are not wholly ``done`` (N,) bool go round the processes. One
    process computes the whole of a chunk, so the number of processes does not change a bit of it.
    """
    state, count = processes(), len(job.labels)
    chunks = [range(count)[i : i + job.batch_size] for i in range(0, count, job.batch_size)]
    pending = [chunk for chunk in chunks if done is None or not done[chunk.start : chunk.stop].all()]
    settings = job.settings.model_dump(include={*SamplingConfig.model_fields, "autoguidance_scale"})
    if not isinstance(pipe.scheduler, SiTScheduler) and "sampler" not in job.settings.model_fields_set:
        del settings["sampler"]  # a scheduler of diffusers steps by itself; the pipeline refuses one that was asked for
    silent = copy.copy(pipe)  # of the same components; the bar of the pipeline that was given stays as it is
    silent.set_progress_bar_config(disable=True)
    if job.image is not None:
        settings |= {"image": job.image, "strength": job.strength}
    for chunk in pending[state.process_index :: state.num_processes]:
        labels: list[Any] = list(job.labels[chunk.start : chunk.stop])
        if job.weights.keys() & set(labels):
            width = pipe.transformer.null_label + pipe.transformer.has_null_label
            labels = [job.weights.get(label) or one_hot(label, width) for label in labels]
        generators = [image_generator(job.seed, i) for i in chunk]
        yield chunk, silent(labels, generator=generators, output_type="uint8", return_dict=False, **settings)[0].cpu()


def open_pipeline(checkpoint: str | Path, draw: DrawConfig, device: torch.device) -> SiTPipeline:
    """Load a pipeline that draws images, with its guide, ready on its device in the precision that is asked for.

    The precision is that of the networks; state, decoding and rounding are always fp32.
    Raises `UserError` when there is no pipeline, or it has no autoencoder.
    """
    SAMPLERS.get(draw.sampler)  # raises where there is none of that name
    pipe = load_pipeline(checkpoint)
    if pipe.vae is None:
        raise UserError(f"checkpoint {checkpoint} has no autoencoder; convert it again with --vae NAME_OR_FOLDER")
    if draw.guide is not None:
        pipe.guide = load_pipeline(draw.guide).transformer
    networks = [network for network in (pipe.transformer, pipe.guide) if network is not None]
    pipe.to(device)
    PRECISIONS[draw.precision].cast_for_sampling(*networks)
    for network in networks if draw.compile else ():
        network.compile()
    return pipe


def make_job(pipe: SiTPipeline, draw: DrawConfig, num_images: int, seed: int, batch_size: int) -> SamplingJob:
    """Return what is to be drawn; raise `UserError` for classes that do not exist.

    A label that is no class is `null_label`, or a number above it for each mixture.
    """
    # A class that is given twice counts once.
    known = pipe.config.id2label, pipe.transformer.null_label, pipe.transformer.has_null_label
    names, weights = dict[int, str](), dict[int, list[float]]()
    for given in draw.classes or range(pipe.transformer.null_label):
        row = read_mixture(given, *known) if isinstance(given, str) else None
        if row is None:
            names |= {label: pipe.class_name(label) for label in pipe.class_ids([given])}
        elif (title := str(given)) not in names.values():
            label = known[1] if given == NONE else max([known[1], *weights]) + 1
            names[label], weights[label] = title, row
    labels = draw_labels(num_images, list(names), seed, draw.labels)
    return SamplingJob(labels, seed, batch_size, draw, list(names), names, weights)


def describe_job(pipe: SiTPipeline, job: SamplingJob, draw: DrawConfig) -> dict[str, Any]:
    """Return what a card records of the sampling: the settings and the scheduler (if foreign, it is the sampler)."""
    scheduler = json.loads(pipe.scheduler.to_json_string())
    public = {name: value for name, value in scheduler.items() if name == "_class_name" or name[0] != "_"}
    settings = draw.model_dump(exclude={"guide"})
    if not isinstance(pipe.scheduler, SiTScheduler):
        settings["sampler"] = None
    if draw.guide is not None:
        settings["guide_sha256"] = pipeline_hash(pipeline_folder(draw.guide))
    found = {"classes": job.classes, "precision": precision_of(pipe.transformer), "resolution": list(pipe.image_size)}
    found |= {"mixtures": [job.names[label] for label in job.weights]} if job.weights else {}
    return settings | found | {"seed": job.seed, "scheduler": public}
