"""Every setting of a run with its type, range and default: the one place where a default lives.

A configuration is a YAML file of the sections below. Each key is also an option of the command line
(``--section.key value``). Unknown keys, wrong types and values out of range are errors of one line.
"""

import math
import os
from copy import deepcopy
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import Field, field_validator, model_validator

from vit5gen.section import (
    BatchSize,
    Classes,
    Count,
    Decay,
    Exif,
    Float,
    Fraction,
    Layers,
    Length,
    Name,
    Natural,
    NonNegative,
    Plug,
    PlugOptions,
    Positive,
    Ratio,
    Rules,
    Section,
    Several,
    Side,
    Small,
    StepCount,
    Tiles,
    Unit,
    UserPath,
    Width,
    validate,
)
from vit5gen.system.errors import UserError, nearest, short

ASSUMED_CLASSES, ASSUMED_CHANNELS, _ASSUMED_DOWNSAMPLE = 1000, 4, 8
_SEED = 0
_UNSHIFTED = 4096  # values of a latent: of as many `flow.time_shift: auto` is 1
_HELD_OUT = "test"  # split
STRENGTH = 0.8  # of image-to-image, as in diffusers
_MOST_VALUES = 10**5  # of one file


class ModelConfig(Section):
    """The transformer. Latent size, channels and classes follow from the data."""

    backbone: str = Field("vit5", description="registered backbone: vit5, sit or your own")
    backbone_kwargs: PlugOptions = Field({}, description="options of the backbone, e.g. {gamma_init: 1}")
    preset: str | None = Field(None, description="S/2 ... XL/8: sets the four sizes below")
    hidden_size: Width | None = Field(None, description="width of the tokens; default: the preset's")
    num_layers: Layers | None = Field(None, description="number of blocks; default: the preset's")
    num_attention_heads: Width | None = Field(None, description="attention heads per block; default: the preset's")
    patch_size: Side | None = Field(None, description="side of a patch in latent pixels; default: the preset's")
    mlp_ratio: Ratio = Field(4.0, description="hidden width of the MLP, as a multiple of hidden_size")
    class_dropout_prob: Unit = Field(0.1, description="probability of replacing a label by the null label")
    learn_sigma: bool = Field(False, description="double the output channels, discard the second half")

    @property
    def sized(self) -> bool:
        """Whether all sizes are given, by their preset or one by one."""
        sizes = (self.hidden_size, self.num_layers, self.num_attention_heads, self.patch_size)
        return self.preset is not None or None not in sizes


class FlowConfig(Section):
    """The path from noise to data, what the network predicts and how training draws the time."""

    path: Literal["linear", "gvp", "vp"] = Field("linear", description="interpolant between noise and data")
    prediction: Literal["velocity", "score", "noise", "data"] = Field(
        "velocity", description="what the network predicts"
    )
    loss_weight: Literal["velocity", "likelihood"] | None = Field(None, description="weight of the loss over time")
    time_distribution: Literal["uniform", "logit_normal"] = Field("uniform", description="how training draws t")
    logit_mean: Float = Field(0.0, description="mean of logit(t) for logit_normal")
    logit_std: Positive = Field(1.0, description="standard deviation of logit(t) for logit_normal")
    time_shift: Positive | Literal["auto"] = Field(
        1.0, description="shift of t towards noise; 1 = none, auto: sqrt(values of a latent / 4096)"
    )
    stratified: bool = Field(False, description="draw one t from each of global_batch_size equal intervals")
    direction_weight: NonNegative = Field(0.0, description="weight of the cosine loss of the velocity's direction")


class VaeConfig(Section):
    """The autoencoder between images and latents."""

    name: UserPath = Field(
        "stabilityai/sd-vae-ft-ema", description="hub name, folder, or one that ships: emoji, emoji-64, pixels"
    )
    latent_channels: Width | None = Field(None, description="latent channels; default: found in the autoencoder")
    downsample: Side | None = Field(None, description="image side over latent side; default: found in the autoencoder")
    normalize: Literal["config", "measured", "none"] = Field(
        "config", description="latents: as the autoencoder says, to mean 0 and deviation 1 per channel, or not at all"
    )
    batch_size: BatchSize = Field(16, description="images encoded at once, per process")

    @model_validator(mode="before")
    @classmethod
    def _known_sizes(cls, values: Any) -> Any:
        name = cls.model_fields["name"].default
        if not isinstance(values, dict) or values.get("name", name) != name:
            return values
        sizes = {"latent_channels": ASSUMED_CHANNELS, "downsample": _ASSUMED_DOWNSAMPLE}
        return sizes | {key: value for key, value in values.items() if key not in sizes or value is not None}


class DataConfig(Section):
    """Labelled images, or latents that were encoded from them."""

    source: str = Field("folder", description="kind of data set: emoji, fashion-mnist, folder, huggingface or your own")
    source_kwargs: PlugOptions = Field({}, description="options of a data source of your own")
    path: UserPath | None = Field(None, description="folder of class folders, idx files, data set name, or URL")
    split: str = Field("train", description="split to train on")
    resolution: Side = Field(256, description="side of the square images, in pixels")
    classes: list[Name] | None = Field(None, description="use only these classes; default: all")
    num_classes: Classes | None = Field(
        None, description="number of classes; default: found in the data when a run begins"
    )
    held_out: Fraction | None = Field(
        None, description="part of each class that is held out, by hash, where the data set has no split for it"
    )
    horizontal_flip: bool = Field(True, description="mirror half of the images at random")
    exif: Exif = Field("apply", description="whether to rotate photos upright by their EXIF orientation")
    rules: Rules = Field(2, description="version of the rules for which files are images; a resumed run keeps its own")
    on_broken_image: Literal["fail", "skip"] = Field("fail", description="what to do with an undecodable file")
    latents: UserPath | None = Field(
        None, description="folder written by `vit5gen encode`, or its URL; default: encode once to a cache"
    )
    from_images: bool = Field(False, description="encode every batch instead of reading latents")
    shard_dtype: Literal["float16", "bfloat16", "float32"] = Field(
        "float16", description="number type of the latent shards"
    )
    num_workers: Small = Field(0, description="processes that read data; 0 = the trainer itself reads")
    image_column: str | None = Field(None, description="image column of a Hugging Face data set; default: the only one")
    label_column: str | None = Field(None, description="label column of a Hugging Face data set; default: the only one")


class LoraConfig(Section):
    """Low-rank adapters (LoRA, arXiv 2106.09685). A pattern is matched as in ``training.trainable``."""

    rank: Width = Field(8, description="rank of what is added to each weight")
    alpha: Positive | None = Field(None, description="what is added is scaled by alpha / rank; default: rank")
    dropout: Decay = Field(0.0, description="dropout of what enters an adapter")
    targets: list[str] = Field(["backbone"], min_length=1, description="linear layers that get an adapter")
    full: list[str] = Field(["label_embed"], description="parameters that are trained in full beside the adapters")

    @property
    def sizes(self) -> dict[str, Any]:
        """Rank and alpha, as peft calls them."""
        return {"r": self.rank, "lora_alpha": self.alpha or self.rank}


_OF_ORIGIN = ("init_weights", "init_partial")  # what only an origin gives a meaning


class TrainingConfig(Section):
    """Optimisation, precision, checkpoints and logs."""

    num_steps: Natural = Field(400_000, description="total number of optimizer steps")
    global_batch_size: BatchSize = Field(256, description="samples per step, over all processes")
    micro_batch_size: BatchSize | None = Field(None, description="samples per forward pass, per process; default: all")
    seed: Natural = Field(_SEED, description="seed of initialisation, data order and all random draws")
    precision: Literal["auto", "fp64", "fp32", "tf32", "bf16"] = Field(
        "tf32", description="precision of matrix products; auto: bf16 where the machine is fast at it"
    )
    init_from: UserPath | None = Field(
        None, description="weights to begin with: of a run, checkpoint, pipeline, SiT file or shipped generator"
    )
    init_weights: str | None = Field(None, description="those of a run: ema_<decay> or model; default: its first EMA")
    init_partial: bool = Field(False, description="start anew what other switches than those of init_from need")
    init_digest: str | None = Field(None, description="SHA-256 of init_from; filled in when a run begins")
    objectives: dict[str, PlugOptions] = Field(
        {"flow": {}}, min_length=1, description="objectives to minimise, by name, each with its weight and options"
    )
    trainable: Literal["all", "lora"] | list[str] = Field(
        "all", description="what is trained: all, lora (adapters), or patterns of parameters, e.g. [label_embed, head]"
    )
    lora: LoraConfig | None = Field(
        None, description="options of trainable: lora, e.g. {rank: 16, targets: ['*.attn']}"
    )
    optimizer: str = Field("adamw", description="name of the optimizer")
    learning_rate: Positive = Field(1e-4, description="peak learning rate")
    adam_betas: list[Decay] = Field([0.9, 0.999], min_length=2, max_length=2, description="decay rates of AdamW")
    weight_decay: NonNegative = Field(0.0, description="decoupled weight decay")
    schedule: Literal["constant", "cosine"] = Field("constant", description="learning rate after the warm-up")
    warmup_steps: Natural = Field(0, description="steps of linear warm-up")
    max_grad_norm: Positive | None = Field(None, description="clip the gradient to this norm; default: off")
    ema_decays: list[Decay] = Field(
        [0.9999], min_length=1, description="decays of the weight averages (EMA); the first is used to draw images"
    )
    ema_lengths: list[Length] = Field(
        [], description="lengths of averages by power functions, as parts of the training, e.g. [0.05, 0.1]"
    )
    ema_snapshot_every: Count | None = Field(
        None, description="steps between snapshots of these averages; default: a 64th of num_steps"
    )
    compile: bool | Literal["auto"] = Field(
        False, description="torch.compile every block; auto: where the machine computes in bf16 and has a compiler"
    )
    gradient_checkpointing: bool = Field(False, description="recompute activations in the backward pass")
    checkpoint_every: Count | None = Field(
        None, description="steps between checkpoints; default: a quarter of num_steps, at most 10000"
    )
    checkpoint_minutes: Positive | None = Field(10.0, description="minutes between additional checkpoints; null = off")
    keep_last: Count = Field(2, description="number of newest checkpoints to keep")
    keep_every: Count | None = Field(None, description="also keep checkpoints at multiples of this step")
    log_every: Count = Field(100, description="steps between lines of log.jsonl")
    trackers: list[Literal["tensorboard", "wandb"]] = Field(["tensorboard"], description="experiment trackers")
    max_nonfinite_steps: Count = Field(10, description="stop after this many non-finite steps in a row")

    @property
    def averages(self) -> tuple[list[float], list[float]]:
        """The decays and the lengths of the averages that training keeps."""
        return self.ema_decays, self.ema_lengths

    @property
    def origin(self) -> str | None:
        """What a run begins with and its hash, as the card names it."""
        return None if self.init_from is None else f"{self.init_from}, SHA-256 {self.init_digest}"

    @model_validator(mode="before")
    @classmethod
    def _what_goes_together(cls, values: Any) -> Any:
        if not isinstance(values, dict):
            return values
        trainable = values.get("trainable", "all")
        if trainable not in ("all", "lora") and not (isinstance(trainable, list) and trainable):
            raise ValueError(f"trainable = {short(trainable)}; expected all, lora or a list of patterns of parameters")
        if values.get("lora") is not None and trainable != "lora":
            raise ValueError(f"lora is given, but trainable = {short(trainable)}; set trainable to lora, or omit lora")
        if values.get("init_from") is None:
            if idle := [key for key in _OF_ORIGIN if values.get(key) not in (None, False)]:
                raise ValueError(f"{idle[0]} is given, but no init_from; set init_from, or omit {idle[0]}")
            values = {key: value for key, value in values.items() if key != "init_digest"}
        return {**values, "lora": values.get("lora") or {}} if trainable == "lora" else values


class SamplingConfig(Section):
    """How images are drawn: by this command or, in a configuration, by training's evaluations."""

    sampler: str = Field("ode-heun", description="ode-{euler,heun,midpoint,rk4,ab2,dopri5} or sde-{euler,heun}")
    num_inference_steps: StepCount = Field(50, description="solver steps")
    guidance_scale: NonNegative = Field(1.0, description="scale of classifier-free guidance; 1 = off, one forward pass")
    guidance_interval: list[Unit] = Field(
        [0.0, 1.0], min_length=2, max_length=2, description="guide only between these times; 0 = noise, 1 = data"
    )
    guidance_channels: Width | None = Field(None, description="number of leading channels to guide; default: all")

    @field_validator("guidance_interval")
    @classmethod
    def _ordered(cls, interval: list[float]) -> list[float]:
        if interval[0] > interval[1]:
            raise ValueError("set it to the start, then the end, e.g. [0.1, 0.9]")
        return interval

    def idle_limit(self) -> str | None:
        """Say which limit of guidance is set although the scale is 1, None if none is."""
        for key in ("guidance_interval", "guidance_channels"):
            if self.guidance_scale == 1 and getattr(self, key) != type(self).model_fields[key].default:
                return f"{key}: has no effect at guidance_scale = 1 (off); set that to e.g. 1.5, or omit {key}"
        return None


class DrawConfig(SamplingConfig):
    """How a command draws images of a run or a pipeline folder."""

    classes: list[str] | None = Field(
        None,
        description="names or ids of classes, mixtures such as cat=0.5,dog=0.5, or none (no class); default: all",
        json_schema_extra={"option": "--class"},
    )
    labels: Literal["balanced", "random"] = Field("balanced", description="how classes are assigned, fixed by the seed")
    precision: Literal["fp32", "tf32", "bf16"] = Field("fp32", description="precision of the network; the rest is fp32")
    compile: bool = Field(False, description="torch.compile the network")
    guide: UserPath | None = Field(None, description="run or pipeline folder of the weaker model for autoguidance")
    autoguidance_scale: Float = Field(1.0, description="scale of autoguidance; 1 = off")

    @model_validator(mode="after")
    def _guided(self) -> "DrawConfig":
        if self.guide is not None and self.autoguidance_scale == 1:
            raise ValueError("guide: has no effect at autoguidance_scale = 1 (off); set that to e.g. 2, or omit guide")
        if self.autoguidance_scale == 1 and (fault := self.idle_limit()):
            raise ValueError(fault)
        return self


class ReadConfig(Section):
    """How images are read that are not stored as ADM stores them."""

    key: str | None = Field(None, description="array of an npz that holds the images; default: arr_0")
    range: list[int] | None = Field(None, description="range of the numbers of an npz of floats: 0 1, or -1 1")
    resize: Side | None = Field(None, description="resize square images to this side (Pillow's bicubic, antialiased)")
    crop: Side | None = Field(None, description="scale the short side to this and cut the centre, as for training")
    shuffle: bool = Field(False, description="score the samples in another order, the same each time")

    @model_validator(mode="after")
    def _sound(self) -> "ReadConfig":
        if self.range not in (None, [0, 1], [-1, 1]):
            raise ValueError(f"range: {self.range}; expected 0 1, or -1 1")
        if self.resize is not None and self.crop is not None:
            raise ValueError("resize: crop resizes already; give one of the two")
        return self


class EvaluationConfig(Section):
    """Frechet distance and sample grids during training."""

    every: Count | None = Field(None, description="steps between evaluations; default: first and last step only")
    num_images: Several = Field(1000, description="images generated for the distance, at most as many as are held out")
    num_reference: Several = Field(10_000, description="training images to compare generated images with")
    held_out_split: str = Field(_HELD_OUT, description="split of real images whose distance is the floor")
    batch_size: BatchSize = Field(100, description="images generated at once, per process")
    extractor: Plug = Field("effnet-lite0", description="feature network, or with options {NAME: {option: value}}")
    seed: Natural = Field(_SEED, description="seed of the generated images")
    images_per_class: Tiles = Field(8, description="columns of samples.png")
    grid_classes: Tiles = Field(10, description="rows of samples.png, one for each of the first classes")


class Config(Section):
    """One training run."""

    model: ModelConfig = ModelConfig()
    data: DataConfig = DataConfig()
    vae: VaeConfig = VaeConfig()
    flow: FlowConfig = FlowConfig()
    training: TrainingConfig = TrainingConfig()
    sampling: SamplingConfig = SamplingConfig()
    evaluation: EvaluationConfig = EvaluationConfig()

    @model_validator(mode="after")
    def _sizes(self) -> "Config":
        if self.training.init_from is None and not self.model.sized:
            sizes = "hidden_size, num_layers, num_attention_heads and patch_size in model, or training.init_from"
            raise ValueError(f"sizes of the model are missing; set model.preset, e.g. to B/2, or {sizes}")
        return self

    @property
    def num_classes(self) -> int:
        """The number of classes; before a run has found it, ImageNet's, which costs of no data assume."""
        return self.data.num_classes or ASSUMED_CLASSES

    @property
    def latent_shape(self) -> tuple[int, int, int]:
        """(C, h, w) of the run's latents; before a run has found them, as those of Stable Diffusion's autoencoder.

        Raises `UserError` when the resolution does not fit the autoencoder.
        """
        factor = self.vae.downsample or _ASSUMED_DOWNSAMPLE
        side, rest = divmod(self.data.resolution, factor)
        if rest:
            raise UserError(
                f"data.resolution = {self.data.resolution} is not a multiple of vae.downsample = "
                f"{factor}; choose e.g. {max(side, 1) * factor}"
            )
        return self.vae.latent_channels or ASSUMED_CHANNELS, side, side

    @property
    def time_shift(self) -> float:
        """The shift of t towards noise; ``auto`` grows with the latents as in RAE (arXiv 2510.11690, section 4)."""
        shift = self.flow.time_shift
        return math.sqrt(math.prod(self.latent_shape) / _UNSHIFTED) if shift == "auto" else shift


class AutoencoderTraining(Section):
    """How a small autoencoder is trained; has a file of its own, e.g. configs/vae/emoji.yaml."""

    data: DataConfig
    held_out_split: str = Field(_HELD_OUT, description="split of the data used only for the final score")
    block_out_channels: list[Width] = Field([24, 48, 96], min_length=1, description="width at each resolution")
    layers_per_block: Layers = Field(1, description="residual blocks at each resolution of the encoder")
    latent_channels: Width = Field(ASSUMED_CHANNELS, description="channels of a latent")
    norm_num_groups: Width = Field(8, description="groups of a group norm; must divide every width")
    num_steps: Count = Field(6000, description="optimizer steps")
    batch_size: BatchSize = Field(32, description="images per step")
    learning_rate: Positive = Field(2e-3, description="peak learning rate of AdamW; decays to zero as a cosine")
    l1_weight: NonNegative = Field(0.05, description="weight of the absolute error; squared error has weight 1")
    kl_weight: NonNegative = Field(1e-3, description="weight of the KL divergence from the unit normal")
    max_shift: Small = Field(2, description="shift training images at random by up to this many pixels")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="precision of convolutions")
    seed: Natural = Field(_SEED, description="seed of initialisation, order, augmentation and latent noise")


class _Loader(yaml.SafeLoader):
    """Safe YAML in which a key that is given twice is an error; PyYAML would take the last."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key in (key for key, _ in node.value if isinstance(key, yaml.ScalarNode)):
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"{key.value} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def parse_yaml(text: str) -> Any:
    """Return the value of YAML text; raise `yaml.YAMLError` for invalid text, or text too large to be settings."""
    try:
        value = yaml.load(text, _Loader)  # noqa: S506 (a SafeLoader)
    except yaml.YAMLError:
        raise
    except Exception as error:  # the 13th month, 5,000 brackets: what PyYAML's constructors raise has no end
        raise yaml.YAMLError(str(error)) from error
    # A few lines of aliases can stand for more values than any memory holds, or for one that holds itself.
    inside, count = [value], 0
    while inside:
        entry, count = inside.pop(), count + 1
        if count > _MOST_VALUES:
            raise yaml.YAMLError(f"more than {_MOST_VALUES:,} values, which aliases such as *name may repeat")
        if isinstance(entry, dict | list | tuple | set):
            inside += [*entry, *entry.values()] if isinstance(entry, dict) else entry
    return value


def find_config(path: str | Path) -> Path:
    """Return ``path``, or the configuration of that name that ships with the package: ``quickstart``, ``vae/emoji``."""
    return Path(path) if Path(path).exists() else shipped_configs().get(str(path), Path(path))


def shipped_configs() -> dict[str, Path]:
    """Return the configurations that ship with the package, by name."""
    # An installed package holds them; in a clone they stand beside it. Beside an installed one stand other packages.
    folder = Path(__file__).parent / "configs"
    folder = folder if folder.is_dir() else Path(__file__).parents[1] / "configs"
    return {file.relative_to(folder).with_suffix("").as_posix(): file for file in folder.rglob("*.yaml")}


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping (see `find_config`); `UserError` when the file is missing, unreadable or not a mapping."""
    try:
        data = parse_yaml(find_config(path).read_text(encoding="utf-8"))
    except OSError as error:
        expected = f"expected a YAML file, or one that ships, e.g. quickstart.{nearest(str(path), shipped_configs())}"
        raise UserError(f"configuration {path}: {error.strerror}; {expected}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        detail = " ".join(str(error).split())
        raise UserError(f"configuration {path} is not valid YAML: {detail}; fix the file") from error
    if not isinstance(data, dict):
        found = type(data).__name__
        raise UserError(f"configuration {path}: expected sections such as 'model:' at the top, not {found}; fix it")
    return data


def load_config(path: str | Path, overrides: dict[str, Any] | None = None) -> Config:
    """Read a run's configuration from YAML, replace single keys (``{"training.seed": 1}``) and check every value.

    Keys inside a key can be replaced too: ``{"model.backbone_kwargs.gamma_init": 1}``.
    """
    data = read_yaml(path)
    for dotted, value in (overrides or {}).items():
        section, *inner = dotted.split(".")
        if inner and not isinstance(data.setdefault(section, {}), dict):
            break  # what else it is, the check below tells
        keys, key = data, section
        for inner_key in inner:
            keys, key = keys.setdefault(key, {}), inner_key
            if not isinstance(keys, dict):
                raise UserError(f"configuration {path}: unknown key {dotted!r}: {keys!r} has no {key!r}; omit it")
        keys[key] = deepcopy(value)
    return validate(Config, data, f"configuration {path}")


# What keys meant that a run, or latents, of an earlier version have not recorded: it keeps what it began with.
DEFAULTS_BEFORE: dict[str, Any] = {
    "data.exif": "ignore",
    "data.num_classes": 1000,
    "data.rules": 1,
    "training.checkpoint_every": 10_000,
    "training.checkpoint_minutes": None,
    "training.ema_snapshot_every": None,
}
_FOUND = ("vae.latent_channels", "vae.downsample")  # and recorded when a run begins


def recorded_values(data: dict[str, Any]) -> dict[str, Any]:
    """Return a recorded configuration in which every key that it lacks has the default of its time."""
    values = dict(data)
    for name, section in Config.model_fields.items():
        defaults = {
            key: DEFAULTS_BEFORE.get(f"{name}.{key}", field.default)
            for key, field in section.annotation.model_fields.items()  # type: ignore[union-attr]
        }
        if isinstance(found := data.get(name, {}), dict):  # what else it is, the check of all values tells
            paths = {key: os.path.expanduser(text) for key, text in found.items() if isinstance(text, str)}
            values[name] = defaults | found | paths
    training = values["training"]
    if isinstance(training, dict) and training["init_from"] is None:  # then of no effect, and not refused at first
        training |= {key: TrainingConfig.model_fields[key].default for key in _OF_ORIGIN}
    return values


def load_recorded(path: str | Path) -> Config:
    """Read the ``config.yaml`` of a run or a checkpoint, of an earlier version too."""
    return validate(Config, recorded_values(read_yaml(path)), f"configuration {path}")


def as_recorded(config: Config, data: dict[str, Any]) -> Config:
    """Return ``config`` with what ``data``, a recorded configuration, has for keys that are found, or new by default.

    A key that the user gave stays as it is.
    """
    recorded, given = recorded_values(data), config.model_dump(exclude_unset=True)
    for name, key in (dotted.split(".") for dotted in (*DEFAULTS_BEFORE, *_FOUND)):
        if key in type(getattr(config, name)).model_fields:
            given.setdefault(name, {}).setdefault(key, recorded[name][key])
    return validate(Config, given, "recorded configuration")
