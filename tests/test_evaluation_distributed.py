"""The same scores from 1, 2 and 3 processes, on given features and from images."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from test_evaluation_card import pictures, write_npz

from vit5gen.evaluation import FrechetReference, load_extractor
from vit5gen.evaluation.distances import (
    ScoreSums,
    density_coverage,
    frechet_at_infinity,
    frechet_with_error,
    kernel_distance,
    precision_recall,
)
from vit5gen.evaluation.evaluation_card import evaluation_card
from vit5gen.evaluation.reference import open_reference
from vit5gen.evaluation.samples import open_image_set
from vit5gen.evaluation.statistics import Grouped
from vit5gen.system.distributed import gather_rows, sum_over_processes

COUNT = 101


def given_features(rank: int, processes: int) -> dict[str, float]:
    """Score fixed features, of which a process sees some, in batches and an order of its own."""
    generator = torch.Generator().manual_seed(0)
    features, real = (torch.randn(COUNT, 8, generator=generator) + 5 for _ in range(2))
    order = torch.randperm(COUNT, generator=torch.Generator().manual_seed(processes))
    own = order[rank::processes]
    grouped, sums = Grouped(8), ScoreSums(COUNT, 8, split_size=40)
    for indices in own.split(4 + processes):
        grouped.update(features[indices], indices)
        sums.update(features[indices].double().softmax(dim=1), indices)
    grouped.all_reduce()
    sums.sums = sum_over_processes(sums.sums)
    rows = gather_rows(features[own], own)
    if rank:
        return {}
    assert torch.equal(rows, features)
    score = frechet_with_error(grouped, FrechetReference(torch.zeros(8), torch.eye(8)))
    precision, recall = precision_recall(real, rows)
    density, coverage = density_coverage(real, rows)
    return {
        "fid": score["value"],
        "n": score["n"],
        "standard_error": score["standard_error"],
        "is": sums.value(),
        "kid": kernel_distance(real, rows, 10, 50)[0],
        "precision": precision,
        "recall": recall,
        "density": density,
        "coverage": coverage,
        "infinity": frechet_at_infinity(FrechetReference(torch.zeros(8), torch.eye(8)), rows, 20)[0],
    }


def from_images(folder: Path) -> dict[str, float]:
    extractor = load_extractor("colours")
    reference = open_reference(folder / "real.npz", extractor, 7)
    metrics = ["fid", "sfid", "is", "pr", "kid", "dc", "class-fd", {"fd-infinity": {"smallest": 8}}]
    card = evaluation_card([open_image_set(folder / "samples.npz", 7)], reference, extractor, metrics)
    values = {name: score["value"] for name, score in card["metrics"].items()} if card else {}
    return values | {"processes": card["processes"]} if card else {}


def work(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet{processes}", rank=rank, world_size=processes)
    results = [given_features(rank, processes), from_images(folder)]
    if rank == 0:
        (folder / f"{processes}.json").write_text(json.dumps(results))
    dist.destroy_process_group()


@pytest.mark.parametrize("processes", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_scores_do_not_depend_on_the_number_of_processes(tmp_path, processes: int) -> None:
    classes = [{"arr_1": np.arange(count) % 3} for count in (23, 30)]
    # 4 chunks of 7: one short, not a multiple of 2 or 3
    write_npz(tmp_path / "samples.npz", pictures(23, seed=0), **classes[0])
    write_npz(tmp_path / "real.npz", pictures(30, seed=1), **classes[1])
    torch.multiprocessing.spawn(work, (processes, tmp_path), nprocs=processes)
    together = json.loads((tmp_path / f"{processes}.json").read_text())
    assert together[1].pop("processes") == processes
    alone = [given_features(0, 1), from_images(tmp_path)]
    assert alone[1].pop("processes") == 1
    assert alone[0]["n"] == COUNT
    for found, expected in zip(together, alone, strict=True):
        assert found.keys() == expected.keys()
        np.testing.assert_allclose(list(found.values()), list(expected.values()), rtol=1e-9)
