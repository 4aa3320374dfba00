"""Reads of narinfos that are answered before Flask: what they say, and to whom."""

from __future__ import annotations

import hashlib
import os
import re
import socket
from collections.abc import Iterator

import pytest
import requests
from workspace_support import Connection, Server, running, wait_for

from cachix_protocol import base32
from cachix_workspace.cache_reads import KEPT

pytestmark = pytest.mark.slow

HASH = "b" * 32
INFO = "StorePath: /nix/store/x\n"
DEADLINE = 30


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    """A workspace with the caches open and closed, a narinfo in each."""
    with running() as server:
        for name, options in (("open", []), ("closed", ["--private"])):
            server.command("cache", "create", name, *options)
            directory = server.data / "cache" / name
            directory.mkdir(parents=True, exist_ok=True)
            (directory / f"{HASH}.narinfo").write_text(INFO)
        yield server


def token(server: Server, *options: str) -> tuple[str, dict[str, str]]:
    """A new token of CI: its number, and the header that has it."""
    secret = server.command("token", "create", "activate", *options).strip()
    number = server.command("token", "list").strip().splitlines()[-1].split()[0]
    return number, {"Authorization": f"Bearer {secret}"}


def get(server: Server, path: str, headers: dict[str, str] | None = None) -> requests.Response:
    return requests.get(f"{server.url}/cache/{path}", headers=headers, timeout=DEADLINE)


def heads(answer: requests.Response) -> dict[str, str]:
    """The headers that clients and proxies look at."""
    names = ("Content-Type", "Content-Length", "Cache-Control", "Last-Modified")
    names += ("X-Content-Type-Options",)
    return {name: answer.headers[name] for name in names if name in answer.headers}


@pytest.mark.parametrize("file", ["nix-cache-info", f"{HASH}.narinfo", f"{'c' * 32}.narinfo"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_it_answers_as_the_application_does(server: Server, file: str, method: str) -> None:
    url = f"{server.url}/cache/open/{file}"
    requests.get(url, timeout=DEADLINE)  # now the cache is known
    quick = requests.request(method, url, timeout=DEADLINE)
    conditional = {"If-None-Match": '"of no answer"'}
    slow = requests.request(method, url, headers=conditional, timeout=DEADLINE)
    assert (quick.status_code, quick.content) == (slow.status_code, slow.content)
    assert heads(quick) == heads(slow)


@pytest.mark.long
def test_a_private_cache_is_read_with_its_token_only(server: Server) -> None:
    number, mine = token(server, "--cache=closed")
    _, other = token(server, "--cache=open")
    file = f"closed/{HASH}.narinfo"
    for _ in range(2):  # the second answer is from what is known
        assert get(server, file, mine).text == INFO
        assert get(server, file, mine).headers["Cache-Control"] == "private"
        assert get(server, file).status_code == 401
        assert get(server, file, other).status_code == 403
        assert get(server, file, {"Authorization": "Bearer no"}).status_code == 401
        assert get(server, f"open/{HASH}.narinfo", other).text == INFO
    server.command("token", "revoke", number)
    wait_for(lambda: get(server, file, mine).status_code == 401, KEPT + 1)


def test_a_token_that_is_revoked_by_the_api_reads_no_more(server: Server) -> None:
    """At once: it is not only forgotten after a while."""
    path, (number, header) = f"closed/{HASH}.narinfo", token(server)
    admin = {"Authorization": f"Bearer {server.token('admin')}"}
    for _ in range(2):  # the second time it is known
        assert get(server, path, header).status_code == 200
    url = f"{server.url}/api/v1/tokens/{number}"
    assert requests.delete(url, headers=admin, timeout=DEADLINE).status_code == 200
    assert get(server, path, header).status_code == 401


def test_a_cache_that_is_unknown_is_none(server: Server) -> None:
    for _ in range(2):
        assert get(server, f"none/{HASH}.narinfo").status_code == 404
    server.command("cache", "create", "none")
    assert get(server, "none/nix-cache-info").ok


def test_a_browser_of_another_site_gets_nothing(server: Server) -> None:
    get(server, "open/nix-cache-info")
    answer = get(server, "open/nix-cache-info", {"Origin": "http://other.example"})
    assert answer.status_code == 403


def test_reads_are_counted(server: Server) -> None:
    secret = server.command("token", "create", "metrics").strip()

    def count() -> float:
        url, headers = f"{server.url}/metrics", {"Authorization": f"Bearer {secret}"}
        text = requests.get(url, headers=headers, timeout=DEADLINE).text
        sample = 'cachix_workspace_http_seconds_count{method="GET",part="cache",status="200"} '
        return sum(float(line.split()[-1]) for line in text.splitlines() if line.startswith(sample))

    before = count()
    for _ in range(3):
        get(server, f"open/{HASH}.narinfo")
    assert count() == before + 3


# --- by the thread of all connections -------------------------------------------------------------

FIELDS = "Host: x\r\nUser-Agent: of these tests\r\n"


def request(file: str, fields: str = FIELDS, method: str = "GET", version: str = "1.1") -> bytes:
    return f"{method} /cache/{file} HTTP/{version}\r\n{fields}\r\n".encode()


def raw(server: Server, data: bytes, count: int) -> list[str]:
    """The answers to requests that are sent together, without their dates."""
    connection = Connection(server.port)
    connection.send(data)
    answers = []
    for _ in range(count):
        head = connection.read_head()
        is_head = data.startswith(b"HEAD")
        body = b"" if is_head else connection.read_body(head)
        answers.append(re.sub(r"Date: .*?\r\n", "", head) + body.decode())
    connection.close()
    return answers


@pytest.mark.parametrize("file", [f"open/{HASH}.narinfo", f"open/{'c' * 32}.narinfo"])
@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_known_fields_are_answered_as_unknown_ones_are(
    server: Server, file: str, method: str
) -> None:
    get(server, file)  # now the cache is known
    new = FIELDS + f"X-Test: {method}\r\n"
    first, *others = [raw(server, request(file, new, method), 1) for _ in range(4)]
    assert others == 3 * [first]


def test_many_reads_at_once_are_answered_in_order(server: Server) -> None:
    directory = server.data / "cache/open"
    names = [f"{'d' * 30}{letter}{digit}" for letter in "abcdfghij" for digit in range(10)]
    for name in names:
        (directory / f"{name}.narinfo").write_text(f"StorePath: /nix/store/{name}\n" * 100)
    get(server, f"open/{HASH}.narinfo")
    raw(server, request(f"open/{HASH}.narinfo"), 1)
    asked = [*names * 5, "c" * 32, HASH, *names * 5]
    data = b"".join(request(f"open/{name}.narinfo") for name in asked)
    for _ in range(2):  # the second time from memory
        with socket.create_connection(("127.0.0.1", server.port), DEADLINE) as sock:
            sock.sendall(data)
            sock.shutdown(socket.SHUT_WR)  # it is answered all the same
            answers = sock.makefile("rb").read().decode()
        assert re.findall(r"HTTP/1.1 (\d+)", answers) == [
            "404" if name == "c" * 32 else "200" for name in asked
        ]
        bodies = re.findall(r"\r\n\r\nStorePath: /nix/store/(\w+)", answers)
        assert bodies == ["x" if name == HASH else name for name in asked if name != "c" * 32]


def test_a_narinfo_is_there_as_soon_as_it_was_pushed(server: Server) -> None:
    name = f"open/{'f' * 32}.narinfo"
    for _ in range(3):
        assert raw(server, request(name), 1)[0].startswith("HTTP/1.1 404")
    (server.data / "cache" / name).write_text(INFO)
    assert raw(server, request(name), 1)[0].endswith(INFO)
    (server.data / "cache" / name).unlink()
    wait_for(lambda: "404" in raw(server, request(name), 1)[0], KEPT + 1)


@pytest.mark.parametrize(
    ("fields", "version"), [(f"{FIELDS}Connection: close\r\n", "1.1"), (FIELDS, "1.0")]
)
def test_a_connection_that_is_not_to_be_kept_ends(
    server: Server, fields: str, version: str
) -> None:
    for _ in range(3):
        connection = Connection(server.port)
        connection.send(request(f"open/{HASH}.narinfo", fields, version=version))
        head = connection.read_head()
        assert head.startswith(f"HTTP/{version} 200")
        assert connection.read_body(head) == INFO.encode()
        with pytest.raises(EOFError):
            connection.read(1)


def test_fields_that_ask_for_more_are_never_answered_from_memory(server: Server) -> None:
    file = f"open/{HASH}.narinfo"
    for _ in range(3):
        part = raw(server, request(file, f"{FIELDS}Range: bytes=0-3\r\n"), 1)[0]
        assert part.startswith("HTTP/1.1 206") and part.endswith(INFO[:4])
    assert raw(server, request(f"{file}?x"), 1)[0].endswith(INFO)
    assert raw(server, request("%6Fpen/" + file[5:]), 1)[0].endswith(INFO)


# --- uploads --------------------------------------------------------------------------------------


def put(server: Server, header: dict[str, str], content: bytes, name: bytes | None = None) -> str:
    """Upload a NAR as Nix does, which waits to be told to send it; the answer without its date."""
    digest = base32(hashlib.sha256(content if name is None else name).digest())
    fields = {"Host": "x", "Content-Length": len(content), "Expect": "100-continue", **header}
    lines = [f"PUT /cache/open/nar/{digest}.nar HTTP/1.1"]
    lines += [f"{name}: {value}" for name, value in fields.items()]
    connection = Connection(server.port)
    connection.send("\r\n".join([*lines, "", ""]).encode())
    assert connection.read_head() == "HTTP/1.1 100 Continue"
    connection.send(content[:5])
    connection.send(content[5:])
    head = connection.read_head()
    body = connection.read_body(head).decode()
    connection.close()
    return re.sub(r"Date: .*?\r\n", "", head) + body.replace(digest, "DIGEST")


def test_uploads_are_answered_alike_whether_their_token_is_known_or_not(server: Server) -> None:
    number, mine = token(server, "--cache=open")
    contents = [os.urandom(140) for _ in range(3)]
    first, *others = [put(server, mine, content) for content in contents]
    assert others == [first, first] and first.startswith("HTTP/1.1 201")
    assert put(server, mine, contents[0]).startswith("HTTP/1.1 200")
    known = put(server, mine, b"other bytes", b"than those")
    assert known.startswith("HTTP/1.1 400") and "DIGEST.nar is not named after" in known
    _, another = token(server, "--cache=open")
    assert put(server, another, b"other bytes", b"than those") == known
    _, closed = token(server, "--cache=closed")
    assert put(server, closed, contents[0]).startswith("HTTP/1.1 403")
    server.command("token", "revoke", number)
    wait_for(lambda: put(server, mine, contents[0]).startswith("HTTP/1.1 401"), KEPT + 1)


def test_a_nar_that_is_not_there_is_told_by_the_thread_of_all_connections(server: Server) -> None:
    _, mine = token(server)
    content = os.urandom(140)
    file = f"closed/nar/{base32(hashlib.sha256(content).digest())}.nar"
    fields = f"{FIELDS}Authorization: {mine['Authorization']}\r\n"
    answers = [raw(server, request(file, fields, "HEAD"), 1) for _ in range(2)]
    raw(server, request(f"closed/{HASH}.narinfo", fields), 1)  # now the fields are known
    raw(server, request(f"closed/{HASH}.narinfo", fields), 1)
    answers += [raw(server, request(file, fields, "HEAD"), 1) for _ in range(2)]
    assert answers[0][0].startswith("HTTP/1.1 404") and answers == 4 * [answers[0]]
    url = f"{server.url}/cache/{file}"
    assert requests.put(url, content, headers=mine, timeout=DEADLINE).status_code == 201
    assert raw(server, request(file, fields, "HEAD"), 1)[0].startswith("HTTP/1.1 200")


def upload(content: bytes, fields: str, name: bytes | None = None, length: str = "") -> bytes:
    digest = base32(hashlib.sha256(content if name is None else name).digest())
    length = length or f"Content-Length: {len(content)}\r\n"
    return request(f"open/nar/{digest}.nar", f"{length}{fields}", "PUT") + content


def test_uploads_that_follow_each_other_are_answered_in_order(server: Server) -> None:
    _, mine = token(server, "--cache=open")
    fields = f"{FIELDS}Authorization: {mine['Authorization']}\r\n"
    raw(server, upload(b"first", fields), 1)
    raw(server, upload(b"second", fields), 1)  # now the fields are known
    contents = [os.urandom(200) for _ in range(20)]
    parts = [upload(content, fields) for content in contents]
    parts[10:10] = [upload(b"bytes", fields, b"others"), upload(b"first", fields)]
    answers = raw(server, b"".join(parts), len(parts))
    statuses = [answer[9:12] for answer in answers]
    assert statuses == [*["201"] * 10, "400", "200", *["201"] * 10]
    nars = server.data / "cache/open/nar"
    for content in contents:
        file = nars / f"{base32(hashlib.sha256(content).digest())}.nar"
        assert file.read_bytes() == content
    assert not list(nars.glob(".*"))


@pytest.mark.parametrize("fields", ["Content-Range: bytes 0-4/5\r\n", "Content-Length: 4\r\n"])
def test_known_fields_with_others_are_no_known_fields(server: Server, fields: str) -> None:
    _, mine = token(server, "--cache=open")
    known = f"{FIELDS}Authorization: {mine['Authorization']}\r\n"
    for _ in range(2):
        assert raw(server, upload(b"bytes", known), 1)[0].startswith("HTTP/1.1 20")
        assert raw(server, upload(b"bytes", known + fields), 1)[0].startswith("HTTP/1.1 400")
        nothing = raw(server, upload(b"", known, length=FIELDS[:9]), 1)[0]
        assert nothing.startswith("HTTP/1.1 4")
