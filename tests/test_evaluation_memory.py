import subprocess
import sys

import pytest

# The products of features are left out: they take minutes, and no memory but that of their result.
SCRIPT = """
import resource, torch
from vit5gen.evaluation.features import Extractor, Features
from vit5gen.evaluation.reference import Moments, Reference, scan
from vit5gen.evaluation.scores import scores

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20

print(peak())
class FromRows(Extractor):
    def __call__(self, images):
        return features

features = Features(torch.randn(500, 2048))

extractor = FromRows("random", "FID", 2048, "", {}, torch.nn.Identity(), None, torch.device("cpu"))
images = torch.zeros(500, 3, 1, 1, dtype=torch.uint8)
found = scan(((first, images) for first in range(0, 50_000, 500)), 50_000, extractor, rows=50_000)
reference = Reference(Moments(torch.zeros(2048), torch.eye(2048).double()), None, None, torch.randn(10_000, 2048), {})
print(peak())
scores(found, reference, extractor, ["fid"])
print(peak())
torch.Tensor.__matmul__ = lambda x, y: torch.zeros(len(x), y.shape[1])
scores(found, reference, extractor, ["pr"])
print(peak())
"""


@pytest.mark.slow
def test_fifty_thousand_features_take_less_than_two_gigabytes() -> None:
    run = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    peaks = [float(line) for line in run.stdout.split()]
    print(f"peak in GiB after import, pass over samples, distances, precision and recall: {peaks}")
    assert peaks[-1] < 2e9 / 2**30
