"""Log-likelihood by the change of variables along the probability-flow ODE."""

import math

import torch
from torch import Generator, Tensor

from vit5gen.flow.flow import Flow, ModelFn, Time, lower_choice, rows
from vit5gen.flow.solvers import ATOL, RTOL, final_state, integrate
from vit5gen.flow.times import time_grid

PROBES = ("rademacher", "exact")


def log_likelihood(
    flow: Flow,
    model_fn: ModelFn,
    x1: Tensor,
    num_steps: int = 50,
    method: str = "dopri5",
    probes: str = "rademacher",
    generator: Generator | None = None,
    rtol: float = RTOL,
    atol: float = ATOL,
) -> tuple[Tensor, Tensor]:
    """Return the log-density of data ``x1`` (B, ...) in nats, (B,), and the noise ``x0`` it flows from.

    ``log p(x1) = log N(x0; 0, 1) - int div v dt`` over `Flow.reversed_interval` (arXiv 2011.13456, eq. 39).
    probes: ``rademacher`` estimates the divergence with one vector of +-1 per sample, drawn once (Hutchinson);
    ``exact`` takes one backward pass per dimension. num_steps, method, rtol, atol: as in `ode_steps`; the divergence is
    part of the state, so that dopri5 controls its error too. Raises `UserError` on bad values.
    """
    probes = lower_choice("probes", probes, PROBES)
    size = x1[0].numel()
    grid = time_grid(num_steps, *flow.reversed_interval())[::-1]
    if probes == "rademacher":
        device = x1.device if generator is None else generator.device
        signs = torch.randint(0, 2, x1.shape, generator=generator, device=device).to(x1) * 2 - 1

    # The state has one more column than x: its velocity is the divergence there.
    def field(state: Tensor, t: Time) -> Tensor:
        with torch.enable_grad():
            x = state[:, :size].reshape(x1.shape).detach().requires_grad_()
            velocity = flow.velocity(model_fn, x, t) + 0 * x  # a model that ignores x has a divergence, too: zero
            if probes == "rademacher":
                divergence = rows(torch.autograd.grad((velocity * signs).sum(), x)[0] * signs).sum(1)
            else:
                columns = rows(velocity).unbind(1)
                slopes = (torch.autograd.grad(column.sum(), x, retain_graph=True)[0] for column in columns)
                divergence = torch.stack([rows(slope)[:, i] for i, slope in enumerate(slopes)], dim=1).sum(1)
        return torch.cat([rows(velocity.detach()), divergence[:, None]], dim=1)

    # From data to noise.
    state = torch.cat([rows(x1.detach()), x1.new_zeros(len(x1), 1)], dim=1)
    state = final_state(integrate(field, state, grid, method, rtol, atol))
    x0 = state[:, :size]
    # The last column has integrated the divergence from data to noise: minus the integral over t.
    logp = state[:, size] - 0.5 * x0.square().sum(1) - size / 2 * math.log(2 * math.pi)
    return logp, x0.reshape(x1.shape)
