"""The plug of objectives: what one receives, and the registry that knows them by name."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from vit5gen.config import TrainingConfig
from vit5gen.flow import Flow
from vit5gen.models import SiTTransformer2DModel
from vit5gen.registry import Registry, missing
from vit5gen.section import Natural, NonNegative, Section, validate
from vit5gen.system.errors import UserError


@dataclass(frozen=True)
class Batch:
    """A micro-batch with its random numbers; the loop draws t, before which the last three are empty.

    x1: latents (B, C, h, w) of the data.  x0: noise like x1.  labels (B,) int64, already null where dropped.
    image (B, 3, H, W) uint8, where an objective needs it, or features (B, C, h, w) that an encoder made of it before.
    uniform (B,) and position (B,): what t is drawn from; first: the first position, in the global batch.
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
    features: Tensor | None = None


class Objective(nn.Module):
    """Base of objectives: ``forward(prediction, hidden, batch, step)`` returns the loss of every sample (B,).

    prediction (B, C, h, w) is the model's; hidden holds ``{k: state (B, N, D) after k blocks}`` for k in ``taps``,
    which the constructor sets; step is 0-based, and within the steps of `SharedOptions`. Its parameters are optimised,
    averaged, checkpointed and resumed with the model's, but are not part of the pipeline. Options are the keyword-only
    arguments of the constructor.
    A static method ``missing()`` may return what this machine lacks for it, each with how to get it.
    needs_image: whether the batch must hold the image in the steps in which it is active; where ``stored``, instead the
    features that `load_encoder` makes of it, once, before training.
    trains_all: whether every step gives each parameter, the model's too, a gradient, so that processes need not look
    for those without.
    """

    needs_image: ClassVar[bool] = False
    trains_all: ClassVar[bool] = False
    taps: tuple[int, ...] = ()
    stored = False

    def __init__(self, model: SiTTransformer2DModel, flow: Flow) -> None:
        """Take the model to train and its flow, and keep neither among the parameters."""
        super().__init__()

    @classmethod
    def missing_with(cls, options: Mapping[str, Any]) -> dict[str, str]:
        """Return what this machine lacks for it with these options, by default `missing`."""
        return missing(cls)

    def load_encoder(self, device: torch.device) -> tuple[Callable[[Tensor], Tensor], dict[str, Any]] | None:
        """Return what encodes images (B, 3, H, W) uint8 into the features of the batch, None where there is none.

        Beside it what these depend on, with their ``shape`` (C, h, w). Called before data are opened, unless its steps
        are over, where it ``needs_image``; raises `UserError` where weights are absent.
        """
        if self.stored:
            raise NotImplementedError(f"{type(self).__name__} is stored, but has no load_encoder")
        return None

    def release(self) -> None:
        """Free what only its steps need; called in place of `forward` in every other step."""

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
    """The options of every objective, beside its own; steps are 0-based."""

    weight: Annotated[NonNegative, Field(le=1e6)] = Field(1.0, description="factor of its loss in the sum; 0: omitted")
    start: Natural = Field(0, description="first step with it")
    stop_at: Natural | None = Field(None, description="first step without it; default: it stays to the end")

    @model_validator(mode="after")
    def _in_order(self) -> "SharedOptions":
        if self.stop_at is not None and self.stop_at <= self.start:
            order = "equals" if self.stop_at == self.start else "comes before"
            raise ValueError(f"stop_at = {self.stop_at}: {order} start = {self.start}; set it to a later step")
        return self

    @property
    def always(self) -> bool:
        """Whether it is active in every step."""
        return self.start == 0 and self.stop_at is None

    def active(self, step: int) -> bool:
        """Whether it is part of what the step minimises; otherwise it costs nothing."""
        if self.always:  # a step that is compared costs a second graph where the network is compiled
            return True
        return self.start <= step and (self.stop_at is None or step < self.stop_at)

    def share(self, num_steps: int) -> float:
        """Return in which part of so many steps it is active."""
        end = num_steps if self.stop_at is None else min(self.stop_at, num_steps)
        return max(end - self.start, 0) / num_steps if num_steps else float(self.active(0))


def _check_objective(name: str, given: Mapping[str, Any]) -> tuple[SharedOptions, dict[str, Any]]:
    """Return the shared options of an objective and its own; raise `UserError` for what does not fit."""
    where = f"training.objectives.{name}"
    if "." in name or hasattr(Objectives, name):
        raise UserError(f"{where}: {name!r} is not a valid module name; choose another name")
    declared = OBJECTIVES.options(name).keys() - {"weight"}  # a stop_at that the plug declares is its own
    shared = {key: value for key, value in given.items() if key in SharedOptions.model_fields.keys() - declared}
    own = {key: value for key, value in given.items() if key not in shared}
    return validate(SharedOptions, shared, where), OBJECTIVES.check(name, own, where)


def _check_objectives(training: TrainingConfig) -> dict[str, tuple[SharedOptions, dict[str, Any]]]:
    """Return the options of the objectives that a run has, without those of weight 0, by name."""
    checked = {name: _check_objective(name, given) for name, given in training.objectives.items()}
    checked = {name: options for name, options in checked.items() if options[0].weight > 0}
    if not checked:
        raise UserError("training.objectives: every weight is 0; set one to a number greater than 0, or add flow: {}")
    shared = [one for one, _ in checked.values()]
    for step in sorted({0, *(one.stop_at for one in shared if one.stop_at is not None)}):
        if step < training.num_steps and not any(one.active(step) for one in shared):
            raise UserError(f"training.objectives: none is active at step {step}; set start or stop_at so that one is")
    return checked


def shared_options(training: TrainingConfig) -> dict[str, SharedOptions]:
    """Return the shared options of the objectives that a run has, by name, building none; raises `UserError`."""
    return {name: shared for name, (shared, _) in _check_objectives(training).items()}


def needing_image(training: TrainingConfig) -> dict[str, SharedOptions]:
    """Return the shared options of those objectives for which the batch holds the image while they are active."""
    return {name: shared for name, shared in shared_options(training).items() if OBJECTIVES.get(name).needs_image}


class Objectives(nn.ModuleDict):
    """The objectives of a run by name, in their order, with the shared options and the taps of each."""

    def __init__(self, objectives: Mapping[str, Objective], shared: Mapping[str, SharedOptions]) -> None:
        super().__init__(objectives)
        self._shared, self._asked = shared, {name: tuple(one.taps) for name, one in objectives.items()}

    def taps_at(self, step: int) -> tuple[int, ...]:
        """Return the taps that the objectives active at ``step`` ask for."""
        return tuple(sorted({k for name, taps in self._asked.items() if self._shared[name].active(step) for k in taps}))

    def forward(self, prediction: Tensor, hidden: dict[int, Tensor], batch: Batch, step: int) -> Tensor:
        """Return the weighted mean loss of every objective, (K,); one that is not active has 0 and is not called."""
        losses = dict.fromkeys(self, batch.x1.new_zeros(()))
        for name, objective in self.items():
            assert isinstance(objective, Objective)
            if self._shared[name].active(step):
                asked = {k: hidden[k] for k in self._asked[name]}
                losses[name] = self._shared[name].weight * objective(prediction, asked, batch, step).mean()
            else:
                objective.release()
        return torch.stack(list(losses.values()))


def build_objectives(training: TrainingConfig, model: SiTTransformer2DModel, flow: Flow) -> Objectives:
    """Return the objectives that ``training.objectives`` lists, without those of weight 0.

    Parameters start from ``training.seed``, in the model's type. Raises `UserError` for an
    unknown name, options that do not fit, a step without an objective, or a tap that the model lacks.
    """
    checked = _check_objectives(training)
    objectives: dict[str, Objective]
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(training.seed)
        objectives = {name: OBJECTIVES.get(name)(model, flow, **options) for name, (_, options) in checked.items()}
    for name, objective in objectives.items():
        objective.to(next(model.parameters()).dtype)
        if beyond := [k for k in objective.taps if not 1 <= k <= model.config.num_layers]:
            found = f"tap {beyond[0]} does not exist; expected 1 to {model.config.num_layers}"
            raise UserError(f"training.objectives.{name}: {found}")
    return Objectives(objectives, {name: shared for name, (shared, _) in checked.items()})
