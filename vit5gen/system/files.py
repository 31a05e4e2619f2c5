"""Files that are whole or absent: atomic writes and content hashes; the kernel's lock; the cache's folder."""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

from vit5gen.system.errors import UserError

MODEL_STUB = "transformer.py"  # beside a model's config.json; diffusers names it after the module of the class


def cache_folder() -> Path:
    """Return the folder of derived data: ``VIT5GEN_CACHE``, else ``vit5gen`` in the user's cache folder."""
    if folder := os.environ.get("VIT5GEN_CACHE"):
        return Path(folder).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "vit5gen"


@contextmanager
def atomic(path: str | Path) -> Iterator[Path]:
    """Yield a temporary path that replaces ``path`` (after fsync) on success and is removed on failure."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = _temporary(path)
    try:
        temporary.touch()
        mode = temporary.stat().st_mode  # what the umask allows: some writers take less
        yield temporary
        temporary.chmod(mode)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def locked_file(path: Path, wait: bool) -> Iterator[None]:
    """Hold the kernel's lock on a file, which is gone when this process is, also after SIGKILL; make the file.

    Raises `BlockingIOError` when another process holds it and ``wait`` is false, another `OSError` when the file cannot
    be made or locked.
    """
    with path.open("ab") as file:
        if hasattr(os, "register_at_fork"):
            # A forked child (a data worker) would hold the lock beyond this process's death.
            os.register_at_fork(after_in_child=file.close)
        if fcntl is not None:
            fcntl.flock(file, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        else:
            _lock_on_windows(file, wait)
        yield


def _lock_on_windows(file: IO[bytes], wait: bool) -> None:
    try:
        import msvcrt
    except ImportError:
        raise OSError(None, "this Python has neither fcntl nor msvcrt", file.name) from None
    while True:
        try:
            file.seek(0)  # the lock is on the next byte
            return msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as error:
            if not wait:
                raise BlockingIOError(error.errno, error.strerror, file.name) from error
            time.sleep(0.5)


def check_writable(path: str | Path) -> None:
    """Raise `UserError` unless ``path`` can be written, before the work whose result it is to hold."""
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder; choose another path")
    temporary = _temporary(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror}); choose another path") from error


def _temporary(path: Path) -> Path:
    return path.with_name(f".{path.name}.{os.getpid()}.tmp")


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically; bytes of file names that are not UTF-8 become escapes."""
    with atomic(path) as temporary:
        temporary.write_text(text, encoding="utf-8", errors="backslashreplace")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically; NaN and infinity are refused."""
    write_text(path, json.dumps(value, indent=2, allow_nan=False) + "\n")


def read_json(path: str | Path, what: str) -> dict[str, Any]:
    """Read a JSON object; raise a `UserError` that names ``what`` when it is missing, broken or no object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{what} {path}: {error.strerror}; check the path") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{what} {path} is not valid JSON: {error}; write it again") from error
    if not isinstance(value, dict):
        raise UserError(f"{what} {path} contains a {type(value).__name__}; expected an object; write it again")
    return value


def find_variants(folder: str | Path) -> list[str]:
    """Return the variants (fp16, ...) of a model's weights in a folder; an empty list where there are plain ones."""
    weights = re.compile(r"diffusion_pytorch_model(?:\.(\w+))?(?:-\d+-of-\d+)?\.(?:bin|safetensors)")
    found = {match[1] for file in Path(folder).glob("*") if (match := weights.fullmatch(file.name))}
    return [] if None in found else sorted(found)


def clear_weights(folder: str | Path, variant: str | None = None, removed: bool = False) -> None:
    """Delete the weights that an earlier save of this variant left: the index of shards that are gone outdoes a file.

    removed: the component is no longer there: also delete its configuration and stub, and the folder if then empty.
    """
    kind = f".{re.escape(variant)}" if variant else ""
    name = "diffusion_pytorch_model"
    weights = rf"{name}{kind}(-\d+-of-\d+)?\.(bin|safetensors)|{name}\.(bin|safetensors)\.index{kind}\.json"
    files = [file for file in Path(folder).glob("*") if re.fullmatch(weights, file.name)]
    for file in files:
        file.unlink(missing_ok=True)
    if removed and files and not any(Path(folder).glob(f"{name}*")):  # another variant still needs it
        for other in ("config.json", MODEL_STUB):
            (Path(folder) / other).unlink(missing_ok=True)
    if removed and files and not any(Path(folder).iterdir()):
        Path(folder).rmdir()


def sha256(path: str | Path) -> str:
    """Return the SHA-256 of a file's bytes in hexadecimal."""
    with Path(path).open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
