"""What a configuration stands for: the model and the flow, and whether its values fit together."""

import torch
from torch import nn

from vit5gen.config import Config
from vit5gen.data.images import make_source
from vit5gen.evaluation.features import extractor_names
from vit5gen.flow import Flow
from vit5gen.generation.scheduler import SAMPLERS
from vit5gen.models import SiTTransformer2DModel
from vit5gen.system.errors import UserError, choose
from vit5gen.system.precision import PRECISIONS
from vit5gen.training.objectives import OBJECTIVES, build_objectives
from vit5gen.training.optimizers import OPTIMIZERS


def check_values(config: Config) -> None:
    """Raise `UserError` for values that the types of the configuration cannot tell to be wrong."""
    (channels, _, _), sampling = config.latent_shape, config.sampling
    with torch.device("meta"):
        build_objectives(config.training, build_model(config), build_flow(config))
    choose("sampling.sampler", sampling.sampler, SAMPLERS)
    if (asked := sampling.guidance_channels or 0) > channels:
        raise UserError(f"sampling.guidance_channels = {asked}: expected at most the {channels} of vae.latent_channels")
    if sampling.guidance_scale != 1 and config.model.class_dropout_prob == 0:
        untrained = "a null label, which model.class_dropout_prob = 0 does not train"
        advice = "set it above 0, or the scale to 1"
        raise UserError(f"sampling.guidance_scale = {sampling.guidance_scale}: needs {untrained}; {advice}")
    choose("evaluation.extractor", config.evaluation.extractor, extractor_names())
    choose("training.optimizer", config.training.optimizer, OPTIMIZERS.names())
    for name in config.training.objectives:
        if OBJECTIVES.get(name).needs_image and not config.data.from_images:
            raise UserError(f"training.objectives.{name}: needs the images; set data.from_images to true")
    source = make_source(config.data)
    if source.splits is not None:
        choose("data.split", config.data.split, source.splits)


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


def build_model_to_train(config: Config) -> SiTTransformer2DModel:
    """Construct the transformer as it is trained: in its precision, recomputed and compiled as configured."""
    model, weights = build_model(config), PRECISIONS[config.training.precision].weights
    if weights != torch.float32:
        nn.Module.to(model, weights)
    if config.training.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if config.training.compile:
        model.compile_repeated_blocks()
    return model


def build_flow(config: Config) -> Flow:
    """Construct the flow of a run."""
    section = config.flow
    return Flow(section.path, section.prediction, section.loss_weight, direction_weight=section.direction_weight)
