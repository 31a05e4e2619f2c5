"""What a configuration stands for: the model, the flow, the optimizer and its learning rate."""

import math

import torch
from torch import nn

from vit5gen.config import Config, TrainingConfig
from vit5gen.data.images import make_source
from vit5gen.evaluation.features import extractor_names
from vit5gen.flow import Flow
from vit5gen.generation.pipeline import SAMPLERS
from vit5gen.models import SiTTransformer2DModel
from vit5gen.system.errors import UserError, choose


def check_values(config: Config) -> None:
    """Raise `UserError` for values that the types of the configuration cannot tell to be wrong."""
    channels, _, _ = config.latent_shape
    with torch.device("meta"):
        build_model(config)
    choose("sampling.sampler", config.sampling.sampler, SAMPLERS)
    if (config.sampling.guidance_channels or 0) > channels:
        raise UserError(
            f"sampling.guidance_channels = {config.sampling.guidance_channels}: expected at most the {channels} of "
            "vae.latent_channels"
        )
    if config.sampling.guidance_scale != 1 and config.model.class_dropout_prob == 0:
        raise UserError(
            f"sampling.guidance_scale = {config.sampling.guidance_scale}: needs a null label, which "
            "model.class_dropout_prob = 0 does not train; set it above 0, or the scale to 1"
        )
    choose("evaluation.extractor", config.evaluation.extractor, extractor_names())
    source = make_source(config.data)
    if source.splits is not None:
        choose("data.split", config.data.split, source.splits)


def build_model(config: Config) -> SiTTransformer2DModel:
    """Construct the transformer on the present default device, initialised from ``training.seed``."""
    channels, side, _ = config.latent_shape
    arguments = {"sample_size": side, "in_channels": channels, "num_classes": config.data.num_classes}
    arguments |= {key: value for key, value in config.model.model_dump().items() if value is not None}
    preset = arguments.pop("preset", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(config.training.seed)
        if preset is None:
            return SiTTransformer2DModel(**arguments)
        return SiTTransformer2DModel.from_preset(preset, **arguments)


def build_trainee(config: Config) -> SiTTransformer2DModel:
    """Construct the transformer as it is trained: in its precision, checkpointed and compiled as configured."""
    model = build_model(config)
    if config.training.precision == "fp64":
        model.double()
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.training.compile:
        model.compile_repeated_blocks()
    return model


def build_flow(config: Config) -> Flow:
    """Construct the flow of a run."""
    section = config.flow
    return Flow(section.path, section.prediction, section.loss_weight, direction_weight=section.direction_weight)


def build_optimizer(model: nn.Module, training: TrainingConfig) -> torch.optim.Optimizer:
    """Construct fused AdamW that decays the matrices of layers.

    Not decayed are vectors (norms, biases, LayerScale), parameters that are no layer's ``weight`` (positions,
    registers), and what a module's ``no_weight_decay()`` names, if it has that method.
    """
    excluded = {
        f"{prefix}.{name}".removeprefix(".")
        for prefix, module in model.named_modules()
        for name in getattr(module, "no_weight_decay", list)()
    }
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, parameter in model.named_parameters():
        groups[parameter.ndim >= 2 and name.endswith(".weight") and name not in excluded].append(parameter)
    decay = {True: training.weight_decay, False: 0.0}
    return torch.optim.AdamW(
        [
            {"params": parameters, "weight_decay": decay[decayed]}
            for decayed, parameters in groups.items()
            if parameters
        ],
        lr=training.learning_rate,
        betas=(training.adam_betas[0], training.adam_betas[1]),
        fused=True,
    )


def learning_rate(step: int, training: TrainingConfig) -> float:
    """Return the learning rate of ``step`` (0-based): linear warm-up, then constant or a cosine to 0 at the end."""
    if step < training.warmup_steps:
        return training.learning_rate * (step + 1) / training.warmup_steps
    if training.schedule == "constant":
        return training.learning_rate
    done = (step - training.warmup_steps) / max(1, training.num_steps - training.warmup_steps)
    return training.learning_rate * 0.5 * (1 + math.cos(math.pi * done))
