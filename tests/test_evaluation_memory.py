import subprocess
import sys

import pytest

# The products of features are left out: they take minutes, and no memory but that of their result.
SCRIPT = """
import sys
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

others = dict(zip(("ConvNeXtV2", "DINOv2", "MAE", "SigLIP2", "CLIP"), map(int, sys.argv[1:])))
drawn = {name: torch.randn(500, dim) for name, dim in others.items()}
features = Features(torch.randn(500, 2048), torch.randn(500, 2023), others=drawn)
name = "FDr6" if others else "random"
network = torch.nn.Identity(), None, torch.device("cpu"), 2023
extractor = FromRows(name, "FID", 2048, "", {}, *network, others=others)
images = torch.zeros(500, 3, 1, 1, dtype=torch.uint8)
torch.Tensor.addmm_ = lambda total, x, y, alpha: total.add_(alpha)
found = scan(((first, images) for first in range(0, 50_000, 500)), 50_000, extractor, rows=50_000)
moments = {
    space: FrechetReference(torch.zeros(dim), torch.eye(dim).double()) for space, dim in extractor.dims.items()
}
reference = Reference(moments, None, torch.randn(10_000, 2048), {})
print(peak())
torch.linalg.eigvalsh = lambda matrix: matrix.clone()[0]
scores(found, reference, extractor, available(["fid", "sfid", *["fdr6"] * bool(others)], reference, extractor)[0])
print(peak())
torch.Tensor.__matmul__ = lambda x, y: torch.zeros(len(x), y.shape[1], dtype=x.dtype)
torch.matmul = lambda x, y, out: out.zero_()
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
@pytest.mark.parametrize(("others", "most"), [((), 1.4), ((1024, 1024, 1024, 1152, 1024), 2.0)], ids=["FID", "FDr^6"])
def test_fifty_thousand_features_take_few_gigabytes(others: tuple[int, ...], most: float) -> None:
    """Counted after the imports: these map 0.85 GB of a CUDA build of torch."""
    run = subprocess.run([sys.executable, "-c", SCRIPT, *map(str, others)], capture_output=True, text=True, check=True)
    peaks = [float(line) for line in run.stdout.split()]
    after = "import, pass over samples, distances, balls, infinity, nearest images"
    print(f"peak in GB after {after}: {peaks}")
    assert peaks[-1] - peaks[0] < most
