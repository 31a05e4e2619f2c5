"""Latents and images at a URL are copied once, whole, by whoever comes first, and from where a kill has left them."""

import json
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote

import fsspec
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_run import assert_identical, forget_processes, make_inputs, run, weights

from vit5gen.config import Config, DataConfig, ModelConfig, load_config
from vit5gen.data.encoding import encode_images
from vit5gen.data.images import make_source, open_images
from vit5gen.data.latents import LatentDataset, find_class_names, open_latents
from vit5gen.data.remote import RemoteFile, _copy, _list_folder, is_here, local_path
from vit5gen.system.errors import UserError
from vit5gen.system.files import sha256
from vit5gen.training.dry_run import missing, plan

NAMES = [f"shard_{k:05d}.safetensors" for k in range(3)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("VIT5GEN_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def latents(tmp_path: Path) -> Path:
    """A folder of three shards and their manifest."""
    folder = tmp_path / "served" / "latents"
    folder.mkdir(parents=True)
    shards = []
    for k, name in enumerate(NAMES):
        values = torch.full((2, 1, 4, 2, 2), float(k))
        save_file({"mean": values, "std": values + 1, "labels": torch.tensor([0, 1])}, folder / name)
        size = (folder / name).stat().st_size
        shards.append({"file": name, "images": 2, "bytes": size, "sha256": sha256(folder / name)})
    manifest: dict[str, Any] = {"id2label": {"0": "cat", "1": "dog"}, "shards": shards, "horizontal_flip": False}
    (folder / "manifest.json").write_text(json.dumps(manifest | {"latent_shape": [4, 2, 2], "images": 6}))
    return folder


class Server(ThreadingHTTPServer):
    """Serve a folder on localhost; ``asked`` are the files that were sent.

    ``stall`` is a file that never ends, ``fails`` one that is not found.
    """

    def __init__(self, folder: Path) -> None:
        asked: list[str] = []
        self.asked, self.stall, self.fails, self.stalled = asked, "", "", threading.Event()
        server = self

        class Handler(SimpleHTTPRequestHandler):
            def log_message(self, *args: object) -> None:
                pass

            def do_GET(self) -> None:
                name = self.path.rstrip("/").rsplit("/", 1)[-1]
                asked.append(name)
                if name == server.fails:
                    self.send_error(404)
                    return
                if server.stall and name == server.stall:
                    content = (folder / self.path.lstrip("/")).read_bytes()
                    self.send_response(200)
                    self.send_header("Content-Length", str(len(content)))
                    self.end_headers()
                    self.wfile.write(content[:100])
                    self.wfile.flush()
                    server.stalled.set()
                    time.sleep(60)
                    return
                super().do_GET()

        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.daemon_threads, self.url = True, f"http://127.0.0.1:{self.server_port}"


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    (tmp_path / "served").mkdir(exist_ok=True)
    with Server(tmp_path / "served") as found:
        threading.Thread(target=found.serve_forever, args=(0.02,), daemon=True).start()
        yield found
        found.shutdown()


def upload(folder: Path, name: str) -> str:
    system = fsspec.filesystem("memory")
    for file in folder.rglob("*"):
        if file.is_file():
            system.pipe_file(f"/{name}/{file.relative_to(folder).as_posix()}", file.read_bytes())
    return f"memory://{name}"


def flip_byte(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)


def test_latents_are_copied_once(latents: Path, tmp_path: Path) -> None:
    url = upload(latents, "once")
    config = Config(model=ModelConfig(preset="S/2"), data=DataConfig(latents=url))
    assert not is_here(url)
    assert missing(config)[url] == "will be copied into the cache on first use"
    assert find_class_names(config) == ["cat", "dog"]
    assert url not in missing(config)
    fsspec.filesystem("memory").rm("/once", recursive=True)  # no longer needed
    copied = open_latents(url)
    copied.verify()
    assert float(copied.get(5)[0].mean()) == 2
    for name in (*NAMES, "manifest.json"):
        assert (copied.folder / name).read_bytes() == (latents / name).read_bytes()


def test_a_flipped_byte_is_found_and_copied_again(latents: Path) -> None:
    url = upload(latents, "flipped")
    copied = open_latents(url)
    flip_byte(copied.folder / NAMES[1])
    with pytest.raises(UserError, match=r"00001.* does not match its checksum; it was removed; run the same command"):
        copied.verify()
    assert not is_here(url)
    open_latents(url).verify()
    (copied.folder / NAMES[2]).write_bytes(b"short")
    with pytest.raises(UserError, match=r"has 5 of \d+ bytes; it was removed; run the same command"):
        open_latents(url)
    open_latents(url).verify()
    # Of a folder of one's own nothing is removed.
    flip_byte(latents / NAMES[0])
    with pytest.raises(UserError, match="encode again to fix it"):
        LatentDataset(latents).verify()
    assert (latents / NAMES[0]).exists()


def test_what_is_wrong_at_its_source_is_not_taken(latents: Path) -> None:
    flip_byte(latents / NAMES[1])
    url = upload(latents, "wrong")
    with pytest.raises(UserError, match=rf"data.latents {url}: {NAMES[1]} does not match its checksum"):
        open_latents(url)
    assert not is_here(url)
    assert not (local_path(url) / NAMES[1]).exists()
    assert not list(local_path(url).rglob(".*.tmp"))
    manifest = json.loads((latents / "manifest.json").read_text())
    manifest["shards"][0]["file"] = "../../outside"
    (latents / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match=r"'\.\./\.\./outside' is no path inside the folder"):
        open_latents(upload(latents, "outside"))
    (latents / "manifest.json").write_text(json.dumps(manifest | {"shards": None}))
    with pytest.raises(UserError, match="encoding was interrupted"):
        open_latents(upload(latents, "unfinished"))


def write_images(folder: Path) -> None:
    for label in ("cat & dog", "fox"):
        (folder / label).mkdir(parents=True)
        for i in range(3):
            Image.new("RGB", (8, 8), (i, i, i)).save(folder / label / f"{i} ü.png")


def test_a_dry_run_copies_nothing(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    """Not even the images beside latents that are here, which a run takes for its evaluations."""
    config, url = make_inputs(tmp_path), upload(tmp_path / "data" / "train", "beside")
    forget_processes()
    encode_images(load_config(config), tmp_path / "latents")
    plan(load_config(config, {"data.latents": str(tmp_path / "latents"), "data.path": url}), None, "auto", False)
    assert "trial:    skipped until the images are copied" in capsys.readouterr().out
    assert not local_path(url).exists()


def test_images_from_a_web_server(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    write_images(tmp_path / "served" / "my images")
    data = DataConfig(path=f"{server.url}/{quote('my images')}", resolution=8)
    assert make_source(data).missing() == {data.path: "will be copied into the cache on first use"}
    images = open_images(data)
    assert (images.class_names, images.labels.tolist()) == (["cat & dog", "fox"], [0, 0, 0, 1, 1, 1])
    assert [int(images[i][0].max()) for i in range(3)] == [0, 1, 2]
    assert make_source(data).missing() == {}
    before = len(server.asked)
    open_images(data)
    assert len(server.asked) == before


def test_a_listing_that_fails_is_not_taken_for_an_empty_folder(server: Server, tmp_path: Path) -> None:
    pytest.importorskip("aiohttp")
    write_images(tmp_path / "served" / "images")
    server.fails = "fox"
    data = DataConfig(path=f"{server.url}/images", resolution=8)
    with pytest.raises(UserError, match="cannot be copied"):
        open_images(data)
    server.fails = ""
    assert len(open_images(data)) == 6


class Pages:
    """What fsspec makes of pages of links: to themselves, sorted, to a folder above, and to files."""

    def __init__(self, **pages: list[str]) -> None:
        self.pages = pages

    def ls(self, path: str, detail: bool) -> list[dict[str, Any]]:
        links = self.pages[path.rstrip("./").rsplit("/", 1)[-1]]
        kinds = {True: "directory", False: "file"}
        return [{"name": f"{path}/{link}", "size": None, "type": kinds[link.endswith("/")]} for link in links]


def test_links_of_a_page_that_are_no_files_of_the_folder(tmp_path: Path) -> None:
    """As Apache and others write them; those that lead out of the folder are refused before anything is copied."""
    pages = Pages(data=["?C=N;O=D", "./", "./cat/", "%61.png"], cat=["../", "?C=M;O=A", "./b.png"])
    files = _list_folder(pages, "http://host/data", tmp_path)
    assert [file.name for file in files] == ["a.png", "cat/b.png"]
    for link in ("../../", "%2e%2e/", "../x.png", "%2e%2e%2fx.png"):
        with pytest.raises(UserError, match="is no path inside the folder"):
            _list_folder(Pages(data=[link]), "http://host/data", tmp_path)


def test_a_server_that_tells_no_size(tmp_path: Path) -> None:
    class Untold:
        def info(self, path: str) -> dict[str, Any]:
            return {"name": path, "size": None}

        def get_file(self, path: str, target: str) -> None:
            Path(target).write_bytes(b"picture")

    assert _copy(Untold(), tmp_path, RemoteFile("http://host/data/a.png", "a.png", None)) == 7
    assert (tmp_path / "a.png").read_bytes() == b"picture"


def test_two_that_want_the_same_at_once(server: Server, latents: Path) -> None:
    pytest.importorskip("aiohttp")
    with ThreadPoolExecutor(3) as threads:
        found = list(threads.map(open_latents, [f"{server.url}/latents"] * 3))
    for one in found:
        one.verify()
    assert sorted(server.asked) == ["manifest.json", *NAMES]


def test_bad_urls_are_one_line(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    places = {
        f"{server.url}/absent": "cannot be copied",
        "memory://nothing": "cannot be copied|has no files",
        "nosuch://bucket/x": r"Protocol not known.*vit5gen\[cloud\]",
    }
    for place, message in places.items():
        for opened in (open_latents, lambda place: open_images(DataConfig(path=place))):
            with pytest.raises(UserError, match=message) as error:
                opened(place)
            assert "\n" not in str(error.value)
            assert place in str(error.value)
            assert not local_path(place).exists()
    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(UserError, match=r"data.latents s3://bucket/x: .*s3fs.*pip install 'vit5gen\[cloud\]'"):
        open_latents("s3://bucket/x")


@pytest.mark.slow
def test_a_run_on_latents_at_a_url_equals_one_on_their_folder(tmp_path: Path) -> None:
    config = make_inputs(tmp_path)
    encode_images(load_config(config), tmp_path / "latents")
    url = upload(tmp_path / "latents", "run")
    for name, place in (("near", str(tmp_path / "latents")), ("far", url)):
        assert run(config, tmp_path / name, training__num_steps=2, evaluation__num_images=6, data__latents=place) == 0
    assert_identical(weights(tmp_path / "near", 2), weights(tmp_path / "far", 2))


@pytest.mark.slow
def test_a_copy_that_was_killed_is_resumed(server: Server, latents: Path) -> None:
    pytest.importorskip("aiohttp")
    server.stall, url = NAMES[2], f"{server.url}/latents"
    code = f"from vit5gen.data.latents import open_latents; open_latents({url!r})"
    process = subprocess.Popen([sys.executable, "-c", code])
    assert server.stalled.wait(120)
    folder = local_path(url)
    while not all((folder / name).exists() for name in NAMES[:2]):
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert list(folder.glob(".*.tmp"))  # half of the last one
    assert not is_here(url)

    # What is there and right is kept; one byte is not.
    server.stall = ""
    server.asked.clear()
    flip_byte(folder / NAMES[1])
    open_latents(url).verify()
    assert sorted(server.asked) == ["manifest.json", *NAMES[1:]]
    assert not list(folder.glob(".*.tmp"))
