"""`vit5gen publish` and ``push_to_hub``: one folder and one card, complete, without paths of the machine or secrets."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from diffusers.utils import hub_utils
from huggingface_hub import ModelCard
from PIL import Image
from tiny import tiny_pipeline
from tiny_run import make_inputs, run

from vit5gen import SiTPipeline
from vit5gen.cli import main
from vit5gen.generation.card import TrainingFacts, names_only, pipeline_hash
from vit5gen.system.files import write_json
from vit5gen.training import publication
from vit5gen.training.run_folder import RunFolder, run_facts

ENTRY = {"step": 10, "held_out_loss": 0.75, "FD-Net@96": {"value": 12.5, "n": 6, "floor": 3.25}}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder as a run leaves it, of a configuration that names folders and secrets."""
    folder = RunFolder(tmp_path_factory.mktemp("ada") / "run")
    folder.path.mkdir()
    config = yaml.safe_load(make_inputs(folder.path.parent).read_text())
    folder.config.write_text(yaml.safe_dump(config))
    write_json(folder.data, {"samples": 21, "classes": ["a"]})
    write_json(folder.metrics, {"evaluations": [{**ENTRY, "step": 0}, ENTRY]})
    Image.new("RGB", (8, 8)).save(folder.samples)
    (folder.path / "report.html").write_text(
        '<script type="application/json">{"path":"/a/b","i":"data:image/jpeg;base64,/9j/4A"}</script>'
        f"<script>x = '/a/b'</script><td>{config['data']['path']}</td><p>in {folder}/pipeline</p>"
    )
    pipe = tiny_pipeline()
    pipe.vae.register_to_config(_name_or_path=str(folder.path.parent / "my-vae"))
    command = (
        f"train.py /home/ada/run.yaml --data.path {config['data']['path']} --data.latents=s3://ada:pw@host/x?sig=1"
    )
    pipe.save_pretrained(
        folder.pipeline, facts=run_facts(folder, publication.load_recorded(folder.config), ENTRY, command)
    )
    (folder.pipeline / ".env").write_text("SECRET=1")
    (folder.pipeline / "transformer" / "notes.txt").write_text("mine")
    return folder.path


@pytest.fixture
def ran(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "ada" / "run")


def call(capsys: pytest.CaptureFixture[str], *words: str | Path) -> tuple[int, str]:
    """Return the exit code of a command, and what it said last."""
    with pytest.raises(SystemExit) as stopped:
        main(["publish", *map(str, words)])
    said = capsys.readouterr()
    return int(str(stopped.value.code)), (said.err or said.out).strip().splitlines()[-1]


def test_the_folder_is_complete_and_tells_nothing_of_the_machine(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    code, said = call(capsys, ran, "--repo", "ada/shapes", "--license", "cc-by-4.0", "--dry-run", tmp_path / "out")
    assert code == 0, said
    files = sorted(path.relative_to(tmp_path / "out").as_posix() for path in (tmp_path / "out").rglob("*.*"))
    weights = [
        f"{part}/{name}"
        for part in ("transformer", "vae")
        for name in ("config.json", "diffusion_pytorch_model.safetensors")
    ]
    own = ["README.md", "card.json", "model_index.json", "pipeline.py", "report.html", "samples.png"]
    own += ["transformer/transformer.py"]
    assert files == sorted([*own, *weights, "scheduler/scheduler_config.json"])
    for path in (tmp_path / "out").rglob("*"):
        if path.is_file():
            text = path.read_bytes()
            assert not [
                word for word in (b"/home", bytes(tmp_path), b"/ada", b"ada:pw", b"sig=", b"SECRET") if word in text
            ], path
    assert "my-vae" in (tmp_path / "out/vae/config.json").read_text()
    page = (tmp_path / "out/report.html").read_text()
    assert page.startswith('<script type="application/json">{"path":"b","i":"data:image/jpeg;base64,/9j/4A"}</script>')
    assert page.endswith("<script>x = '/a/b'</script><td>data</td><p>in pipeline</p>")

    # The card as the hub reads it.
    card = ModelCard.load(tmp_path / "out/README.md")
    assert (card.data.license, card.data.library_name, card.data.model_name) == ("cc-by-4.0", "diffusers", "shapes")
    results = {result.metric_type: result for result in card.data.eval_results}
    assert results["loss"].metric_value == 0.75
    assert results["fd-net@96"].metric_value == 12.5
    assert results["fd-net@96"].metric_args == {"step": 10, "n": 6, "floor": 3.25}
    for text in (
        "| 0 | golden retriever, retriever |",
        "| 4 | smileys & emotion |",
        "| FD-Net@96 | value 12.5, n 6, floor 3.25 |",
        "train.py run.yaml --data.path data --data.latents=s3://host/x",
        "Data set: data, 21 images.",
        "not comparable with FID",
        "pip install",
        'SiTPipeline.from_pretrained("ada/shapes")\nimages = pipe(class_labels="golden retriever, retriever", sampler=',
        'place = "ada/shapes"',
        "![samples](samples.png)",
        "[report.html](report.html)",
        "@software{vit5gen,\n",
        "author  = {{The vit5gen authors}},",
        "autoencoder: my-vae.",
    ):
        assert text in card.text, text
    citation = card.text.split("```bibtex\n")[1].split("```")[0]
    assert citation in (Path(__file__).parents[1] / "README.md").read_text()


def test_push_to_hub_gives_the_same_card(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    uploads: list[dict[str, bytes]] = []

    def upload(repo_id: str, folder_path: str, **options: Any) -> None:
        assert repo_id == "ada/shapes"
        uploads.append({path.name: path.read_bytes() for path in Path(folder_path).rglob("*") if path.is_file()})

    class Repo:
        repo_id = "ada/shapes"

    for module in (hub_utils, publication):
        monkeypatch.setattr(module, "upload_folder", upload)
        monkeypatch.setattr(module, "create_repo", lambda name, **options: Repo)
    monkeypatch.setattr(hub_utils, "load_or_create_model_card", lambda *args, **options: ModelCard("an empty card"))
    monkeypatch.setattr(publication, "get_token", lambda: "a token")
    assert call(capsys, ran, "--repo", "ada/shapes", "--dry-run", tmp_path / "out")[0] == 0
    assert call(capsys, ran, "--repo", "shapes") == (0, "https://huggingface.co/ada/shapes")
    SiTPipeline.from_pretrained(ran / "pipeline").push_to_hub("shapes")
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").rglob("*") if path.is_file()}
    assert uploads[0] == written
    assert uploads[1]["README.md"] == written["README.md"]
    assert uploads[1]["card.json"] == written["card.json"]
    assert uploads[1].keys() == written.keys()
    assert not [name for name, content in uploads[1].items() if bytes(tmp_path) in content]
    card = ModelCard(written["README.md"].decode())
    assert (card.data.license, card.data.license_name) == ("other", "not-chosen")


def test_scores_of_the_same_weights_are_added(ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    sampling = {"sampler": "ode-heun", "guidance_scale": 2.5, "seed": 7, "path": "/home/ada"}
    scored = {"path": "run", "count": 50_000, "sampling": sampling, "sha256": pipeline_hash(ran / "pipeline")}
    write_json(tmp_path / "a.json", {"samples": [scored], "metrics": {"FID": {"value": 2.25, "n": 50_000}}})
    write_json(tmp_path / "b.json", {"samples": [{**scored, "sha256": "0"}], "metrics": {}})
    given = (ran, "--repo", "ada/shapes", "--card", tmp_path / "a.json", "--dry-run", tmp_path / "out")
    assert call(capsys, *given)[0] == 0
    card = ModelCard.load(tmp_path / "out/README.md")
    assert [(result.metric_type, result.metric_value) for result in card.data.eval_results] == [
        ("loss", 0.75),
        ("fd-net@96", 12.5),
        ("fid", 2.25),
    ]
    assert "guidance_scale=2.5" in card.text
    assert "| drawn | images 50000, sampler ode-heun, guidance_scale 2.5, seed 7 |" in card.text
    code, said = call(capsys, ran, "--repo", "a/b", "--card", tmp_path / "b.json", "--dry-run", tmp_path / "other")
    assert (code, "of other weights" in said) == (2, True)


def test_cards_of_earlier_versions_and_of_a_persons_own(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # One that was edited keeps its words.
    card = ran / "pipeline/README.md"
    card.write_text(card.read_text().replace("## Licence", "My own words.\n\n## Licence"))
    given = ("--repo", "ada/shapes", "--license", "mit", "--dry-run")
    assert call(capsys, ran, *given, tmp_path / "edited")[0] == 0
    edited = ModelCard.load(tmp_path / "edited/README.md")
    assert (edited.data.license, edited.data.license_name) == ("mit", None)
    assert len(edited.data.eval_results) == 2
    assert "My own words." in edited.text
    assert 'from_pretrained("ada/shapes")' in edited.text

    # A run of an earlier version: what its files tell, and the command of its card.
    (ran / "pipeline/card.json").unlink()
    card.write_text("---\nlibrary_name: diffusers\n---\n\n# SiT\n\n## Training\n\n```\ntrain.py old.yaml\n```\n")
    assert call(capsys, ran, *given, tmp_path / "old")[0] == 0
    old = ModelCard.load(tmp_path / "old/README.md")
    assert [result.metric_value for result in old.data.eval_results] == [0.75, 12.5]
    for text in ("train.py old.yaml", "| 1 | crane |", "21 images", "samples.png"):
        assert text in old.text

    # A pipeline folder of an earlier version: its words without paths and secrets, with the front matter it lacks.
    words = "autoencoder: /home/ada/my-vae.\n\n![mine](mine.png)\n\n## Training\n\n```\ntrain.py /home/ada/old.yaml"
    words += " --data.path s3://ada:pw@host/x?sig=1\n```\n\nIt began with the weights of /home/ada/run (0).\n"
    card.write_text(f"---\nlibrary_name: diffusers\n---\n\n{words}")
    for name in ("mine.png", "passport.png"):
        Image.new("RGB", (8, 8)).save(ran / "pipeline" / name)
    shutil.copytree(ran / "pipeline", tmp_path / "alone")
    assert call(capsys, tmp_path / "alone", "--repo", "ada/shapes", "--dry-run", tmp_path / "moved")[0] == 0
    moved = ModelCard.load(tmp_path / "moved/README.md")
    for text in ("autoencoder: my-vae.", "train.py old.yaml --data.path s3://host/x\n", "weights of run (0)."):
        assert text in moved.text
    assert (moved.data.license, moved.data.license_name) == ("other", "not-chosen")
    assert moved.data.pipeline_tag == "unconditional-image-generation"
    assert {file.name for file in (tmp_path / "moved").glob("*.png")} == {"mine.png"}


def test_what_cannot_be_published_leaves_nothing_behind(
    ran: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: str | Path) -> str:
        before = sorted(tmp_path.rglob("*"))
        code, said = call(capsys, *words)
        assert code == 2
        assert said.startswith("error: ")
        assert sorted(tmp_path.rglob("*")) == before
        return said

    out = ("--dry-run", tmp_path / "out")
    (tmp_path / "begun").mkdir()
    shutil.copy(ran / "config.yaml", tmp_path / "begun")
    shutil.copy(ran / "data.json", tmp_path / "begun")
    assert "neither a run nor a pipeline" in refused(tmp_path / "none", "--repo", "a/b", *out)
    assert "no pipeline/ yet" in refused(tmp_path / "begun", "--repo", "a/b", *out)
    assert "--repo a/b/c" in refused(ran, "--repo", "a/b/c", *out)
    assert "--license = 'Apache 2'" in refused(ran, "--repo", "a/b", "--license", "Apache 2", *out)
    assert "no evaluation card" in refused(ran, "--repo", "a/b", "--card", ran / "metrics.json", *out)
    (tmp_path / "list.json").write_text('{"samples": [1], "metrics": {}}')
    assert "no evaluation card" in refused(ran, "--repo", "a/b", "--card", tmp_path / "list.json", *out)
    assert "choose another --dry-run" in refused(ran, "--repo", "a/b", "--dry-run", ran)
    monkeypatch.setattr(publication, "get_token", lambda: None)
    assert "hf auth login" in refused(ran, "--repo", "a/b")
    monkeypatch.setattr(publication, "get_token", lambda: "a token")
    monkeypatch.setattr(publication, "create_repo", lambda *args, **options: 1 / 0)  # whatever the network does
    assert "check the network" in refused(ran, "--repo", "a/b")

    def fill(*_: Any) -> None:
        raise OSError("no space left")

    with monkeypatch.context() as full:
        full.setattr(publication.shutil, "copyfile", fill)
        assert "no space left; nothing was written" in refused(ran, "--repo", "a/b")

    # A secret, and weights that diverged.
    index = ran / "pipeline/model_index.json"
    before = index.read_text()
    index.write_text(json.dumps({**json.loads(before), "attribution": f"hf_{'a1' * 17}"}))
    assert "looks like a token" in refused(ran, "--repo", "a/b", *out)
    index.write_text(before)
    pipe = tiny_pipeline()
    pipe.transformer.label_embed.weight.data[0, 0] = torch.nan
    pipe.save_pretrained(ran / "pipeline", facts=TrainingFacts())
    assert "not finite" in refused(ran, "--repo", "a/b", *out)


def test_many_names_are_folded_and_stay_text(tmp_path: Path) -> None:
    pipe = tiny_pipeline(num_classes=30)
    pipe.register_to_config(id2label={i: f"<b>|{i}" for i in range(30)})
    pipe.save_pretrained(tmp_path)
    text = (tmp_path / "README.md").read_text()
    assert "<details><summary>30 names</summary>\n\n| id | name |\n|---|---|\n| 0 | \\<b\\>\\|0 |\n" in text
    assert "| 29 | \\<b\\>\\|29 |\n\n</details>\n\n## Limitations" in text


@pytest.mark.parametrize(
    ("given", "left"),
    [
        ("train.py /a/b/c.yaml --output runs/x", "train.py c.yaml --output runs/x"),
        ("--data.path='/home/ada/x' ~/y/z/ [/a/b, /c/d]", "--data.path='x' z/ [b, d]"),
        ("file:///home/ada/x `/home/ada/x` |/home/ada/x|", "file://x `x` |x|"),
        ("{path: /a/b} https://u:p@host/a/b?k=v 1/2 a/b", "{path: b} https://host/a/b 1/2 a/b"),
    ],
)
def test_paths_become_names(given: str, left: str) -> None:
    assert names_only(given) == left


@pytest.mark.slow
def test_plain_diffusers_loads_what_a_run_published(config_file: Path, tmp_path: Path) -> None:
    assert run(config_file, tmp_path / "run", training__num_steps=2) == 0
    root = Path(__file__).parents[1]
    environment = {**os.environ, "PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-m", "vit5gen", "publish", "run", "--repo", "ada/shapes", "--dry-run", "out"]
    subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    (tmp_path / "elsewhere").mkdir()
    code = (
        "import torch; from diffusers import DiffusionPipeline; place = '../out'\n"
        "pipe = DiffusionPipeline.from_pretrained(place, custom_pipeline=place, trust_remote_code=True)\n"
        "pipe('star', num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0].save('star.png')"
    )
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path / "elsewhere", env=environment, check=True)
    pipe = SiTPipeline.from_pretrained(tmp_path / "run/pipeline")
    expected = pipe("star", num_inference_steps=2, generator=torch.Generator().manual_seed(0)).images[0]
    assert Image.open(tmp_path / "elsewhere/star.png").tobytes() == expected.tobytes()
    card = ModelCard.load(tmp_path / "out/README.md")
    assert card.data.license == "other"
    assert {"loss", "fd-effnetlite0@96"} == {result.metric_type for result in card.data.eval_results}
