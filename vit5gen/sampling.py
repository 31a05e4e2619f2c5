"""Many images: their labels and noise, their division over processes, and the outputs that hold them."""

from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor

from vit5gen.config import EvaluationConfig, SamplingConfig
from vit5gen.errors import UserError, choose
from vit5gen.pipeline import SiTPipeline, SiTScheduler

_EVALUATION = EvaluationConfig()
LABEL_MODES = ("balanced", "random")
PRECISIONS = ("fp32", "tf32", "bf16")


@dataclass(frozen=True)
class SamplingJob:
    """What is drawn: image i depends on (seed, i, its label) and the settings alone.

    classes: ids to draw from.  label_mode: balanced (each as often as the others, to one) | random; shuffled in both.
    batch_size: images drawn at once, per process.
    """

    num_images: int
    classes: tuple[int, ...]
    seed: int = _EVALUATION.seed
    label_mode: str = "balanced"
    batch_size: int = _EVALUATION.batch_size
    settings: SamplingConfig = field(default_factory=SamplingConfig)

    def __post_init__(self) -> None:
        for name, value, least in (
            ("num_images", self.num_images, 1),
            ("batch_size", self.batch_size, 1),
            ("seed", self.seed, 0),
        ):
            if value < least:
                raise UserError(f"{name} = {value}; expected a whole number of at least {least}")
        choose("label_mode", self.label_mode, LABEL_MODES)

    def labels(self) -> np.ndarray:
        """Return the class id of every image, (num_images,) int64, fixed by the seed."""
        # The second word keeps this stream apart from others that start from the same seed.
        rng = np.random.default_rng([self.seed, 0x1ABE1])
        classes = np.asarray(self.classes, dtype=np.int64)
        if self.label_mode == "random":
            return rng.choice(classes, self.num_images)
        return rng.permutation(np.resize(classes, self.num_images))


def image_generator(seed: int, index: int) -> torch.Generator:
    """Return the CPU generator of image ``index``: its first noise, then what an SDE solver draws.

    torch's CPU generator keeps 32 bits of a seed, so hashing (seed, index) would give two of 50,000 images the same
    noise with a probability of a quarter; counting on from a hash of the seed cannot.
    """
    start = int(np.random.SeedSequence(seed).generate_state(1)[0])
    return torch.Generator().manual_seed((start + index) % 2**32)


def generate(
    pipe: SiTPipeline,
    job: SamplingJob,
    process_index: int = 0,
    num_processes: int = 1,
    done: np.ndarray | None = None,
) -> Iterator[tuple[range, Tensor]]:
    """Yield (indices, images uint8 (B, 3, H, W) on the CPU) of the chunks that fall to this process.

    Chunks are ``batch_size`` consecutive indices; those not wholly ``done`` (num_images,) go round the processes. Each
    is computed whole by one process, so that the number of processes changes no bit of it.
    """
    labels = job.labels()
    chunks = [range(i, min(i + job.batch_size, job.num_images)) for i in range(0, job.num_images, job.batch_size)]
    pending = [chunk for chunk in chunks if done is None or not done[chunk.start : chunk.stop].all()]
    settings = job.settings.model_dump()
    if not isinstance(pipe.scheduler, SiTScheduler):
        settings.pop("sampler")  # a foreign scheduler is its own
    shown = getattr(pipe, "_progress_bar_config", {})
    pipe.set_progress_bar_config(**{**shown, "disable": True})
    try:
        for chunk in pending[process_index::num_processes]:
            generators = [image_generator(job.seed, i) for i in chunk]
            ids = labels[chunk.start : chunk.stop]
            yield chunk, pipe(ids, generator=generators, output_type="uint8", return_dict=False, **settings)[0].cpu()
    finally:
        pipe.set_progress_bar_config(**shown)
