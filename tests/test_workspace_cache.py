"""The binary caches: plain requests, and real Nix between two hosts."""

from __future__ import annotations

import base64
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from hosts import Host
from workspace_support import DEADLINE, Connection, Peer, running, wait_for

HASH = "a" * 32
NAR = f"nar/{'1' * 52}.nar.xz"
NARINFO = f"""\
StorePath: /nix/store/{HASH}-x
URL: {NAR}
NarHash: sha256:{"1" * 52}
NarSize: 3
References:\x20
"""
BUILD = """
let
  make = name: script: derivation {
    inherit name;
    system = builtins.currentSystem;
    builder = "/bin/sh";
    args = [ "-euc" script ];
    PATH = "/usr/bin:/bin";
  };
  dependency = make "dependency" "echo it > $out";
in make "thing" ''
  mkdir $out
  ln -s ${dependency} $out/dependency
  head -c 300000 /dev/urandom > $out/big
''
"""


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running("--public-url=http://ws.test") as server:
        for arguments in (["open"], ["closed", "--private"]):
            server.command("cache", "create", *arguments)
        yield Peer(server)


def put(peer: Peer, path: str, content: bytes, token: str | None = None) -> int:
    return peer.http("PUT", f"/cache/{path}", token, data=content).status_code


def test_files_come_back(peer: Peer) -> None:
    assert put(peer, f"open/{NAR}", b"0123456789") == 201
    assert put(peer, f"open/{HASH}.narinfo", NARINFO.encode()) == 201
    url = f"{peer.server.url}/cache/open"
    whole = requests.get(f"{url}/{NAR}", timeout=DEADLINE)
    assert (
        whole.content == b"0123456789" and whole.headers["Content-Type"] == "application/x-nix-nar"
    )
    head = requests.head(f"{url}/{NAR}", timeout=DEADLINE)
    assert head.status_code == 200 and head.headers["Content-Length"] == "10" and not head.content
    etag = {"If-None-Match": whole.headers["ETag"]}
    assert requests.get(f"{url}/{NAR}", headers=etag, timeout=DEADLINE).status_code == 304
    part = requests.get(f"{url}/{NAR}", headers={"Range": "bytes=3-5"}, timeout=DEADLINE)
    assert (part.status_code, part.content, part.headers["Content-Range"]) == (
        206,
        b"345",
        "bytes 3-5/10",
    )
    beyond = requests.get(f"{url}/{NAR}", headers={"Range": "bytes=99-"}, timeout=DEADLINE)
    assert beyond.status_code == 416
    info = requests.get(f"{url}/nix-cache-info", timeout=DEADLINE)
    assert info.text == "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"
    assert requests.get(f"{url}/{HASH}.narinfo", timeout=DEADLINE).text == NARINFO
    for missing in (
        "b" * 32 + ".narinfo",
        "log/x.drv",
        "realisations/x",
        "..%2fworkspace.db",
        "nar/..%2f..%2fx",
    ):
        assert requests.get(f"{url}/{missing}", timeout=DEADLINE).status_code == 404, missing


def test_a_private_cache(peer: Peer) -> None:
    assert put(peer, f"closed/{HASH}.narinfo", NARINFO.encode()) == 201
    url = f"{peer.server.url}/cache/closed"
    assert requests.get(f"{url}/nix-cache-info", timeout=DEADLINE).status_code == 200
    for path in (f"{HASH}.narinfo", "b" * 32 + ".narinfo", NAR):
        assert requests.get(f"{url}/{path}", timeout=DEADLINE).status_code == 401
        assert (
            requests.get(f"{url}/{path}", auth=("", "wrong"), timeout=DEADLINE).status_code == 401
        )
    for token in (peer.agent_token, peer.ci_token, peer.server.token("admin")):
        assert (
            requests.get(f"{url}/{HASH}.narinfo", auth=("", token), timeout=DEADLINE).status_code
            == 200
        )
        assert peer.http("GET", f"/cache/closed/{HASH}.narinfo", token).status_code == 200


def test_who_and_what_may_be_put(peer: Peer) -> None:
    good = NARINFO.encode()
    assert put(peer, f"open/{HASH}.narinfo", good, peer.agent_token) == 403
    assert put(peer, f"open/{HASH}.narinfo", good, "unknown") == 401
    assert put(peer, f"nowhere/{HASH}.narinfo", good) == 404
    assert put(peer, f"open/{'b' * 32}.narinfo", good) == 400
    assert put(peer, f"open/{HASH}.narinfo", b"\xff") == 400
    assert put(peer, f"open/{HASH}.narinfo", b"x" * (1 << 20) + b"y") == 413
    for refused in (
        "nix-cache-info",
        "log/x.drv",
        "realisations/x.doi",
        "nar/x.nar",
        "..%2f..%2fx",
        f"{HASH}.ls",
    ):
        assert put(peer, f"open/{refused}", b"x") == 405, refused
    basic = requests.put(
        f"{peer.server.url}/cache/open/{HASH}.narinfo",
        good,
        auth=("", peer.ci_token),
        timeout=DEADLINE,
    )
    assert basic.status_code == 201
    leftovers = [file.name for file in peer.server.data.glob("cache/**/.*")]
    assert not leftovers and not [*peer.server.data.parent.glob("x")]


def test_by_host(peer: Peer) -> None:
    assert put(peer, f"open/{HASH}.narinfo", NARINFO.encode()) == 201
    for host in ("open.ws.test", "open.ws.test:8080"):
        answer = requests.get(
            f"{peer.server.url}/{HASH}.narinfo", headers={"Host": host}, timeout=DEADLINE
        )
        assert answer.text == NARINFO
    other = requests.get(
        f"{peer.server.url}/{HASH}.narinfo", headers={"Host": "no.ws.test"}, timeout=DEADLINE
    )
    assert other.status_code == 404 and "no cache" in other.json()["error"]


@pytest.mark.parametrize("chunked", [False, True])
def test_an_upload_that_breaks_off_leaves_nothing(peer: Peer, chunked: bool) -> None:
    connection = Connection(peer.server.port)
    path = f"nar/{'2' * 52}.nar"
    length = "Transfer-Encoding: chunked" if chunked else "Content-Length: 1000000"
    token = f"Authorization: Bearer {peer.ci_token}"
    head = f"PUT /cache/open/{path} HTTP/1.1\r\nHost: x\r\n{length}\r\n{token}\r\n\r\n"
    connection.send(head.encode() + (b"10000\r\n" if chunked else b"") + b"x" * 30_000)
    directory = peer.server.data / "cache" / "open" / "nar"
    wait_for(lambda: list(directory.glob(".upload-*")))
    connection.close()
    wait_for(lambda: not list(directory.glob(".upload-*")))
    assert not (directory / path.partition("/")[2]).exists()


def test_a_large_upload_streams(peer: Peer) -> None:
    def pieces() -> Iterator[bytes]:
        for _ in range(64):
            yield b"x" * (1 << 20)

    path = f"nar/{'3' * 52}.nar"
    headers = {"Authorization": f"Bearer {peer.ci_token}"}
    began = time.monotonic()
    url = f"{peer.server.url}/cache/open/{path}"
    assert requests.put(url, pieces(), headers=headers, timeout=30).status_code == 201
    print(f"64 MiB stored in {time.monotonic() - began:.2f} s")
    got = requests.get(url, timeout=30)
    assert len(got.content) == 64 << 20
    print(f"and read after {time.monotonic() - began:.2f} s")


# --- real Nix -------------------------------------------------------------------------------------

needs_nix = pytest.mark.skipif(shutil.which("nix-store") is None, reason="Nix is not installed")


@needs_nix
@pytest.mark.slow
@pytest.mark.parametrize("private", [False, True])
def test_nix_pushes_and_pulls(tmp_path: Path, private: bool) -> None:
    with running() as server, Host(tmp_path / "ci") as ci, Host(tmp_path / "target") as target:
        peer = Peer(server)
        secret = server.command("cache", "create", "mycache", *(["--private"] if private else []))
        (tmp_path / "secret").write_text(secret)
        (tmp_path / "thing.nix").write_text(BUILD)
        public = base64.b64encode(base64.b64decode(secret.strip().partition(":")[2])[32:]).decode()
        key = f"{secret.partition(':')[0]}:{public}"
        url = f"{server.url}/cache/mycache"
        thing = ci.output("nix-build", "--no-out-link", str(tmp_path / "thing.nix")).strip()
        push = ["nix", "copy", "--to", f"{url}?secret-key={tmp_path / 'secret'}", thing]
        refused = ci.run(push)
        assert refused.returncode != 0 and "401" in refused.stderr
        netrc = "machine 127.0.0.1 login x password {}\n".format
        (tmp_path / "netrc-ci").write_text(netrc(peer.ci_token))
        (tmp_path / "netrc-agent").write_text(netrc(peer.agent_token))
        ci.output(*push, "--option", "netrc-file", str(tmp_path / "netrc-ci"))
        ci.output(
            *push, "--option", "netrc-file", str(tmp_path / "netrc-ci")
        )  # nothing is left to do
        pull = ["nix-store", "--realise", thing, "--option", "substituters", url]
        pull += ["--option", "narinfo-cache-negative-ttl", "0", "--option", "trusted-public-keys"]
        wrong = f"{key.partition(':')[0]}:{base64.b64encode(bytes(32)).decode()}"
        assert target.run([*pull, wrong]).returncode != 0
        if private:
            assert target.run([*pull, key]).returncode != 0
            pull[2:2] = ["--option", "netrc-file", str(tmp_path / "netrc-agent")]
        target.output(*pull, key)
        assert target.valid(thing)
        target.output("nix-store", "--verify", "--check-contents")
