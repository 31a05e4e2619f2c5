"""The forward pass of the ViT-5-S classifier: ours against the published one and timm's plain vision transformer."""

from collections.abc import Iterator
from pathlib import Path

import timm
import torch
from torch import Tensor, nn

from vit5gen.lab.benchmark.peers import VIT5, load, running, without_cuda
from vit5gen.lab.benchmark.setting import Setting
from vit5gen.lab.benchmark.timing import Row, race, row
from vit5gen.models.classifier import ViT5, vit5_small
from vit5gen.models.loading import load_exactly
from vit5gen.system.errors import UserError

TOLERANCE = 1e-3  # of logits of order one, in fp32


def published(folder: Path, ours: ViT5, images: Tensor) -> tuple[nn.Module, float]:
    """Return the published model and the largest difference of its logits from ours, which is given its weights.

    images (B, 3, S, S).  LayerScale is set to 1, or its initial 1e-4 would hide what the blocks do. Raises `UserError`
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
    if not difference <= TOLERANCE:
        raise UserError(
            f"peer folder {folder}: its vit5_small differs from ours by {difference:.2g} in a logit; "
            "expected the published model"
        )
    return theirs, difference


def rows(setting: Setting) -> Iterator[Row]:
    """Time forward passes in fp32; raise `UserError` when the published model's weights give other logits here."""
    sizes, side = setting.sizes, setting.sizes.image_side
    images = torch.randn(sizes.images, 3, side, side, generator=torch.Generator().manual_seed(0))
    ours = vit5_small(img_size=side).eval()
    with torch.inference_mode(), without_cuda():
        if setting.vit5 is not None:
            theirs, difference = published(setting.vit5, ours, images)
            pairs = race(lambda: ours(images), lambda: theirs(images), sizes)
            yield row("classifier", "fp32", "vit5_small", "vit5", pairs, more={"largest difference": difference})
        plain = timm.create_model("vit_small_patch16_224", img_size=side).eval()
        pairs = race(lambda: ours(images), lambda: plain(images), sizes)
        yield row("classifier", "fp32", "vit5_small", "timm-vit_small", pairs)
