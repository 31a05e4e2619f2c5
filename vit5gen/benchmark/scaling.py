"""How time grows with tokens, batch, samples and processes, beside the growth of the work."""

import math
from collections.abc import Callable, Iterator, Sequence
from functools import partial

import torch

from vit5gen.benchmark.processes import fresh
from vit5gen.benchmark.setting import Setting
from vit5gen.benchmark.timing import Row, alternate, row, seconds
from vit5gen.benchmark.train_step import OurStep, step_config
from vit5gen.config import Config
from vit5gen.cost import communication_bytes
from vit5gen.pipeline import SiTPipeline, SiTScheduler
from vit5gen.training.build import build_model
from vit5gen.training.plan import run_cost

BACKBONE = "vit5"
SAMPLING_STEPS = 2


def rows(setting: Setting) -> Iterator[Row]:
    """Compare every size with the smallest one, which takes the place of the peer."""
    sizes, batch = setting.sizes, setting.sizes.batches[0]
    config = partial(step_config, "fp32", backbone=BACKBONE)
    by_side = {side: config(side, batch) for side in sizes.sides}
    by_tokens = {run_cost(one).tokens: one for one in by_side.values()}
    by_batch = {count: config(sizes.latent_side, count) for count in sizes.batches}
    timed = partial(alternate, repetitions=sizes.repetitions, warm_up=sizes.warm_up)

    def grow(mode: str, measures: dict[int, Callable[[], object]], flops: Sequence[float]) -> Iterator[Row]:
        (least, smallest), *larger = measures.items()
        for (size, call), work in zip(larger, flops[1:], strict=True):
            found = row("scaling", mode, str(size), str(least), timed(seconds(call), seconds(smallest)))
            factor = math.log(size / least)
            yield found | {
                "exponent": -math.log(found["ratio"]) / factor,
                "work_exponent": math.log(work / flops[0]) / factor,
            }

    yield from grow("tokens", {n: OurStep(one) for n, one in by_tokens.items()}, [*map(_flops, by_tokens.values())])
    yield from grow("batch", {n: OurStep(one) for n, one in by_batch.items()}, [*map(_flops, by_batch.values())])
    pipe = SiTPipeline(build_model(by_batch[batch]).eval(), SiTScheduler(), None)
    pipe.set_progress_bar_config(disable=True)
    draw = partial(pipe, num_inference_steps=SAMPLING_STEPS, sampler="ode-heun", output_type="latent")
    yield from grow("samples", {n: partial(draw, [0] * n) for n in sizes.batches}, sizes.batches)
    yield _processes(by_batch[sizes.batches[-1]], sizes.repetitions, sizes.warm_up)


def _flops(config: Config) -> float:
    return run_cost(config).training_flops * config.training.global_batch_size


def _processes(config: Config, repetitions: int, warm_up: int) -> Row:
    """Compare two processes with one, at the same global batch and one thread each; not interleaved."""
    one, two = (fresh(_step_times, config, warm_up + repetitions, count=count)[warm_up:] for count in (1, 2))
    found = row("scaling", "processes", "2", "1", list(zip(two, one, strict=True)))
    sent = communication_bytes(run_cost(config), config, 1, 2)
    return found | {"exponent": -math.log2(found["ratio"]), "work_exponent": -1.0, "bytes_sent": sent}


def _step_times(config: Config, count: int) -> list[float]:
    torch.set_num_threads(1)
    step = seconds(OurStep(config))
    return [step() for _ in range(count)]
