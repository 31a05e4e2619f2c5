"""Nearest training and held-out images of samples: against brute force, from any number of processes, and refusals."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from test_evaluation_card import pictures, write_folder, write_npz
from tiny_run import make_inputs

from vit5gen.cli import main
from vit5gen.evaluation import load_extractor, nearest_images
from vit5gen.evaluation.samples import open_image_set


def write_sets(folder: Path) -> tuple[list[torch.Tensor], list[Path]]:
    """Write 30 samples (3 and 17 are nearly training images 40 and 2, 5 is 9), 50 training and 20 held-out images."""
    training, held_out, samples = pictures(50, seed=1), pictures(20, seed=2), pictures(30, seed=3)
    samples[3], samples[17] = training[40] // 2 * 2, training[2].clamp(max=250)
    samples[5] = training[9]
    images = [samples, training, held_out]
    return images, [write_npz(folder / f"{name}.npz", one) for name, one in zip("sth", images, strict=True)]


def find(paths: list[Path], batch_size: int = 7):
    return nearest_images.find_copies(*(open_image_set(path, batch_size) for path in paths), load_extractor("colours"))


def run(*words: object) -> int:
    with pytest.raises(SystemExit) as stopped:
        main([*map(str, words)])
    return stopped.value.code


def test_the_closest_pairs_are_those_of_all_distances(tmp_path: Path) -> None:
    images, paths = write_sets(tmp_path)
    result, pairs = find(paths)
    extractor = load_extractor("colours")
    samples, training, held_out = (extractor(one).pooled.double() for one in images)
    seen, unseen = torch.cdist(samples, training), torch.cdist(samples, held_out).amin(dim=1)
    order = (seen.amin(dim=1) / unseen).argsort(stable=True)[:12]
    assert [one["sample"] for one in result["closest"]] == order.tolist()
    assert [one["training_image"] for one in result["closest"]] == seen.argmin(dim=1)[order].tolist()
    for name, expected in (("distance", seen.amin(dim=1)), ("distance_to_held_out", unseen)):
        np.testing.assert_allclose([one[name] for one in result["closest"]], expected[order], rtol=1e-6, atol=1e-6)
    assert {5: 9, 3: 40, 17: 2}.items() <= {one["sample"]: one["training_image"] for one in result["closest"]}.items()
    for one, (sample, real) in zip(result["closest"], pairs, strict=True):
        assert torch.equal(sample, images[0][one["sample"]])
        assert torch.equal(real, images[1][one["training_image"]])
    assert result["identical"] == 1
    assert result["nearer_to_training"] == int((seen.amin(dim=1) < unseen).sum())
    assert result["by_chance"] == pytest.approx(30 * 50 / 70)
    middle = unseen.sort().values[round(0.5 * 29)]
    assert result["distances"]["held_out"]["median"] == pytest.approx(float(middle), rel=1e-6)


def test_samples_of_the_same_distribution_are_nearer_to_training_images_by_chance(tmp_path: Path) -> None:
    counts, found = (150, 120, 60), []
    for seed in range(3):
        sets = [pictures(count, seed=10 * seed + i) for i, count in enumerate(counts)]
        paths = [write_npz(tmp_path / f"{seed}{i}.npz", one) for i, one in enumerate(sets)]
        found.append(find(paths, 50)[0])
    share = sum(one["nearer_to_training"] for one in found) / 450
    assert all(one["by_chance"] == 100 for one in found)
    assert share == pytest.approx(2 / 3, abs=4 * (2 / 9 / 450) ** 0.5)


def test_equal_images_are_told_by_their_first(tmp_path: Path) -> None:
    training = pictures(6).repeat(3, 1, 1, 1)
    sets = [pictures(6, seed=0) // 2 * 2, training, pictures(8, seed=5)]
    paths = [write_npz(tmp_path / f"{i}.npz", one) for i, one in enumerate(sets)]
    expected = find(paths, 18)[0]
    assert all(one["training_image"] < 6 for one in expected["closest"])
    assert find(paths, 5)[0] == expected


def work(rank: int, processes: int, paths: list[Path], folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet{processes}", rank=rank, world_size=processes)
    torch.save(find(paths), folder / f"{processes}.{rank}.pt")
    dist.destroy_process_group()


@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_any_number_of_processes_finds_the_same(tmp_path: Path, processes: int) -> None:
    _, paths = write_sets(tmp_path)
    torch.multiprocessing.spawn(work, (processes, paths, tmp_path), nprocs=processes)
    expected, pairs = find(paths)
    for rank in range(processes):
        found, theirs = torch.load(tmp_path / f"{processes}.{rank}.pt", weights_only=True)
        assert found == expected
        assert all(map(torch.equal, sum(pairs, ()), sum(theirs, ())))


def test_the_command_writes_a_card_and_a_picture(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    _, (samples, training, held_out) = write_sets(tmp_path)
    card = tmp_path / "copies.json"
    words = ["copies", samples, "--training", training, "--held-out", held_out, "--extractor", "colours"]
    assert run(*words, "--output", card) == 0
    out, found = capsys.readouterr().out, json.loads(card.read_text())
    assert f"of 30 samples are nearer to a training image, by chance {30 * 50 / 70:.1f}; 1 are one, pixel" in out
    assert "proves neither" in out
    assert (found["samples"]["count"], found["training"]["count"], found["held_out"]["count"]) == (30, 50, 20)
    assert found["extractor"] == load_extractor("colours").identity
    assert run(*words, "--output", tmp_path / "copies.png") == 2
    with Image.open(tmp_path / found["picture"]) as picture:
        assert json.loads(picture.info["settings"])["closest"] == found["closest"]
        assert picture.width > 6 * 2 * 96


def test_a_configuration_brings_its_held_out_images(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    config = make_inputs(tmp_path)
    write_folder(tmp_path / "made", pictures(5, side=16))
    words = ["copies", tmp_path / "made", "--training", config, "--extractor", "colours"]
    words += ["--output", tmp_path / "c.json"]
    assert run(*words) == 0
    card = json.loads((tmp_path / "c.json").read_text())
    assert (card["training"]["count"], card["held_out"]["count"], card["held_out"]["split"]) == (21, 12, "test")
    assert len(card["closest"]) == 5
    write_npz(tmp_path / "big.npz", pictures(5, side=32))
    assert run(*words[:1], tmp_path / "big.npz", *words[2:], "--resize", 16) == 0
    assert json.loads((tmp_path / "c.json").read_text())["samples"]["read"]["resize"] == 16

    # What would be compared with itself, or not at all.
    write_folder(tmp_path / "data" / "train" / "star" / "made", pictures(5, side=16))
    write_npz(tmp_path / "same.npz", torch.cat([pictures(9, side=16, seed=4), pictures(5, side=16)]))
    for change, advice in (
        ({1: tmp_path / "data" / "train" / "star" / "made"}, "data contains the samples' own files"),
        ({3: tmp_path / "made"}, "not a configuration, so it names no held-out images; give --held-out DATA"),
        ({1: tmp_path / "big.npz"}, r"[16, 16] against [32, 32] of the samples"),
        (
            {3: tmp_path / "same.npz", 8: "--held-out", 9: config},
            "same.npz contains the samples' own files, pixel by pixel",
        ),
        ({8: "--held-out", 9: config}, "is given as training and as held-out images"),
        ({8: "--held-out", 9: tmp_path / "made"}, "made contains the samples' own files"),
    ):
        changed = dict(enumerate(words)) | change
        assert run(*(changed[i] for i in sorted(changed))) == 2
        assert advice in capsys.readouterr().err
