"""Averages whose length is chosen after training, from those that were kept (Karras et al., arXiv 2312.02696).

An average by a power function weighs the weights of update tau with its profile p(tau) = (gamma + 1) tau^gamma /
t^(gamma + 1), tau <= t. A wanted profile is approximated by a sum of kept ones (section 3.2 and appendix C).
"""

import math
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from torch import Tensor

from vit5gen.config import load_recorded
from vit5gen.system.errors import UserError
from vit5gen.training import checkpoint
from vit5gen.training.averages import exponent_of
from vit5gen.training.run_folder import RunFolder

Profile = tuple[float, float]  # t in updates, gamma
_TOLERANCE = 0.01  # of the error of `combine`
_ROUNDING = 2**-11 / math.sqrt(3)  # standard deviation of what fp16 changes, as a part of a value


def inner_products(a: Sequence[Profile], b: Sequence[Profile]) -> np.ndarray:
    """Return the integrals over tau of the products of profiles, (A, B)."""
    (t, gamma), (u, delta) = np.array(a).T[..., None], np.array(b).T[:, None]
    later, of_later = np.maximum(t, u), np.where(t > u, gamma, delta)
    return (gamma + 1) * (delta + 1) / (gamma + delta + 1) * (np.minimum(t, u) / later) ** of_later / later


def combine(kept: Sequence[Profile], wanted: Profile) -> tuple[np.ndarray, float]:
    """Return the factors (N,) of the ``kept`` averages whose sum is the ``wanted`` one, and the error of that.

    The factors are least squares of the difference of the profiles, as a part of the wanted one's norm, plus what
    rounding to fp16 adds; the error is the root of that sum. An average in fp32 counts as rounded too: each of its
    updates was, and factors of close lengths are large. Scaled to sum to 1, they give weights that never moved as they
    are.
    """
    norm = inner_products([wanted], [wanted]).item()
    products, target = inner_products(kept, kept) / norm, inner_products(kept, [wanted])[:, 0] / norm
    products += _ROUNDING**2 * np.eye(len(kept))
    factors = np.linalg.solve(products, target)
    factors /= factors.sum()
    return factors, math.sqrt(max(0.0, 1 - 2 * factors @ target + factors @ products @ factors))


def rebuild(folder: Path, lengths: Sequence[float]) -> dict[float, dict[str, Tensor]]:
    """Return averages of the given lengths at the step of a run's checkpoint, by the names of parameters.

    They are built from those in the checkpoint and in the run's earlier snapshots, less the damaged ones, which are
    reported. Raises `UserError` where the run keeps none, and for a length that these cannot give.
    """
    # What there is: of each file how many updates it has seen, and its exponent.
    if not (tracked := load_recorded(folder / checkpoint.CONFIG).training.ema_lengths):
        advice = "set training.ema_lengths, e.g. to [0.05, 0.1], when the run begins"
        raise UserError(f"--ema-length: {folder} keeps no averages of which it could be rebuilt; {advice}")
    step, kept = checkpoint.read_state(folder)["step"], dict[Path, Profile]()
    earlier = [path for path in checkpoint.steps(RunFolder(folder.parent.parent).averages) if int(path.name[5:]) < step]
    for path in [*earlier, folder]:
        if path is not folder and (fault := checkpoint.find_damage(path)):
            print(f"warning: skipping damaged averages {path}: {fault}", flush=True)
            continue
        state = checkpoint.read_state(path)
        if count := state["step"] - state["skipped"]:  # before the first update an average is none
            for file in sorted(path.glob("ema_power_*.safetensors")):
                kept[file] = count, exponent_of(float(file.stem.removeprefix("ema_power_")))
    if folder not in {file.parent for file in kept}:
        raise UserError(f"--ema-length: {folder} has made no step yet; train first")

    # The factors of each in every length, then the sums, of which one file at a time is read.
    files, profiles, factors = list(kept), list(kept.values()), dict[float, np.ndarray]()
    last, _ = profiles[-1]
    for length in lengths:
        if length in tracked:  # as it is
            factors[length] = np.eye(len(kept))[files.index(folder / f"ema_power_{length}.safetensors")]
            continue
        factors[length], error = combine(profiles, (last, exponent_of(length)))
        if error > _TOLERANCE:
            found = f"--ema-length {length}: cannot be rebuilt from the {len(kept)} averages of {folder.parent.parent}"
            advice = "choose one of them, or train with more training.ema_lengths or snapshots"
            raise UserError(f"{found}; these can: {_ranges(profiles, last, tracked)}; {advice}")
    sums: dict[float, dict[str, Tensor]] = {length: {} for length in lengths}
    for number, file in enumerate(files):
        parts = {length: float(own[number]) for length, own in factors.items() if own[number]}
        for name, value in checkpoint.load_tensors(file.parent, file.stem).items() if parts else ():
            for length, factor in parts.items():
                part, total = value.float() * factor, sums[length]
                total[name] = total[name].add_(part) if name in total else part
    return sums


def _ranges(kept: Sequence[Profile], last: float, tracked: Sequence[float]) -> str:
    """Return in words which lengths are within tolerance, of the tracked ones and steps of 0.005."""
    tried = sorted({*tracked, *(number / 200 for number in range(2, 57))})
    fits = groupby(tried, lambda length: combine(kept, (last, exponent_of(length)))[1] <= _TOLERANCE)
    runs = [list(group) for good, group in fits if good]
    return ", ".join(f"{run[0]:g} to {run[-1]:g}" if len(run) > 1 else f"{run[0]:g}" for run in runs)
