"""``report.html`` of a run: the small pictures that it is made of, and what else its folder tells."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from vit5gen.config import Config, load_recorded
from vit5gen.data.images import open_images, readable
from vit5gen.evaluation import Extractor
from vit5gen.evaluation.nearest_images import nearest_pictures
from vit5gen.generation.card import commit, versions
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.report.report_page import build_report
from vit5gen.report.run_facts import RunFacts
from vit5gen.report.small_pictures import FACTS, rows_of, save_small, sheet, step_picture
from vit5gen.report.trajectory import find_trajectory
from vit5gen.system.errors import UserError
from vit5gen.system.files import read_json, write_json, write_text
from vit5gen.training.build import build_model
from vit5gen.training.cost import model_cost
from vit5gen.training.previews import SampleGrid
from vit5gen.training.run_folder import RunFolder
from vit5gen.training.trainable import choose_trainable

_FORMING = 4  # classes of which an image is shown as it forms
_SAMPLES, _SEARCHED = 8, 2048  # images whose nearest training images are shown, of so many


class RunReport:
    """Refreshes the page of a run that trains."""

    def __init__(self, config: Config, folder: RunFolder, samples: SampleGrid) -> None:
        self.config, self.folder, self.samples = config, folder, samples
        self._nearest: dict[str, Any] = {}  # what its picture shows, where there is one

    def find_nearest(self, grid: Tensor, extractor: Extractor, step: int) -> None:
        """Find the training images that are nearest to some of ``grid``; of many some, a fraction of an evaluation.

        The main process does it alone: were all to share the pass, a failure in one would leave the others waiting.
        """
        chosen = grid[:: -(-len(grid) // _SAMPLES)]
        images = open_images(self.config.data)
        order = np.random.default_rng(self.config.evaluation.seed).permutation(len(images))[:_SEARCHED]
        images = readable(images.select(torch.from_numpy(order)), self.config.data)
        parts = torch.arange(len(images)).split(self.config.evaluation.batch_size)
        chunks = ((part, images.stack(part)) for part in parts)
        found = nearest_pictures(chosen, chunks, extractor, shared=False)
        pairs = sheet([*chosen, *(one.picture for one in found)], len(chosen))
        save_small(self.folder.pictures / "nearest.webp", pairs, self.samples.attribution)
        what = f"Samples, and the nearest of {len(images):,} training images by {extractor.name} distance"
        distances = [f"{one.distance:.3g}" for one in found]
        self._nearest = {"what": what, "step": step, "rows": ["sample", "training"], "columns": distances}

    def refresh(self, grid: Tensor, pipe: SiTPipeline, evaluations: Sequence[dict[str, Any]], command: str) -> None:
        """Keep what the newest of the evaluations drew, ``grid`` (N, 3, H, W) uint8, and write the page.

        command: that which started the run.
        """
        # The grid of this step, and one image of some classes as it forms.
        step, labels, names = evaluations[-1]["step"], self.samples.labels, self.samples.class_names
        pictures, credit, classes = self.folder.pictures, self.samples.attribution, list(dict.fromkeys(labels))
        save_small(step_picture(pictures, step), sheet(*rows_of(grid, labels)), credit)
        forming = classes[:_FORMING]
        first = [labels.index(label) for label in forming]
        frames, times = find_trajectory(pipe, first, forming, self.config.evaluation.seed, self.config.sampling)
        formed = [frame[row] for row in range(len(forming)) for frame in frames]
        save_small(pictures / "trajectory.webp", sheet(formed, len(frames)), credit)

        # What they show, and what the page tells besides.
        rows, columns = [names[label] for label in classes], [f"{t:.2f}" for t in times]
        told: dict[str, Any] = {"rows": rows, "attribution": credit, "nearest": self._nearest}
        what = "From noise (t = 0) to image (t = 1)"
        told["trajectory"] = {"what": what, "step": step, "rows": rows[:_FORMING], "columns": columns}
        told |= {"flops_per_image": self._flops, "command": command, "versions": versions(), "commit": self._commit}
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


@contextmanager
def spare_run() -> Iterator[None]:
    """Turn whatever goes wrong into a note: a page about a run must not end it."""
    try:
        yield
    except Exception as error:
        print(f"\nnote: report.html is not refreshed: {error!r}", flush=True)


def read_run(folder: RunFolder, evaluations: Sequence[dict[str, Any]] | None = None) -> RunFacts:
    """Return what the folder of a run tells; evaluations: in place of those of its metrics.json.

    Raises `UserError` where its configuration or its metrics cannot be read.
    """
    facts, told = folder.pictures / FACTS, dict[str, Any]()
    with suppress(UserError):  # of an earlier version, or not evaluated yet
        told = read_json(facts, "facts")
    values = load_recorded(folder.config).model_dump(mode="json")
    found = folder.evaluations() if evaluations is None else evaluations
    saved, samples, diverged = folder.saved_steps(), folder.samples, folder.nonfinite.exists()
    return RunFacts(folder.path, values, folder.lines(), found, saved, folder.pictures, samples, told, diverged)


def is_run(path: Path) -> bool:
    """Whether a path is the folder of a run that has begun, of an earlier version too."""
    folder = RunFolder(path)
    return folder.config.is_file() and any(file.exists() for file in (folder.data, folder.log, folder.metrics))
