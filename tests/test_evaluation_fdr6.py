"""FDr^6: its spaces against plain pipelines, its formula, its command; tiny networks with random weights."""

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import timm
import torch
import torch.distributed as dist
from called import call_evaluate
from safetensors.torch import save_file
from test_evaluation_card import card_of, colours, pictures, write_npz
from test_evaluation_spaces import ODD, filtered, noise
from torch.nn import functional

from vit5gen.cli import main
from vit5gen.evaluation import Extractor, load_extractor
from vit5gen.evaluation.evaluation_card import evaluation_card
from vit5gen.evaluation.extractors import fdr6, inception
from vit5gen.evaluation.features import EXTRACTORS
from vit5gen.evaluation.metrics.frechet_ratio import PUBLISHED, with_denominators
from vit5gen.evaluation.reference import Reference, open_reference, read_statistics
from vit5gen.evaluation.samples import open_image_set
from vit5gen.lab.benchmark.evaluators import write_random_inception
from vit5gen.registry import missing
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256

CPU = torch.device("cpu")
VIT = {"embed_dim": 16, "depth": 2, "num_heads": 2}
CONVNEXT = {"dims": (8, 8, 8, 16), "depths": (1, 1, 1, 1)}
IMAGENET = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
# What the definition says of each: side, mean and deviation, places of the positions as published.
DEFINED = {
    "ConvNeXtV2": (224, *IMAGENET, None),
    "DINOv2": (256, *IMAGENET, 37),
    "MAE": (224, *IMAGENET, 14),
    "SigLIP2": (224, (0.5,) * 3, (0.5,) * 3, 16),
    "CLIP": (256, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711), 16),
}
SPACES = {space.name: space for space in fdr6.SPACES}
NAMES = ["FDr^6", "FDr-Inception", *(f"FDr-{name}" for name in SPACES)]
TINY = {
    name: replace(space, options={**space.options, **(CONVNEXT if name == "ConvNeXtV2" else VIT)})
    for name, space in SPACES.items()
}
SMALL = tuple(replace(space, side=32) for space in TINY.values())  # of images, too


def write_weights(folder: Path) -> Path:
    """Write random weights of the five tiny networks by the names that fdr6 expects."""
    folder.mkdir(exist_ok=True)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for space in TINY.values():
            network = timm.create_model(space.model, pretrained=False, **space.options)
            state = {key: torch.randn_like(value) * 0.3 for key, value in network.state_dict().items()}
            save_file(state, folder / f"{space.model}.safetensors")
    return folder


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    return write_weights(tmp_path_factory.mktemp("weights") / "of fdr6")


def colours_for_inception(device: torch.device, weights: object, weights_sha256: object) -> Extractor:
    return replace(colours(device, None, None), name="Inception-v3-2015", metric="FID", licences={"Colours": "none"})


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch, weights: Path) -> Extractor:
    """The extractor with tiny networks of small images, and mean colours for Inception."""
    monkeypatch.setattr(fdr6, "SPACES", SMALL)
    monkeypatch.setattr(inception, "inception", colours_for_inception)
    return load_extractor("fdr6", weights=weights)


def test_networks_and_figures_are_the_published_ones() -> None:
    assert [*PUBLISHED] == ["pooled", *SPACES]
    assert [*PUBLISHED.values()] == [1.68, 56.87, 14.19, 0.04, 0.60, 5.60]
    dims = {"ConvNeXtV2": 1024, "DINOv2": 1024, "MAE": 1024, "SigLIP2": 1152, "CLIP": 1024}
    licences = dict.fromkeys(SPACES, "apache-2.0") | dict.fromkeys(("ConvNeXtV2", "MAE"), "cc-by-nc-4.0")
    for name, space in SPACES.items():
        with torch.device("meta"):
            network = timm.create_model(space.model, **space.options)
            found = space.features(network, torch.zeros(1, 3, 64, 64, dtype=torch.uint8, device="meta")).pooled
        side, mean, std, places = DEFINED[name]
        published = network.pretrained_cfg
        assert (found.shape, found.dtype, space.side) == ((1, dims[name]), torch.float32, side)
        assert (published["mean"], published["std"]) == (mean, std)
        assert published["license"] == licences[name]
        assert places is None or network.patch_embed.grid_size == (places, places)
        assert (space.resize, space.precision) == ("float", "bf16")


def tokens_of(network: timm.models.VisionTransformer, pixels: torch.Tensor, places: int) -> torch.Tensor:
    """Return the tokens after the last norm: images padded to whole patches, positions resampled for their number."""
    patch = network.patch_embed.proj.kernel_size[0]
    pixels = functional.pad(pixels, (0, -pixels.shape[3] % patch, 0, -pixels.shape[2] % patch))
    tokens = network.patch_embed.proj(pixels).flatten(2).mT
    count, first = pixels.shape[2] // patch, network.num_prefix_tokens
    positions = network.pos_embed[0].double().numpy()
    grid = positions[first:].T.reshape(16, places, places)
    grid = [filtered(filtered(channel, count).T, count).T.ravel() for channel in grid]
    positions = torch.tensor(np.concatenate([positions[:first], np.stack(grid, axis=1)])).float()
    if first:
        tokens = torch.cat([network.cls_token.expand(len(tokens), 1, 16), tokens], dim=1)
    return network.norm(network.blocks(network.norm_pre(tokens + positions)))


def attention_pool(pool: torch.nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    """Return what one learned query draws from the tokens, of two heads of 8, and a residual MLP after it."""
    query = pool.q(pool.latent)[0, 0]
    keys, values = pool.kv(tokens).chunk(2, dim=2)
    heads = []
    for head in (slice(0, 8), slice(8, 16)):
        shares = (keys[:, :, head] @ query[head] / 8**0.5).softmax(dim=1)
        heads.append((shares[:, :, None] * values[:, :, head]).sum(dim=1))
    mixed = pool.proj(torch.cat(heads, dim=1))
    return mixed + pool.mlp(pool.norm(mixed))


@pytest.mark.parametrize("name", SPACES)
def test_features_are_those_of_a_plain_pipeline(name: str, weights: Path) -> None:
    space = replace(TINY[name], precision="fp32")
    extractor = space(CPU, weights / f"{space.model}.safetensors", None)
    network, (side, mean, std, places) = extractor.network, DEFINED[name]
    for height, width in ODD:
        images = noise(height, width)
        planes = [filtered(filtered(one.numpy() / 255, side).T, side).T for one in images.flatten(0, 1)]
        pixels = torch.tensor(np.stack(planes)).view(2, 3, side, side)
        pixels = ((pixels - torch.tensor(mean).view(3, 1, 1)) / torch.tensor(std).view(3, 1, 1)).float()
        with torch.no_grad():
            if name == "ConvNeXtV2":
                expected = network.stages(network.stem(pixels)).mean(dim=(2, 3))
            else:
                tokens = tokens_of(network, pixels, places)
                expected = attention_pool(network.attn_pool, tokens) if name == "SigLIP2" else tokens[:, 0]
        found = extractor(images).pooled
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6 * float(expected.abs().max()))
        assert (found[0] - found[1]).abs().max() > 1e-3


def test_networks_of_timm_compute_in_bf16_and_inception_in_fp32(small: Extractor) -> None:
    images, seen = pictures(3), {}
    for space in SMALL:
        name = space.name
        layer = next(one for one in small.network[name].modules() if isinstance(one, torch.nn.Linear))
        layer.register_forward_hook(lambda _, __, output, name=name: seen.update({name: output.dtype}))
        exact = replace(space, precision="fp32").features(small.network[name], images).pooled
        rounded = small(images).others[name]
        assert rounded.dtype == torch.float32
        error = (rounded - exact).norm() / exact.norm()
        assert 1e-5 < error < 0.05
    assert seen == dict.fromkeys(TINY, torch.bfloat16)
    assert torch.equal(small(images).pooled, colours(CPU, None, None)(images).pooled)


def distance(x: np.ndarray, y: np.ndarray) -> float:
    """Frechet distance by eigenvalues of the product of covariances, which are real and not negative."""
    x, y = x.astype(np.float64), y.astype(np.float64)
    values = np.linalg.eigvals(np.cov(x.T) @ np.cov(y.T)).real.clip(min=0)
    return (
        ((x.mean(0) - y.mean(0)) ** 2).sum() + x.var(0, ddof=1).sum() + y.var(0, ddof=1).sum() - 2 * (values**0.5).sum()
    )


def features_of(extractor: Extractor, images: torch.Tensor) -> dict[str, np.ndarray]:
    parts = [extractor(part) for part in images.split(7)]
    found = {"Inception": torch.cat([part.pooled for part in parts]).numpy()}
    return found | {name: torch.cat([part.others[name] for part in parts]).numpy() for name in SPACES}


@pytest.fixture
def sets(tmp_path: Path) -> SimpleNamespace:
    """Samples, training and validation images: two draws, and one that is darker."""
    samples, training, validation = pictures(40) // 2, pictures(60, seed=1), pictures(50, seed=2)
    files = [
        write_npz(tmp_path / f"{name}.npz", images)
        for name, images in (("samples", samples), ("training", training), ("validation", validation))
    ]
    return SimpleNamespace(images=(samples, training, validation), files=files)


def test_scores_are_the_mean_of_six_ratios_with_the_error_of_a_jackknife(
    small: Extractor, sets: SimpleNamespace
) -> None:
    samples, training, validation = (features_of(small, images) for images in sets.images)
    published = dict(zip(samples, PUBLISHED.values(), strict=True))
    measured = {name: distance(validation[name], training[name]) for name in samples}
    references = [open_reference(file, small, 7) for file in sets.files[1:]]
    for denominators, reference in (
        (published, references[0]),
        (measured, with_denominators(*references, small)),
    ):
        card = card_of_reference(sets.files[0], reference, small)
        parts = [np.arange(40) % 10 != group for group in range(-1, 10)]  # all, then without each
        ratios = np.array(
            [[distance(samples[name][part], training[name]) / denominators[name] for part in parts] for name in samples]
        )
        for name, values in zip(NAMES, [ratios.mean(axis=0), *ratios], strict=True):
            score = card["metrics"][name]
            error = (((values[1:] - values[1:].mean()) ** 2).sum() * 0.9) ** 0.5
            assert score["value"] == pytest.approx(values[0], rel=1e-6)
            assert score["standard_error"] == pytest.approx(error, rel=1e-4)
            low, high = score["interval"]
            assert (high - low) / 2 == pytest.approx(2.262157 * error, rel=1e-4)  # Student's t, 9 degrees of freedom
            assert (score["n"], score["better"]) == (40, "lower")
        assert card["metrics"]["FDr-MAE"]["denominator"] == pytest.approx(denominators["MAE"], rel=1e-6)
        notes = card["metrics"]["FDr^6"]["notes"]
        assert notes[0] == "not verified against a published value"
        assert ["single digit" in note for note in notes[1:]] == ([True] if denominators is published else [])
        assert set(notes) == {one.removeprefix("FDr^6: ") for one in card["warnings"] if one.startswith("FDr^6")}


def card_of_reference(samples: Path, reference: Reference, extractor: Extractor) -> dict:
    return evaluation_card([open_image_set(samples, 7)], reference, extractor)


def test_validation_images_score_one(small: Extractor, sets: SimpleNamespace) -> None:
    reference = with_denominators(*(open_reference(file, small, 9) for file in sets.files[1:]), small)
    metrics = card_of_reference(sets.files[2], reference, small)["metrics"]
    values = {name: score["value"] for name, score in metrics.items() if name.startswith("FDr")}
    assert values == pytest.approx(dict.fromkeys(NAMES, 1))
    assert {"FID", "sFID", "IS", "precision"} <= metrics.keys()  # of the same pass


def test_command_measures_denominators_from_statistics_or_images(
    small: Extractor, weights: Path, sets: SimpleNamespace, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    samples, training, validation = sets.files
    common = {"extractor": "fdr6", "weights": weights, "batch_size": 8}
    for images in (training, validation):
        call_evaluate(images, save_statistics=images.with_suffix(".safetensors"), **common)
    cards = []
    for ending in (".safetensors", ".npz"):
        reference, denominators = (file.with_suffix(ending) for file in (training, validation))
        output = tmp_path / f"card{ending}.json"
        call_evaluate(
            samples, reference=reference, denominators=denominators, output=output, keep_groups=True, **common
        )
        cards.append(json.loads(output.read_text()))
    assert cards[0]["metrics"] == cards[1]["metrics"]
    record = cards[0]["reference"]["denominators"]
    assert (record["path"], record["count"]) == (str(validation.with_suffix(".safetensors")), 50)
    assert record["sha256"] == sha256(validation.with_suffix(".safetensors"))
    assert record["distances"]["MAE"] == cards[0]["metrics"]["FDr-MAE"]["denominator"]
    assert cards[0]["licences"]["MAE"] == "cc-by-nc-4.0"
    assert cards[0]["licences"]["Colours"] == "none"
    settings = cards[0]["extractor"]["settings"]
    for space in SMALL:
        digest = sha256(weights / f"{space.model}.safetensors")
        expected = {"model": space.model, "side": 32, "resize": "float", "pool": space.pool}
        assert settings[space.name] == expected | {"precision": "bf16", "weights_sha256": digest}
    out, error = capsys.readouterr()
    assert "warning: FDr^6: not verified against a published value" in error
    assert "FDr-SigLIP2" in out

    # The groups are enough to compare, by the same denominators.
    other = tmp_path / "other.npz"
    write_npz(other, pictures(40, seed=5) // 2)
    call_evaluate(
        other,
        reference=training,
        denominators=validation,
        output=tmp_path / "other.json",
        keep_groups=True,
        **common,
    )
    words = [tmp_path / "card.npz.json", tmp_path / "other.json", "--reference", training, "--denominators", validation]
    words += ["--extractor", "fdr6", "--weights", weights, "--metrics", "fdr6", "--output", tmp_path / "compared.json"]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *map(str, words)])
    assert ended.value.code == 0
    compared = json.loads((tmp_path / "compared.json").read_text())
    assert compared["differences"]["FDr^6"]["a"][0]["value"] == pytest.approx(cards[1]["metrics"]["FDr^6"]["value"])
    assert compared["reference"]["denominators"]["count"] == 50
    assert "FDr^6: not verified against a published value" in compared["warnings"]


def refused(samples: Path, **options: object) -> str:
    with pytest.raises(UserError) as found:
        call_evaluate(samples, **{"extractor": "fdr6", "batch_size": 8} | options)
    assert "\n" not in str(found.value)
    return str(found.value)


def test_denominators_that_cannot_be_used_are_one_line(
    small: Extractor, weights: Path, sets: SimpleNamespace, tmp_path: Path
) -> None:
    samples, training, validation = sets.files
    given = {"reference": training, "weights": weights}
    for options in ({"extractor": "colours", "weights": None}, {"metrics": ["fid"]}):
        message = refused(samples, denominators=validation, **given | options)
        assert "--denominators has no effect without FDr^6; give --extractor fdr6, and fdr6 among --metrics" in message
    assert "--denominators has no effect with --protocol" in refused(
        samples, denominators=validation, protocol="adm", **given
    )
    message = refused(training, save_statistics=tmp_path / "s", denominators=validation, weights=weights)
    assert "--denominators has no effect with --save-statistics" in message
    message = refused(samples, denominators=training, **given)
    assert f"--denominators {training}: their distance to the reference in Inception is" in message
    assert "give other images than its own" in message
    message = refused(samples, denominators=tmp_path / "absent.npz", **given)
    assert f"{tmp_path}/absent.npz" in message

    # Statistics of Inception alone, as ADM's are.
    adm = write_npz(tmp_path / "adm.npz", pictures(20), mu=np.zeros(2048), sigma=np.eye(2048))
    absent = "has no features of CLIP, ConvNeXtV2, DINOv2, MAE, SigLIP2; give images, or what --save-statistics made"
    for options in ({"reference": adm, "metrics": ["fdr6"]}, {"reference": training, "denominators": adm}):
        assert f"metric fdr6: reference {adm} {absent}" in refused(samples, weights=weights, **options)


def test_weights_are_a_folder_of_six_files(small: Extractor, weights: Path, tmp_path: Path, monkeypatch) -> None:
    file = weights / f"{SPACES['MAE'].model}.safetensors"
    with pytest.raises(
        UserError, match=r"no folder; fdr6 expects one with weights-inception-2015-12-05-6726825d.pth, con"
    ):
        load_extractor("fdr6", weights=file)
    with pytest.raises(UserError, match="--weights-sha256: one hash for the six files"):
        load_extractor("fdr6", weights=weights, weights_sha256="0" * 64)
    with pytest.raises(UserError, match=r"convnextv2_base.fcmae_ft_in22k_in1k.safetensors. is not a file"):
        load_extractor("fdr6", weights=tmp_path)
    monkeypatch.setattr("vit5gen.evaluation.extractors.timm_space.try_to_load_from_cache", lambda *names: None)
    absent = [one for one in missing(EXTRACTORS.get("fdr6")) if one.startswith("timm/")]
    assert absent == [f"timm/{space.model}/model.safetensors" for space in fdr6.SPACES]


def test_inception_gives_what_it_gives_alone(weights: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = weights / inception.weights_paths()[0].name
    write_random_inception(file, pictures(4, seed=9))
    monkeypatch.setattr(inception, "INCEPTION_SHA256", sha256(file))
    monkeypatch.setattr(fdr6, "SPACES", SMALL)
    whole, alone = load_extractor("fdr6", weights=weights), load_extractor("inception", weights=file)
    found, expected = (one(pictures(2)) for one in (whole, alone))
    for one in ("pooled", "spatial", "logits"):
        assert torch.equal(getattr(found, one), getattr(expected, one))
    assert whole.dims == {"pooled": 2048, "spatial": 2023} | dict.fromkeys(TINY, 16)
    assert (whole.metric, whole.weights_sha256) == ("FID", alone.weights_sha256)
    monkeypatch.setattr(inception, "INCEPTION_SHA256", "0" * 64)
    with pytest.raises(UserError, match=r"sha256 .* expected 00000000"):
        load_extractor("fdr6", weights=weights)


def test_statistics_of_earlier_versions_load(tmp_path: Path) -> None:
    extractor = colours(CPU, None, None)
    moments = {"mean": torch.zeros(12), "covariance": torch.eye(12), "rows": torch.zeros(3, 12)}
    moments |= {"spatial_mean": torch.ones(20), "spatial_covariance": 2 * torch.eye(20)}
    metadata = {"format": "vit5gen statistics 1", "extractor": json.dumps(extractor.identity)}
    metadata["content"] = json.dumps({"count": 3, "source": {"kind": "npz", "path": "real.npz"}})
    for without in ((), ("spatial_mean", "spatial_covariance")):
        tensors = {name: tensor.double() for name, tensor in moments.items() if name not in without}
        save_file(tensors, tmp_path / "old.safetensors", metadata)
        reference = read_statistics(tmp_path / "old.safetensors", extractor)
        assert list(reference.moments) == (["pooled"] if without else ["pooled", "spatial"])
        assert torch.equal(reference.pooled.covariance, tensors["covariance"])
    metric = card_of(write_npz(tmp_path / "a.npz", pictures(20)), tmp_path / "old.safetensors", extractor)
    assert "sfid" in metric["skipped"]


def work(rank: int, processes: int, folder: Path) -> None:
    fdr6.SPACES, inception.inception = SMALL, colours_for_inception
    dist.init_process_group("gloo", f"file://{folder}/meet{processes}", rank=rank, world_size=processes)
    extractor = load_extractor("fdr6", weights=folder / "weights")
    references = [open_reference(folder / f"{name}.npz", extractor, 7) for name in ("training", "validation")]
    card = card_of_reference(folder / "samples.npz", with_denominators(*references, extractor), extractor)
    if rank == 0:
        values = {name: score["value"] for name, score in card["metrics"].items()}
        (folder / f"{processes}.json").write_text(json.dumps(values))
    dist.destroy_process_group()


@pytest.mark.slow
def test_two_processes_score_as_one(sets: SimpleNamespace, tmp_path: Path) -> None:
    write_weights(tmp_path / "weights")
    for processes in (1, 2):
        torch.multiprocessing.spawn(work, (processes, tmp_path), nprocs=processes)
    one, two = (json.loads((tmp_path / f"{count}.json").read_text()) for count in (1, 2))
    assert one == pytest.approx(two, rel=1e-9)
