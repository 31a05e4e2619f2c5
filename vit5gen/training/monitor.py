"""What a run shows of itself: log lines, curves, sample grids, held-out loss and Frechet distance of the EMA.

Pictures and distances go through the very pipeline that users call.
"""

import math
import shlex
import sys
import time
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import ModelMixin
from PIL import Image
from torch import Tensor

from vit5gen.config import Config
from vit5gen.data.autoencoders.codec import normalization_of
from vit5gen.data.images import make_source
from vit5gen.data.latents import images_beside
from vit5gen.evaluation import Extractor, frechet_of, frechet_report, load_extractor
from vit5gen.flow import NonFiniteError
from vit5gen.generation.lora import Adapter
from vit5gen.generation.many import SamplingJob, generate
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.models import SiTTransformer2DModel
from vit5gen.report.history import floor_note, gap_note
from vit5gen.system.distributed import gather_objects, on_main, sum_over_processes
from vit5gen.system.precision import PRECISIONS
from vit5gen.system.progress import Progress
from vit5gen.training.build import build_scheduler
from vit5gen.training.checkpoint import gather_shards
from vit5gen.training.curves import save_curves
from vit5gen.training.held_out import NUM_HELD_OUT, HeldOut, affordable, affordable_count, find_held_out
from vit5gen.training.objectives import Batch
from vit5gen.training.optimizers import learning_rate
from vit5gen.training.previews import SampleGrid, preview_steps
from vit5gen.training.reference_moments import TrainingReference, build_reference
from vit5gen.training.run_folder import RunFolder, run_facts
from vit5gen.training.run_report import RunReport, spare_run
from vit5gen.training.trainable import adapter_of, fold
from vit5gen.training.trainer import Outcome, Trainer

_FAR = 3.0  # times what latents should be


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
        vae: ModelMixin,
        class_names: list[str],
        stop_asked: Callable[[], bool],
    ) -> None:
        self.config, self.folder, self.trainer, self.accelerator = config, folder, trainer, trainer.accelerator
        self.vae, self.class_names, self.stop_asked = vae, class_names, stop_asked
        self.accelerator.init_trackers("vit5gen")
        if self.accelerator.is_main_process:
            folder.repair_pipeline()
        total, every = config.training.num_steps, config.training.log_every
        self.bar = Progress("train", total, "step", trainer.step, not self.accelerator.is_main_process, every)
        self._since = time.perf_counter(), trainer.step
        self._start, self._previews = trainer.step, preview_steps(total, every)
        self._seconds = dict.fromkeys(
            ("training", "held-out encoding", "held-out loss", "previews", "evaluations"), 0.0
        )
        self._saved = trainer.step  # the newest checkpoint that the log tells of
        self._events: dict[str, Any] = {"resumed": trainer.step} if trainer.step else {}
        self._events |= {"changed": folder.changes} if folder.changes else {}
        # What the licence of the images wants, and of those that the weights began with.
        lines = [make_source(config.data).attribution, trainer.data.get("attribution")]
        self._attribution = "; ".join(dict.fromkeys(filter(None, lines))) or None
        self._samples = SampleGrid(config, folder.samples, class_names, self._attribution)
        self._report = RunReport(config, folder, self._samples)
        self._adapter: Adapter | None = None  # of the newest pipeline

    def describe_first(self, batches: Generator[Batch]) -> Generator[Batch]:
        """Pass batches on; tell mean and deviation of the first one's latents, and warn where they are not noise's."""
        with closing(batches):
            first = next(batches)
            self._describe(first.x1)
            yield first
            yield from batches

    def _describe(self, latents: Tensor) -> None:
        values = latents.cpu().double()  # of which not every device has a kind
        sums = torch.tensor([values.numel(), values.sum(), values.square().sum()], dtype=torch.float64)
        count, total, squares = sum_over_processes(sums).tolist()
        mean, power = total / count, squares / count
        std = math.sqrt(max(power - mean**2, 0))
        self._events |= {"latents_mean": mean, "latents_std": std} if math.isfinite(power) else {}
        far = "; warning: far from 0 and 1: check vae.name, or set vae.normalize to measured"
        far = "" if 1 / _FAR**2 <= power <= _FAR**2 else far
        self.accelerator.print(
            f"\nnote: latents of the first batch: mean {mean:.3g}, standard deviation {std:.3g}{far}"
        )

    def write(self, outcome: Outcome) -> None:
        """Add a line on the steps since the last one to the log and the trackers, and show it in the bar."""
        trainer, step = self.trainer, self.trainer.step
        (begun, first), self._since = self._since, (time.perf_counter(), step)
        num_images = (step - first) * self.config.training.global_batch_size
        self._seconds["training"] += self._since[0] - begun
        loss, losses = trainer.mean_losses()
        line = {
            "loss": loss,
            "grad_norm": outcome.grad_norm if outcome.finite else None,
            "learning_rate": learning_rate(step - 1, self.config.training),
            "images_per_second": num_images / (self._since[0] - begun),
            "skipped": trainer.skipped,
        }
        line |= {f"loss_{name}": mean for name, mean in losses.items()}
        self.accelerator.log({key: value for key, value in line.items() if value is not None}, step=step)
        if not outcome.stop and (self._evaluation_due(step) or (step in self._previews and step in self._affordable)):
            line |= self._held_out_loss
            self._since = time.perf_counter(), step
        if self.accelerator.is_main_process:
            saved = max(self.folder.saved_steps(), default=0)
            events = self._events | ({"checkpoint": saved} if saved > self._saved else {})
            self.folder.add_line({"step": step, **line, **events})
            self._saved, self._events = saved, {}
        shown = {"loss": line["loss"], "held-out": line.get("held_out_loss"), "norm": line["grad_norm"]}
        shown |= {"images/s": line["images_per_second"], "skipped": trainer.skipped or None}
        self.bar.set_postfix({k: f"{value:.3g}" for k, value in shown.items() if value is not None}, refresh=False)

    def due(self, step: int) -> bool:
        """Tell whether ``step`` wants an evaluation that the run does not have yet, or a preview."""
        return (step in self._previews and step > self._start) or self._evaluation_due(step)

    def _evaluation_due(self, step: int) -> bool:
        every, last = self.config.evaluation.every, self.config.training.num_steps
        wanted = step in (0, last) or (every is not None and step % every == 0)
        return wanted and on_main(lambda: not self.folder.evaluated(step))

    def evaluate(self, step: int) -> bool:
        """Draw from the EMA: refresh ``samples.png`` and ``loss.png``; then the distance, unless this is a preview.

        An evaluation, unlike a preview, also refreshes ``pipeline/`` and adds to ``metrics.json``, last of all. Returns
        False when a signal asked to stop before all images were drawn.
        """
        self.bar.set_description("evaluate")
        shown, begun, evaluation = self.bar.postfix, time.perf_counter(), self._evaluation_due(step)
        try:
            with PRECISIONS[self.config.training.precision].autocast(self.accelerator.device):
                grid = self._draw()
                if evaluation:
                    self._evaluate(grid, {"step": step, **self._held_out_loss})
                else:
                    on_main(lambda: self._show(grid, self.folder.evaluations()))
            self._seconds["evaluations" if evaluation else "previews"] += time.perf_counter() - begun
            if evaluation and step == self.config.training.num_steps:
                self._tell_seconds()
        except Interrupted:
            return False
        except NonFiniteError as error:  # the steps to come may be finite again
            if evaluation or self.accelerator.num_processes > 1:
                raise
            print(f"\nnote: no preview at step {step}: {error}", flush=True)
        finally:
            self.bar.set_description("train", refresh=False)
            self.bar.set_postfix_str(str(shown or ""))
            self.bar.unpause()  # the time left is that of steps
            self._since = time.perf_counter(), step
            for of_step in ("_pipeline", "_held_out_loss"):
                self.__dict__.pop(of_step, None)
        return True

    def _evaluate(self, grid: Tensor, entry: dict[str, Any]) -> None:
        """Measure the distance, and keep what was measured with the pipeline that gave it."""
        if self._has_images:  # the distance takes a while: show what is drawn
            on_main(lambda: self._samples.save(grid, entry["step"], self.folder.evaluations()))
        if self._reference is not None:
            batches = (images for _, images in self._generate(self._reference.labels))
            generated = frechet_of(batches, self._extractor).all_reduce()
            report = frechet_report(generated, self._reference.distance, self._reference.floor)
            entry[self._extractor.metric] = report
            self.accelerator.log({self._extractor.metric: report["value"]}, step=entry["step"])
        if self.accelerator.is_main_process:
            earlier = self.folder.evaluations()
            self._show(grid, [*earlier, entry])
            command = shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]])
            facts = run_facts(self.folder, self.config, entry, command)
            with self.folder.new_pipeline() as new:
                self._pipeline.save_pretrained(new, facts=facts, adapter=self._adapter)
            if self._reference is not None and entry["step"] == self.config.training.num_steps:
                with spare_run():
                    self._report.find_nearest(grid, self._extractor, entry["step"])
            with spare_run():
                self._report.refresh(grid, self._pipeline, [*earlier, entry], command)
            if note := floor_note(earlier, entry):
                print(f"\nnote: {note}", flush=True)
            # Last of all: an evaluation that stands in metrics.json has left everything else behind.
            self.folder.add_evaluation(entry)
        self.accelerator.wait_for_everyone()

    def _tell_seconds(self) -> None:
        """Print what the steps and all else cost in time; nothing where there was no step."""
        if steps := self._seconds.pop("training"):
            parts = [f"{what}: {seconds:.1f} s ({seconds / steps:.1%})" for what, seconds in self._seconds.items()]
            self.accelerator.print(f"\ntraining steps: {steps:.1f} s; besides {', '.join(parts)}", flush=True)

    def _show(self, grid: Tensor, evaluations: list[dict[str, Any]]) -> None:
        """Write ``samples.png`` and ``loss.png``, and say where training pictures alone gain; the main process does."""
        lines, step = self.folder.lines(), self.trainer.step
        self._samples.save(grid, step, evaluations)
        save_curves(self.folder.loss_curve, lines, evaluations, self.folder.saved_steps())
        for tracker in self.accelerator.trackers:
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            pixels = np.asarray(Image.open(self.folder.samples).convert("RGB"))[None]
            tracker.log_images({"samples": pixels}, step=step, **layout)
        if note := gap_note(lines, evaluations):
            print(f"\nnote: {note}", flush=True)

    @cached_property
    def _held_out_loss(self) -> dict[str, float]:
        """What a log says of the held-out loss of this step, in the run's precision; `evaluate` drops it."""
        found: dict[str, float] = {}
        if self._held_out is not None:
            pipe, begun = self._pipeline, time.perf_counter()  # which the pictures of this step use, too
            with PRECISIONS[self.config.training.precision].autocast(self.accelerator.device):
                loss = self._held_out.loss(pipe)
            found = {"held_out_loss": loss} if math.isfinite(loss) else {}
            self._seconds["held-out loss"] += time.perf_counter() - begun
            self.accelerator.log(found, step=self.trainer.step)
        return found

    @cached_property
    def _affordable(self) -> set[int]:
        """The steps of previews at which the held-out loss is measured, too."""
        batch = 2 * self.config.training.global_batch_size  # forwards that cost as much as a compiled step
        return affordable(self._previews, 0 if self._held_out is None else len(self._held_out.images) / batch)

    def _draw(self) -> Tensor:
        """Return the images of samples.png (N, 3, H, W), uint8, on every process."""
        parts = [part for share in gather_objects(list(self._generate(self._samples.labels))) for part in share]
        return torch.cat([images for _, images in sorted(parts, key=lambda part: part[0].start)])

    @cached_property
    def _pipeline(self) -> SiTPipeline:
        """The pipeline of this step; `evaluate` drops it."""
        model, settings = self.trainer.model, self.config.training
        average = dict(self.trainer.averages["model"].items(settings.ema_decays[0]))
        state = {name: gather_shards(value) for name, value in {**model.state_dict(), **average}.items()}
        self._adapter = adapter_of(state, average, settings, None if self._adapter is None else self._adapter.base)
        with torch.device("meta"):
            transformer = SiTTransformer2DModel.from_config(model.config)
        transformer.load_state_dict(fold(state, settings), assign=True)
        transformer.eval().requires_grad_(False)
        if settings.compile:
            transformer.compile_repeated_blocks()
        scheduler = build_scheduler(self.config)
        names = dict(enumerate(self.class_names))
        seen = None if self.config.vae.normalize == "config" else normalization_of(self.vae)._asdict()
        return SiTPipeline(transformer, scheduler, self.vae, None, names, self._attribution, seen)

    def _generate(self, labels: list[int]) -> Iterator[tuple[range, Tensor]]:
        evaluation = self.config.evaluation
        job = SamplingJob(labels, evaluation.seed, evaluation.batch_size, self.config.sampling)
        share = generate(self._pipeline, job)
        for first in range(0, len(labels), evaluation.batch_size * self.accelerator.num_processes):
            self.bar.set_postfix_str(f"{first}/{len(labels)} images")
            # All processes ask in every round, those whose share has run out too: they stop together or not at all.
            asked = torch.tensor(float(self.stop_asked()), device=self.accelerator.device)
            if self.accelerator.reduce(asked, "sum") > 0:
                raise Interrupted
            yield from islice(share, 1)

    @cached_property
    def _extractor(self) -> Extractor:
        return load_extractor(self.config.evaluation.extractor, self.accelerator.device)

    @cached_property
    def _has_images(self) -> bool:
        """Whether all processes have the images beside latents that are given; else says so."""
        absent = images_beside(self.config.data)[1] if self.config.data.latents is not None else ""
        if reasons := [reason for reason in gather_objects(absent) if reason]:
            what = f"evaluations compute no distance and no held-out loss because there are no images: {reasons[0]}"
            self.accelerator.print(f"\nnote: {what}")
        return not reasons

    @cached_property
    def _reference(self) -> TrainingReference | None:
        """What images are compared with; None where any process lacks them."""
        return build_reference(self.config, self._extractor) if self._has_images else None

    def _count_held_out(self) -> int:
        """Return for how many images the log has losses; those of earlier versions do not say so."""
        told = [line for line in self.folder.lines() if "held_out_checksum" in line]
        if told:
            return int(told[0].get("held_out_count", NUM_HELD_OUT))
        return affordable_count(self.config.training)

    @cached_property
    def _held_out(self) -> HeldOut | None:
        """The held-out images: as many as the run could afford when it began, so that its losses stay comparable."""
        begun, count = time.perf_counter(), on_main(self._count_held_out)
        found = find_held_out(self.config, self.vae, self.class_names, count) if self._has_images else None
        if found is not None:
            self._events |= {"held_out_checksum": found.checksum, "held_out_count": count}
            self._seconds["held-out encoding"] += time.perf_counter() - begun
        return found

    def next_command(self) -> str:
        """Return the shell command that draws more images of the run's first class."""
        run, name, output = self.folder.path, self.class_names[0], self.folder.path / "more.png"
        images = ["--class", name, "--num-images", "8", "--guidance-scale", f"{self.config.sampling.guidance_scale:g}"]
        return shlex.join(["vit5gen", "sample", "--checkpoint", str(run), *images, "--output", str(output)])
