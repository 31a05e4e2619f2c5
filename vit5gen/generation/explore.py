"""One picture of many settings on equal noise: sweeps of options, and the way from one class to another."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from shutil import rmtree
from typing import Any

import numpy as np

from vit5gen.generation.grid import Axis, save_gif, save_sheet
from vit5gen.generation.labels import one_hot
from vit5gen.generation.many import SamplingJob
from vit5gen.generation.outputs import MOST_IMAGES, Output, open_output, settings_of
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.generation.scheduler import SAMPLERS
from vit5gen.models import SiTTransformer2DModel
from vit5gen.system.errors import UserError

# Jobs of equal noise, row by row, each a cell of a table; without rows, each image of a job has a row.
Sheet = tuple[list[SamplingJob], Axis, Axis | None]


def plan_jobs(
    pipe: SiTPipeline, job: SamplingJob, path: Path, sweep: Mapping[str, Sequence[Any]], num_frames: int | None
) -> tuple[list[SamplingJob], Output, dict[str, Any]]:
    """Return the jobs that are drawn on equal noise, the output of all their images, and what its card tells of them.

    Without a sweep, and num_frames between the two classes of the job, that is the job alone. Raises `UserError` for a
    sheet that is not written to a picture, or has too many images.
    """
    if not sweep and num_frames is None:
        return [job], open_output(path, (len(job.labels), *pipe.image_size, 3)), {}
    jobs, columns, rows = _sweep(job, sweep) if num_frames is None else _morph(job, pipe.transformer, num_frames)
    if path.suffix.lower() not in (".png", ".png" if sweep else ".gif"):
        expected = "FILE.png" if sweep else "FILE.png or FILE.gif"
        raise UserError(f"output {path}: a sheet of images is one picture; expected {expected}")
    if (count := len(jobs) * len(job.labels)) > MOST_IMAGES:
        raise UserError(f"output {path}: {count} images are too many for one picture; at most {MOST_IMAGES}")
    told = {"sweep": sweep} if sweep else {"morph": list(job.names.values()), "frames": num_frames}
    return jobs, SheetOutput(path, (count, *pipe.image_size, 3), columns, rows), told


def _sweep(job: SamplingJob, sweep: Mapping[str, Sequence[Any]]) -> Sheet:
    """Return ``job`` with each value of one option, or of two: the first one's are columns, the second one's rows."""
    for sampler in sweep.get("sampler", ()):
        SAMPLERS.get(sampler)  # raises where there is none of that name
    axes = [
        Axis(key, [f"{value:g}" if isinstance(value, float) else str(value) for value in values])
        for key, values in sweep.items()
    ]
    (key, values), *others = sweep.items()
    rows = [{other: value} for other, swept in others for value in swept] or [{}]
    jobs = [_changed(job, {**row, key: value}) for row in rows for value in values]
    return jobs, axes[0], axes[1] if others else None


def _changed(job: SamplingJob, values: dict[str, Any]) -> SamplingJob:
    own = {key: values.pop(key) for key in ("seed", "strength") if key in values}
    return replace(job, settings=job.settings.model_copy(update=values), **own)


def _morph(job: SamplingJob, model: SiTTransformer2DModel, num_frames: int) -> Sheet:
    """Return ``job`` with labels that change in equal steps from the first of its two classes to the second."""
    if len(job.classes) != 2:
        raise UserError(f"--morph: both are the class {job.names[job.classes[0]]!r}; give two classes")
    width, shares = model.null_label + model.has_null_label, np.linspace(0, 1, num_frames)
    first, last = (np.array(job.weights.get(label) or one_hot(label, width)) for label in job.classes)
    weights = [{width: ((1 - share) * first + share * last).tolist()} for share in shares]
    jobs = [replace(job, labels=[width] * len(job.labels), weights=one) for one in weights]
    start, end = (job.names[label] for label in job.classes)
    return jobs, Axis(f"from {start} to {end}", [f"{share:.3g}" for share in shares]), Axis("", [""])


@dataclass(frozen=True)
class SheetOutput(Output):
    """FILE.png, a table; or FILE.gif, a film of the columns. Nothing is kept of one that cannot be drawn."""

    columns: Axis
    rows: Axis | None = None

    @property
    def card_file(self) -> Path:
        """FILE.png.card.json or FILE.gif.card.json."""
        return self.path.with_name(f"{self.path.name}.card.json")

    def tidy(self) -> None:
        """Remove the hidden folder; one process calls this."""
        if self.part.exists():
            rmtree(self.part)

    def _assemble(self, card: dict[str, Any], labels: Sequence[int], titles: Sequence[str]) -> None:
        rows, images = self.rows, self.images().unflatten(0, (-1, len(self.columns.titles), len(labels)))
        if rows is None:  # the images of a class next to each other
            order = np.argsort([list(card["class_names"]).index(label) for label in labels], kind="stable")
            images = images[0].transpose(0, 1)[order][:, :, None]
            rows = Axis("class", [titles[i] for i in order])
        with self._new_file(self.path) as temporary:
            if self.path.suffix.lower() == ".gif":
                save_gif(temporary, images[0], settings_of(card))
            else:
                save_sheet(temporary, images, self.columns, rows, settings_of(card))
