"""How images form: the states of a sampler from noise to data, decoded."""

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from vit5gen.config import SamplingConfig
from vit5gen.data.autoencoders.codec import decode, to_uint8
from vit5gen.generation.many import image_generator
from vit5gen.generation.pipeline import SiTPipeline

_FRAMES = 9


def find_trajectory(
    pipe: SiTPipeline, indices: Sequence[int], labels: Sequence[int], seed: int, settings: SamplingConfig
) -> tuple[list[Tensor], list[float]]:
    """Return frames, each of images (B, 3, H, W) uint8 on the CPU, and their times: the noise, states, the images.

    The images are those that ``indices`` and ``seed`` fix, as `generate` draws them; of many steps, nine states.
    """
    # The noise, which the pipeline draws again from generators of the same seeds, then every state.
    side = pipe.image_size[0] // pipe.vae_scale_factor, pipe.image_size[1] // pipe.vae_scale_factor
    shape = (1, pipe.transformer.config.in_channels, *side)
    noise = torch.cat([torch.randn(shape, generator=image_generator(seed, i)) for i in indices])
    states: list[tuple[float, Tensor]] = [(0.0, noise.to(pipe.device))]

    def keep(_: SiTPipeline, __: int, t: float, given: dict[str, Any]) -> dict[str, Any]:
        states.append((float(t), given["latents"]))
        return {}

    silent = copy.copy(pipe)
    silent.set_progress_bar_config(disable=True)
    generators = [image_generator(seed, i) for i in indices]
    with torch.compiler.set_stance("force_eager"):  # so few images are not worth compiling for another batch size
        silent(
            list(labels), generator=generators, output_type="latent", callback_on_step_end=keep, **settings.model_dump()
        )

    # Some of them, decoded.
    chosen = torch.linspace(0, len(states) - 1, min(len(states), _FRAMES)).round().long().tolist()
    frames = [to_uint8(decode(pipe.vae, states[i][1])).cpu() for i in chosen]
    return frames, [states[i][0] for i in chosen]
