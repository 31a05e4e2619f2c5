"""The pipeline against ten-line loops, diffusers' own schedulers, and the habits of diffusers' pipelines."""

import json
import os
import subprocess
import sys
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    UniPCMultistepScheduler,
)
from diffusers.callbacks import PipelineCallback
from tiny import NAMES, tiny_autoencoder, tiny_pipeline, tiny_transformer

from vit5gen import SiTPipeline, SiTScheduler, SiTTransformer2DModel
from vit5gen.config import DrawConfig, SamplingConfig
from vit5gen.evaluation.evaluation_card import open_samples
from vit5gen.flow import Flow, GuidedModel, sample_ode, sample_sde
from vit5gen.generation.card import TrainingFacts, pipeline_hash
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.scheduler import SAMPLERS
from vit5gen.system.errors import UserError

EULER = {"num_inference_steps": 6, "sampler": "ode-euler", "output_type": "latent"}


@pytest.fixture
def pipe() -> SiTPipeline:
    return tiny_pipeline()


def seeds(*values: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(value) for value in values]


def seed(value: int = 0) -> torch.Generator:
    return seeds(value)[0]


# --- labels


@pytest.mark.parametrize(
    ("given", "ids"),
    [
        (3, [3]),
        (np.int64(2), [2]),
        ("Golden Retriever", [0]),
        ("golden retriever, retriever", [0]),
        ("retriever", [0]),
        ("7", [3]),  # a name wins over a number
        ("crane", [1]),  # and exact spelling over case
        ("Crane ", [2]),
        ([0, "smileys & emotion", np.int32(1)], [0, 4, 1]),
        ((1, 2), [1, 2]),
        (range(2), [0, 1]),
        (torch.tensor([4, 0]), [4, 0]),
        (torch.tensor(4), [4]),
        (np.array([1]), [1]),
    ],
)
def test_class_labels_are_ids_names_or_both(pipe: SiTPipeline, given: object, ids: list[int]) -> None:
    assert pipe.class_ids(given) == ids


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ("golden retreiver", "Did you mean 'golden retriever'"),
        ("zzz", "one of .*golden retriever.*, or an id in 0..4"),
        ("CRANE", r"several classes; give one of the ids \[1, 2\], or the exact name: one of 'crane', 'Crane'"),
        (5, r"class 5 does not exist; expected an id in 0\.\.4"),
        (-1, "class -1 does not exist"),
        ("12", "class 12 does not exist"),
        (True, "True is neither an id nor a name"),
        (1.5, "1.5 is neither"),
        ([None], "None is neither"),
        ([0.5, 0.5], r"0.5 is neither .*; weights over classes are rows: \[\[0.5, 0.5, 0, ...\]\]"),
        ([0, [1.0, 0, 0, 0, 0]], r"\[1.0, 0, 0, 0, 0\] is neither"),
        ([[0.5, 0.5]], "row 0 has 2 weights; expected one for each of the 5 classes"),
        ([[1, 0, 0, 0, 0], [0.5, 0.6, 0, 0, 0]], "row 1: its weights sum to 1.1; expected 1"),
        ([[0.5, 1.5, -1, 0, 0]], "row 0 has the weight -1.0; expected finite numbers of at least 0"),
        (np.array([[np.nan, 1, 0, 0, 0]]), "row 0 has the weight nan"),
        ([[0, 1], ["retriever"]], r"\[0, 1\] is neither an id nor a name; expected an id, a name or a flat list"),
        (np.array([0.5]), "0.5 is neither"),
        ([], "class_labels: empty"),
    ],
)
def test_labels_that_do_not_exist(pipe: SiTPipeline, given: object, message: str) -> None:
    with pytest.raises(UserError, match=message):
        pipe(given, **EULER)


NUMBERED = {0: "1", 1: "2", 2: "10", 3: "caf\u00e9", 4: "caf\udce9"}


@pytest.mark.parametrize(("given", "id_"), [("10", 2), ("cafe\u0301", 3), ("CAFE\u0301", 3), ("caf\udce9", 4), (2, 2)])
def test_names_are_compared_composed(pipe: SiTPipeline, given: object, id_: int) -> None:
    named = SiTPipeline(**pipe.components, id2label=NUMBERED)
    assert named.class_ids(given) == [id_]


@pytest.mark.parametrize("given", ["3", "07", "\u0663", "-1", "+3", "1_0", "\u00b2", "9" * 5000, "", " "])
def test_a_number_is_no_id_where_all_names_are_numbers(pipe: SiTPipeline, given: str) -> None:
    named = SiTPipeline(**pipe.components, id2label={0: "1", 1: "2", 2: "10", 3: "11", 4: "12"})
    with pytest.raises(UserError, match="does not exist; expected one of 1, 2, 10, 11, 12") as refused:
        named.class_ids(given)
    assert "an id" not in str(refused.value)
    if not given.isascii() or not given.isdecimal() or len(given) > 18:
        with pytest.raises(UserError, match=r"does not exist; expected an id in 0\.\.4"):
            SiTPipeline(**pipe.components).class_ids(given)


def test_a_number_beside_other_names_is_an_id_but_not_in_silence(pipe: SiTPipeline) -> None:
    with pytest.warns(UserWarning, match="no class is named '4'; using it as id 4"):
        assert pipe.class_ids("4") == [4]


@pytest.mark.parametrize("names", [["cat", "dog"], {"one": "cat"}, {0: 5}, {-1: "cat"}, {1.5: "cat"}, 3, {0: None}])
def test_class_names_of_other_types_are_refused(pipe: SiTPipeline, names: object) -> None:
    with pytest.raises(UserError, match=r"id2label = .*; expected the names of classes by id"):
        SiTPipeline(**pipe.components, id2label=names)


# --- numbers


def test_equals_a_plain_euler_loop_with_guided_channels(pipe: SiTPipeline) -> None:
    x = torch.randn(2, 4, 8, 8, generator=seed())
    options = {"guidance_scale": 1.5, "guidance_channels": 3, "latents": x}
    result = pipe([0, 4], **EULER, **options).images
    labels, null = torch.tensor([0, 4]), torch.full((2,), 5)
    with torch.no_grad():
        for i in range(6):
            t = torch.full((2,), i / 6)
            c, u = pipe.transformer(x, t, labels), pipe.transformer(x, t, null)
            guided = torch.cat([(u + 1.5 * (c - u))[:, :3], c[:, 3:]], dim=1)
            x = x + guided / 6
    torch.testing.assert_close(result, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", SAMPLERS.names())
@pytest.mark.parametrize("prediction", ["velocity", "noise", "data"])
def test_equals_the_flows_own_solver(pipe: SiTPipeline, sampler: str, prediction: str) -> None:
    pipe.scheduler = SiTScheduler(prediction=prediction)
    result = pipe(1, num_inference_steps=5, sampler=sampler, output_type="latent", generator=seed()).images
    kind, method = sampler.split("-")
    noise, flow = seed(), Flow(prediction=prediction)
    x = torch.randn(1, 4, 8, 8, generator=noise)

    def model_fn(x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return pipe.transformer(x, t, torch.tensor([1]))

    if kind == "ode":
        expected = sample_ode(flow, model_fn, x, 5, method=method)
    else:
        expected = sample_sde(flow, model_fn, x, 5, method=method, noise=noise)
    torch.testing.assert_close(result, expected, rtol=0, atol=0)


def test_default_is_fifty_steps_of_heun(pipe: SiTPipeline) -> None:
    default = pipe(1, generator=seed(), output_type="latent").images
    explicit = pipe(1, generator=seed(), output_type="latent", num_inference_steps=50, sampler="ode-heun").images
    assert torch.equal(default, explicit)


@pytest.mark.parametrize("steps", [1, 10, 50])
def test_diffusers_euler_equals_ours(pipe: SiTPipeline, steps: int) -> None:
    options = {"num_inference_steps": steps, "output_type": "latent", "guidance_scale": 2.0}
    ours = pipe([0, 1], sampler="ode-euler", generator=seed(), **options).images
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    theirs = pipe([0, 1], generator=seed(), **options).images
    torch.testing.assert_close(theirs, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("prediction", ["score", "noise", "data"])
def test_a_foreign_scheduler_gets_the_velocity_of_any_prediction(prediction: str) -> None:
    pipe = SiTPipeline(tiny_transformer(), SiTScheduler(prediction=prediction))
    pipe.set_progress_bar_config(disable=True)
    latents = torch.randn(1, 4, 8, 8, generator=seed())
    times: list[float] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: times.append(args[1][0].item()))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    sigmas = 1 - 0.05 - np.arange(4) / 8  # away from both ends, where score and noise say nothing
    pipe.scheduler.set_timesteps = lambda sigmas_, device: None
    FlowMatchEulerDiscreteScheduler.set_timesteps(pipe.scheduler, sigmas=sigmas)
    result = pipe(1, num_inference_steps=4, latents=latents.clone(), output_type="latent").images
    flow, x = Flow(prediction=prediction), latents
    grid = [*(1 - sigmas), 1.0]
    with torch.no_grad():
        for t, end in pairwise(grid):
            x = x + (end - t) * flow.velocity(lambda x, t: pipe.transformer(x, t, torch.tensor([1])), x, t)
    torch.testing.assert_close(result, x, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "scheduler",
    [
        UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        DPMSolverMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True),
        FlowMatchHeunDiscreteScheduler(),
        FlowMatchEulerDiscreteScheduler(shift=3.0),
    ],
)
def test_diffusers_flow_schedulers_reach_the_same_images(pipe: SiTPipeline, scheduler: object) -> None:
    exact = pipe([0, 1], num_inference_steps=100, sampler="ode-rk4", generator=seed(), output_type="latent").images
    pipe.scheduler = scheduler
    theirs = pipe([0, 1], num_inference_steps=100, generator=seed(), output_type="latent").images
    assert (theirs - exact).abs().max() < 0.02 * exact.abs().max()


def test_autoguidance_is_linear_in_both_models(pipe: SiTPipeline) -> None:
    pipe.guide = tiny_transformer(seed=9)
    x = torch.randn(1, 4, 8, 8, generator=seed())
    options = EULER | {"num_inference_steps": 1}
    result = pipe(1, autoguidance_scale=3.0, latents=x, **options).images
    t, label = torch.zeros(1), torch.tensor([1])
    with torch.no_grad():
        strong, weak = pipe.transformer(x, t, label), pipe.guide(x, t, label)
    torch.testing.assert_close(result, x + weak + 3 * (strong - weak), rtol=0, atol=1e-5)


def test_a_guide_of_other_data_is_refused(pipe: SiTPipeline) -> None:
    for options, message in (
        ({"num_classes": 3}, "guide: num_classes = 3, the transformer has 5"),
        ({"in_channels": 8}, "guide: in_channels = 8, the transformer has 4"),
    ):
        pipe.guide = tiny_transformer(**options)
        pipe(0, **EULER)
        with pytest.raises(UserError, match=message):
            pipe(0, autoguidance_scale=2.0, **EULER)


# --- costs


@pytest.mark.parametrize(
    ("options", "forwards", "rows"),
    [
        ({}, 8, 16),
        ({"guidance_scale": 2.0}, 8, 32),  # one batched forward
        ({"guidance_scale": 2.0, "guidance_interval": (0.5, 1.0)}, 8, 24),
        ({"guidance_scale": 2.0, "guidance_interval": (0.99, 1.0)}, 8, 16),
    ],
)
def test_forwards(pipe: SiTPipeline, options: dict, forwards: int, rows: int) -> None:
    calls: list[int] = []
    pipe.transformer.register_forward_pre_hook(lambda module, args: calls.append(len(args[0])))
    pipe([0, 1], **EULER | {"num_inference_steps": 8}, **options)
    assert (len(calls), sum(calls)) == (forwards, rows)
    assert pipe.num_evaluations == rows // 2


@pytest.mark.parametrize(("sampler", "rows"), [("ode-heun", {1}), ("sde-euler", {1}), ("ode-dopri5", {2, 4})])
def test_the_time_is_embedded_once(pipe: SiTPipeline, sampler: str, rows: set[int]) -> None:
    seen: set[int] = set()
    pipe.transformer.time_embed.register_forward_pre_hook(lambda module, args: seen.add(len(args[0])))
    pipe([0, 1], num_inference_steps=2, sampler=sampler, guidance_scale=2.0, guidance_interval=(0.0, 0.6))
    assert seen == rows


def test_guidance_scale_one_is_off_bit_for_bit(pipe: SiTPipeline) -> None:
    plain = pipe([0, 1], generator=seed(), **EULER).images
    assert torch.equal(plain, pipe([0, 1], generator=seed(), guidance_scale=1, guidance_channels=3, **EULER).images)
    assert not torch.equal(plain, pipe([0, 1], generator=seed(), guidance_scale=1.1, **EULER).images)


# --- batching, sizes, types


@pytest.mark.parametrize("sampler", ["ode-heun", "ode-dopri5", "sde-euler"])
def test_an_image_depends_on_its_generator_alone(pipe: SiTPipeline, sampler: str) -> None:
    options = {"num_inference_steps": 4, "sampler": sampler, "output_type": "latent", "guidance_scale": 2.0}
    together = pipe([0, 1, 2], generator=seeds(5, 6, 7), **options).images
    alone = pipe(1, generator=tuple(seeds(6)), **options).images
    torch.testing.assert_close(together[1:2], alone, rtol=1e-5, atol=1e-5)


def test_images_of_a_label_lie_next_to_each_other(pipe: SiTPipeline) -> None:
    several = pipe([0, 1], num_images_per_label=2, generator=seeds(1, 2, 3, 4), **EULER).images
    assert torch.equal(several, pipe([0, 0, 1, 1], generator=seeds(1, 2, 3, 4), **EULER).images)


def test_other_sizes(pipe: SiTPipeline) -> None:
    assert pipe.image_size == (16, 16)
    images = pipe(0, height=np.int64(24), width=8, num_inference_steps=1, output_type="pt", generator=seed()).images
    assert images.shape == (1, 3, 24, 8)


def test_output_types_agree(pipe: SiTPipeline) -> None:
    types = ("pil", "np", "pt", "uint8", "latent")
    pil, array, tensor, whole, latent = (
        pipe([0, 1], num_inference_steps=2, generator=seed(), output_type=kind).images for kind in types
    )
    assert [image.size for image in pil] == [(16, 16)] * 2
    assert array.shape == (2, 16, 16, 3)
    assert tensor.shape == (2, 3, 16, 16)
    assert latent.shape == (2, 4, 8, 8)
    assert 0 <= array.min() < array.max() <= 1
    assert np.array_equal(array, tensor.permute(0, 2, 3, 1).numpy())
    assert np.array_equal(np.stack([np.asarray(image) for image in pil]), whole.permute(0, 2, 3, 1).numpy())
    # trunc(127.5 x + 128), as SiT and ADM round
    levels = torch.trunc(127.5 * (2 * tensor.double() - 1) + 128).clamp(0, 255)
    assert (levels - whole).abs().max() <= 1
    assert (levels != whole).float().mean() < 1e-3


def test_return_dict(pipe: SiTPipeline) -> None:
    result = pipe(0, num_inference_steps=1, return_dict=False)
    assert isinstance(result, tuple)
    assert result[0][0].size == (16, 16)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models_keep_an_fp32_state(pipe: SiTPipeline, dtype: torch.dtype) -> None:
    expected = pipe(0, generator=seed(), **EULER).images
    pipe.to(dtype)
    assert pipe.dtype == dtype
    latents = pipe(0, generator=seed(), **EULER).images
    assert latents.dtype == torch.float32
    assert 0 < (latents - expected).abs().max() < 0.05
    assert pipe(0, generator=seed(), num_inference_steps=1, output_type="pt").images.dtype == torch.float32
    assert pipe.vae.dtype == dtype


def test_the_autoencoder_decodes_in_fp32(pipe: SiTPipeline) -> None:
    seen: list[torch.dtype] = []
    pipe.to(torch.bfloat16)
    pipe.vae.decoder.register_forward_pre_hook(lambda module, args: seen.append(args[0].dtype))
    pipe(0, num_inference_steps=1)
    assert seen == [torch.float32]


def test_compiled_transformer(pipe: SiTPipeline) -> None:
    expected = pipe(0, generator=seed(), guidance_scale=2.0, **EULER).images
    pipe.transformer.compile(backend="aot_eager")
    torch.testing.assert_close(pipe(0, generator=seed(), guidance_scale=2.0, **EULER).images, expected)
    pipe = tiny_pipeline()
    pipe.transformer = torch.compile(pipe.transformer, backend="aot_eager")
    torch.testing.assert_close(pipe(0, generator=seed(), guidance_scale=2.0, **EULER).images, expected)


# --- callbacks


def test_callback_sees_every_step_and_may_replace_the_latents(pipe: SiTPipeline) -> None:
    seen: list[tuple[int, float]] = []

    def watch(p: SiTPipeline, i: int, t: float, given: dict) -> dict:
        assert p is pipe
        assert set(given) == {"latents"}
        seen.append((i, t))
        return given

    plain = pipe(0, generator=seed(), callback_on_step_end=watch, **EULER).images
    assert [i for i, _ in seen] == list(range(6))
    np.testing.assert_allclose([t for _, t in seen], np.arange(1, 7) / 6)
    assert torch.equal(plain, pipe(0, generator=seed(), **EULER).images)

    def clear(p: SiTPipeline, i: int, t: float, given: dict) -> dict:
        return {"latents": torch.zeros_like(given["latents"])} if i == 2 else {}

    changed = pipe(0, generator=seed(), callback_on_step_end=clear, **EULER).images
    x = torch.zeros(1, 4, 8, 8)
    with torch.no_grad():
        for i in range(3, 6):
            x = x + pipe.transformer(x, torch.tensor([i / 6]), torch.tensor([0])) / 6
    torch.testing.assert_close(changed, x, rtol=0, atol=1e-5)


def test_callback_with_a_foreign_scheduler(pipe: SiTPipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(shift=1.0)
    times: list[float] = []

    def clear(p: SiTPipeline, i: int, t: float, given: dict) -> dict:
        times.append(t)
        return {"latents": torch.zeros_like(given["latents"])}

    options = {"num_inference_steps": 4, "output_type": "latent", "callback_on_step_end": clear}
    assert not pipe(0, **options).images.any()
    np.testing.assert_allclose(times, [0.25, 0.5, 0.75, 1.0], atol=1e-6)


def test_callback_may_look_at_dopri5_but_not_touch(pipe: SiTPipeline) -> None:
    pipe(0, num_inference_steps=1, sampler="ode-dopri5", callback_on_step_end=lambda p, i, t, given: given)
    with pytest.raises(UserError, match="cannot replace the latents of ode-dopri5"):
        pipe(0, sampler="ode-dopri5", callback_on_step_end=lambda p, i, t, given: {"latents": given["latents"] * 0})


def test_callback_may_interrupt(pipe: SiTPipeline) -> None:
    steps: list[int] = []

    def stop(p: SiTPipeline, i: int, t: float, given: dict) -> dict:
        steps.append(i)
        p._interrupt = i == 1
        return given

    pipe(0, callback_on_step_end=stop, **EULER)
    assert steps == [0, 1]
    assert pipe.interrupt
    pipe(0, **EULER)
    assert not pipe.interrupt


@pytest.mark.parametrize("sampler", SAMPLERS.names())
def test_callback_may_change_the_guidance(pipe: SiTPipeline, sampler: str) -> None:
    options = {"num_inference_steps": 4, "sampler": sampler, "output_type": "latent"}
    scales = {0: 3.0, 1: 1.0, 2: 0.0}  # on, off, unconditional; from the step after that one
    asked: list[float] = []

    def change(p: SiTPipeline, i: int, t: float, given: dict) -> dict:
        p._guidance_scale = scales.get(i, p.guidance_scale)
        asked.append(p.guidance_scale)
        return given

    images = pipe(0, generator=seed(), callback_on_step_end=change, **options).images
    assert asked[:3] == [3.0, 1.0, 0.0]
    assert len(asked) == pipe.num_timesteps
    if sampler == "ode-euler":
        assert pipe.num_evaluations == 1 + 2 + 1 + 2
    assert not torch.equal(images, pipe(0, generator=seed(), **options).images)
    if sampler == "ode-euler":
        x, now, null = torch.randn(1, 4, 8, 8, generator=seed()), torch.tensor([0]), torch.tensor([5])
        with torch.no_grad():
            for i, scale in enumerate((1.0, 3.0, 1.0, 0.0)):
                c, u = (pipe.transformer(x, torch.tensor([i / 4]), label) for label in (now, null))
                x = x + (u + scale * (c - u)) / 4
        torch.testing.assert_close(images, x, rtol=0, atol=1e-5)


@pytest.mark.parametrize("scale", [float("nan"), float("inf"), "2"])
def test_callback_that_sets_no_scale_is_refused(pipe: SiTPipeline, scale: object) -> None:
    def change(p: SiTPipeline, i: int, t: float, given: dict) -> dict:
        p._guidance_scale = scale
        return given

    with pytest.raises(UserError, match=r"guidance_scale: .* expected a finite number"):
        pipe(0, callback_on_step_end=change, **EULER)
    pipe = tiny_pipeline(class_dropout_prob=0.0)
    scale = 2.0
    with pytest.raises(UserError, match="without label dropout"):
        pipe(0, callback_on_step_end=change, **EULER)


@pytest.mark.parametrize(
    ("scheduler", "sampler", "count"),
    [
        (SiTScheduler(), "ode-rk4", 5),
        (SiTScheduler(), "sde-euler", 6),
        (SiTScheduler(last_step="tweedie"), "sde-heun", 6),
        (SiTScheduler(last_step="none"), "sde-euler", 5),
        (FlowMatchEulerDiscreteScheduler(), None, 5),
        (FlowMatchHeunDiscreteScheduler(), None, 9),
    ],
)
def test_num_timesteps_is_how_often_the_callback_is_called(
    pipe: SiTPipeline, scheduler: object, sampler: str | None, count: int
) -> None:
    seen: list[int] = []

    def watch(p: SiTPipeline, i: int, t: float, given: dict) -> dict:
        seen.append(p.num_timesteps)
        return given

    pipe.scheduler = scheduler
    pipe(0, num_inference_steps=5, sampler=sampler, output_type="latent", callback_on_step_end=watch)
    assert seen == [count] * count
    if isinstance(scheduler, SiTScheduler):
        seen.clear()
        pipe(0, num_inference_steps=5, sampler="ode-dopri5", output_type="latent", callback_on_step_end=watch)
        assert seen == list(range(1, len(seen) + 1))


def test_official_callback_class(pipe: SiTPipeline) -> None:
    class Zero(PipelineCallback):
        tensor_inputs = ("latents",)

        def callback_fn(self, pipeline: SiTPipeline, i: int, t: float, given: dict) -> dict:
            return {"latents": given["latents"] * 0}

    assert not pipe(0, callback_on_step_end=Zero(), **EULER).images.any()


@pytest.mark.parametrize("sampler", ["ode-euler", "ode-dopri5", "sde-euler"])
def test_progress_bar(pipe: SiTPipeline, capsys: pytest.CaptureFixture, sampler: str) -> None:
    pipe.set_progress_bar_config(disable=False)
    pipe(0, **EULER | {"sampler": sampler})
    assert "100%" in (err := capsys.readouterr().err)
    assert "6/6" in err
    assert "7/6" not in err


# --- saving and loading


def test_save_and_load_in_a_fresh_process(pipe: SiTPipeline, tmp_path: Path) -> None:
    pipe.scheduler = SiTScheduler(prediction="noise", shift=2.0)
    pipe.guide = tiny_transformer(seed=9)
    call = "(['retriever', 4], generator=g, num_inference_steps=3, autoguidance_scale=2.0, output_type='np').images"
    # DiffusionPipeline comes first: it has to find this package by the stub alone.
    script = f"""
import numpy, torch
from diffusers import DiffusionPipeline
folder = {str(tmp_path)!r}
found = DiffusionPipeline.from_pretrained(folder, custom_pipeline=folder, trust_remote_code=True)
from vit5gen import SiTPipeline
assert type(found) is SiTPipeline, type(found)
for name, pipe in {{"DiffusionPipeline": found, "SiTPipeline": SiTPipeline.from_pretrained(folder)}}.items():
    g = torch.Generator().manual_seed(0)
    numpy.save(f"{{folder}}/{{name}}.npy", pipe{call})
"""
    expected = eval("pipe" + call, {"pipe": pipe, "g": seed()})
    pipe.save_pretrained(tmp_path)
    for file in tmp_path.glob("*/*.safetensors"):
        assert file.stat().st_mode == file.with_name("config.json").stat().st_mode  # others read it too
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["transformer"] == ["vit5gen", "SiTTransformer2DModel"]
    assert index["scheduler"] == ["vit5gen", "SiTScheduler"]
    assert index["_class_name"] == "SiTPipeline"
    environment = os.environ | {"HF_MODULES_CACHE": str(tmp_path / "cache"), "HF_HUB_OFFLINE": "1"}
    subprocess.run([sys.executable, "-c", script], check=True, env=environment, capture_output=True)
    for name in ("SiTPipeline", "DiffusionPipeline"):
        assert np.array_equal(np.load(tmp_path / f"{name}.npy"), expected)


def test_save_and_load_without_an_autoencoder(tmp_path: Path) -> None:
    pipe = SiTPipeline(tiny_transformer(), SiTScheduler())
    pipe.save_pretrained(tmp_path)
    again = SiTPipeline.from_pretrained(tmp_path)
    assert again.vae is None
    assert again.guide is None
    assert torch.equal(pipe(0, generator=seed(), **EULER).images, again(0, generator=seed(), **EULER).images)
    with pytest.raises(UserError, match="needs an autoencoder"):
        again(0)


def test_load_in_bf16(pipe: SiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    again = SiTPipeline.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert again.transformer.dtype == torch.bfloat16
    assert again.config.id2label == NAMES


def test_from_pipe_shares_the_components(pipe: SiTPipeline) -> None:
    again = SiTPipeline.from_pipe(pipe)
    assert again.transformer is pipe.transformer
    assert again.vae is pipe.vae
    assert again.config.id2label == NAMES


def test_from_pipe_keeps_types(pipe: SiTPipeline) -> None:
    pipe.guide = tiny_transformer(seed=9)
    pipe.transformer.bfloat16()
    again = SiTPipeline.from_pipe(pipe)
    assert again.guide is pipe.guide
    assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.bfloat16, torch.float32)
    half = SiTPipeline.from_pipe(pipe, dtype=torch.bfloat16, id2label={0: "other"})
    assert half.transformer is pipe.transformer
    assert half.vae.dtype == half.guide.dtype == torch.bfloat16
    assert (pipe.vae.dtype, pipe.guide.dtype) == (torch.float32, torch.float32)
    assert half.config.id2label == {0: "other"}
    full = SiTPipeline.from_pipe(pipe, torch_dtype=torch.float32, vae=None)
    assert (full.transformer.dtype, full.vae) == (torch.float32, None)
    assert pipe.transformer.dtype == torch.bfloat16


SHARDED, PICKLED = {"max_shard_size": "20KB"}, {"safe_serialization": False}


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (SHARDED, {}),
        ({}, SHARDED),
        ({}, PICKLED),
        (SHARDED, PICKLED),
        (SHARDED | {"variant": "fp16"}, {"variant": "fp16"}),
    ],
)
def test_saving_leaves_nothing_of_an_earlier_save(pipe: SiTPipeline, tmp_path: Path, before: dict, after: dict) -> None:
    pipe.guide = tiny_transformer(seed=9)
    pipe.save_pretrained(tmp_path / "a", **before)
    if "variant" in after:  # another variant is no earlier save
        pipe.save_pretrained(tmp_path / "a")
    (tmp_path / "a" / "transformer" / "notes.txt").write_text("mine")
    other = SiTPipeline(tiny_transformer(seed=5), SiTScheduler(), tiny_autoencoder(7), id2label=NAMES)
    other.save_pretrained(tmp_path / "a", **after)
    other.save_pretrained(tmp_path / "b", **after)
    if "variant" not in after:
        (tmp_path / "a" / "transformer" / "notes.txt").unlink()
        assert pipeline_hash(tmp_path / "a") == pipeline_hash(tmp_path / "b")
        assert not (tmp_path / "a" / "guide").exists()
    again = SiTPipeline.from_pretrained(tmp_path / "a", variant=after.get("variant"))
    for name in ("transformer", "vae"):
        theirs, ours = getattr(again, name).state_dict(), getattr(other, name).state_dict()
        assert all(torch.equal(theirs[key], ours[key]) for key in ours)
    other.transformer.save_pretrained(tmp_path / "c", **before)
    other.transformer.save_pretrained(tmp_path / "c", **after)
    SiTTransformer2DModel.from_pretrained(tmp_path / "c", variant=after.get("variant"))


def test_saving_over_the_folder_that_it_came_from(pipe: SiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path, **SHARDED)
    before = pipe(0, generator=seed(), **EULER).images
    again = SiTPipeline.from_pretrained(tmp_path)
    again.save_pretrained(tmp_path)
    assert torch.equal(SiTPipeline.from_pretrained(tmp_path)(0, generator=seed(), **EULER).images, before)


def test_a_hub_name_resolves_our_components(pipe: SiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe.save_pretrained(tmp_path)
    monkeypatch.setattr(SiTPipeline, "download", classmethod(lambda cls, name, **options: str(tmp_path)))
    assert SiTPipeline.from_pretrained("user/repository").config.id2label == NAMES


def test_model_card_is_filled_in(pipe: SiTPipeline, tmp_path: Path) -> None:
    picture = tmp_path / "samples.png"
    pipe(0, num_inference_steps=1).images[0].save(picture)
    facts = TrainingFacts("vit5gen train configs/x.yaml", {"step": 7, "FD": {"value": 12.5, "n": 10}}, picture)
    pipe.save_pretrained(tmp_path / "a", facts=facts)
    card = (tmp_path / "a" / "README.md").read_text()
    for part in (
        "vit5gen train configs/x.yaml",
        "| step | 7 |",
        "| FD | value 12.5, n 10 |",
        "![samples](samples.png)",
        '"hidden_size": 32',
    ):
        assert part in card
    assert card.startswith("---\nlibrary_name: diffusers\n")
    SiTPipeline.from_pretrained(tmp_path / "a").save_pretrained(tmp_path / "b")
    assert (tmp_path / "b" / "README.md").read_text() == card
    assert (tmp_path / "b" / "samples.png").read_bytes() == picture.read_bytes()
    uploaded = tmp_path / "c"
    uploaded.mkdir()
    (uploaded / "README.md").write_text("an empty card")
    monkey = pytest.MonkeyPatch()
    monkey.setattr(DiffusionPipeline, "_upload_folder", lambda *args, **options: None)
    SiTPipeline.from_pretrained(tmp_path / "a")._upload_folder(uploaded, "user/repository")
    monkey.undo()
    assert (uploaded / "README.md").read_text() == card


def test_hash_is_of_what_decides_the_images(pipe: SiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path)
    before = pipeline_hash(tmp_path)
    (tmp_path / "README.md").write_text("other")
    assert pipeline_hash(tmp_path) == before
    (tmp_path / "scheduler" / "scheduler_config.json").write_text("{}")
    assert pipeline_hash(tmp_path) != before


HUGE = 10**400


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tiny_pipeline().save_pretrained(folder := tmp_path_factory.mktemp("saved"))
    return folder


@pytest.mark.parametrize(
    ("file", "changes", "named"),
    [
        *[
            ("transformer/config.json", {"num_layers": value}, "num_layers")
            for value in ("two", -1, 2.5, True, None, HUGE, 10**6)
        ],
        ("transformer/config.json", {"hidden_size": "32"}, "hidden_size"),
        ("transformer/config.json", {"num_attention_heads": [2]}, "num_attention_heads"),
        ("transformer/config.json", {"sample_size": {}}, ""),
        ("transformer/config.json", {"sample_size": 10**9}, "sample_size"),
        ("transformer/config.json", {"mlp_ratio": "4"}, "mlp_ratio"),
        ("transformer/config.json", {"class_dropout_prob": None}, ""),
        ("transformer/config.json", {"backbone": 5}, "backbone"),
        ("transformer/config.json", {"backbone_kwargs": [1]}, ""),
        ("scheduler/scheduler_config.json", {"shift": "x"}, ""),
        ("scheduler/scheduler_config.json", {"path": 3}, ""),
        ("scheduler/scheduler_config.json", {"rtol": None}, "rtol"),
        ("scheduler/scheduler_config.json", {"atol": "x"}, "atol"),
        ("scheduler/scheduler_config.json", {"last_step_size": "x"}, "last_step_size"),
        ("vae/config.json", {"block_out_channels": 8}, ""),
        ("vae/config.json", {"latent_channels": "4"}, ""),
        ("model_index.json", {"vae": ["antigravity", "AutoencoderKL"]}, "antigravity"),
        ("model_index.json", {"_class_name": ["pipeline", "SiTPipeline"]}, "_class_name"),
        ("model_index.json", {"transformer": ["diffusers", "AutoencoderKL"]}, "transformer is a AutoencoderKL"),
        ("model_index.json", {"transformer": 5}, ""),
        ("model_index.json", {"transformer": ["diffusers", "Nothing"]}, ""),
        ("model_index.json", {"id2label": ["cat"]}, "id2label"),
        ("model_index.json", {"id2label": {"x": "cat"}}, "id2label"),
    ],
)
def test_every_file_is_checked_where_it_enters(saved: Path, file: str, changes: dict, named: str) -> None:
    whole = (saved / file).read_text()
    (saved / file).write_text(json.dumps(json.loads(whole) | changes))
    try:
        with pytest.raises(UserError, match=named) as refused:
            load_pipeline(saved)
    finally:
        (saved / file).write_text(whole)
    assert "\n" not in str(refused.value)
    assert "antigravity" not in sys.modules


@pytest.mark.parametrize("file", ["model_index.json", "transformer/config.json", "vae/config.json"])
@pytest.mark.parametrize("text", ["[" * 5000, "[]", "{", ""])
def test_files_of_a_pipeline_that_are_no_json(saved: Path, file: str, text: str) -> None:
    whole = (saved / file).read_text()
    (saved / file).write_text(text)
    try:
        with pytest.raises(UserError):
            load_pipeline(saved)
    finally:
        (saved / file).write_text(whole)


def test_load_pipeline_takes_a_run_or_its_pipeline(pipe: SiTPipeline, tmp_path: Path) -> None:
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    assert load_pipeline(tmp_path / "run").config.id2label == NAMES
    assert load_pipeline(tmp_path / "run" / "pipeline").config.id2label == NAMES
    with pytest.raises(UserError, match="neither a run nor a pipeline folder"):
        load_pipeline(tmp_path)
    for name in ("config.yaml", "data.json"):
        (tmp_path / name).touch()
    with pytest.raises(UserError, match="this run has no pipeline/ yet; it is written when the first step"):
        load_pipeline(tmp_path)
    with pytest.raises(UserError, match="this run has no pipeline/ yet"):
        open_samples(str(tmp_path), DrawConfig(), 1, (0,), 1)
    (tmp_path / "run" / "pipeline" / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"broken")
    with pytest.raises(UserError, match="does not load"):
        load_pipeline(tmp_path / "run")


# --- bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_inference_steps": 0}, "num_inference_steps = 0; expected a whole number of at least 1"),
        ({"num_inference_steps": 2.5}, "num_inference_steps = 2.5"),
        ({"num_images_per_label": 0}, "num_images_per_label = 0"),
        ({"sampler": "ode-hen"}, "Did you mean 'ode-heun'"),
        ({"sampler": "heun"}, "sampler: 'heun' is not known; expected one of ode-euler"),
        ({"generator": [torch.Generator()]}, "generator: a list of 1; expected one for each of the 2 images"),
        ({"generator": 3}, "generator: 3; expected torch.Generator"),
        ({"generator": [3, 4]}, "generator: 3; expected torch.Generator"),
        ({"generator": [None, None]}, "generator: None; expected torch.Generator"),
        ({"latents": torch.zeros(2, 4, 8, 4)}, r"latents: shape \(2, 4, 8, 4\); expected \(2, 4, 8, 8\)"),
        ({"latents": torch.zeros(1, 4, 8, 8)}, r"latents: shape \(1, 4, 8, 8\)"),
        ({"height": 18}, "height = 18 cannot be generated; expected a multiple of 4"),
        ({"height": 16.0}, "height = 16.0 cannot be generated"),
        ({"height": "16"}, "height = '16' cannot be generated"),
        ({"width": 0}, "width = 0 cannot be generated"),
        ({"output_type": "jpg"}, "output_type: 'jpg'"),
        ({"guidance_scale": float("nan")}, "guidance_scale"),
        ({"guidance_interval": (0.5, 0.2)}, "guidance_interval"),
        ({"guidance_interval": (0.5,)}, "guidance_interval"),
        ({"guidance_channels": 5, "guidance_scale": 2.0}, "guidance_channels: 5"),
        ({"autoguidance_scale": 2.0}, "autoguidance_scale = 2.0 needs a second transformer"),
        ({"callback_on_step_end_tensor_inputs": ["noise"]}, "callback_on_step_end_tensor_inputs: 'noise'"),
    ],
)
def test_bad_values(pipe: SiTPipeline, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        pipe([0, 1], **options)
    assert "\n" not in str(caught.value)


def test_an_option_of_guidance_passes_from_its_section_through_the_pipeline(
    pipe: SiTPipeline, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Boosted(GuidedModel):
        def __init__(self, *args: Any, boost: float = 1.0, **options: Any) -> None:
            super().__init__(*args, **options)
            self.boost = boost

        def __call__(self, x: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
            return self.boost * super().__call__(x, t)

    def drawn(**options: Any) -> torch.Tensor:
        return pipe(0, generator=seed(), **EULER, **options).images

    for name in ("boost", "guidance_boost", "weak_scale"):
        with pytest.raises(TypeError, match=f"__call__.. got an unexpected keyword argument '{name}'"):
            drawn(**{name: 2.0})
    plain = drawn()
    monkeypatch.setattr("vit5gen.generation.pipeline.GuidedModel", Boosted)
    monkeypatch.setitem(SamplingConfig.model_fields, "guidance_boost", SamplingConfig.model_fields["guidance_scale"])
    assert torch.equal(drawn(), plain)
    assert not torch.equal(drawn(guidance_boost=2.0), plain)


def test_bad_schedulers(pipe: SiTPipeline) -> None:
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="sampler = 'ode-heun': the scheduler is FlowMatchEulerDiscreteScheduler"):
        pipe(0, sampler="ode-heun")
    pipe.scheduler = DDIMScheduler()
    with pytest.raises(UserError, match="DDIMScheduler is not made for flow matching"):
        pipe(0)
    pipe.scheduler = FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True)
    with pytest.raises(UserError, match="with use_dynamic_shifting needs"):
        pipe(0)
    pipe = SiTPipeline(tiny_transformer(), SiTScheduler(path="gvp"))
    pipe.scheduler = FlowMatchEulerDiscreteScheduler()
    with pytest.raises(UserError, match="only the linear path, not 'gvp'"):
        pipe(0, output_type="latent")
    with pytest.raises(UserError, match="shift"):
        SiTScheduler(shift=0)


def test_guidance_needs_a_null_label() -> None:
    pipe = tiny_pipeline(class_dropout_prob=0.0)
    pipe(0, **EULER)
    with pytest.raises(UserError, match="without label dropout"):
        pipe(0, guidance_scale=2.0, **EULER)


def test_an_autoencoder_of_other_scaling_is_refused_wherever_it_comes_in(pipe: SiTPipeline) -> None:
    vae = tiny_autoencoder()
    vae.register_to_config(latents_mean=[0.0] * 4, latents_std=[1.0, 1.0, 0.0, 1.0])
    with pytest.raises(UserError, match=r"scale of the latents has 0\.0; expected finite numbers, one for all"):
        SiTPipeline(pipe.transformer, SiTScheduler(), vae)
    pipe.vae = vae
    with pytest.raises(UserError, match="scale of the latents has 0"):
        pipe(0, num_inference_steps=1)


@pytest.mark.parametrize("name", ["transformer", "guide", "vae"])
def test_weights_that_are_not_finite_are_refused(pipe: SiTPipeline, tmp_path: Path, name: str) -> None:
    pipe.guide = tiny_transformer(seed=9)
    next(getattr(pipe, name).parameters()).data.view(-1)[0] = torch.inf
    pipe.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=f"{name}: 1 of the .* are not finite") as caught:
        load_pipeline(tmp_path)
    assert "\n" not in str(caught.value)


def test_options_of_a_save_reach_the_transformer(tmp_path: Path) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    file = tmp_path / "transformer/diffusion_pytorch_model.safetensors"
    plain = file.read_bytes()
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert file.read_bytes() == plain
    assert file.with_name("diffusion_pytorch_model.fp16.safetensors").is_file()
    pipe.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(file.parent.glob("*-of-*.safetensors"))) > 1
    assert not file.exists()
