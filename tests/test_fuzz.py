"""Random command lines and configurations: exit code 0, 2, 70, 75 or 130, one line of error, no traceback, no hang.

A tenth by default; VIT5GEN_FUZZ=1 tries 2,000 command lines, 500 configurations and 100 processes.
"""

import argparse
import io
import os
import shutil
import signal
import socket
import subprocess
import sys
import traceback
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import yaml
from hypothesis import HealthCheck, Phase, given, seed, settings
from hypothesis import strategies as st
from launch import environment
from tiny import tiny_pipeline
from tiny_run import forget_processes, make_inputs

from vit5gen.cli import build_parser, main
from vit5gen.config import Config

pytestmark = pytest.mark.slow
SEED = 9
SHARE = 1 if os.environ.get("VIT5GEN_FUZZ") else 10
CODES = {0, 2, 70, 75, 130}
SECONDS = 60
# Valid, and take long: many processes, a compiler.
SLOW = {"--data.num_workers", "--num-workers", "--compile", "--training.compile", "--only", "--help", "-h"}

INTEGERS = st.sampled_from([-(2**70), -1, 0, 1, 2, 3, 7, 16, 2**31, 2**63 - 1, 2**63, 10**20, 10**400])
FLOATS = st.sampled_from([0.0, 0.5, 1.0, -1.0, 1e-300, 1e38, 1e308]) | st.floats()
TEXTS = st.text(st.characters(exclude_characters="/\0", exclude_categories=("Cs",)), max_size=12).filter(
    lambda text: text not in ("..", ".", "~")
) | st.sampled_from(["café", "cafe\u0301", "caf\udce9", "٣", "²", "07", "1_0", "a" * 300, "null", "[", "{a: 1}", "*a"])
WORDS = st.sampled_from(
    [
        "auto",
        "never",
        "fp32",
        "bf16",
        "tf32",
        "fp64",
        "vit5",
        "sit",
        "emoji",
        "folder",
        "huggingface",
        "fashion-mnist",
        "train",
        "test",
        "linear",
        "gvp",
        "vp",
        "S/2",
        "XL/8",
        "true",
        "false",
        "[0,1]",
        "[1,0]",
        "[0.9]",
        "{}",
        "[]",
        "{gamma_init:1e-4}",
        "{num_registers:9}",
        "{rope:off}",
        "ode-euler",
        "sde-heun",
        "ode-dopri5",
        "pr",
        "random",
        "balanced",
        "adm",
        "fid",
        "kid",
        "effnet-lite0",
        "inception",
        "vit5_small",
        "cosine",
        "circle",
        "star",
        "velocity",
        "score",
    ]
)
FILES = st.sampled_from(
    [
        "run.yaml",
        "data",
        "vae",
        "pipeline",
        "images.npz",
        "none",
        "odd",
        "odd/none.yaml",
        "odd/deep.yaml",
        "odd/bomb.yaml",
        "odd/binary",
        "odd/empty",
        "odd/folder.yaml",
        "odd/list.json",
        "odd/cut.npz",
        "odd/pipeline",
    ]
)
SCALARS = INTEGERS | FLOATS | TEXTS | WORDS | st.booleans() | st.none()
TREES = st.recursive(SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3))
ANY = FILES | WORDS | INTEGERS.map(str) | FLOATS.map(str) | TEXTS


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder of real inputs and of odd ones, in which every path above is found; nothing is fetched."""
    folder = tmp_path_factory.mktemp("fuzz")
    make_inputs(folder)
    tiny_pipeline().save_pretrained(folder / "pipeline")
    np.savez(folder / "images.npz", arr_0=np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), dtype=np.uint8))
    odd = folder / "odd"
    (odd / "folder.yaml").mkdir(parents=True)
    (odd / "deep.yaml").write_text("[" * 5000)
    laughs = "".join(f"a{i}: &a{i} [{f'*a{i - 1},' * 9}]\n" for i in range(1, 30))
    (odd / "bomb.yaml").write_text(f"a0: &a0 [x]\n{laughs}")
    (odd / "binary").write_bytes(bytes(range(256)))
    (odd / "empty").touch()
    (odd / "list.json").write_text("[1]")
    (odd / "cut.npz").write_bytes((folder / "images.npz").read_bytes()[:500])
    shutil.copytree(folder / "pipeline", odd / "pipeline")
    (odd / "pipeline" / "transformer" / "config.json").write_text("[" * 5000)

    def unreachable(*arguments: Any) -> None:
        raise ConnectionRefusedError(111, "no network in tests")

    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VIT5GEN_CACHE", str(folder / "cache"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        patch.setattr("datasets.config.HF_HUB_OFFLINE", True)
        patch.setattr(socket.socket, "connect", unreachable)
        patch.setattr(socket, "getaddrinfo", unreachable)
        yield folder


def options() -> dict[str, list[argparse.Action]]:
    commands = next(a for a in build_parser()._actions if isinstance(a, argparse._SubParsersAction)).choices
    return {
        name: [action for action in parser._actions if not SLOW & set(action.option_strings)]
        for name, parser in commands.items()
    }


# What works, in so far as the options that are drawn do not spoil it; {} becomes a new output.
USUAL = {
    "train": "run.yaml --dry-run",
    "encode": "run.yaml --output {}",
    "sample": "--checkpoint pipeline --num-images 2 --num-inference-steps 2 --output {}",
    "evaluate": "data --reference images.npz --extractor effnet-lite0 --batch-size 4 --output {}.json",
    "convert": "pipeline --output {}",
    "classify": "data --model vit5_small --checkpoint odd/binary",
    "benchmark": "--only none --output {}.json",
}


def likely(action: argparse.Action) -> st.SearchStrategy[Any]:
    """Return values that the option may well take: its default, and small ones of the default's kind."""
    section, _, key = action.dest[2:].partition(".")
    default = Config.model_fields[section].annotation.model_fields[key].default if key else action.default
    if isinstance(default, bool):
        return st.booleans()
    if isinstance(default, int | float):
        return st.sampled_from([default, 1, 2, 4, 8])
    return st.sampled_from([default, 1, 2, 4]) | WORDS


@st.composite
def command_lines(draw: Callable[[st.SearchStrategy], Any]) -> list[str]:
    command = draw(
        st.sampled_from(
            ["train", "sample", "evaluate", "train", "sample", "evaluate", "encode", "convert", "classify", "benchmark"]
        )
    )
    usual = draw(st.integers(0, 9)) > 0
    words = USUAL[command].split() if usual else draw(st.lists(TEXTS | FILES, max_size=3))
    # No text is an output: it might lie anywhere.
    for action in draw(st.lists(st.sampled_from(options()[command]), max_size=3)):
        if action.option_strings and not {"--output", "--save-statistics"} & set(action.option_strings):
            value = likely(action).map(str) if draw(st.integers(0, 2)) else ANY
            several = 1 if action.nargs is None else 3
            words = [*words, action.option_strings[-1]]
            words += draw(st.lists(value, min_size=1, max_size=several)) if action.nargs != 0 else []
    if command == "train" and "--dry-run" not in words:
        words += ["--dry-run"]
    if command == "train" and draw(st.integers(0, 19)) == 0:
        words = [word for word in words if word != "--dry-run"] + ["--output", "{}", "--training.num_steps", "2"]
    if command == "benchmark" and "--only" not in words:
        words += ["--only", "none"]
    return [command, *words]


@st.composite
def configurations(draw: Callable[[st.SearchStrategy], Any]) -> str:
    if draw(st.integers(0, 9)) == 0:
        return yaml.safe_dump(draw(TREES)) if draw(st.booleans()) else draw(TEXTS)
    config = yaml.safe_load(Path("run.yaml").read_text())
    actions = [action for action in options()["train"] if "." in action.dest]
    for action in draw(st.lists(st.sampled_from(actions), min_size=1, max_size=3)):
        section, key = action.dest[2:].split(".")
        value = draw(likely(action) if draw(st.integers(0, 2)) else SCALARS | TREES | FILES)
        config[section] = {**config.get(section, {}), key: value}
    if draw(st.integers(0, 9)) == 0:
        config[draw(TEXTS)] = draw(TREES)
    return yaml.safe_dump(config)


class Hang(BaseException):
    pass


def _hang(number: int, frame: FrameType | None) -> None:
    raise Hang


class Outcomes:
    """Counts of exit codes, and what should not have happened."""

    def __init__(self, place: Path) -> None:
        self.place, self.codes, self.faults, self.outputs = place, Counter[int](), list[str](), 0

    def new_output(self, words: list[str]) -> list[str]:
        self.outputs += 1
        return [word.replace("{}", f"out/{self.outputs}") if word in ("{}", "{}.json") else word for word in words]

    def note(self, words: list[str], code: object, errors: str) -> None:
        self.codes[code] += 1  # type: ignore[index]
        lines = [line for line in errors.splitlines() if line.startswith("error: ")]
        if code not in CODES or "Traceback" in errors or len(lines) != (code == 2):
            self.faults.append(f"{words} -> {code}\n{errors[-3000:]}")

    def run(self, words: list[str]) -> None:
        """Run a command line in this process."""
        words, errors, code = self.new_output(words), io.TextIOWrapper(io.BytesIO(), "ascii"), None
        forget_processes()
        signal.signal(signal.SIGALRM, _hang)
        signal.alarm(SECONDS)
        try:
            with redirect_stdout(io.TextIOWrapper(io.BytesIO(), "ascii")), redirect_stderr(errors):
                main(words)
        except SystemExit as stop:
            code = stop.code
        except Hang:
            code = "hang"
        except BaseException:
            errors.write(traceback.format_exc().encode("ascii", "backslashreplace").decode())
        finally:
            signal.alarm(0)
        errors.flush()
        self.note(words, code, errors.buffer.getvalue().decode())  # type: ignore[attr-defined]
        shutil.rmtree(self.place / "out", ignore_errors=True)

    def report(self, what: str) -> None:
        print(f"{what}, seed {SEED}: exit codes {dict(self.codes)}, {len(self.faults)} faults")
        if file := os.environ.get("VIT5GEN_FUZZ_FAULTS"):
            Path(file).write_text("\n=====\n".join(self.faults), errors="backslashreplace")
        assert not self.faults, self.faults[0]


def tried(count: int) -> Callable[[Any], Any]:
    options: dict[str, Any] = {"max_examples": count, "deadline": None, "database": None, "phases": [Phase.generate]}
    return lambda test: seed(SEED)(settings(**options, suppress_health_check=list(HealthCheck))(test))


def test_random_command_lines(place: Path) -> None:
    outcomes = Outcomes(place)
    tried(2000 // SHARE)(given(command_lines())(outcomes.run))()
    outcomes.report("command lines")


def test_random_configurations(place: Path) -> None:
    outcomes = Outcomes(place)

    def run(text: str, command: str) -> None:
        Path("drawn.yaml").write_text(text, encoding="utf-8", errors="replace")
        outcomes.run([command, "drawn.yaml", *(["--dry-run"] if command == "train" else ["--output", "{}"])])

    tried(500 // SHARE)(given(configurations(), st.sampled_from(["train", "train", "encode"]))(run))()
    outcomes.report("configurations")


def test_random_command_lines_as_processes(place: Path) -> None:
    outcomes = Outcomes(place)

    def run(words: list[str]) -> None:
        command = [sys.executable, "-c", "from vit5gen.cli import main; main()", *outcomes.new_output(words)]
        # Of its own processor time: a loaded machine is no hang.
        command = ["sh", "-c", f'ulimit -t {SECONDS}; exec "$@"', "sh", *command]
        try:
            done = subprocess.run(command, env=environment(), capture_output=True, timeout=5 * SECONDS, check=False)
            outcomes.note(words, done.returncode, done.stderr.decode(errors="replace"))
        except subprocess.TimeoutExpired:
            outcomes.note(words, "hang", "")

    tried(100 // SHARE)(given(command_lines())(run))()
    outcomes.report("processes")
