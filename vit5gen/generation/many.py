"""Many images: their labels, their noise, and their division over processes."""

import copy
import json
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from vit5gen.config import MOST_BATCH, MOST_IMAGES, EvaluationConfig, SamplingConfig
from vit5gen.generation.card import pipeline_hash, versions
from vit5gen.generation.loading import load_pipeline, pipeline_folder
from vit5gen.generation.outputs import Output
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.generation.scheduler import SAMPLERS, SiTScheduler
from vit5gen.system.distributed import processes, start_processes
from vit5gen.system.errors import UserError, check_whole, choose
from vit5gen.system.precision import PRECISIONS, precision_of

_EVALUATION = EvaluationConfig()
SAMPLING_PRECISIONS = ("fp32", "tf32", "bf16")
LABEL_MODES = ("balanced", "random")


@dataclass(frozen=True)
class SamplingJob:
    """What is drawn: image i depends on (seed, i, labels[i]) and the settings alone; batch_size is per process."""

    labels: Sequence[int]
    seed: int = _EVALUATION.seed
    batch_size: int = _EVALUATION.batch_size
    settings: SamplingConfig = field(default_factory=SamplingConfig)
    autoguidance_scale: float = 1.0


def draw_labels(num_images: int, classes: Sequence[int], seed: int, mode: str = "balanced") -> list[int]:
    """Return the class of every image, fixed by the seed and shuffled.

    mode: balanced (each of ``classes`` as often as the others, or once more) | random (independent draws).
    Raises `UserError` for an unknown mode.
    """
    # The second word keeps this stream apart from others of the same seed.
    rng = np.random.default_rng([seed, 0x1ABE1])
    if choose("labels", mode, LABEL_MODES) == "random":
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
    chunks = [range(i, min(i + job.batch_size, count)) for i in range(0, count, job.batch_size)]
    pending = [chunk for chunk in chunks if done is None or not done[chunk.start : chunk.stop].all()]
    settings = job.settings.model_dump() | {"autoguidance_scale": job.autoguidance_scale}
    if not isinstance(pipe.scheduler, SiTScheduler) and "sampler" not in job.settings.model_fields_set:
        del settings["sampler"]  # a scheduler of diffusers steps by itself; the pipeline refuses one that was asked for
    silent = copy.copy(pipe)  # of the same components; the bar of the pipeline that was given stays as it is
    silent.set_progress_bar_config(disable=True)
    for chunk in pending[state.process_index :: state.num_processes]:
        labels = list(job.labels[chunk.start : chunk.stop])
        generators = [image_generator(job.seed, i) for i in chunk]
        yield chunk, silent(labels, generator=generators, output_type="uint8", return_dict=False, **settings)[0].cpu()


def load_for_images(checkpoint: str | Path) -> SiTPipeline:
    """Load a pipeline as `load_pipeline` does; raise `UserError` also where it draws latents alone."""
    pipe = load_pipeline(checkpoint)
    if pipe.vae is None:
        raise UserError(f"checkpoint {checkpoint} has no autoencoder; convert it again with --vae NAME_OR_FOLDER")
    return pipe


def describe_sampling(pipe: SiTPipeline, settings: SamplingConfig) -> dict[str, Any]:
    """Return what a card tells of the sampling: the settings and the scheduler, which if foreign is the sampler."""
    scheduler = json.loads(pipe.scheduler.to_json_string())
    told = {name: value for name, value in scheduler.items() if name == "_class_name" or name[0] != "_"}
    foreign = {} if isinstance(pipe.scheduler, SiTScheduler) else {"sampler": None}
    return settings.model_dump() | foreign | {"scheduler": told}


def sample_command(
    checkpoint: str | Path,
    num_images: int,
    seed: int,
    output: str | Path,
    classes: Sequence[str | int] | None = None,
    batch_size: int = _EVALUATION.batch_size,
    settings: SamplingConfig | None = None,
    label_mode: str = "balanced",
    precision: str = "fp32",
    compile: bool = False,
    guide: str | Path | None = None,
    autoguidance_scale: float = 1.0,
) -> None:
    """Draw images of a run or pipeline folder into FILE.png (a grid), FILE.npz or a folder, and write their card.

    classes: names or ids, default all.  precision: of the network; state, decoding and rounding are always fp32.
    guide: run or pipeline folder of the weaker model of autoguidance, default the one in the checkpoint's folder.
    A killed run goes on where it stopped, a finished one is left alone, on any number of processes.
    Raises `UserError` for bad values, an output of other settings, or a disk that is full; what is drawn is kept.
    """
    check_whole("num_images =", num_images, 1, MOST_IMAGES)
    check_whole("batch_size =", batch_size, 1, MOST_BATCH)
    check_whole("seed =", seed, 0)
    if not math.isfinite(autoguidance_scale) or (guide is not None and autoguidance_scale == 1):
        raise UserError(
            f"autoguidance_scale = {autoguidance_scale}; expected a finite number, with a guide not 1 (off)"
        )
    choose("precision", precision, SAMPLING_PRECISIONS)
    choose("labels", label_mode, LABEL_MODES)
    settings = settings or SamplingConfig()
    choose("sampler", settings.sampler, SAMPLERS)
    state = start_processes()
    pipe = load_for_images(checkpoint)
    if guide is not None:
        pipe.guide = load_pipeline(guide).transformer
    # A class that is given twice counts once.
    given = classes or range(pipe.transformer.config.num_classes)
    ids = list(dict.fromkeys(pipe.class_ids(list(given))))
    labels = draw_labels(num_images, ids, seed, label_mode)
    job = SamplingJob(labels, seed, batch_size, settings, autoguidance_scale)
    target = Output(Path(output), (num_images, *pipe.image_size, 3))
    decided = {
        "num_images": num_images,
        "seed": seed,
        "labels": label_mode,
        "classes": ids,
        **describe_sampling(pipe, settings),
    }
    if guide is not None:
        decided["guide_sha256"] = pipeline_hash(pipeline_folder(guide))
    decided["autoguidance_scale"] = autoguidance_scale
    prepare(pipe, state.device, precision, compile)
    folder = pipeline_folder(checkpoint)
    card = {
        "settings": decided
        | {"precision": precision_of(pipe.transformer), "compile": compile, "resolution": list(pipe.image_size)},
        "checkpoint_sha256": pipeline_hash(folder),
        "versions": versions(),
        "run": {
            "checkpoint": str(folder),
            "vae": pipe.vae.config.get("_name_or_path"),
            "batch_size": batch_size,
            "num_processes": state.num_processes,
            "device": state.device.type,
        },
    }
    target.check(card)
    state.wait_for_everyone()
    if target.finished:
        if state.is_main_process:
            target.tidy()  # a kill may have come between the card and this
        state.print(f"{target.path} is finished already; nothing to do")
        return
    PRECISIONS[precision].warn_if_slow(state.device, state.print)
    try:
        if state.is_main_process:
            target.begin(card)
        state.wait_for_everyone()
        done = target.evaluations() > 0
        state.wait_for_everyone()
        start, silent = int(done.sum()), not state.is_main_process
        with tqdm(desc="images", total=num_images, initial=start, disable=silent, delay=1) as progress:
            for indices, images in generate(pipe, job, done):
                target.write(indices, images, labels[indices.start : indices.stop], pipe.num_evaluations)
                progress.update(min(len(indices) * state.num_processes, num_images - progress.n))
        state.wait_for_everyone()
        if state.is_main_process:
            target.finish(card, labels, [pipe.class_name(i) for i in labels])
            target.tidy()
        state.wait_for_everyone()
    except UserError:
        if state.is_main_process:
            target.tidy()
        raise
    except OSError as error:
        raise UserError(
            f"output {target.path}: {error.strerror or error}; what is drawn is kept: mend it, run the command again"
        ) from error
    state.print(f"{num_images} images: {target.path}, settings: {target.card_file}")


def prepare(pipe: SiTPipeline, device: torch.device, precision: str = "fp32", compile: bool = False) -> None:
    """Move a pipeline to its device and have its networks compute in ``precision``: fp32, tf32 or bf16."""
    networks = [network for network in (pipe.transformer, pipe.guide) if network is not None]
    pipe.to(device)
    PRECISIONS[precision].cast_for_sampling(*networks)
    for network in networks if compile else ():
        network.compile()
