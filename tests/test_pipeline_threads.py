"""One pipeline in several threads: every call gives what it gives alone, and changes nothing that others see."""

import copy
import pickle
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Barrier

import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler
from tiny import tiny_pipeline
from torch import Tensor

from vit5gen import SiTPipeline
from vit5gen.config import SamplingConfig
from vit5gen.generation.many import SamplingJob, generate

STEPS = {"num_inference_steps": 4, "sampler": "ode-euler"}


def seed(value: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(value)


def together(calls: list[Callable]) -> list:
    """Run the calls at once, one a thread."""
    barrier = Barrier(len(calls))

    def begin(call: Callable) -> object:
        barrier.wait()
        return call()

    with ThreadPoolExecutor(len(calls)) as threads:
        return list(threads.map(begin, calls))


def with_attention() -> AutoencoderKL:
    """Return an autoencoder whose products of matrices depend on the process's precision."""
    blocks = {"down_block_types": ["DownEncoderBlock2D"], "up_block_types": ["UpDecoderBlock2D"]}
    return AutoencoderKL(**blocks, block_out_channels=[64], norm_num_groups=4, latent_channels=4).eval()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_calls_decode_as_alone(dtype: torch.dtype) -> None:
    pipe = tiny_pipeline()
    pipe.vae = with_attention()
    pipe.vae.to(dtype)
    weights = [parameter.data_ptr() for parameter in pipe.vae.parameters()]
    calls = [lambda i=i: pipe(i, generator=seed(i), output_type="pt", **STEPS).images for i in range(4)]
    expected = [call() for call in calls]
    for _ in range(2):
        assert all(map(torch.equal, together(calls), expected))
    assert {parameter.dtype for parameter in pipe.vae.parameters()} == {dtype}
    assert [parameter.data_ptr() for parameter in pipe.vae.parameters()] == weights


@pytest.mark.parametrize(
    "scheduler",
    [
        FlowMatchEulerDiscreteScheduler(),
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
    ],
)
def test_calls_share_no_state_of_a_scheduler(scheduler: object) -> None:
    pipe = tiny_pipeline()
    pipe.scheduler = scheduler
    before = dict(vars(scheduler))
    options = {"output_type": "latent"}
    calls = [lambda i=i: pipe(0, generator=seed(), num_inference_steps=i, **options).images for i in (2, 3, 5)]
    expected = [call() for call in calls]
    assert all(map(torch.equal, together(calls), expected))
    assert vars(scheduler).keys() == before.keys()
    assert scheduler.timesteps is before["timesteps"]


def test_what_a_callback_sets_holds_for_its_call_alone() -> None:
    pipe = tiny_pipeline()
    barrier = Barrier(3)

    def draw(change: Callable[[SiTPipeline], None]) -> tuple:
        seen = []

        def callback(p: SiTPipeline, i: int, t: float, given: dict[str, Tensor]) -> dict:
            if i == 0:
                barrier.wait()  # all of them run
                change(p)
                barrier.wait()
            seen.append((p.guidance_scale, p.interrupt, p.num_timesteps))
            return given

        options = STEPS | {"output_type": "latent", "callback_on_step_end": callback}
        images = pipe(0, 1.5, generator=seed(), **options).images
        return len(seen), seen[-1], pipe.num_evaluations, pipe.guidance_scale, images

    stop, guide, leave = together(
        [
            lambda: draw(lambda p: setattr(p, "_interrupt", True)),
            lambda: draw(lambda p: setattr(p, "_guidance_scale", 1.0)),
            lambda: draw(lambda p: None),
        ]
    )
    assert stop[:4] == (1, (1.5, True, 4), 2, 1.5)
    assert guide[:4] == (4, (1.0, False, 4), 5, 1.0)
    assert leave[:4] == (4, (1.5, False, 4), 8, 1.5)
    assert torch.equal(leave[4], pipe(0, 1.5, generator=seed(), output_type="latent", **STEPS).images)


def test_a_callback_may_call_the_pipeline() -> None:
    pipe = tiny_pipeline()
    options = STEPS | {"guidance_scale": 2.0, "output_type": "latent"}
    expected = pipe(0, generator=seed(), **options).images

    def preview(p: SiTPipeline, i: int, t: float, given: dict[str, Tensor]) -> dict:
        p(1, num_inference_steps=1, output_type="latent")
        assert (p.guidance_scale, p.num_timesteps) == (2.0, 4)
        return given

    assert torch.equal(pipe(0, generator=seed(), callback_on_step_end=preview, **options).images, expected)


def test_a_thread_without_calls_sees_the_latest_one() -> None:
    pipe = tiny_pipeline()
    with ThreadPoolExecutor(1) as thread:
        thread.submit(pipe, 0, 2.0, **STEPS).result()
    assert (pipe.guidance_scale, pipe.num_evaluations) == (2.0, 8)


def test_many_images_leave_the_progress_bar_as_it_was() -> None:
    pipe = tiny_pipeline()
    pipe.set_progress_bar_config(disable=False, leave=True)
    settings = SamplingConfig(sampler="ode-euler", num_inference_steps=2)
    for _, _ in generate(pipe, SamplingJob([0, 1], 0, batch_size=1, settings=settings)):
        assert pipe._progress_bar_config == {"disable": False, "leave": True}
        assert pipe.num_evaluations == 2


def test_copies_and_pickles_draw_the_same() -> None:
    pipe = tiny_pipeline()
    expected = pipe(0, generator=seed(), output_type="uint8", **STEPS).images
    for other in (copy.copy(pipe), copy.deepcopy(pipe), pickle.loads(pickle.dumps(pipe))):  # noqa: S301
        assert torch.equal(other(0, generator=seed(), output_type="uint8", **STEPS).images, expected)
        assert other.num_evaluations == 4


def offload_by_group(pipe: SiTPipeline, kind: str) -> None:
    for module in (pipe.transformer, pipe.vae):
        module.enable_group_offload(onload_device=torch.device("cpu"), offload_type=kind, num_blocks_per_group=1)


def offload_by_layer(pipe: SiTPipeline) -> None:
    for module in (pipe.transformer, pipe.vae):
        cpu_offload(module, execution_device=torch.device("cpu"))


def offload_by_model(pipe: SiTPipeline) -> None:
    _, hook = cpu_offload_with_hook(pipe.transformer, torch.device("cpu"))
    cpu_offload_with_hook(pipe.vae, torch.device("cpu"), prev_module_hook=hook)


def compile_decode(pipe: SiTPipeline) -> None:
    pipe.vae.decode = torch.compile(pipe.vae.decode, backend="eager")


@pytest.mark.parametrize(
    "change",
    [
        lambda pipe: offload_by_group(pipe, "block_level"),
        lambda pipe: offload_by_group(pipe, "leaf_level"),
        lambda pipe: pipe.enable_group_offload(torch.device("cpu"), offload_type="leaf_level"),
        offload_by_layer,
        offload_by_model,
        pytest.param(compile_decode, marks=pytest.mark.slow),
    ],
)
def test_offloading_and_compiling_change_no_image(change: Callable[[SiTPipeline], None]) -> None:
    exact = tiny_pipeline()
    pipe = tiny_pipeline()
    for one in (pipe, exact):
        one.to(torch.bfloat16)
    exact.vae.float()  # of the rounded weights, each once
    expected = exact(0, generator=seed(), output_type="pt", **STEPS).images
    change(pipe)
    for _ in range(2):
        assert torch.equal(pipe(0, generator=seed(), output_type="pt", **STEPS).images, expected)
    assert pipe.vae.dtype == torch.bfloat16
