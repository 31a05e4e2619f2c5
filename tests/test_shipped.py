"""Generators that ship: found by name, fp16 on disk, fp32 in use, made of a run; their attribution goes with them."""

import json
import runpy
import sys
from pathlib import Path

import pytest
import torch
from called import call_convert, call_evaluate, call_sample
from PIL import Image
from safetensors.torch import load_file
from tiny import tiny_pipeline
from tiny_run import make_inputs
from tiny_run import run as train

import vit5gen
from vit5gen import SiTPipeline
from vit5gen.config import load_config
from vit5gen.data.autoencoders.find_autoencoder import load_autoencoder, missing
from vit5gen.evaluation.samples import open_image_set
from vit5gen.generation.card import pipeline_hash
from vit5gen.generation.find_pipeline import find_pipeline
from vit5gen.generation.load_pipeline import load_pipeline
from vit5gen.system import shipped
from vit5gen.system.errors import UserError
from vit5gen.system.files import write_json

SHIP = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "ship.py"))
CREDIT = "Pictures by a friend, CC BY 4.0"


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """Return a folder as a finished run leaves it."""
    folder = make_inputs(tmp_path).rename(tmp_path / "config.yaml").parent
    tiny_pipeline().save_pretrained(folder / "pipeline")
    write_json(folder / "metrics.json", {"evaluations": [{"step": 10, "FD": {"value": 3.5, "n": 6, "floor": 1.0}}]})
    return folder


@pytest.fixture
def tiny(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Ship that run as ``tiny``; return its folder."""
    monkeypatch.setattr(shipped, "FOLDER", tmp_path / "shipped")
    monkeypatch.setitem(SHIP["ship"].__globals__, "FOLDER", tmp_path / "shipped")
    monkeypatch.setattr("vit5gen.data.sources.folder.FolderSource.attribution", CREDIT)
    monkeypatch.chdir(tmp_path)
    return ship(run)


def ship(run: Path, *options: object) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        command = [
            "ship.py",
            str(run),
            "tiny",
            "--command",
            "train.py tiny.yaml",
            "--commit",
            "abc",
            *map(str, options),
        ]
        patch.setattr(sys, "argv", command)
        SHIP["main"]()
    return shipped.FOLDER / "tiny"


def test_a_name_is_its_folder_unless_there_is_such_a_path(tiny: Path) -> None:
    assert vit5gen.shipped("tiny") == str(tiny) == str(find_pipeline("tiny"))
    assert missing("tiny") == {}
    with pytest.raises(UserError, match=r"'tinny' is not known; expected one of tiny. Did you mean 'tiny'\?"):
        vit5gen.shipped("tinny")
    with pytest.raises(UserError, match=r"tinny is neither .* one that ships: tiny. Did you mean 'tiny'\?"):
        load_pipeline("tinny")
    Path("tiny").mkdir()
    assert find_pipeline("tiny") is None
    with pytest.raises(UserError, match="no autoencoder can be loaded"):
        load_autoencoder("tiny")


def test_weights_are_half_on_disk_and_single_in_use(run: Path, tiny: Path) -> None:
    original, pipe = load_pipeline(run), SiTPipeline.from_pretrained(vit5gen.shipped("tiny"))
    for part in ("transformer", "vae"):
        stored = load_file(tiny / part / "diffusion_pytorch_model.safetensors")
        exact, used = (getattr(one, part).state_dict() for one in (original, pipe))
        for name, _ in getattr(pipe, part).named_parameters():
            assert stored[name].dtype == torch.float16
            assert torch.equal(used[name], exact[name].half().float())
    vae = load_autoencoder("tiny")
    assert vae.dtype == torch.float32
    assert vae.config["_name_or_path"] == "tiny"
    assert all(torch.equal(value, pipe.vae.state_dict()[name]) for name, value in vae.state_dict().items())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_pictures_and_cards_carry_the_attribution(precision: str, tiny: Path, tmp_path: Path) -> None:
    options = {"num_images": 2, "num_inference_steps": 1, "precision": precision}
    call_sample("tiny", tmp_path / "a.png", **options)  # type: ignore[arg-type]
    call_sample("tiny", tmp_path / "folder", **options)  # type: ignore[arg-type]
    pictures = [tmp_path / "a.png", *(tmp_path / "folder").glob("*.png")]
    assert [json.loads(Image.open(file).info["settings"])["attribution"] for file in pictures] == [CREDIT] * 3
    card = json.loads((tmp_path / "a.png.card.json").read_text())
    assert card["attribution"] == CREDIT
    assert card["settings"]["precision"] == precision
    assert card["checkpoint_sha256"] == json.loads((tiny / "card.json").read_text())["checkpoint_sha256"]
    assert torch.isfinite(load_pipeline("tiny")(0, num_inference_steps=1, output_type="pt").images).all()
    load_pipeline("tiny").save_pretrained(tmp_path / "copy")
    assert load_pipeline(tmp_path / "copy").config.attribution == CREDIT
    assert CREDIT in (tmp_path / "copy" / "README.md").read_text()
    assert "attribution" not in load_pipeline(tmp_path).config  # of a run whose images want none


def test_figures_are_copied_and_those_of_other_weights_refused(
    run: Path, tiny: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = {"value": 0.25, "classes": {"star": 0.25}, "reference": 0.5, "ratio": 0.5}
    sampling = {"seed": 7, "sampler": "ode-heun", "path": "/some/where"}
    scored = {"path": "tiny", "count": 6, "sampling": sampling, "sha256": pipeline_hash(tiny)}
    card = {"samples": [scored], "metrics": {"precision": {"value": 0.75}}}
    write_json(tmp_path / "judge.json", {"samples": [scored], "metrics": {"recognised-Judge": judged}})
    write_json(tmp_path / "card.json", card)
    told = json.loads((ship(run, "--evaluation", "card.json", "judge.json") / "card.json").read_text())
    figures, readme = told.pop("figures"), (tiny / "README.md").read_text()
    assert figures.pop("autoencoder, held-out PSNR (dB)") > 0
    assert figures == {
        "evaluation in training": {"step": 10, "FD": {"value": 3.5, "n": 6, "floor": 1.0}},
        "drawn": {"images": 6, "seed": 7, "sampler": "ode-heun"},
        "precision": {"value": 0.75},
        "recognised-Judge": judged,
    }
    made = {"command": "train.py tiny.yaml", "commit": "abc", "seed": 0, "attribution": CREDIT}
    assert told == {**made, "checkpoint_sha256": pipeline_hash(tiny)}
    for text in ("train.py tiny.yaml\n# commit abc, seed 0", CREDIT, "| precision | value 0.75 |"):
        assert text in readme

    def refused(said: str, *options: str) -> None:
        with pytest.raises(SystemExit) as stopped:
            ship(run, *options)
        assert stopped.value.code == 2
        assert said in capsys.readouterr().err
        assert (tiny / "README.md").read_text() == readme
        assert [path.name for path in shipped.FOLDER.iterdir()] == ["tiny"]

    write_json(tmp_path / "card.json", {**card, "samples": [{**scored, "sha256": "0"}]})
    refused("of other weights", "--evaluation", "card.json")
    write_json(tmp_path / "card.json", {**card, "samples": [{**scored, "sampling": {**sampling, "seed": 8}}]})
    refused("other samples than those of the first card", "--evaluation", "judge.json", "card.json")
    monkeypatch.setitem(SHIP["ship"].__globals__, "MOST_BYTES", 1e4)
    refused("MB; expected under 0.01")
    write_json(run / "metrics.json", {"evaluations": []})
    refused("finish the run first")


def test_training_and_conversion_pass_the_attribution_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit5gen.data.sources.folder.FolderSource.attribution", CREDIT)
    train(make_inputs(tmp_path), tmp_path / "run", training__num_steps=1, evaluation__images_per_class=1)
    call_convert(tmp_path / "run", tmp_path / "converted")
    for folder in (tmp_path / "run", tmp_path / "converted"):
        assert load_pipeline(folder).config.attribution == CREDIT
    assert json.loads(Image.open(tmp_path / "run" / "samples.png").info["settings"])["attribution"] == CREDIT


def test_evaluation_draws_from_a_name(tiny: Path, tmp_path: Path) -> None:
    reference, network = tmp_path / "data" / "test" / "star", "effnet-lite0"
    options = {
        "reference": reference,
        "extractor": network,
        "num_images": 2,
        "num_inference_steps": 1,
        "metrics": ["fid"],
    }
    options |= {"guide": "tiny", "autoguidance_scale": 1.5}
    call_evaluate("tiny", output=tmp_path / "scores.json", **options)
    scored = json.loads((tmp_path / "scores.json").read_text())["samples"][0]
    assert (scored["path"], scored["sha256"]) == ("tiny", pipeline_hash(tiny))
    assert scored["sampling"]["attribution"] == CREDIT
    assert scored["sampling"]["guide_sha256"] == pipeline_hash(tiny)


def test_a_reference_may_be_a_configuration_that_ships(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("vit5gen.evaluation.samples.open_data", lambda data, batch_size: data)
    assert open_image_set("quickstart", 8) == load_config("quickstart").data
    with pytest.raises(UserError, match="quickstrat: expected an npz"):
        open_image_set("quickstrat", 8)
