"""A Gaussian mixture carried along a flow: its exact marginals, velocity, score, noise and data, in float64."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Generator, Tensor

from vit5gen.flow import Flow

WEIGHTS = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)
MEANS = torch.tensor([[1.2, -0.5], [-0.8, 0.9], [0.3, 1.5]], dtype=torch.float64)
VARIANCES = torch.tensor([0.3, 0.5, 0.2], dtype=torch.float64)


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Mixture:
    """Data ``sum w_k N(m_k, c_k I)``: component k of p_t is ``N(alpha m_k, alpha^2 c_k + sigma^2)``."""

    flow: Flow
    weights: Tensor = WEIGHTS
    means: Tensor = MEANS
    variances: Tensor = VARIANCES

    def sample(self, t: float, count: int, generator: Generator) -> Tensor:
        k = torch.multinomial(self.weights, count, replacement=True, generator=generator)
        c = self.flow.coefficients(t)
        z = torch.randn(count, self.means.shape[1], dtype=torch.float64, generator=generator)
        return c.alpha * self.means[k] + (c.alpha**2 * self.variances + c.sigma**2).sqrt()[k, None] * z

    def moments(self, t: float) -> tuple[Tensor, Tensor]:
        c = self.flow.coefficients(t)
        mean = self.weights @ self.means
        spread = torch.einsum("k,ki,kj->ij", self.weights, self.means, self.means) - torch.outer(mean, mean)
        spread = c.alpha**2 * (spread + (self.weights @ self.variances) * torch.eye(len(mean)))
        return c.alpha * mean, spread + c.sigma**2 * torch.eye(len(mean))

    def log_density(self, x: Tensor, t: float) -> Tensor:
        c = self.flow.coefficients(t)
        variance = c.alpha**2 * self.variances + c.sigma**2
        square = (x[:, None] - c.alpha * self.means).square().sum(-1)
        normal = -0.5 * square / variance - 0.5 * x.shape[1] * (2 * torch.pi * variance).log()
        return torch.logsumexp(normal + self.weights.log(), dim=1)

    def predict(self, x: Tensor, t: Tensor) -> Tensor:
        """Return the exact velocity, score, noise or data, whichever the flow's network predicts; ``t`` (B,)."""
        c = self.flow.coefficients(t[:1] if (t == t[0]).all() else t)
        alpha, d_alpha, sigma, d_sigma = (value[:, None] for value in c)
        variance = alpha**2 * self.variances + sigma**2
        offset = x[:, None] - alpha[..., None] * self.means
        logits = -0.5 * offset.square().sum(-1) / variance - 0.5 * x.shape[1] * variance.log() + self.weights.log()
        share = logits.softmax(1)[..., None]
        whitened = offset / variance[..., None]
        noise = sigma * (share * whitened).sum(1)
        if self.flow.prediction == "noise":
            return noise
        if self.flow.prediction == "score":
            return -(share * whitened).sum(1)
        data = (share * (self.means + (alpha * self.variances)[..., None] * whitened)).sum(1)
        return data if self.flow.prediction == "data" else d_alpha * data + d_sigma * noise


class CountingModel:
    """Wrap a network and count its evaluations."""

    def __init__(self, model: Callable[..., Tensor]) -> None:
        self.model, self.calls, self.rows = model, 0, 0

    def __call__(self, x: Tensor, *args: Tensor) -> Tensor:
        self.calls += 1
        self.rows += x.shape[0]
        return self.model(x, *args)
