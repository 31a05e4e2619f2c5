"""What a card says of the code."""

import subprocess
from pathlib import Path

import pytest

import vit5gen
from vit5gen.generation.card import commit


def test_the_commit_is_that_of_the_package_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def git(*words: str) -> str:
        identity = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(
            ["git", "-C", str(tmp_path), *identity, *words], check=True, capture_output=True, text=True
        ).stdout.strip()

    package = tmp_path / "venv" / "vit5gen" / "__init__.py"
    package.parent.mkdir(parents=True)
    package.touch()
    (tmp_path / "mine.py").touch()
    monkeypatch.setattr(vit5gen, "__file__", str(package))
    git("init", "-q")
    git("add", "mine.py")
    git("commit", "-q", "-m", "work of the user's own, around an installed package")
    assert commit() == vit5gen.__version__
    git("add", "venv")
    git("commit", "-q", "-m", "the package itself")
    assert commit() == git("rev-parse", "--short=12", "HEAD")
