"""Downloads and the record of hashes."""

import http.server
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from offpolicy.data.sources import fetch, open_source
from offpolicy.errors import DataError

BODY = os.urandom(300_000)


class _Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/missing":
            self.send_error(404)
            return
        body = b"<html>sorry</html>" if self.path == "/page" else BODY
        self.send_response(200)
        self.send_header("Content-Length", str(len(body) + 1000 * (self.path == "/short")))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args: Any) -> None: ...


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    httpd = http.server.ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    threading.Thread(target=httpd.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{httpd.server_port}"
    httpd.shutdown()


def test_download_shows_address_and_size(server: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "folder" / "data.bin"
    fetch.locate(path, f"{server}/file", download=True)
    assert path.read_bytes() == BODY
    assert [p.name for p in path.parent.iterdir()] == ["data.bin"]
    shown = capsys.readouterr().err
    assert f"Downloading {server}/file (0.3 MB)" in shown


@pytest.mark.parametrize(
    ("page", "cause"),
    [
        ("missing", "answered 404"),
        ("page", "a web page instead"),
        ("short", "broke off after 300,000 of 301,000 bytes"),
    ],
)
def test_failed_downloads_leave_nothing(server: str, tmp_path: Path, page: str, cause: str) -> None:
    path = tmp_path / "data.bin"
    with pytest.raises(DataError) as error:
        fetch.locate(path, f"{server}/{page}", download=True)
    assert cause in str(error.value) and f"Put the file at {path} by hand" in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_download_leaves_nothing(server: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*_: Any) -> bytes:
        raise KeyboardInterrupt

    monkeypatch.setattr(fetch, "_receive", interrupt)
    with pytest.raises(KeyboardInterrupt):
        fetch.fetch(f"{server}/file", tmp_path / "data.bin")
    assert list(tmp_path.iterdir()) == []


def test_without_a_network_the_error_comes_within_seconds(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("D4RL_DATASET_DIR", "OGBENCH_DATASET_DIR", "MINARI_DATASETS_PATH"):
        monkeypatch.setenv(variable, str(tmp_path))

    def unreachable(*_: Any, **__: Any) -> Any:
        time.sleep(60)  # a name server that does not answer

    monkeypatch.setattr(fetch.urllib.request, "urlopen", unreachable)
    monkeypatch.setattr(fetch, "CONNECT_SECONDS", 0.5)
    for name, words in (
        (
            "hopper-medium-v2",
            ["gym_mujoco_v2/hopper_medium-v2.hdf5 could not be downloaded", "hopper_medium-v2.hdf5 by hand"],
        ),
        ("cube-single-play-v0", ["ogbench/cube-single-play-v0.npz could not be downloaded"]),
        ("D4RL/door/human-v2", ["D4RL/door/human-v2 could not be downloaded", "minari download D4RL/door/human-v2"]),
    ):
        began = time.monotonic()
        with pytest.raises(DataError) as error:
            open_source(name)
        assert time.monotonic() - began < 5
        for word in [*words, str(tmp_path), "network?", "`--data F"]:
            assert word in str(error.value)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("name", ["hopper-medium-v2", "cube-single-play-v0", "D4RL/door/human-v2"])
def test_downloading_can_be_forbidden(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("D4RL_DATASET_DIR", "OGBENCH_DATASET_DIR", "MINARI_DATASETS_PATH"):
        monkeypatch.setenv(variable, str(tmp_path))
    with pytest.raises(DataError, match="does not exist and downloading is off"):
        open_source(name, download=False)


# -- hashes ------------------------------------------------------------------------------------------------------------


@pytest.fixture
def walks(tmp_path: Path) -> Callable[..., Path]:
    def write(seed: int = 0) -> Path:
        rng = np.random.default_rng(seed)
        path = tmp_path / "walks.npz"
        columns: dict[str, Any] = {
            "observations": rng.normal(size=(9, 2)),
            "actions": rng.uniform(-1, 1, (9, 1)),
            "rewards": rng.normal(size=9),
        }
        np.savez(path, terminals=np.arange(9) % 3 == 2, **columns)
        return path

    return write


def test_the_first_load_records_and_later_loads_check(
    walks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = walks()
    first = open_source(path)
    record = json.loads((path.parent / "walks.npz.lock.json").read_text())
    assert record["sha256"] == first.meta["sha256"] == fetch.Lock([path]).sha256()
    assert record["size"] == path.stat().st_size and record["rows"] == 9

    with monkeypatch.context() as patch:
        patch.setattr(fetch.Lock, "sha256", lambda self: pytest.fail("hashed although nothing changed"))
        assert open_source(path).meta["sha256"] == record["sha256"]

    os.utime(path, (1, 1))  # same content under another time: noted, no error
    assert open_source(path).meta["sha256"] == record["sha256"]
    assert json.loads((path.parent / "walks.npz.lock.json").read_text())["mtime_ns"] == 10**9

    walks(seed=1)
    with pytest.raises(DataError) as error:
        open_source(path)
    assert "has changed since its first load" in str(error.value) and record["sha256"] in str(error.value)
    assert "delete" in str(error.value)


def test_an_expected_hash_is_enforced(walks: Callable[..., Path]) -> None:
    path = walks()
    right = fetch.Lock([path]).sha256()
    assert open_source(path, sha256=right.upper()).num_steps == 9
    with pytest.raises(DataError, match=f"has SHA-256 {right}; expected {'0' * 64}"):
        open_source(path, sha256="0" * 64)


def test_a_folder_that_cannot_be_written_is_no_obstacle(
    walks: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = walks()

    def refuse(*_: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(fetch, "atomic_write", refuse)
    assert len(open_source(path).meta["sha256"]) == 64
    assert [p.name for p in path.parent.iterdir()] == ["walks.npz"]


def test_a_file_that_fails_is_not_recorded(tmp_path: Path) -> None:
    np.savez(tmp_path / "a.npz", observations=np.zeros((3, 1)), rewards=np.zeros(3))
    with pytest.raises(DataError):
        open_source(tmp_path / "a.npz")
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]
