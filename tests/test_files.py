"""Files that are whole or absent."""

import errno
import os
import signal
import sys
from pathlib import Path
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import save_file

from vit5gen.data import encoding
from vit5gen.system import files
from vit5gen.system.errors import UserError
from vit5gen.system.files import atomic, locked_file, write_text
from vit5gen.training.process import signals_blocked
from vit5gen.training.run_folder import RunFolder


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


def test_a_lock_where_there_is_no_fcntl(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As on Windows, whose msvcrt refuses with EACCES what another process has locked."""
    held: set[str] = set()

    def locking(descriptor: int, mode: int, count: int) -> None:
        assert (mode, count, os.lseek(descriptor, 0, os.SEEK_CUR)) == (2, 1, 0)
        name = os.readlink(f"/proc/self/fd/{descriptor}")
        if name in held:
            raise PermissionError(errno.EACCES, "Permission denied")
        held.add(name)

    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.delattr(os, "register_at_fork")
    monkeypatch.delattr(signal, "pthread_sigmask")
    monkeypatch.setitem(sys.modules, "msvcrt", Mock(LK_NBLCK=2, locking=locking))
    monkeypatch.setattr(files, "time", Mock(sleep=lambda seconds: held.clear()))
    with RunFolder(tmp_path / "run").locked():
        with pytest.raises(UserError, match="another process is training"), RunFolder(tmp_path / "run").locked():
            pass
        with locked_file(tmp_path / "run" / ".lock", wait=True):
            assert len(held) == 1
    with encoding._waiting_lock(tmp_path / "cache" / "a.lock"), signals_blocked():
        assert len(held) == 2


def test_where_nothing_locks_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", None)
    message = r"--output .*run: this Python has neither fcntl nor msvcrt; "
    with pytest.raises(UserError, match=message) as raised, RunFolder(tmp_path / "run").locked():
        pass
    assert "\n" not in str(raised.value)
