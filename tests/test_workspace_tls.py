"""TLS without a proxy: real certificates, a real agent, and files that can't be used."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import ssl
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import closures
import pytest
import requests
from hosts import Host
from live import Workspace
from machines import Machine
from workspace_support import DEADLINE, Server, command, wait_for

CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="needs openssl")


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


def make(directory: Path, name: str = "one") -> tuple[Path, Path]:
    """Make a self-signed certificate for this machine; it and its key."""
    directory.mkdir(exist_ok=True)
    files = directory / f"{name}.pem", directory / f"{name}.key"
    names = "subjectAltName=IP:127.0.0.1,DNS:localhost"
    output = ["-keyout", str(files[1]), "-out", str(files[0])]
    subject = ["-subj", f"/CN={name}", "-addext", names, "-days", "2"]
    openssl("req", "-x509", *CURVE, "-nodes", *output, *subject)
    return files


@pytest.fixture
def pair(tmp_path: Path) -> tuple[Path, Path]:
    return make(tmp_path / "tls")


@pytest.fixture
def secured(
    tmp_path: Path, pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> Iterator[Workspace]:
    """A workspace that speaks TLS by itself, and is trusted here."""
    monkeypatch.setenv("SSL_CERT_FILE", str(pair[0]))
    workspace = Workspace(tmp_path / "workspace")
    workspace.serve(f"--certificate={pair[0]}", f"--key={pair[1]}")
    try:
        yield workspace
    finally:
        workspace.kill()


@pytest.mark.slow
@pytest.mark.long
def test_a_real_agent_deploys_from_a_private_cache(
    host: Host, secured: Workspace, pair: tuple[Path, Path], name: str
) -> None:
    """Websockets, requests, push and download go through TLS, with the token for the cache."""
    files = secured.cache("main", private=True)
    assert secured.url.startswith("https://") and secured.program is not None
    path = closures.plain(files, name)
    machine = Machine(host, secured, name, env={"SSL_CERT_FILE": str(pair[0])})
    outcome = machine.deploy(path)
    assert outcome.status == "Succeeded" and host.profile() == path, outcome
    assert f"{secured.url}/cache/main" in secured.cli("cache", "show", "main")
    assert "warning" not in secured.program.text()
    assert secured.stop() == 0
    assert "Traceback" not in secured.program.text()


@pytest.mark.long
def test_frames_of_several_threads_stay_whole(secured: Workspace, pair: tuple[Path, Path]) -> None:
    """A viewer that pings while it is sent lines: two threads send, and one reads."""
    import websocket

    verified = {"ca_certs": str(pair[0])}
    base = secured.url.replace("https", "wss")
    header = {"name": "web", "version": "1.11.1", "system": "x86_64-linux"}
    token = {"Authorization": f"Bearer {secured.token('agent')}"}
    agent = websocket.create_connection(
        f"{base}/ws", timeout=DEADLINE, sslopt=verified, header={**header, **token}
    )
    assert "AgentRegistered" in agent.recv()
    deployment = secured.deploy("web", f"/nix/store/{'a' * 32}-system")
    viewer = websocket.create_connection(
        f"{base}/api/v1/deploy/log/{deployment}?view=true",
        timeout=DEADLINE,
        sslopt=verified,
        header={"Authorization": f"Bearer {secured.token('activate')}"},
    )
    lines, pings = 6000, 500
    for number in range(pings):
        viewer.ping(b"%d" % number)
    for first in range(0, lines, 2000):
        body = "".join(
            f'{{"line":"{first + number} {"x" * 200}","time":"2026-11-24T01:02:03Z"}}\n'
            for number in range(2000)
        )
        answer = requests.put(
            f"{secured.url}/api/v1/deploy/log/{deployment}?offset={first}",
            body,
            headers={**token, "name": "web"},
            verify=str(pair[0]),
            timeout=DEADLINE,
        )
        assert answer.json() == {"next": first + 2000}
    seen = pongs = 0
    while seen < lines or pongs < pings:
        opcode, payload = viewer.recv_data(control_frame=True)
        if opcode == websocket.ABNF.OPCODE_PONG:
            pongs += 1
        else:
            assert payload.startswith(b'{"line":"%d ' % seen)
            seen += 1
    viewer.close()
    agent.close()


def test_the_end_of_an_answer_is_no_cut(secured: Workspace, pair: tuple[Path, Path]) -> None:
    """TLS has a farewell of its own, without which nobody knows whether more would have come."""
    context = ssl.create_default_context(cafile=str(pair[0]))
    port = int(secured.url.rpartition(":")[2])
    raw = socket.create_connection(("127.0.0.1", port), DEADLINE)
    with context.wrap_socket(
        raw, server_hostname="localhost", suppress_ragged_eofs=False
    ) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
        answer = b""
        while block := connection.recv(1 << 16):  # raises if there is no farewell
            answer += block
    assert answer.startswith(b"HTTP/1.1 200 ") and b"cachix-deploy workspace" in answer


@pytest.mark.long
def test_an_upload_ends_with_its_token(secured: Workspace, pair: tuple[Path, Path]) -> None:
    secured.cache()
    token = secured.token("activate", "--description=short")
    number = json.loads(secured.cli("token", "list", "--json"))[-1]["id"]
    context = ssl.create_default_context(cafile=str(pair[0]))
    port = int(secured.url.rpartition(":")[2])
    raw = socket.create_connection(("127.0.0.1", port), DEADLINE)
    head = f"PUT /cache/main/nar/{'2' * 52}.nar HTTP/1.1\r\nHost: x\r\nContent-Length: 9999999\r\n"
    with context.wrap_socket(raw, server_hostname="localhost") as connection:
        connection.sendall(f"{head}Authorization: Bearer {token}\r\n\r\n".encode() + b"x" * 300_000)
        begun = list(wait_for(lambda: list(secured.data.glob("cache/main/nar/.upload-*"))))
        secured.cli("token", "revoke", str(number))
        wait_for(lambda: not begun[0].exists())
        assert connection.recv(1 << 16).startswith(b"HTTP/1.1 401 ")
    assert not list(secured.data.glob("cache/main/nar/*"))


@pytest.mark.long
@pytest.mark.sqlite  # the tests make the directory where it names another database
def test_bad_files_are_one_sentence_before_anything_is_started(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    certificate, key = map(str, pair)
    other = str(make(tmp_path / "tls", "other")[1])
    locked, empty = str(tmp_path / "locked.key"), str(tmp_path / "empty")
    openssl("genrsa", "-aes128", "-passout", "pass:secret", "-out", locked, "2048")
    Path(empty).touch()
    garbage = tmp_path / "garbage.key"
    garbage.write_text("-----BEGIN PRIVATE KEY-----\nMIIx\n-----END PRIVATE KEY-----\n")
    for one, two, sentence in (
        (certificate, other, f"--key={other} does not belong to the certificate in"),
        (certificate, locked, "that no password protects"),
        (certificate, str(tmp_path / "none"), "/none can't be read: No such file or directory"),
        (str(tmp_path), key, "can't be read: Is a directory"),
        (certificate, empty, "is no PEM file"),
        (key, key, f"--certificate={key} holds no certificate in PEM"),
        (certificate, str(garbage), f"--key={garbage} holds no private key in PEM"),
    ):
        data = tmp_path / "data"
        arguments = ["serve", "--listen=127.0.0.1:0", f"--data={data}"]
        refused = command(*arguments, f"--certificate={one}", f"--key={two}", status=1)
        assert refused.stderr.startswith("error: ") and sentence in refused.stderr
        assert refused.stderr.count("\n") == 1 and not data.exists()
    for lone in (f"--certificate={certificate}", f"--key={key}"):
        assert "together" in command("serve", lone, status=64).stderr


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root")
def test_a_key_that_this_user_can_not_read(pair: tuple[Path, Path]) -> None:
    from cachix_protocol import Error
    from cachix_workspace.tls import load

    place = Path(tempfile.mkdtemp())  # that others may enter
    place.chmod(0o755)
    pair = (Path(shutil.copy(pair[0], place)), Path(shutil.copy(pair[1], place)))
    pair[0].chmod(0o644)
    pair[1].chmod(0)
    child = os.fork()
    if not child:
        status = 1
        with contextlib.suppress(BaseException):
            os.setuid(65534)
            try:
                load(*pair)
            except Error as error:
                status = 0 if str(error).startswith(f"--key={pair[1]} can't be read") else 2
        os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    shutil.rmtree(place)


def start(tmp_path: Path, pair: tuple[Path, Path]) -> Server:
    return Server(tmp_path / "data", f"--certificate={pair[0]}", f"--key={pair[1]}")


def test_a_renewed_certificate_is_used_at_once(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    server = start(tmp_path, pair)
    try:
        assert requests.get(server.url, verify=str(pair[0]), timeout=DEADLINE).status_code == 200
        former = (tmp_path / "former.pem").write_bytes(pair[0].read_bytes()) and tmp_path
        new = make(tmp_path / "tls", "new")
        new[0].replace(pair[0])  # half of the renewal
        answer = requests.get(server.url, verify=f"{former}/former.pem", timeout=DEADLINE)
        assert answer.status_code == 200
        assert wait_for(lambda: any("the former certificate stays" in x for x in server.lines))
        new[1].replace(pair[1])
        assert requests.get(server.url, verify=str(pair[0]), timeout=DEADLINE).status_code == 200
    finally:
        server.kill()


@pytest.mark.long
def test_peers_that_speak_no_tls_or_stall_hold_up_nobody(
    tmp_path: Path, pair: tuple[Path, Path]
) -> None:
    server = start(tmp_path, pair)
    try:
        silent = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(20)]
        for number, sock in enumerate(silent):
            sock.sendall(b"\x16\x03\x01" if number % 2 else b"GET / HTTP/1.1\r\n\r\n")
        context = ssl.create_default_context(cafile=str(pair[0]))
        raw = socket.create_connection(("127.0.0.1", server.port), DEADLINE)
        with context.wrap_socket(raw, server_hostname="localhost") as half:
            half.sendall(b"GET / HTTP/1.1\r\nHost: x\r\n")  # and no more
            answer = requests.get(server.url, verify=str(pair[0]), timeout=DEADLINE)
            assert answer.json()["url"] == server.url and server.url.startswith("https://")
        assert server.stop() == 0
        assert "Traceback" not in "\n".join(server.lines)
        for sock in silent:
            sock.close()
    finally:
        server.kill()


WITH_TIMEOUT = """
import sys
from pathlib import Path
from cachix_workspace import server
from cachix_workspace.settings import Settings
from cachix_workspace.tls import Certificate
listener = server.bind("127.0.0.1:0")
settings = Settings(Path(sys.argv[1]), receive_timeout=1.0)
sys.exit(server.serve(settings, listener, Certificate(*map(Path, sys.argv[2:]))))
"""


def test_a_peer_that_stops_is_disconnected(tmp_path: Path, pair: tuple[Path, Path]) -> None:
    """In the handshake, in the head, in the body: the kernel's timeout says nothing to OpenSSL."""
    server = start(tmp_path, pair)
    try:
        server.kill()
        server.argv = [sys.executable, "-c", WITH_TIMEOUT, str(server.data), *map(str, pair)]
        server.start()
        context = ssl.create_default_context(cafile=str(pair[0]))
        token = f"Authorization: Bearer {server.token('agent')}\r\nname: web\r\n"
        body = "PUT /api/v1/deploy/log/x?offset=0 HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n"
        for half in (b"", b"GET / HTTP/1.1\r\n", f"{body}{token}\r\n123".encode()):
            raw = socket.create_connection(("127.0.0.1", server.port), DEADLINE)
            if half:
                raw = context.wrap_socket(raw, server_hostname="localhost")
            raw.sendall(half or b"\x16\x03\x01")
            with contextlib.suppress(ConnectionResetError):
                while raw.recv(1 << 16):  # an answer, perhaps
                    pass
            raw.close()
        assert "Traceback" not in "\n".join(server.lines)
    finally:
        server.kill()


@pytest.mark.parametrize("listen", ["0.0.0.0:0", "[::]:0", "127.0.0.1:0", "[::1]:0"])
def test_plain_http_that_others_reach_is_warned_of_once(
    tmp_path: Path, pair: tuple[Path, Path], listen: str
) -> None:
    tls = [f"--certificate={pair[0]}", f"--key={pair[1]}"]
    is_exposed = listen in ("0.0.0.0:0", "[::]:0")
    for options, is_warned in (([], is_exposed), (["--behind-proxy=1"], False), (tls, False)):
        workspace = Workspace(tmp_path / "workspace")
        try:
            workspace.serve(*options, listen=listen)
            assert workspace.program is not None
            text = workspace.program.text()
            warnings = [line for line in text.splitlines() if line.startswith("warning: ")]
            assert len(warnings) == is_warned, text
            assert not is_warned or "use --certificate and --key" in warnings[0]
        finally:
            workspace.kill()
