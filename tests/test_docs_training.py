"""docs/training.md: its commands run or at least parse, its table is computed, its messages are those of the code."""

import re
import shlex
from pathlib import Path

import pytest
import yaml
from accelerate.state import AcceleratorState, GradientState
from tiny_run import make_inputs

from vit5gen import cost
from vit5gen.cli import build_parser, main
from vit5gen.config import load_config
from vit5gen.training.plan import run_cost

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs/training.md").read_text()


def blocks(language: str, section: str) -> list[str]:
    text = re.split(r"^## ", PAGE, flags=re.MULTILINE)
    (chosen,) = [part for part in text if part.startswith(section)]
    return re.findall(rf"```{language}\n(.*?)```", chosen, flags=re.DOTALL)


def test_own_images_from_folder_to_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    (given,) = blocks("yaml", "On your own images")
    Path("flowers.yaml").write_text(given)
    load_config("flowers.yaml")
    tiny = yaml.safe_load(make_inputs(tmp_path / "tiny").read_text())
    Path("data").mkdir()
    (tmp_path / "tiny/data").rename("data/flowers")
    for split in ("train", "test"):
        Path("data/flowers", split, "square").rename(Path("data/flowers", split, "rose"))
    tiny["data"]["path"] = "data/flowers"
    Path("flowers.yaml").write_text(yaml.safe_dump(tiny))
    (commands,) = blocks("sh", "On your own images")
    for line in commands.splitlines():
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
        command = re.sub(r"^python (\w+)\.py|^vit5gen", r"\1", line)
        with pytest.raises(SystemExit) as ended:
            main(shlex.split(command))
        printed = capsys.readouterr()
        assert ended.value.code == 0, printed.err
        assert "missing: " not in printed.out
    assert Path("rose.png").is_file()


def test_every_command_parses_and_every_file_is_there() -> None:
    block = "\n".join(re.findall(r"```sh\n(.*?)```", PAGE, flags=re.DOTALL))
    values = dict(re.findall(r'^(\w+)="?(.*?)"?$', block, flags=re.MULTILINE))
    commands = []
    for line in block.splitlines():
        for name, value in values.items():
            line = line.replace(f"${name}", value)
        if found := re.search(r"(?:(train|sample)\.py|vit5gen (\w+)) (.*)", line):
            commands.append([found[1] or found[2], *shlex.split(found[3])])
    assert len(commands) >= 10
    for command in commands:
        _, unknown = build_parser().parse_known_args(command)
        assert not unknown
    for file in re.findall(r"configs/[\w/.-]+\.yaml", block):
        assert (ROOT / file).is_file(), file
    for file in re.findall(r"^\| `(\w+\.yaml)`", PAGE, flags=re.MULTILINE):
        assert (ROOT / "configs/accelerate" / file).is_file(), file


def test_the_memory_table_is_computed() -> None:
    bf16 = {"training.precision": "bf16"}
    recomputed = bf16 | {"training.gradient_checkpointing": True}
    columns = [({}, False), (bf16, False), (recomputed, False), (recomputed, True)]
    rows = re.findall(r"^\| (\w+)/2 \|(.*)\|$", PAGE, flags=re.MULTILINE)
    assert [size for size, _ in rows] == ["S", "B", "L", "XL"]
    for size, cells in rows:
        for cell, (changes, sharded) in zip(cells.split("|"), columns, strict=True):
            config = load_config(ROOT / f"configs/imagenet256/vit5-{size.lower()}-2.yaml", changes)
            computed = cost.memory_bytes(run_cost(config), config, 32, 8, sharded) / 1e9
            assert float(cell) == pytest.approx(computed, rel=0.005)


def test_the_messages_are_those_of_the_code() -> None:
    code = "\n".join(file.read_text() for file in (ROOT / "vit5gen").rglob("*.py"))
    code = re.sub(r'"\s*\n\s*f?"', "", code)  # parts of one message
    table = PAGE.split("## Troubleshooting")[1]
    messages = re.findall(r"^\| `(.*?)` \|", table, flags=re.MULTILINE)
    assert len(messages) >= 15
    for message in messages:
        assert message in code, message
