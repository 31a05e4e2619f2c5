"""Weights to begin with: what `training.init_from` names, what must agree with it, and how it fits the new model."""

import hashlib
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import model_info, snapshot_download, try_to_load_from_cache
from timm.layers import to_2tuple
from torch import Tensor

from vit5gen.config import Config, ModelConfig, VaeConfig, load_recorded
from vit5gen.data.autoencoders.codec import Normalization, normalization_of
from vit5gen.data.autoencoders.find_autoencoder import load_autoencoder
from vit5gen.data.autoencoders.find_autoencoder import missing as missing_autoencoder
from vit5gen.data.latents import find_class_names, recorded_normalization
from vit5gen.generation.card import pipeline_hash
from vit5gen.generation.find_pipeline import find_pipeline
from vit5gen.generation.labels import ids_called, names_by_id
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.models.backbone import BACKBONES
from vit5gen.models.positions import Grid, patch_grid, resample_positions
from vit5gen.models.transformer import PRESETS
from vit5gen.models.weights import fit_channels
from vit5gen.section import validate
from vit5gen.system.distributed import processes
from vit5gen.system.errors import UserError, choose, listed, short
from vit5gen.system.files import read_json, sha256
from vit5gen.system.shipped import shipped_names
from vit5gen.training.build import build_model, check_values
from vit5gen.training.checkpoint import CONFIG, read_state, steps
from vit5gen.training.export import pipeline_of_file, pipeline_of_run

_SIZES = ("backbone", "hidden_size", "num_layers", "num_attention_heads", "patch_size", "mlp_ratio")
_LABELS, _HEAD = "label_embed.weight", ("head.linear.weight", "head.linear.bias")
_MOST_ROWS = 20  # of the table of classes that are shown where old and new row are the same
_opened: dict[str, "Origin"] = {}  # by hash: what `begin_from` has read, for what comes next


@dataclass(frozen=True)
class Origin:
    """What a run begins with: a pipeline without its autoencoder, and the SHA-256 of its weights.

    vae: name of the autoencoder.  normalization: of its latents, None where nothing tells.
    """

    pipe: SiTPipeline
    digest: str
    vae: str
    normalization: Normalization | None = None


def open_origin(name: str, weights: str | None = None, num_attention_heads: int | None = None) -> Origin:
    """Read what `training.init_from` names: a file, a run, a checkpoint, or a pipeline here, shipped or on the hub.

    weights: `training.init_weights`.  num_attention_heads: of a SiT file whose width matches no preset.
    Raises `UserError` where it is nothing of the kind, damaged, unsafe or not finite.
    """
    path = Path(name).expanduser()
    try:
        if steps(path / "checkpoints") or ((path / CONFIG).is_file() and find_pipeline(path) is None):
            pipe, folder, chosen, _ = pipeline_of_run(path, "none", weights)
            config = load_recorded(folder / CONFIG)
            known = recorded_normalization(read_state(folder).get("data", {}))
            digest = sha256(folder / f"{chosen}.safetensors")
            if config.training.trainable != "all" and chosen != "model":  # an average holds what is trained
                digest = hashlib.sha256(f"{sha256(folder / 'model.safetensors')} {digest}".encode()).hexdigest()
            vae, there = config.vae.name, find_pipeline(path)
            if config.vae.normalize != "config" and there is not None:
                vae = str(there)  # whose autoencoder has the statistics
            return Origin(pipe, digest, vae, known)
        if weights is not None:
            raise UserError(f"training.init_weights = {weights} is only for a run with checkpoints; leave it out")
        if path.is_file():
            pipe = pipeline_of_file(path, "none", num_attention_heads, path.name)
            return Origin(pipe, sha256(path), VaeConfig().name)
        folder = find_pipeline(path) or _fetch(name)
        if (pipe := load_pipeline(folder)).vae is None:
            told = pipe.config.get("latent_normalization")
            return Origin(pipe, pipeline_hash(folder), VaeConfig().name, Normalization(**told) if told else None)
        vae = name if name in shipped_names() else str(folder / "vae")
        return Origin(pipe, pipeline_hash(folder), vae, normalization_of(pipe.vae))
    except UserError as error:
        raise UserError(f"training.init_from {name}: {error}") from error


def _fetch(name: str) -> Path:
    """Return the folder of a pipeline of the hub, which is downloaded unless it was before."""
    expected = f"expected RUN, a checkpoint, a pipeline folder, a SiT file, a hub name, or {', '.join(shipped_names())}"
    if not _is_hub_name(name):
        there = Path(name).expanduser().exists()
        raise UserError(f"{'it is none of these' if there else 'there is no such file or folder'}; {expected}")
    try:
        if not _is_fetched(name):
            model_info(name, timeout=10)  # without a network this says so; the download would retry for long
        return Path(snapshot_download(name, local_files_only=_is_fetched(name)))
    except Exception as error:  # file, hub and http errors are those of many libraries
        detail = " ".join(str(error).split())[:120]
        raise UserError(f"it is neither here nor can it be fetched from the hub ({detail}); {expected}") from error


def _is_hub_name(name: str) -> bool:
    of_file = Path(name).exists() or Path(name).suffix in (".pt", ".pth", ".safetensors")
    return not of_file and re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) is not None


def _is_fetched(name: str) -> bool:
    """Whether a pipeline of the hub has been downloaded, with the weights of all its parts."""
    file = try_to_load_from_cache(name, "model_index.json") if _is_hub_name(name) else None
    if not isinstance(file, str):
        return False
    index = read_json(Path(file), "pipeline")
    parts = [part for part in ("transformer", "vae") if index.get(part, [None])[0]]
    return all(any(Path(file).parent.glob(f"{part}/*.safetensors")) for part in parts)


def missing(config: Config) -> dict[str, str]:
    """Return what a new run begins with, if it is neither here nor fetched yet, with how to get it."""
    name, digest = config.training.init_from, config.training.init_digest
    if name is None or digest or Path(name).expanduser().exists() or find_pipeline(name) or _is_fetched(name):
        return {}
    return {name: "weights to begin with: train or download them; those on the hub are downloaded on first use"}


def begin_from(config: Config) -> Config:
    """Return the configuration of a new run with what its `training.init_from` settles: the model, and the hash.

    Sizes and switches of the model come from there, unless they are given. Raises `UserError` for what does not agree.
    """
    settings = config.training
    if settings.init_from is None:
        return config
    origin = _open(config)
    found, flow = origin.pipe.transformer.config, origin.pipe.flow
    given = config.model.model_dump(exclude_unset=True, exclude_none=True)

    # What cannot differ, as no weight would fit, or would mean the same.
    preset = PRESETS[choose("model.preset", given["preset"], PRESETS)] if "preset" in given else {}
    wanted = preset | given
    pairs = [(f"model.{key}", wanted.get(key, found[key]), found[key]) for key in _SIZES]
    pairs += [("vae.latent_channels", config.latent_shape[0], found["in_channels"])]
    pairs += [(f"flow.{key}", getattr(config.flow, key), getattr(flow, key)) for key in ("path", "prediction")]
    pairs += [("training.init_digest", settings.init_digest or origin.digest, origin.digest)]
    for key, ours, theirs in pairs:
        if ours != theirs:
            advice = f"set {key} to {theirs}, or choose other weights"
            raise UserError(f"{key} = {ours}, but training.init_from {settings.init_from} has {theirs}; {advice}")

    # Switches are those of the weights, whose rotary positions are stretched or squeezed onto another grid.
    switches, (built, grid) = dict(found["backbone_kwargs"] or {}), _grids(config, origin)
    if built != grid and "rope_grid" in BACKBONES.options(found["backbone"]):
        switches.setdefault("rope_grid", built[0])
    defaults = {key: option.default for key, option in BACKBONES.options(found["backbone"]).items()}
    before, asked = defaults | switches, given.get("backbone_kwargs", {})
    switches |= asked
    kept = {key: found[key] for key in (*_SIZES, "class_dropout_prob")}
    changed = {
        "model": validate(ModelConfig, kept | given | {"backbone_kwargs": switches}, "configuration"),
        "training": settings.model_copy(update={"init_digest": origin.digest}),
    }
    config = config.model_copy(update=changed)
    _opened[origin.digest] = origin
    check_values(config)
    if not missing_autoencoder(config.vae.name):
        _check_scaling(config, origin)
    fit(config, origin, [None] * config.num_classes)
    if other := [key for key, value in asked.items() if before[key] != value]:
        told = ", ".join(f"{key} = {asked[key]} (there {before[key]})" for key in other)
        effect = "step 0 may draw other images than these weights, and first values of loaded weights have no effect"
        processes().print(f"note: model.backbone_kwargs: {told}: {effect}")
    return config


def initial_weights(config: Config) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
    """Return the weights that a new run begins with, None for its own, and what a checkpoint records of their origin.

    Prints which classes they know. Raises `UserError` where classes or autoencoder are not as configured.
    """
    if config.training.init_from is None:
        return None, {}
    names, origin = find_class_names(config), origin_of(config)
    if len(names) != config.num_classes:
        found = f"data.num_classes = {config.num_classes}: the data set has {len(names)} ({listed(names)})"
        raise UserError(f"{found}; set data.num_classes to {len(names)}")
    _check_scaling(config, origin)
    processes().print(describe(config, origin, names)[0])
    attribution = origin.pipe.config.get("attribution")
    return fit(config, origin, class_rows(origin, names)), {"attribution": attribution} if attribution else {}


def describe(config: Config, origin: Origin, names: list[str] | None) -> list[str]:
    """Return a line on what a run begins with, and the table of its classes where these are known."""
    begins = f"begins:   with {config.training.init_from} (SHA-256 {origin.digest[:12]})"
    if names is None:
        return [f"{begins}; classes unknown until the data are here"]
    rows, start = class_rows(origin, names), "null" if origin.pipe.transformer.has_null_label else "mean"
    new = [name for name, row in zip(names, rows, strict=True) if row is None]
    told = f"; new: {listed(new)} (from the {start} row)" if new else ""
    table = [f"row {start if row is None else row} -> {i} {names[i]}" for i, row in enumerate(rows)]
    if kept := [i for i, row in enumerate(rows) if row == i][_MOST_ROWS:]:
        table = [line for i, line in enumerate(table) if i not in kept]
        table.append(f"... and {len(kept)} more that keep their row")
    return [f"{begins}; {len(names) - len(new)} of {len(names)} classes found by name{told}", *table]


def class_rows(origin: Origin, names: list[str]) -> list[int | None]:
    """Return for each class its row in the label table of ``origin``, None for one that is not there.

    Classes are found by name, as in sampling; where there are no names, by id if the classes are numbered alike.
    """
    count, known = origin.pipe.transformer.config.num_classes, names_by_id(origin.pipe.config.id2label)
    if names == [known.get(i) if known else str(i) for i in range(count)]:
        return list(range(count))
    found = [ids_called(name, known) for name in names]
    return [min(ids) if len(ids) == 1 else None for ids in found]


def fit(config: Config, origin: Origin, rows: list[int | None]) -> dict[str, Tensor]:
    """Return the weights of ``origin`` as the model of ``config`` takes them; what it lacks of its own is not there.

    rows: of the label table, see `class_rows`; None is the null row, or the mean of all where there is none.
    Raises `UserError` where weights would start anew, other than at zero, or be left out without `init_partial`.
    """
    with torch.device("meta"):
        model = build_model(config)
    old = origin.pipe.transformer
    ours, theirs = model.state_dict(), old.state_dict()
    fixed, fixed_there = ({name for name, _ in one.named_buffers()} for one in (model, old))

    # The label table, the head without the half that learn_sigma discards, and positions that are learned.
    table = theirs[_LABELS]
    start = table[old.null_label] if old.has_null_label else table.mean(0)
    known = [start if row is None else table[row] for row in rows]
    theirs[_LABELS] = torch.stack(known + [start] * model.has_null_label)
    for name in _HEAD:
        theirs[name] = fit_channels(theirs[name], theirs[name].new_zeros(ours[name].shape), old.config.patch_size**2)
    for name in ours.keys() & theirs.keys() - fixed - fixed_there:
        if name.endswith("pos_embed") and ours[name].shape != theirs[name].shape:
            theirs[name] = resample_positions(theirs[name], *_grids(config, origin))

    # What is fixed, and does not fit, is computed for the new size; a weight that starts at zero changes nothing.
    taken = {
        name: theirs[name]
        for name, value in ours.items()
        if name in theirs and theirs[name].shape == value.shape and (name in fixed) == (name in fixed_there)
    }
    anew = [name for name in ours if name not in taken and name not in fixed]
    left = [name for name in theirs if name not in taken and name not in fixed_there and theirs[name].any()]
    if anew:
        start = build_model(config).state_dict()
        anew = [name for name in anew if start[name].any()]
    if (anew or left) and not config.training.init_partial:
        parts = [
            f"{listed(names, 3)} would {what}" for what, names in (("start anew", anew), ("be left out", left)) if names
        ]
        advice = "set training.init_partial to true, or omit these switches"
        switches = f"with other model.backbone_kwargs than those of training.init_from {config.training.init_from}"
        raise UserError(f"{switches}, {' and '.join(parts)}; {advice}")
    return taken


def origin_of(config: Config) -> Origin:
    """Return what a run begins with; what `begin_from` has opened just now is not read again."""
    return _opened.pop(config.training.init_digest or "", None) or _open(config)


def _open(config: Config) -> Origin:
    assert config.training.init_from is not None
    _opened.clear()
    return open_origin(config.training.init_from, config.training.init_weights, config.model.num_attention_heads)


def _grids(config: Config, origin: Origin) -> tuple[Grid, Grid]:
    """Return the grids of patches of ``origin`` and of the run."""
    found = origin.pipe.transformer.config
    return (
        patch_grid("latent size", to_2tuple(found.sample_size), found.patch_size),
        patch_grid("latent size", config.latent_shape[1:], found.patch_size),
    )


def _check_scaling(config: Config, origin: Origin) -> None:
    """Raise `UserError` unless the latents of the run are scaled as those that the weights know."""
    theirs, weights = origin.normalization, config.training.init_from
    if theirs is not None and config.vae.normalize == "measured":
        advice = "set vae.name to the autoencoder of these weights, e.g. RUN/pipeline, and vae.normalize to config"
        raise UserError(f"vae.normalize = measured, but training.init_from {weights} has its own statistics; {advice}")
    ours = normalization_of(load_autoencoder(config.vae.name)) if config.vae.normalize == "config" else Normalization()
    if theirs is not None and not ours.agrees(theirs):
        found = f"latents of scale and shift {short(tuple(ours))}"
        other = f"{found}, but training.init_from {weights} {short(tuple(theirs))}"
        raise UserError(f"vae.name {config.vae.name} has {other}; set vae.name to the autoencoder of these weights")
