"""The training loop: one function, readable top to bottom."""

import math
import time
from contextlib import ExitStack, closing, nullcontext
from pathlib import Path

import torch
from accelerate import Accelerator
from diffusers import AutoencoderKL
from safetensors import SafetensorError
from torch import Tensor, nn
from tqdm.auto import tqdm

from vit5gen.config import Config
from vit5gen.errors import UserError
from vit5gen.flow import Flow, draw_timesteps
from vit5gen.training import checkpoint, run
from vit5gen.training.build import build_flow, build_optimizer, build_trainee, check_values, learning_rate
from vit5gen.training.draws import data_index
from vit5gen.training.ema import EMA
from vit5gen.training.monitor import Monitor
from vit5gen.training.process import (
    autocast,
    batch_sizes,
    make_accelerator,
    memory_hint,
    on_main,
    seeded,
    stop_signals,
)
from vit5gen.training.sharding import whole
from vit5gen.training.source import encode_batch, micro_batches, open_source

STOPPED = 75  # exit code after SIGTERM or SIGINT: saved, the same command goes on (EX_TEMPFAIL)
NONFINITE = 70  # exit code after too many non-finite steps in a row (EX_SOFTWARE)


def train(config: Config, output: str | Path, resume: str = "auto", accept_changes: bool = False) -> int:
    """Train to ``training.num_steps`` in the folder ``output`` and return the exit code.

    A run is a function of its configuration: every draw depends on (seed, step, position in the global batch) alone,
    so that an interrupted run, resumed, equals an undisturbed one bit for bit.

    resume: ``auto`` goes on from the newest valid checkpoint of ``output``, ``never`` demands a new folder, a path
    names the checkpoint to go on from. accept_changes: go on although keys differ that change what is computed.
    Raises `UserError` for input that does not fit, when nothing is written, and for a disk or memory that is full, when
    the checkpoints stay valid.
    """
    settings, output = config.training, Path(output)
    accelerator = make_accelerator(settings, output)
    micro_batch_size, accumulation = batch_sizes(settings, accelerator.num_processes)
    check_values(config)  # before hours of encoding
    with ExitStack() as stack:
        on_main(accelerator, lambda: stack.enter_context(run.locked(output)))
        start = on_main(accelerator, lambda: run.find_start(config, output, resume, accept_changes))
        if run.finished(config, output, start):
            accelerator.print(f"{output} is already trained to step {settings.num_steps}; nothing to do")
            return 0
        try:
            code = _train(config, output, accelerator, start, micro_batch_size, accumulation)
        except OSError as error:
            raise UserError(f"{error}; checkpoints stay valid: mend it, and the same command goes on") from error
        accelerator.end_training()
        return code


def _train(
    config: Config,
    output: Path,
    accelerator: Accelerator,
    start: Path | None,
    micro_batch_size: int,
    accumulation: int,
) -> int:
    settings, checkpoints = config.training, output / "checkpoints"

    # Data, model and averages. The averages are of the parameters as prepared: sharded under FSDP.
    source, vae = open_source(config, accelerator)
    flow, model = build_flow(config), build_trainee(config)
    wrapped, optimizer = accelerator.prepare(model, build_optimizer(model, settings))
    bare = accelerator.unwrap_model(wrapped)
    state = checkpoint.State(bare, optimizer.optimizer, EMA(bare, settings.ema_decays))
    if start is not None:
        state.restore(start)
        accelerator.print(f"going on from {start}")
    on_main(accelerator, lambda: run.begin(config, output, state.step))
    batches = micro_batches(config, source, accelerator, state.step, micro_batch_size, bare.null_label)

    bar = tqdm(total=settings.num_steps, initial=state.step, unit="step", disable=not accelerator.is_main_process)
    stop, saved_step, nonfinite_in_a_row = False, state.step, 0
    with stop_signals() as stop_asked, closing(batches), bar:
        monitor = Monitor(config, output, accelerator, bare, state.ema, vae, source.class_names, stop_asked)
        tick, tick_step = time.perf_counter(), state.step
        while True:
            if not stop and monitor.due(state.step):
                bar.set_description("evaluate")
                stop = not monitor.evaluate(state.step)
                bar.set_description("train")
                bar.unpause()  # the time left is that of steps
                tick, tick_step = time.perf_counter(), state.step
            if stop:
                if state.step > saved_step:
                    save(accelerator, checkpoints, state, config)
                accelerator.print(f"\nstopped by a signal after step {state.step}; the same command goes on from there")
                return STOPPED
            if state.step == settings.num_steps:
                break

            # One step: the gradient of the mean loss over the global batch.
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(state.step, settings)
            wrapped.train()
            total = torch.zeros((), device=accelerator.device, dtype=next(bare.parameters()).dtype)
            with memory_hint(micro_batch_size):
                for micro in range(accumulation):
                    batch = next(batches)
                    sync = nullcontext() if micro == accumulation - 1 else accelerator.no_sync(wrapped)
                    first = (accelerator.process_index * accumulation + micro) * micro_batch_size
                    with sync, seeded(settings.seed, state.step, first, accelerator.device):
                        loss = losses(config, flow, vae, wrapped, batch).mean() / accumulation
                        loss.backward()
                    total += loss.detach()
                norm = nn.utils.clip_grad_norm_(wrapped.parameters(), settings.max_grad_norm or math.inf)
                # The one synchronisation of a step: what is not finite must not reach the weights, and all processes
                # stop after the same step.
                numbers = torch.stack([total, whole(norm).to(total), total.new_tensor(stop_asked())])
                loss_value, norm_value, stop_share = accelerator.reduce(numbers, "mean").tolist()
                finite = math.isfinite(loss_value) and math.isfinite(norm_value)
                if finite:
                    optimizer.step()
                    state.ema.update()
                optimizer.zero_grad()
            state.record(loss_value if finite else None)
            nonfinite_in_a_row = 0 if finite else nonfinite_in_a_row + 1
            stop = stop_share > 0
            bar.update()

            # The log, the checkpoint, the guard.
            last = state.step == settings.num_steps
            if state.step % settings.log_every == 0 or last:
                seconds, tick = time.perf_counter() - tick, time.perf_counter()
                line = {
                    "loss": state.mean_loss(),
                    "grad_norm": norm_value if finite else None,
                    "learning_rate": learning_rate(state.step - 1, settings),
                    "images_per_second": (state.step - tick_step) * settings.global_batch_size / seconds,
                    "skipped": state.skipped,
                }
                tick_step = state.step
                monitor.write(state.step, line)
                shown = {"loss": line["loss"], "norm": line["grad_norm"], "images/s": line["images_per_second"]}
                shown |= {"skipped": state.skipped} if state.skipped else {}
                bar.set_postfix(
                    {key: f"{value:.3g}" for key, value in shown.items() if value is not None}, refresh=False
                )
            if state.step % settings.checkpoint_every == 0 or last:
                save(accelerator, checkpoints, state, config)
                saved_step = state.step
            if nonfinite_in_a_row == settings.max_nonfinite_steps:
                save(accelerator, output / "nonfinite", state, config)
                size = settings.global_batch_size
                ids = [data_index(settings.seed, state.step - 1, i, size, len(source)) for i in range(size)]
                accelerator.print(
                    f"\nerror: loss or gradient was not finite in {nonfinite_in_a_row} steps in a row, the last one "
                    f"step {state.step} with the samples {ids}; state saved in {output / 'nonfinite'}; "
                    "lower training.learning_rate, or set training.max_grad_norm"
                )
                return NONFINITE
    accelerator.print(f"{output}: samples.png, loss.png, metrics.json, pipeline/. Try next:\n{monitor.next_command()}")
    return 0


def losses(config: Config, flow: Flow, vae: AutoencoderKL, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    """Return the loss of every sample (B,) of a micro-batch, whose random numbers it brings along."""
    settings, dtype = config.flow, torch.float64 if config.training.precision == "fp64" else torch.float32
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
    with autocast(config.training, x1.device):
        return flow.loss(lambda x, t: model(x, t, batch["label"]), x1.to(dtype), batch["x0"].to(dtype), t)


def save(accelerator: Accelerator, folder: Path, state: checkpoint.State, config: Config) -> None:
    """Write a checkpoint and delete those that are not kept; when the disk is full, say so and go on without it."""
    tensors = state.gather(keep=accelerator.is_main_process)
    if accelerator.is_main_process:
        try:
            checkpoint.save(folder, state.step, tensors, state.numbers(), run.to_yaml(config))
            checkpoint.prune(folder, state.step, config.training.keep_last, config.training.keep_every)
        except (OSError, SafetensorError) as error:
            print(f"\nwarning: no checkpoint at step {state.step}: {error}; the older ones stay valid", flush=True)
    accelerator.wait_for_everyone()
