"""SiTPipeline, the only label -> image code there is."""

import copy
import shutil
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from inspect import signature
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline, ImagePipelineOutput, ModelMixin, SchedulerMixin
from diffusers.callbacks import MultiPipelineCallbacks, PipelineCallback
from diffusers.pipelines.pipeline_loading_utils import LOADABLE_CLASSES
from diffusers.utils.torch_utils import randn_tensor
from PIL import Image
from timm.layers import to_2tuple
from torch import Tensor, nn

from vit5gen.config import DrawConfig, SamplingConfig
from vit5gen.data.autoencoders.codec import Normalization, decode, normalization_of, sizes_of, to_uint8
from vit5gen.flow import Flow, GuidedModel, Steps
from vit5gen.generation.card import TrainingFacts, forget_folders, write_card
from vit5gen.generation.find_pipeline import pipeline_folder
from vit5gen.generation.image_start import noisy_latents, start_time
from vit5gen.generation.labels import Labels, find_class_ids, names_by_id, read_labels
from vit5gen.generation.lora import ADAPTED, Adapter, LoraMixin
from vit5gen.generation.scheduler import Generators, ModelFn, SiTScheduler, foreign_steps
from vit5gen.models import SiTTransformer2DModel
from vit5gen.models.weights import align
from vit5gen.section import MOST_BATCH, MOST_STEPS
from vit5gen.system.errors import UserError, check_whole, choose, nearest, short
from vit5gen.system.files import clear_weights, find_variants, write_text
from vit5gen.system.shipped import shipped_names

# Without this diffusers stores our classes under their module path, and does not find them by a hub name.
LOADABLE_CLASSES.setdefault("vit5gen", {})

OUTPUT_TYPES = ("pil", "np", "pt", "uint8", "latent")
_SAMPLING = DrawConfig()

# What other pipelines call it, and what it is here.
_ELSEWHERE = {
    "num_images_per_prompt": "num_images_per_label",
    "prompt": "class_labels (ids or names)",
    "negative_prompt": "guidance_scale, which guides away from no class",
    "eta": "sampler='sde-heun' for noise in the steps",
    "timesteps": "num_inference_steps, and a SiTScheduler with another shift",
    "sigmas": "num_inference_steps, and a SiTScheduler with another shift",
    "seed": "generator=torch.Generator().manual_seed(seed)",
    "cfg_scale": "guidance_scale",
    "steps": "num_inference_steps",
    "callback": "callback_on_step_end",
    "callback_steps": "callback_on_step_end, which is called after every step",
}


@dataclass
class _CallState:
    """What a call shows, and lets its callback change."""

    guidance_scale: float = _SAMPLING.guidance_scale
    num_timesteps: int = 0
    interrupt: bool = False
    num_evaluations: int = 0
    running: bool = False


class _CallStates(threading.local):
    """The state of each thread's call: of the one that runs, or else its last one, or else the pipeline's last one."""

    def __init__(self, last: list[_CallState]) -> None:
        self.last = last
        self.own: _CallState | None = None

    def __reduce__(self) -> tuple:  # of a copy: its threads have made no call
        return type(self), ([_CallState()],)

    @property
    def now(self) -> _CallState:
        return self.own or self.last[0]

    @contextmanager
    def enter(self) -> Iterator[_CallState]:
        outer = self.own
        self.own = self.last[0] = state = _CallState(running=True)
        try:
            yield state
        finally:
            state.running = False
            if outer is not None and outer.running:  # a callback has called the pipeline
                self.own = outer


def _of_state(name: str, doc: str) -> Any:
    """Return a property that reads and sets what `_CallState` holds under this name."""
    return property(
        lambda pipe: getattr(pipe._states.now, name), lambda pipe, new: setattr(pipe._states.now, name, new), doc=doc
    )


class SiTPipeline(LoraMixin, DiffusionPipeline):
    """Class-conditional images by flow matching.

    transformer: predicts velocity, score or noise from (latents, timestep in [0, 1], class_labels).
    scheduler: `SiTScheduler`, or a flow-match scheduler of diffusers, whose ``step`` is then used.
    vae: decodes latents; without it only ``output_type="latent"`` works.
    guide: the weaker model of autoguidance (arXiv 2406.02507).  id2label: names of the classes by id.
    latent_normalization: ``scale`` and ``shift`` of the latents trained on, where they are not the autoencoder's own.
    attribution: the line that the licence of the training images wants beside the weights and all that they draw.
    """

    model_cpu_offload_seq = "transformer->guide->vae"
    _optional_components = ["vae", "guide"]  # noqa: RUF012 (diffusers' convention)
    _callback_tensor_inputs = ["latents"]  # noqa: RUF012

    def __init__(
        self,
        transformer: SiTTransformer2DModel,
        scheduler: SchedulerMixin,
        vae: ModelMixin | None = None,
        guide: SiTTransformer2DModel | None = None,
        id2label: dict | None = None,
        attribution: str | None = None,
        latent_normalization: dict | None = None,
    ) -> None:
        super().__init__()
        for module in filter(None, (transformer, vae, guide)):
            align(module)
        self.register_modules(transformer=transformer, scheduler=scheduler, vae=vae, guide=guide)
        told = {"attribution": attribution, "latent_normalization": latent_normalization}
        told = {name: value for name, value in told.items() if value}
        self.register_to_config(id2label=names_by_id(id2label), **told)
        self._check_autoencoder()
        self._flow = scheduler.flow if isinstance(scheduler, SiTScheduler) else Flow()
        self._states = _CallStates([_CallState()])

    # diffusers' names; a callback sets those with an underscore, and they hold for its call alone.
    guidance_scale = _guidance_scale = _of_state("guidance_scale", "The scale of this thread's call.")
    num_timesteps = _num_timesteps = _of_state(
        "num_timesteps", "How often the callback is called; with ode-dopri5, which cannot know, how often so far."
    )
    interrupt = _interrupt = _of_state("interrupt", "Whether a callback wants the call to end after its step.")
    num_evaluations = _of_state("num_evaluations", "How often the networks were evaluated for each image.")

    @property
    def flow(self) -> Flow:
        """The flow that the transformer was trained for: a foreign scheduler put in its place does not change it."""
        return self.scheduler.flow if isinstance(self.scheduler, SiTScheduler) else self._flow

    @property
    def vae_scale_factor(self) -> int:
        """Image pixels along a side of a latent pixel; 1 without an autoencoder."""
        return 1 if self.vae is None else sizes_of(self.vae).downsample

    @property
    def image_size(self) -> tuple[int, int]:
        """Height and width of the images trained on, in pixels."""
        factor = self.vae_scale_factor
        height, width = to_2tuple(self.transformer.config.sample_size)
        return factor * height, factor * width

    def class_ids(self, class_labels: Labels) -> list[int]:
        """Return the ids of an id, a name, or a list of both; raise `UserError` for a class that does not exist."""
        return find_class_ids(class_labels, self.config.id2label, self.transformer.config.num_classes)

    def class_name(self, class_id: int) -> str:
        """Return the name of a class, or its id in digits where it has none."""
        return self.config.id2label.get(class_id, str(class_id))

    @torch.no_grad()
    def __call__(
        self,
        class_labels: Labels,
        guidance_scale: float | None = _SAMPLING.guidance_scale,
        num_inference_steps: int = _SAMPLING.num_inference_steps,
        sampler: str | None = None,
        *,
        autoguidance_scale: float | None = _SAMPLING.autoguidance_scale,
        num_images_per_label: int = 1,
        image: Any = None,
        strength: float | None = None,
        height: int | None = None,
        width: int | None = None,
        generator: Generators = None,
        latents: Tensor | None = None,
        output_type: str = "pil",
        return_dict: bool = True,
        callback_on_step_end: Callable[..., dict | None] | PipelineCallback | MultiPipelineCallbacks | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] = ("latents",),
        **guidance: Any,
    ) -> ImagePipelineOutput | tuple:
        """Draw ``num_images_per_label`` images of each label, those of a label next to each other.

        class_labels: ids and names; or rows of weights over the classes that sum to 1, e.g. ``[[0.5, 0.5, 0]]``, which
        mix their embeddings (one more weight is that of the null label); or None for the null label: no class.
        image: one to begin with, or one of each label: pictures of PIL, which are scaled and cut to the size drawn, or
        what has that size, uint8 or in [0, 1]: a tensor (B, 3, H, W), an array (B, H, W, 3).  strength (0.8): noise is
        added up to t = 1 - strength and all steps are taken from there; 1 ignores the image, 0 only decodes its latent.
        guidance_scale, autoguidance_scale: 1 or None is off; both act at times in ``guidance_interval=(start, end)``
        (0 noise, 1 data) and on the first ``guidance_channels``: these, and every other guidance option of
        `SamplingConfig`, go to `GuidedModel` without their prefix.
        sampler: ``ode-<method>`` or ``sde-<method>`` of `vit5gen.flow`, for num_inference_steps steps; a foreign
        scheduler takes none.  height, width: pixels, by default those trained on.
        generator: one, or one per image, so none depends on others.  latents (B, C, h, w): the noise to start from,
        floats of any type on any device; they are cast to fp32 and moved.
        ``callback_on_step_end(pipe, i, t, {"latents": x})`` returns None, or a dictionary whose latents replace x.
        output_type: pil | np (B, H, W, 3) and pt (B, 3, H, W) in [0, 1] | uint8 (B, 3, H, W) | latent (B, C, h, w).
        Raises `UserError` for bad values, `TypeError` for a keyword that does not exist.
        """
        # Refuse what cannot be drawn before any work.
        if unknown := guidance.keys() - SamplingConfig.model_fields:
            known = signature(self.__call__).parameters.keys() - {"guidance"} | SamplingConfig.model_fields.keys()
            name = min(unknown)
            advice = f"; use {_ELSEWHERE[name]}" if name in _ELSEWHERE else f".{nearest(name, known)}"
            raise TypeError(f"SiTPipeline.__call__() got an unexpected keyword argument {name!r}{advice}")
        guidance_scale = _SAMPLING.guidance_scale if guidance_scale is None else guidance_scale
        autoguidance_scale = _SAMPLING.autoguidance_scale if autoguidance_scale is None else autoguidance_scale
        of_each = check_whole("num_images_per_label =", num_images_per_label, 1, MOST_BATCH)
        transformer, id2label = self.transformer, self.config.id2label
        labels = read_labels(class_labels, id2label, transformer.config.num_classes, transformer.has_null_label)
        if not (count := len(labels) * of_each):
            raise UserError("class_labels: empty; expected at least one id or name")
        start = start_time(image, strength, self.vae)
        check_whole("num_inference_steps =", num_inference_steps, 1, MOST_STEPS)
        choose("output_type", output_type, OUTPUT_TYPES)
        if output_type != "latent" and self.vae is None:
            raise UserError(f"output_type = {output_type!r} needs an autoencoder; set pipe.vae or use 'latent'")
        self._check_autoencoder()  # it may have been assigned
        if isinstance(callback_on_step_end, PipelineCallback | MultiPipelineCallbacks):
            callback_on_step_end_tensor_inputs = callback_on_step_end.tensor_inputs
        for name in callback_on_step_end_tensor_inputs:
            choose("callback_on_step_end_tensor_inputs", name, self._callback_tensor_inputs)

        # The weaker model of autoguidance, and the noise to start from, or a noisy image.
        weak = None if autoguidance_scale == 1 else self._weak_model(autoguidance_scale, labels)
        generator = _generators(generator, count)
        x = self._initial_latents(count, height, width, generator, latents)
        if image is not None:
            x = noisy_latents(image, len(labels), x, start, self.flow, self.vae)
        with self._states.enter() as state:
            # The guided network, which asks for the scale at every step: a callback may change it.
            state.guidance_scale = guidance_scale
            ask_scale, labels = partial(getattr, state, "guidance_scale"), labels.repeat_interleave(of_each, dim=0)
            options = {name.removeprefix("guidance_"): value for name, value in guidance.items()}
            options |= {"weak_model": weak, "weak_scale": autoguidance_scale}
            model_fn = GuidedModel(transformer, labels.to(x.device), ask_scale, **options)

            # Step by step from noise to data; what a callback returns takes the place of the state.
            state.num_timesteps, steps = self._steps(sampler, model_fn, x, num_inference_steps, generator, start)
            with self.progress_bar(total=num_inference_steps) as bar:
                for i, t, x in steps:
                    state.num_timesteps = max(state.num_timesteps, i + 1)
                    if callback_on_step_end is not None:
                        given = dict.fromkeys(callback_on_step_end_tensor_inputs, x)
                        replaced = (callback_on_step_end(self, i, t, given) or {}).get("latents", x)
                        if replaced is not x and sampler == "ode-dopri5":
                            reason = "its images are at different times; choose a solver with fixed steps"
                            raise UserError(f"callback_on_step_end cannot replace the latents of ode-dopri5: {reason}")
                        if replaced is not x:
                            _, _, x = steps.send(replaced)
                    done = (t - start) / (1 - start)
                    bar.update(round(done * num_inference_steps) - bar.n)  # some solvers take more or fewer steps
                    if state.interrupt:
                        break

            # Images of the last state, of which a callback may have asked for an early end.
            state.num_evaluations = model_fn.rows // count
            images = x if output_type == "latent" else self._decode(x, output_type)
        self.maybe_free_model_hooks()
        return ImagePipelineOutput(images=images) if return_dict else (images,)

    def _check_autoencoder(self) -> None:
        """Raise `UserError` for an autoencoder that `decode` does not know, or would undo another normalisation."""
        wanted, found = self.config.get("latent_normalization"), self.vae and normalization_of(self.vae)
        if wanted and found and not found.agrees(trained := Normalization(**wanted)):
            name = self.vae.config.get("_name_or_path") or type(self.vae).__name__
            what = f"the autoencoder {name!r} normalises latents by scale and shift {short(tuple(found))}"
            advice = "give the one that is saved with these weights"
            raise UserError(f"{what}, the transformer was trained with {short(tuple(trained))}; {advice}")

    def _weak_model(self, scale: float, labels: Tensor) -> nn.Module:
        if self.guide is None:
            raise UserError(f"autoguidance_scale = {scale} needs a second transformer; set --guide or pipe.guide")
        for name in ("num_classes", "in_channels"):
            weak, strong = self.guide.config[name], self.transformer.config[name]
            if weak != strong:
                raise UserError(f"guide: {name} = {weak}, the transformer has {strong}; train it on the same data")
        null = self.guide.null_label
        if not self.guide.has_null_label and (labels == null if labels.dim() == 1 else labels[:, null]).any():
            raise UserError("guide: has no null label; give a class, or a guide that was trained with label dropout")
        return self.guide

    def _initial_latents(
        self, batch: int, height: int | None, width: int | None, generator: Generators, latents: Tensor | None
    ) -> Tensor:
        config, factor = self.transformer.config, self.vae_scale_factor
        unit = factor * config.patch_size
        shape: tuple[int, ...] = (batch, config.in_channels)
        for name, given, built in zip(("height", "width"), (height, width), self.image_size, strict=True):
            side = built if given is None else given
            if not isinstance(side, int | np.integer) or side < unit or side % unit:
                raise UserError(f"{name} = {side!r} cannot be generated; expected a multiple of {unit}")
            shape += (int(side) // factor,)
        device = self._execution_device
        if latents is None:
            return randn_tensor(shape, generator=generator, device=device, dtype=torch.float32)
        if not (isinstance(latents, Tensor) and latents.is_floating_point()):
            found = latents.dtype if isinstance(latents, Tensor) else type(latents).__name__
            raise UserError(f"latents: {found}; expected a tensor of floats, e.g. torch.randn({shape})")
        if tuple(latents.shape) != shape:
            raise UserError(f"latents: shape {tuple(latents.shape)}; expected {shape}, which is (B, C, h, w)")
        return latents.to(device, torch.float32)

    def _steps(
        self, sampler: str | None, model_fn: ModelFn, x: Tensor, num_steps: int, generator: Generators, start: float
    ) -> tuple[int, Steps]:
        if start == 1:
            nothing: Any = iter(())
            return 0, nothing
        if isinstance(self.scheduler, SiTScheduler):
            return self.scheduler.steps(sampler or _SAMPLING.sampler, model_fn, x, num_steps, generator, start or None)
        if sampler is not None:
            reason = f"the scheduler is {type(self.scheduler).__name__}, which takes its own steps"
            advice = "omit sampler, or set pipe.scheduler = SiTScheduler()"
            raise UserError(f"sampler = {sampler!r}: {reason}; {advice}")
        return foreign_steps(self.scheduler, self.flow, model_fn, x, num_steps, generator, start or None)

    def _decode(self, latents: Tensor, output_type: str) -> Any:
        images = decode(self.vae, latents)
        if output_type == "uint8":
            return to_uint8(images)
        if output_type == "pil":
            return [Image.fromarray(image) for image in to_uint8(images).permute(0, 2, 3, 1).cpu().numpy()]
        images = images / 2 + 0.5
        return images if output_type == "pt" else images.permute(0, 2, 3, 1).cpu().numpy()

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: str | Path, **kwargs: Any) -> "SiTPipeline":
        """Load as diffusers does, from the folder of a run or a pipeline, the name of one that ships, or a hub name.

        variant: of the weights, e.g. fp16; a folder with no others is loaded without that.
        Raises `UserError` for a folder that holds no pipeline, or several variants of which none is chosen.
        """
        name = pretrained_model_name_or_path
        if Path(name).is_dir() or str(name) in shipped_names():
            name = pipeline_folder(name)
            if kwargs.get("variant") is None and (variants := find_variants(name / "transformer")):
                if len(variants) > 1:
                    advice = f"pass variant={variants[0]!r}, or delete all but one"
                    raise UserError(f"checkpoint {name}: weights of the variants {', '.join(variants)}; {advice}")
                kwargs["variant"] = variants[0]
        found: SiTPipeline = super().from_pretrained(name, **kwargs)
        return found

    @classmethod
    def from_pipe(cls, pipeline: DiffusionPipeline, **kwargs: Any) -> "SiTPipeline":
        """Return a pipeline of the same components, except those in kwargs; none changes its type, as in diffusers.

        dtype: what has another one is copied; the given pipeline keeps its own.
        """
        dtypes = [kwargs.pop(name, None) for name in ("dtype", "torch_dtype")]
        found = {**pipeline.config, **pipeline.components}
        pipe = cls(**({name: found[name] for name in signature(cls).parameters if name in found} | kwargs))
        for name, module in pipe.components.items():
            for dtype in filter(None, dtypes):
                if isinstance(module, nn.Module) and module.dtype != dtype:
                    setattr(pipe, name, copy.deepcopy(module).to(dtype))
        if "transformer" not in kwargs:  # whose adapters have replaced what the given pipeline keeps
            pipe.__dict__.update({name: vars(pipeline)[name] for name in ADAPTED & vars(pipeline).keys()})
        pipe.register_to_config(_name_or_path=pipeline.config.get("_name_or_path"))
        return pipe

    def save_pretrained(
        self,
        save_directory: str | Path,
        *args: Any,
        facts: TrainingFacts | None = None,
        adapter: Adapter | None = None,
        **kwargs: Any,
    ) -> None:
        """Save as diffusers does, with a model card and the stub by which ``DiffusionPipeline`` finds this class.

        facts: what the card says about the training; without them the card that came with the weights is kept.
        adapter: what was folded into the transformer, to be saved beside it.
        Raises `UserError` while the transformer has adapters, which its folder could not hold.
        """
        if getattr(self.transformer, "peft_config", None):
            advice = "fold them in with pipe.fuse_lora(), then call pipe.unload_lora_weights(), then save"
            raise UserError(f"save_pretrained: the transformer has adapters; {advice}")
        self.register_modules(**self.components)  # diffusers overlooks a component that was assigned over None
        write_text(Path(save_directory) / "pipeline.py", "from vit5gen import SiTPipeline  # noqa: F401\n")
        write_card(self, Path(save_directory), facts)
        for name, component in self.components.items():
            if component is None or isinstance(component, nn.Module):
                clear_weights(Path(save_directory) / name, kwargs.get("variant"), removed=component is None)
        super().save_pretrained(str(save_directory), *args, **kwargs)
        if adapter is not None:
            adapter.save(Path(save_directory), self.transformer.config, self.config.id2label)
        for file in Path(save_directory).glob("**/*.safetensors"):  # which safetensors lets only their owner read
            shutil.copymode(Path(save_directory) / "model_index.json", file)

    def _upload_folder(self, working_dir: str | Path, repo_id: str, *args: Any, **kwargs: Any) -> Any:
        write_card(self, Path(working_dir), repo=repo_id)  # diffusers has just put its empty card in place of ours
        forget_folders(Path(working_dir))
        return super()._upload_folder(working_dir, repo_id, *args, **kwargs)


def _generators(generator: Any, batch: int) -> Generators:
    several = isinstance(generator, list | tuple)
    if several and len(generator) != batch:
        raise UserError(f"generator: a list of {len(generator)}; expected one for each of the {batch} images")
    for one in generator if several else [generator]:
        if not isinstance(one, torch.Generator) and (several or one is not None):
            raise UserError(f"generator: {one!r}; expected torch.Generator().manual_seed(...), or a list of them")
    return list(generator) if several else generator
