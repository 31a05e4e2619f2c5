"""The draws of training: pure functions of (seed, step, position)."""

import numpy as np
import torch
from scipy import stats

from vit5gen.config import Config, TrainingConfig
from vit5gen.section import validate
from vit5gen.training.batches import TrainingSet, batch_keys
from vit5gen.training.random import data_index, sample_draws


class Counting:
    """Four-pixel latents whose mean tells index and flip, with no spread."""

    def __len__(self) -> int:
        return 10

    def get(self, index: int, flip: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
        return torch.full((1, 2, 2), index + 100.0 * flip), torch.zeros(1, 2, 2), index % 3


def training_set(flip: bool = True) -> TrainingSet:
    sections = {
        "model": {"preset": "S/2", "class_dropout_prob": 0.25},
        "data": {"resolution": 2, "num_classes": 3, "horizontal_flip": flip},
        "vae": {"latent_channels": 1, "downsample": 1},
        "training": {"global_batch_size": 4},
    }
    return TrainingSet(Counting(), validate(Config, sections, "test"))


def test_an_epoch_visits_every_sample_once_across_batches_that_do_not_divide_it():
    seen = [data_index(0, step, position, 4, 10) for step in range(5) for position in range(4)]
    assert sorted(seen[:10]) == sorted(seen[10:]) == list(range(10))
    assert seen[:10] != seen[10:]


def test_draws_are_standard_normal_and_uniform_and_independent_between_keys():
    draws = [sample_draws(1, step, position, (4, 8, 8)) for step in range(8) for position in range(8)]
    noise = torch.stack([d.noise for d in draws]).flatten().numpy()
    posterior = torch.stack([d.posterior for d in draws]).flatten().numpy()
    assert stats.kstest(noise, "norm").pvalue > 1e-3
    assert stats.kstest([d.uniform for d in draws], "uniform").pvalue > 1e-3
    assert abs(np.corrcoef(noise, posterior)[0, 1]) < 4 / len(noise) ** 0.5
    assert len({d.uniform for d in draws}) == len(draws)


def test_labels_drop_and_images_flip_at_their_rates():
    dataset = training_set()
    samples = [dataset[step, position] for step in range(500) for position in range(4)]
    dropped = np.mean([sample["label"] == 3 for sample in samples])
    flipped = np.mean([sample["x1"].max() >= 100 for sample in samples])
    assert abs(dropped - 0.25) < 4 * (0.25 * 0.75 / 2000) ** 0.5
    assert abs(flipped - 0.5) < 4 * (0.25 / 2000) ** 0.5
    assert all(sample["label"] in (3, sample["index"] % 3) for sample in samples)
    assert not any(training_set(flip=False)[0, position]["x1"].max() >= 100 for position in range(4))


def test_processes_and_micro_batches_share_one_global_batch():
    def keys(micro: int, world: int) -> list[tuple[int, int]]:
        settings = TrainingConfig(num_steps=5, global_batch_size=8, micro_batch_size=micro)
        batches = [list(batch_keys(settings, 3, rank, world)) for rank in range(world)]
        return sorted(key for rank in batches for batch in rank for key in batch)

    whole = [(step, position) for step in (3, 4) for position in range(8)]
    assert keys(8, 1) == keys(2, 1) == keys(4, 2) == keys(1, 4) == whole
