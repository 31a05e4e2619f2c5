"""``report.html`` of a run: the small pictures that it is made of, and what else its folder tells."""

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit5gen.config import Config, load_recorded
from vit5gen.generation.card import commit, versions
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.report.pictures import FACTS, rows_of, save_small, sheet, step_picture
from vit5gen.report.report_page import build_report
from vit5gen.report.runs import RunFacts
from vit5gen.report.trajectory import find_trajectory
from vit5gen.system.errors import UserError
from vit5gen.system.files import read_json, write_json, write_text
from vit5gen.training.build import build_model
from vit5gen.training.cost import model_cost
from vit5gen.training.previews import SampleGrid
from vit5gen.training.run_folder import RunFolder
from vit5gen.training.trainable import choose_trainable

_SHOWN = 4  # classes of which an image is shown as it forms


class RunReport:
    """Refreshes the page of a run that trains."""

    def __init__(self, config: Config, folder: RunFolder, samples: SampleGrid) -> None:
        self.config, self.folder, self.samples = config, folder, samples

    def refresh(self, grid: Tensor, pipe: SiTPipeline, evaluations: Sequence[dict[str, Any]], command: str) -> None:
        """Keep what the newest of the evaluations drew, ``grid`` (N, 3, H, W) uint8, and write the page.

        command: that which started the run.
        """
        # The grid of this step, and one image of some classes as it forms.
        step, labels, names, pictures = (
            evaluations[-1]["step"],
            self.samples.labels,
            self.samples.class_names,
            self.folder.pictures,
        )
        credit = self.samples.attribution
        save_small(step_picture(pictures, step), sheet(*rows_of(grid, labels)), credit)
        first = [labels.index(label) for label in list(dict.fromkeys(labels))[:_SHOWN]]
        own = [labels[i] for i in first]
        frames, times = find_trajectory(pipe, first, own, self.config.evaluation.seed, self.config.sampling)
        formed = [frame[row] for row in range(len(own)) for frame in frames]
        save_small(pictures / "trajectory.webp", sheet(formed, len(frames)), credit)

        # What they show, and what the page tells besides.
        told: dict[str, Any] = {
            "rows": [names[label] for label in dict.fromkeys(labels)],
            "attribution": credit,
            "trajectory": {
                "what": "From noise to image",
                "step": step,
                "rows": [names[label] for label in own],
                "columns": [f"t {t:.2f}" for t in times],
            },
            "flops_per_image": self._flops,
            "command": command,
            "versions": versions(),
            "commit": self._commit,
        }
        write_json(pictures / FACTS, told)
        write_text(self.folder.report, build_report([read_run(self.folder, evaluations)]))

    @cached_property
    def _commit(self) -> str:
        return commit()

    @cached_property
    def _flops(self) -> int:
        """FLOPs of forward and backward of an image, without those of further objectives."""
        with torch.device("meta"):
            model = build_model(self.config)
            choose_trainable(model, self.config.training)
        return model_cost(model, self.config.training.precision, recomputes=False).training_flops


def read_run(folder: RunFolder, evaluations: Sequence[dict[str, Any]] | None = None) -> RunFacts:
    """Return what the folder of a run tells; evaluations: in place of those of its metrics.json.

    Raises `UserError` where its configuration or its metrics cannot be read.
    """
    try:
        told = read_json(folder.pictures / FACTS, "report")
    except UserError:  # of an earlier version, or not evaluated yet
        told = {}
    found = folder.evaluations() if evaluations is None else list(evaluations)
    values = load_recorded(folder.config).model_dump(mode="json")
    newest = folder.samples if folder.samples.is_file() else None
    steps = folder.saved_steps()
    return RunFacts(
        folder.path, values, folder.lines(), found, steps, folder.pictures, told, newest, folder.nonfinite.exists()
    )


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run that has begun, of an earlier version too."""
    folder = RunFolder(path)
    return folder.config.is_file() and any(file.exists() for file in (folder.data, folder.log, folder.metrics))
