import subprocess
import sys

import pytest

# The products of features are left out: they take minutes, and no memory but that of their result.
SCRIPT = """
import torch
from pathlib import Path
from vit5gen.evaluation.features import Extractor, Features
from vit5gen.evaluation.distances import FrechetReference, nearest
from vit5gen.evaluation.reference import Reference, scan
from vit5gen.evaluation.metric import available, scores

def peak():
    # Not getrusage's maximum, which a process inherits from the one that started it.
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024 / 1e9

print(peak())
class FromRows(Extractor):
    def __call__(self, images):
        return features

features = Features(torch.randn(500, 2048), torch.randn(500, 2023))
extractor = FromRows("random", "FID", 2048, "", {}, torch.nn.Identity(), None, torch.device("cpu"), 2023)
images = torch.zeros(500, 3, 1, 1, dtype=torch.uint8)
torch.Tensor.addmm_ = lambda total, x, y, alpha: total.add_(alpha)
found = scan(((first, images) for first in range(0, 50_000, 500)), 50_000, extractor, rows=50_000)
moments = [FrechetReference(torch.zeros(dim), torch.eye(dim).double()) for dim in (2048, 2023)]
reference = Reference(*moments, None, torch.randn(10_000, 2048), {})
print(peak())
torch.linalg.eigvalsh = lambda matrix: matrix.clone()[0]
scores(found, reference, extractor, available(["fid", "sfid"], reference, extractor)[0])
print(peak())
torch.Tensor.__matmul__ = lambda x, y: torch.zeros(len(x), y.shape[1])
scores(found, reference, extractor, available(["pr", "dc"], reference, extractor)[0])
print(peak())
scores(found, reference, extractor, available(["fd-infinity"], reference, extractor)[0])
print(peak())
rows = found.rows
for first in range(0, 2000, 500):
    nearest(rows, features.pooled)
print(peak())
"""


@pytest.mark.slow
def test_fifty_thousand_features_take_less_than_one_and_a_half_gigabytes() -> None:
    """Counted after the imports: these map 0.9 GB of a CUDA build of torch, and all is 2.2 GB."""
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    peaks = [float(line) for line in run.stdout.split()]
    after = "import, pass over samples, distances, balls, infinity, nearest images"
    print(f"peak in GB after {after}: {peaks}")
    assert peaks[-1] - peaks[0] < 1.5
