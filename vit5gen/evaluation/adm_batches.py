"""ADM's reference batches of ImageNet by name: fetched once into the cache, checked, and known by their hash."""

import sys
import zipfile
from pathlib import Path

import torch

from vit5gen.evaluation.samples import read_header
from vit5gen.system.errors import UserError
from vit5gen.system.files import atomic, cache_folder, sha256, write_text

_URL = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet"
# Where each is, and the shape of its images.
ADM_BATCHES = {
    "imagenet256": (f"{_URL}/256/VIRTUAL_imagenet256_labeled.npz", (10_000, 256, 256, 3)),
    "imagenet512": (f"{_URL}/512/VIRTUAL_imagenet512.npz", (10_000, 512, 512, 3)),
}
ADM_SHAPES = {"mu": (2048,), "sigma": (2048, 2048), "mu_s": (2023,), "sigma_s": (2023, 2023)}


def fetch_adm_batch(name: str) -> Path:
    """Return the file of a batch in the cache, downloaded there when it is absent; call it on one process.

    Raises `UserError` when that fails, when it does not hold what ADM's batches hold, or when its SHA-256 is not the
    one that was recorded beside it when it came.
    """
    url, shape = ADM_BATCHES[name]
    path = cache_folder() / "references" / url.rsplit("/", 1)[1]
    record = path.with_suffix(".sha256")
    if not path.is_file():
        try:
            with atomic(path) as temporary:
                torch.hub.download_url_to_file(url, str(temporary), progress=sys.stderr.isatty())
                _check(temporary, name, shape)
        except (OSError, RuntimeError) as error:
            advice = f"put {url} at {path}, or give a file, folder or configuration as --reference"
            raise UserError(f"reference {name}: not in the cache and not downloadable ({error}); {advice}") from error
    found = sha256(path)
    if not record.is_file():  # just downloaded, or put there by hand
        _check(path, name, shape)
        write_text(record, f"{found}\n")
    if (known := record.read_text().strip()) != found:
        advice = f"delete {path} and {record.name} to fetch it again"
        raise UserError(f"reference {path}: sha256 {found[:16]}..., recorded when it came {known[:16]}...; {advice}")
    return path


def _check(path: Path, name: str, shape: tuple[int, ...]) -> None:
    """Raise `UserError` unless a file has the keys, shapes and types of a batch; arrays are not read."""
    for key, wanted in ({"arr_0": (shape, "u")} | {key: (size, "f") for key, size in ADM_SHAPES.items()}).items():
        try:
            with zipfile.ZipFile(path) as archive, archive.open(f"{key}.npy") as member:
                size, _, dtype = read_header(member)
        except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
            raise UserError(f"reference {name}: {path} is no batch of ADM ({error}); fetch it again") from error
        if (size, dtype.kind) != wanted:
            raise UserError(f"reference {name}: {key} is {dtype} {size}; expected {wanted[0]}; fetch it again")
