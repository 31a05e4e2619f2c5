"""``vit5gen init FOLDER --output NAME.yaml``: look at a folder of pictures and write a configuration for it."""

import json
import shlex
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from PIL import Image
from timm.layers import to_2tuple

from vit5gen.config import Config, DataConfig, VaeConfig, parse_yaml, validate
from vit5gen.data.autoencoders import kl
from vit5gen.data.images import BrokenImage, ImageSet, centre_crop, decoding, open_held_out, open_images
from vit5gen.data.pictures import find_classes, folder_names
from vit5gen.data.sources.folder import HELD_OUT, TRAINING, FolderSource
from vit5gen.system.errors import UserError, listed
from vit5gen.system.files import check_writable, write_text
from vit5gen.training.batches import RandomLatents
from vit5gen.training.build import settle_auto
from vit5gen.training.dry_run import LONGEST_STEP, duration, guess_seconds, run_cost, seconds_of_step
from vit5gen.training.initial import begin_from, open_origin
from vit5gen.training.loop import build_trainer
from vit5gen.training.process import make_accelerator

_RESOLUTIONS = (32, 64, 128, 256)
_MOST_ON_CPU = 64  # pixels
_MOST_LOOKED_AT, _LOOK_SECONDS = 4000, 30.0  # pictures; more would hardly change what is said of them
_MOST_ROUND_TRIPS, _ROUND_TRIP_SECONDS = 64, 20.0
_THUMBNAIL, _NEAR_DUPLICATE = 16, 8.0  # pixels; root mean square difference in grey levels below which two are one
_MEGAPIXELS = 150  # that a new autoencoder sees; configs/vae/emoji.yaml takes 19 minutes for 197 of them
_TUNING_RATE = 2e-4  # of weights that are trained already
_EPOCHS, _FEW_STEPS = 300, 1000  # after so many passes over the pictures a model mostly repeats them


@dataclass(frozen=True)
class Machine:
    """What suits a kind of device: ``tokens`` along a side, minutes, and bounds of steps, of a training."""

    batch: int
    tokens: int
    minutes: float
    steps: tuple[int, int]
    evaluated: int


_CPU, _GPU = Machine(32, 8, 15, (800, 10_000), 256), Machine(64, 16, 20, (2000, 50_000), 1000)


@dataclass
class Survey:
    """What a folder holds: pictures by class; of those that were looked at short sides, greys, thumbnails by path."""

    counts: dict[str, int]
    split: str
    held_out_split: str | None
    short_sides: list[int] = field(default_factory=list)
    long_sides: list[int] = field(default_factory=list)
    grey: int = 0
    thumbnails: dict[str, torch.Tensor] = field(default_factory=dict)  # (256,) fp32 grey levels
    broken: list[str] = field(default_factory=list)
    usable: list[str] = field(default_factory=list)  # classes with a picture that decodes, or may

    @property
    def complete(self) -> bool:
        return len(self.short_sides) + len(self.broken) == sum(self.counts.values())


def look(folder: str) -> Survey:
    """Look at the pictures of a folder, at most 4000 of them and for half a minute.

    Raises `UserError` where it holds no class folders with pictures that decode.
    """
    names = folder_names(FolderSource(DataConfig(path=folder)).need_folder())[0]
    split = next((name for name in names if name.lower() in TRAINING), "train")
    data = DataConfig(path=folder, split=split)
    source = FolderSource(data)
    splits = sorted((name for name in names if name.lower() in HELD_OUT), key=lambda name: HELD_OUT.index(name.lower()))
    found, _ = find_classes(source.folder(split))
    counts = {name: len(files) for name, files in found.items()}
    survey = Survey(counts, split, next((name for name in splits if source.has_split(name)), None))
    files = [(name, file) for name, of_class in found.items() for file in of_class]
    if not files:
        raise UserError(
            f"data.path {folder}: no pictures in class folders; expected one folder of pictures for each class"
        )
    unseen, good, begun = Counter(counts), set(), time.perf_counter()
    for index in np.random.default_rng(0).permutation(len(files))[:_MOST_LOOKED_AT]:
        if time.perf_counter() - begun > _LOOK_SECONDS:
            break
        name, file = files[index]
        unseen[name] -= 1
        try:
            with decoding(str(file)), Image.open(file) as image:
                sides, pixels = sorted(image.size), centre_crop(image, _THUMBNAIL).float()
        except BrokenImage:
            survey.broken.append(str(file))
            continue
        good.add(name)
        survey.short_sides.append(sides[0])
        survey.long_sides.append(sides[1])
        survey.grey += bool((pixels.amax(0) - pixels.amin(0)).amax() <= 2)
        survey.thumbnails[str(file)] = pixels.mean(0).flatten()
    survey.usable = [name for name in counts if name in good or unseen[name]]
    if not good:
        raise UserError(f"data.path {folder}: none of its pictures decodes, e.g. {survey.broken[0]}; replace them")
    return survey


def choose_autoencoder(
    resolution: int, images: ImageSet, needed: str | None = None
) -> tuple[str, AutoencoderKL, float]:
    """Return the name of an autoencoder that is at hand, itself, and the dB of a round trip of some images.

    It is the one ``needed``, else the default one where it has been fetched, else the shipped one that was trained
    nearest in size.
    """
    name = needed or VaeConfig().name
    vae = None if needed is None else kl.load_autoencoder(needed)
    if vae is None and not kl.missing(name):
        try:
            vae = kl.load_autoencoder(name)
        except UserError:  # fetched in part
            vae = None
    if vae is None:
        shipped = {name: kl.load_autoencoder(name) for name in kl.shipped_autoencoders()}
        name = min(shipped, key=lambda name: abs(np.log2(shipped[name].config.sample_size / resolution)))
        vae = shipped[name]
    chosen, scores, begun = np.linspace(0, len(images) - 1, min(len(images), _MOST_ROUND_TRIPS)), [], 0.0
    for part in torch.from_numpy(chosen).long().split(8):
        scores.append(kl.round_trip_psnr(vae, images.stack(part)))
        begun = begun or time.perf_counter()
        if time.perf_counter() - begun > _ROUND_TRIP_SECONDS:
            break
    return name, vae, torch.cat(scores).mean().item()


def near_duplicates(held_out: ImageSet, training: ImageSet, thumbnails: dict[str, torch.Tensor]) -> int:
    """Return how many held-out pictures nearly equal a training picture, among those that were looked at."""
    names = [[_path(images, i) for i in range(len(images))] for images in (held_out, training)]
    ours, theirs = ([thumbnails[name] for name in part if name in thumbnails] for part in names)
    if not ours or not theirs:
        return 0
    distance = torch.cdist(torch.stack(ours), torch.stack(theirs)) / _THUMBNAIL
    return int((distance < _NEAR_DUPLICATE).any(1).sum())


def model_for(latent_side: int, machine: Machine) -> dict[str, int]:
    """Return the sizes of a model that learns something in a quarter of an hour."""
    patch = max(1, latent_side // machine.tokens)
    width, layers, heads = (384, 12, 6) if machine is _GPU else (128, 6, 4) if latent_side <= 8 else (192, 6, 3)
    return {"hidden_size": width, "num_layers": layers, "num_attention_heads": heads, "patch_size": patch}


def init(folder: str, output: str, weights: str | None = None) -> None:
    """Write ``output`` for the pictures in ``folder``, and print what was seen and the next command.

    weights: to begin with, as in `training.init_from`; size, autoencoder and model are then theirs.
    Raises `UserError` where the folder holds no pictures in class folders, or a file is there or cannot be written.
    """
    file, other = Path(output), Path(output).with_name(f"{Path(output).stem}-autoencoder.yaml")
    for path in (file, other):
        if path.exists():
            raise UserError(f"--output {file}: {path} exists already; choose another name or remove it")
    check_writable(file)
    origin = None if weights is None else open_origin(weights)
    survey, machine = look(folder), _GPU if torch.cuda.is_available() else _CPU
    print("\n  ".join([f"{folder}:", *describe(survey)]))

    # The data, as the run will open them.
    side = median(survey.short_sides)
    resolution = max([size for size in _RESOLUTIONS if size <= side] or _RESOLUTIONS[:1])
    why = f"the short side of the median picture is {side:g}"
    if machine is _CPU and resolution > _MOST_ON_CPU:
        resolution, why = _MOST_ON_CPU, f"{why}; more needs a GPU"
    if origin is not None:
        pixels = kl.downsample(kl.load_autoencoder(origin.vae))
        resolution, why = max(to_2tuple(origin.pipe.transformer.config.sample_size)) * pixels, "that of the weights"
    split = survey.held_out_split or "test"
    lines = [f"path: {_quoted(folder)}", f"resolution: {resolution} # {why}"]
    if survey.split != "train":
        lines.append(f"split: {survey.split}")
    if len(survey.usable) < len(survey.counts):
        lines.append(f"classes: [{', '.join(map(_quoted, survey.usable))}] # the others have no picture that decodes")
    if survey.held_out_split is None:
        lines.append("held_out: 0.1 # of each class, chosen by hash: training never sees these pictures")
    if survey.broken or not survey.complete:
        lines.append("on_broken_image: skip")
    lines.append("horizontal_flip: true # false where left and right matter, as in letters and digits")
    data_section = "".join(f"  {line}\n" for line in lines)
    data = validate(DataConfig, parse_yaml(data_section), folder)
    training = open_images(data)
    try:
        held_out = open_held_out(data, split, training.class_names)
        alike = near_duplicates(held_out, training, survey.thumbnails)
        print(f"held out: {len(held_out):,} pictures; {alike:,} of them nearly equal one to train on")
    except UserError as error:
        print(f"held out: none, so that scores have nothing to compare with: {error}")
        data_section = "".join(f"  {line}\n" for line in lines if not line.startswith("held_out"))
        data = validate(DataConfig, parse_yaml(data_section), folder)

    # The autoencoder, the model, and how long a step takes here.
    sound = [i for i in range(len(training)) if _path(training, i) in survey.thumbnails]
    pictures = training.select(sound or range(len(training)))
    name, vae, quality = choose_autoencoder(resolution, pictures, None if origin is None else origin.vae)
    print(f"autoencoder: {name} returns these pictures with {quality:.1f} dB")
    factor, count = kl.downsample(vae), len(training)
    batch = 2 ** (min(machine.batch, count).bit_length() - 1)
    if origin is None:
        sizes = model_for(resolution // factor, machine)
        rate = {128: 2e-3, 192: 1.5e-3, 384: 5e-4}[sizes["hidden_size"]]
        begin = _ANEW.format(sizes="".join(f"  {key}: {value}\n" for key, value in sizes.items()))
    else:
        flow, rate = origin.pipe.flow, _TUNING_RATE
        begin = _FROM_WEIGHTS.format(path=flow.path, prediction=flow.prediction, weights=_quoted(str(weights)))
    vae_section = {"name": name, "latent_channels": vae.config.latent_channels, "downsample": factor}
    settings: dict[str, Any] = {"global_batch_size": batch, "precision": "auto", "trackers": []}
    trial = {"data": {"resolution": resolution}, "vae": vae_section, **parse_yaml(begin)}
    trial["training"] = (trial["training"] or {}) | settings
    config = settle_auto(begin_from(validate(Config, trial, folder)), {})
    accelerator = make_accelerator(config.training, Path())
    source = RandomLatents(config.latent_shape, config.num_classes)
    seconds = guess_seconds(config, run_cost(config)) if machine is _CPU else 0.0
    if seconds < LONGEST_STEP:
        seconds = seconds_of_step(config, accelerator, build_trainer(config, accelerator), source)
    wanted = min(max(60 * machine.minutes / seconds, machine.steps[0]), max(_FEW_STEPS, _EPOCHS * count // batch))
    steps = round(min(wanted, machine.steps[1]), -2)
    run = shlex.quote(f"runs/{file.stem}")
    next_command = f"vit5gen train {shlex.quote(str(file))} --output {run}"
    text = _TEMPLATE.format(
        command=next_command, seen="\n# ".join(describe(survey)), took=duration(steps * seconds), data=data_section,
        quality=quality, name=_quoted(name), channels=vae.config.latent_channels, factor=factor, begin=begin,
        steps=int(steps), batch=batch, rate=rate,
        decay=0.99 if steps < 5000 else 0.999, images=machine.evaluated, split=_quoted(split),
    )  # fmt: skip
    write_text(file, text)
    print(f"{file}: {steps:.0f} steps of {batch} pictures of {resolution} px, about {duration(steps * seconds)} here")
    print(f"Next:\n{next_command}")
    if quality < kl.POOR_PSNR and origin is not None:
        print(f"{quality:.1f} dB are few: {name} does not know such pictures; without --from, another can be trained")
    elif quality < kl.POOR_PSNR:
        small, vae_run = min(batch, 32 if resolution == 32 else 16), shlex.quote(f"runs/{file.stem}-vae")
        train_vae = f"vit5gen autoencoder {shlex.quote(str(other))} --output {vae_run}"
        content = {"command": train_vae, "name": name, "quality": quality, "data": data_section, "batch": small}
        content |= {"widths": [24, 48, *[96] * (factor.bit_length() - 2)], "channels": vae.config.latent_channels}
        content |= {"split": _quoted(split), "steps": max(2000, int(_MEGAPIXELS * 1e6 / (small * resolution**2)))}
        write_text(other, _AUTOENCODER.format(**content))
        poor = f"{quality:.1f} dB are few: {name} does not know such pictures. Better, with an autoencoder of them"
        print(f"{poor} ({other}):\n{train_vae}\n{next_command} --vae.name {vae_run}")


def describe(survey: Survey) -> list[str]:
    """Return lines on what a folder holds."""
    most, total = max(survey.counts.values()), sum(survey.counts.values())
    per_class = listed(f"{name} {count:,}" for name, count in survey.counts.items())
    seen = "" if survey.complete else f"; of {len(survey.short_sides) + len(survey.broken):,} looked at"
    facts = [
        f"{total:,} pictures in {len(survey.counts)} classes ({per_class}), at most {most:,} in one{seen}",
        f"{min(survey.short_sides)}-{max(survey.long_sides)} px, median short side {median(survey.short_sides):g}",
        f"held-out split: {survey.held_out_split or 'none'}",
    ]
    facts += [f"{survey.grey:,} grey"] * bool(survey.grey)
    facts += [f"{len(survey.broken):,} do not decode ({listed(survey.broken, 3)})"] * bool(survey.broken)
    return [" ".join(fact.split()) for fact in facts]


def _path(images: ImageSet, index: int) -> str:
    return images.name(index).removeprefix("image ")


def _quoted(text: str) -> str:
    """Return text as YAML, in whose double quotes JSON's escapes hold."""
    return json.dumps(text, ensure_ascii=not text.isprintable())


_TEMPLATE = """\
# Written by `vit5gen init`, for this machine. Every key: vit5gen train --help
#
#   {command}
#
# {seen}
# About {took} on this machine, encoding and evaluation not included. docs/training.md shows a good and a bad
# result, and how to tell.
data: # num_classes is found in the data
{data}vae: # returns these pictures with {quality:.1f} dB; no generated picture can be better than that
  name: {name}
  latent_channels: {channels}
  downsample: {factor}
{begin}  num_steps: {steps}
  global_batch_size: {batch}
  precision: auto # bf16 where the machine has instructions for it
  learning_rate: {rate}
  schedule: cosine
  warmup_steps: 100
  ema_decays: [{decay}]
  log_every: 50
sampling:
  sampler: ode-ab2
  num_inference_steps: 20
  guidance_scale: 2.0
evaluation:
  num_images: {images} # at most as many as are held out
  held_out_split: {split}
"""

_ANEW = """\
model:
  backbone: vit5
  backbone_kwargs: {{gamma_init: 1.0}} # the published 1e-4 starves a short run
{sizes}flow:
  time_distribution: logit_normal
training:
"""

_FROM_WEIGHTS = """\
flow: # path and prediction as the weights were trained
  path: {path}
  prediction: {prediction}
  time_distribution: logit_normal
training:
  init_from: {weights} # the model is that of these weights; classes that they know are found by name
"""

_AUTOENCODER = """\
# Written by `vit5gen init`: an autoencoder of these pictures, which {name} returns with {quality:.1f} dB only.
#
#   {command}
data:
{data}held_out_split: {split}
block_out_channels: {widths}
latent_channels: {channels}
num_steps: {steps}
batch_size: {batch}
"""
