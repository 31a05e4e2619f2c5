"""Folders at a URL, which fsspec copies into the cache once: ``https://``, ``s3://``, ``gs://`` and others."""

import posixpath
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import unquote

from vit5gen.system.errors import UserError
from vit5gen.system.files import atomic, cache_folder, locked_file, write_json
from vit5gen.system.files import sha256 as hash_file
from vit5gen.system.progress import Progress

COPIED = "will be copied into the cache on first use"  # what a URL that is missing tells
_AT_ONCE = 8  # files
_OUTSIDE = "{!r} is no path inside the folder; check where this data set is from"


class RemoteFile(NamedTuple):
    """Where a file is, its path below the copy, its size in bytes and its SHA-256 where these are known."""

    source: str
    name: str
    size: int | None
    checksum: str | None = None


def is_url(place: str) -> bool:
    return "://" in place


def local_path(place: str) -> Path:
    """Return a path, or that of the copy of a URL, which may not be there yet."""
    if not is_url(place):
        return Path(place)
    return cache_folder() / "copies" / sha256(place.rstrip("/").encode()).hexdigest()[:16]


def is_here(place: str) -> bool:
    """Whether there is a folder of that path, or a whole copy of that URL."""
    folder = local_path(place)
    return folder.is_dir() and (not is_url(place) or _record(folder).is_file())


def discard(file: Path) -> bool:
    """Remove a damaged file of a copy, so that `fetch` copies it again; tell whether it was one."""
    folder = file.parent
    if folder.parent != cache_folder() / "copies":
        return False
    for path in (_record(folder), file):
        path.unlink(missing_ok=True)
    return True


def _record(folder: Path) -> Path:
    """Return the file beside a copy which says that it is whole."""
    return folder.with_suffix(".json")


def fetch(key: str, place: str, list_files: Callable[[Any, str, Path], list[RemoteFile]]) -> Path:
    """Return a folder; from a URL copy first what is not yet here and right, while others who want the same wait.

    key: of the configuration, for messages.  list_files: returns the files, given fsspec's file system, the folder's
    path there, and the folder of the copy. Raises `UserError` where one cannot be copied.
    """
    folder = local_path(place)
    if not is_url(place) or is_here(place):
        return folder
    try:
        import fsspec

        system, root = fsspec.url_to_fs(place)
    except (ImportError, ValueError) as error:
        advice = "pip install 'vit5gen[cloud]', or the package that is named, or copy the folder yourself"
        raise UserError(f"{key} {place}: {error}; {advice}") from error
    folder.mkdir(parents=True, exist_ok=True)
    with locked_file(folder.with_suffix(".lock"), wait=True):
        if is_here(place):
            return folder
        for leftover in folder.rglob(".*.tmp"):  # of a process that was killed
            leftover.unlink()
        try:
            files = list_files(system, root.rstrip("/"), folder)
            with ThreadPoolExecutor(_AT_ONCE) as threads:
                copies = threads.map(partial(_copy, system, folder), files)
                count = 0
                with Progress(f"copy {place}", len(files), "file") as progress:
                    for copied in copies:
                        count += copied
                        progress.update()
        except UserError as error:
            raise UserError(f"{key} {place}: {error}") from error
        except Exception as error:  # of as many libraries as there are protocols
            fault = " ".join(str(error).split())[:200] or type(error).__name__
            advice = "check the URL and the network, and run the same command again: what is copied is kept"
            raise UserError(f"{key} {place}: cannot be copied ({fault}); {advice}") from error
        finally:
            with suppress(OSError):  # only where nothing is in it
                folder.rmdir()
        write_json(_record(folder), {"url": place, "bytes": count})
    return folder


def fetch_folder(place: str) -> Path:
    """Return the folder at `data.path`; copy it first from a URL, with all files below it, by their sizes."""
    return fetch("data.path", place, _list_folder)


def _list_folder(system: Any, root: str, folder: Path) -> list[RemoteFile]:
    # Folder by folder: fsspec's own `find` leaves out those that it cannot list. The links of a web page may lead in
    # circles, or out of the folder, and those with a query sort the page.
    of_web = root.startswith(("http://", "https://"))
    files, folders, seen = [], [root], {"."}
    while folders:
        for entry in system.ls(folders.pop(), detail=True):
            path = entry["name"].rstrip("/")
            name = path.removeprefix(root).lstrip("/")
            name = posixpath.normpath(unquote(name) if of_web else name)
            if name in seen or (of_web and "?" in path):
                continue
            seen.add(name)
            if name.split("/")[0] == "..":
                raise UserError(_OUTSIDE.format(name))
            if entry["type"] == "directory":
                folders.append(path)
            else:
                files.append(RemoteFile(path, name, entry["size"]))
    if not files:
        raise UserError("has no files; check the URL")
    return files


def _copy(system: Any, folder: Path, file: RemoteFile) -> int:
    """Copy a file unless it is there and right; return its size. Raises `UserError` where its bytes are others."""
    target, size = folder / file.name, file.size
    if not target.resolve().is_relative_to(folder.resolve()):
        raise UserError(_OUTSIDE.format(file.name))
    if size is None:
        size = system.info(file.source)["size"]

    def fault(path: Path) -> str:
        if size not in (None, path.stat().st_size):  # some servers tell none
            return f"has {path.stat().st_size} of {size} bytes"
        return "" if file.checksum in (None, hash_file(path)) else "does not match its checksum"

    if not target.is_file() or fault(target):
        with atomic(target) as temporary:
            system.get_file(file.source, str(temporary))
            if wrong := fault(temporary):
                raise UserError(f"{file.name} {wrong}; run the same command again, or write it again at its source")
    return target.stat().st_size
