"""What a comparison claims of equal and of different models, from images, runs and cards, and what it refuses."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import yaml
from called import call_evaluate
from PIL import Image
from scipy import stats
from test_evaluation_card import colours, pictures, write_npz
from tiny import tiny_pipeline
from torch import nn
from torch.nn import functional

from vit5gen.cli import main
from vit5gen.evaluation import load_extractor, register_extractor
from vit5gen.evaluation.comparison import Side, differences, metrics_to_compare, score_side
from vit5gen.evaluation.distances import FrechetReference
from vit5gen.evaluation.features import Extractor, Features
from vit5gen.evaluation.metric import METRICS, Metric, scores
from vit5gen.evaluation.reference import Reference, Scan, open_reference, scan
from vit5gen.evaluation.samples import open_image_set
from vit5gen.evaluation.significance import Estimate, holm
from vit5gen.evaluation.statistics import Grouped
from vit5gen.system.errors import UserError

DIM, COUNT, REPETITIONS = 4, 200, 200


@pytest.fixture(scope="module")
def colour_extractor() -> Extractor:
    return load_extractor("colours")


def gaussian_side(features: torch.Tensor, extractor: Extractor, fid: dict[str, Metric]) -> Side:
    """Score rows of features against a standard Gaussian, and without each group of them."""
    grouped = Grouped(DIM)
    grouped.update(features, torch.arange(len(features)))
    whole = Scan(len(features), [8, 8], {"pooled": grouped}, None, torch.empty(0, DIM))
    reference = Reference({"pooled": FrechetReference(torch.zeros(DIM), torch.eye(DIM))}, None, None, {})
    alone = replace(
        whole, moments={"pooled": Grouped.of([grouped.total()])}
    )  # of one group, without an error bar of its own
    found = [scores(part, reference, extractor, fid) for part in (alone, *whole.leave_one_out())]
    return Side({"count": len(features)}, found, grouped.total().mean, {}, [])


def test_equal_models_are_seldom_told_apart_and_others_as_often_as_stated(colour_extractor) -> None:
    generator, fid, name = torch.Generator().manual_seed(3), {"fid": METRICS.build("fid", {}, "fid")}, "FD-Colours"
    gaps = {True: 0.09, False: 0.155}  # by whether image i of both shares noise
    equal, other = ({paired: [] for paired in gaps} for _ in range(2))
    for repetition in range(REPETITIONS):
        noise, *own = (torch.randn(COUNT, DIM, generator=generator, dtype=torch.float64) for _ in range(4))
        first = [gaussian_side(0.4 + 0.8 * noise + 0.6 * own[0], colour_extractor, fid)]
        for paired, rows in ((True, 0.8 * noise + 0.6 * own[1]), (False, own[2])):
            second = [gaussian_side(0.4 + rows, colour_extractor, fid)]
            equal[paired].append(differences(first, second, paired))
            if repetition % 4 == 0:
                further = [gaussian_side(0.4 + gaps[paired] + rows, colour_extractor, fid)]
                other[paired].append(differences(first, further, paired))
    for paired in gaps:
        # Of one model: one in twenty, of which 18 of 200 is the upper end.
        assert 1 <= sum(one["verdicts"][name] != "undecided" for one in equal[paired]) <= 18
        # Of a known difference: as often as Student's t with that difference and error says.
        entries = [one["differences"][name] for one in other[paired]]
        error = np.mean([entry["standard_error"] ** 2 for entry in entries]) ** 0.5
        expected = DIM * ((0.4 + gaps[paired]) ** 2 - 0.4**2)
        assert np.mean([entry["difference"] for entry in entries]) == pytest.approx(expected, abs=0.06)
        power = power_of(expected, error, np.mean([entry["degrees_of_freedom"] for entry in entries]))
        assert 0.6 < power < 0.9
        found = sum(one["verdicts"][name] == "better_a" for one in other[paired])
        assert abs(found - len(entries) * power) < 3 * (len(entries) * power * (1 - power)) ** 0.5


def power_of(difference: float, error: float, freedom: float) -> float:
    """Return how often a two-sided test at 5 % finds a difference: the noncentral t distribution."""
    critical = stats.t.isf(0.025, freedom)
    return stats.nct.sf(critical, freedom, difference / error) + stats.nct.cdf(-critical, freedom, difference / error)


@pytest.mark.parametrize("freedom", [4, 9, 18, 400])
def test_what_is_called_detectable_is_found_four_times_out_of_five(freedom: int) -> None:
    detectable = Estimate(1.0, 0.3, freedom).detectable
    assert power_of(detectable, 0.3, freedom) == pytest.approx(0.8, abs=0.012)


def test_estimates_are_those_of_scipy() -> None:
    rng = np.random.default_rng(0)
    pairs = rng.normal(0.5, 1, 7)
    found, theirs = Estimate.of_pairs(list(pairs)), stats.ttest_1samp(pairs, 0)
    assert found.p == pytest.approx(theirs.pvalue, rel=1e-12)
    assert found.interval == pytest.approx(tuple(theirs.confidence_interval()), rel=1e-12)
    # The mean as a score: groups of one row make the jackknife the textbook's error, and Welch's test of it.
    a, b = rng.normal(0, 1, 10), rng.normal(1, 3, 10)
    parts = [[float(np.delete(rows, i).mean()) for i in range(10)] for rows in (a, b)]
    difference = float(b.mean() - a.mean())
    welch, paired = stats.ttest_ind(b, a, equal_var=False), stats.ttest_rel(b, a)
    for found, theirs in ((False, welch), (True, paired)):
        estimate = Estimate.of_groups(difference, *parts, paired=found)
        assert estimate.p == pytest.approx(theirs.pvalue, rel=1e-9)
        assert estimate.freedom == pytest.approx(theirs.df, rel=1e-9)
    nothing = Estimate.of_groups(0.0, parts[0], parts[0], paired=True)
    assert nothing.p is None
    assert holm([0.01, None, 0.04, 0.03]) == pytest.approx([0.03, None, 0.06, 0.06])


def test_a_difference_without_an_error_is_not_called_none() -> None:
    sides = [Side({"count": 40}, [{"recall": {"value": one, "better": "higher"}}] * 11, None, {}, []) for one in (1, 0)]
    entry = differences(sides[:1], sides[1:], paired=False)["differences"]["recall"]
    assert (entry["difference"], entry["p"], entry["images_to_decide"]) == (-1, None, None)
    assert "its error is not known" in entry["reason"]
    assert differences(sides[:1], sides[:1], True)["differences"]["recall"]["reason"] == "there is no difference"


def test_as_many_images_as_would_decide_it_put_p_on_the_line() -> None:
    few = Estimate(2.0, 1.5, 9)
    count = few.count_to_decide(1000, 0.05)
    assert Estimate(2.0, 1.5 * (1000 / count) ** 0.5, 9).p == pytest.approx(0.05, rel=1e-2)
    assert count > 1000


DRAW = ["--num-images", "24", "--num-inference-steps", "1", "--sampler", "ode-euler"]


def write_run(folder: Path, seed: int, weights: int) -> Path:
    """Write what a run of a training seed leaves, with random weights."""
    tiny_pipeline(seed=weights).save_pretrained(folder / "pipeline")
    (folder / "config.yaml").write_text(yaml.safe_dump({"model": {"preset": "S/2"}, "training": {"seed": seed}}))
    (folder / "data.json").write_text("{}")
    return folder


@register_extractor("logarithms")
def logarithms(device: torch.device, weights: Path | None, weights_sha256: str | None) -> Extractor:
    """Mean colours' logarithms: of black images they are infinite."""

    def features(network: nn.Module, images: torch.Tensor) -> Features:
        return Features(functional.adaptive_avg_pool2d(images.float(), 2).flatten(1).log())

    plain = colours(device, weights, weights_sha256)
    return replace(plain, features=features, spatial_dim=0, num_classes=0)


def compare(*words: str | Path, folder: Path, capsys, code: int = 0) -> tuple[dict, str]:
    """Compare with the reference of a folder; return the card, if any, and what was printed."""
    output = folder / "out" / "card.json"
    shutil.rmtree(output.parent, ignore_errors=True)
    given = ["compare", "--reference", folder / "real.npz", "--extractor", "colours", "--output", output]
    with pytest.raises(SystemExit) as ended:
        main([str(word) for word in (*given, "--batch-size", 8, *words)])
    printed = capsys.readouterr()
    assert ended.value.code == code, printed.err
    if code:
        assert printed.err.count("\n") == 1
        assert not [*output.parent.glob("*")]
    return json.loads(output.read_text()) if code == 0 else {}, printed.err if code else printed.out


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two runs, a reference, samples with and without cards, and evaluation cards with groups."""
    folder = tmp_path_factory.mktemp("compare")
    write_npz(folder / "real.npz", pictures(40, seed=9, side=16))
    write_npz(folder / "other.npz", pictures(40, seed=8, side=16) // 2)
    for name in "ab":
        write_run(folder / name, 0, ord(name))
        options = {"reference": folder / "real.npz", "extractor": "colours", "batch_size": 8, "keep_groups": True}
        drawn = {"num_images": 24, "num_inference_steps": 1, "sampler": "ode-euler"}
        call_evaluate(folder / name, output=folder / f"{name}.json", **options, **drawn)
    return folder


def test_runs_are_drawn_from_equal_noise_and_told_apart(folder, capsys) -> None:
    words = {"folder": folder, "capsys": capsys}
    plain, _ = compare(folder / "a", folder / "b", *DRAW, **words)
    assert "name it in --metrics" in plain["skipped"]["kid"]
    every = ["--metrics", "fid", "sfid", "is", "pr", "kid", "dc"]
    card, printed = compare(folder / "a", folder / "b", *DRAW, *every, **words)
    assert plain["differences"].keys() == card["differences"].keys() - {
        "KD-Colours",
        "density-Colours",
        "coverage-Colours",
    }
    alone = [json.loads((folder / f"{name}.json").read_text())["metrics"] for name in "ab"]
    assert card["pairing"] == {"paired": True, "reason": "pairs of equal noise and label, seed 0", "training_seeds": []}
    assert card["differences"].keys() == card["verdicts"].keys() == alone[0].keys()
    for name, entry in card["differences"].items():
        assert [entry[side][0] for side in "ab"] == [one[name] for one in alone]
        assert entry["difference"] == pytest.approx(alone[1][name]["value"] - alone[0][name]["value"])
        verdict = card["verdicts"][name]
        decided = entry["p_holm"] is not None and entry["p_holm"] <= 0.05
        assert (verdict != "undecided") == decided
        if decided:
            low, high = entry["interval"]
            assert low * high > 0
            assert (verdict == "better_b") == ((low > 0) == (entry["better"] == "higher"))
        if (count := entry["images_to_decide"]) is not None:
            assert (count <= card["count"]) == decided
        else:
            assert entry["reason"].startswith(
                "there is no difference" if entry["difference"] == 0 else "the difference is"
            )
        assert f"| {name} |" in printed
    assert {card["differences"][name]["better"] for name in ("IS-Colours", "precision-Colours")} == {"higher"}
    assert printed.endswith(f"{card['summary']}\n")
    assert card["summary"].startswith("these two checkpoints: ")
    assert card["summary"].endswith("; other training seeds are not covered")
    assert card["options"]["num_images"] == card["count"] == 24
    assert {"commit", "versions", "reference", "extractor", "licences", "skipped", "processes"} <= card.keys()
    with Image.open(folder / "out" / card["picture"]) as picture:
        assert picture.width > 12 * 96
        assert picture.height > 2 * 96


def test_cards_with_groups_say_what_their_images_said(folder, capsys) -> None:
    drawn, _ = compare(folder / "a", folder / "b", *DRAW, folder=folder, capsys=capsys)
    for other in ("b.json", "b"):
        words = [folder / "a.json", folder / other, *(DRAW if other == "b" else [])]
        card, _ = compare(*words, folder=folder, capsys=capsys)
        assert card["pairing"] == drawn["pairing"]
        assert set(card["differences"]) == {"FD-Colours", "sFID-Colours", "IS-Colours"}
        for name, entry in card["differences"].items():
            for key in ("difference", "standard_error", "p"):
                assert entry[key] == pytest.approx(drawn["differences"][name][key], rel=1e-6)
        assert "a card keeps no features" in card["skipped"]["pr"]
    error = compare(*words[:2], *DRAW, "--metrics", "pr", folder=folder, capsys=capsys, code=2)[1]
    assert "metric pr: a card keeps no features of single images" in error


def test_groups_of_earlier_versions_tell_their_reference_by_the_card(folder, tmp_path, capsys) -> None:
    words = {"folder": folder, "capsys": capsys}
    for name in ("a.json", "a.groups.safetensors"):
        shutil.copy(folder / name, tmp_path)
    content = json.loads((tmp_path / "a.json").read_text())
    del content["groups"]["distance"]
    (tmp_path / "a.json").write_text(json.dumps(content))
    now, _ = compare(folder / "a.json", folder / "b.json", **words)
    assert compare(tmp_path / "a.json", folder / "b.json", **words)[0]["differences"] == now["differences"]
    _, error = compare(tmp_path / "a.json", folder / "b.json", "--reference", folder / "other.npz", **words, code=2)
    assert "a.json was made with another reference" in error


def test_images_are_paired_if_their_cards_tell_of_equal_noise(folder, tmp_path, capsys) -> None:
    for name, shift in (("a", 0), ("b", 6), ("no_card", 9)):
        images = (pictures(30, seed=1, side=16) // 2 + shift + pictures(30, seed=shift, side=16) // 8).to(torch.uint8)
        write_npz(tmp_path / f"{name}.npz", images, arr_1=np.arange(30))
    for name, checkpoint in (("a", "1"), ("b", "2")):
        settings = {"seed": 3, "classes": [0, 1], "guidance_scale": 1 + int(checkpoint)}
        (tmp_path / f"{name}.card.json").write_text(json.dumps({"checkpoint_sha256": checkpoint, "settings": settings}))
    words = {"folder": folder, "capsys": capsys}
    paired, _ = compare(tmp_path / "a.npz", tmp_path / "b.npz", "--metrics", "fid", **words)
    assert (folder / "out" / paired["picture"]).is_file()
    apart, _ = compare(tmp_path / "a.npz", tmp_path / "no_card.npz", "--metrics", "fid", **words)
    assert paired["pairing"]["paired"]
    assert apart["pairing"]["paired"] is False
    assert apart["pairing"]["reason"] == "two samples: seed is 3 for A, None for B (None: no card tells it)"
    assert apart["picture"] is None
    assert "these two sets of images: " in apart["summary"]
    found = [one["differences"]["FD-Colours"] for one in (paired, apart)]
    assert found[0]["degrees_of_freedom"] == 9
    assert 9 < found[1]["degrees_of_freedom"] <= 18
    errors = [found[1][side][0]["standard_error"] for side in "ab"]
    assert found[1]["standard_error"] == pytest.approx((errors[0] ** 2 + errors[1] ** 2) ** 0.5, rel=1e-9)


def test_several_runs_are_paired_by_training_seed(folder, tmp_path, capsys) -> None:
    for seed in range(5):
        for side, offset in (("a", 10), ("b", 20)):
            write_run(tmp_path / f"{side}, seed {seed}", 7 - seed, offset + seed)
    write_run(tmp_path / "b, seed 9", 9, 5)  # no partner
    words = [tmp_path / "a, seed *", tmp_path / "b, seed *", *DRAW, "--metrics", "fid"]
    card, printed = compare(*words, folder=folder, capsys=capsys)
    entry = card["differences"]["FD-Colours"]
    pairs = [b["value"] - a["value"] for a, b in zip(entry["a"], entry["b"], strict=True)]
    theirs = stats.ttest_1samp(pairs, 0)
    assert card["pairing"]["training_seeds"] == [3, 4, 5, 6, 7]
    assert [Path(one["path"]).name for one in card["b"]] == [f"b, seed {seed}" for seed in (4, 3, 2, 1, 0)]
    assert entry["p"] == pytest.approx(theirs.pvalue, rel=1e-9)
    assert entry["interval"] == pytest.approx(list(theirs.confidence_interval()), rel=1e-9)
    assert "these two recipes, 5 training seeds each: " in printed
    assert "not covered" not in printed
    for seed in (2, 3, 4):
        (tmp_path / f"b, seed {seed}" / "data.json").unlink()
    card, printed = compare(*words, folder=folder, capsys=capsys)
    assert card["verdicts"] == {"FD-Colours": "undecided"}
    assert "; 2 seeds are not tested, 5 are" in printed
    (tmp_path / "b, seed 0" / "config.yaml").write_text((tmp_path / "b, seed 1" / "config.yaml").read_text())
    error = compare(*words, folder=folder, capsys=capsys, code=2)[1]
    assert "b, seed 1 and " in error
    assert "the same training seed, 6; keep one" in error


def test_what_a_thread_cannot_add_ends_the_scan(colour_extractor, monkeypatch) -> None:
    def fail_on_the_last(self: Grouped, features: torch.Tensor, indices: torch.Tensor) -> None:
        if int(indices[-1]) == 31:
            raise UserError("features: no")

    monkeypatch.setattr(Grouped, "update", fail_on_the_last)
    chunks = ((first, pictures(8, first, 16)) for first in range(0, 32, 8))
    with pytest.raises(UserError, match="features: no"):
        scan(chunks, 32, colour_extractor)


def test_a_scan_without_a_group_is_the_scan_of_the_other_images(tmp_path, colour_extractor) -> None:
    images = pictures(33, seed=2)
    reference = open_reference(write_npz(tmp_path / "real.npz", pictures(30, seed=1)), colour_extractor, 8)
    metrics = {name: METRICS.build(name, {}, name) for name in ("fid", "sfid", "is", "pr", "kid")}
    whole = scan([(0, images)], 33, colour_extractor, rows=33)
    for group, part in enumerate(whole.leave_one_out()):
        rest = images[torch.arange(33) % 10 != group]
        alone = scan([(0, rest)], len(rest), colour_extractor, rows=len(rest), groups=1)
        found, expected = (scores(one, reference, colour_extractor, metrics) for one in (part, alone))
        assert found.keys() == expected.keys()
        for name, score in found.items():
            assert score["value"] == pytest.approx(expected[name]["value"], rel=1e-9)
    assert group == 9


def test_a_metric_that_does_not_tell_what_is_better_is_left_out(folder, capsys, monkeypatch) -> None:
    class Odd(Metric):
        def compute(self, scan, reference, extractor):
            return {"odd": {"value": float(scan.pooled.total().mean.sum())}}

    monkeypatch.setitem(METRICS._known, "odd", Odd)
    error = compare(folder / "a.json", folder / "b.json", "--metrics", "odd", folder=folder, capsys=capsys, code=2)[1]
    assert "metric odd: it does not tell what is better; set `better` in its class" in error
    monkeypatch.setattr(Odd, "better", "higher")
    card, _ = compare(folder / "a.json", folder / "b.json", "--metrics", "odd", folder=folder, capsys=capsys)
    assert card["verdicts"]["odd"] in ("better_a", "better_b", "undecided")
    assert card["differences"]["odd"]["standard_error"] > 0


def test_what_cannot_be_compared_is_refused_in_one_line(folder, tmp_path, capsys) -> None:
    def refuses(a: Path, b: Path, *more: str | Path, part: str) -> None:
        error = compare(a, b, "--metrics", "fid", *more, folder=folder, capsys=capsys, code=2)[1]
        assert part in error, error

    black = pictures(24, 0, 16).clamp(min=1)
    black[7] = 0
    counts = {"a": (24, 0, 16), "copy": (24, 0, 16), "few": (12, 0, 16), "ten": (12, 1, 16), "more": (25, 1, 16)}
    sets = {name: pictures(*how) for name, how in counts.items()} | {"large": pictures(24, 2, 32), "black": black}
    for name, images in sets.items():
        write_npz(tmp_path / f"{name}.npz", images)
    a, card = tmp_path / "a.npz", folder / "a.json"
    refuses(a, a, part="is given twice: there is nothing to compare")
    refuses(a, tmp_path / "copy.npz", part="are the same images: there is nothing to compare")
    refuses(folder / "a", folder / "a" / "pipeline", *DRAW, part="are the same images: there is nothing to compare")
    refuses(a, tmp_path / "more.npz", part=f"{a} has 24 images, {tmp_path}/more.npz has 25; evaluate both alike")
    refuses(card, tmp_path / "more.npz", part=f"{card} has 24 images, {tmp_path}/more.npz has 25")
    refuses(tmp_path / "few.npz", tmp_path / "ten.npz", part="12 images in")
    refuses(a, tmp_path / "large.npz", part="compare images of one size")
    refuses(card, folder / "b.json", "--reference", folder / "other.npz", part="was made with another reference")
    options = {"reference": folder / "other.npz", "extractor": "colours", "metrics": ["is"], "keep_groups": True}
    call_evaluate(a, output=tmp_path / "a.json", **options)
    capsys.readouterr()
    refuses(tmp_path / "a.json", folder / "b.json", part="a.json was made with another reference")
    refuses(card, folder / "b.json", "--extractor", "colours: {side: 3}", part="was made with extractor Colours")
    refuses(folder / "a", tmp_path / "no", *DRAW, part="expected an npz, a folder of images")
    refuses(a, tmp_path / "black.npz", "--extractor", "logarithms", part=f"{tmp_path}/black.npz: image 7: NaN or inf")
    refuses(card, folder / "b.json", "--output", card, part=f"--output {card}: is one of the two that are compared")
    picture = folder / "out" / "card.png"
    refuses(card, folder / "b.json", "--output", picture, part="a picture is written there; name the card card.js")
    changed, file = json.loads(card.read_text()), folder / "changed.json"
    file.write_text(json.dumps(changed | {"protocol": {"name": "adm"}}))
    refuses(file, folder / "b.json", part=f"{file} has adm as protocol, {folder}/b.json has None")
    file.write_text(json.dumps(changed | {"groups": changed["groups"] | {"sha256": "0"}}))
    refuses(file, folder / "b.json", part="a.groups.safetensors is not the file that the card names")
    file.write_text(json.dumps({key: value for key, value in changed.items() if key != "groups"}))
    refuses(file, folder / "b.json", part="has no groups to compare; evaluate again with --keep-groups, or give")


def test_groups_are_kept_of_one_set_beside_a_card(folder, tmp_path) -> None:
    options = {"reference": folder / "real.npz", "extractor": "colours", "keep_groups": True}
    with pytest.raises(UserError, match="--keep-groups: there is no card"):
        call_evaluate(folder / "other.npz", **options)
    with pytest.raises(UserError, match="--keep-groups: 2 sets of samples; expected one"):
        call_evaluate(folder / "other.npz", folder / "real.npz", output=tmp_path / "card.json", **options)
    assert not [*tmp_path.iterdir()]


def compared_in(folder: Path) -> dict:
    """Compare two sets of images in the processes there are; return what the main one finds."""
    extractor = load_extractor("colours")
    reference = open_reference(folder / "real.npz", extractor, 7)
    metrics, _ = metrics_to_compare(None, reference, extractor, cards=False)
    sets = [open_image_set(folder / f"{name}.npz", 7) for name in "ab"]
    sides = [score_side(images, reference, extractor, metrics, groups=True) for images in sets]
    return differences([sides[0]], [sides[1]], paired=True) if None not in sides else {}


def work(rank: int, processes: int, folder: Path) -> None:
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=processes)
    if found := compared_in(folder):
        (folder / "found.json").write_text(json.dumps(found))
    dist.destroy_process_group()


@pytest.mark.slow
def test_three_processes_find_what_one_finds(tmp_path) -> None:
    for name, seed in (("real", 1), ("a", 2), ("b", 3)):
        write_npz(tmp_path / f"{name}.npz", pictures(31, seed))
    torch.multiprocessing.spawn(work, (3, tmp_path), nprocs=3)
    together, alone = json.loads((tmp_path / "found.json").read_text()), compared_in(tmp_path)
    assert together["verdicts"] == alone["verdicts"]
    for name, entry in alone["differences"].items():
        for key in ("difference", "standard_error", "p"):  # small against the scores, whose 1e-9 counts for more here
            assert together["differences"][name][key] == pytest.approx(entry[key], rel=1e-7)
