"""`vit5gen evaluate`."""

import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from vit5gen.commands.options import Images, Lengths, Options, argument, with_picture
from vit5gen.config import DrawConfig, EvaluationConfig, ReadConfig
from vit5gen.registry import name_and_options
from vit5gen.section import BatchSize, Natural, Plug, UserPath
from vit5gen.system.errors import UserError, choose
from vit5gen.system.files import check_writable, write_json

_OF_PIPELINES = (*DrawConfig.model_fields, "num_images", "seed")
_OF_SAMPLES = (*_OF_PIPELINES, "shuffle")


class ExtractorOptions(Options):
    """What turns images into features."""

    extractor: Plug = argument(
        "inception", "NAME", "inception, effnet-lite0, dinov2, clip, fdr6 or your own, e.g. 'NAME: {option: value}'"
    )
    weights: UserPath | None = argument(None, "FILE", "its weights (fdr6: a folder); default: its cache, or a download")
    weights_sha256: str | None = argument(None, "HASH", "expected hash of --weights, if not the published file")
    batch_size: BatchSize = argument(50, "N", "images per batch, per process")


class ScoreOptions(DrawConfig, ReadConfig, ExtractorOptions):
    """What is scored, how, and how it is drawn where it is a run or a pipeline folder."""

    metrics: list[Plug] | None = argument(
        None, "NAME", "metrics to compute, e.g. fid 'pr: {k: 5}'; default: what the inputs allow, less the slow"
    )
    denominators: UserPath | None = argument(None, "REF", "validation images, for FDr^6; default: published figures")
    num_images: Images = argument(50_000, "N", "images to draw from a run or pipeline folder")

    def check(self, paths: list[str]) -> None:
        """Raise `UserError` for what can be told to be wrong before anything is loaded; a pipeline may be in a path."""
        from vit5gen.evaluation.metric import METRICS
        from vit5gen.generation.find_pipeline import find_pipeline

        for name, given in map(name_and_options, self.metrics or ()):
            METRICS.check(choose("--metrics", name, METRICS.names()), given, f"--metrics {name}")
        is_wanted = "fdr6" in (name_and_options(plug)[0] for plug in self.metrics or ["fdr6"])
        if self.denominators is not None and not (is_wanted and name_and_options(self.extractor)[0] == "fdr6"):
            advice = "give --extractor fdr6, and fdr6 among --metrics, or omit it"
            raise UserError(f"--denominators has no effect without FDr^6; {advice}")
        idle = sorted(set(_OF_PIPELINES) & self.model_fields_set)
        if idle and not any(map(find_pipeline, paths)):
            advice = "the option is only for runs and pipeline folders; omit it"
            raise UserError(f"{self.spell(idle)}: {paths[0]} already contains images; {advice}")


class EvaluateOptions(ScoreOptions):
    """Score images against a reference, or build a reference.

    Sampling options apply to runs and pipeline folders, whose images are drawn while they are scored.
    """

    excludes: ClassVar = {
        "save_statistics": ("reference", "output", "metrics", "keep_groups", "denominators", *_OF_SAMPLES),
        "protocol": ("denominators",),
        "ema_length": ("save_statistics", "keep_groups"),
    }

    samples: Annotated[list[UserPath], Field(min_length=1)] = argument(
        ..., "SAMPLES", "npz, folder, zip or tar of images, run or pipeline; several give mean and std", option=""
    )
    reference: UserPath | None = argument(None, "REF", "ADM npz, imagenet256 | imagenet512, statistics, real images")
    output: UserPath | None = argument(None, "CARD.json", "write all settings and results to this card")
    save_statistics: UserPath | None = argument(None, "FILE", "write the statistics of SAMPLES, as a reference")
    protocol: Literal["adm"] | None = argument(
        None, "adm", "ADM's metrics and settings; prints FID-50K only if all conditions are met"
    )
    seed: list[Natural] = argument(
        [EvaluationConfig().seed], "N", "seeds for drawing from a run; several give mean and std"
    )
    ema_length: Lengths | None = argument(
        None, "L", "lengths of averages to rebuild from a run's snapshots and to compare; a plot lies beside the card"
    )
    keep_groups: bool = argument(False, "", "keep moments beside the card, so that `compare` needs no images")


def run(options: EvaluateOptions) -> int:
    """Score samples and write the card, or build a reference from images; print the result. Return the exit code."""
    if options.reference is None and options.save_statistics is None:
        raise UserError("evaluate: give either --reference REF or --save-statistics FILE")
    from vit5gen.evaluation import load_extractor
    from vit5gen.evaluation.evaluation_card import evaluation_card, markdown, open_samples
    from vit5gen.evaluation.length_scan import save_scan
    from vit5gen.evaluation.metrics.frechet_ratio import with_denominators
    from vit5gen.evaluation.reference import open_reference, reference_of, save_statistics
    from vit5gen.evaluation.samples import check_used, open_image_set
    from vit5gen.system.distributed import start_processes

    # What can be told to be wrong before anything is loaded.
    options.check(options.samples)
    if options.keep_groups and options.output is None:
        raise UserError("--keep-groups: there is no card to keep groups beside; give --output CARD.json")
    alone = "--save-statistics" if options.save_statistics is not None else "--ema-length" if options.ema_length else ""
    if alone and len(options.samples) != 1:
        raise UserError(f"{alone}: {len(options.samples)} sets of images; expected one: give one SAMPLES")
    picture = with_picture(options.output) if options.ema_length and options.output else None
    if (file := options.output or options.save_statistics) is not None:
        check_writable(file)
    state, batch_size, protocol = start_processes(), options.batch_size, options.protocol
    read, draw = options.part(ReadConfig), options.part(DrawConfig)
    how: tuple[Any, ...] = draw, options.num_images, options.seed, batch_size, protocol, read
    opened = _open_lengths(options.samples[0], options.ema_length, how) if options.ema_length else []
    network = load_extractor(options.extractor, state.device, options.weights, options.weights_sha256)

    # A reference alone.
    if options.save_statistics is not None:
        images = open_image_set(options.samples[0], batch_size, protocol, read)
        check_used(read, [images.identity])
        made = reference_of(images, network)
        if state.is_main_process:
            save_statistics(made, network, Path(options.save_statistics))
            print(f"{options.save_statistics}: {made.count} images, {network.name}")
        return 0

    # The samples, the reference, and the card of their scores.
    for path in () if opened else dict.fromkeys(options.samples):  # what is given twice counts once
        opened += open_samples(path, *how)
    assert options.reference is not None
    real = open_reference(options.reference, network, batch_size, protocol, read)
    if options.denominators is not None:
        real = with_denominators(real, open_reference(options.denominators, network, batch_size, read=read), network)
    check_used(read, [real.identity, real.identity.get("denominators", {}), *(images.identity for images in opened)])
    kept = options.output if options.keep_groups else None
    card = evaluation_card(opened, real, network, options.metrics, protocol, kept, options.ema_length or ())
    if state.is_main_process:
        for warning in card["warnings"]:
            kind = "note" if " is not computed: " in warning else "warning"
            print(f"{kind}: {warning}", file=sys.stderr)
        if options.output is not None:
            write_json(options.output, card)
        if picture is not None:
            save_scan(picture, card["scan"], f"{Path(options.samples[0]).name}, {opened[0].count} images each")
        print("\n".join(markdown(card)))
    return 0


def _open_lengths(run: str, lengths: list[float], how: tuple[Any, ...]) -> list[Any]:
    """Return the `Samples` that averages of a run draw, whose pipelines are written to a temporary folder."""
    from vit5gen.evaluation.evaluation_card import open_samples
    from vit5gen.system.distributed import gather_objects, on_main
    from vit5gen.training.export import export_lengths

    opened = []
    with tempfile.TemporaryDirectory() as own:
        folder = Path(on_main(lambda: own))  # of the main process
        places = {length: folder / f"length_{length}" for length in lengths}
        on_main(lambda: export_lengths(Path(run), None, places))
        for length, place in places.items():
            for images in open_samples(str(place), *how):
                images.sampling["vae"] = f"of {run}"  # type: ignore[index]  # not the temporary folder's
                told = {"path": f"{run}, length {length}", "ema_length": length}
                opened.append(replace(images, identity=images.identity | told))
        gather_objects(None)  # all have read them
    return opened
