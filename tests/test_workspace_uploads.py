"""Limits of uploads: size, a token's share, the disk; and uploads whose token is revoked."""

from __future__ import annotations

import collections
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
from caches import Files, Key
from test_workspace_cache import get, name_of, put, upload
from workspace_support import Connection, Peer, Server, command, running, wait_for

from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings
from cachix_workspace.uploads import Upload, Uploads

GIB = 1 << 30
Usage = collections.namedtuple("Usage", "total used free")


def begin(peer: Peer, length: int | None, sent: bytes = b"", token: str = "") -> Connection:
    """Announce the upload of a NAR, chunked without a length, and send some of it."""
    connection = Connection(peer.server.port)
    size = "Transfer-Encoding: chunked" if length is None else f"Content-Length: {length}"
    path = f"/cache/main/nar/{'2' * 52}.nar"
    credentials = f"Authorization: Bearer {token or peer.ci_token}"
    head = f"PUT {path} HTTP/1.1\r\nHost: x\r\n{size}\r\n{credentials}\r\n\r\n"
    connection.send(head.encode() + sent)
    return connection


def refusal(connection: Connection) -> tuple[int, str]:
    """The status of an answer, and its sentence."""
    head = connection.read_head()
    status, body = int(head.split()[1]), connection.read_body(head).decode()
    assert body.count("\n") == 1
    return status, body


def unfinished(server: Server) -> list[Path]:
    return list(server.data.glob("cache/main/nar/.upload-*"))


def test_an_announced_size_beyond_the_limit_is_refused_at_once() -> None:
    with running() as server:
        server.command("cache", "create", "main")
        peer = Peer(server)
        for length in (10 * GIB + 1, 1 << 50):
            status, sentence = refusal(begin(peer, length))
            assert status == 413 and "at most 10 GiB" in sentence and "--max-nar" in sentence
        assert not unfinished(server)


def test_a_size_that_is_not_announced_is_refused_once_it_is_beyond_the_limit() -> None:
    with running("--max-nar=0.001") as server:
        server.command("cache", "create", "main")
        peer = Peer(server)
        exact = bytes(1 << 20)
        assert put(peer, f"main/{name_of(exact)}", iter([exact])).status_code == 201
        block = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        connection = begin(peer, None, block * 20)
        status, sentence = refusal(connection)
        assert status == 413 and "0.001 GiB" in sentence
        wait_for(lambda: not unfinished(server))


def test_unfinished_uploads_of_one_token() -> None:
    """An announced size counts at once, any other as it comes; other tokens go on."""
    with running(max_nar=1 << 20) as server:
        server.command("cache", "create", "main")
        peer = Peer(server)
        block = b"10000\r\n" + bytes(1 << 16) + b"\r\n"
        open_ones = [begin(peer, 1 << 20, b"x") for _ in range(3)]
        open_ones.append(begin(peer, None, block * 15))
        wait_for(lambda: len(unfinished(server)) == 4)
        wait_for(lambda: sum(f.stat().st_size for f in unfinished(server)) > 11 << 16)
        status, sentence = refusal(begin(peer, 1 << 20, b"x"))
        assert status == 429 and "unfinished uploads" in sentence
        other = server.token("activate")
        small = b"of another token"
        assert put(peer, f"main/{name_of(small)}", small, other).status_code == 201
        assert put(peer, f"main/{name_of(small)}", small).status_code == 200
        open_ones.pop(0).close()
        wait_for(lambda: len(unfinished(server)) == 3)
        whole = bytes(1 << 20)
        assert put(peer, f"main/{name_of(whole)}", whole).status_code == 201


def test_a_full_disk_takes_nothing_and_is_read_on(tmp_path: Path) -> None:
    with running() as server:
        secret = server.command("cache", "create", "main")
        peer = Peer(server)
        files = Files(tmp_path / "files", Key.parse(secret))
        first, second = files.add("first", "1"), files.add("second", "2")
        assert upload(peer, files, first, "main") == [201, 201]
        server.stop()
        server.argv.append("--keep-free=1000000")
        server.start()
        answer = put(peer, f"main/{name_of(b'x')}", b"x")
        assert answer.status_code == 507
        assert "keeps 1e+06 GiB of its disk free" in answer.json()["error"]
        assert upload(peer, files, second, "main") == [507, 507]
        assert get(peer, files.narinfo(first).name, "main").status_code == 200
        assert get(peer, f"nar/{files.archive(first).name}", "main").status_code == 200
        assert peer.registered("web")  # and agents are served


class Body:
    """The body of a request."""

    def __init__(self, size: int) -> None:
        self.left = size

    def read(self, size: int, /) -> bytes:
        taken = min(size, self.left)
        self.left -= taken
        return bytes(taken)


def admitted(uploads: Uploads, settings: Settings, announced: int, size: int = 0) -> Any:
    return uploads.admit(settings, 1, Body(size or announced), announced, None)


def test_what_is_announced_counts_for_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    free = [10_000]
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(0, 0, free[0]))
    uploads, settings = Uploads(), Settings(tmp_path, keep_free=1000)
    with admitted(uploads, settings, 6000) as first:
        with pytest.raises(Refusal) as refused, admitted(uploads, settings, 3001):
            pass
        assert refused.value.code == 507
        with admitted(uploads, settings, 3000):
            pass
        first.read(6000)
        free[0] -= 6000
        with admitted(uploads, settings, 3000):
            pass
    free[0] = 1500
    with admitted(uploads, settings, 0, 2000) as upload:  # whose size is not announced
        upload.read(400)
        free[0] = 999  # another program has filled the disk
        with pytest.raises(Refusal) as refused:
            upload.read(400)
        assert refused.value.code == 507
    assert uploads.token_ids() == set()


def test_an_upload_ends_at_the_next_block(tmp_path: Path) -> None:
    uploads = Uploads()
    with admitted(uploads, Settings(tmp_path, keep_free=0), 1000) as upload:
        assert isinstance(upload, Upload) and len(upload.read(500)) == 500
        uploads.revoke({2})
        assert len(upload.read(400)) == 400
        uploads.revoke({1})
        with pytest.raises(Refusal, match="revoked or has expired") as refused:
            upload.read(100)
        assert refused.value.code == 401


@pytest.mark.long
@pytest.mark.parametrize("how", ["revoked", "expired"])
@pytest.mark.parametrize("sending", [False, True])
def test_an_upload_ends_with_its_token(how: str, sending: bool) -> None:
    """Whether bytes come or not; nothing stays."""
    days = 6.0 / 86400 if how == "expired" else None
    with running() as server:
        server.command("cache", "create", "main")
        peer = Peer(server)
        number, token = server.new_token("activate", days=days)
        connection = begin(peer, 1 << 30, b"x" * 300_000, token)
        other = begin(peer, 1 << 30, b"x" * 300_000)
        wait_for(lambda: len(unfinished(server)) == 2)
        stop = threading.Event()

        def go_on() -> None:
            while not stop.wait(0.05):
                try:
                    connection.send(b"x" * 1000)
                except OSError:
                    return

        if sending:
            threading.Thread(target=go_on, daemon=True).start()
        if how == "revoked":
            server.command("token", "revoke", str(number))
        wait_for(lambda: len(unfinished(server)) == 1, 20)
        time.sleep(0.3)
        assert unfinished(server)  # that of the other token
        stop.set()
        other.close()
        connection.close()
        wait_for(lambda: not unfinished(server))
        assert not list(server.data.glob(f"cache/main/nar/{'2' * 52}*"))


@pytest.mark.parametrize(
    "option", ["--max-nar=0", "--max-nar=x", "--keep-free=-1", "--keep-free=", "--max-log=0"]
)
def test_wrong_options(tmp_path: Path, option: str) -> None:
    name = option.partition("=")[0]
    refused = command("serve", option, "--listen=127.0.0.1:0", f"--data={tmp_path}/d", status=64)
    assert f"{name} must be a number" in refused.stderr
