"""Training steps: ours against published SiT, `vit5` against our `sit`, and large against small ones.

Compared are their time on CPU and GPU, where networks draw too, its growth with size, and their memory.
"""

import math
import operator
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from copy import deepcopy
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import nn

from vit5gen.config import Config
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.generation.scheduler import SiTScheduler
from vit5gen.lab.benchmark.engine import FULL, QUICK, Pairs, Row, Setting, Sizes, fresh, race, ratio, row, seconds
from vit5gen.lab.benchmark.peak_memory import peak_of
from vit5gen.lab.benchmark.peers import SIT, check_equal, load, running
from vit5gen.models import load_sit
from vit5gen.models.transformer import SIZES
from vit5gen.section import validate
from vit5gen.system.cpu import fast_products
from vit5gen.system.distributed import processes
from vit5gen.system.errors import UserError
from vit5gen.system.precision import PRECISIONS, resolve
from vit5gen.training.batches import RandomLatents, micro_batches
from vit5gen.training.build import build_model
from vit5gen.training.cost import communication_bytes, find_gpu, mfu
from vit5gen.training.dry_run import run_cost
from vit5gen.training.loop import build_trainer, train_step
from vit5gen.training.process import make_accelerator

TOLERANCE = 1e-4  # of an output's norm, in fp32
GPU_MODES = {"tf32": "tf32", "bf16": "bf16", "fastest": "bf16"}  # of ours; the published code sets TF32
STEPS = 3  # whose peak memory is measured
GPU_SECONDS = 480  # a row that may end later is not begun: who lends GPUs counts minutes
GUIDANCE = 1.5  # of drawings on a GPU
DRAWING: dict[str, Any] = {"num_inference_steps": 2, "sampler": "ode-heun", "output_type": "latent"}
Peak = tuple[float, float]  # beyond the present, and absolute


class SmallGpuError(UserError):
    """The models do not fit the GPU."""


def modes() -> dict[str, str]:
    """Return the precision of ours in each mode that this CPU has instructions for; compiled in all of them.

    The published code has fp32 alone; in "bf16" it is put under autocast, in "fastest" it stays as it is.
    """
    fastest = resolve("auto", torch.device("cpu"))
    return {"fp32": "fp32", fastest: fastest, "fastest": fastest}


def step_config(sizes: Sizes, backbone: str = "sit", **training: Any) -> Config:
    """Return the configuration of a model that has all that the published one has, compiled."""
    sections = {
        "model": {"backbone": backbone, "preset": sizes.preset, "num_layers": sizes.num_layers, "learn_sigma": True},
        "data": {"resolution": 8 * sizes.latent_side},
        "training": {"global_batch_size": sizes.batch, "trackers": [], "compile": True, **training},
    }
    return validate(Config, sections, "benchmark")


class OurStep:
    """One step of the training loop a call; source: the data, by default `RandomLatents`."""

    def __init__(self, config: Config, source: Any = None) -> None:
        accelerator = make_accelerator(config.training, Path())
        self.config, self.trainer = config, build_trainer(config, accelerator)
        source = source or RandomLatents(config.latent_shape, config.num_classes)
        self.batches = micro_batches(config, source, None, accelerator)

    def __call__(self) -> None:
        finite = train_step(self.trainer, self.config, self.batches).finite
        assert finite


def published_step(folder: Path, sizes: Sizes, autocast: bool = False) -> Callable[[], None]:
    """Return the training step of the published train.py: its model, loss, optimizer and average, as they are.

    Raises `PeerError` where ``folder`` is no checkout of it.
    """
    peer, side, batch, device = load(SIT, folder), sizes.latent_side, sizes.batch, processes().device
    model = _published_model(peer, sizes).to(device)
    ema = deepcopy(model).requires_grad_(False).eval()
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, weight_decay=0)
    transport = peer.create_transport()
    peer.update_ema(ema, model, decay=0)
    model.train()
    x, y = torch.randn(batch, 4, side, side, device=device), torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16, enabled=autocast):
            loss = transport.training_losses(model, x, {"y": y})["loss"].mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        peer.update_ema(ema, model)
        loss.item()

    return step


def _published_model(peer: SimpleNamespace, sizes: Sizes) -> nn.Module:
    return peer.SiT_models[f"SiT-{sizes.preset}"](input_size=sizes.latent_side, num_classes=1000)


def check_published(folder: Path) -> None:
    """Take a step of a tiny size, and compare the model with ours, which is given its weights.

    They are drawn at random, for its initial ones give zeros. Raises `PeerError` for code that fails and other models.
    """
    sizes, generator = QUICK, torch.Generator().manual_seed(0)
    with running(SIT, folder):
        published_step(folder, sizes)()
        theirs = _published_model(load(SIT, folder), sizes).eval()
        with torch.no_grad():
            for parameter in theirs.parameters():
                parameter.normal_(std=0.1, generator=generator)
            ours = load_sit(theirs.state_dict(), num_attention_heads=SIZES["S"][2])
            x = torch.randn(2, 4, sizes.latent_side, sizes.latent_side, generator=generator)
            inputs = x, torch.tensor([0.2, 0.7]), torch.tensor([0, 999])
            expected = theirs(*inputs)
            difference = float((ours(*inputs) - expected).norm() / expected.norm())
    check_equal(folder, f"SiT-{sizes.preset}", difference, "of its output", TOLERANCE)


def on_cpu(setting: Setting) -> Iterator[Row]:
    """Compare steps of the same batch, each with all that it needs from latents to averaged weights.

    Raises `PeerError` where ``setting.sit`` is no checkout of the peer.
    """
    sit, sizes, measure = setting.sit, setting.sizes, cache(operator.call)  # the fastest may be fp32 once more
    for mode, precision in modes().items() if sit is not None else ():
        yield measure(against_published, sit, sizes, precision, mode == "bf16") | {"mode": mode}
    yield against_sit(sizes, modes()["fastest"])


def on_gpu(setting: Setting) -> Iterator[Row]:
    """Compare steps and drawings of XL/2, each in a process that may use the GPU; without one, tiny sizes on the CPU.

    What is not begun within `GPU_SECONDS`, as long as the longest row so far before their end, is told.
    Raises `PeerError` where ``setting.sit`` is no checkout of the peer.
    """
    sizes = setting.sizes
    if sizes == FULL:
        if not torch.cuda.is_available():
            setting.note("gpu: skipped because there is no GPU")
            return
        sizes = replace(sizes, preset="XL/2", batch=32)  # of one of the eight GPUs that share the published 256
    own = {"train-step": against_sit, "sampling": drawing_against_sit}
    start, longest = time.monotonic(), 0.0
    for name in setting.rows:
        if name in GPU_MODES and setting.sit is None:
            continue
        if (begun := time.monotonic()) + longest > start + GPU_SECONDS:
            setting.note(f"gpu: {name} is skipped for lack of time; --rows {name} measures it alone")
            continue
        try:
            if name in own:
                yield fresh(_with_gpu, own[name], sizes, GPU_MODES["fastest"])
            else:
                call = against_published, setting.sit, sizes, GPU_MODES[name], name == "bf16"
                yield fresh(_with_gpu, *call) | {"mode": name}
        except SmallGpuError as error:
            setting.note(str(error))
        longest = max(longest, time.monotonic() - begun)


def _with_gpu(compare: Callable[..., Row], *arguments: Any) -> Row:
    os.environ.pop("ACCELERATE_USE_CPU")  # which all other benchmarks want
    try:
        return compare(*arguments)
    except (torch.OutOfMemoryError, UserError) as error:
        if not isinstance(error.__cause__ or error, torch.OutOfMemoryError):
            raise
        needed = "training the published XL/2 and ours side by side takes about 70 GB"
        raise SmallGpuError(f"gpu: out of memory; {needed}") from error


def against_published(sit: Path, sizes: Sizes, precision: str, autocast: bool) -> Row:
    """Return the row, but for its mode, of our step in a precision and of the published one, perhaps in autocast."""
    config = step_config(sizes, precision=precision)
    pairs = race(OurStep(config), published_step(sit, sizes, autocast), sizes)
    return row("", "sit", "sit", pairs, _utilisation(config, _work(config), median(ours for ours, _ in pairs)))


def against_sit(sizes: Sizes, precision: str) -> Row:
    """Return the row of the steps of our two backbones."""
    configs = [step_config(sizes, backbone, precision=precision) for backbone in ("vit5", "sit")]
    vit5, sit = map(OurStep, configs)
    pairs = race(vit5, sit, sizes)
    return _backbones("fastest", configs, [_work(config) for config in configs], pairs)


def drawing_against_sit(sizes: Sizes, precision: str) -> Row:
    """Return the row of drawing guided latents by our two backbones, compiled as in training."""
    configs = [step_config(sizes, backbone, precision=precision) for backbone in ("vit5", "sit")]
    pipes = [_pipeline(config) for config in configs]
    vit5, sit = (partial(pipe, [0] * sizes.batch, guidance_scale=GUIDANCE, **DRAWING) for pipe in pipes)
    pairs = race(vit5, sit, sizes)
    passes = [sizes.batch * pipe.num_evaluations for pipe in pipes]
    work = [number * run_cost(config).forward_flops for number, config in zip(passes, configs, strict=True)]
    return _backbones("sampling", configs, work, pairs)


def _pipeline(config: Config) -> SiTPipeline:
    """Return a pipeline that draws latents in the precision of the training, compiled where that is."""
    pipe = SiTPipeline(build_model(config).eval(), SiTScheduler(), None).to(processes().device)
    pipe.set_progress_bar_config(disable=True)
    PRECISIONS[config.training.precision].cast_for_sampling(pipe.transformer)
    if config.training.compile:
        pipe.transformer.compile_repeated_blocks()
    return pipe


def _backbones(mode: str, configs: Sequence[Config], work: Sequence[float], pairs: Pairs) -> Row:
    """Return a row of `vit5` and `sit`, with the speed of both."""
    medians = np.median(pairs, axis=0).tolist()
    ours, peers = (_utilisation(*one) for one in zip(configs, work, medians, strict=True))
    return row(mode, "vit5", "vit5gen-sit", pairs, ours | {f"peer's {name}": value for name, value in peers.items()})


def _utilisation(config: Config, flops: float, taken: float) -> dict[str, float]:
    """Return the speed of ``flops`` in ``taken`` seconds, and its shares of the GPU's peak and of a product's speed.

    The product is the largest of the step, alone, in its precision.
    """
    cost, batch, device, speed = run_cost(config), config.training.global_batch_size, processes().device, flops / taken
    gpu = find_gpu(torch.cuda.get_device_name(device) if device.type == "cuda" else "")
    shares = {} if gpu is None else {"MFU": mfu(speed, gpu, str(config.training.precision))}
    assert config.model.preset is not None
    width, precision = SIZES[config.model.preset.partition("/")[0]][0], PRECISIONS[config.training.precision]
    dtype = precision.rounded or precision.weights
    a = torch.ones(batch * cost.tokens, width, dtype=dtype, device=device)
    b = torch.ones(width, 4 * width, dtype=dtype, device=device)
    with fast_products():
        product = 2 * a.numel() * 4 * width / min(seconds(lambda: a @ b) for _ in range(20))
    shares["share of a product's speed"] = speed / product
    return {"GFLOP/s": speed / 1e9, **shares}


def memory(setting: Setting) -> Iterator[Row]:
    """Compare what training takes beyond the imports of its code; the absolute peaks are listed too.

    Raises `PeerError` where ``setting.sit`` is no checkout of the peer.
    """
    if setting.sit is None:
        return
    if sys.platform != "linux":
        setting.note("memory: skipped because peaks are read from Linux's /proc")
        return
    sit, sizes, precisions = setting.sit, setting.sizes, modes()

    @cache
    def measure(precision: str, checkpointing: bool) -> list[tuple[Peak, Peak]]:
        ours = partial(OurStep, step_config(sizes, precision=precision, gradient_checkpointing=checkpointing))
        theirs = partial(published_step, sit, sizes)
        return [(fresh(peak, ours), fresh(peak, theirs, sit)) for _ in range(sizes.fresh_repetitions)]

    for mode in ("fp32", "fastest"):
        for checkpointing in (False, True):
            growth, absolute = np.moveaxis(np.array(measure(precisions[mode], checkpointing)), -1, 0).tolist()
            highest = dict(zip(("our_peak", "peer_peak"), map(max, zip(*absolute, strict=True)), strict=True))
            yield row(mode + "-checkpointing" * checkpointing, "sit", "sit", growth, highest, "MB")


def peak(build: Callable[[], Callable[[], None]], sit: Path | None = None) -> Peak:
    """Return (growth over the present, absolute) peak memory of this process after some steps, in MB.

    sit: checkout whose imports do not count.
    """
    if sit is not None:
        load(SIT, sit)

    def steps() -> None:
        step = build()
        for _ in range(STEPS):
            step()

    return peak_of(steps)[1:]


def scaling(setting: Setting) -> Iterator[Row]:
    """Compare each size of a kind with the smallest one, which takes the place of the peer.

    ``exponent`` is that of time over size. What products bound grows with ``work exponent``, that of their FLOPs; less
    is the fixed part of a call, more is memory or communication.
    """
    sizes = setting.sizes
    small = replace(sizes, batch=sizes.batches[0])
    config = partial(step_config, backbone="vit5", precision="fp32", compile=False)
    by_tokens = [config(replace(small, latent_side=side)) for side in sizes.sides]
    by_batch = [config(replace(sizes, batch=batch)) for batch in sizes.batches]
    draw = partial(_pipeline(by_batch[0]), **DRAWING)
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
    """Compare two processes with one, each with one thread, on the same global batch; in turn, always new ones."""
    runs = range(sizes.fresh_repetitions)
    pairs = [(fresh(_step_time, config, sizes, count=2), fresh(_step_time, config, sizes)) for _ in runs]
    sent = communication_bytes(run_cost(config), config, num_processes=2)
    return row("processes", "2", "1", pairs, _growth(pairs, math.log(2), -1) | {"MB sent": sent / 1e6})


def _growth(pairs: Pairs, factor: float, work_exponent: float) -> dict[str, float]:
    return {"exponent": -math.log(ratio(pairs)[0]) / factor, "work exponent": work_exponent}


def _step_time(config: Config, sizes: Sizes) -> float:
    os.environ["OMP_NUM_THREADS"] = "1"  # accelerate would choose a number for joined processes, and say so
    torch.set_num_threads(1)
    step = OurStep(config)
    return median([seconds(step) for _ in range(2 * sizes.warm_up)][sizes.warm_up :])
