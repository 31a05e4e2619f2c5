"""What a configuration stands for: the model and the flow, and whether its values fit together."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from vit5gen.config import Config
from vit5gen.data.images import make_source
from vit5gen.evaluation.features import EXTRACTORS
from vit5gen.flow import Flow
from vit5gen.generation.scheduler import SAMPLERS, SiTScheduler
from vit5gen.models import SiTTransformer2DModel
from vit5gen.registry import name_and_options
from vit5gen.system.distributed import processes
from vit5gen.system.errors import UserError, choose, short
from vit5gen.system.precision import PRECISIONS, find_compiler_fault, resolve
from vit5gen.training.objectives import Objectives, build_objectives, needing_image
from vit5gen.training.optimizers import OPTIMIZERS, build_optimizer
from vit5gen.training.process import batch_sizes
from vit5gen.training.trainable import choose_trainable


def check_values(config: Config) -> None:
    """Raise `UserError` for wrong values that the types of the configuration cannot catch."""
    batch_sizes(config.training, processes().num_processes)
    (channels, _, _), sampling, settings = config.latent_shape, config.sampling, config.training
    choose("training.optimizer", settings.optimizer, OPTIMIZERS.names())
    OPTIMIZERS.check(settings.optimizer, settings.optimizer_kwargs, "training.optimizer_kwargs")
    if config.training.init_from is None or config.training.init_digest is not None:  # else the model is not known yet
        with torch.device("meta"):
            model = build_model(config)
            choose_trainable(model, config.training)
            build_objectives(config.training, model, build_flow(config))
            build_optimizer(model, settings)
        if model.config.patch_size == 1 and (width := model.config.hidden_size) < channels:
            found = f"model.hidden_size = {width} is below the {channels} channels of a latent"
            effect = f"at patch size 1 so narrow a model learns poorly (arXiv 2510.11690); {channels} or more is better"
            processes().print(f"note: {found}: {effect}")
    choose("sampling.sampler", sampling.sampler, SAMPLERS.names())
    if fault := sampling.idle_limit():  # not refused: runs of earlier versions may have it
        processes().print(f"note: sampling.{fault}")
    if (asked := sampling.guidance_channels or 0) > channels:
        raise UserError(f"sampling.guidance_channels = {asked}; set it to {channels} or less (vae.latent_channels)")
    if sampling.guidance_scale != 1 and config.model.class_dropout_prob == 0:
        untrained = "needs a null label, but with model.class_dropout_prob = 0 none is trained"
        advice = "set model.class_dropout_prob to e.g. 0.1, or sampling.guidance_scale to 1"
        raise UserError(f"sampling.guidance_scale = {sampling.guidance_scale}: {untrained}; {advice}")
    if config.training.ema_snapshot_every is not None and not config.training.ema_lengths:
        advice = "set that to e.g. [0.05, 0.1], or omit ema_snapshot_every"
        raise UserError(f"training.ema_snapshot_every: has no effect without training.ema_lengths; {advice}")
    EXTRACTORS.check(*name_and_options(config.evaluation.extractor), "evaluation.extractor")
    if (wanted := needing_image(config.training)) and config.data.source_kwargs.get("streaming"):
        found = f"training.objectives.{next(iter(wanted))}: needs images in any order"
        raise UserError(f"{found}, but data.source_kwargs: streaming reads them in order; set it to false")
    source = make_source(config.data)
    if source.splits is not None:
        choose("data.split", config.data.split, source.splits)


def settle_auto(config: Config, recorded: dict[str, Any]) -> Config:
    """Replace `auto` by what the ``recorded`` configuration of a checkpoint has, else by what suits the machine.

    Prints a note where that precision is slow here, or `auto` would compile and there is no compiler. Raises
    `UserError` where blocks must be compiled and there is none, and for a new run that would learn nothing.
    """
    if not recorded:
        _check_learning(config)
    settings, before, device = config.training, recorded.get("training", {}), processes().device
    precision: str = settings.precision
    if precision == "auto":
        precision = before.get("precision") or resolve(precision, device)
    compiled: Any = settings.compile
    if compiled == "auto":
        compiled = before.get("compile", compiled if precision == "bf16" else False)
    if compiled and (fault := find_compiler_fault(device)):
        found = f"training.compile: no compiler for {device.type} on this machine: {fault}"
        if compiled is True:
            advice = "install one, or set training.compile to false (with --accept-changes if a run began with true)"
            raise UserError(f"{found}; {advice}")
        processes().print(f"note: {found}; training is slower without")
        compiled = False
    PRECISIONS[precision].warn_if_slow(device)
    values = {"precision": precision, "compile": bool(compiled)}
    return config.model_copy(update={"training": settings.model_copy(update=values)})


def _check_learning(config: Config) -> None:
    """Raise `UserError` for a new run of which a part is trained behind an output layer that stays at zero."""
    if config.training.trainable == "all" or config.training.init_from is not None:
        return
    with torch.device("meta"):
        model = build_model(config)
        choose_trainable(model, config.training)
    if not any(weight.requires_grad and weight.ndim > 1 for weight in model.head.linear.parameters()):
        found = f"training.trainable = {short(config.training.trainable)}: head.linear is zero in a new model"
        advice = "set training.init_from to weights to begin with"
        raise UserError(f"{found} and would stay so: nothing is learned; {advice}")


def build_model(config: Config) -> SiTTransformer2DModel:
    """Construct the transformer on the present default device, initialised from ``training.seed``."""
    channels, side, _ = config.latent_shape
    arguments = {"sample_size": side, "in_channels": channels, "num_classes": config.num_classes}
    arguments |= {key: value for key, value in config.model.model_dump().items() if value is not None}
    preset = arguments.pop("preset", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        if preset is None:
            return SiTTransformer2DModel(**arguments)
        return SiTTransformer2DModel.from_preset(preset, **arguments)


def build_model_to_train(config: Config, weights: Mapping[str, Tensor] | None = None) -> SiTTransformer2DModel:
    """Construct the transformer as it is trained: what of it, in its precision, recomputed and compiled as configured.

    weights: by name, in place of initialised ones. How products are computed is set for the whole process.
    """
    model, precision = build_model(config), PRECISIONS[config.training.precision]
    assert not model.load_state_dict(weights or {}, strict=False).unexpected_keys
    precision.set_products()
    choose_trainable(model, config.training)
    if precision.weights != torch.float32:
        nn.Module.to(model, precision.weights)
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.training.compile:
        logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)  # its note on CUDA breaks the bar
        model.compile_repeated_blocks()
    return model


def build_objectives_on_meta(config: Config) -> Objectives:
    """Construct a run's objectives without numbers, to be asked what they need."""
    with torch.device("meta"):
        return build_objectives(config.training, build_model(config), build_flow(config))


def build_flow(config: Config) -> Flow:
    """Construct the flow of a run."""
    section = config.flow
    return Flow(section.path, section.prediction, section.loss_weight, direction_weight=section.direction_weight)


def build_scheduler(config: Config) -> SiTScheduler:
    """Construct the scheduler of a run's pipeline; an ``auto`` shift is that of its samplers, too, as in RAE."""
    shift = {"shift": config.time_shift} if config.flow.time_shift == "auto" else {}
    return SiTScheduler(config.flow.path, config.flow.prediction, **shift)
