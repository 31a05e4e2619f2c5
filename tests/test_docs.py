"""README.md and docs/*.md: every shell command runs here on tiny stand-ins, or is marked and at least parses.

The convention: every fence names its language, and commands stand in fences of `sh`; `bash` is for README's two, which
.ci/run takes into a fresh environment. A block whose first line begins with `# needs ` or `# takes ` (GPUs, a network,
hours) is marked: its programs and options must exist, and trainings pass with --dry-run. Every other block runs line by
line, page after page, in one folder with `configs/` and `data/` as the pages name them.
"""

import ast
import contextlib
import io
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from accelerate.commands.launch import launch_command_parser
from launch import environment
from tiny_run import forget_processes, make_inputs

from vit5gen.cli import build_parser, main
from vit5gen.config import AutoencoderTraining, Config, load_config
from vit5gen.section import validate

ROOT = Path(__file__).parents[1]
FIRST = ["README", "training", "sampling", "evaluation"]  # later ones use what these leave behind
PAGES = sorted(
    [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *ROOT.glob("docs/*.md")],
    key=lambda page: (FIRST.index(page.stem) if page.stem in FIRST else len(FIRST), page.stem),
)
SHORTER = {
    "step_00002400": "step_00000010",
    "--num-images 200 ": "--num-images 12 ",
    "--num-images 1000 ": "--num-images 24 ",
    "--batch-size 50": "--batch-size 6",
}
MARK = re.compile(r"# (needs|takes) ")


def fences(page: Path) -> list[tuple[str, str]]:
    """Return (language, content) of every fence."""
    return re.findall(r"^```(.*?)\n(.*?)^```$", page.read_text(), flags=re.MULTILINE | re.DOTALL)


def marked_blocks(page: Path) -> list[str]:
    return [content for language, content in fences(page) if language in ("sh", "bash") and MARK.match(content)]


def unmarked_blocks(page: Path) -> list[str]:
    """Return the blocks that run, with fewer images."""
    blocks = [content for language, content in fences(page) if language in ("sh", "bash") and not MARK.match(content)]
    return [re.sub("|".join(SHORTER), lambda found: SHORTER[found[0]], block) for block in blocks]


def commands(block: str) -> Iterator[list[str]]:
    """Yield the commands of a block as lists of words: continued lines, comments, ``&&`` and NAME=value understood."""
    variables: dict[str, str] = {}
    for line in block.replace("\\\n", " ").splitlines():
        for name, value in variables.items():
            line = line.replace(f"${name}", value)
        words: list[str] = []
        for word in [*shlex.split(line, comments=True), "&&"]:
            if word != "&&":
                words.append(word)
                continue
            given = [words.pop(0).split("=", 1) for _ in range(len(words)) if re.match(r"[A-Z_]+=", words[0])]
            if words:
                yield words
            else:
                variables |= dict(given)
            words = []


def program(words: list[str]) -> tuple[str, list[str]]:
    """Return what runs ("vit5gen", "-m MODULE" or a script) and its arguments; accelerate's own options must exist."""
    if words[:2] == ["accelerate", "launch"]:
        launch = launch_command_parser().parse_args(words[2:])
        assert launch.config_file is None or (ROOT / launch.config_file).is_file(), launch.config_file
        words = [*([] if launch.no_python else ["python"]), launch.training_script, *launch.training_script_args]
    if words[0] == "vit5gen":
        return "vit5gen", words[1:]
    assert words[0] == "python", words
    if words[1] == "-m":
        return f"-m {words[2]}", words[3:]
    if words[1] in ("train.py", "sample.py"):
        return "vit5gen", [words[1].removesuffix(".py"), *words[2:]]
    return words[1], words[2:]


def execute(what: str, arguments: list[str]) -> tuple[int, str]:
    """Run a program in this process; return its exit code and what it printed."""
    forget_processes()
    printed, code = io.StringIO(), 0
    patch = pytest.MonkeyPatch()
    patch.setattr(sys, "argv", [what.removeprefix("-m "), *arguments])
    try:
        with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
            if what == "vit5gen":
                main(arguments)
            elif what.startswith("-m "):
                runpy.run_module(what.removeprefix("-m "), run_name="__main__", alter_sys=True)
            else:
                patch.syspath_prepend(str((ROOT / what).parent))  # as Python does
                runpy.run_path(str(ROOT / what), run_name="__main__")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    finally:
        patch.undo()
    return code, printed.getvalue()


def check(what: str, arguments: list[str]) -> None:
    """Check that a command parses: a training passes with --dry-run, the options of anything else are known to it."""
    if what in ("-m pip", "-m pytest"):
        return
    if what == "vit5gen":
        _, unknown = build_parser().parse_known_args(arguments)
        assert not unknown, unknown
        if arguments[0] == "train":
            code, printed = execute(what, [*arguments, "--dry-run"])
            assert code == 0, printed
        elif arguments[0] == "encode":
            load_config(arguments[1])
        return
    code, text = execute(what, ["--help"])
    assert code in (0, 2), text  # 2: a script without options answers with its usage
    for option in (word for word in arguments if word.startswith("--")):
        assert re.search(rf"(?<![\w-]){option}(?![\w-])", text), f"{what} has no {option}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Yield a folder with the files that the pages take for granted, in the smallest size."""
    folder = tmp_path_factory.mktemp("docs")
    tiny = yaml.safe_load(make_inputs(folder).read_text())
    shutil.copytree(ROOT / "configs", folder / "configs")
    for name in ("tests", "scripts", "train.py", "sample.py"):
        (folder / name).symlink_to(ROOT / name)
    shutil.copytree(folder / "data", folder / "data/shapes")
    for split in ("train", "test"):
        shutil.copytree(folder / "data" / split, folder / "emoji" / split)
        for old, new in (("circle", "smileys"), ("square", "flags")):
            (folder / "emoji" / split / old).rename(folder / "emoji" / split / new)
    tiny["data"]["path"] = "emoji"
    (folder / "configs/quickstart.yaml").write_text(yaml.safe_dump(tiny))
    write_own_images(folder, tiny)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("VIT5GEN_CACHE", str(folder / "cache"))
        yield folder


def write_own_images(folder: Path, tiny: dict[str, Any]) -> None:
    """Write the page's configurations for images of one's own, once they are found valid, in the smallest size."""
    blocks = [yaml.safe_load(content) for language, content in fences(ROOT / "docs/training.md") if language == "yaml"]
    autoencoder, shapes, flowers = blocks
    validate(AutoencoderTraining, autoencoder, "autoencoder.yaml")
    for given in (shapes, flowers):
        validate(Config, given, "configuration")
    autoencoder["data"]["resolution"] = 16
    autoencoder |= {"num_steps": 2, "block_out_channels": [8, 8]}
    (folder / "autoencoder.yaml").write_text(yaml.safe_dump(autoencoder))
    shapes["data"]["resolution"] = 16
    shapes["vae"]["downsample"] = 2
    for section in ("model", "training", "evaluation"):
        shapes[section] = tiny[section]
    (folder / "shapes.yaml").write_text(yaml.safe_dump(shapes))


def test_every_unmarked_command_runs(folder: Path) -> None:
    counted = 0
    for page in PAGES:
        for block in unmarked_blocks(page):
            for words in commands(block):
                what, arguments = program(words)
                if what not in ("-m pip", "-m pytest"):
                    code, printed = execute(what, arguments)
                    assert code == 0, f"{page.name}: {shlex.join(words)}\n{printed}"
                    counted += 1
        for language, content in fences(page):
            if language == "python" and "runs/quickstart" in content:
                exec(content, {})
    assert counted >= 12
    assert (folder / "runs/shapes/samples.png").is_file()
    assert (folder / "stars.png").is_file()


@pytest.mark.slow
def test_launchers_start_as_they_stand(folder: Path) -> None:
    lines = [line for page in PAGES for block in unmarked_blocks(page) for line in block.splitlines()]
    launches = [line.replace("two", "launched") for line in lines if "accelerate launch" in line]
    assert len(launches) == 2
    setup = ["train", "configs/quickstart.yaml", "--output", "runs/quickstart"]
    assert execute("vit5gen", setup)[0] == 0
    path = f"{Path(sys.executable).parent}:{environment()['PATH']}"
    for line in launches:
        done = subprocess.run(
            ["bash", "-c", line], cwd=folder, env=environment(PATH=path), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
    assert (folder / "runs/launched/samples.png").is_file()
    assert (folder / "launched.npz").is_file()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_every_fence_is_of_a_kind_and_marked_commands_parse(page: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)
    assert page.read_text().count("```") == 2 * len(fences(page))
    for language, content in fences(page):
        assert language in ("sh", "bash", "python", "yaml", "toml", "text"), f"{page.name}: {content[:80]}"
        if language == "python":
            compile(content, page.name, "exec")
    for block in marked_blocks(page):
        for words in commands(block):
            check(*program(words))


def test_the_two_commands_of_the_readme_are_run_from_a_fresh_environment() -> None:
    blocks = [content for language, content in fences(ROOT / "README.md") if language == "bash"]
    assert len(blocks) == 2
    assert "blocks bash" in (ROOT / ".ci/run").read_text()
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert set(re.findall(r"\.\[(\w+)\]", "".join(blocks))) <= extras.keys()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_commands_and_options_in_the_text_exist(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    code = re.findall(r"`([^`\n]+)`", text)
    subcommands = next(action.choices for action in build_parser()._actions if action.choices)
    known = {option for sub in subcommands.values() for option in sub._option_string_actions}
    known |= {*launch_command_parser()._option_string_actions, *build_parser()._option_string_actions}
    for span in code:
        words = shlex.split(span) if span.startswith(("vit5gen ", "python ", "accelerate launch ")) else []
        if words[:1] == ["vit5gen"] and words[1] != "COMMAND":
            assert words[1] in subcommands, span
        for option in re.findall(r"(?<![\w-])--[\w.-]+", span):
            others = span.startswith(("pip ", "tensorboard ", "torchrun ")) or "kill_test" in span
            assert option in known or others, f"{page.name}: {option}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if target.startswith("http"):
            continue
        path, _, anchor = target.partition("#")
        file = page.parent / path if path else page
        assert file.exists(), f"{page.name}: {target}"
        titles = re.findall(r"^#+ (.*)$", file.read_text(), flags=re.MULTILINE) if anchor else []
        anchors = [re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles]
        assert not anchor or anchor in anchors, f"{page.name}: {target}"


def test_messages_are_those_of_the_code() -> None:
    """Each quoted part of a message stands in a string of the code that is no docstring."""
    spoken = "\n".join(text for file in (ROOT / "vit5gen").rglob("*.py") for text in strings(file.read_text()))
    rows = re.findall(r"^\| (`[^|]*`) \|", (ROOT / "docs/troubleshooting.md").read_text(), flags=re.MULTILINE)
    assert len(rows) >= 20
    for row in rows:
        for part in re.findall(r"`(.*?)`", row):
            assert part in spoken, part


def strings(code: str) -> Iterator[str]:
    """Yield the strings of a module, parts joined, a hole for every value that is filled in."""
    tree = ast.parse(code)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef)
    docstrings = {ast.get_docstring(node, clean=False) for node in ast.walk(tree) if isinstance(node, documented)}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            yield "".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value not in docstrings:
            yield node.value
