"""The training loop: one function, readable top to bottom."""

import math
import time
from contextlib import ExitStack, nullcontext
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from safetensors import SafetensorError
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from vit5gen.config import Config
from vit5gen.flow import draw_timesteps
from vit5gen.training import checkpoint, run
from vit5gen.training.build import build_flow, build_model, build_optimizer, latent_shape, learning_rate
from vit5gen.training.draws import MicroBatches, TrainingSet, data_index
from vit5gen.training.ema import EMA
from vit5gen.training.monitor import Monitor
from vit5gen.training.process import batch_sizes, make_accelerator, on_main, seeded, stop_signals
from vit5gen.training.source import encode_batch, open_source

STOPPED = 75  # exit code after SIGTERM or SIGINT: saved, the same command goes on (EX_TEMPFAIL)
NONFINITE = 70  # exit code after too many non-finite steps in a row (EX_SOFTWARE)


def train(config: Config, output: str | Path, resume: str = "auto", accept_changes: bool = False) -> int:
    """Train to ``training.num_steps`` in the folder ``output`` and return the exit code.

    A run is a function of its configuration: every draw depends on (seed, step, position in the global batch) alone,
    so that an interrupted run, resumed, equals an undisturbed one bit for bit.

    resume: ``auto`` goes on from the newest valid checkpoint of ``output``, ``never`` demands a new folder, a path
    names the checkpoint to go on from. accept_changes: go on although keys differ that change what is computed.
    Raises `UserError` for input that does not fit; nothing is written then.
    """
    settings, output = config.training, Path(output)
    accelerator = make_accelerator(settings, output)
    micro_batch_size, accumulation = batch_sizes(settings, accelerator.num_processes)
    with ExitStack() as stack:
        on_main(accelerator, lambda: stack.enter_context(run.locked(output)))
        start = on_main(accelerator, lambda: run.prepare(config, output, resume, accept_changes))
        if run.finished(config, output, start):
            accelerator.print(f"{output} is already trained to step {settings.num_steps}; nothing to do")
            return 0
        return _train(config, output, accelerator, start, micro_batch_size, accumulation)


def _train(
    config: Config,
    output: Path,
    accelerator: Accelerator,
    start: Path | None,
    micro_batch_size: int,
    accumulation: int,
) -> int:
    settings = config.training

    # Data, model and averages. The averages are of the parameters as prepared: sharded under FSDP.
    source, vae = open_source(config, accelerator)
    flow, dtype = build_flow(config), torch.float64 if settings.precision == "fp64" else torch.float32
    model = build_model(config)
    if dtype == torch.float64:
        model.double()
    if settings.gradient_checkpointing:
        model.enable_gradient_checkpointing()
    if settings.compile:
        model.compile_repeated_blocks()
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, settings))
    bare = accelerator.unwrap_model(wrapped)
    ema = EMA(bare, settings.ema_decays)
    step, books = 0, {"skipped": 0, "loss_sum": 0.0, "loss_count": 0}
    if start is not None:
        checkpoint.restore(start, bare, optimizer.optimizer, ema)
        saved = checkpoint.read_state(start)
        step, books = saved["step"], {name: saved[name] for name in books}
        accelerator.print(f"going on from {start}")
    monitor = Monitor(config, output, accelerator, bare, ema, vae, source.class_names)

    samples = TrainingSet(
        source,
        latent_shape(config),
        settings.seed,
        settings.global_batch_size,
        null_label=bare.null_label,
        drop_prob=config.model.class_dropout_prob,
        flip=config.data.horizontal_flip,
    )
    keys = MicroBatches(
        step,
        settings.num_steps,
        settings.global_batch_size,
        micro_batch_size,
        accelerator.process_index,
        accelerator.num_processes,
    )
    batches = iter(
        DataLoader(
            samples,
            batch_sampler=keys,
            num_workers=config.data.num_workers,
            pin_memory=accelerator.device.type == "cuda",
            # A forked worker would share the lock of the run and hold it after the trainer's death.
            multiprocessing_context="spawn" if config.data.num_workers else None,
        )
    )

    def losses(batch: dict[str, Tensor]) -> Tensor:
        batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in batch.items()}
        x1 = batch["x1"] if "x1" in batch else encode_batch(vae, batch["image"], batch["posterior"])
        t = draw_timesteps(
            flow,
            batch["uniform"],
            config.flow.time_distribution,
            config.flow.logit_mean,
            config.flow.logit_std,
            config.flow.time_shift,
            (batch["position"], settings.global_batch_size) if config.flow.stratified else None,
        )
        return flow.loss(lambda x, t: wrapped(x, t, batch["label"]), x1.to(dtype), batch["x0"].to(dtype), t)

    bar = tqdm(total=settings.num_steps, initial=step, unit="step", disable=not accelerator.is_main_process)
    nonfinite_in_a_row, tick, tick_step = 0, time.perf_counter(), step
    with stop_signals() as stop_asked, bar:
        while True:
            if monitor.due(step):
                monitor.evaluate(step)
                tick, tick_step = time.perf_counter(), step
            if step == settings.num_steps:
                break

            # One step: the gradient of the mean loss over the global batch.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(step, settings)
            wrapped.train()
            total = torch.zeros((), device=accelerator.device, dtype=torch.float64)
            for micro in range(accumulation):
                batch = next(batches)
                sync = nullcontext() if micro == accumulation - 1 else accelerator.no_sync(wrapped)
                with sync, seeded(settings.seed, step, int(batch["position"][0]), accelerator.device):
                    with accelerator.autocast():
                        loss = losses(batch).sum() / (micro_batch_size * accumulation)
                    accelerator.backward(loss)
                total += loss.detach()
            norm = accelerator.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm or float("inf"))
            norm = norm.full_tensor() if hasattr(norm, "full_tensor") else norm
            # The one synchronisation of a step: what is not finite must not reach the weights, and all processes stop
            # after the same step.
            mean_loss, stop = accelerator.reduce(torch.stack([total, total.new_tensor(stop_asked())]), "mean").tolist()
            finite = math.isfinite(mean_loss) and bool(torch.isfinite(norm))
            if finite:
                optimizer.step()
                ema.update()
                books["loss_sum"], books["loss_count"] = books["loss_sum"] + mean_loss, books["loss_count"] + 1
            else:
                books["skipped"] += 1
            optimizer.zero_grad()
            nonfinite_in_a_row = 0 if finite else nonfinite_in_a_row + 1
            step += 1
            bar.update()

            # The log, the checkpoint, the guards.
            if step % settings.log_every == 0 or step == settings.num_steps:
                seconds, tick = time.perf_counter() - tick, time.perf_counter()
                line = {
                    "loss": books["loss_sum"] / books["loss_count"] if books["loss_count"] else None,
                    "grad_norm": float(norm) if finite else None,
                    "learning_rate": learning_rate(step - 1, settings),
                    "images_per_second": (step - tick_step) * settings.global_batch_size / seconds,
                    "skipped": books["skipped"],
                }
                tick_step = step
                books |= {"loss_sum": 0.0, "loss_count": 0}
                monitor.write(step, line)
                bar.set_postfix({name: f"{value:.4g}" for name, value in line.items() if value is not None})
            if step % settings.checkpoint_every == 0 or step == settings.num_steps or stop:
                save(accelerator, output / "checkpoints", step, bare, optimizer, ema, books, config)
            if stop:
                accelerator.print(f"\nstopped by a signal after step {step}; the same command goes on from there")
                return STOPPED
            if nonfinite_in_a_row == settings.max_nonfinite_steps:
                save(accelerator, output / "nonfinite", step, bare, optimizer, ema, books, config)
                size = settings.global_batch_size
                ids = [data_index(settings.seed, step - 1, position, size, len(source)) for position in range(size)]
                accelerator.print(
                    f"\nerror: loss or gradient was not finite in {nonfinite_in_a_row} steps in a row, the last one "
                    f"step {step} with the samples {ids}; state saved in {output / 'nonfinite'}; "
                    "lower training.learning_rate, or set training.max_grad_norm"
                )
                return NONFINITE
    accelerator.end_training()
    accelerator.print(f"{output}: samples.png, loss.png, metrics.json, pipeline/. Try next:\n{monitor.next_command()}")
    return 0


def save(
    accelerator: Accelerator,
    folder: Path,
    step: int,
    model: nn.Module,
    optimizer: Any,
    ema: EMA,
    books: dict[str, Any],
    config: Config,
) -> None:
    """Write a checkpoint and delete those that are not kept; when the disk is full, say so and go on without it."""
    tensors = checkpoint.gather(model, optimizer.optimizer, ema)
    if accelerator.is_main_process:
        try:
            checkpoint.save(folder, step, tensors, books, run.to_yaml(config))
            checkpoint.prune(folder, config.training.keep_last, config.training.keep_every)
        except (OSError, SafetensorError) as error:
            print(f"\nwarning: no checkpoint at step {step}: {error}; the older ones stay valid", flush=True)
    accelerator.wait_for_everyone()
