"""``train.py CONFIG --dry-run``: what a run would cost and what it still lacks, without writing anything."""

import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import ModelMixin

from vit5gen import registry
from vit5gen.config import ASSUMED_CLASSES, Config
from vit5gen.data import encoding
from vit5gen.data.autoencoders import find_autoencoder
from vit5gen.data.images import Source, make_source, open_training_images
from vit5gen.data.latents import MANIFEST, check_autoencoder, find_class_names
from vit5gen.data.remote import COPIED, is_here, is_url, local_path
from vit5gen.evaluation.features import EXTRACTORS, load_extractor
from vit5gen.evaluation.metric import METRICS, by_default
from vit5gen.models.backbone import BACKBONES
from vit5gen.system.cpu import fast_products
from vit5gen.system.distributed import on_main
from vit5gen.system.errors import UserError
from vit5gen.training import cost, initial
from vit5gen.training.batches import RandomLatents, SampleSource, micro_batches, open_training_data
from vit5gen.training.build import build_flow, build_model, build_objectives_on_meta, check_values, settle_auto
from vit5gen.training.loop import build_trainer, train_step
from vit5gen.training.objectives import OBJECTIVES, build_objectives, needing_image, shared_options
from vit5gen.training.process import make_accelerator
from vit5gen.training.run_folder import RunFolder, settle
from vit5gen.training.trainable import choose_trainable
from vit5gen.training.trainer import Trainer

TRIAL_STEPS = 3
LONGEST_STEP = 10.0  # seconds, of one that a dry run tries on a CPU
_UNITS = ((1.0, "seconds", 90.0), (60.0, "minutes", 7200.0), (3600.0, "hours", 172800.0))
_DAY = 86400.0  # seconds; what takes longer on a CPU is told in hours of GPUs


def plan(config: Config, output: str | None, resume: str, accept_changes: bool) -> int:
    """Check every value, print what the run costs and what is missing, and try 3 steps; return 0.

    These are of the run where all that it needs is here; else a CPU tries latents that are drawn, and a GPU none.

    output, resume, accept_changes: as in training; where it would start is printed if ``output`` is given.
    Raises `UserError` for a value that does not fit, as training would.
    """
    # Every value, and where the run would start: as training does it, but nothing is written.
    accelerator, config = make_accelerator(config.training, Path()), find_autoencoder.find_sizes(config, fetch=False)
    check_values(config)
    start = None
    if output is None:
        config = settle_auto(_begin_here(config), {})
    else:
        folder = RunFolder(output)
        with ExitStack() as stack:
            on_main(lambda: stack.enter_context(folder.locked(write=False)))
            find_start = partial(folder.find_start, config, resume, accept_changes, _classes_here, _begin_here)
            start, config = on_main(find_start)
        if folder.finished(config, start):
            accelerator.print(f"{folder} is already trained to step {config.training.num_steps}; nothing to do")
            return 0
        accelerator.print(f"start:    {'a new run' if start is None else f'resumes from {start}'} in {folder}")
    config = settle(config, _classes_here)
    if config.data.num_classes is None:
        accelerator.print(f"classes:  to be found in the data; {config.num_classes} assumed until these are here")
    if None in (config.vae.latent_channels, config.vae.downsample):
        shape = "x".join(map(str, config.latent_shape))
        accelerator.print(f"latents:  of a size to be found in {config.vae.name}; {shape} assumed until it is here")
    if start is None and config.training.init_digest is not None:
        for line in initial.describe(config, initial.origin_of(config), _classes_here(config)):
            accelerator.print(line)

    # What it costs.
    found, on_cpu = run_cost(config), accelerator.device.type == "cpu"
    step = guess_seconds(config, found) if on_cpu else 0.0
    here = on_cpu and step * config.training.num_steps < _DAY
    for line in describe(config, found, accelerator.num_processes):
        if not (here and line.startswith("time:")):  # of GPUs
            accelerator.print(line)
    source = make_source(config.data)
    images = source.missing()
    for line in [] if images else describe_plugs(config, source):
        accelerator.print(line)

    # What it lacks; and what is there must fit.
    absent = missing(config)
    for path, remedy in absent.items():
        accelerator.print(f"missing: {path} ({remedy})")
    if images and _latents_suffice(config):
        reason = next(iter(images))
        accelerator.print(f"images:   not found ({reason}): evaluations will draw samples without computing a distance")
    if config.vae.name not in absent:
        check_autoencoder(config, find_autoencoder.load_autoencoder(config.vae.name))
    if config.data.path is not None and not images:
        open_training_images(config.data)

    # A few steps, or why there are none.
    encoded = config.data.latents is not None or config.data.from_images
    pictures = bool(needing_image(config.training))
    if (absent or not encoded or source.preparation()) and on_cpu and not pictures and step < LONGEST_STEP:
        trial = _synthetic(config, accelerator)
    elif absent:
        trial = "skipped until nothing is missing"
    elif not encoded:
        trial = "skipped until the latents are encoded: run `vit5gen encode`, then add --data.latents FOLDER"
    elif images and is_url(config.data.path or ""):
        trial = "skipped until the images are copied, which training does first"
    elif config.vae.normalize == "measured" and config.data.from_images:
        trial = "skipped until the latents of all images are measured, which training does first"
    elif any(one.stored for one in build_objectives_on_meta(config).values()):
        trial = "skipped: training first encodes the features that an objective stores"
    elif preparation := source.preparation():
        trial = f"skipped until {preparation}, which training does first"
    else:
        trial = _trial(config, accelerator, start, accept_changes)
    if here and "on this machine" not in trial:
        took = duration(step * config.training.num_steps)
        trial += f"; on this machine: about {took}, by the speed of a product of matrices"
    accelerator.print(f"trial:    {trial}")
    return 0


def run_cost(config: Config) -> cost.Cost:
    """Build the model on the meta device and return its cost; raise `UserError` when its sizes do not fit."""
    with torch.device("meta"):
        model = build_model(config)
        choose_trainable(model, config.training)
        objectives = build_objectives(config.training, model, build_flow(config))
    found = cost.model_cost(model, config.training.precision, config.training.gradient_checkpointing)
    flops = cost.objective_flops(objectives, model, config)
    idle = {name: 1 - one.share(config.training.num_steps) for name, one in shared_options(config.training).items()}
    return replace(
        found,
        of_objectives=sum(parameter.numel() for parameter in objectives.parameters()),
        objective_flops=sum(filter(None, flops.values())),
        idle_flops=round(sum((count or 0) * idle[name] for name, count in flops.items())),
        uncounted=tuple(name for name, count in flops.items() if count is None),
    )


def describe(config: Config, found: cost.Cost, num_processes: int = 1) -> list[str]:
    """Return the lines on size, memory, time and disk, for the present number of processes and for 1 and 8 GPUs."""
    section, settings = config.model, config.training
    unit = settings.micro_batch_size or 1
    processes = sorted({num_processes} | {n for n in (1, 8) if settings.global_batch_size % (n * unit) == 0})
    size = section.preset or f"{section.num_layers}x{section.hidden_size}"
    more = f", {found.of_objectives:,} more in objectives" if found.of_objectives else ""
    trained, moments = found.trained, cost.optimizer_bytes(found, config)
    part = f"trained:  {trained:,} parameters ({trained / found.parameters:.2%}), optimizer of {moments:,} bytes"
    forward, backward = _short(found.forward_flops / 1e9), _short(found.backward_flops / 1e9)
    extra = f", {_short(found.objective_flops / 1e9)} G in objectives" if found.objective_flops else ""
    if found.idle_flops:
        extra += f" while active ({_short((found.objective_flops - found.idle_flops) / 1e9)} G on average)"
    if found.uncounted:
        extra += f" (not counted: {', '.join(found.uncounted)}, which cannot run on torch's meta device)"
    return [
        f"model:    {section.backbone} {size}, {found.parameters:,} parameters{more}, {found.tokens} tokens",
        *([] if settings.trainable == "all" else [part]),
        f"FLOPs:    {forward} G forward, {backward} G backward{extra}, per image",
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
        sent = cost.communication_bytes(found, config, num_processes) / 1e9
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
    """Describe what a run takes on disk, and its latents unless images are encoded on the way."""
    data = config.data
    count = cost.IMAGENET_IMAGES if config.num_classes == ASSUMED_CLASSES else 1000
    shard = {"dtype": data.shard_dtype, "horizontal_flip": data.horizontal_flip, "latent_shape": config.latent_shape}
    sizes = (encoding.shard_bytes(count, shard), cost.checkpoint_bytes(found, config), cost.run_bytes(found, config))
    first, each, run = (_short(size / 1e9) for size in sizes)
    steps = f"{config.training.num_steps:,} steps"
    latents = "" if data.from_images else f"{first} GB latents of {count:,} images, "
    return f"disk:     {latents}{each} GB per checkpoint, {run} GB for {steps}"


def describe_plugs(config: Config, source: Source) -> list[str]:
    """Return lines on what source, extractor and metrics cost, as far as they are here and tell it."""
    # The images, once their source has them.
    evaluation, (name, _) = config.evaluation, registry.name_and_options(config.evaluation.extractor)
    size = source.image_bytes()
    lines = [] if size is None else [f"data:     {_short(size / 1e9)} GB of images in {config.data.source}"]
    if registry.missing(EXTRACTORS.get(name)):
        return lines

    # An evaluation at the first step, at the last, and every so many.
    steps = config.training.num_steps
    times = -(-steps // (evaluation.every or steps or 1)) + 1
    images = f"evaluate: {times:,} x {evaluation.num_images:,} images at most"
    try:
        extractor = load_extractor(evaluation.extractor, "meta")
        flops = extractor.flops(config.data.resolution)
    except Exception as error:  # whatever a network raises where tensors have no values, or its weights are damaged
        reason = (str(error).strip() or repr(error)).split("\n")[0][:200]
        return [*lines, f"{images}, in {name} (FLOPs not counted on torch's meta device: {reason})"]
    lines.append(f"{images}, {_short(flops / 1e9)} G FLOPs each in {name}")

    # What `vit5gen evaluate` would keep of as many.
    counts = evaluation.num_images, evaluation.num_reference, extractor.dim
    kept = {name: METRICS.get(name).feature_bytes(*counts) for name in by_default()}
    told = [f"{metric} {_short(number / 1e9)} GB" for metric, number in kept.items() if number]
    return [*lines, f"metrics:  features of these and of {counts[1]:,} real images: {', '.join(told) or 'none kept'}"]


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}" if value >= 0.01 else "<0.01"


def missing(config: Config) -> dict[str, str]:
    """Return what the run needs and this machine lacks, each with how to get it."""
    data, images, unneeded = config.data, make_source(config.data).missing(), _latents_suffice(config)
    absent = {} if unneeded else images
    if data.latents is not None and not _has_latents(data.latents):
        absent[data.latents] = COPIED if is_url(data.latents) else f"vit5gen encode CONFIG --output {data.latents}"
    absent |= find_autoencoder.missing(config.vae.name) | initial.missing(config)
    if not (unneeded and images):  # without images there is no distance
        absent |= registry.missing(EXTRACTORS.get(registry.name_and_options(config.evaluation.extractor)[0]))
    for name in shared_options(config.training):
        absent |= OBJECTIVES.get(name).missing_with(config.training.objectives[name])
    return absent | registry.missing(BACKBONES.get(config.model.backbone))


def _latents_suffice(config: Config) -> bool:
    """Whether a run trains on existing latents and so needs no images."""
    data, alone = config.data, not needing_image(config.training)
    return alone and data.latents is not None and not data.from_images and _has_latents(data.latents)


def _has_latents(place: str) -> bool:
    return is_here(place) and (local_path(place) / MANIFEST).is_file()


def _begin_here(config: Config) -> Config:
    """Return what `begin_from` does; without the weights, the configuration as it is, if it gives all sizes."""
    if absent := initial.missing(config):
        if not config.model.sized:
            raise UserError(f"training.init_from {next(iter(absent))} is not here; download it, or set model.preset")
        return config
    return initial.begin_from(config)


def _classes_here(config: Config) -> list[str] | None:
    """Return the classes of the data, None where they are not here."""
    source, data = make_source(config.data), config.data
    here = not source.preparation() and not {data.latents, *source.missing()} & missing(config).keys()
    return find_class_names(config) if here else None


def guess_seconds(config: Config, found: cost.Cost) -> float:
    """Return about how long a step takes on this CPU, of whose speed at a product of matrices training reaches half."""
    matrix = torch.ones(1024, 1024)
    with fast_products():
        matrix @ matrix
        begun = time.perf_counter()
        matrix @ matrix
    flops = found.executed_flops * config.training.global_batch_size
    return 2 * flops * (time.perf_counter() - begun) / (2 * 1024**3)


def _synthetic(config: Config, accelerator: Accelerator) -> str:
    """Train a few steps on latents that are drawn, and say what `_trial` does."""
    config = config.model_copy(update={"data": config.data.model_copy(update={"num_workers": 0})})
    source = RandomLatents(config.latent_shape, config.num_classes)
    return f"{TRIAL_STEPS} synthetic steps: {_pace(config, build_trainer(config, accelerator), source)}"


def _trial(config: Config, accelerator: Accelerator, start: Path | None, accept_changes: bool) -> str:
    """Train a few steps of the run from ``start``, and say what they took and how long the whole run will take."""
    source, vae, _ = open_training_data(config, accelerator, start, accept_changes)
    trainer = build_trainer(config, accelerator)
    if start is not None:
        trainer.restore(start)
    return f"{TRIAL_STEPS} real steps: {_pace(config, trainer, source, vae)}"


def seconds_of_step(config: Config, trainer: Trainer, source: SampleSource, vae: ModelMixin | None = None) -> float:
    """Train a few steps; return how long the fastest took, on which other jobs on the machine bear least."""
    num_steps = {"num_steps": trainer.step + TRIAL_STEPS}
    short = config.model_copy(update={"training": config.training.model_copy(update=num_steps)})
    batches, times = micro_batches(short, source, vae, trainer.accelerator, trainer.step), [time.perf_counter()]
    for _ in range(TRIAL_STEPS):
        train_step(trainer, short, batches)
        times.append(time.perf_counter())
    return min(end - start for start, end in pairwise(times))


def _pace(config: Config, trainer: Trainer, source: SampleSource, vae: ModelMixin | None = None) -> str:
    seconds, accelerator = seconds_of_step(config, trainer, source, vae), trainer.accelerator
    speed, used, peak = config.training.global_batch_size / seconds, "", _peak_of_process()
    if (device := accelerator.device).type == "cuda":
        peak = torch.cuda.max_memory_allocated(device)
        used = utilisation(config, speed / accelerator.num_processes, torch.cuda.get_device_name(device))
    steps = config.training.num_steps
    memory = "" if peak is None else f"peak memory {_short(peak / 1e9)} GB, "
    return f"{memory}{_short(speed)} images/s{used}; on this machine: {duration(steps * seconds)}, {steps:,} steps"


def duration(seconds: float) -> str:
    """Return a time as people tell it."""
    unit, name = next(((unit, name) for unit, name, most in _UNITS if seconds < most), (_DAY, "days"))
    return f"{_short(seconds / unit)} {name}"


def _peak_of_process() -> int | None:
    """Return the most bytes that this process held, None on Windows, which does not report it."""
    try:
        import resource
    except ImportError:
        return None
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def utilisation(config: Config, images_per_second: float, device_name: str) -> str:
    """Return `` (MFU ...)`` for the speed of one GPU whose peak is known, else an empty string."""
    if (gpu := cost.find_gpu(device_name)) is None:
        return ""
    speed = images_per_second * run_cost(config).training_flops
    return f" (MFU {cost.mfu(speed, gpu, config.training.precision):.1%} of {gpu})"
