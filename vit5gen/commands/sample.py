"""`vit5gen sample`."""

from pathlib import Path

from vit5gen.commands.options import Images, Options, argument
from vit5gen.config import DrawConfig, EvaluationConfig
from vit5gen.section import BatchSize, Natural
from vit5gen.system.errors import UserError

_EVALUATION = EvaluationConfig()


class SampleOptions(DrawConfig, Options):
    """Draw images from a run or a pipeline folder; running the command again resumes it."""

    checkpoint: str = argument(..., "RUN", "folder of a run, a pipeline folder, or a generator that ships: emoji-64")
    num_images: Images = argument(..., "N", "number of images")
    output: str = argument(..., "FILE|FOLDER", "FILE.png (grid), FILE.npz, or a folder")
    seed: Natural = argument(_EVALUATION.seed, "N", "seed of labels, initial noise and the solver's noise")
    batch_size: BatchSize = argument(_EVALUATION.batch_size, "N", "images drawn at once, per process")


def run(options: SampleOptions) -> None:
    """Draw images into FILE.png (a grid), FILE.npz or a folder, and write their card.

    Images of a killed run are kept and a finished output is not changed, on any number of processes.
    Raises `UserError` for bad values, an output of other settings, or a full disk; images drawn so far are kept.
    """
    from vit5gen.generation.card import pipeline_hash, versions
    from vit5gen.generation.find_pipeline import pipeline_folder
    from vit5gen.generation.many import describe_job, generate, make_job, open_pipeline
    from vit5gen.generation.outputs import open_output
    from vit5gen.system.distributed import start_processes
    from vit5gen.system.precision import PRECISIONS
    from vit5gen.system.progress import Progress

    # The pipeline, what it is to draw, and the card that tells so.
    state, draw, num_images = start_processes(), options.part(DrawConfig), options.num_images
    pipe = open_pipeline(options.checkpoint, draw, state.device)
    job = make_job(pipe, draw, num_images, options.seed, options.batch_size)
    target = open_output(Path(options.output), (num_images, *pipe.image_size, 3))
    folder = pipeline_folder(options.checkpoint)
    card = {
        "settings": describe_job(pipe, job, draw) | {"num_images": num_images},
        "checkpoint_sha256": pipeline_hash(folder),
        "versions": versions(),
        "attribution": pipe.config.get("attribution"),
        "class_names": {number: pipe.class_name(number) for number in job.classes},
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
        with Progress("images", num_images, "image", start, silent) as progress:
            for indices, images in generate(pipe, job, done):
                target.write(indices, images, job.labels[indices.start : indices.stop], pipe.num_evaluations)
                progress.update(min(len(indices) * state.num_processes, num_images - progress.n))
        state.wait_for_everyone()
        if state.is_main_process:
            target.finish(card, job.labels, [pipe.class_name(i) for i in job.labels])
            target.tidy()
        state.wait_for_everyone()
    except UserError:
        if state.is_main_process:
            target.tidy()
        raise
    except OSError as error:
        advice = "images drawn so far are kept: fix this, then run the same command again"
        raise UserError(f"output {target.path}: {error.strerror or error}; {advice}") from error
    state.print(f"{num_images} images: {target.path}, settings: {target.card_file}")
