"""A published SiT checkpoint, or one of a run, becomes a pipeline; autoencoders and classifiers become a folder."""

import os
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import save_file
from timm.data import ImageNetInfo
from torch import Tensor

from vit5gen.config import VaeConfig, load_recorded
from vit5gen.data.autoencoders.codec import Normalization, codec_of, normalization_of, sizes_of
from vit5gen.data.autoencoders.find_autoencoder import load_autoencoder
from vit5gen.data.autoencoders.ldm import from_ldm, is_ldm
from vit5gen.data.latents import recorded_normalization
from vit5gen.data.sources.folder import imagenet_names
from vit5gen.generation.card import TrainingFacts
from vit5gen.generation.lora import Adapter
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.generation.scheduler import SiTScheduler
from vit5gen.models import SiTTransformer2DModel, ViT5, load_sit, load_vit5
from vit5gen.models.published import check_variance, reverse_time
from vit5gen.models.weights import Weights, check_finite, load_exactly, read_checkpoint, read_tensors, without
from vit5gen.system.distributed import processes
from vit5gen.system.errors import UserError, choose, listed, short
from vit5gen.system.files import read_json
from vit5gen.training.build import build_model, build_scheduler
from vit5gen.training.checkpoint import CONFIG, find_damage, load_tensors, newest_valid, read_state
from vit5gen.training.posthoc import rebuild
from vit5gen.training.run_folder import RunFolder
from vit5gen.training.trainable import adapter_of, fold


def export_pipeline(
    checkpoint: str | Path,
    output: str | Path,
    vae: str | None,
    weights: str | None,
    num_attention_heads: int | None,
    num_classes: int | None = None,
    drop_prefix: Sequence[str] = (),
    reversed_time: bool | None = None,
    ema_length: Sequence[float] | None = None,
) -> None:
    """Write the folder ``output``, whole or not at all: a pipeline, or an autoencoder or classifier if that is given.

    checkpoint: a file in SiT's published layout, or RUN or RUN/checkpoints/step_XXXXXXXX of the trainer; or a file
    of an autoencoder in LDM's layout, or of a classifier in ViT-5's. What is pickled beside its tensors is left out.
    vae: name or folder of the autoencoder, None SiT's or the run's; "none" leaves it out (latents only).
    weights: of a run, ``ema_<decay>`` or ``model``, None its first average.
    num_attention_heads: of a SiT file whose width matches no preset.  drop_prefix: of its weights that are left out.
    num_classes: see `pipeline_of_file`.  reversed_time: whether its time runs from data (0) to noise (1).
    ema_length: of the averages of a run to rebuild in place of ``weights``; several become folders in ``output``.
    Raises `UserError` for anything that is not such a checkpoint, and for an output that exists.
    """
    # The pipeline of a run's checkpoint, or of a published file, which knows no class names but ImageNet's.
    source, target = Path(checkpoint), Path(output).resolve()
    check_new(target, "--output")
    of_sit: dict[str, Any] = {"num-attention-heads": num_attention_heads, "num-classes": num_classes}
    of_sit |= {"drop-prefix": drop_prefix, "reversed-time": reversed_time}
    idle = [f"--{name}" for name, value in of_sit.items() if value]
    if source.is_dir():
        if idle:
            raise UserError(f"{idle[0]} is only for published SiT files; a run records what it is; omit it")
        if ema_length:
            places = {length: "" if len(ema_length) == 1 else f"length_{length}" for length in ema_length}
            write_whole(lambda new: export_lengths(source, vae, {k: new / v for k, v in places.items()}), target)
            print(f"{output}: averages of {source}, of length {listed(map(str, places))}")
            return
        pipe, folder, chosen, adapter = pipeline_of_run(source, vae, weights)
        source_name, began = f"{chosen} of {folder}", load_recorded(folder / CONFIG).training.origin
    else:
        if ema_length:
            raise UserError("--ema-length is only for runs and their checkpoints; omit it")
        if weights is not None:
            raise UserError(f"--weights {weights} is only for checkpoints of a run; a SiT file has one set of weights")
        state = read_checkpoint(read_tensors(source, "checkpoint", leave_out=True))
        kind = "an autoencoder" if is_ldm(state) else "a classifier" if "patch_embed.proj.weight" in state else None
        if kind and (idle := ["--vae"] * (vae is not None) + idle):
            raise UserError(f"{source} is {kind}: {idle[0]} has no effect; omit it")
        if kind == "an autoencoder":
            write_whole(from_ldm(state).save_pretrained, target)
            advice = f"train with --vae.name {output} --vae.normalize measured: the file tells no scale of its latents"
        elif kind:
            write_whole(partial(_save_classifier, load_vit5(state)), target)
            advice = f"give {output}/model.safetensors to `vit5gen classify`, or to timm as checkpoint_path"
        if kind:
            print(f"{output}: {kind}; {advice}")
            return
        if not reversed_time and any(prefix.startswith("projectors") for prefix in drop_prefix):
            print("note: time runs from data to noise in REPA's own files: add --reversed-time if this is one of them")
        state, source_name = without(state, drop_prefix), source.name
        pipe = pipeline_of_file(state, vae, num_attention_heads, source_name, num_classes)
        if reversed_time:
            reverse_time(pipe.transformer)
        began, adapter = None, None
    facts = TrainingFacts(command=f"converted from {source_name}", origin=began)
    write_whole(partial(pipe.save_pretrained, facts=facts, adapter=adapter), target)
    advice = f"try `vit5gen sample --checkpoint {output} --num-images 8 --seed 0 --output samples.png`"
    print(f"{output}: {'without an autoencoder it generates latents only' if pipe.vae is None else advice}")


def export_lengths(source: Path, vae: str | None, places: Mapping[float, Path]) -> None:
    """Write a pipeline of a run or checkpoint into a folder for each length of the average of its weights."""
    folder = _checkpoint_of(source)
    for length, average in rebuild(folder, list(places)).items():
        pipe, adapter = _pipeline_of(folder, vae, average)
        command = f"converted from the average of length {length} of {folder}"
        facts = TrainingFacts(command=command, origin=load_recorded(folder / CONFIG).training.origin)
        pipe.save_pretrained(places[length], facts=facts, adapter=adapter)


def _save_classifier(model: ViT5, folder: Path) -> None:
    folder.mkdir(parents=True)
    save_file(model.state_dict(), folder / "model.safetensors")


def check_new(target: Path, option: str) -> None:
    """Raise `UserError` for a folder to be written that exists already, unless it is empty."""
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"output {target} exists; choose another {option} or delete it")


def write_whole(save: Callable[[Path], None], target: Path) -> None:
    """Save beside ``target`` and rename, so that no half of it is ever there; raise `UserError` where that fails."""
    temporary = target.with_name(f".{target.name}.{os.getpid()}.tmp")
    try:
        save(temporary)
        os.replace(temporary, target)
    except (OSError, SafetensorError) as error:
        raise UserError(f"output {target}: {error}; nothing was written") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def pipeline_of_file(
    source: Weights, vae: str | None, num_attention_heads: int | None, name: str, num_classes: int | None = None
) -> SiTPipeline:
    """Return the pipeline of a file in SiT's published layout; 1000 classes are ImageNet's.

    name: of the file.  num_classes: as many rows of the label table, or one less where the last is the null row; None
    reads the table as `load_sit` does. Prints what may be other than it seems. Raises `UserError` for what is no SiT.
    """
    model = load_sit(source, num_attention_heads, **({} if num_classes is None else {"num_classes": num_classes}))
    if note := check_variance(model, name):
        processes().print(note)
    if not model.has_null_label:
        rows = f"the label table has {model.null_label} rows, none of which is the null row"
        processes().print(f"note: {rows}: guidance_scale must be 1")
    names = imagenet_names(ImageNetInfo().label_names()) if model.config.num_classes == 1000 else []
    return _assemble(model, SiTScheduler(), vae or VaeConfig().name, dict(enumerate(names)))


def pipeline_of_run(
    source: Path, vae: str | None, weights: str | None
) -> tuple[SiTPipeline, Path, str, Adapter | None]:
    """Return the pipeline of a run or checkpoint, the checkpoint, which weights of it, and what is folded into them.

    See `export_pipeline`.
    """
    folder = _checkpoint_of(source)
    settings = load_recorded(folder / CONFIG).training
    averages = [f"ema_{decay}" for decay in settings.ema_decays]
    chosen = choose("weights", weights or averages[0], [*averages, "model"])
    pipe, adapter = _pipeline_of(folder, vae, load_tensors(folder, chosen))
    return pipe, folder, chosen, adapter


def _checkpoint_of(source: Path) -> Path:
    """Return the checkpoint that a run, its newest, or a checkpoint stands for; raise `UserError` for what is none."""
    run = RunFolder(source)
    folder = newest_valid(run.checkpoints) if run.checkpoints.is_dir() else source
    if folder is None or not (folder / CONFIG).is_file():
        raise UserError(f"{source} is neither a run nor a checkpoint folder; expected RUN or one of RUN/checkpoints")
    if fault := find_damage(folder):
        raise UserError(f"checkpoint {folder}: {fault}; choose another checkpoint of the run")
    return folder


def _pipeline_of(folder: Path, vae: str | None, weights: Mapping[str, Tensor]) -> tuple[SiTPipeline, Adapter | None]:
    """Return the pipeline of a checkpoint with the given weights, and what is folded into them."""
    config = load_recorded(folder / CONFIG)
    model = build_model(config)
    # An average holds what is trained; the rest comes from the model.
    state = {**load_tensors(folder, "model"), **weights}
    load_exactly(model, fold(state, config.training))
    adapter = adapter_of(state, load_tensors(folder, f"ema_{config.training.ema_decays[0]}"), config.training)
    index = RunFolder(folder.parent.parent).pipeline / "model_index.json"
    told = read_json(index, "pipeline") if index.is_file() else {}
    recorded = dict(enumerate(read_state(folder).get("data", {}).get("classes", [])))
    scheduler = build_scheduler(config)
    names, attribution = told.get("id2label", recorded), told.get("attribution")
    trained = recorded_normalization(read_state(folder).get("data", {}))
    own = config.vae.normalize == "config"
    return _assemble(model, scheduler, vae or config.vae.name, names, attribution, trained, own), adapter


def _assemble(
    model: SiTTransformer2DModel,
    scheduler: SiTScheduler,
    vae: str,
    names: dict[int, str],
    attribution: str | None = None,
    trained: Normalization | None = None,
    own: bool = True,
) -> SiTPipeline:
    """Put a pipeline together; trained: how latents were normalised, by the autoencoder's ``own`` numbers or not."""
    autoencoder = None if vae == "none" else load_autoencoder(vae)
    if autoencoder is not None:
        channels, taken = sizes_of(autoencoder).channels, model.config.in_channels
        if channels != taken:
            advice = "set --vae to the autoencoder that the model was trained with, or to 'none'"
            raise UserError(f"vae {vae!r} has {channels} latent channels, the model takes {taken}; {advice}")
        check_finite(f"vae {vae!r}", autoencoder.state_dict())
        if trained is not None and not own:
            codec_of(autoencoder).record(autoencoder, trained)
        elif trained is not None and not trained.agrees(found := normalization_of(autoencoder)):
            advice = "set --vae to the autoencoder that the model was trained with"
            seen = f"the model was trained with {short(tuple(trained))}"
            raise UserError(f"vae {vae!r} has latents of scale and shift {short(tuple(found))}, {seen}; {advice}")
    normalization = None if trained is None or own else trained._asdict()
    return SiTPipeline(model.eval(), scheduler, autoencoder, None, names, attribution, normalization)
