"""What a training carries from step to step: network, optimizer, averages and counters."""

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn

from vit5gen.system.distributed import on_main
from vit5gen.system.errors import UserError
from vit5gen.training import checkpoint
from vit5gen.training.averages import EMA, halve
from vit5gen.training.checkpoint import gather_shards, shard_like

_COUNTERS = ("step", "skipped", "loss_sum", "loss_sums", "loss_count", "data")
_IF_ANY = ("loss_sums", "data")  # counters that a checkpoint may lack


@dataclass(frozen=True)
class Outcome:
    """What all processes know of a step: mean losses, norm of the gradient; whether to stop, and to save, after it."""

    losses: dict[str, float]
    grad_norm: float
    stop: bool = False
    save: bool = False

    @property
    def loss(self) -> float:
        return sum(self.losses.values())

    @property
    def finite(self) -> bool:
        """Whether the step was made; one that is not finite leaves the weights alone."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Trainer:
    """A network as the processes share it, with all that a checkpoint holds of its training.

    network: what is called and optimised.  parts: its modules by their name in a checkpoint, "model" first; those
    without a state have no file.  decays: of the averages.  lengths: of those by a power function, of the model alone.
    skipped: steps that were not finite.  faults: of these the newest, without another between.
    loss_sum, loss_count: of the steps since the last line of the log; loss_sums: of each of several objectives.
    saved_step: of the newest checkpoint.
    data: what is recorded of the training data, empty where an earlier version did not. Random numbers and the place in
    the data follow from ``step``.
    """

    def __init__(
        self,
        accelerator: Accelerator,
        network: nn.Module,
        optimizer: torch.optim.Optimizer,
        parts: Mapping[str, nn.Module],
        decays: Iterable[float] = (),
        lengths: Iterable[float] = (),
    ) -> None:
        self.accelerator, self.model = accelerator, parts["model"]
        self.module: Any = network  # what DDP wraps
        self.network, self.optimizer = accelerator.prepare(network, optimizer)
        self.parts = {name: part for name, part in parts.items() if part.state_dict()}
        # The averages are of the parameters as prepared: sharded under FSDP.
        learning = {name: part for name, part in self.parts.items() if any(p.requires_grad for p in part.parameters())}
        self.averages = {name: EMA(part, decays, lengths if name == "model" else ()) for name, part in learning.items()}
        self.step, self.saved_step, self.skipped, self.loss_sum, self.loss_count = 0, 0, 0, 0.0, 0
        self.faults, self.loss_sums = 0, dict[str, float]()
        self.data: dict[str, Any] = {}

    def sharing_gradients(self, last: bool) -> AbstractContextManager:
        """Return the context of a backward pass: only the ``last`` of a step joins the gradients of the processes."""
        return nullcontext() if last else self.accelerator.no_sync(self.network)

    def clip(self, max_norm: float | None) -> Tensor:
        """Return the norm of the gradient over all processes, after which it is at most ``max_norm``."""
        parameters = list(self.network.parameters())
        if max_norm is None:  # clipping to infinity would write every gradient once more, times 1
            return gather_shards(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
        return gather_shards(nn.utils.clip_grad_norm_(parameters, max_norm))

    def average(self) -> None:
        """Move the averages one step towards the present weights."""
        for ema in self.averages.values():
            ema.update(self.step - self.skipped + 1)

    def count(self, outcome: Outcome) -> None:
        """Count a step, which was skipped where its outcome is not finite."""
        if outcome.finite:
            # A checkpoint of an earlier version has the sum of all objectives alone.
            if len(outcome.losses) > 1 and bool(self.loss_sums) == bool(self.loss_count):
                self.loss_sums = {k: self.loss_sums.get(k, 0.0) + loss for k, loss in outcome.losses.items()}
            self.loss_sum, self.loss_count = self.loss_sum + outcome.loss, self.loss_count + 1
        else:
            self.skipped += 1
        self.faults = 0 if outcome.finite else self.faults + 1
        self.step += 1

    def mean_losses(self) -> tuple[float | None, dict[str, float]]:
        """Return the mean loss since the last call, None when every step was skipped, and those of several objectives.

        The latter are empty where a checkpoint of an earlier version, which lacks their sums, was resumed in between.
        """
        mean = self.loss_sum / self.loss_count if self.loss_count else None
        means = {name: loss / self.loss_count for name, loss in self.loss_sums.items()}
        self.loss_sum, self.loss_count, self.loss_sums = 0.0, 0, {}
        return mean, means

    def save(self, folder: Path, config: str, keep_last: int = 1, keep_every: int | None = None) -> bool:
        """Write a checkpoint into ``folder`` and delete those that are not kept; every process calls this.

        Returns False, having said so, when the disk is full.
        """
        tensors = self._gather([*self._files(), ("optimizer", self._moments())])
        counters = {name: getattr(self, name) for name in _COUNTERS if name != "loss_sums" or self.loss_sums}

        def write() -> bool:
            try:
                checkpoint.save(folder, self.step, tensors, counters, config)
                checkpoint.prune(folder, self.step, keep_last, keep_every)
            except (OSError, SafetensorError) as error:
                print(f"\nwarning: step {self.step} not saved: {error}; older checkpoints are still valid", flush=True)
                return False
            return True

        saved = on_main(write)
        self.saved_step = self.step if saved else self.saved_step
        return saved

    def snapshot(self, folder: Path, every: int | None) -> None:
        """Write the averages by power functions as fp16, every so many steps; every process calls this.

        A full disk costs this snapshot, and a warning.
        """
        ema = self.averages["model"]
        if not ema.exponents or self.step % (every or 1):
            return
        tensors = self._gather([(f"ema_{key}", ema.items(key)) for key in ema.exponents])

        def write() -> None:
            halves = {file: {name: halve(value) for name, value in own.items()} for file, own in tensors.items()}
            try:
                checkpoint.save(folder, self.step, halves, {"skipped": self.skipped})
            except (OSError, SafetensorError) as error:
                print(f"\nwarning: averages of step {self.step} not saved: {error}; training continues", flush=True)

        on_main(write)

    def _gather(self, sets: Sequence[tuple[str, Iterable[tuple[str, Tensor]]]]) -> dict[str, dict[str, Tensor]]:
        """Collect whole tensors on the CPU by file name: a collective, of which the main process keeps the result."""
        files: dict[str, dict[str, Tensor]] = {}
        for file, values in sets:
            gathered = ((name, gather_shards(value)) for name, value in values)
            files[file] = {name: value.cpu() for name, value in gathered if self.accelerator.is_main_process}
        return files

    def restore(self, folder: Path) -> None:
        """Load what `save` wrote, sharding it as the network is; raise `UserError` where it is of another network."""
        saved = checkpoint.read_state(folder)
        for name in _COUNTERS:
            setattr(self, name, saved.get(name, {}) if name in _IF_ANY else saved[name])
        self.saved_step = self.step
        parts = (one for part in self.parts.values() for one in part.named_parameters())
        frozen = {name for name, parameter in parts if not parameter.requires_grad}
        for file, values in self._files():
            checkpoint.fill(values, folder, file, frozen)
        # Learning rate, betas and the like come from the configuration: only the moments are in the file.
        parameters = dict(self._parameters())
        for entry, value in checkpoint.load_tensors(folder, "optimizer").items():
            name, key = entry.split("/")
            if name not in parameters:
                raise UserError(f"{folder}: optimizer has {name}, which this run lacks; resume with the same optimizer")
            parameter = parameters[name]
            moments = self.optimizer.optimizer.state.setdefault(parameter, {})
            shaped = value.shape == parameter.shape
            value = value.to(parameter.dtype) if shaped else value  # which may be another one now
            # A copy: the tensors read are windows into the file, which will be deleted.
            moments[key] = (shard_like(value, parameter) if shaped else value.to(parameter.device)).clone()
        unknown = "" if self.data else ", which does not record its data: they are not compared with those of this run"
        self.accelerator.print(f"resuming from {folder}{unknown}")

    def _files(self) -> Iterator[tuple[str, Iterable[tuple[str, Tensor]]]]:
        """Yield the files of a checkpoint with their tensors by name, all but the optimizer's."""
        for name, part in self.parts.items():
            yield name, part.state_dict().items()
        for name, ema in self.averages.items():
            for key in ema.averages:
                yield f"{'' if name == 'model' else name + '_'}ema_{key}", ema.items(key)

    def _moments(self) -> Iterator[tuple[str, Tensor]]:
        """Yield the state of the optimizer by the names of its parameters."""
        for name, parameter in self._parameters():
            for key, value in self.optimizer.optimizer.state[parameter].items():
                yield f"{name}/{key}", value

    def _parameters(self) -> Iterator[tuple[str, nn.Parameter]]:
        """Yield all parameters by the names that they have in the file of the optimizer."""
        for name, part in self.parts.items():
            for key, parameter in part.named_parameters():
                yield key if name == "model" else f"{name}.{key}", parameter
