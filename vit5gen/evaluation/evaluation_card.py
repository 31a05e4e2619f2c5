"""Samples and a reference to an evaluation card: every score, its error, and every setting that it depends on."""

import json
import math
import statistics
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from vit5gen.config import DrawConfig, ReadConfig
from vit5gen.evaluation.extractors.inception import INCEPTION_SHA256
from vit5gen.evaluation.features import Extractor
from vit5gen.evaluation.groups import save_groups
from vit5gen.evaluation.length_scan import find_best
from vit5gen.evaluation.metric import RELIABLE_COUNT, Metric, Score, available, scores
from vit5gen.evaluation.reference import REFERENCE_ROWS, Reference, Scan, scan
from vit5gen.evaluation.samples import Samples, open_image_set
from vit5gen.generation.card import pipeline_hash, versions
from vit5gen.generation.find_pipeline import find_pipeline, has_begun, pipeline_folder
from vit5gen.generation.many import SamplingJob, describe_job, generate, make_job, open_pipeline
from vit5gen.generation.outputs import network_evaluations
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.registry import name_and_options
from vit5gen.section import Plug
from vit5gen.system.distributed import is_main, processes, rank_and_world, sum_over_processes
from vit5gen.system.errors import UserError, choose
from vit5gen.system.files import read_json

ADM_METRICS: dict[str, dict[str, Any]] = {"fid": {}, "sfid": {}, "is": {}, "pr": {"adm_fp16": True}}
_LOSSY = {"JPEG", "JPEG2000", "MPO", "WEBP", "AVIF"}
_SHOWN = {"fid": "FID", "sfid": "sFID", "is": "IS", "pr": "precision and recall", "kid": "KID"}
_SHOWN |= {"dc": "density and coverage", "fdr6": "FDr^6"}
_OF_A_SEED = ("seed", "labels_sha256", "batch_size", "network_evaluations")  # differ between sets of one model


def samples_from_pipeline(pipe: SiTPipeline, path: str | Path, job: SamplingJob, draw: DrawConfig) -> Samples:
    """Samples that a pipeline draws while they are scored; no image is written."""
    sampling: dict[str, Any] = describe_job(pipe, job, draw) | {
        "labels_sha256": sha256(json.dumps(list(job.labels)).encode()).hexdigest(),
        "batch_size": job.batch_size,
        "device": pipe.device.type,
        "vae": None if pipe.vae is None else pipe.vae.config.get("_name_or_path"),
        "attribution": pipe.config.get("attribution"),
    }

    def chunks() -> Iterable[tuple[int, Tensor]]:
        evaluations = torch.zeros((), dtype=torch.int64)
        for indices, images in generate(pipe, job):
            evaluations += pipe.num_evaluations * len(indices)
            yield indices.start, images
        total = int(sum_over_processes(evaluations))
        sampling["network_evaluations"] = network_evaluations(total, len(job.labels))

    identity = {"kind": "pipeline", "path": str(path), "sha256": pipeline_hash(pipeline_folder(path))}
    names = [pipe.class_name(label) for label in job.labels]
    return Samples(len(job.labels), chunks, identity, names, sampling)


def evaluation_card(
    samples: Sequence[Samples],
    reference: Reference,
    extractor: Extractor,
    metrics: Sequence[Plug] | None = None,
    protocol: str | None = None,
    keep_groups: str | Path | None = None,
    lengths: Sequence[float] = (),
) -> dict[str, Any]:
    """Score sets of samples and return the evaluation card.

    ``metrics``: each ``NAME`` or ``{NAME: {option: value}}``, by default all that the inputs allow.
    ``protocol="adm"`` fixes ADM's metrics with their settings, and allows the name FID-50K if all of them are met.
    ``models`` holds the scores of each model: of several seeds (see `_by_model`) their mean, with the deviation between
    them. ``metrics`` are the scores of the first. ``keep_groups``: write the groups of the one set beside this card.
    ``lengths``: of the average that each model is, of one run: ``metrics`` are then the scores of the best.
    Raises `UserError` on bad input.
    """
    if keep_groups is not None and len(samples) != 1:
        raise UserError(f"--keep-groups: {len(samples)} sets of samples; expected one; score them one by one")

    # Which metrics: those that are asked for, ADM's, or all that reference and extractor allow.
    adm = protocol is not None and choose("protocol", protocol, ["adm"]) == "adm"
    if adm and metrics is not None and set(map(str, metrics)) != set(ADM_METRICS):
        raise UserError(f"--protocol adm fixes the metrics {', '.join(ADM_METRICS)}; omit --metrics")
    chosen = [{name: options} for name, options in ADM_METRICS.items()] if adm else metrics
    labels, fewest = [images.labels_among(extractor.classes) for images in samples], min(one.count for one in samples)
    labelled = all(found is not None for found in labels)
    wanted, skipped = available(chosen, reference, extractor, fewest, labelled=labelled)
    need_rows = any(metric.keeps_rows for metric in wanted.values())

    # A pass over each set of images, in which all processes share; the main one has the scores.
    runs: list[dict[str, Score]] = []
    described = []
    for images, found_labels in zip(samples, labels, strict=True):
        rows, names = images.count if need_rows else 0, images.class_names
        found = scan(images.watch(), images.count, extractor, rows, labels=found_labels, row_labels=names)
        if is_main():
            runs.append(scores(found, reference, extractor, wanted))
            described.append(describe(images, found, reference))
    if not is_main():
        return {}

    # The card: a model has the mean over its seeds, and the name FID-50K is earned by keeping all of ADM's protocol.
    differences = _differences_from_adm(samples, reference, extractor) if adm else []
    label = "FID-50K" if adm and not differences else extractor.metric
    models: list[dict[str, Any]] = [
        {"samples": sets, "metrics": _join([runs[i] for i in sets])} for sets in _by_model(samples)
    ]
    best = find_best([model["metrics"] for model in models]) if lengths else {}
    first = next(iter(best.values()), 0)
    card: dict[str, Any] = {
        "samples": described,
        "reference": reference.identity | {"count": reference.count},
        "extractor": extractor.identity,
        "licences": extractor.licences,
        "metrics": models[first]["metrics"],
        "models": models,
        "skipped": skipped,
        "protocol": {"name": protocol, "differences": differences, "label": label},
        "warnings": _warnings(samples, 1 if lengths else len(models), extractor, wanted, skipped, differences)
        + doubts(described, reference, extractor, wanted),
        "processes": rank_and_world()[1],
        "versions": versions() | {"torch-fidelity": version("torch-fidelity"), "scipy": version("scipy")},
    }
    if lengths:
        card["scan"] = {
            "ema_lengths": list(lengths),
            "metrics": {name: [model["metrics"][name] for model in models] for name in models[0]["metrics"]},
            "best": {name: lengths[number] for name, number in best.items()},
        }
    if keep_groups is not None:
        card["groups"] = save_groups(found, reference, keep_groups)
    if given := {name: options for name, options in map(name_and_options, metrics or ()) if options}:
        card["metric_options"] = given
    card["markdown"] = "\n".join(markdown(card)[2:])
    return card


def describe(images: Samples, found: Scan, reference: Reference) -> dict[str, Any]:
    """Return what a card records of a set of images; ``in_reference``: how many have the pixels of one there."""
    entry = images.identity | {"count": images.count, "size": found.size, "sampling": images.sampling}
    if reference.hashes is not None and images.hashes:
        entry["in_reference"] = int(torch.isin(images.hashes[0], reference.hashes).sum())
    return entry


def doubts(
    entries: Sequence[dict[str, Any]], reference: Reference, extractor: Extractor, metrics: Mapping[str, Metric]
) -> list[str]:
    """Return in what the images of `describe` differ from the reference's, where there are too few, and what else.

    That is what the metrics note themselves.
    """
    real = reference.identity
    real = real["source"] if real["kind"] == "statistics" else real
    whole = {"path": f"reference {reference.identity['path']}", "count": reference.count or math.inf}
    found = [f"{_SHOWN.get(name, name)}: {note}" for name, one in metrics.items() for note in one.notes(reference)]
    for one in (*entries, whole):
        if one["count"] <= extractor.dim:
            why = f"their covariance has no full rank, and {extractor.metric} is mostly bias"
            advice = f"give more than {extractor.dim}, or an extractor of fewer features"
            found.append(f"{one['path']}: {one['count']} images for {extractor.dim} features: {why}; {advice}")
    for one in entries:
        sizes = [f"{width}x{height}" for height, width in (one["size"], real.get("size", one["size"]))]
        if sizes[0] != sizes[1]:
            found.append(f"{one['path']} has images of {sizes[0]}, the reference of {sizes[1]}; see --resize, --crop")
        formats, others = one.get("formats", ()), real.get("formats", ())
        if formats and others and _LOSSY & {*formats} != _LOSSY & {*others}:
            kinds = f"{', '.join(formats)}, the reference of {', '.join(others)}"
            found.append(f"{one['path']} has files of {kinds}: what compression loses counts as a difference")
        if known := one.get("in_reference"):
            copies = f"{known} of {one['count']} images are also in the reference, pixel by pixel"
            found.append(f"{one['path']}: {copies}; copies score too well: compare with other images")
    return list(dict.fromkeys(found))


def drawn(identity: dict[str, Any], sampling: dict[str, Any] | None) -> tuple[str | None, dict[str, Any]]:
    """Return the hash of the checkpoint that drew a set and its settings, as far as they are known."""
    card = sampling or {}
    if identity["kind"] == "pipeline":
        return identity["sha256"], card
    return card.get("checkpoint_sha256"), card.get("settings") or {}


def markdown(card: dict[str, Any]) -> list[str]:
    """Return a Markdown table of the card: head, rule, and a row for each model, which says what its ± is."""
    paths = [Path(card["samples"][model["samples"][0]]["path"]) for model in card["models"]]
    short = len({path.name for path in paths}) == len(paths)
    rows = []
    for model, path in zip(card["models"], paths, strict=True):
        seeds, count = len(model["samples"]), card["samples"][model["samples"][0]]["count"]
        name = path.name if short else path
        cells = {"samples": f"{name}, mean of {seeds} seeds" if seeds > 1 else name, "n": count}
        for metric, score in model["metrics"].items():
            error = score.get("deviation", score.get("standard_error"))
            shown = f"{score['value']:.4g}" if error is None else f"{score['value']:.4g} ± {error:.2g}"
            cells[card["protocol"]["label"] if metric == "FID" else metric] = shown
            if "floor" in (first := score.get("runs", [score])[0]):
                cells[f"{metric} floor"] = "unknown" if first["floor"] is None else f"{first['floor']:.4g}"
        cells["±"] = "standard deviation between seeds" if seeds > 1 else "standard error"
        rows.append(cells | {"reference": Path(card["reference"]["path"]).name})
    table = [list(rows[0]), ["---"] * len(rows[0]), *(list(row.values()) for row in rows)]
    return [f"| {' | '.join(map(str, row))} |" for row in table]


def open_samples(
    path: str,
    draw: DrawConfig,
    num_images: int,
    seeds: Sequence[int],
    batch_size: int,
    protocol: str | None = None,
    read: ReadConfig | None = None,
) -> list[Samples]:
    """Open images as ``read`` says, or a run or pipeline folder that draws as many of each seed as are asked for.

    The card next to images, if any, records how they were drawn.
    """
    if find_pipeline(path) is None and not has_begun(path):
        read = read or ReadConfig()
        images = open_image_set(path, batch_size, protocol, read)
        images = images.shuffled() if read.shuffle else images
        file = Path(images.identity["path"])
        card = file / "card.json" if file.is_dir() else file.with_suffix(".card.json")
        drawn = read_json(card, "sampling card") if card.is_file() else None
        names = (drawn or {}).get("class_names", {})  # by number, which JSON has turned into text
        return [replace(images, sampling=drawn, labels=[names.get(str(label), label) for label in images.labels])]
    pipe = open_pipeline(path, draw, processes().device)
    jobs = [make_job(pipe, draw, num_images, seed, batch_size) for seed in dict.fromkeys(seeds)]
    return [samples_from_pipeline(pipe, path, job, draw) for job in jobs]


def _by_model(samples: Sequence[Samples]) -> list[list[int]]:
    """Return the numbers of the sets of each model: several only of one checkpoint, drawn alike but for their seeds.

    The pipeline that draws, or the card next to a file, decides; a file without a card is a model of its own.
    """
    models: dict[str, dict[Any, int]] = {}
    for i, images in enumerate(samples):
        card = images.sampling or {}
        checkpoint, settings = drawn(images.identity, images.sampling)
        alike = {key: value for key, value in settings.items() if key not in _OF_A_SEED}
        key = json.dumps([images.identity["kind"], checkpoint, card.get("versions"), alike], sort_keys=True)
        seeds = models.setdefault(key if "seed" in settings and checkpoint else f"set {i}", {})
        if (seed := settings.get("seed")) in seeds:
            seeds = models.setdefault(f"set {i}", {})
        seeds[seed] = i
    return [list(seeds.values()) for seeds in models.values()]


def _join(runs: Sequence[dict[str, Score]]) -> dict[str, Score]:
    if len(runs) == 1:
        return runs[0]
    joined = {}
    for name in runs[0]:
        found = [run[name] for run in runs]
        values = [score["value"] for score in found]
        joined[name] = {"value": statistics.mean(values), "deviation": statistics.stdev(values), "runs": found}
    return joined


def _differences_from_adm(samples: Sequence[Samples], reference: Reference, extractor: Extractor) -> list[str]:
    found = [f"{one.count} samples instead of 50000" for one in samples if one.count != RELIABLE_COUNT]
    changed = {name for one in samples for name in one.identity.get("read", {})} & {"resize", "crop", "shuffle"}
    found += [f"the samples were read with --{name}" for name in sorted(changed)]
    if extractor.weights_sha256 != INCEPTION_SHA256:
        found.append(f"features of {extractor.name} with weights {extractor.weights_sha256[:8]}, not ADM's Inception")
    if reference.identity["kind"] != "adm":
        found.append(f"the reference is of kind {reference.identity['kind']!r}, not ADM's npz with mu and sigma")
    elif reference.identity["images"] != REFERENCE_ROWS:
        found.append(f"the reference batch has {reference.identity['images']} images instead of {REFERENCE_ROWS}")
    return found


def _warnings(
    samples: Sequence[Samples],
    models: int,
    extractor: Extractor,
    wanted: Collection[str],
    skipped: dict[str, str],
    differences: Sequence[str],
) -> list[str]:
    # What an extractor does not have is known to who chose it; the card lists it under `skipped`.
    surprising = {metric: reason for metric, reason in skipped.items() if not reason.startswith("extractor ")}
    found = [f"{_SHOWN.get(metric, metric)} is not computed: {reason}" for metric, reason in surprising.items()]
    if models > 1:
        found.append(f"{models} models: `metrics` of the card are those of the first, `models` lists all")
    found += [f"not FID-50K: {difference}" for difference in differences]
    fewest = min(one.count for one in samples)
    if extractor.dim < fewest < RELIABLE_COUNT:
        bias = f"below {RELIABLE_COUNT} {extractor.metric} is biased upwards; compare it only at equal n"
        found.append(f"{fewest} samples: {bias}")
    in_blocks = [one.identity["path"] for one in samples if one.sorted_by_class and "is" in wanted]
    return found + [f"{path} is sorted by class: its Inception Score is wrong; give --shuffle" for path in in_blocks]
