"""What is timed without training: the classifier, statistics beside their features, and how long ``--help`` takes."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median

import timm
import torch
from torch import Tensor, nn

from vit5gen.evaluation import FeatureStatistics, frechet_distance, load_extractor
from vit5gen.evaluation.statistics import Grouped
from vit5gen.lab.benchmark.engine import Row, Setting, race, row
from vit5gen.lab.benchmark.evaluators import race_evaluators, random_inception
from vit5gen.lab.benchmark.peers import VIT5, check_equal, load, running, without_cuda
from vit5gen.models.classifier import ViT5, vit5_small
from vit5gen.models.weights import load_exactly

TOLERANCE = 1e-3  # of logits of order one, in fp32
PRETRAINED = "effnet-lite0"  # weights that come as a package
BATCHES = 20  # of images whose features are added in one repetition


def published(folder: Path, ours: ViT5, images: Tensor) -> tuple[nn.Module, float]:
    """Return the published model and the largest difference of its logits from ours, which is given its weights.

    images (B, 3, S, S). LayerScale is set to 1, or its initial 1e-4 would hide what the blocks do. Raises `PeerError`
    for another model.
    """
    with running(VIT5, folder), torch.no_grad(), without_cuda():
        theirs = load(VIT5, folder).vit5_small(img_size=images.shape[-1]).eval()
        for name, parameter in theirs.named_parameters():
            if "gamma_" in name:
                parameter.fill_(1)
        state = {name: value for name, value in theirs.state_dict().items() if not name.endswith(".freqs")}
        load_exactly(ours, state)
        difference = float((ours(images) - theirs(images)).abs().max())
    check_equal(folder, "vit5_small", difference, "in a logit", TOLERANCE)
    return theirs, difference


def classifier(setting: Setting) -> Iterator[Row]:
    """Time forward passes of ViT-5-S in fp32, against the published one and timm's plain vision transformer."""
    sizes, (count, side) = setting.sizes, setting.sizes.classified
    images = torch.randn(count, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours = vit5_small(img_size=side).eval()
    peers: dict[str, tuple[nn.Module, dict[str, float]]] = {}
    if setting.vit5 is not None:
        theirs, difference = published(setting.vit5, ours, images)
        peers["vit5"] = theirs, {"largest difference": difference}
    peers["timm-vit_small"] = timm.create_model("vit_small_patch16_224", img_size=side).eval(), {}
    with torch.inference_mode(), without_cuda():
        for name, (peer, more) in peers.items():
            yield row("fp32", "vit5_small", name, race(partial(ours, images), partial(peer, images), sizes), more)


def evaluation(setting: Setting) -> Iterator[Row]:
    """Compare, for a batch of images, the extraction of their features with what is made of them.

    That is moments alone, moments in the groups of a standard error, and one final distance. Then whole evaluators.
    """
    sizes, (count, side), generator = setting.sizes, setting.sizes.scored, torch.Generator().manual_seed(0)
    images = torch.randint(256, (count, 3, side, side), dtype=torch.uint8, generator=generator)
    for name, extractor in ((PRETRAINED, load_extractor(PRETRAINED)), ("inception", random_inception())):
        features = torch.randn(2 * extractor.dim, extractor.dim, generator=generator)
        statistics = FeatureStatistics(extractor.dim).update(features)
        mean, covariance = statistics.mean, statistics.covariance
        tasks: dict[str, tuple[float, Callable[[], object]]] = {
            "moments": (BATCHES, partial(_add, Grouped(extractor.dim, groups=1), features, count)),
            "grouped moments": (BATCHES, partial(_add, Grouped(extractor.dim), features, count)),
            "distance": (1, partial(frechet_distance, mean, covariance, mean, covariance)),
        }
        for mode, (times, task) in tasks.items():
            pairs = [(mine / times, theirs) for mine, theirs in race(task, partial(extractor, images), sizes)]
            shares = [mine / (mine + extraction) for mine, extraction in pairs]
            yield row(mode, "statistics", name, pairs, {"share of time": median(shares)})
    yield from race_evaluators(setting)


def _add(groups: Grouped, features: Tensor, count: int) -> tuple[FeatureStatistics, ...]:
    """Add some batches of ``count`` rows, and what waits for more; return the groups."""
    for batch in features[: BATCHES * count].split(count):
        groups.update(batch, torch.arange(len(batch)))
    return groups.groups


def start_up(setting: Setting) -> Iterator[Row]:
    """Time ``vit5gen --help`` against an interpreter that does nothing."""
    ours, bare = _python("from vit5gen.cli import main; main(['--help'])"), _python("pass")
    yield row("help", "vit5gen --help", "python", race(ours, bare, setting.sizes))


def _python(code: str) -> Callable[[], object]:
    return partial(subprocess.run, [sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
