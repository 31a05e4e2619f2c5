"""A race of evaluators: the Frechet distance of the same pictures by this package, torch-fidelity and pytorch-fid.

Each runs in fresh processes, with one Inception network; timed is the way from two folders of PNG to the distance.
"""

import importlib.util
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn

from vit5gen.evaluation import Extractor, Features, FrechetReference, load_extractor
from vit5gen.evaluation.extractors.inception import missing_weights
from vit5gen.evaluation.reference import scan
from vit5gen.evaluation.samples import open_folder
from vit5gen.lab.benchmark.engine import Row, Setting, fresh, row, seconds
from vit5gen.lab.benchmark.peak_memory import peak_of
from vit5gen.system.cpu import cores
from vit5gen.system.files import sha256

TOLERANCE = 1e-3  # of a distance: the peers take roots of matrices that are singular
_BATCH = 50
# Returns what makes statistics of a folder, and the distance of two of them.
Evaluator = Callable[[Extractor], tuple[Callable[[Path], Any], Callable[[Any, Any], float]]]


def race_evaluators(setting: Setting) -> Iterator[Row]:
    """Compare the time from pictures to distance; the peaks of memory and the parts of the time are listed, too."""
    (count, side), names = setting.sizes.raced, [name for name in EVALUATORS if name != "pytorch-fid"]
    if importlib.util.find_spec("pytorch_fid"):
        names.append("pytorch-fid")
    else:
        setting.note("evaluation: pytorch-fid is not raced because it is not installed; run: pip install pytorch-fid")
    with tempfile.TemporaryDirectory() as temporary:
        # The same pictures and weights for all.
        folder = Path(temporary)
        pictures = _draw(folder, count, side)
        weights = None if not missing_weights() else folder / "inception.pth"
        if weights is not None:
            setting.note("evaluation: Inception has random weights because the published ones are not in torch's cache")
            write_random_inception(weights, pictures)

        # In turn, so that all meet the same disturbances.
        repetitions = range(setting.sizes.race_repetitions)
        found = [{name: fresh(measure, name, folder, weights) for name in names} for _ in repetitions]
    for peer in names[1:]:
        ours, theirs = found[0]["vit5gen"], found[0][peer]
        if abs(ours["distance"] - theirs["distance"]) > TOLERANCE * abs(theirs["distance"]):
            setting.note(f"evaluation: {peer} finds a distance of {theirs['distance']}, not {ours['distance']}")
        pairs = [(one["vit5gen"]["seconds"], one[peer]["seconds"]) for one in found]
        more = {"images/s": count / ours["seconds"], "peer's images/s": count / theirs["seconds"]}
        for key in ours.keys() - {"seconds"}:
            more |= {key: ours[key], f"peer's {key}": theirs[key]}
        yield row("fid", "vit5gen", peer, pairs, dict(sorted(more.items())))


def measure(name: str, folder: Path, weights: Path | None) -> dict[str, float]:
    """Return the distance of the folders ``a`` and ``b``, the seconds in all and of parts, and the growth of memory.

    Peaks are of this process, not of those that a peer starts to read pictures.
    """
    digest = None if weights is None else sha256(weights)
    extractor = load_extractor("inception", weights=weights, weights_sha256=digest)
    statistics, distance = EVALUATORS[name](extractor)

    # The network is the same module for all.
    starts: list[float] = []
    spent = {"network s": 0.0}

    def stop(*_: object) -> None:
        spent["network s"] += time.perf_counter() - starts[-1]

    extractor.network.register_forward_pre_hook(lambda *_: starts.append(time.perf_counter()))
    extractor.network.register_forward_hook(stop)

    def evaluate() -> float:
        first, second = (statistics(folder / part) for part in "ab")
        results = []
        spent["distance s"] = seconds(lambda: results.append(distance(first, second)))
        return float(results[0])

    start = time.perf_counter()
    value, growth, _ = peak_of(evaluate)
    total = time.perf_counter() - start
    rest = total - sum(spent.values())
    return {"seconds": total, **spent, "rest s": rest, "distance": value, "peak MB": growth}


def _vit5gen(extractor: Extractor) -> tuple[Callable[[Path], Any], Callable[[Any, Any], float]]:
    # Without the spatial features, class scores and groups, which the peers do not have.
    def features(network: nn.Module, images: Tensor) -> Features:
        return Features(network(images)[0])

    plain = replace(extractor, features=features, spatial_dim=0, num_classes=0)

    def statistics(folder: Path) -> FrechetReference:
        images = open_folder(folder, _BATCH, "ignore")
        return FrechetReference.of(scan(images.watch(), images.count, plain, groups=1).pooled.total())

    return statistics, lambda a, b: b.distance(a.mean, a.covariance)


def _torch_fidelity(extractor: Extractor) -> tuple[Callable[[Path], Any], Callable[[Any, Any], float]]:
    from torch_fidelity import metric_fid

    def statistics(folder: Path) -> Any:
        options = {"input1": str(folder), "cuda": False, "batch_size": _BATCH, "verbose": False, "cache": False}
        return metric_fid.fid_input_id_to_statistics(1, extractor.network, "2048", **options)

    return statistics, lambda a, b: metric_fid.fid_statistics_to_metric(a, b, False)[metric_fid.KEY_METRIC_FID]


class _Pooled(nn.Module):
    """The network as pytorch-fid calls its own: with pixels (B, 3, H, W) from 0 to 1."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> list[Tensor]:
        return [self.network((pixels * 255).round().to(torch.uint8))[0][:, :, None, None]]


def _pytorch_fid(extractor: Extractor) -> tuple[Callable[[Path], Any], Callable[[Any, Any], float]]:
    from pytorch_fid import fid_score

    def statistics(folder: Path) -> Any:  # with as many workers as its command starts
        model, workers = _Pooled(extractor.network), min(cores(), 8)
        return fid_score.compute_statistics_of_path(str(folder), model, _BATCH, extractor.dim, "cpu", workers)

    return statistics, lambda a, b: fid_score.calculate_frechet_distance(*a, *b)


EVALUATORS: dict[str, Evaluator] = {
    "vit5gen": _vit5gen,
    "torch-fidelity": _torch_fidelity,
    "pytorch-fid": _pytorch_fid,
}


def _draw(folder: Path, count: int, side: int) -> Tensor:
    """Write smooth pictures with noise, half of them to ``a`` and darker ones to ``b``; return some (B, 3, H, W)."""
    draw, shown = np.random.default_rng(0), []
    for part, brightness in (("a", 1.0), ("b", 0.9)):
        (folder / part).mkdir()
        for index in range(count // 2):
            coarse = Image.fromarray(draw.integers(256, size=(12, 12, 3), dtype=np.uint8))
            pixels = np.asarray(coarse.resize((side, side), Image.Resampling.BICUBIC)) * brightness
            image = (pixels + draw.normal(0, 3, pixels.shape)).clip(0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / part / f"{index:04}.png")
            shown += [image] if index < 4 else []
    return torch.from_numpy(np.stack(shown)).permute(0, 3, 1, 2)


def random_inception() -> Extractor:
    """Return Inception with random weights, which take as long as the published ones and need no download."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    with tempfile.TemporaryDirectory() as folder, patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        file = Path(folder) / "inception.pth"
        torch.save({}, file)
        return load_extractor("inception", weights=file, weights_sha256=sha256(file))


def write_random_inception(path: Path, images: Tensor) -> None:
    """Save He-initialised weights with batch-norm statistics of ``images`` (uint8); torch's default decays to 1e-8."""
    network = random_inception().network
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()
    network(images)
    torch.save(network.eval().state_dict(), path)
