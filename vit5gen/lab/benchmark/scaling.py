"""How time grows with tokens, batch, samples and processes, beside the growth of the work."""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from statistics import median

import torch

from vit5gen.config import Config
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.generation.scheduler import SiTScheduler
from vit5gen.lab.benchmark.engine import Pairs, Row, Setting, Sizes, fresh, race, ratio, row, seconds
from vit5gen.lab.benchmark.steps import OurStep, step_config
from vit5gen.training.build import build_model
from vit5gen.training.cost import communication_bytes
from vit5gen.training.dry_run import run_cost

SAMPLING_STEPS = 2


def rows(setting: Setting) -> Iterator[Row]:
    """Compare each size of a kind with the smallest one, which takes the place of the peer.

    ``exponent`` is that of time over size. What products bound grows with ``work exponent``, that of their FLOPs; less
    is the fixed part of a call, more is memory or communication.
    """
    sizes = setting.sizes
    small = replace(sizes, batch=sizes.batches[0])
    config = partial(step_config, backbone="vit5", precision="fp32", compile=False)
    by_tokens = [config(replace(small, latent_side=side)) for side in sizes.sides]
    by_batch = [config(replace(sizes, batch=batch)) for batch in sizes.batches]
    pipe = SiTPipeline(build_model(by_batch[0]).eval(), SiTScheduler(), None)
    pipe.set_progress_bar_config(disable=True)
    draw = partial(pipe, num_inference_steps=SAMPLING_STEPS, sampler="ode-heun", output_type="latent")
    # The number of tokens, images or samples, the work in FLOPs, and how to build the call that does it.
    kinds: dict[str, list[tuple[int, float, Callable[[], Callable[[], object]]]]] = {
        "tokens": [(run_cost(one).tokens, _work(one), partial(OurStep, one)) for one in by_tokens],
        "batch": [(one.training.global_batch_size, _work(one), partial(OurStep, one)) for one in by_batch],
        "samples": [(count, count, partial(partial, draw, [0] * count)) for count in sizes.batches],
    }
    for kind, ((least, least_work, build_least), *larger) in kinds.items():
        smallest = build_least()
        for number, work, build in larger:
            pairs, factor = race(build(), smallest, sizes), math.log(number / least)
            growth = _growth(pairs, factor, math.log(work / least_work) / factor)
            yield row(kind, str(number), str(least), pairs, growth)
    yield _processes(by_batch[-1], sizes)


def _work(config: Config) -> float:
    return run_cost(config).training_flops * config.training.global_batch_size


def _processes(config: Config, sizes: Sizes) -> Row:
    """Compare two processes with one, each with one thread, on the same global batch; in turn, afresh."""
    runs = range(sizes.fresh_repetitions)
    pairs = [(fresh(_step_time, config, sizes, count=2), fresh(_step_time, config, sizes)) for _ in runs]
    sent = communication_bytes(run_cost(config), config, accumulation=1, num_processes=2)
    return row("processes", "2", "1", pairs, _growth(pairs, math.log(2), -1) | {"MB sent": sent / 1e6})


def _growth(pairs: Pairs, factor: float, work_exponent: float) -> dict[str, float]:
    return {"exponent": -math.log(ratio(pairs)[0]) / factor, "work exponent": work_exponent}


def _step_time(config: Config, sizes: Sizes) -> float:
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate would choose a number for joined processes, and say so
    torch.set_num_threads(1)
    step = OurStep(config)
    return median([seconds(step) for _ in range(2 * sizes.warm_up)][sizes.warm_up :])
