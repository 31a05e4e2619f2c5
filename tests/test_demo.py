"""What the demo draws is what its code and its command draw; the page itself is in test_browser_demo.py."""

import re
import shlex
from pathlib import Path
from threading import Event

import numpy as np
import pytest
import torch
from tiny import NAMES, tiny_pipeline

from vit5gen import SiTPipeline
from vit5gen.cli import main
from vit5gen.generation.drawing import Drawing, draw, morph
from vit5gen.system.errors import UserError

SETTINGS = {"guidance_scale": 1.5, "num_inference_steps": 4, "sampler": "sde-heun"}


@pytest.fixture(scope="module")
def pipe() -> SiTPipeline:
    return tiny_pipeline()


@pytest.fixture(scope="module")
def folder(pipe: SiTPipeline, tmp_path_factory: pytest.TempPathFactory) -> str:
    pipe.save_pretrained(folder := tmp_path_factory.mktemp("a folder's"))
    return str(folder)


def check_code(pipe: SiTPipeline, drawing: Drawing, checkpoint: str) -> torch.Tensor:
    """Return the images (B, 3, H, W) of a drawing, once those of its Python code are found equal."""
    *_, (images, progress) = drawing.form(pipe, Event())
    assert progress.startswith("took ")
    assert f".from_pretrained({checkpoint!r}).to('cuda')\n" in drawing.as_python(checkpoint, "cuda")
    exec(drawing.as_python(checkpoint, "cpu"), found := {})
    assert np.array_equal(np.stack(found["images"]), images.permute(0, 2, 3, 1).numpy())
    return images


@pytest.mark.parametrize("classes", [[], [4, 3, 2]], ids=["all", "some"])
def test_the_code_and_the_command_draw_the_same(
    pipe: SiTPipeline, folder: str, tmp_path: Path, classes: list[int]
) -> None:
    drawing = draw(pipe, 5, SETTINGS, classes, 6)
    assert len(set(drawing.labels)) == (len(classes) or 5)
    images = check_code(pipe, drawing, folder)
    words = shlex.split(drawing.as_command(folder))
    assert words[0] == "vit5gen"
    assert ("Crane" in words) == bool(classes)
    with pytest.raises(SystemExit) as ended:
        main([*words[1:-1], str(tmp_path / "samples.npz")])
    assert ended.value.code == 0
    with np.load(tmp_path / "samples.npz") as drawn:
        assert np.array_equal(drawn["arr_0"], images.permute(0, 2, 3, 1).numpy())
        assert drawn["arr_1"].tolist() == drawing.labels


def test_a_morph_goes_from_one_class_to_the_other(pipe: SiTPipeline, folder: str, tmp_path: Path) -> None:
    drawing = morph(pipe, 3, SETTINGS, 1, 4, 5)
    images = check_code(pipe, drawing, folder)
    *_, (ends, _) = Drawing([1, 4], [0, 0], "AB", "", (), 3, SETTINGS).form(pipe, Event())
    assert (images[[0, 4]].int() - ends.int()).abs().max() <= 1  # of another batch
    distance = [float((images[0].float() - image.float()).abs().mean()) for image in images]
    assert distance == sorted(distance)
    words = shlex.split(drawing.as_command("x"))
    assert words[4:11] == ["--num-images", "1", "--morph", "crane", NAMES[4], "--frames", "5"]
    with pytest.raises(SystemExit) as ended:
        main([*shlex.split(drawing.as_command(folder))[1:-1], str(tmp_path / "samples.png")])
    assert ended.value.code == 0
    with pytest.raises(UserError, match="morph: both are the same class; choose two"):
        morph(pipe, 3, SETTINGS, 1, 1, 5)
    with pytest.raises(UserError, match="frames = 1; expected a whole number of at least 2"):
        morph(pipe, 3, SETTINGS, 1, 2, 1)


def test_a_class_whose_name_leads_elsewhere_goes_by_its_id() -> None:
    pipe = tiny_pipeline()
    pipe.register_to_config(id2label={0: "cat", 1: "cat", 2: "--seed", 3: "it's $(a)"})
    drawing = draw(pipe, 0, SETTINGS, [0, 1, 2, 3, 4], 5)
    assert sorted(map(str, eval(drawing.python))) == ["0", "1", "2", "4", "it's $(a)"]
    assert shlex.split(drawing.as_command("x"))[7:12] == ["0", "1", "2", "it's $(a)", "4"]


def test_a_field_that_is_empty_is_no_word_of_the_command(pipe: SiTPipeline) -> None:
    drawing = draw(pipe, 0, {"guidance_scale": None, "num_inference_steps": 4}, [1], 1)
    assert "--guidance-scale" not in drawing.as_command("x")
    assert "--num-inference-steps 4" in drawing.as_command("x")
    assert "guidance_scale=None" in drawing.as_python("x", "cpu")


def test_images_form_and_stop_after_the_step_that_runs(pipe: SiTPipeline, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("vit5gen.generation.drawing._PAUSE", 0)
    *previews, (last, _) = draw(pipe, 0, {"num_inference_steps": 60}, [1], 2).form(pipe, Event())
    assert previews[0][1] == "step 1 of 60"
    assert 2 <= len(previews) < 60
    distance = [float((images.float() - last.float()).abs().mean()) for images, _ in previews]
    assert distance[0] > distance[-1]  # the last preview may be of the last step

    stop = Event()
    forming = draw(pipe, 0, {"num_inference_steps": 100_000}, [1], 2).form(pipe, stop)
    next(forming)
    stop.set()
    *_, (images, progress) = forming
    assert re.fullmatch(r"stopped after step \d{1,4} of 100000", progress)
    assert images.shape == (2, 3, 16, 16)


def test_a_visitor_who_leaves_ends_the_call(pipe: SiTPipeline) -> None:
    stop = Event()
    forming = draw(pipe, 0, {"num_inference_steps": 100_000}, [1], 2).form(pipe, stop)
    next(forming)
    forming.close()  # returns when the call has ended
    assert stop.is_set()


@pytest.mark.parametrize(
    ("seed", "count", "options", "message"),
    [
        (-1, 1, {}, "seed = -1; expected a whole number of at least 0"),
        (None, 1, {}, "seed = None"),
        (0, 65, {}, "count = 65; expected a whole number of at least 1 and at most 64"),
        (0, 1.5, {}, "count = 1.5"),
        (0, 1, {"num_inference_steps": 2.5}, "num_inference_steps = 2.5; expected a whole number"),
        (0, 1, {"guidance_scale": "2"}, "guidance_scale"),
    ],
)
def test_bad_values(pipe: SiTPipeline, seed: object, count: object, options: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        list(draw(pipe, seed, options, [], count).form(pipe, Event()))


def test_without_gradio_one_line_names_the_extra(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("vit5gen.commands.demo.missing_packages", lambda packages: dict.fromkeys(packages, ""))
    with pytest.raises(SystemExit) as ended:
        main(["demo", "emoji-64"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        'error: vit5gen demo needs gradio, which is not installed; run `pip install "vit5gen[demo]"`\n'
    )
