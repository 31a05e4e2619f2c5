"""What is trained, and one step of it: the gradient over the global batch, the optimizer, the averages."""

import math
from collections.abc import Callable, Generator, Iterator
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from torch import Tensor, nn

from vit5gen.config import Config
from vit5gen.flow import Flow, draw_timesteps
from vit5gen.system.cpu import fast_products
from vit5gen.system.precision import PRECISIONS
from vit5gen.training.averages import EMA
from vit5gen.training.build import build_flow, build_optimizer, build_trainee, learning_rate
from vit5gen.training.data import encode_batch, micro_batches
from vit5gen.training.process import batch_sizes, memory_hint, seeded
from vit5gen.training.sharding import gather_shards


@dataclass(frozen=True)
class Outcome:
    """What all processes know of a step: mean loss, norm of the gradient; whether to stop, and to save, after it."""

    loss: float
    grad_norm: float
    stop: bool
    save: bool

    @property
    def finite(self) -> bool:
        """Whether the step was made; one that is not finite leaves the weights alone."""
        return math.isfinite(self.loss) and math.isfinite(self.grad_norm)


class Trainee:
    """A model as its configuration trains it: prepared for the processes, with its optimizer and averages."""

    def __init__(self, config: Config, accelerator: Accelerator, vae: AutoencoderKL | None = None) -> None:
        settings, model = config.training, build_trainee(config)
        self.config, self.accelerator, self.vae, self.flow = config, accelerator, vae, build_flow(config)
        self.network, self.optimizer = accelerator.prepare(model, build_optimizer(model, settings))
        self.model = accelerator.unwrap_model(self.network)
        # The averages are of the parameters as prepared: sharded under FSDP.
        self.ema = EMA(self.model, settings.ema_decays)
        self.micro_batch_size, self.accumulation = batch_sizes(settings, accelerator.num_processes)

    def batches(self, source: Any, first_step: int = 0) -> Generator[dict[str, Tensor]]:
        """Yield this process's micro-batches of all steps from ``first_step``."""
        size, null_label = self.micro_batch_size, self.model.null_label
        return micro_batches(self.config, source, self.accelerator, first_step, size, null_label)

    def step(
        self,
        number: int,
        batches: Iterator[dict[str, Tensor]],
        stop_asked: Callable[[], bool] = lambda: False,
        save_due: Callable[[], bool] = lambda: False,
    ) -> Outcome:
        """Make the step ``number`` (0-based): the gradient of the mean loss of the next micro-batches, and its use.

        stop_asked: tells whether a signal has come to this process; save_due: whether it is time for a checkpoint by
        the main process's clock. Raises `UserError` when memory runs out.
        """
        settings, accelerator = self.config.training, self.accelerator
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate(number, settings)
        self.network.train()
        total = torch.zeros((), device=accelerator.device, dtype=next(self.model.parameters()).dtype)
        with fast_products(), memory_hint(self.micro_batch_size):
            for micro in range(self.accumulation):
                batch = next(batches)
                sync = nullcontext() if micro == self.accumulation - 1 else accelerator.no_sync(self.network)
                first = (accelerator.process_index * self.accumulation + micro) * self.micro_batch_size
                with sync, seeded(settings.seed, number, first, accelerator.device):
                    loss = losses(self.config, self.flow, self.vae, self.network, batch).mean() / self.accumulation
                    loss.backward()
                total += loss.detach()
            norm = nn.utils.clip_grad_norm_(self.network.parameters(), settings.max_grad_norm or math.inf)
            # The one synchronisation of a step: what is not finite must not reach the weights, and all processes
            # stop, and save, after the same step.
            asked = total.new_tensor([stop_asked(), accelerator.is_main_process and save_due()])
            numbers = torch.cat([torch.stack([total, gather_shards(norm).to(total)]), asked])
            mean_loss, mean_norm, stop, save = accelerator.reduce(numbers, "mean").tolist()
            outcome = Outcome(mean_loss, mean_norm, stop > 0, save > 0)
            if outcome.finite:
                self.optimizer.step()
                self.ema.update()
            self.optimizer.zero_grad()
        return outcome


def losses(config: Config, flow: Flow, vae: AutoencoderKL, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of every sample (B,) of a micro-batch, whose random numbers it brings along."""
    settings, precision = config.flow, PRECISIONS[config.training.precision]
    x1 = batch["x1"] if "x1" in batch else encode_batch(vae, batch["image"], batch["posterior"])
    t = draw_timesteps(
        flow,
        batch["uniform"],
        settings.time_distribution,
        settings.logit_mean,
        settings.logit_std,
        settings.time_shift,
        (batch["position"], config.training.global_batch_size) if settings.stratified else None,
    )
    x1, x0 = x1.to(precision.weights), batch["x0"].to(precision.weights)
    with precision.autocast(x1.device):
        return flow.loss(lambda x, t: model(x, t, batch["label"]), x1, x0, t)
