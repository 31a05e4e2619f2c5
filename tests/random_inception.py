"""An Inception network with random weights whose features are of order one: what a test without downloads can use."""

import io
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3


def write_random_inception(path: Path, images: Tensor) -> None:
    """Save He-initialised weights with batch-norm statistics of ``images`` (uint8); torch's default decays to 1e-8."""
    empty = io.BytesIO()
    torch.save({}, empty)
    empty.seek(0)
    with mock.patch.object(FeatureExtractorInceptionV3, "load_state_dict"):
        network = FeatureExtractorInceptionV3("random", ["2048"], feature_extractor_weights_path=empty)
    generator = torch.Generator().manual_seed(0)
    for module in network.modules():
        if isinstance(module, nn.Conv2d | nn.Linear):
            nn.init.kaiming_normal_(module.weight, generator=generator)
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 1.0
    network.train()
    network(images)
    torch.save(network.eval().state_dict(), path)
