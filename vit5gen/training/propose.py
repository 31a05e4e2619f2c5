"""``vit5gen init FOLDER --output NAME.yaml``: look at a folder of pictures and write a configuration for it."""

import math
import re
import shlex
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import yaml
from diffusers import ModelMixin
from PIL import Image
from timm.layers import to_2tuple

from vit5gen.config import Config, DataConfig, VaeConfig, read_yaml, shipped_configs
from vit5gen.data.autoencoders import codec, find_autoencoder
from vit5gen.data.images import BrokenImage, ImageSet, centre_crop, decoding, open_held_out, open_images
from vit5gen.data.pictures import find_classes, folder_names
from vit5gen.data.sources.folder import HELD_OUT, TRAINING, FolderSource
from vit5gen.section import validate
from vit5gen.system.errors import UserError, listed
from vit5gen.system.files import check_writable, write_text
from vit5gen.training.batches import RandomLatents
from vit5gen.training.build import settle_auto
from vit5gen.training.dry_run import LONGEST_STEP, duration, guess_seconds, run_cost, seconds_of_step
from vit5gen.training.held_out import mean_psnr
from vit5gen.training.initial import begin_from, open_origin
from vit5gen.training.loop import build_trainer
from vit5gen.training.process import make_accelerator

DOCUMENTATION = "https://github.com/vit5gen/vit5gen/tree/main/docs"  # as in pyproject.toml
_RESOLUTIONS = (32, 64, 128, 256)
_LOOK_SECONDS = 15.0  # more would hardly change what is said of the pictures
_THUMBNAIL, _NEAR_DUPLICATE = 16, 8.0  # pixels; root mean square difference in grey levels below which two are one
_MEGAPIXELS = 150  # that a new autoencoder sees; configs/vae/emoji.yaml takes 19 minutes for 197 of them
_SECONDS = 900  # of a training
_TUNING_RATE = 2e-4  # of weights that are trained already
_EPOCHS, _FEW_STEPS = 300, 1000  # after so many passes over the pictures a model mostly repeats them
_FEWEST_STEPS = 800  # before which no model draws anything, however slow the machine


def look(folder: str) -> tuple[dict[str, Any], str, list[str], dict[str, torch.Tensor], set[str]]:
    """Look at the pictures of a folder in random order, for at most a quarter of a minute.

    Returns the section `data` for them, the held-out split, what was seen, of each picture that was looked at by its
    name (256,) fp32 grey levels, and the names of those that do not decode. Raises `UserError` without class folders
    with at least two pictures that decode.
    """
    # Splits and classes.
    names = {name.lower(): name for name in folder_names(FolderSource(DataConfig(path=folder)).need_folder())[0]}
    split = next((names[name] for name in TRAINING if name in names), "train")
    data = DataConfig(path=folder, split=split)
    source = FolderSource(data)
    held_out = next((names[name] for name in HELD_OUT if name in names and source.has_split(names[name])), None)
    found, _ = find_classes(root := source.folder(split), data.rules)
    files = [file for of_class in found.values() for file in of_class]
    if not files:
        advice = f"move the pictures of each class into a folder of its own, e.g. {root / 'cats'}; one class is enough"
        raise UserError(f"data.path {folder}: no pictures in class folders; {advice}")

    # The pictures: short and long sides, whether they are grey, thumbnails.
    sides, grey, broken, begun = [], 0, set(), time.perf_counter()
    thumbnails: dict[str, torch.Tensor] = {}
    for file in np.random.default_rng(0).permutation(np.array(files, dtype=object)):
        try:
            with decoding(str(file)), Image.open(file) as image:
                size, pixels = sorted(image.size), centre_crop(image, _THUMBNAIL, data.exif, data.rules).float()
        except BrokenImage:
            broken.add(file)
            continue
        sides.append(size)
        grey += bool((pixels.amax(0) - pixels.amin(0)).amax() <= 2)
        thumbnails[f"image {file}"] = pixels.mean(0).flatten()
        if time.perf_counter() - begun > _LOOK_SECONDS:
            break
    if not sides:
        raise UserError(f"data.path {folder}: none of its pictures decodes, e.g. {files[0]}; replace them")
    if len(files) - len(broken) < 2:
        raise UserError(f"data.path {folder}: 1 picture to train on; expected at least 2: add some")

    # What they are for a run.
    short, long = zip(*sides, strict=True)
    largest = min(median(short), 256 if torch.cuda.is_available() else 64)
    resolution = max([size for size in _RESOLUTIONS if size <= largest] or _RESOLUTIONS[:1])
    section: dict[str, Any] = {"path": folder, "split": split, "resolution": resolution}
    usable = [name for name, of_class in found.items() if not broken.issuperset(of_class)]
    if len(usable) < len(found):
        section["classes"] = usable
    looked_at = len(sides) + len(broken)
    section["held_out"] = 0.1 if held_out is None else None
    section["on_broken_image"] = "skip" if broken or looked_at < len(files) else "fail"
    section["horizontal_flip"] = True
    facts = [
        f"{_count(len(files), 'picture')} in {_count(len(found), 'class', 'classes')}"
        f" ({listed(f'{name} {len(found[name]):,}' for name in found)})",
        f"{_count(looked_at, 'picture')} looked at, {len(broken):,} of which cannot be decoded"
        + (f": {listed(sorted(map(str, broken)), 3)}" if broken else ""),
        f"{min(short)}-{max(long)} px, median short side {median(short):g}, {grey:,} grey",
        f"held-out split: {held_out or 'none'}",
    ]
    return section, held_out or "test", facts, thumbnails, {f"image {file}" for file in broken}


def _count(number: int, thing: str, things: str | None = None) -> str:
    return f"{number:,} {thing if number == 1 else things or f'{thing}s'}"


def choose_autoencoder(resolution: int, images: ImageSet, needed: str | None = None) -> tuple[str, ModelMixin, float]:
    """Return the name of an autoencoder that is at hand, itself, and the dB of a round trip of some images.

    It is the one ``needed``, else the default one where it has been fetched, else the shipped one that was trained
    nearest in size.
    """
    if needed is not None:
        vae = find_autoencoder.load_autoencoder(needed)
        return needed, vae, mean_psnr(vae, images)
    name, vae = VaeConfig().name, None
    with suppress(UserError):  # fetched in part
        vae = None if find_autoencoder.missing(name) else find_autoencoder.load_autoencoder(name)
    if vae is None:
        names = [name for name in find_autoencoder.shipped_autoencoders() if name != find_autoencoder.PIXELS]
        shipped = {name: find_autoencoder.load_autoencoder(name) for name in names}
        name = min(shipped, key=lambda name: abs(math.log2(shipped[name].config.sample_size / resolution)))
        vae = shipped[name]
    return name, vae, mean_psnr(vae, images)


def near_duplicates(held_out: ImageSet, training: ImageSet, thumbnails: dict[str, torch.Tensor]) -> int:
    """Return how many held-out pictures look like a training picture, among those that were looked at."""
    names = ([images.name(i) for i in range(len(images))] for images in (held_out, training))
    ours, theirs = ([thumbnails[name] for name in part if name in thumbnails] for part in names)
    if not ours or not theirs:
        return 0
    distance = torch.cdist(torch.stack(ours), torch.stack(theirs)) / _THUMBNAIL
    return int((distance < _NEAR_DUPLICATE).any(1).sum())


def model_for(latent_side: int, on_gpu: bool) -> tuple[dict[str, int], float]:
    """Return the sizes of a model that learns something in a quarter of an hour, and its learning rate."""
    small = (128, 6, 4, 2e-3) if latent_side <= 8 else (192, 6, 3, 1.5e-3)
    width, layers, heads, rate = (384, 12, 6, 5e-4) if on_gpu else small
    patch = max(1, latent_side // (16 if on_gpu else 8))
    return {"hidden_size": width, "num_layers": layers, "num_attention_heads": heads, "patch_size": patch}, rate


def propose(folder: str, output: str, weights: str | None = None, num_attention_heads: int | None = None) -> None:
    """Write ``output`` for the pictures in ``folder``, and print what was seen and the next command.

    weights: to begin with, as in `training.init_from`; size, autoencoder and model are then theirs.
    num_attention_heads: of a SiT file whose width matches no preset.
    Raises `UserError` where the folder holds no pictures in class folders, or a file is there or cannot be written.
    """
    file, other = Path(output), Path(output).with_name(f"{Path(output).stem}-autoencoder.yaml")
    for path in (file, other):
        if path.exists():
            raise UserError(f"--output {file}: {path} exists already; choose another name or remove it")
    check_writable(file)
    if weights is None and num_attention_heads is not None:
        raise UserError(f"--num-attention-heads {num_attention_heads} has no effect without --from; omit it")
    origin = None if weights is None else open_origin(weights, None, num_attention_heads)
    section, split, facts, thumbnails, broken = look(folder)
    print("\n  ".join([f"{folder}:", *facts]))

    # The data, as the run will open them.
    if origin is not None:
        pixels = codec.sizes_of(find_autoencoder.load_autoencoder(origin.vae)).downsample
        section["resolution"] = max(to_2tuple(origin.pipe.transformer.config.sample_size)) * pixels
    data = validate(DataConfig, section, folder)
    training, fault = open_images(data), ""
    try:
        held_out = open_held_out(data, split, training.class_names)
        both = [[i for i in range(len(part)) if part.name(i) not in broken] for part in (held_out, training)]
        if min(map(len, both)) < 2:
            fault = f"{_count(len(both[0]), 'picture')} beside {len(both[1])} to train on; expected at least 2 of each"
    except UserError as error:
        fault = str(error)
    if fault:
        print(f"held out: none, so that scores have nothing to compare with: {fault}")
        section["held_out"] = None
        training = open_images(data.model_copy(update={"held_out": None}))
    else:
        alike = near_duplicates(held_out, training, thumbnails)
        print(f"held out: {_count(len(held_out), 'picture')}; {alike:,} of them look like one to train on")

    # The autoencoder, and the quick start's recipe with a model for this machine, or that of the weights.
    sound = [i for i in range(len(training)) if training.name(i) in thumbnails]
    pictures, needed = training.select(sound or range(len(training))), None if origin is None else origin.vae
    name, vae, quality = choose_autoencoder(section["resolution"], pictures, needed)
    print(f"autoencoder: {name} reconstructs these pictures at {quality:.1f} dB")
    resolution, on_gpu = section["resolution"], torch.cuda.is_available()
    (channels, factor, _), count = codec.sizes_of(vae), len(training)
    batch = 2 ** (min(64 if on_gpu else 32, count).bit_length() - 1)
    content = read_yaml(shipped_configs()["quickstart"]) | {"data": section}
    content["vae"] = {"name": name, "latent_channels": channels, "downsample": factor}
    settings: dict[str, Any] = content["training"]
    settings |= {"global_batch_size": batch, "compile": False}
    if origin is None:
        sizes, settings["learning_rate"] = model_for(resolution // factor, on_gpu)
        content["model"] |= sizes
    else:
        content["model"] = {} if num_attention_heads is None else {"num_attention_heads": num_attention_heads}
        flow = origin.pipe.flow
        content["flow"] |= {"path": flow.path, "prediction": flow.prediction}
        settings |= {"learning_rate": _TUNING_RATE, "init_from": weights}
    del settings["checkpoint_every"]
    content["evaluation"] = {"num_images": 256, "held_out_split": split}

    # How many steps: as many as the time allows, and the pictures.
    config = settle_auto(begin_from(validate(Config, content, folder)), {})
    accelerator = make_accelerator(config.training, Path())
    source = RandomLatents(config.latent_shape, len(training.class_names))
    seconds = 0.0 if on_gpu else guess_seconds(config, run_cost(config))
    if seconds < LONGEST_STEP:
        seconds = seconds_of_step(config, build_trainer(config, accelerator), source)
    wanted = min(_SECONDS / seconds, max(_FEW_STEPS, _EPOCHS * count // batch))
    steps = settings["num_steps"] = max(_FEWEST_STEPS, round(int(wanted), -2))
    settings["ema_decays"] = [0.99 if steps < 5000 else 0.999]

    # What is written, and the next commands.
    next_command = f"vit5gen train {shlex.quote(str(file))} --output {shlex.quote(f'runs/{file.stem}')}"
    took = f"{steps} steps of {batch} pictures of {resolution} px, about {duration(steps * seconds)} on this machine"
    header = ["every key: vit5gen train --help", "", f"  {next_command}", "", *facts]
    header += [
        f"{took}, encoding and evaluation not included.",
        f"A good and a bad result: {DOCUMENTATION}/training.md",
    ]
    comments = _COMMENTS | {"vae": f"gives {quality:.1f} dB, which bounds the model"}
    _write(file, header, content, comments if origin is None else comments | {"resolution": "that of the weights"})
    print(f"{file}: {took}\nNext:\n{next_command}")
    poor = f"{quality:.1f} dB is low: the autoencoder {name} was not trained on pictures like these"
    if quality < codec.POOR_PSNR and origin is not None:
        print(f"{poor}; without --from, another can be trained")
    elif quality < codec.POOR_PSNR:
        small, vae_run = min(batch, 32 if resolution == 32 else 16), shlex.quote(f"runs/{file.stem}-vae")
        train_vae = f"vit5gen autoencoder {shlex.quote(str(other))} --output {vae_run}"
        own = {"data": section, "held_out_split": section["split"] if fault else split}
        own |= {"latent_channels": channels, "batch_size": small}
        own["block_out_channels"] = [24, 48, *[96] * (factor.bit_length() - 2)]
        own["num_steps"] = max(2000, int(_MEGAPIXELS * 1e6 / (small * resolution**2)))
        reason = f"an autoencoder for pictures that {name} does not reconstruct well"
        _write(other, [reason, "", f"  {train_vae}"], own, {})
        print(f"{poor}. Better, with one that is ({other}):\n{train_vae}\n{next_command} --vae.name {vae_run}")


_COMMENTS = {
    "data": "the number of classes is found",
    "resolution": "the largest of 32, 64, 128 and 256 that the median picture fills; above 64 needs a GPU",
    "classes": "the others have no picture that decodes",
    "held_out": "of each class, chosen by hash; null: the folder of evaluation.held_out_split, if there is one",
    "horizontal_flip": "false where left and right matter, as in letters and digits",
    "backbone_kwargs": "the published gamma_init, 1e-4, starves a short run",
    "precision": "bf16 where the machine has instructions for it",
    "num_images": "at most as many as are held out",
    "init_from": "the model is that of these weights; classes that they know are found by name",
}


def _write(file: Path, header: list[str], content: dict[str, Any], comments: Mapping[str, str]) -> None:
    """Write a configuration below its header; a comment follows the first line of its key."""
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True, width=math.inf)
    for key, comment in comments.items():
        text = re.sub(rf"^( *{key}:.*)", rf"\g<1> # {comment}", text, count=1, flags=re.MULTILINE)
    lines = ["Written by `vit5gen init` for this machine; " + header[0], *header[1:]]
    write_text(file, "".join(f"# {line}".rstrip() + "\n" for line in lines) + text)
