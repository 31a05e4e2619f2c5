"""The training loop and its step, readable top to bottom."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor, nn

from vit5gen.config import Config
from vit5gen.flow import draw_timesteps
from vit5gen.system.cpu import fast_products
from vit5gen.system.distributed import on_main
from vit5gen.system.errors import UserError
from vit5gen.system.precision import PRECISIONS
from vit5gen.training import process
from vit5gen.training.batches import micro_batches, nonfinite_fault, open_training_data, prepare
from vit5gen.training.build import build_flow, build_model_to_train
from vit5gen.training.initial import begin_from, initial_weights
from vit5gen.training.monitor import Monitor
from vit5gen.training.objectives import Batch, build_objectives
from vit5gen.training.optimizers import build_optimizer, learning_rate
from vit5gen.training.run_folder import RunFolder, to_yaml
from vit5gen.training.trainer import Outcome, Trainer


class Learner(nn.Module):
    """The model and its objectives as one module, so that DDP and FSDP share out the parameters of both."""

    def __init__(self, config: Config, weights: Mapping[str, Tensor] | None = None) -> None:
        super().__init__()
        self.model, self.flow = build_model_to_train(config, weights), build_flow(config)
        self.weights, self.objectives, self.asked = build_objectives(config.training, self.model, self.flow)
        self.taps = tuple(sorted({k for taps in self.asked.values() for k in taps}))
        self._no_split_modules = self.model._no_split_modules  # what FSDP wraps

    def forward(self, batch: Batch, step: int) -> Tensor:
        """Return the weighted mean loss of every objective, (K,)."""
        output = self.model(batch.x_t, batch.t, batch.labels, taps=self.taps)
        prediction, hidden = output if self.taps else (output, {})
        losses = []
        for name, objective in self.objectives.items():
            asked = {k: hidden[k] for k in self.asked[name]}
            losses.append(self.weights[name] * objective(prediction, asked, batch, step).mean())
        return torch.stack(losses)


def build_trainer(config: Config, accelerator: Accelerator, weights: Mapping[str, Tensor] | None = None) -> Trainer:
    """Construct what a run trains, from ``weights`` if there are any, shared out over the processes."""
    learner, settings = Learner(config, weights), config.training
    parts: dict[str, nn.Module] = {"model": learner.model, "objectives": learner.objectives}
    return Trainer(accelerator, learner, build_optimizer(learner, settings), parts, *settings.averages)


def train_step(
    trainer: Trainer,
    config: Config,
    batches: Iterator[Batch],
    stop_asked: Callable[[], bool] = lambda: False,
    save_due: Callable[[], bool] = lambda: False,
) -> Outcome:
    """Make the next step: the gradient of the objectives over the global batch, the optimizer, the averages.

    stop_asked, save_due: whether this process received a signal, and whether the main process's clock wants a save.
    """
    # The learning rate of the step, and how the global batch is divided.
    settings, section, accelerator = config.training, config.flow, trainer.accelerator
    learner, step = trainer.module, trainer.step
    micro_batch_size, accumulation = process.batch_sizes(settings, accelerator.num_processes)
    for group in trainer.optimizer.param_groups:
        group["lr"] = learning_rate(step, settings)
    trainer.network.train()
    total = torch.zeros(len(learner.objectives), device=accelerator.device, dtype=learner.model.dtype)
    with fast_products(), process.memory_hint(micro_batch_size):
        for micro in range(accumulation):
            batch = next(batches)

            # A time for every sample, and its point on the way from noise to data.
            draws = (section.time_distribution, section.logit_mean, section.logit_std, config.time_shift)
            stratum = (batch.position, settings.global_batch_size) if section.stratified else None
            t = draw_timesteps(learner.flow, batch.uniform, *draws, stratum).to(batch.x1)
            x_t, velocity = learner.flow.interpolate(batch.x0, batch.x1, t)

            # What the model makes of it, the weighted objectives, and their gradient.
            dropout = process.seeded(settings.seed, step, batch.first, accelerator.device)
            with trainer.sharing_gradients(last=micro == accumulation - 1), dropout:
                with PRECISIONS[settings.precision].autocast(accelerator.device):
                    losses = trainer.network(replace(batch, t=t, x_t=x_t, velocity=velocity), step) / accumulation
                losses.sum().backward()
            total += losses.detach()

        # The one synchronisation of a step: what is not finite must not reach the weights, and all processes stop, and
        # save, after the same step.
        norm = trainer.clip(settings.max_grad_norm)
        asked = stop_asked(), accelerator.is_main_process and save_due()
        numbers = torch.cat([total, norm.to(total)[None], *(total.new_full((1,), one) for one in asked)])
        *means, grad_norm, stop, save = accelerator.reduce(numbers, "mean").tolist()
        outcome = Outcome(dict(zip(learner.objectives, means, strict=True)), grad_norm, stop > 0, save > 0)

        # The optimizer and the averages, unless the step is not finite.
        if outcome.finite:
            trainer.optimizer.step()
            trainer.average()
        trainer.optimizer.zero_grad()
        trainer.count(outcome)
    return outcome


def train(config: Config, output: str | Path, resume: str, accept_changes: bool) -> int:
    """Train to ``training.num_steps`` in the folder ``output`` and return the exit code.

    A run is a function of its configuration: every draw depends on (seed, step, position in the global batch) alone,
    so that an interrupted run, resumed, equals an undisturbed one bit for bit.
    resume: ``auto`` or ``latest`` is the newest valid checkpoint of ``output``, ``never`` demands a new folder, a path
    names a run or a checkpoint.  accept_changes: resume although keys differ that change what is computed.
    Raises `UserError` for input that does not fit, and for a full disk or memory; checkpoints are then still valid.
    """
    # Wrong values end it here, before hours of encoding.
    folder = RunFolder(output)
    accelerator, config = process.make_accelerator(config.training, folder.path), prepare(config)
    with ExitStack() as stack:
        # No other process trains in the folder, which says where to start.
        on_main(lambda: stack.enter_context(folder.locked()))
        start, config = on_main(partial(folder.find_start, config, resume, accept_changes, begin=begin_from))
        if folder.finished(config, start):
            accelerator.print(f"{folder} is already trained to step {config.training.num_steps}; nothing to do")
            return 0

        # Train; the trackers write what they still hold.
        with process.disk_hint():
            code = _train(config, folder, accelerator, start, accept_changes)
        accelerator.end_training()
        return code


def _train(config: Config, folder: RunFolder, accelerator: Accelerator, start: Path | None, accept: bool) -> int:
    # What is trained, on which data, and from where.
    weights, origin = initial_weights(config) if start is None else (None, {})
    settings, trainer = config.training, build_trainer(config, accelerator, weights)
    del weights  # as large as the model
    source, vae, data = open_training_data(config, accelerator, start, accept)
    if start is not None:
        trainer.restore(start)
    trainer.data |= origin | {k: v for k, v in data.items() if v is not None}  # old latents know no digest
    on_main(lambda: folder.record(config, trainer.step, data))
    save = partial(trainer.save, config=to_yaml(config), keep_last=settings.keep_last, keep_every=settings.keep_every)

    # Step by step, until the last one or a signal.
    stop, clock = False, process.SaveClock(settings.checkpoint_minutes)
    with process.stop_signals() as stop_asked, ExitStack() as stack:
        monitor = Monitor(config, folder, trainer, vae, source.class_names, stop_asked)
        batches = monitor.describe_first(micro_batches(config, source, vae, accelerator, trainer.step))
        stack.enter_context(closing(batches))
        stack.enter_context(monitor.bar)
        while True:
            # Evaluate the averages, at the first and the last step too; a signal ends it.
            if not stop and monitor.due(trainer.step):
                stop = not monitor.evaluate(trainer.step)

            # Stop, or end, with a checkpoint of this very step.
            last = trainer.step == settings.num_steps
            if (stop or last) and trainer.step > trainer.saved_step:
                save(folder.checkpoints)
            if stop:
                monitor.bar.close()
                accelerator.print(process.stopped(trainer.step, trainer.saved_step))
                return process.STOPPED
            if last:
                break

            # Learn.
            outcome = train_step(trainer, config, batches, stop_asked, clock.due)
            stop, last = outcome.stop, trainer.step == settings.num_steps

            # Log.
            if trainer.step % settings.log_every == 0 or last:
                monitor.write(outcome)
            monitor.bar.update()

            # Save by steps and by the clock.
            trainer.snapshot(folder.averages, settings.ema_snapshot_every)
            if trainer.step % (settings.checkpoint_every or 1) == 0 or outcome.save or last:
                save(folder.checkpoints)
                clock.restart()

            # Give up where nothing is learnt any more.
            if trainer.faults == min(settings.max_nonfinite_steps, settings.num_steps):
                save(folder.nonfinite)
                accelerator.print(nonfinite_fault(config, source, vae, trainer.step, trainer.faults, folder.nonfinite))
                return process.NONFINITE

    # All is learnt; say where it is.
    if trainer.saved_step < settings.num_steps:
        raise UserError(f"{folder}: the last step was not saved; free some disk space and run the same command again")
    accelerator.print(f"{folder}: report.html, samples.png, metrics.json, pipeline/. Next:\n{monitor.next_command()}")
    return 0
