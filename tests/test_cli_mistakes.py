"""Typical mistakes: one line says what is wrong, its value, what is expected, and what to set to what."""

from pathlib import Path

import pytest
from tiny_run import make_inputs

from vit5gen.cli import main
from vit5gen.config import TrainingConfig
from vit5gen.system.errors import UserError
from vit5gen.training.process import batch_sizes


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("mistakes")
    make_inputs(folder)
    return folder


RUN = "train RUN.yaml --dry-run"
# What is typed: the fault (what, value), then what is expected and what to do about it.
MISTAKES = {
    f"{RUN} --training.num_steps many": ["training.num_steps = 'many'", "set it to a whole number (N >= 0)"],
    f"{RUN} --model.class_dropout_prob 2": ["model.class_dropout_prob = 2", "set it to", "(0..1)"],
    f"{RUN} --training.learning_rate 0": ["training.learning_rate = 0", "set it to a number greater than 0"],
    f"{RUN} --flow.path liner": ["flow.path = 'liner'", "set it to 'linear', 'gvp' or 'vp'", "Did you mean 'linear'?"],
    f"{RUN} --flow.time_shift fast": ["flow.time_shift = 'fast'", "set it to X > 0 or auto"],
    f"{RUN} --training.compile maybe": ["training.compile = 'maybe'", "set it to true or false or auto"],
    f"{RUN} --training.ema_decays [2]": ["training.ema_decays.0 = 2", "set it to", "0 <= X < 1"],
    f"{RUN} --training.ema_decays []": ["training.ema_decays = []", "give at least 1 item"],
    f"{RUN} --data.classes cat": ["data.classes = 'cat'", "set it to a list, e.g. [a, b]"],
    f"{RUN} --data.horizontal_flip on-and-off": ["data.horizontal_flip = 'on-and-off'", "set it to true or false"],
    f"{RUN} --training.trainable some": ["training.trainable = 'some'", "expected all, lora or a list"],
    f"{RUN} --training.init_partial true": ["training.init_partial is given", "set init_from, or omit"],
    f"{RUN} --training.micro_batch_size 3": ["training.micro_batch_size = 3", "divide the 4 samples", "set it to 2"],
    "init NONE --output OUT.yaml": ["data.path NONE", "no such folder", "check the path"],
    f"{RUN} --data.resolution 17": ["data.resolution = 17", "not a multiple of vae.downsample = 2", "choose e.g. 16"],
    f"{RUN} --training.seeds 1": ["'--training.seeds'", "Did you mean '--training.seed'?", "`vit5gen train --help`"],
    "train RUN.yaml --output OUT --resume NONE": ["--resume NONE", "no such file", "expected auto, latest, never, RUN"],
    "--seed 1 sample": ["'--seed'", "before the command", "`vit5gen COMMAND [options]`"],
    "sample --checkpoint emoji-64 --num-images 0 --output OUT.png": ["--num-images = 0", "set it to", "(1..10000000)"],
    "sample --checkpoint emoji-64 --num-images 1 --output OUT.png --precision fp8": ["--precision = 'fp8'", "'tf32'"],
    "sample --checkpoint emoji-64 --num-images 1 --output OUT.png --guidance-channels 3": [
        "--guidance-channels",
        "no effect at guidance_scale = 1",
        "set that to e.g. 1.5, or omit guidance_channels",
    ],
    "copies A --training B --output OUT.json --shuffle": ["--shuffle", "has no effect on this command", "omit it"],
}


@pytest.mark.parametrize("typed", MISTAKES)
def test_a_mistake_is_named_with_its_value_what_is_expected_and_the_next_step(
    typed: str, inputs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stands for HfArgumentParserTest.test_parse_dict_extra_key of transformers, which ends in a traceback."""
    words = typed.replace("RUN.yaml", str(inputs / "run.yaml")).replace("OUT", str(tmp_path / "out")).split()
    with pytest.raises(SystemExit) as stopped:
        main(words)
    said = capsys.readouterr()
    assert stopped.value.code == 2
    assert said.err.count("\n") == 1
    place = -1
    for part in MISTAKES[typed]:
        assert (place := said.err.find(part, place + 1)) >= 0, f"{part!r} in {said.err}"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("section", "key"), [("data: {1: 2}", "data.1"), ("training: {on: 2}", "training.1"), ("1: {}", "1")]
)
def test_a_key_that_is_no_text_is_unknown(
    section: str, key: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "run.yaml").write_text(f"{section}\n")
    with pytest.raises(SystemExit) as stopped:
        main(["train", str(tmp_path / "run.yaml"), "--dry-run"])
    said = capsys.readouterr().err
    assert stopped.value.code == 2
    assert f"unknown key '{key}'; expected one of" in said
    assert said.count("\n") == 1


@pytest.mark.parametrize(("total", "size"), [(10, "12"), (3, "4")])
def test_a_batch_that_processes_cannot_share_names_the_next_one(total: int, size: str) -> None:
    with pytest.raises(
        UserError, match=f"global_batch_size = {total} must be a multiple of the 4.*; set it to e.g. {size}"
    ):
        batch_sizes(TrainingConfig(global_batch_size=total), 4)
