"""``train.py CONFIG --dry-run``: what a run would cost and what it still lacks, without writing anything."""

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator

from vit5gen import registry
from vit5gen.config import Config, DataConfig
from vit5gen.data import encoding
from vit5gen.data.autoencoders import kl
from vit5gen.data.images import make_source, open_training_images
from vit5gen.data.latents import MANIFEST, check_autoencoder
from vit5gen.evaluation.features import EXTRACTORS
from vit5gen.models.backbone import BACKBONES
from vit5gen.system.distributed import on_main
from vit5gen.training import cost
from vit5gen.training.build import build_flow, build_model, check_values, settle
from vit5gen.training.data import micro_batches, open_source
from vit5gen.training.folder import RunFolder
from vit5gen.training.loop import build_trainer, train_step
from vit5gen.training.objectives import OBJECTIVES, build_objectives
from vit5gen.training.process import batch_sizes, make_accelerator

TRIAL_STEPS = 3


def plan(config: Config, output: str | None, resume: str, accept_changes: bool) -> int:
    """Check every value, print what the run costs and what is missing, and try 3 steps where nothing is; return 0.

    output, resume, accept_changes: as in training; where it would start is printed if ``output`` is given.
    Raises `UserError` for a value that does not fit, as training would.
    """
    accelerator = make_accelerator(config.training, Path())
    batch_sizes(config.training, accelerator.num_processes)
    check_values(config)
    start = None
    if output is None:
        config = settle(config, {})
    else:
        folder = RunFolder(output)
        with ExitStack() as stack:
            on_main(lambda: stack.enter_context(folder.locked(write=False)))
            start, config = on_main(partial(folder.find_start, config, resume, accept_changes))
        if folder.finished(config, start):
            accelerator.print(f"{folder} is already trained to step {config.training.num_steps}; nothing to do")
            return 0
        accelerator.print(f"start:    {'a new run' if start is None else f'resumes from {start}'} in {folder}")
    for line in describe(config, accelerator.num_processes):
        accelerator.print(line)
    absent = missing(config)
    for path, remedy in absent.items():
        accelerator.print(f"missing: {path} ({remedy})")
    source = make_source(config.data)
    images = source.missing()
    if images and _latents_suffice(config.data):
        reason = next(iter(images))
        accelerator.print(f"images:   not found ({reason}): evaluations will draw samples without computing a distance")
    if config.vae.name not in absent:
        check_autoencoder(config, kl.load_autoencoder(config.vae.name))
    if config.data.path is not None and not images:
        open_training_images(config.data)
    if absent:
        trial = "skipped until nothing is missing"
    elif config.data.latents is None and not config.data.from_images:
        trial = "skipped until the latents are encoded: run `vit5gen encode`, then add --data.latents FOLDER"
    elif preparation := source.preparation():
        trial = f"skipped until {preparation}, which training does first"
    else:
        trial = _trial(config, accelerator, start, accept_changes)
    accelerator.print(f"trial:    {trial}")
    return 0


def run_cost(config: Config) -> cost.Cost:
    """Build the model on the meta device and return its cost; raise `UserError` when its sizes do not fit."""
    with torch.device("meta"):
        model = build_model(config)
        _, objectives, _ = build_objectives(config.training, model, build_flow(config))
    found = cost.model_cost(model, config.training.precision, config.training.gradient_checkpointing)
    return replace(found, beside=sum(parameter.numel() for parameter in objectives.parameters()))


def describe(config: Config, num_processes: int = 1) -> list[str]:
    """Return the lines on size, memory, time and disk, for the present number of processes and for 1 and 8 GPUs."""
    found, section, settings = run_cost(config), config.model, config.training
    unit = settings.micro_batch_size or 1
    processes = sorted({num_processes} | {n for n in (1, 8) if settings.global_batch_size % (n * unit) == 0})
    size = section.preset or f"{section.num_layers}x{section.hidden_size}"
    beside = f", {found.beside:,} more in objectives" if found.beside else ""
    forward, backward = _short(found.forward_flops / 1e9), _short(found.backward_flops / 1e9)
    return [
        f"model:    {section.backbone} {size}, {found.parameters:,} parameters{beside}, {found.tokens} tokens",
        f"FLOPs:    {forward} G forward, {backward} G backward, per image",
        *(memory_line(config, found, n) for n in processes),
        time_line(config, found),
        disk_line(config, found),
    ]


def memory_line(config: Config, found: cost.Cost, num_processes: int) -> str:
    """Describe memory and traffic of each of so many GPUs; if that exceeds 80 GB, also a micro-batch that fits."""
    local = config.training.global_batch_size // num_processes
    micro = config.training.micro_batch_size or local
    needed = _short(cost.memory_bytes(found, config, micro, num_processes) / 1e9)
    line = f"memory:   {num_processes} GPU{'s' if num_processes > 1 else ''} x {micro} images: {needed} GB"
    if num_processes > 1:
        sharded = cost.memory_bytes(found, config, micro, num_processes, sharded=True) / 1e9
        sent = cost.communication_bytes(found, config, local // micro, num_processes) / 1e9
        line += f" each (FSDP {_short(sharded)}), {_short(sent)} GB sent per step"
    most = cost.largest_micro_batch(found, config, num_processes, cost.GPUS["A100"].memory)
    if most < micro and (fitting := [n for n in range(1, min(local, most) + 1) if local % n == 0]):
        fits = cost.memory_bytes(found, config, fitting[-1], num_processes) / 1e9
        line += f"; --training.micro_batch_size {fitting[-1]}: {_short(fits)} GB"
    return line


def time_line(config: Config, found: cost.Cost) -> str:
    """Describe the GPU-hours of a run."""
    steps, batch, precision = config.training.num_steps, config.training.global_batch_size, config.training.precision
    hours = [f"{_short(cost.gpu_hours(found, steps * batch, gpu, precision))} on {gpu}" for gpu in ("A100", "H100")]
    assumed = f"{precision}, {cost.ASSUMED_UTILISATION:.0%} of peak assumed"
    return f"time:     {steps:,} steps x {batch} images: GPU-hours {', '.join(hours)} ({assumed})"


def disk_line(config: Config, found: cost.Cost) -> str:
    """Describe what latents and run take on disk."""
    data = config.data
    count = cost.IMAGENET_IMAGES if data.num_classes == 1000 else 1000
    shard = {"dtype": data.shard_dtype, "horizontal_flip": data.horizontal_flip, "latent_shape": config.latent_shape}
    sizes = (encoding.shard_bytes(count, shard), cost.checkpoint_bytes(found, config), cost.run_bytes(found, config))
    first, each, run = (_short(size / 1e9) for size in sizes)
    steps = f"{config.training.num_steps:,} steps"
    return f"disk:     {first} GB latents of {count:,} images, {each} GB per checkpoint, {run} GB for {steps}"


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "<0.01"


def missing(config: Config) -> dict[str, str]:
    """Return what the run needs and this machine lacks, each with how to get it."""
    data, images, unneeded = config.data, make_source(config.data).missing(), _latents_suffice(config.data)
    absent = {} if unneeded else images
    if data.latents is not None and not (Path(data.latents).expanduser() / MANIFEST).is_file():
        absent[data.latents] = f"vit5gen encode CONFIG --output {data.latents}"
    absent |= kl.missing(config.vae.name)
    if not (unneeded and images):  # without images there is no distance
        absent |= registry.missing(EXTRACTORS.get(config.evaluation.extractor))
    for name in config.training.objectives:
        absent |= OBJECTIVES.get(name).missing()
    return absent | registry.missing(BACKBONES.get(config.model.backbone))


def _latents_suffice(data: DataConfig) -> bool:
    """Whether a run trains on existing latents and so needs no images."""
    return data.latents is not None and not data.from_images and (Path(data.latents).expanduser() / MANIFEST).is_file()


def _trial(config: Config, accelerator: Accelerator, start: Path | None, accept_changes: bool) -> str:
    """Train a few steps of the run from ``start``, and say what they took and how long the whole run will take."""
    source, vae, _ = open_source(config, accelerator, start, accept_changes)
    trainer, device = build_trainer(config, accelerator), accelerator.device
    if start is not None:
        trainer.restore(start)
    num_steps = {"num_steps": trainer.step + TRIAL_STEPS}
    short = config.model_copy(update={"training": config.training.model_copy(update=num_steps)})
    batches, begun = micro_batches(short, source, vae, accelerator, trainer.step), 0.0
    for _ in range(TRIAL_STEPS):
        train_step(trainer, short, batches)
        begun = begun or time.perf_counter()  # after the first step, which compiles and allocates
    seconds = (time.perf_counter() - begun) / (TRIAL_STEPS - 1)
    speed, used, peak = config.training.global_batch_size / seconds, "", _peak_of_process()
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        used = utilisation(config, speed / accelerator.num_processes, torch.cuda.get_device_name(device))
    steps = config.training.num_steps
    memory = "" if peak is None else f"peak memory {_short(peak / 1e9)} GB, "
    hours = f"{steps:,} steps will take {_short(steps * seconds / 3600)} hours"
    return f"{TRIAL_STEPS} real steps: {memory}{_short(speed)} images/s{used}; {hours}"


def _peak_of_process() -> int | None:
    """Return the most bytes that this process held, None on Windows, which does not report it."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def utilisation(config: Config, images_per_second: float, device_name: str) -> str:
    """Return `` (MFU ...)`` for the speed of one GPU whose peak is known, else an empty string."""
    gpu = next((name for name in cost.GPUS if name in device_name), None)
    if gpu is None:
        return ""
    return f" (MFU {cost.mfu(run_cost(config), images_per_second, gpu, config.training.precision):.1%} of {gpu})"
