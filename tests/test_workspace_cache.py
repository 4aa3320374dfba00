"""The binary caches: plain requests, and real Nix between two hosts."""

from __future__ import annotations

import base64
import gzip
import hashlib
import json
import re
import shutil
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests
from caches import Files, Key, base32, nar
from hosts import Host
from workspace_support import DEADLINE, Connection, Peer, running, wait_for

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


HASH = "a" * 32


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running("--public-url=http://ws.test") as server:
        peer = Peer(server)
        for arguments in (["open"], ["closed", "--private"]):
            secret = server.command("cache", "create", *arguments)
            (server.data / f"secret-{arguments[0]}").write_text(secret)
        yield peer


@pytest.fixture
def files(peer: Peer, tmp_path: Path) -> Files:
    """Files that are signed by the key of the cache `open`."""
    return files_of(peer, tmp_path, "open")


def files_of(peer: Peer, place: Path, cache: str) -> Files:
    secret = (peer.server.data / f"secret-{cache}").read_text()
    return Files(place / "files", Key.parse(secret))


def put(
    peer: Peer, path: str, content: bytes | Iterator[bytes], token: str | None = None
) -> requests.Response:
    return peer.http("PUT", f"/cache/{path}", token, data=content)


def name_of(content: bytes, suffix: str = "") -> str:
    """Return the name of a NAR's file."""
    return f"nar/{base32(hashlib.sha256(content).digest())}.nar{suffix}"


def upload(peer: Peer, files: Files, path: str, cache: str = "open") -> list[int]:
    """Upload a path of `files` as Nix does; the statuses for NAR and narinfo."""
    return [
        put(peer, f"{cache}/{file.relative_to(files.directory)}", file.read_bytes()).status_code
        for file in (files.archive(path), files.narinfo(path))
    ]


def get(peer: Peer, file: str, cache: str = "open", **headers: str) -> requests.Response:
    url = f"{peer.server.url}/cache/{cache}/{file}"
    return requests.get(url, headers=headers, timeout=DEADLINE)


def audit(peer: Peer) -> list[dict[str, str]]:
    return list(json.loads(peer.server.command("audit", "--limit=1000", "--json")))


def test_files_come_back(peer: Peer, files: Files) -> None:
    path = files.add("back", {"a": "b"})
    assert upload(peer, files, path) == [201, 201]
    nar, content = f"nar/{files.archive(path).name}", files.archive(path).read_bytes()
    whole = get(peer, nar)
    assert whole.content == content and whole.headers["Content-Type"] == "application/x-nix-nar"
    head = requests.head(f"{peer.server.url}/cache/open/{nar}", timeout=DEADLINE)
    size = str(len(content))
    assert head.status_code == 200 and head.headers["Content-Length"] == size and not head.content
    assert get(peer, nar, **{"If-None-Match": whole.headers["ETag"]}).status_code == 304
    part = get(peer, nar, Range="bytes=3-5")
    assert (part.status_code, part.content) == (206, content[3:6])
    assert part.headers["Content-Range"] == f"bytes 3-5/{size}"
    assert get(peer, nar, Range="bytes=9999999-").status_code == 416
    info = get(peer, "nix-cache-info")
    assert info.text == "StoreDir: /nix/store\nWantMassQuery: 1\nPriority: 30\n"
    narinfo = files.narinfo(path)
    assert get(peer, narinfo.name).content == narinfo.read_bytes()
    strange = ("log/x.drv", "realisations/x", "..%2fworkspace.db", "nar/..%2f..%2fx")
    for missing in ("b" * 32 + ".narinfo", *strange):
        assert get(peer, missing).status_code == 404, missing


def test_a_private_cache(peer: Peer, tmp_path: Path) -> None:
    files = files_of(peer, tmp_path, "closed")
    path = files.add("private", "private")
    assert upload(peer, files, path, "closed") == [201, 201]
    narinfo, nar = files.narinfo(path).name, f"nar/{files.archive(path).name}"
    url = f"{peer.server.url}/cache/closed"
    assert get(peer, "nix-cache-info", "closed").status_code == 200
    for file in (narinfo, "b" * 32 + ".narinfo", nar):
        assert get(peer, file, "closed").status_code == 401
        wrong = requests.get(f"{url}/{file}", auth=("", "wrong"), timeout=DEADLINE)
        assert wrong.status_code == 401
    for token in (peer.agent_token, peer.ci_token, peer.server.token("admin")):
        answer = requests.get(f"{url}/{narinfo}", auth=("", token), timeout=DEADLINE)
        assert answer.status_code == 200
        assert peer.http("GET", f"/cache/closed/{narinfo}", token).status_code == 200


def test_who_and_what_may_be_put(peer: Peer, files: Files) -> None:
    path = files.add("who", "who")
    name, good = files.narinfo(path).name, files.narinfo(path).read_bytes()
    assert put(peer, f"open/{name}", good, peer.agent_token).status_code == 403
    assert put(peer, f"open/{name}", good, "unknown").status_code == 401
    assert put(peer, f"nowhere/{name}", good).status_code == 404
    assert put(peer, f"open/{'b' * 32}.narinfo", good).status_code == 400
    assert put(peer, f"open/{name}", b"\xff").status_code == 400
    assert put(peer, f"open/{name}", b"x" * (1 << 20) + b"y").status_code == 413
    names = ("nix-cache-info", "log/x.drv", "realisations/x.doi", "nar/x.nar", "..%2f..%2fx")
    for refused in names:
        assert put(peer, f"open/{refused}", b"x").status_code == 405, refused
    assert upload(peer, files, path) == [201, 201]
    basic = requests.put(
        f"{peer.server.url}/cache/open/{name}", good, auth=("", peer.ci_token), timeout=DEADLINE
    )
    assert basic.status_code == 200
    leftovers = [file.name for file in peer.server.data.glob("cache/**/.*")]
    assert not leftovers and not [*peer.server.data.parent.glob("x")]


@pytest.mark.promise(13)
@pytest.mark.parametrize("how", ["unsigned", "wrong-key"])
def test_a_narinfo_without_the_caches_signature_is_refused(
    peer: Peer, files: Files, how: str
) -> None:
    """A token for CI is not enough to run something on a machine."""
    path = files.add(f"evil-{how}", how)
    files.damage(path, how)
    assert put(peer, f"open/nar/{files.archive(path).name}", files.archive(path).read_bytes()).ok
    name = files.narinfo(path).name
    refused = put(peer, f"open/{name}", files.narinfo(path).read_bytes())
    assert refused.status_code == 400
    error = refused.json()["error"]
    assert "no signature by open.ws.test-1" in error and "?secret-key=FILE" in error
    assert get(peer, name).status_code == 404


def test_a_narinfo_needs_its_nar(peer: Peer, files: Files) -> None:
    path = files.add("early", "early")
    name = files.narinfo(path).name
    early = put(peer, f"open/{name}", files.narinfo(path).read_bytes())
    assert early.status_code == 400 and "not there: upload that first" in early.json()["error"]
    assert upload(peer, files, path) == [201, 201]
    other = files.add("short", "short")
    text = re.sub("FileSize: .*", "FileSize: 1", files.narinfo(other).read_text())
    text = text.replace("Compression: none", "Compression: xz")
    archive = files.archive(other)
    assert put(peer, f"open/nar/{archive.name}", archive.read_bytes()).status_code == 201
    short = put(peer, f"open/{files.narinfo(other).name}", text.encode())
    assert short.status_code == 400 and "1 bytes, not" in short.json()["error"]


def test_a_nar_never_changes(peer: Peer) -> None:
    content = b"some bytes"
    name = name_of(content, ".xz")
    assert put(peer, f"open/{name}", content).status_code == 201
    assert put(peer, f"open/{name}", content).status_code == 200
    other = put(peer, f"open/{name}", b"other bytes")
    assert other.status_code == 400 and "SHA-256" in other.json()["error"]
    assert get(peer, name).content == content
    assert put(peer, f"open/nar/{'5' * 52}.nar", content).status_code == 400


def test_signatures_are_merged(peer: Peer, files: Files) -> None:
    """Another compression of the same contents is no other narinfo."""
    path = files.add("merged", "merged")
    assert upload(peer, files, path) == [201, 201]
    file, before = files.narinfo(path), files.narinfo(path).read_text()
    nar_hash, size = (re.search(f"{n}: (.*)", before)[1] for n in ("NarHash", "NarSize"))
    foreign = Key("other-1").sign(path, nar_hash, int(size), [])
    packed = gzip.compress(files.archive(path).read_bytes())
    assert put(peer, f"open/{name_of(packed, '.gz')}", packed).status_code == 201
    changes = {"URL": name_of(packed, ".gz"), "Compression": "gzip", "FileSize": str(len(packed))}
    text = before + f"Sig: {foreign}\n"
    for field, value in changes.items():
        text = re.sub(f"{field}: .*", f"{field}: {value}", text)
    assert put(peer, f"open/{file.name}", text.encode()).status_code == 200
    assert get(peer, file.name).text == before + f"Sig: {foreign}\n"
    assert put(peer, f"open/{file.name}", before.encode()).status_code == 200
    assert get(peer, file.name).text == before + f"Sig: {foreign}\n"


def test_the_first_of_two_contents_stays_while_it_is_whole(peer: Peer, files: Files) -> None:
    path = files.add("first", "first")
    first = files.narinfo(path).read_bytes()
    assert upload(peer, files, path) == [201, 201]
    stored = peer.server.data / "cache/open/nar" / files.archive(path).name
    files.write(path, nar("another"), [])
    assert upload(peer, files, path) == [201, 200]  # a build that is not reproducible
    assert get(peer, files.narinfo(path).name).content == first
    (dropped,) = [entry for entry in audit(peer) if entry["action"] == "narinfo dropped"]
    name = files.narinfo(path).name
    assert dropped["detail"].startswith(f"{name} of the cache open: another one is there")
    assert "(activate" in dropped["actor"] and dropped["address"] == "127.0.0.1"
    stored.unlink()
    assert upload(peer, files, path) == [200, 201]
    assert get(peer, files.narinfo(path).name).content == files.narinfo(path).read_bytes()


def test_an_unsigned_narinfo_of_an_earlier_release(peer: Peer, files: Files) -> None:
    path = files.add("earlier", "earlier")
    signed = files.narinfo(path).read_bytes()
    assert upload(peer, files, path) == [201, 201]
    stored = peer.server.data / "cache" / "open" / files.narinfo(path).name
    stored.write_bytes(re.sub(rb"Sig: .*\n", b"", signed))
    facts = json.loads(peer.server.command("cache", "show", "open", "--json"))
    assert facts["unsigned"] == [path]
    assert path in peer.server.command("cache", "show", "open").splitlines()
    assert upload(peer, files, path) == [200, 201]
    assert get(peer, stored.name).content == signed
    assert json.loads(peer.server.command("cache", "show", "open", "--json"))["unsigned"] == []


def test_pushes_of_the_same_path_at_once(peer: Peer, files: Files) -> None:
    path = files.add("at-once", "at-once")
    assert put(peer, f"open/nar/{files.archive(path).name}", files.archive(path).read_bytes()).ok
    before = files.narinfo(path).read_text()
    nar_hash, size = (re.search(f"{n}: (.*)", before)[1] for n in ("NarHash", "NarSize"))
    signatures = [Key(f"k{n}-1").sign(path, nar_hash, int(size), []) for n in range(8)]
    texts = [f"{before}Sig: {one}\n".encode() for one in signatures]
    name = files.narinfo(path).name
    with ThreadPoolExecutor(8) as pool:
        codes = list(pool.map(lambda text: put(peer, f"open/{name}", text).status_code, texts))
    assert sorted(set(codes)) in ([200, 201], [201]) and codes.count(201) == 1
    stored = get(peer, name).text
    assert stored.startswith(before) and stored.endswith("\n")


def test_by_host(peer: Peer, files: Files) -> None:
    path = files.add("by-host", "by-host")
    assert upload(peer, files, path) == [201, 201]
    url = f"{peer.server.url}/{files.narinfo(path).name}"
    for host in ("open.ws.test", "open.ws.test:8080"):
        answer = requests.get(url, headers={"Host": host}, timeout=DEADLINE)
        assert answer.content == files.narinfo(path).read_bytes()
    other = requests.get(url, headers={"Host": "no.ws.test"}, timeout=DEADLINE)
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

    digest = hashlib.sha256()
    for piece in pieces():
        digest.update(piece)
    path = f"nar/{base32(digest.digest())}.nar"
    headers = {"Authorization": f"Bearer {peer.ci_token}"}
    began = time.monotonic()
    url = f"{peer.server.url}/cache/open/{path}"
    assert requests.put(url, pieces(), headers=headers, timeout=30).status_code == 201
    print(f"64 MiB stored in {time.monotonic() - began:.2f} s")
    got = requests.get(url, timeout=30)
    assert len(got.content) == 64 << 20
    print(f"and read after {time.monotonic() - began:.2f} s")


# --- files beside narinfos and NARs ---------------------------------------------------------------

BESIDE = [
    (f"{HASH}.ls", "application/json"),
    (f"log/{HASH}-hello-2.12.drv", "text/plain"),
    (f"realisations/sha256:{'0' * 64}!out.doi", "application/json"),
    (f"debuginfo/{'0' * 40}", "application/json"),
    (f"debuginfo/{'0' * 40}.debug", "application/json"),
]


@pytest.mark.parametrize(("name", "kind"), BESIDE)
def test_files_beside_are_stored_and_served(peer: Peer, name: str, kind: str) -> None:
    for cache in ("open", "closed"):
        url = f"{peer.server.url}/cache/{cache}/{name}"
        headers = {"Authorization": f"Bearer {peer.ci_token}"}
        assert requests.put(url, b"{}", timeout=DEADLINE).status_code == 401
        agent = {"Authorization": f"Bearer {peer.agent_token}"}
        assert requests.put(url, b"{}", headers=agent, timeout=DEADLINE).status_code == 403
        assert requests.get(url, headers=headers, timeout=DEADLINE).status_code == 404
        assert requests.put(url, b"{}", headers=headers, timeout=DEADLINE).status_code == 201
        assert requests.put(url, b"[1]", headers=headers, timeout=DEADLINE).status_code == 200
        answer = requests.get(url, headers=headers, timeout=DEADLINE)
        assert (answer.content, answer.headers["Content-Type"].split(";")[0]) == (b"[1]", kind)
        status = requests.get(url, timeout=DEADLINE).status_code
        assert status == (200 if cache == "open" else 401)


@pytest.mark.parametrize(
    "name",
    [
        *("log/x.drv", f"log/{HASH}-.drv", f"log/{HASH}-a/b.drv", f"{HASH}.ls.x", "x.ls"),
        *("realisations/x.doi", "debuginfo/../x", f"debuginfo/{'0' * 39}", f"logs/{HASH}-a.drv"),
    ],
)
def test_other_names_are_refused(peer: Peer, name: str) -> None:
    headers = {"Authorization": f"Bearer {peer.ci_token}"}
    url = f"{peer.server.url}/cache/open/{name}"
    assert requests.put(url, b"{}", headers=headers, timeout=DEADLINE).status_code in (404, 405)


def test_a_file_beside_has_a_limit(peer: Peer) -> None:
    headers = {"Authorization": f"Bearer {peer.ci_token}"}
    url = f"{peer.server.url}/cache/open/{'b' * 32}.ls"
    body = b"x" * (64 << 20) + b"y"
    assert requests.put(url, body, headers=headers, timeout=DEADLINE).status_code == 413
    assert requests.get(url, timeout=DEADLINE).status_code == 404


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
        listing = "&write-nar-listing=1" if private else ""
        push = ["nix", "copy", "--to", f"{url}?secret-key={tmp_path / 'secret'}{listing}", thing]
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
        closure = ci.output("nix-store", "--query", "--requisites", thing).split()
        listings = {path.name for path in (server.data / "cache" / "mycache").glob("*.ls")}
        assert listings == ({f"{path[11:43]}.ls" for path in closure} if private else set())
