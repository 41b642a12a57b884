"""Shards and parquet files from a server that is slow, fails for a while, breaks off or has gone."""

import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from formats import WHOLE
from made_tars import sample, shards, tar

from dalle.data import shards as access
from dalle.data.webdataset import WebDataset, opened
from dalle.errors import UserError


class Handler(SimpleHTTPRequestHandler):
    """Serves a folder, after as many faults for each path as `Server.faults` says."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *_):
        pass

    def fault(self) -> str | None:
        server = self.server
        assert isinstance(server, Server)
        name = self.path.rpartition("/")[2]
        with server.turn:
            server.asked[self.command, name] += 1
            kind, left = server.faults.get(name, ("", 0))
            if left and (kind != "break" or self.command == "GET"):
                server.faults[name] = kind, left - 1
                return kind
        return None

    def do_HEAD(self):
        if not self.broken():
            super().do_HEAD()

    def do_GET(self):
        if not self.broken():
            super().do_GET()

    def broken(self) -> bool:
        match self.fault():
            case "busy":
                self.send_error(503)
            case "silent":
                threading.Event().wait(1)
                self.close_connection = True
            case "break":
                content = Path(self.translate_path(self.path)).read_bytes()
                self.send_response(200)
                self.send_header("Content-Length", str(len(content)))
                self.end_headers()
                self.wfile.write(content[: len(content) // 2])
                self.close_connection = True
            case _:
                return False
        return True


class Server(ThreadingHTTPServer):
    daemon_threads = True

    def __init__(self, folder: Path):
        super().__init__(("127.0.0.1", 0), partial(Handler, directory=str(folder)))
        self.faults: dict[str, tuple[str, int]] = {}
        self.asked: Counter[tuple[str, str]] = Counter()
        self.turn = threading.Lock()


@pytest.fixture
def server(tmp_path, monkeypatch) -> Iterator[Server]:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(access, "PAUSE", 0.01)
    monkeypatch.setattr(access, "SILENCE", 0.3)
    monkeypatch.setattr(access, "TRIES", 3)
    opened.cache_clear()
    shards(tmp_path / "web", 2)
    server = Server(tmp_path / "web")
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


def read(server: Server, name: str = "{00000..00001}.tar", **options) -> WebDataset:
    return WebDataset("train", f"http://127.0.0.1:{server.server_port}/{name}", 8, **{**WHOLE, **options})


@pytest.mark.parametrize("fault", ["busy", "silent", "break"])
def test_a_server_that_fails_for_a_while_is_asked_again(server, tmp_path, caplog, fault):
    server.faults = {"00000.tar": (fault, 2), "00001.tar": (fault, 1)}
    there, here = read(server), WebDataset("train", str(tmp_path / "web"), 8, **WHOLE)
    assert there.images(range(16)).equal(here.images(range(16)))
    assert [there.captions(k) for k in range(16)] == [here.captions(k) for k in range(16)]
    assert all(left == 0 for _, left in server.faults.values())
    if fault == "break":
        assert caplog.text.count("trying again") == 1  # said when it has failed twice
        assert server.asked["GET", "00000.tar"] == 3


def test_a_shard_is_copied_once(server):
    read(server).images(range(16))
    opened.cache_clear()  # as in another process
    read(server).images(range(16))
    assert server.asked["GET", "00000.tar"] == server.asked["GET", "00001.tar"] == 1


@pytest.mark.parametrize(("fault", "why"), [("busy", "503"), ("silent", "Timeout"), ("break", "Payload")])
def test_a_server_that_goes_on_failing_is_one_line(server, fault, why):
    server.faults = {"00001.tar": (fault, 99)}
    with pytest.raises(
        UserError, match=rf"00001.tar cannot be read, 3 times in a row \(.*{why}.*resume=true"
    ):
        read(server)


def test_what_the_server_does_not_have_is_left_out_and_named(server):
    with pytest.warns(UserWarning, match=r"16 samples are used. Left out: 1 shards not there \(00002.tar\)"):
        assert len(read(server, "{00000..00002}.tar")) == 16
    with pytest.raises(UserError, match="has no usable sample"):
        read(server, "{00003..00004}.tar")


def test_nobody_answers(server):
    server.shutdown()
    server.server_close()
    with pytest.raises(UserError, match="cannot be read, 3 times in a row"):
        read(server)


def test_a_shard_that_changes_there_is_read_anew(server, tmp_path):
    before = read(server).captions(0)
    tar(tmp_path / "web" / "00000.tar", *(sample(k) for k in range(90, 95)))
    opened.cache_clear()  # as in another process
    again = read(server)
    assert before == ["thing 0"]
    assert [again.captions(k) for k in range(5)] == [[f"thing {k}"] for k in range(90, 95)]
    assert len(again.images(range(13))) == 13
