"""Downloads from a server of this test, one that can be asked to fail."""

import hashlib
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from recsys2stage.data.download import download

CONTENT = bytes(range(256)) * 8192  # 2 MiB
MD5 = hashlib.md5(CONTENT).hexdigest()


class Server(ThreadingHTTPServer):
    ranges: list[str | None]
    cut: int | None = None  # bytes after which the connection ends
    resumes = True


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        asked = self.headers.get("Range")
        self.server.ranges.append(asked)
        if self.path != "/file.zip":
            self.send_error(404)
            return
        start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and self.server.resumes else 0
        if start >= len(CONTENT):
            self.send_error(416)
            return
        body = CONTENT[start:]
        self.send_response(206 if start else 200)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body[: self.server.cut])

    def log_message(self, *args: Any) -> None:
        pass


@pytest.fixture
def server() -> Iterator[Server]:
    server = Server(("127.0.0.1", 0), Handler)
    server.ranges = []
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    yield server
    server.shutdown()
    server.server_close()
    thread.join()


def url(server: Server, name: str = "file.zip") -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/{name}"


def test_a_download_is_whole_and_leaves_nothing_beside_it(server: Server, tmp_path: Path) -> None:
    path = download(url(server), tmp_path / "raw" / "file.zip", MD5)
    assert path.read_bytes() == CONTENT
    assert [entry.name for entry in path.parent.iterdir()] == ["file.zip"]


def test_what_is_there_is_not_fetched_again(server: Server, tmp_path: Path) -> None:
    for _ in range(2):
        download(url(server), tmp_path / "file.zip", MD5)
    assert len(server.ranges) == 1


@pytest.mark.parametrize("resumes", [True, False])
def test_an_interrupted_download_goes_on(server: Server, tmp_path: Path, resumes: bool) -> None:
    server.cut = 1_500_000
    with pytest.raises(ConnectionError, match=r"bytes are kept in .*file.zip.part"):
        download(url(server), tmp_path / "file.zip", MD5)
    assert not (tmp_path / "file.zip").exists()
    kept = (tmp_path / "file.zip.part").stat().st_size
    assert kept > 0

    server.cut, server.resumes = None, resumes
    assert download(url(server), tmp_path / "file.zip", MD5).read_bytes() == CONTENT
    assert server.ranges[1] == f"bytes={kept}-"


def test_all_but_the_last_step_done_is_done_after_the_last_step(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip.part").write_bytes(CONTENT)
    assert download(url(server), tmp_path / "file.zip", MD5).read_bytes() == CONTENT


def test_a_wrong_md5_is_an_error_and_the_file_is_not_kept(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"MD5 {MD5}, expected {'0' * 32} of "):
        download(url(server), tmp_path / "file.zip", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_was_there_with_a_wrong_md5_is_an_error_and_stays(server: Server, tmp_path: Path) -> None:
    (tmp_path / "file.zip").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"--source\.path"):
        download(url(server), tmp_path / "file.zip", MD5)
    assert (tmp_path / "file.zip").read_bytes() == b"something else"


def test_no_network_says_what_to_do_and_leaves_nothing(server: Server, tmp_path: Path) -> None:
    with pytest.raises(ConnectionError, match="404"):
        download(url(server, "other.zip"), tmp_path / "raw" / "other.zip")
    server.shutdown()
    server.server_close()
    with pytest.raises(ConnectionError, match=r"raw/file.zip does not exist.*; put it there"):
        download(url(server), tmp_path / "raw" / "file.zip", advice="put it there")
    assert list(tmp_path.iterdir()) == []
