"""What a run shows of itself: log lines, the loss curve, sample grids and the Frechet distance of the EMA.

Pictures and distances go through the very pipeline that users call.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import AutoencoderKL
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor
from tqdm.auto import tqdm

from vit5gen.config import Config
from vit5gen.data.images import make_source
from vit5gen.data.latents import images_beside
from vit5gen.evaluation import Extractor, frechet_of, frechet_report, load_extractor
from vit5gen.generation.card import TrainingFacts
from vit5gen.generation.grid import save_grid
from vit5gen.generation.many import SamplingJob, generate
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.generation.scheduler import SiTScheduler
from vit5gen.models import SiTTransformer2DModel
from vit5gen.system.distributed import gather_objects, on_main
from vit5gen.system.files import atomic
from vit5gen.system.precision import PRECISIONS
from vit5gen.training.checkpoint import gather_shards
from vit5gen.training.folder import RunFolder
from vit5gen.training.optimizers import learning_rate
from vit5gen.training.reference import Reference, build_reference
from vit5gen.training.trainer import Outcome, Trainer


class Interrupted(Exception):
    """A signal asked to stop while images were drawn."""


class Monitor:
    """Evaluates the first EMA of a run and keeps its log; every process calls it, the main one writes.

    stop_asked: returns whether this process has received a signal; an evaluation then ends early.
    """

    def __init__(
        self,
        config: Config,
        folder: RunFolder,
        trainer: Trainer,
        vae: AutoencoderKL,
        class_names: list[str],
        stop_asked: Callable[[], bool],
    ) -> None:
        self.config, self.folder, self.trainer, self.accelerator = config, folder, trainer, trainer.accelerator
        self.vae, self.class_names, self.stop_asked = vae, class_names, stop_asked
        self.accelerator.init_trackers("vit5gen")
        if self.accelerator.is_main_process:
            folder.repair_pipeline()
        total, hidden = config.training.num_steps, not self.accelerator.is_main_process
        self.bar = tqdm(total=total, initial=trainer.step, unit="step", disable=hidden)
        self._since = time.perf_counter(), trainer.step

    def write(self, outcome: Outcome) -> None:
        """Add a line on the steps since the last one to the log and the trackers, and show it in the bar."""
        trainer, step = self.trainer, self.trainer.step
        (begun, first), self._since = self._since, (time.perf_counter(), step)
        num_images = (step - first) * self.config.training.global_batch_size
        line = {
            "loss": trainer.mean_loss(),
            "grad_norm": outcome.grad_norm if outcome.finite else None,
            "learning_rate": learning_rate(step - 1, self.config.training),
            "images_per_second": num_images / (self._since[0] - begun),
            "skipped": trainer.skipped,
        }
        if len(outcome.losses) > 1 and outcome.finite:
            line |= {f"loss_{name}": loss for name, loss in outcome.losses.items()}
        if self.accelerator.is_main_process:
            self.folder.add_line({"step": step, **line})
        self.accelerator.log({key: value for key, value in line.items() if value is not None}, step=step)
        shown = {"loss": line["loss"], "norm": line["grad_norm"], "images/s": line["images_per_second"]}
        shown |= {"skipped": trainer.skipped} if trainer.skipped else {}
        self.bar.set_postfix({k: f"{value:.3g}" for k, value in shown.items() if value is not None}, refresh=False)

    def due(self, step: int) -> bool:
        """Tell whether ``step`` wants an evaluation that the run does not have yet."""
        every, last = self.config.evaluation.every, self.config.training.num_steps
        wanted = step in (0, last) or (every is not None and step % every == 0)
        return wanted and on_main(lambda: not self.folder.evaluated(step))

    def evaluate(self, step: int) -> bool:
        """Sample from the EMA: refresh ``pipeline/``, ``samples.png`` and ``loss.png``, add to ``metrics.json``.

        Returns False when a signal asked to stop before all images were drawn; nothing is written then.
        """
        self.bar.set_description("evaluate")
        try:
            with PRECISIONS[self.config.training.precision].autocast(self.accelerator.device):
                self._evaluate(step)
        except Interrupted:
            return False
        finally:
            self.bar.set_description("train")
            self.bar.unpause()  # the time left is that of steps
            self._since = time.perf_counter(), step
        return True

    def _evaluate(self, step: int) -> None:
        pipe = self._pipeline()
        entry: dict[str, Any] = {"step": step}
        if self._reference is not None:
            batches = (images for _, images in self._generate(pipe, self._reference.labels))
            generated = frechet_of(batches, self._extractor).all_reduce()
            report = frechet_report(generated, self._reference.distance, self._reference.floor)
            entry[self._extractor.metric] = report
            self.accelerator.log({self._extractor.metric: report["value"]}, step=step)
        classes = range(min(len(self.class_names), self.config.evaluation.grid_classes))
        labels = [label for label in classes for _ in range(self.config.evaluation.images_per_class)]
        parts = [part for share in gather_objects(list(self._generate(pipe, labels))) for part in share]
        grid = torch.cat([images for _, images in sorted(parts, key=lambda part: part[0].start)])
        if self.accelerator.is_main_process:
            picture = self.folder.samples
            save_grid(picture, grid, [self.class_names[label] for label in labels])
            save_loss_curve(self.folder.loss_curve, self.folder.lines())
            for tracker in self.accelerator.trackers:
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                pixels = np.asarray(Image.open(picture).convert("RGB"))[None]
                tracker.log_images({"samples": pixels}, step=step, **layout)
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            with self.folder.new_pipeline() as new:
                pipe.save_pretrained(new, facts=TrainingFacts(command=command, metrics=entry, picture=picture))
            if note := floor_note(self.folder.evaluations(), entry):
                print(f"\nnote: {note}", flush=True)
            # Last of all: an evaluation that stands in metrics.json has left everything else behind.
            self.folder.add_evaluation(entry)
        self.accelerator.wait_for_everyone()

    def _pipeline(self) -> SiTPipeline:
        model, average = self.trainer.model, self.trainer.averages["model"]
        with torch.device("meta"):
            transformer = SiTTransformer2DModel.from_config(model.config)
        weights = {name: gather_shards(value) for name, value in average.items(self.config.training.ema_decays[0])}
        transformer.load_state_dict({**model.state_dict(), **weights}, assign=True)
        transformer.eval().requires_grad_(False)
        if self.config.training.compile:
            transformer.compile_repeated_blocks()
        scheduler = SiTScheduler(self.config.flow.path, self.config.flow.prediction)
        names, attribution = dict(enumerate(self.class_names)), make_source(self.config.data).attribution
        return SiTPipeline(transformer, scheduler, self.vae, id2label=names, attribution=attribution)

    def _generate(self, pipe: SiTPipeline, labels: list[int]) -> Iterator[tuple[range, Tensor]]:
        evaluation = self.config.evaluation
        share = generate(pipe, SamplingJob(labels, evaluation.seed, evaluation.batch_size, self.config.sampling))
        for _ in range(math.ceil(len(labels) / (evaluation.batch_size * self.accelerator.num_processes))):
            # All processes ask in every round, those whose share has run out too: they stop together or not at all.
            asked = torch.tensor(float(self.stop_asked()), device=self.accelerator.device)
            if self.accelerator.reduce(asked, "sum") > 0:
                raise Interrupted
            yield from islice(share, 1)

    @cached_property
    def _extractor(self) -> Extractor:
        return load_extractor(self.config.evaluation.extractor, self.accelerator.device)

    @cached_property
    def _reference(self) -> Reference | None:
        """What images are compared with; None where latents are trained on and any process lacks their images."""
        absent = images_beside(self.config.data)[1] if self.config.data.latents is not None else ""
        if reasons := [reason for reason in gather_objects(absent) if reason]:
            self.accelerator.print(f"\nnote: evaluations compute no distance because there are no images: {reasons[0]}")
            return None
        return build_reference(self.config, self._extractor)

    def next_command(self) -> str:
        """Return the shell command that draws more images of the run's first class."""
        run, name, output = self.folder.path, self.class_names[0], self.folder.path / "more.png"
        images = ["--class", name, "--num-images", "8", "--guidance-scale", f"{self.config.sampling.guidance_scale:g}"]
        return shlex.join(["vit5gen", "sample", "--checkpoint", str(run), *images, "--output", str(output)])


def floor_note(earlier: list[dict[str, Any]], entry: dict[str, Any]) -> str | None:
    """Return a note if the last of the ``earlier`` evaluations with ``entry``'s distance has another floor."""
    for name in entry.keys() - {"step"}:
        before = next((old for old in reversed(earlier) if name in old), entry)
        was, now = before[name]["floor"], entry[name]["floor"]
        if was != now and (None in (was, now) or not math.isclose(was, now, rel_tol=1e-3)):
            changed = "the real images or the evaluation settings have changed"
            what = f"the floor is {now}, but was {was} at step {before['step']}: {changed}"
            return f"{name}: {what}; distances before and after are not comparable"
    return None


def save_loss_curve(path: Path, lines: list[dict[str, Any]]) -> None:
    """Plot the logged loss over steps."""
    figure = Figure(figsize=(6, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in lines], [line["loss"] for line in lines])
    axes.set(xlabel="step", ylabel="training loss")
    axes.grid(alpha=0.3)
    with atomic(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
