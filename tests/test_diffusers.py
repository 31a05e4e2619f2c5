"""What users of diffusers expect of its models and pipelines; each test names the one of diffusers' that it stands for.

Those are in its `tests/`: `ModelTesterMixin` in models/testing_utils/common.py, `PipelineTesterMixin` in
pipelines/test_pipelines_common.py, the others in models/test_models_auto.py.
"""

import json
import logging
import sys
from collections.abc import Callable
from inspect import signature
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import AutoencoderKL, AutoModel
from diffusers.models.modeling_outputs import Transformer2DModelOutput
from safetensors.torch import load_file
from tiny import tiny_pipeline, tiny_transformer

from vit5gen import SiTPipeline, SiTTransformer2DModel
from vit5gen.flow import GuidedModel
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.generation.pipeline import _ELSEWHERE
from vit5gen.system.errors import UserError

WEIGHTS = "diffusion_pytorch_model.safetensors"
FAST: dict[str, Any] = {"num_inference_steps": 3, "sampler": "ode-euler", "output_type": "latent"}


@pytest.fixture
def pipe() -> SiTPipeline:
    return tiny_pipeline()


def draw(pipe: SiTPipeline, **options: Any) -> torch.Tensor:
    return pipe([0, 3], generator=torch.Generator().manual_seed(0), **{**FAST, **options}).images


def options(model: SiTTransformer2DModel) -> dict[str, Any]:
    return {key: value for key, value in model.config.items() if not key.startswith("_")}


# --- the transformer


@pytest.mark.parametrize("backbone", ["sit", "vit5"])
def test_outputs_of_every_form_are_equal(backbone: str) -> None:
    """ModelTesterMixin.test_outputs_equivalence, and test_output for the plain tensor of our contract."""
    model = tiny_transformer(backbone=backbone)
    inputs = (torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0.2, 0.7]), 1)
    plain = model(*inputs)
    assert torch.equal(model(*inputs, return_dict=None), plain)
    (alone,) = model(*inputs, return_dict=False)
    output = model(*inputs, return_dict=True)
    assert isinstance(output, Transformer2DModelOutput)
    assert [torch.equal(found, plain) for found in (alone, output.sample, output[0])] == [True] * 3
    assert list(output) == ["sample"]

    # With taps.
    x, hidden = model(*inputs, taps=(1, 2))
    pair = model(*inputs, taps=(1, 2), return_dict=False)
    output = model(*inputs, taps=(1, 2), return_dict=True)
    assert isinstance(output, Transformer2DModelOutput)
    for sample, states in (pair, output.to_tuple(), (output.sample, output.hidden_states)):
        assert torch.equal(sample, x)
        assert states.keys() == {1, 2}
        assert all(torch.equal(states[k], hidden[k]) for k in hidden)


def test_a_variant_of_the_transformer(tmp_path: Path) -> None:
    """ModelTesterMixin.test_from_save_pretrained_variant; the error names the option, too."""
    model = tiny_transformer()
    model.save_pretrained(tmp_path, variant="fp16")
    again = SiTTransformer2DModel.from_pretrained(tmp_path, variant="fp16")
    x = torch.ones(1, 4, 8, 8)
    assert torch.equal(again(x, 0.5, 1), model(x, 0.5, 1))
    for folder, options in ((tmp_path, {}), (tmp_path.parent, {"subfolder": tmp_path.name, "variant": "bf16"})):
        with pytest.raises(OSError, match=r"no file named diffusion_pytorch_model.* pass variant='fp16'$") as caught:
            SiTTransformer2DModel.from_pretrained(folder, **options)
        assert "\n" not in str(caught.value)
    with pytest.raises(OSError, match="no file named") as caught:  # nothing there to name
        SiTTransformer2DModel.from_pretrained(tmp_path, subfolder="absent")
    assert "pass variant" not in str(caught.value)


def test_automodel_loads_the_transformer(
    pipe: SiTPipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """test_auto_map_in_saved_config and test_load_dynamic_module_from_local_path_with_subfolder.

    Of a folder with a model_index.json AutoModel reads the class there: without trust, and with none to give.
    """
    monkeypatch.setattr("diffusers.utils.dynamic_modules_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    pipe.guide = tiny_transformer(seed=9)
    pipe.save_pretrained(tmp_path / "saved")
    folder = tmp_path / "saved" / "transformer"
    assert json.loads((folder / "config.json").read_text())["auto_map"] == {
        "AutoModel": "transformer.SiTTransformer2DModel"
    }
    (logger := logging.getLogger("diffusers.configuration_utils")).addHandler(caplog.handler)
    try:
        found = [
            AutoModel.from_pretrained(str(folder), trust_remote_code=True),
            AutoModel.from_pretrained(str(tmp_path / "saved"), subfolder="transformer"),
            SiTPipeline.from_pretrained(tmp_path / "saved").transformer,
        ]
    finally:
        logger.removeHandler(caplog.handler)
    assert "not expected" not in caplog.text
    for model in found:
        assert type(model) is SiTTransformer2DModel
        assert options(model) == options(pipe.transformer)
        assert all(torch.equal(a, b) for a, b in zip(model.parameters(), pipe.transformer.parameters(), strict=True))
    assert isinstance(AutoModel.from_pretrained(str(tmp_path / "saved"), subfolder="vae"), AutoencoderKL)
    with pytest.raises(ValueError, match="trust_remote_code=True"):
        AutoModel.from_pretrained(str(folder))
    with pytest.raises(ValueError, match="does not appear to have any custom code"):
        AutoModel.from_pretrained(str(tmp_path / "saved"), subfolder="transformer", trust_remote_code=True)

    # The weights are what they were, folders without the entry load, and a part that goes takes its stub along.
    assert load_file(folder / WEIGHTS).keys() == pipe.transformer.state_dict().keys()
    pipe.guide = None
    pipe.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved" / "guide").exists()
    (folder / "transformer.py").unlink()
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({key: config[key] for key in config if key != "auto_map"}))
    assert torch.equal(draw(load_pipeline(tmp_path / "saved")), draw(pipe))


def test_a_subclass_claims_no_stub(tmp_path: Path) -> None:
    """test_no_auto_map_without_register."""

    class Mine(SiTTransformer2DModel):
        pass

    Mine(**options(tiny_transformer())).save_pretrained(tmp_path)
    assert "auto_map" not in json.loads((tmp_path / "config.json").read_text())
    assert not (tmp_path / "transformer.py").exists()


# --- the pipeline


def test_casting_warns_only_of_what_there_is(
    pipe: SiTPipeline, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """PipelineTesterMixin.test_to_dtype and ModelTesterMixin.test_to_keep_in_fp32_modules_warns."""
    (logger := logging.getLogger("diffusers.models.modeling_utils")).addHandler(caplog.handler)
    try:
        pipe.to(torch.bfloat16)
        pipe.to("cpu", torch.float64)
        pipe.transformer.to(dtype=torch.float32)
        assert not caplog.records
        assert (pipe.transformer.dtype, pipe.vae.dtype) == (torch.float32, torch.float64)
        monkeypatch.setattr(SiTTransformer2DModel, "_keep_in_fp32_modules", ["head"])
        pipe.transformer.to(torch.bfloat16)
        assert "should be kept in float32: ['head']" in caplog.text
    finally:
        logger.removeHandler(caplog.handler)


def test_variants_of_a_pipeline(pipe: SiTPipeline, tmp_path: Path) -> None:
    """PipelineTesterMixin.test_serialization_with_variants, test_loading_with_variants and the test after it."""
    pipe.save_pretrained(tmp_path, variant="fp16")
    assert [len(list((tmp_path / part).glob("*.fp16.safetensors"))) for part in ("transformer", "vae")] == [1, 1]
    assert not list(tmp_path.glob(f"*/{WEIGHTS}"))
    for again in (
        SiTPipeline.from_pretrained(tmp_path, variant="fp16"),
        SiTPipeline.from_pretrained(tmp_path),  # which has no other weights
        load_pipeline(tmp_path),
    ):
        assert torch.equal(draw(again, output_type="pt"), draw(pipe, output_type="pt"))
    half = SiTPipeline.from_pretrained(tmp_path, variant="fp16", dtype=torch.float16)
    assert {half.transformer.dtype, half.vae.dtype} == {torch.float16}
    with pytest.raises(ValueError, match="`variant=bf16`, but no such modeling files are available"):
        SiTPipeline.from_pretrained(tmp_path, variant="bf16")

    # Of two variants, and beside plain weights, none is chosen without being asked for.
    other = tiny_pipeline(seed=5)
    other.save_pretrained(tmp_path, variant="ema")
    with pytest.raises(UserError, match="weights of the variants ema, fp16; pass variant='ema'"):
        SiTPipeline.from_pretrained(tmp_path)
    other.save_pretrained(tmp_path)
    assert torch.equal(draw(SiTPipeline.from_pretrained(tmp_path)), draw(other))
    assert torch.equal(draw(SiTPipeline.from_pretrained(tmp_path, variant="fp16")), draw(pipe))


def test_none_is_no_guidance(pipe: SiTPipeline) -> None:
    """PipelineTesterMixin.test_cfg."""
    assert torch.equal(draw(pipe, guidance_scale=None, autoguidance_scale=None), draw(pipe, guidance_scale=1.0))
    assert not torch.equal(draw(pipe, guidance_scale=7.5), draw(pipe))


FORM = r"expected two times \(start, end\), 0 <= start <= end <= 1, e.g. \(0.2, 0.8\)"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance_scale": "2"}, "guidance_scale: '2'; expected a finite number"),
        ({"guidance_interval": 0.5}, f"guidance_interval: 0.5; {FORM}"),
        ({"guidance_interval": None}, f"guidance_interval: None; {FORM}"),
        ({"guidance_interval": ("0", 1)}, rf"guidance_interval: \('0', 1\); {FORM}"),
        ({"guidance_channels": "3"}, "guidance_channels: '3'; expected a whole number"),
        ({"latents": torch.zeros(2, 4, 8, 8).numpy()}, r"latents: ndarray; .*, e.g. torch.randn\(\(2, 4, 8, 8\)\)"),
        ({"latents": torch.zeros(2, 4, 8, 8, dtype=torch.int64)}, "latents: torch.int64; expected a tensor of floats"),
        ({"num_inference_steps": None}, "num_inference_steps = None; expected a whole number"),
        ({"output_type": None}, "output_type: None is not known; expected one of pil, np"),
        ({"output_type": "PIL"}, "Did you mean 'pil'?"),
    ],
)
def test_values_of_another_form_are_told_theirs(pipe: SiTPipeline, options: dict, message: str) -> None:
    """PipelineTesterMixin has no test of bad values: these are what users of its pipelines try."""
    with pytest.raises(UserError, match=message) as caught:
        draw(pipe, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "here"),
    [
        ("num_images_per_prompt", "; use num_images_per_label"),
        ("prompt", "; use class_labels"),
        ("negative_prompt", "; use guidance_scale"),
        ("eta", "; use sampler='sde-heun'"),
        ("seed", "; use generator=torch.Generator"),
        ("callback_steps", "; use callback_on_step_end"),
        ("class_label", ". Did you mean 'class_labels'?"),
        ("num_steps", ". Did you mean 'num_inference_steps'?"),
        ("guidance_rescale", ". Did you mean 'guidance_scale'?"),
    ],
)
def test_other_names_are_told_ours(pipe: SiTPipeline, name: str, here: str) -> None:
    """PipelineTesterMixin.test_pipeline_call_signature and test_num_images_per_prompt."""
    with pytest.raises(TypeError) as caught:
        draw(pipe, **{name: 1})
    assert f"unexpected keyword argument {name!r}{here}" in str(caught.value)
    assert "\n" not in str(caught.value)


def test_every_name_that_is_told_exists() -> None:
    """PipelineTesterMixin.test_pipeline_call_signature."""
    known = signature(SiTPipeline.__call__).parameters
    assert {told.replace("=", " ").replace(",", " ").split()[0] for told in _ELSEWHERE.values()} <= known.keys()
    assert not _ELSEWHERE.keys() & known.keys()


@pytest.mark.parametrize("labels", [1, 2])
@pytest.mark.parametrize("of_each", [1, 2])
def test_num_images_per_label(pipe: SiTPipeline, labels: int, of_each: int) -> None:
    """PipelineTesterMixin.test_num_images_per_prompt."""
    assert len(pipe(list(range(labels)), num_images_per_label=of_each, **FAST).images) == labels * of_each


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_latents_of_another_type_are_cast(pipe: SiTPipeline, dtype: torch.dtype) -> None:
    """PipelineLatentTesterMixin.test_latents_input, and test_to_dtype for the type."""
    latents = torch.randn(2, 4, 8, 8, dtype=dtype, generator=torch.Generator().manual_seed(0))
    assert torch.equal(draw(pipe, latents=latents), draw(pipe, latents=latents.float()))
    assert draw(pipe, latents=latents).dtype == torch.float32


@pytest.mark.parametrize("change", [lambda x: None, lambda x: {}, lambda x: {"latents": x}])
def test_a_callback_may_return_nothing(pipe: SiTPipeline, change: Callable) -> None:
    """PipelineTesterMixin.test_callback_inputs; diffusers' own pipelines need a dictionary."""
    seen = []

    def look(p: SiTPipeline, i: int, t: float, given: dict) -> dict | None:
        assert given.keys() == set(p._callback_tensor_inputs)
        seen.append(i)
        return change(given["latents"])

    assert torch.equal(draw(pipe, callback_on_step_end=look), draw(pipe))
    assert seen == [0, 1, 2]


def test_a_callback_may_return_latents_of_another_type(pipe: SiTPipeline) -> None:
    """PipelineTesterMixin.test_callback_inputs, where the last step's latents are replaced."""

    def clear(p: SiTPipeline, i: int, t: float, given: dict) -> dict:
        return {"latents": given["latents"].to(torch.float64) * (i < p.num_timesteps - 1)}

    images = draw(pipe, callback_on_step_end=clear)
    assert (images.dtype, images.abs().sum()) == (torch.float32, 0)


def test_an_interval_may_be_any_pair() -> None:
    """PipelineTesterMixin.test_cfg, for what else diffusers' guiders take as two times."""
    model = tiny_transformer()
    label = torch.tensor([1])
    for pair in ([0, 1], (0.0, 1.0), torch.tensor([0.0, 1.0]), torch.tensor([0.0, 1.0]).numpy()):
        assert GuidedModel(model, label, 2.0, interval=pair).interval == (0, 1)
