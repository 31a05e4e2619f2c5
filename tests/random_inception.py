"""An Inception network with random weights whose features are of order one: what a test without downloads can use."""

from pathlib import Path

import torch
from torch import Tensor, nn

from vit5gen.lab.benchmark.inference import random_inception


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
