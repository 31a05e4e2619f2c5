"""The plug of objectives: what one receives, and the registry that knows them by name."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit5gen.config import TrainingConfig
from vit5gen.flow import Flow
from vit5gen.models import SiTTransformer2DModel
from vit5gen.registry import Registry
from vit5gen.section import Positive, Section, validate
from vit5gen.system.errors import UserError


@dataclass(frozen=True)
class Batch:
    """A micro-batch with its random numbers; the loop draws t, before which the last three are empty.

    x1: latents (B, C, h, w) of the data.  x0: noise like x1.  labels (B,) int64, already null where dropped.
    image (B, 3, H, W) uint8, where an objective needs it.  uniform (B,) and position (B,): what t is drawn from; first:
    the first position, in the global batch.
    t (B,): time in [0, 1].  x_t: the point at t between x0 and x1, which the model has seen; velocity: dx_t/dt there.
    """

    x1: Tensor
    x0: Tensor
    labels: Tensor
    uniform: Tensor
    position: Tensor
    first: int
    image: Tensor | None
    t: Tensor
    x_t: Tensor
    velocity: Tensor


class Objective(nn.Module):
    """Base of objectives: ``forward(prediction, hidden, batch, step)`` returns the loss of every sample (B,).

    prediction (B, C, h, w) is the model's; hidden holds ``{k: state (B, N, D) after k blocks}`` for k in ``taps``,
    which the constructor sets; step is 0-based. Its parameters are optimised, averaged, checkpointed and resumed with
    the model's, but are not part of the pipeline. Options are the keyword-only arguments of the constructor.
    A static method ``missing()`` may return what this machine lacks for it, each with how to get it.
    needs_image: whether the batch must hold the image, for which the run needs ``data.from_images``.
    trains_all: whether every step gives each parameter, the model's too, a gradient, so that processes need not look
    for those without.
    """

    needs_image: ClassVar[bool] = False
    trains_all: ClassVar[bool] = False
    taps: tuple[int, ...] = ()

    def __init__(self, model: SiTTransformer2DModel, flow: Flow) -> None:
        """Take the model to train and its flow, and keep neither among the parameters."""
        super().__init__()

    def flops(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch) -> int | None:
        """Return the FLOPs of its forward and backward pass over one image, None where they are not known.

        They are counted in a pass on the meta device, where these arguments of `forward` are.
        """
        try:
            with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
                loss = self(prediction, hidden, batch, 0).sum()
                if loss.requires_grad:
                    loss.backward()
        except Exception:  # whatever a loss raises where tensors have no values, or lie on two devices
            return None
        return counter.get_total_flops()


OBJECTIVES: Registry[type[Objective]] = Registry("objective", "vit5gen.objectives")
register_objective = OBJECTIVES.register


class SharedOptions(Section):
    """The options of every objective, beside its own."""

    weight: Annotated[Positive, Field(le=1e6)] = Field(1.0, description="factor of its loss in the sum")


def _check_objective(name: str, given: Mapping[str, Any]) -> tuple[float, dict[str, Any]]:
    """Return the weight of an objective and its own options; raise `UserError` for what does not fit."""
    where = f"training.objectives.{name}"
    if "." in name or hasattr(nn.ModuleDict, name):
        raise UserError(f"{where}: {name!r} is not a valid module name; choose another name")
    shared = {key: value for key, value in given.items() if key in SharedOptions.model_fields}
    own = {key: value for key, value in given.items() if key not in shared}
    return validate(SharedOptions, shared, where).weight, OBJECTIVES.check(name, own, where)


def build_objectives(
    training: TrainingConfig, model: SiTTransformer2DModel, flow: Flow
) -> tuple[dict[str, float], nn.ModuleDict, dict[str, tuple[int, ...]]]:
    """Return weights, objectives and the taps that each asks for, by name, as ``training.objectives`` lists them.

    Parameters start from ``training.seed``, in the model's type. Raises `UserError` for an unknown name, options that
    do not fit, or a tap that the model lacks.
    """
    checked = {name: _check_objective(name, given) for name, given in training.objectives.items()}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        objectives = {name: OBJECTIVES.get(name)(model, flow, **options) for name, (_, options) in checked.items()}
    for name, objective in objectives.items():
        objective.to(next(model.parameters()).dtype)
        if beyond := [k for k in objective.taps if not 1 <= k <= model.config.num_layers]:
            found = f"tap {beyond[0]} does not exist; expected 1 to {model.config.num_layers}"
            raise UserError(f"training.objectives.{name}: {found}")
    weights = {name: weight for name, (weight, _) in checked.items()}
    return weights, nn.ModuleDict(objectives), {name: tuple(one.taps) for name, one in objectives.items()}
