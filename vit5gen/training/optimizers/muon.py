"""Muon for the 2-D weights of blocks (K. Jordan, 2024; arXiv 2502.16982), AdamW for all else, in one optimizer."""

from typing import Any, Literal

import torch
from torch import Tensor, nn

from vit5gen.config import TrainingConfig
from vit5gen.models import SiTTransformer2DModel
from vit5gen.section import Decay
from vit5gen.system.errors import UserError
from vit5gen.system.precision import PRECISIONS
from vit5gen.training.optimizers.optimizer import OPTIMIZERS


@OPTIMIZERS.register("muon")
def muon(
    module: nn.Module,
    groups: list[dict[str, Any]],
    training: TrainingConfig,
    *,
    momentum: Decay = 0.95,
    nesterov: bool = True,
    scale: Literal["match_rms_adamw", "original"] = "match_rms_adamw",
) -> "Muon":
    """Construct Muon for `block_matrices` and AdamW, as ``adamw`` constructs it, for all other parameters.

    scale: what the learning rate is multiplied by for a matrix. "match_rms_adamw" is 0.2 sqrt(max(rows, columns)), with
    which an element moves about as far as under AdamW (arXiv 2502.16982, section 2.2), so that one learning rate fits
    both kinds of parameters; "original" is Jordan's sqrt(max(1, rows / columns)). Libraries differ: torch's Muon has
    Nesterov on, a rate of 1e-3, a decay of 0.1 and "original"; timm's has Nesterov off, a rate of 0.02, no decay, other
    coefficients and "match_rms_adamw". Here rate and decay are those of ``training``. Neither is used: both compute in
    bf16 alone, torch's does not shard, and timm's turns AdamW into NAdam with Nesterov. Raises `UserError` where there
    is no matrix.
    """
    if not (matrices := block_matrices(module)):
        raise UserError("training.optimizer = muon: no 2-D weight of the backbone's `blocks` is trained; set adamw")
    options = {"momentum": momentum, "nesterov": nesterov, "scale": scale, "precision": training.precision}
    split = []
    for group in groups:
        for chosen in (True, False):
            if params := [parameter for parameter in group["params"] if (parameter in matrices) == chosen]:
                split.append(group | options | {"params": params, "muon": chosen})
    return Muon(split, lr=training.learning_rate, betas=(training.adam_betas[0], training.adam_betas[1]), fused=True)


def block_matrices(module: nn.Module) -> set[nn.Parameter]:
    """Return the trained 2-D weights of layers in the backbone's ``blocks``, of a model or of what contains one.

    Not in it: embeddings, and matrices that are not called weights, such as positions.
    """
    model = next(part for part in module.modules() if isinstance(part, SiTTransformer2DModel))
    return {
        weight
        for path, part in model.backbone.named_modules()
        if path.split(".")[0] == "blocks" and not isinstance(part, nn.Embedding)
        for name, weight in part.named_parameters(recurse=False)
        if name.endswith("weight") and weight.ndim == 2 and weight.requires_grad
    }


class Muon(torch.optim.AdamW):
    """AdamW whose groups marked ``muon`` are moved along their orthogonalised momentum instead.

    A marked matrix has one moment, ``momentum_buffer``; one that is sharded stays so. Products are in the type to which
    ``precision`` rounds them, in that of the weights if it rounds none.
    """

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Make a step, after which marked matrices have no gradient: AdamW passes over such parameters."""
        for group in self.param_groups:
            for weight in group["params"] if group["muon"] else ():
                if weight.grad is not None:
                    self._move(weight, weight.grad, group)
                    weight.grad = None
        super().step()

    def _move(self, weight: nn.Parameter, gradient: Tensor, group: dict[str, Any]) -> None:
        # The running mean is Jordan's sum times 1 - momentum, a factor that orthogonalising removes.
        if not (state := self.state[weight]):
            state["momentum_buffer"] = torch.zeros_like(weight)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - group["momentum"])
        direction = gradient.lerp(mean, group["momentum"]) if group["nesterov"] else mean
        direction = orthogonalise(direction, PRECISIONS[group["precision"]].rounded or weight.dtype)
        rows, columns = weight.shape
        scales = {"match_rms_adamw": 0.2 * max(rows, columns) ** 0.5, "original": max(1, rows / columns) ** 0.5}
        rate = group["lr"] * scales[group["scale"]]
        weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-rate)


def orthogonalise(matrix: Tensor, dtype: torch.dtype) -> Tensor:
    """Return about U V^T of the singular value decomposition U S V^T, by Newton-Schulz iterations in ``dtype``.

    matrix, result: (rows, columns). Five times the polynomial a s + b s^3 + c s^5 of each singular value s, in parts of
    the norm, bring those above 0.003 to between 0.68 and 1.21; smaller ones grow 485-fold at most.
    """
    a, b, c = 3.4445, -4.7750, 2.0315  # Jordan's, steep at 0
    x = (matrix / (matrix.norm() + 1e-7)).to(dtype)
    if tall := x.shape[0] > x.shape[1]:
        x = x.mT  # of the two Gram matrices the smaller
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x
