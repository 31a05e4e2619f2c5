"""report.html and `vit5gen report`: what the page holds, its size and time, and that a run does not depend on it."""

import io
import json
import re
import time
from contextlib import redirect_stderr, redirect_stdout
from html import unescape
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from made_run import HOSTILE, METRIC, make_run
from PIL import Image
from tiny import tiny_pipeline
from tiny_run import assert_identical, run, weights

from vit5gen.cli import main
from vit5gen.config import SamplingConfig, load_config
from vit5gen.data.autoencoders.codec import decode, to_uint8
from vit5gen.evaluation import load_extractor, nearest_images
from vit5gen.generation.many import SamplingJob, generate, image_generator
from vit5gen.report.chart import Chart, Curve, draw, shown, thin
from vit5gen.report.report_page import build_report
from vit5gen.report.run_facts import duration, find_warnings, verdict
from vit5gen.report.small_pictures import save_small, step_picture
from vit5gen.report.trajectory import find_trajectory
from vit5gen.training.previews import SampleGrid
from vit5gen.training.run_folder import RunFolder
from vit5gen.training.run_report import RunReport, read_run


class Page(HTMLParser):
    """The elements of a page with their attributes, and the data that its script reads."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.found: list[tuple[str, dict[str, str | None]]] = []
        self.text, self.data, self._in_data = text, dict[str, Any](), False
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found.append((tag, dict(attrs)))
        self._in_data = ("id", "data") in attrs

    def handle_data(self, data: str) -> None:
        if self._in_data:
            self.data, self._in_data = json.loads(data), False

    def all(self, tag: str, key: str = "") -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.found if name == tag and (not key or key in attributes)]


def run_cli(*words: str) -> tuple[int, str]:
    """Run a command in this process; return its exit code and what it printed."""
    told = io.StringIO()
    with redirect_stdout(told), redirect_stderr(told), pytest.raises(SystemExit) as ended:
        main(words)
    return int(ended.value.code or 0), told.getvalue()


@pytest.fixture(scope="module")
def made(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return make_run(config_file, tmp_path_factory.mktemp("made") / "a run")


def test_the_numbers_are_those_of_metrics_json(made: RunFolder) -> None:
    page = Page(build_report([read_run(made)]))
    assert page.data["runs"] == [{"path": str(made.path), "evaluations": made.evaluations()}]
    loss, distance = page.data["charts"]["loss"], page.data["charts"][f"distance {METRIC}"]
    assert [curve["name"] for curve in loss["curves"]] == ["training", "held-out"]
    assert loss["curves"][0]["points"] == [[line["step"], line["loss"]] for line in made.lines()]
    assert distance["curves"][0]["points"] == [[one["step"], one[METRIC]["value"]] for one in made.evaluations()]
    assert distance["curves"][1]["points"] == [[step, 100.125] for step in (0, 10, 20)]
    assert {*page.data["charts"]} == {"loss", f"distance {METRIC}", "grad_norm", "learning_rate", "images_per_second"}
    assert len(page.all("svg", "aria-label")) == 5
    assert page.data["steps"] == [0, 10, 20]


def test_a_page_needs_nothing_else_and_runs_no_script_but_its_own(made: RunFolder) -> None:
    page = Page(build_report([read_run(made)]))
    addresses = [one[key] or "" for _, one in page.found for key in ("src", "href") if key in one]
    assert len(addresses) == 4  # three pictures, and the icon that there is not
    assert all(address.startswith("data:") for address in addresses)
    assert len(page.all("script")) == 2
    assert "<script>alert" not in page.text
    assert "<span>&lt;script&gt;alert" in page.text  # a class
    assert "<title>resumed; &lt;script&gt;alert" in page.text  # a key that changed
    assert all(image["alt"] for image in page.all("img"))
    assert [image["data-step"] for image in page.all("img") if "hidden" not in image] == ["20"]
    (policy,) = [one["content"] for one in page.all("meta", "http-equiv")]
    assert "default-src 'none'" in str(policy)
    assert "script-src 'sha256-" in str(policy)


def test_commands_can_be_copied_and_warnings_are_told(made: RunFolder) -> None:
    facts = read_run(made)
    text = unescape(build_report([facts]))
    assert f"vit5gen sample --checkpoint '{made.path}' --num-images 16" in text
    assert f"vit5gen evaluate '{made.path}' --reference '{made.path}/config.yaml'" in text
    assert [note.partition(",")[0] for note in find_warnings(facts)] == ["N = 12 is small"]
    assert verdict(facts).startswith(f"Step 20 of 20. {METRIC} is 200 at step 20 (N = 12), above its floor: 2.00 times")
    assert (facts.seconds, duration(facts.seconds), facts.to_come) == (20 * 4 / 8, "10 s", "nothing")


def test_a_report_of_fifty_evaluations_is_small_and_quick(config_file: Path, tmp_path: Path) -> None:
    folder = make_run(config_file, tmp_path / "run", evaluations=51, every=100)
    begun = time.process_time()
    page = build_report([read_run(folder)])
    assert time.process_time() - begun < 2  # seconds
    assert len(page.encode()) < 3_000_000
    assert all(step_picture(folder.pictures, step).stat().st_size <= 36_000 for step in (0, 5000))
    charts = Page(page).data["charts"]
    assert len(charts["loss"]["curves"][0]["points"]) <= 400
    assert len(charts["loss"]["curves"][1]["points"]) == 51


def test_several_runs_share_charts_a_slider_and_tell_what_differs(
    made: RunFolder, config_file: Path, tmp_path: Path
) -> None:
    other = make_run(config_file, tmp_path / "b", evaluations=5, every=5)
    output = tmp_path / "page.html"
    assert run_cli("report", str(made.path), str(other.path), "--output", str(output))[0] == 0
    page = Page(output.read_text())
    assert page.data["steps"] == [0, 5, 10, 15, 20]
    assert [curve["name"] for curve in page.data["charts"]["grad_norm"]["curves"]] == ["a run", "b"]
    assert [curve["name"] for curve in page.data["charts"]["loss"]["curves"]][::2] == ["a run: training", "b: training"]
    assert ">evaluation.every" not in page.text  # they are alike in this
    assert len(page.data["runs"]) == 2


def test_a_run_that_has_less_is_shown_as_far_as_it_goes(made: RunFolder, config_file: Path, tmp_path: Path) -> None:
    begun = RunFolder(tmp_path / "begun")
    begun.path.mkdir()
    begun.config.write_text(made.config.read_text())
    begun.data.write_text("{}")
    assert "not evaluated yet" in build_report([read_run(begun)])
    old = make_run(config_file, tmp_path / "old")
    for file in old.pictures.iterdir():
        file.unlink()
    Image.new("RGB", (40, 40)).save(old.samples)
    page = Page(build_report([read_run(old)]))
    (image,) = page.all("img")
    assert str(image["src"]).startswith("data:image/png")
    assert not page.all("input")


def test_every_distance_of_a_run_has_a_chart(config_file: Path, tmp_path: Path) -> None:
    folder = make_run(config_file, tmp_path / "run")
    entries = folder.evaluations()
    entries[-1]['FD-"other"'] = entries[-1].pop(METRIC)
    folder.metrics.write_text(json.dumps({"evaluations": entries}))
    page = Page(build_report([read_run(folder)]))
    charts = page.data["charts"]
    assert [point[0] for point in charts[f"distance {METRIC}"]["curves"][0]["points"]] == [0, 10]
    assert [point[0] for point in charts['distance FD-"other"']["curves"][0]["points"]] == [20]
    clips = {one["id"] for one in page.all("clippath")}
    assert {f"url(#{name})" for name in clips} == {one["clip-path"] for one in page.all("g", "clip-path")}
    assert all(re.fullmatch(r"[\w-]+", str(name)) for name in clips)


def test_a_log_is_thinned_but_keeps_its_extremes_and_its_end() -> None:
    points = [(float(x), float(x % 7)) for x in range(5000)]
    points[1234], points[4321] = (1234.0, 99.0), (4321.0, -99.0)
    kept = thin(points)
    assert len(kept) <= 400
    assert {points[1234], points[4321], points[-1]} <= set(kept)
    assert kept == sorted(kept)
    assert thin(points[:400]) == points[:400]


def test_a_chart_has_its_values_where_they_belong() -> None:
    figure, places = draw(
        Chart("k", "T", "u", [Curve("c", [(0, 0), (100, 50), (200, 100)], 1, "dots", [None, 5, None])])
    )
    left, right, top, foot = places["box"]
    circles = [tuple(map(float, one)) for one in re.findall(r'<circle cx="([\d.]+)" cy="([\d.]+)"', figure)]
    assert [x for x, _ in circles] == [left, (left + right) / 2, right]
    low, high = places["y"]
    assert circles[1][1] == pytest.approx(foot - (50 - low) / (high - low) * (foot - top), abs=0.1)
    assert figure.count('<path d="M251') == 1  # the error bar of the middle
    assert [shown(value) for value in (None, 0.0, 1.5, 487.66, 12345.6, 0.00012345)] == [
        "–",
        "0",
        "1.500",
        "487.7",
        "12,346",
        "0.0001234",
    ]


SCORE = {"value": 3.25, "n": 9, "standard_error": 0.5, "interval": [2.0, 4.5], "floor": 1.0, "better": "lower"}
EVALUATION = {
    "samples": [{"path": "x.npz"}],
    "metrics": {"FID": SCORE},
    "warnings": [HOSTILE],
    "reference": {"path": "r"},
}
SIDE = [{"path": "x"}]
COMPARISON = {
    "a": SIDE,
    "b": SIDE,
    "summary": "A is better",
    "verdicts": {"FID": "better_a"},
    "differences": {"FID": {"difference": 1.0, "interval": [0.5, 1.5], "p_holm": 0.01, "a": [SCORE], "b": [SCORE]}},
}
SAMPLING = {"settings": {"sampler": "ode-heun"}, "checkpoint_sha256": "0" * 64, "attribution": "by somebody"}


def test_cards_and_studies_are_shown(tmp_path: Path) -> None:
    for name, card in (("e.json", EVALUATION), ("c.json", COMPARISON), ("s.png.card.json", SAMPLING)):
        (tmp_path / name).write_text(json.dumps(card))
    Image.new("RGB", (20, 20)).save(tmp_path / "s.png")
    study, output = Path(__file__).parents[1] / "docs/study/emoji", tmp_path / "page.html"
    inputs = [str(tmp_path / name) for name in ("e.json", "c.json", "s.png.card.json")]
    assert run_cli("report", *inputs, str(study), "--output", str(output))[0] == 0
    page = Page(output.read_text())
    cells = re.findall("<td>(.*?)</td>", page.text)
    assert {"3.250 ± 0.5", "2 to 4.500", "A is better", "1 [0.5, 1.500]"} <= set(cells)
    assert HOSTILE not in page.text
    assert len(page.all("img")) == 2  # of the sampling card, and of the study's differences
    assert "by somebody" in page.text
    assert "sampler: ode-heun" in page.text
    assert page.text.count("<table>") == 4


@pytest.mark.parametrize(
    ("content", "output", "message"),
    [
        ("{}", "page.html", "is not a card; expected a card of"),
        ("[", "page.html", "is not valid JSON"),
        ('{"metrics": {"FID": 3}}', "page.html", "not as vit5gen writes it"),
        ("{}", "page.txt", "expected FILE.html"),
        (None, "page.html", "No such file or directory; check the path"),
    ],
)
def test_bad_input_is_told_in_a_line(tmp_path: Path, content: str | None, output: str, message: str) -> None:
    if content is not None:
        (tmp_path / "card.json").write_text(content)
    code, told = run_cli("report", str(tmp_path / "card.json"), "--output", str(tmp_path / output))
    assert (code, told.count("\n")) == (2, 1)
    assert message in told
    assert not (tmp_path / output).exists()


def test_a_study_without_a_table_yet_is_shown(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"a": 1}\n')
    assert "<p>1 runs</p>" in build_report([], {}, [tmp_path])


def test_a_damaged_run_is_told_in_a_line(config_file: Path, tmp_path: Path) -> None:
    folder = make_run(config_file, tmp_path / "run")
    folder.metrics.write_text(json.dumps({"evaluations": [{"step": 0, METRIC: {"value": "much", "n": 1}}]}))
    code, told = run_cli("report", str(folder.path), "--output", str(tmp_path / "page.html"))
    assert (code, told.count("\n")) == (2, 1)
    assert "not as vit5gen writes it" in told


def test_small_pictures_stay_small_and_keep_their_attribution(tmp_path: Path) -> None:
    noise = torch.randint(256, (500, 500, 3), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    save_small(tmp_path / "a.webp", Image.fromarray(noise.numpy()), "Ä by B")
    assert (tmp_path / "a.webp").stat().st_size <= 36_000
    assert Image.open(tmp_path / "a.webp").getexif()[0x8298].encode("latin-1").decode() == "Ä by B"


@pytest.mark.parametrize("sampler", ["ode-heun", "ode-dopri5", "sde-euler"])
def test_a_trajectory_begins_with_the_noise_and_ends_with_the_images(sampler: str) -> None:
    pipe, settings = tiny_pipeline(), SamplingConfig(sampler=sampler, num_inference_steps=12)
    before = torch.random.get_rng_state()
    frames, times = find_trajectory(pipe, [0, 2], [3, 1], 5, settings)
    assert torch.equal(torch.random.get_rng_state(), before)
    images = torch.cat([images for _, images in generate(pipe, SamplingJob([3, 0, 1], 5, 1, settings))])
    for i, index in enumerate((0, 2)):  # of another batch size
        assert (frames[-1][i].int() - images[index].int()).abs().max() <= 1
    noise = torch.cat([torch.randn(1, 4, 8, 8, generator=image_generator(5, i)) for i in (0, 2)])
    assert torch.equal(frames[0], to_uint8(decode(pipe.vae, noise)))
    assert times == sorted(times)
    assert (times[0], times[-1], len(times) <= 9) == (0.0, 1.0, True)


@pytest.fixture(scope="module")
def trained(config_file: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = RunFolder(tmp_path_factory.mktemp("trained") / "run")
    run(config_file, folder.path, training__num_steps=2)
    return folder


def test_a_run_keeps_a_page_with_pictures_of_every_evaluation(trained: RunFolder) -> None:
    page = Page(trained.report.read_text())
    assert page.data["steps"] == [0, 2]
    assert page.data["runs"][0]["evaluations"] == trained.evaluations()
    assert page.text == build_report([read_run(trained)])
    told = read_run(trained).told
    assert told["rows"] == ["circle", "square", "star"]
    assert told["trajectory"]["columns"] == ["0.00", "0.50", "1.00"]
    assert told["nearest"]["rows"] == ["sample", "training"]
    assert "nearest of 21 training images" in told["nearest"]["what"]
    assert told["flops_per_image"] > 1000
    assert "torch" in told["versions"]
    assert len(page.all("img")) == 4


def test_the_nearest_images_keep_no_other_process_waiting(
    config_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(nearest_images, "gather_objects", None)
    config, folder = load_config(config_file), RunFolder(tmp_path)
    report = RunReport(config, folder, SampleGrid(config, folder.samples, ["a", "b", "c"], None))
    report.find_nearest(torch.zeros(6, 3, 16, 16, dtype=torch.uint8), load_extractor("effnet-lite0"), 2)
    assert step_picture(folder.pictures, 2).with_name("nearest.webp").is_file()


def test_the_page_changes_no_number_and_ends_no_run(
    config_file: Path,
    trained: RunFolder,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def fail(*_: Any) -> None:
        raise OSError("no space")

    monkeypatch.setattr(RunReport, "refresh", fail)
    monkeypatch.setattr(RunReport, "find_nearest", fail)
    folder = RunFolder(tmp_path / "run")
    assert run(config_file, folder.path, training__num_steps=2) == 0
    told = capsys.readouterr().out
    assert told.count("note: report.html is not refreshed: OSError('no space')") == 3  # two pages, and the nearest
    assert not folder.report.exists()
    assert folder.evaluations() == trained.evaluations()
    assert folder.samples.read_bytes() == trained.samples.read_bytes()
    assert_identical(weights(folder.path, 2), weights(trained.path, 2))
