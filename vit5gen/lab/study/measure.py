"""What a study says of a finished run: its loss on held-out images and its Frechet distance."""

from functools import partial
from pathlib import Path
from typing import Any

import torch

from vit5gen.config import Config
from vit5gen.data.autoencoders.kl import encode
from vit5gen.data.images import open_held_out, readable
from vit5gen.evaluation import Extractor, frechet_of, frechet_report, load_extractor
from vit5gen.flow import draw_timesteps
from vit5gen.generation.loading import load_pipeline
from vit5gen.generation.many import SamplingJob, generate
from vit5gen.generation.pipeline import SiTPipeline
from vit5gen.system.distributed import start_processes
from vit5gen.system.precision import PRECISIONS
from vit5gen.training.reference import Reference, build_reference

NUM_HELD_OUT = 2048  # images of the held-out loss, where there are as many


# What runs are compared with, by the data and the evaluation of their configuration.
References = dict[str, tuple[Extractor, Reference]]


def measure(folder: Path, config: Config, references: References) -> dict[str, Any]:
    """Return ``held_out_loss``, and the distance as ``metric``, ``distance``, ``floor`` and ``n``.

    All runs meet the same images, noise, times and labels. references: those made so far; a new one is added.
    """
    device, evaluation = start_processes().device, config.evaluation
    pipe = load_pipeline(folder).to(device)
    key = config.data.model_dump_json() + evaluation.model_dump_json()
    if key not in references:
        extractor = load_extractor(evaluation.extractor, device)
        references[key] = extractor, build_reference(config, extractor)
    extractor, reference = references[key]
    job = SamplingJob(reference.labels, evaluation.seed, evaluation.batch_size, config.sampling)
    with PRECISIONS[config.training.precision].autocast(device):
        images = (images for _, images in generate(pipe, job))
        report = frechet_report(frechet_of(images, extractor), reference.distance, reference.floor)
    found = {"held_out_loss": held_out_loss(pipe, config), "metric": extractor.metric, "distance": report["value"]}
    return found | {"floor": report["floor"], "n": report["n"]}


@torch.inference_mode()
def held_out_loss(pipe: SiTPipeline, config: Config, count: int = NUM_HELD_OUT) -> float:
    """Return the mean loss of a pipeline's network, in fp32, on the same ``count`` held-out images for every run.

    Noise and order come from ``evaluation.seed``; one t lies in each of ``count`` equal parts of the time interval.
    """
    names = [pipe.class_name(i) for i in range(config.data.num_classes)]
    images = open_held_out(config.data, config.evaluation.held_out_split, names)
    generator = torch.Generator().manual_seed(config.evaluation.seed)
    chosen = readable(images.select(torch.randperm(len(images), generator=generator)[:count]), config.data)
    count, total = len(chosen), 0.0
    order = torch.randperm(count, generator=generator)
    t = draw_timesteps(pipe.flow, torch.full((count,), 0.5), stratum=(order, count))
    for part in torch.arange(count).split(config.evaluation.batch_size):
        labels = chosen.labels[part].to(pipe.device)
        x1, _ = encode(pipe.vae, torch.stack([chosen.read(int(i)) for i in part]).to(pipe.device))
        x0 = torch.randn(x1.shape, generator=generator).to(pipe.device)
        total += pipe.flow.loss(partial(pipe.transformer, class_labels=labels), x1, x0, t[part]).sum().item()
    return total / count
