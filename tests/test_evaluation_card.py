import json
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch_fidelity
from called import call_evaluate
from PIL import Image
from tiny import tiny_pipeline
from torch import nn
from torch.nn import functional

from vit5gen import cli
from vit5gen.cli import main
from vit5gen.config import DrawConfig, SamplingConfig
from vit5gen.evaluation import evaluation_card as cards
from vit5gen.evaluation import frechet_distance, load_extractor, register_extractor
from vit5gen.evaluation.evaluation_card import evaluation_card, markdown, open_samples, samples_from_pipeline
from vit5gen.evaluation.extractors.inception import INCEPTION_SHA256
from vit5gen.evaluation.features import Extractor, Features
from vit5gen.evaluation.reference import open_reference
from vit5gen.evaluation.samples import Samples, open_folder, open_image_set
from vit5gen.generation.many import SamplingJob, draw_labels, generate
from vit5gen.lab.benchmark.evaluators import write_random_inception
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256


@register_extractor("colours")
def colours(device: torch.device, weights: Path | None, weights_sha256: str | None, *, side: int = 2) -> Extractor:
    """Mean colours of a grid, 2 x 2 by default: fast, and with all that Inception has."""

    def features(network: nn.Module, images: torch.Tensor) -> Features:
        pooled = functional.adaptive_avg_pool2d(images.float(), side).flatten(1) / 255
        return Features(pooled, spatial=images.float().mean(dim=1).flatten(1)[:, :20] / 255, logits=pooled[:, :5] * 9)

    options = {"weights_sha256": "none", "settings": {}, "network": nn.Identity(), "features": features}
    return Extractor(
        name="Colours", metric="FD-Colours", dim=3 * side**2, device=device, spatial_dim=20, num_classes=5, **options
    )


def pictures(count: int, seed: int = 0, side: int = 32) -> torch.Tensor:
    """Smooth random colours, uint8 ``(count, 3, side, side)``."""
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=torch.Generator().manual_seed(seed)).float()
    return functional.interpolate(coarse, size=side, mode="bilinear").to(torch.uint8)


def write_folder(folder: Path, images: torch.Tensor) -> Path:
    folder.mkdir(parents=True)
    for index, image in enumerate(images):
        Image.fromarray(image.permute(1, 2, 0).numpy()).save(folder / f"{index:05}.png")
    return folder


def write_npz(path: Path, images: torch.Tensor, **arrays: np.ndarray) -> Path:
    np.savez(path, arr_0=images.permute(0, 2, 3, 1).numpy(), **arrays)
    return path


@pytest.fixture(scope="module")
def colour_extractor() -> Extractor:
    return load_extractor("colours")


@pytest.fixture(scope="module")
def inception(tmp_path_factory) -> Extractor:
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    write_random_inception(path, pictures(8, seed=9))
    return load_extractor("inception", weights=path, weights_sha256=sha256(path))


def images_of(path: Path, batch_size: int) -> Samples:
    """The images of a file or folder, with what a card beside them tells."""
    (samples,) = open_samples(str(path), DrawConfig(), 0, (), batch_size)
    return samples


def card_of(samples: Path, reference: Path, extractor: Extractor, batch_size: int = 7, **options) -> dict:
    sets = [images_of(samples, batch_size)]
    return evaluation_card(sets, open_reference(reference, extractor, batch_size), extractor, **options)


@pytest.mark.slow
def test_inception_scores_of_folders_equal_torch_fidelity(tmp_path, inception) -> None:
    generated = write_folder(tmp_path / "generated", pictures(12, seed=0))
    # Far apart: torch-fidelity's roots of the 2,000 zero eigenvalues of so few images add up to 3e-4.
    real = write_folder(tmp_path / "real", pictures(12, seed=1) // 4)
    torch.save(inception.network.state_dict(), tmp_path / "weights.pth")
    theirs = torch_fidelity.calculate_metrics(
        input1=str(generated),
        input2=str(real),
        fid=True,
        isc=True,
        kid=True,
        prc=True,
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(tmp_path / "weights.pth"),
        isc_splits=1,
        samples_shuffle=False,
        kid_subsets=1,
        kid_subset_size=12,
        batch_size=7,
        cuda=False,
        cache=False,
        verbose=False,
    )
    ours = {
        name: score["value"]
        for name, score in card_of(generated, real, inception, metrics=["fid", "is", "pr", "kid"])["metrics"].items()
    }
    rows = [inception(images).pooled.double() for images in (pictures(12, seed=0), pictures(12, seed=1) // 4)]
    centred = [part - part.mean(0) for part in rows]
    cross = torch.linalg.svdvals(centred[0] @ centred[1].T).sum() / 11
    spread = sum(part.square().sum() / (len(part) - 1) for part in centred)
    exact = float((rows[0].mean(0) - rows[1].mean(0)).square().sum() + spread - 2 * cross)
    print(ours, theirs, exact)
    assert ours["FID"] == pytest.approx(exact, rel=1e-6)
    assert ours["FID"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours["KID"] == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-6)
    assert ours["IS"] == pytest.approx(theirs["inception_score_mean"], rel=1e-6)
    assert ours["precision"] == pytest.approx(theirs["precision"], abs=1e-7)
    assert ours["recall"] == pytest.approx(theirs["recall"], abs=1e-7)


def test_spatial_features_are_seven_channels_of_mixed_6d_in_nhwc(inception) -> None:
    images, network = pictures(2, seed=3), inception.network
    maps: dict[str, torch.Tensor] = {}
    for name in ("Mixed_6d", "Mixed_6e"):
        branch = network.get_submodule(f"{name}.branch1x1")
        handle = branch.register_forward_hook(lambda _, __, output, name=name: maps.update({name: output.clone()}))
        inception(images)
        handle.remove()
    found = inception(images).spatial
    right, other = (maps[name][:, :7] for name in ("Mixed_6d", "Mixed_6e"))
    assert torch.equal(found, right.permute(0, 2, 3, 1).reshape(2, 2023))
    assert not torch.allclose(found, right.reshape(2, 2023))
    assert not torch.allclose(found, other.permute(0, 2, 3, 1).reshape(2, 2023))
    assert found.std() > 0.01


@pytest.mark.slow
def test_adm_reference_gives_its_own_moments_and_the_card_says_what_differs_from_adm(tmp_path, inception) -> None:
    real, generated = pictures(10, seed=1), pictures(8, seed=0)
    features = inception(real)
    moments = {}
    for suffix, rows in (("", features.pooled), ("_s", features.spatial)):
        moments |= {f"mu{suffix}": rows.double().mean(0).numpy() + 0.5, f"sigma{suffix}": np.cov(rows.T)}
    reference = write_npz(tmp_path / "reference.npz", real, **moments)
    samples = write_npz(tmp_path / "samples.npz", generated)
    card = card_of(samples, reference, inception, protocol="adm")
    rows = inception(generated).pooled.double()
    expected = frechet_distance(rows.mean(0), torch.cov(rows.T), moments["mu"], moments["sigma"])
    assert card["metrics"]["FID"]["value"] == pytest.approx(expected, rel=1e-6)
    assert set(card["metrics"]) == {"FID", "sFID", "IS", "precision", "recall"}
    assert card["metrics"]["precision"]["adm_fp16"] is True
    assert card["metrics"]["FID"]["floor"] > 0
    assert card["protocol"]["label"] == "FID"
    assert "FID-50K" not in "\n".join(markdown(card))
    assert [text.split()[0] for text in card["protocol"]["differences"]] == ["8", "features", "the"]
    assert card["reference"]["sha256"] == sha256(reference)
    json.dumps(card, allow_nan=False)


def test_sfid_against_a_reference_without_mu_s_is_an_error(tmp_path, inception) -> None:
    reference = tmp_path / "reference.npz"
    np.savez(reference, mu=np.zeros(2048), sigma=np.eye(2048))
    samples = write_npz(tmp_path / "samples.npz", pictures(2, seed=0))
    with pytest.raises(UserError, match="metric sfid: the reference has no mu_s"):
        card_of(samples, reference, inception, metrics=["sfid"])
    with pytest.raises(UserError, match="metric pr: the reference has no images"):
        card_of(samples, reference, inception, metrics=["pr"])


def test_the_name_fid_50k_needs_all_that_adm_fixes(tmp_path, colour_extractor, monkeypatch) -> None:
    reference = open_reference(write_folder(tmp_path / "real", pictures(5, seed=1)), colour_extractor, 5)
    adm = replace(reference, identity={"kind": "adm", "path": "reference.npz", "images": 10_000})
    network = replace(colour_extractor, weights_sha256=INCEPTION_SHA256)
    samples = images_of(write_folder(tmp_path / "samples", pictures(6, seed=0)), 5)
    monkeypatch.setattr(cards, "RELIABLE_COUNT", 6)
    assert evaluation_card([samples], adm, network, protocol="adm")["protocol"]["label"] == "FID-50K"
    for one, other in ((reference, network), (adm, colour_extractor)):
        card = evaluation_card([samples], one, other, protocol="adm")
        assert len(card["protocol"]["differences"]) == 1
        assert card["protocol"]["label"] != "FID-50K"
    with pytest.raises(UserError, match="fixes the metrics"):
        evaluation_card([samples], adm, network, protocol="adm", metrics=["fid"])


def test_options_of_metrics_and_extractor_come_from_the_command_line(tmp_path) -> None:
    write_folder(tmp_path / "real", pictures(9, seed=1))
    write_folder(tmp_path / "samples", pictures(9, seed=0))
    words = ["evaluate", str(tmp_path / "samples"), "--reference", str(tmp_path / "real")]
    words += ["--extractor", "colours: {side: 3}", "--metrics", "fid", "pr: {k: 5}", "--output", str(tmp_path / "card")]
    with pytest.raises(SystemExit) as stopped:
        main(words)
    assert stopped.value.code == 0
    card = json.loads((tmp_path / "card").read_text())
    extractor = load_extractor({"colours": {"side": 3}})
    assert extractor.dim == 27
    assert card["extractor"] == extractor.identity
    assert extractor.identity["settings"] == {"side": 3}
    assert card["metric_options"] == {"pr": {"k": 5}}
    precision = card["metrics"]["precision-Colours"]
    assert precision["k"] == 5
    expected = card_of(tmp_path / "samples", tmp_path / "real", extractor, metrics=["fid", {"pr": {"k": 5}}])
    assert expected["metrics"] == card["metrics"]
    assert "metric_options" not in card_of(tmp_path / "samples", tmp_path / "real", extractor, metrics=["fid"])
    with pytest.raises(UserError, match="metric pr: given twice"):
        card_of(tmp_path / "samples", tmp_path / "real", extractor, metrics=["pr", {"pr": {"k": 5}}])


def test_effnet_scores_of_folders_equal_torch_fidelity(tmp_path) -> None:
    effnet = load_extractor("effnet-lite0")
    generated = write_folder(tmp_path / "generated", pictures(40, seed=0))
    real = write_folder(tmp_path / "real", pictures(40, seed=1) // 2 + 60)

    class PooledEffNet(torch_fidelity.FeatureExtractorBase):
        def __init__(self, name, features_list, **kwargs) -> None:
            super().__init__(name, features_list)
            self.network = effnet.network

        def forward(self, images: torch.Tensor) -> tuple[torch.Tensor]:
            pixels = functional.interpolate(images.float(), (96, 96), mode="bilinear", antialias=True)
            return (self.network(pixels / 127.5 - 1),)

        @staticmethod
        def get_provided_features_list() -> tuple[str]:
            return ("pooled",)

        @staticmethod
        def get_default_feature_layer_for_metric(metric: str) -> str:
            return "pooled"

    torch_fidelity.register_feature_extractor("effnet-test", PooledEffNet)
    theirs = torch_fidelity.calculate_metrics(
        input1=str(generated),
        input2=str(real),
        fid=True,
        kid=True,
        prc=True,
        feature_extractor="effnet-test",
        kid_subsets=1,
        kid_subset_size=40,
        batch_size=8,
        cuda=False,
        cache=False,
        verbose=False,
    )
    card = card_of(generated, real, effnet, batch_size=8)
    ours = {name: score["value"] for name, score in card["metrics"].items()}
    assert ours["FD-EffNetLite0@96"] == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert ours["KD-EffNetLite0@96"] == pytest.approx(theirs["kernel_inception_distance_mean"], abs=1e-6)
    assert ours["precision-EffNetLite0@96"] == pytest.approx(theirs["precision"], abs=1e-7)
    assert ours["recall-EffNetLite0@96"] == pytest.approx(theirs["recall"], abs=1e-7)
    assert set(card["skipped"]) == {"sfid", "is"}


def test_npz_and_folder_of_the_same_images_score_alike_at_any_batch_size(tmp_path, colour_extractor) -> None:
    images = pictures(23, seed=0)
    folder, npz = write_folder(tmp_path / "samples", images), write_npz(tmp_path / "samples.npz", images)
    reference = write_folder(tmp_path / "real", pictures(50, seed=1))
    cards = [card_of(path, reference, colour_extractor, size) for path in (folder, npz) for size in (1, 5, 100)]
    for card in cards[1:]:
        for name, score in cards[0]["metrics"].items():
            assert card["metrics"][name]["value"] == pytest.approx(score["value"], rel=1e-6)
    compressed = tmp_path / "compressed.npz"
    np.savez_compressed(compressed, arr_0=images.permute(0, 2, 3, 1).numpy())
    assert torch.equal(list(open_image_set(compressed, 20).chunks())[1][1], images[20:])


def test_statistics_file_scores_as_its_images_and_knows_its_extractor(tmp_path, colour_extractor, capsys) -> None:
    real, samples = (
        write_folder(tmp_path / "real", pictures(50, seed=1)),
        write_folder(tmp_path / "samples", pictures(20, seed=0)),
    )
    file, output = tmp_path / "real.statistics", tmp_path / "card.json"
    assert call_evaluate(str(real), save_statistics=str(file), extractor="colours") == 0
    call_evaluate(str(samples), reference=str(file), output=str(output), extractor="colours")
    card, direct = json.loads(output.read_text()), card_of(samples, real, colour_extractor, 50)
    assert card["metrics"] == direct["metrics"]
    assert card["reference"]["count"] == 50
    assert "| FD-Colours |" in capsys.readouterr().out
    with pytest.raises(
        UserError, match=r"real.statistics: from another extractor \(name 'Colours', now 'EffNetLite0@96'"
    ):
        call_evaluate(str(samples), reference=str(file), extractor="effnet-lite0")


def test_floor_is_the_distance_of_real_images_held_out_of_the_reference(tmp_path, colour_extractor) -> None:
    images = pictures(60, seed=1)
    reference = open_reference(write_npz(tmp_path / "real.npz", images), colour_extractor, 16)
    chosen = torch.arange(20) * 60 // 20
    rest = torch.ones(60, dtype=torch.bool).index_fill(0, chosen, value=False)
    parts = [colour_extractor(images[part]).pooled.double() for part in (chosen, rest)]
    moments = [value for rows in parts for value in (rows.mean(0), torch.cov(rows.T))]
    assert reference.floor(20) == pytest.approx(frechet_distance(*moments), rel=1e-6)
    assert reference.floor(31) is None


def write_sampled(path: Path, seed: int, checkpoint: str = "a", **settings: object) -> Path:
    """Write an npz and the card that `vit5gen sample` leaves beside it."""
    card = {"settings": {"seed": seed, "sampler": "ode-heun"} | settings, "checkpoint_sha256": checkpoint}
    path.with_suffix(".card.json").write_text(json.dumps(card))
    return write_npz(path, pictures(20, seed))


def test_several_seeds_of_a_model_give_mean_and_deviation(tmp_path, colour_extractor) -> None:
    reference = open_reference(write_folder(tmp_path / "real", pictures(30, seed=9)), colour_extractor, 8)
    sets = [images_of(write_sampled(tmp_path / f"{seed}.npz", seed), 8) for seed in range(3)]
    card = evaluation_card(sets, reference, colour_extractor)
    together = card["metrics"]["FD-Colours"]
    alone = [evaluation_card([one], reference, colour_extractor)["metrics"]["FD-Colours"]["value"] for one in sets]
    assert together["value"] == pytest.approx(np.mean(alone))
    assert together["deviation"] == pytest.approx(np.std(alone, ddof=1))
    assert [run["value"] for run in together["runs"]] == alone
    assert together.keys() == {"value", "deviation", "runs"}  # an interval is that of one run
    assert [model["samples"] for model in card["models"]] == [[0, 1, 2]]
    (row,) = markdown(card)[2:]
    assert row.startswith("| 0.npz, mean of 3 seeds | 20 |")
    assert "| standard deviation between seeds |" in row


def test_models_are_rows_and_never_averaged(tmp_path, colour_extractor) -> None:
    reference = open_reference(write_folder(tmp_path / "real", pictures(30, seed=9)), colour_extractor, 8)
    files = [
        write_sampled(tmp_path / "a0.npz", 0),
        write_sampled(tmp_path / "b0.npz", 0, checkpoint="b"),
        write_sampled(tmp_path / "a1.npz", 1),
        write_sampled(tmp_path / "a1_guided.npz", 1, guidance_scale=2.0),
        write_sampled(tmp_path / "again.npz", 0),  # the same seed is no other draw
        write_npz(tmp_path / "no_card.npz", pictures(20, 7)),
        write_npz(tmp_path / "nor_here.npz", pictures(20, 8)),
    ]
    (tmp_path / "odd.card.json").write_text("{}")
    files.append(write_npz(tmp_path / "odd.npz", pictures(20, 6)))
    sets = [images_of(file, 8) for file in files]
    alone = [evaluation_card([one], reference, colour_extractor) for one in sets]
    card = evaluation_card(sets, reference, colour_extractor)
    assert [model["samples"] for model in card["models"]] == [[0, 2], [1], [3], [4], [5], [6], [7]]
    for model in card["models"][1:]:
        assert model["metrics"] == alone[model["samples"][0]]["metrics"]
    assert card["metrics"] == card["models"][0]["metrics"]
    assert "7 models: `metrics` of the card are those of the first, `models` lists all" in card["warnings"]
    head, _, *rows = markdown(card)
    assert "\n".join(rows) == card["markdown"]
    assert [row.split(" | ")[0] for row in rows][:3] == ["| a0.npz, mean of 2 seeds", "| b0.npz", "| a1_guided.npz"]
    assert rows[1] == alone[1]["markdown"]
    assert " | ± | " in head
    assert " | standard error | " in rows[1]


def test_names_that_two_models_share_are_shown_as_paths(tmp_path, colour_extractor, capsys) -> None:
    reference = write_npz(tmp_path / "real.npz", pictures(30, seed=1))
    folders = [str(write_folder(tmp_path / name / "pipeline", pictures(20, seed=2))) for name in "ab"]
    call_evaluate(*folders, folders[0], reference=str(reference), extractor="colours", metrics=["fid"])
    rows = capsys.readouterr().out.splitlines()[2:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {folder}" for folder in folders]


@pytest.mark.parametrize(
    ("dtype", "matmul", "precision"),
    [
        (torch.float32, "highest", "fp32"),
        (torch.float32, "high", "tf32"),
        (torch.bfloat16, "highest", "bf16"),
        (torch.float16, "highest", "fp16"),
    ],
)
def test_a_card_tells_the_precision_that_was_set(tmp_path, dtype, matmul: str, precision: str) -> None:
    pipe = tiny_pipeline()
    pipe.save_pretrained(tmp_path)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(matmul)
    try:
        samples = samples_from_pipeline(pipe.to(dtype), tmp_path, SamplingJob([0], 0, 1), DrawConfig())
    finally:
        torch.set_float32_matmul_precision(before)
    assert samples.sampling["precision"] == precision
    assert samples.sampling["device"] == "cpu"


def test_a_pipeline_is_sampled_and_scored_in_one_pass(tmp_path) -> None:
    pipe, settings = tiny_pipeline(), SamplingConfig(sampler="ode-euler", num_inference_steps=2)
    pipe.save_pretrained(tmp_path / "run" / "pipeline")
    reference = write_npz(tmp_path / "real.npz", pictures(30, seed=1, side=16))
    options = {"reference": str(reference), "extractor": "colours", "batch_size": 5}
    drawn = {"num_images": 12, "seed": [3, 4, 3], "labels": "random", "settings": settings}
    call_evaluate(str(tmp_path / "run"), output=str(tmp_path / "together.json"), **options, **drawn)
    files = []
    for seed in (3, 4):
        labels = draw_labels(12, range(5), seed, "random")
        chunks = [images for _, images in generate(pipe, SamplingJob(labels, seed, 5, settings))]
        files.append(str(write_npz(tmp_path / f"{seed}.npz", torch.cat(chunks))))
    call_evaluate(*files, output=str(tmp_path / "files.json"), **options)
    together, apart = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("together", "files"))
    apart_by_name = [model["metrics"] for model in apart["models"]]
    assert {name: score["runs"] for name, score in together["metrics"].items()} == {
        name: [scores[name] for scores in apart_by_name] for name in apart["metrics"]
    }
    sampling = together["samples"][1]["sampling"]
    assert (sampling["seed"], sampling["labels"]) == (4, "random")
    assert sampling["network_evaluations"] == {"total": 24, "per_image": 2}
    assert len(together["samples"][0]["sha256"]) == 64


def test_card_names_everything_and_warns(tmp_path, colour_extractor) -> None:
    (tmp_path / "samples.card.json").write_text('{"sampler": "ode-heun"}')
    labels = np.repeat(np.arange(4), 5)
    samples = write_npz(tmp_path / "samples.npz", pictures(20, seed=0), arr_1=labels)
    reference = write_npz(tmp_path / "real.npz", pictures(40, seed=1))
    card = card_of(samples, reference, colour_extractor)
    assert card["samples"][0]["sampling"] == {"sampler": "ode-heun"}
    assert any("sorted by class: its Inception Score is wrong" in warning for warning in card["warnings"])
    alone = card_of(samples, reference, colour_extractor, metrics=["fid"])
    assert not any("Inception Score" in warning for warning in alone["warnings"])
    assert any("20 samples: below 50000" in warning for warning in card["warnings"])
    assert {"torch", "torch-fidelity", "vit5gen"} <= set(card["versions"])
    assert card["metrics"]["FD-Colours"]["standard_error"] > 0
    shuffled = write_npz(tmp_path / "shuffled.npz", pictures(20, seed=0), arr_1=np.roll(labels, 3))
    assert not any("sorted" in warning for warning in card_of(shuffled, reference, colour_extractor)["warnings"])


@pytest.mark.parametrize(
    ("mode", "message"),
    [("L", "has mode L; expected RGB"), ("RGBA", "has mode RGBA; expected RGB"), ("I;16", "has mode I;16")],
)
def test_images_that_are_not_rgb_are_named(tmp_path, colour_extractor, mode: str, message: str) -> None:
    folder = write_folder(tmp_path / "samples", pictures(3, seed=0))
    Image.new(mode, (32, 32)).save(folder / "00001.png")
    with pytest.raises(UserError, match=f"00001.png {message}"):
        card_of(folder, folder, colour_extractor)


def test_broken_files_and_mixed_sizes_are_named(tmp_path, colour_extractor) -> None:
    good = write_npz(tmp_path / "good.npz", pictures(6, seed=1))

    def refuses(samples: Path, message: str) -> None:
        with pytest.raises(UserError, match=message) as caught:
            card_of(samples, good, colour_extractor, batch_size=2)
        assert "\n" not in str(caught.value)

    folder = write_folder(tmp_path / "corrupt", pictures(3, seed=0))
    (folder / "00002.png").write_bytes((folder / "00002.png").read_bytes()[:90])
    refuses(folder, "00002.png does not decode")
    for index in (1, 2):  # within a batch, and in a later one
        folder = write_folder(tmp_path / f"mixed{index}", pictures(3, seed=0))
        Image.new("RGB", (16, 24)).save(folder / f"0000{index}.png")
        refuses(folder, f"mixed{index}.* 16x24.*the first one 32x32")
    (tmp_path / "corrupt.npz").write_bytes(good.read_bytes()[:5000])
    refuses(tmp_path / "corrupt.npz", "corrupt.npz cannot be read")
    damaged = bytearray(good.read_bytes())
    damaged[6000] ^= 255
    (tmp_path / "damaged.npz").write_bytes(damaged)
    refuses(tmp_path / "damaged.npz", "damaged.npz cannot be read .*CRC")
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((4, 8, 8, 3), np.float32))
    refuses(tmp_path / "float.npz", "arr_0 is float32")
    np.savez(tmp_path / "grey.npz", arr_0=np.zeros((4, 8, 8, 1), np.uint8))
    refuses(tmp_path / "grey.npz", r"arr_0 is uint8 \(4, 8, 8, 1\)")
    directory = bytearray(good.read_bytes())
    directory[directory.rfind(b"PK\x01\x02")] ^= 255
    (tmp_path / "directory.npz").write_bytes(directory)
    with pytest.raises(UserError, match=r"directory.npz cannot be read"):
        open_reference(tmp_path / "directory.npz", colour_extractor, 2)
    with zipfile.ZipFile(tmp_path / "empty.npz", "w"):
        pass
    refuses(tmp_path / "empty.npz", "no arr_0")
    refuses(tmp_path / "absent", "expected an npz, a folder")
    (tmp_path / "none").mkdir()
    refuses(tmp_path / "none", "no images")


def test_too_few_samples_and_bad_options_are_errors_of_one_line(tmp_path, colour_extractor) -> None:
    one, three = (write_npz(tmp_path / f"{count}.npz", pictures(count, seed=0)) for count in (1, 3))
    with pytest.raises(UserError, match="metric fid: 1 samples; needs at least 2"):
        card_of(one, three, colour_extractor, metrics=["fid"])
    with pytest.raises(UserError, match="metric pr: 3 samples; needs at least 4"):
        card_of(three, three, colour_extractor, metrics=["pr"])
    with pytest.raises(UserError, match=f"{three}/card.json: cannot be written"):
        call_evaluate(str(three), reference=str(three), output=f"{three}/card.json")
    with pytest.raises(UserError, match="Did you mean 'fid'"):
        card_of(three, three, colour_extractor, metrics=["fidd"])
    with pytest.raises(UserError, match="either --reference REF or --save-statistics"):
        call_evaluate(str(three))
    with pytest.raises(UserError, match="its mu and sigma are of Inception features"):
        card_of(
            three,
            write_npz(tmp_path / "adm.npz", pictures(3, 0), mu=np.zeros(2048), sigma=np.eye(2048)),
            colour_extractor,
        )


def test_features_that_are_not_finite_name_the_image(tmp_path, colour_extractor) -> None:
    def features(network: nn.Module, images: torch.Tensor) -> Features:
        pooled = functional.adaptive_avg_pool2d(images.float(), 2).flatten(1)
        return Features(pooled.log())  # of black: minus infinity

    images = pictures(9, seed=0).clamp(min=1)
    images[7] = 0
    broken = replace(colour_extractor, features=features, spatial_dim=0, num_classes=0)
    samples = images_of(write_npz(tmp_path / "samples.npz", images), 2)
    reference = open_reference(write_npz(tmp_path / "real.npz", images[:7]), broken, 2)
    with pytest.raises(UserError, match="image 7: NaN or infinity in its features"):
        evaluation_card([samples], reference, broken)


def test_a_data_source_is_a_reference(tmp_path, colour_extractor) -> None:
    folder = write_folder(tmp_path / "data" / "class", pictures(20, seed=1)).parent
    data = tmp_path / "data.yaml"
    data.write_text(f"{{model: {{preset: S/2}}, data: {{path: {folder}, resolution: 32, num_classes: 1}}}}")
    samples = images_of(write_npz(tmp_path / "samples.npz", pictures(9, seed=0)), 4)
    cards = [
        evaluation_card([samples], open_reference(source, colour_extractor, 4), colour_extractor)
        for source in (data, folder)
    ]
    assert cards[0]["metrics"] == cards[1]["metrics"]
    assert cards[0]["reference"]["kind"] == "data"


def test_a_configuration_skips_broken_images_where_it_says_so(tmp_path, colour_extractor, capsys) -> None:
    folder = write_folder(tmp_path / "data" / "class", pictures(20, seed=1))
    samples, file = images_of(write_npz(tmp_path / "samples.npz", pictures(9)), 4), tmp_path / "data.yaml"

    def reference(**more) -> dict:
        data = {"path": str(folder.parent), "resolution": 32, **more}
        file.write_text(json.dumps({"model": {"preset": "S/2"}, "data": data}))
        return evaluation_card([samples], open_reference(file, colour_extractor, 4), colour_extractor)

    (folder / "00002.png").unlink()
    whole = reference()
    (folder / "00002.png").write_bytes(b"no image")
    with pytest.raises(UserError, match=r"00002.png does not decode .*set data.on_broken_image to skip"):
        reference()
    skipping = reference(on_broken_image="skip")
    assert skipping["metrics"] == whole["metrics"]
    assert (skipping["reference"]["count"], skipping["reference"]["broken"]) == (19, 1)
    assert "broken" not in whole["reference"]
    assert capsys.readouterr().err == f"note: {folder.parent}: 1 file skipped (1 broken image)\n"
    for picture in folder.iterdir():
        picture.write_bytes(b"no image")
    with pytest.raises(
        UserError, match=r"none of 20 images can be decoded; .*00000.png does not decode .*; replace or remove it$"
    ):
        reference(on_broken_image="skip")


def test_adm_leaves_images_as_they_are_stored(tmp_path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    stored = Image.fromarray(pictures(1, side=24)[0, :, :16].permute(1, 2, 0).numpy())
    (tmp_path / "data" / "class").mkdir(parents=True)
    stored.save(tmp_path / "data" / "class" / "1.png", exif=exif)
    (tmp_path / "data.yaml").write_text(
        f"{{model: {{preset: S/2}}, data: {{path: {tmp_path / 'data'}, resolution: 16, num_classes: 1}}}}"
    )
    for path in (tmp_path / "data", tmp_path / "data.yaml"):
        upright, as_stored = open_image_set(path, 1), open_image_set(path, 1, "adm")
        assert (upright.identity["exif"], as_stored.identity["exif"]) == ("apply", "ignore")
        pixels, turned = (next(iter(one.chunks()))[1] for one in (upright, as_stored))
        assert torch.equal(pixels, turned.rot90(-1, (2, 3)))


def test_the_protocol_reaches_samples_reference_and_statistics(tmp_path, monkeypatch, colour_extractor) -> None:
    folder, seen = write_folder(tmp_path / "samples", pictures(8)), []

    def opened(path, batch_size, exif="apply", *read):
        seen.append(exif)
        return open_folder(path, batch_size, exif, *read)

    monkeypatch.setattr("vit5gen.evaluation.samples.open_folder", opened)
    protocol = {"extractor": "colours", "protocol": "adm"}
    call_evaluate(str(folder), save_statistics=str(tmp_path / "real.safetensors"), **protocol)
    call_evaluate(str(folder), reference=str(folder), **protocol)
    assert set(seen) == {"ignore"}
    assert len(seen) == 3


def test_bad_input_exits_with_code_2_and_one_line(tmp_path, capsys) -> None:
    np.savez(tmp_path / "float.npz", arr_0=np.zeros((4, 8, 8, 3)))
    path = str(tmp_path / "float.npz")
    with pytest.raises(SystemExit) as ended:
        cli.main(["evaluate", path, "--reference", path, "--extractor", "colours"])
    assert ended.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: npz ")
    assert error.count("\n") == 1


def test_missing_inception_weights_say_which_file_to_put_where(tmp_path, monkeypatch) -> None:
    def no_network(*args, **options) -> None:
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "get_dir", lambda: str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    name = "weights-inception-2015-12-05-6726825d.pth"
    with pytest.raises(UserError, match=rf"put https://\S+/{name} at {tmp_path}/checkpoints/{name}"):
        load_extractor("inception")
    (tmp_path / "checkpoints" / name).write_bytes(b"truncated")
    with pytest.raises(UserError, match=f"{name}: sha256 .*, expected 6726825d"):
        load_extractor("inception")
