"""`vit5gen sample`."""

from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

import yaml
from pydantic import model_validator

from vit5gen.commands.options import Images, Options, argument
from vit5gen.config import STRENGTH, DrawConfig, EvaluationConfig, SamplingConfig, parse_yaml
from vit5gen.section import BatchSize, Natural, Several, Unit, UserPath, validate
from vit5gen.system.errors import UserError, choose

_EVALUATION = EvaluationConfig()
_SWEPT = (*SamplingConfig.model_fields, "autoguidance_scale", "seed", "strength")
_FRAMES = 9


class SampleOptions(DrawConfig, Options):
    """Draw images from a run or a pipeline folder; running the command again resumes it."""

    excludes: ClassVar = {"sweep": ("morph", "nearest"), "morph": ("classes", "labels", "nearest")}

    checkpoint: UserPath = argument(..., "RUN", "run, pipeline folder, or a generator that ships: emoji-64")
    num_images: Images = argument(..., "N", "number of images")
    output: UserPath = argument(..., "FILE|FOLDER", "FILE.png (grid), FILE.npz, or a folder")
    seed: Natural = argument(_EVALUATION.seed, "N", "seed of labels, initial noise and the solver's noise")
    batch_size: BatchSize = argument(_EVALUATION.batch_size, "N", "images drawn at once, per process")
    sweep: list[str] | None = argument(
        None, "KEY=V1,V2", "draw the same noise with each value of an option, or of two: columns, rows (FILE.png)"
    )
    morph: list[str] | None = argument(None, "CLASS", "draw the way between two classes (FILE.png or FILE.gif)")
    frames: Several | None = argument(None, "N", f"images of --morph on the way; default: {_FRAMES}")
    nearest: bool = argument(False, "", "show below each image the nearest one that the run was trained on (FILE.png)")
    image: UserPath | None = argument(None, "FILE", "begin with this picture, scaled and cut to the size drawn")
    strength: Unit | None = argument(None, "S", f"from 0 = --image itself to 1 = noise; default: {STRENGTH}")

    @model_validator(mode="after")
    def _complete(self) -> "SampleOptions":
        for name, other in (("frames", "morph"), ("strength", "image")):
            if getattr(self, name) is not None and getattr(self, other) is None:
                raise ValueError(f"--{name} has no effect without --{other}; omit it")
        if self.morph is not None and len(self.morph) != 2:
            raise ValueError(f"--morph: {len(self.morph)} classes; expected two: --morph CLASS CLASS")
        if self.nearest and Path(self.output).suffix.lower() != ".png":
            raise ValueError(f"--nearest: the pictures stand in a grid; expected --output FILE.png, not {self.output}")
        return self

    @model_validator(mode="after")
    def _guided(self) -> "SampleOptions":
        if not any("scale" in text.partition("=")[0] for text in self.sweep or ()):  # one that is swept is not off
            super()._guided()  # type: ignore[operator]  # of pydantic
        return self

    def read_sweep(self) -> dict[str, list[Any]]:
        """Return the values of each option in --sweep, as the option itself would have them; `UserError` for others."""
        given, found = self.model_dump(exclude_unset=True), dict[str, list[Any]]()
        for name, _, text in (swept := [text.partition("=") for text in self.sweep or ()]):
            key = choose("--sweep", name.lstrip("-").replace("-", "_"), _SWEPT)
            try:
                values = parse_yaml(f"[{text}]") or [""]
            except yaml.YAMLError as error:
                raise UserError(f"--sweep {name}={text}: not valid YAML; expected e.g. {name}=V1,V2") from error
            checked = [validate(SampleOptions, given | {key: value}, "--sweep") for value in values]
            found[key] = [getattr(one, key) for one in checked]
        if len(found) != len(swept) or len(found) > 2:
            raise UserError(f"--sweep {' '.join(self.sweep or ())}: expected one option, or two different ones")
        return found


def run(options: SampleOptions) -> None:
    """Draw images into FILE.png (a grid), FILE.npz or a folder, and write their card.

    Images of a killed run are kept and a finished output is not changed, on any number of processes.
    Raises `UserError` for bad values, an output of other settings, or a full disk; images drawn so far are kept.
    """
    from vit5gen.evaluation.nearest_images import nearest_pictures, open_training_set
    from vit5gen.generation.card import pipeline_hash, versions
    from vit5gen.generation.explore import plan_jobs
    from vit5gen.generation.find_pipeline import pipeline_folder
    from vit5gen.generation.image_start import open_picture
    from vit5gen.generation.many import describe_job, generate, make_job, open_pipeline
    from vit5gen.generation.outputs import GridOutput
    from vit5gen.system.distributed import start_processes
    from vit5gen.system.files import sha256
    from vit5gen.system.precision import PRECISIONS
    from vit5gen.system.progress import Progress

    # The pipeline, what it is to draw, and the card that tells so.
    state, num_images = start_processes(), options.num_images
    given = options.model_dump(include=set(DrawConfig.model_fields), exclude_unset=True)
    given |= {"classes": options.morph} if options.morph else {}
    draw = DrawConfig.model_construct(**given)  # checked together with the sweep
    pipe = open_pipeline(options.checkpoint, draw, state.device)
    job = make_job(pipe, draw, num_images, options.seed, options.batch_size)
    told: dict[str, Any] = {}
    if options.image is not None:
        strength = STRENGTH if options.strength is None else options.strength
        job = replace(job, image=open_picture(options.image), strength=strength)
        told |= {"image_sha256": sha256(Path(options.image)), "strength": strength}
    frames = (options.frames or _FRAMES) if options.morph else None
    jobs, target, explored = plan_jobs(pipe, job, Path(options.output), options.read_sweep(), frames)
    if options.nearest:
        training, network = open_training_set(options.checkpoint, options.batch_size, state.device)
        told |= {"nearest": {"extractor": network.identity, "training": training.identity}}
    folder = pipeline_folder(options.checkpoint)
    card = {
        "settings": describe_job(pipe, job, draw) | {"num_images": num_images} | told | explored,
        "checkpoint_sha256": pipeline_hash(folder),
        "versions": versions(),
        "attribution": pipe.config.get("attribution"),
        "class_names": job.names,
        "run": {
            "checkpoint": str(folder),
            "vae": pipe.vae.config.get("_name_or_path"),
            "batch_size": job.batch_size,
            "num_processes": state.num_processes,
            "device": state.device.type,
        },
    }
    target.check(card)
    state.wait_for_everyone()
    if target.finished:
        if state.is_main_process:
            target.tidy()  # a kill may have come between the card and this
        state.print(f"{target.path} is already finished; nothing to do")
        return

    # The images that are not there yet, then the output as a whole.
    PRECISIONS[draw.precision].warn_if_slow(state.device, state.print)
    try:
        if state.is_main_process:
            target.create_part(card)
        state.wait_for_everyone()
        done = target.evaluations() > 0
        state.wait_for_everyone()
        start, silent = int(done.sum()), not state.is_main_process
        with Progress("images", len(done), "image", start, silent) as progress:
            for first, one in zip(range(0, len(done), num_images), jobs, strict=True):
                for indices, images in generate(pipe, one, done[first : first + num_images]):
                    labels, place = one.labels[indices.start : indices.stop], first + indices.start
                    target.write(range(place, place + len(indices)), images, labels, pipe.num_evaluations)
                    progress.update(min(len(indices) * state.num_processes, len(done) - progress.n))
        state.wait_for_everyone()
        if options.nearest:
            found = nearest_pictures(target.images(), training.watch(), network)
            card |= {"nearest": [{"training_image": one.index, "distance": one.distance} for one in found]}
            caption = ["nearest training picture below", network.name]
            target = GridOutput(target.path, target.shape, [one.picture for one in found], caption)
        if state.is_main_process:
            target.finish(card, job.labels, [job.names[i] for i in job.labels])
            target.tidy()
        state.wait_for_everyone()
    except UserError:
        if state.is_main_process:
            target.tidy()
        raise
    except OSError as error:
        advice = "images drawn so far are kept: fix this, then run the same command again"
        raise UserError(f"output {target.path}: {error.strerror or error}; {advice}") from error
    state.print(f"{len(done)} images: {target.path}, settings: {target.card_file}")
