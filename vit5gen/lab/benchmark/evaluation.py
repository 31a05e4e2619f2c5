"""What statistics and distance cost beside the extraction of the features that they are made of."""

import io
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from statistics import median
from unittest.mock import patch

import torch
from torch import Tensor

from vit5gen.evaluation import Extractor, FeatureStatistics, frechet_distance, load_extractor
from vit5gen.evaluation.statistics import Grouped
from vit5gen.lab.benchmark.setting import Setting
from vit5gen.lab.benchmark.timing import Row, race, row
from vit5gen.system.files import sha256

PRETRAINED = "effnet-lite0"  # weights that come as a package
BATCHES = 20  # of images whose features are added in one repetition


def rows(setting: Setting) -> Iterator[Row]:
    """Compare, for a batch of images: moments alone, in the groups of a standard error, and one final distance."""
    sizes, generator = setting.sizes, torch.Generator().manual_seed(0)
    count, side = sizes.scored_images, sizes.scored_side
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
            yield row("evaluation", mode, "statistics", name, pairs, more={"share of time": median(shares)})


def _add(groups: Grouped, features: Tensor, count: int) -> tuple[FeatureStatistics, ...]:
    """Add some batches of ``count`` rows, and what waits for more; return the groups."""
    for batch in features[: BATCHES * count].split(count):
        groups.update(batch, torch.arange(len(batch)))
    return groups.groups


def random_inception() -> Extractor:
    """Return Inception with random weights, which take as long as the published ones and need no download."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "inception.pth"
        torch.save(network.state_dict(), file)
        return load_extractor("inception", weights=file, weights_sha256=sha256(file))
