"""Files that are whole or absent."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from vit5gen.files import atomic, write_text


def test_a_failed_write_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "a.txt"
    write_text(target, "old")

    def fail() -> None:
        with atomic(target) as temporary:
            temporary.write_text("half")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fail()
    assert [file.name for file in tmp_path.iterdir()] == ["a.txt"]
    assert target.read_text() == "old"


def test_a_file_has_the_rights_that_the_umask_allows(tmp_path: Path) -> None:
    (tmp_path / "plain").touch()
    with atomic(tmp_path / "weights.safetensors") as temporary:  # whose writer allows the owner alone
        save_file({"a": torch.zeros(2)}, temporary)
    modes = {file.stat().st_mode for file in tmp_path.iterdir()}
    assert len(modes) == 1
