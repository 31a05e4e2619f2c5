"""Parity with numbers recorded from the published SiT code (``fixtures/transport.safetensors``)."""

import re
from pathlib import Path

import pytest
from safetensors.torch import load_file
from torch import Tensor

from vit5gen.flow import Flow, log_likelihood, sample_ode, sample_sde

ORACLE = load_file(Path(__file__).parent / "fixtures" / "transport.safetensors")
INPUTS = {"x0", "x1", "t", "noise"}
STEPS = 10  # recorded as num_steps=11, the number of times


def toy(x: Tensor, t: Tensor) -> Tensor:
    return 0.5 * x.sin() * (1 + t.reshape(-1, *[1] * (x.dim() - 1)))


def ours(key: str) -> tuple[Tensor, float]:
    """Return our value for an oracle's key and the relative tolerance that it deserves."""
    x0, x1, t = ORACLE["x0"], ORACLE["x1"], ORACLE["t"]
    path, *words = key.split(".")
    flow = Flow(path)
    if words[0] in flow.coefficients(t)._fields:
        return getattr(flow.coefficients(t), words[0]).float(), 1e-5
    if words[0] in ("xt", "ut"):
        return flow.interpolate(x0, x1, t)[words[0] == "ut"], 1e-5
    if words[0] == "diffusion":
        return flow.diffusion(t, words[-1], norm=0.7).float(), 1e-5
    if words[-1] == "loss":
        return Flow(path, words[0], words[1]).loss(toy, x1, x0, t), 1e-5
    flow = Flow(path, words[0])
    if words[1] in ("ode_drift", "score"):
        return (flow.score if words[1] == "score" else flow.velocity)(toy, x0, t), 1e-5
    if words[1] == "ode" and words[2] == "reverse":
        return sample_ode(flow, toy, x1, STEPS, method=words[3], reverse=True), 1e-4
    if words[1] == "ode":
        method = words[2].removesuffix("2")
        if method == "dopri5":
            # Recorded with one error norm over the whole batch: here that is a batch of one sample.
            return sample_ode(flow, toy, x0[None], STEPS, method=method), 2e-3
        return sample_ode(flow, toy, x0, STEPS, method=method), 1e-4
    if words[1] == "likelihood":
        return log_likelihood(flow, toy, x1)[words[2] == "z"], 2e-3
    method, form, last = words[2], words[3], words[4].removeprefix("last=")
    noise = ORACLE["noise"]
    return sample_sde(flow, toy, x0, STEPS, method, form, last_step=last, noise=noise), 1e-4


@pytest.mark.parametrize("key", sorted(k for k in ORACLE if k not in INPUTS and not k.endswith("heun3")))
def test_parity(key: str) -> None:
    value, tolerance = ours(key)
    expected = ORACLE[key].reshape(value.shape)
    error = (value - expected).abs().max() / expected.abs().max()
    assert error <= tolerance, f"{error:.1e}"


def test_every_kind_of_key_is_compared() -> None:
    assert len(ORACLE) == 237
    assert all(re.match(r"(Linear|GVP|VP)\.", key) for key in ORACLE if key not in INPUTS)
