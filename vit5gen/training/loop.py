"""The training loop: one function, readable top to bottom."""

import time
from contextlib import ExitStack, closing
from functools import partial
from pathlib import Path

from accelerate import Accelerator
from safetensors import SafetensorError
from tqdm.auto import tqdm

from vit5gen.config import Config
from vit5gen.system.distributed import on_main
from vit5gen.system.errors import UserError
from vit5gen.training import checkpoint
from vit5gen.training import folder as run
from vit5gen.training.build import check_values, learning_rate
from vit5gen.training.data import nonfinite_advice, open_source
from vit5gen.training.monitor import Monitor
from vit5gen.training.process import SaveClock, batch_sizes, make_accelerator, stop_signals
from vit5gen.training.random import data_index
from vit5gen.training.trainer import Trainee

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
    output = Path(output)
    accelerator = make_accelerator(config.training, output)
    batch_sizes(config.training, accelerator.num_processes)
    check_values(config)  # before hours of encoding
    with ExitStack() as stack:
        on_main(lambda: stack.enter_context(run.locked(output)))
        start, config = on_main(partial(run.find_start, config, output, resume, accept_changes))
        if run.finished(config, output, start):
            accelerator.print(f"{output} is already trained to step {config.training.num_steps}; nothing to do")
            return 0
        try:
            code = _train(config, output, accelerator, start, accept_changes)
        except (OSError, SafetensorError) as error:
            raise UserError(f"{error}; checkpoints stay valid: mend it, and the same command goes on") from error
        accelerator.end_training()
        return code


def _train(config: Config, output: Path, accelerator: Accelerator, start: Path | None, accept_changes: bool) -> int:
    settings, checkpoints = config.training, output / "checkpoints"

    # Data, model, optimizer and averages.
    source, vae, data = open_source(
        config, accelerator, lambda data: on_main(partial(run.check_data, start, accept_changes, data))
    )
    trainee = Trainee(config, accelerator, vae)
    state = checkpoint.State(trainee.model, trainee.optimizer.optimizer, trainee.ema)
    if start is not None:
        state.restore(start)
        unknown = "" if state.data else ", which does not record its data, so that these cannot be compared with it"
        accelerator.print(f"going on from {start}{unknown}")
    state.data |= {key: value for key, value in data.items() if value is not None}  # old latents know no digest
    on_main(lambda: run.begin(config, output, state.step, data))
    batches = trainee.batches(source, state.step)

    bar = tqdm(total=settings.num_steps, initial=state.step, unit="step", disable=not accelerator.is_main_process)
    stop, saved_step, nonfinite_in_a_row, clock = False, state.step, 0, SaveClock(settings.checkpoint_minutes)
    with stop_signals() as stop_asked, closing(batches), bar:
        monitor = Monitor(config, output, accelerator, state.model, state.ema, vae, source.class_names, stop_asked)
        tick, tick_step = time.perf_counter(), state.step
        while True:
            if not stop and monitor.due(state.step):
                bar.set_description("evaluate")
                stop = not monitor.evaluate(state.step)
                bar.set_description("train")
                bar.unpause()  # the time left is that of steps
                tick, tick_step = time.perf_counter(), state.step
            last = state.step == settings.num_steps
            if (stop or last) and state.step > saved_step and save(accelerator, checkpoints, state, config):
                saved_step = state.step
            if stop:
                there = "there" if saved_step == state.step else "its newest checkpoint"
                accelerator.print(
                    f"\nstopped by a signal after step {state.step}; the same command goes on from {there}"
                )
                return STOPPED
            if last:
                if saved_step < state.step:
                    raise UserError(
                        f"{checkpoints}: the last step is not saved; make room, and the same command goes on"
                    )
                break

            done = trainee.step(state.step, batches, stop_asked, clock.due)
            state.record(done.loss if done.finite else None)
            nonfinite_in_a_row = 0 if done.finite else nonfinite_in_a_row + 1
            stop = done.stop
            bar.update()

            # The log, the checkpoint, the guard.
            last = state.step == settings.num_steps
            if state.step % settings.log_every == 0 or last:
                seconds, tick = time.perf_counter() - tick, time.perf_counter()
                line = {
                    "loss": state.mean_loss(),
                    "grad_norm": done.grad_norm if done.finite else None,
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
            if state.step % (settings.checkpoint_every or 1) == 0 or done.save or last:
                saved_step = state.step if save(accelerator, checkpoints, state, config) else saved_step
                clock.restart()
            if nonfinite_in_a_row == min(settings.max_nonfinite_steps, settings.num_steps):
                save(accelerator, output / "nonfinite", state, config)
                size = settings.global_batch_size
                ids = [data_index(settings.seed, state.step - 1, i, size, len(source)) for i in range(size)]
                accelerator.print(
                    f"\nerror: loss or gradient was not finite in {nonfinite_in_a_row} steps in a row, the last one "
                    f"step {state.step} with the samples {ids}; state saved in {output / 'nonfinite'}; "
                    f"{nonfinite_advice(source, vae, ids, config.data.horizontal_flip)}"
                )
                return NONFINITE
    accelerator.print(f"{output}: samples.png, loss.png, metrics.json, pipeline/. Try next:\n{monitor.next_command()}")
    return 0


def save(accelerator: Accelerator, folder: Path, state: checkpoint.State, config: Config) -> bool:
    """Write a checkpoint and delete those that are not kept; return False, having said so, when the disk is full."""
    tensors = state.gather(keep=accelerator.is_main_process)

    def write() -> bool:
        try:
            checkpoint.save(folder, state.step, tensors, state.entries(), run.to_yaml(config))
            checkpoint.prune(folder, state.step, config.training.keep_last, config.training.keep_every)
        except (OSError, SafetensorError) as error:
            print(f"\nwarning: no checkpoint at step {state.step}: {error}; the older ones stay valid", flush=True)
            return False
        return True

    return on_main(write)
