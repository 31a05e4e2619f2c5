"""What ``samples.png`` shows of a run: its newest images beside real ones, with what they are."""

import math
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit5gen.config import Config
from vit5gen.data.images import BrokenImage
from vit5gen.data.latents import images_beside
from vit5gen.generation.grid import save_grid, with_attribution
from vit5gen.report.history import newest_distance

_REAL = 2  # real pictures at the head of a row
# Previews: when, as parts of num_steps; in runs of fewer steps than this there is nothing to watch.
_PREVIEWS, _FEWEST_STEPS = (1 / 32, 1 / 8, 1 / 4, 1 / 2, 3 / 4), 64


class SampleGrid:
    """``samples.png`` of a run; ``labels`` are those of the images that it shows."""

    def __init__(self, config: Config, path: Path, class_names: list[str], attribution: str | None) -> None:
        self.config, self.path, self.class_names = config, path, class_names
        self.attribution = attribution
        classes = range(min(len(class_names), config.evaluation.grid_classes))
        self.labels = [label for label in classes for _ in range(config.evaluation.images_per_class)]

    def save(self, images: Tensor, step: int, evaluations: list[dict[str, Any]]) -> None:
        """Write images (N, 3, H, W) uint8 of `labels`, drawn at ``step``, with the newest distance there is."""
        sampling, seed, last = self.config.sampling, self.config.evaluation.seed, self.config.training.num_steps
        caption, settings = [f"step {step} of {last}"], {"step": step, "seed": seed, "sampling": sampling.model_dump()}
        if distance := newest_distance(evaluations):
            name, at, report = distance
            floor = "" if report["floor"] is None else f" (floor {report['floor']:.1f})"
            caption.append(f"{name} {report['value']:.1f}{floor}" + f" at step {at}" * (at != step))
            settings |= {name: report, "distance_step": at}
        solver = f"{sampling.sampler}, {sampling.num_inference_steps} steps"
        caption += [f"guidance {sampling.guidance_scale:g}", solver, f"seed {seed}"]
        names = [self.class_names[label] for label in self.labels]
        settings = with_attribution(settings, self.attribution)
        save_grid(self.path, images, self.labels, names, self._real, caption, settings)

    @cached_property
    def _real(self) -> dict[int, list[Tensor]]:
        """Some training images of each class, as far as there are images."""
        found: dict[int, list[Tensor]] = {}
        images, _ = images_beside(self.config.data)
        if images is not None:
            for label in dict.fromkeys(self.labels):
                own = torch.nonzero(images.labels == label)[:, 0].tolist()
                for i in own[:: max(1, -(-len(own) // _REAL))]:
                    with suppress(BrokenImage):
                        found.setdefault(label, []).append(images.read(i))
        return found


def preview_steps(num_steps: int, log_every: int) -> set[int]:
    """Return the steps of previews: soon, then ever more rarely, each one that has a line in the log."""
    wanted = {math.ceil(num_steps * part / log_every) * log_every for part in _PREVIEWS}
    return {step for step in wanted if step < num_steps} if num_steps >= _FEWEST_STEPS else set()
