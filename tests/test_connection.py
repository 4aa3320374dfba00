"""The agent's connection: kept alive, broken, refused, redirected, through proxies and TLS, ended in every state."""

import base64
import contextlib
import datetime
import http.client
import http.server
import ipaddress
import json
import os
import random
import re
import signal
import socket
import ssl
import struct
import threading
import time

import certifi
import pytest
from closures import nixos, plain, wait_for
from hosts import wait_until
from hypothesis import given, settings
from hypothesis import strategies as st
from peer import AGENT_ID, message, transcript

import cachix_connection
import cachix_deploy
import cachix_protocol
from cachix_connection import Waits, backoff, ca_bundle
from cachix_protocol import Undecodable, Unreachable, decode_from_agent, decode_to_agent

TOKEN = "peer-agent-token"
BROKEN_OFF = ("abrupt TCP EOF", "server close 1001, TCP left open by server")


def start(host, peer, *args, url="", waits=None, **env):
    waits = json.dumps({"backoff": 0.05, "slowest": 0.2, **(waits or {})})
    return host.agent(
        "web", url or peer.url, TOKEN, *args, env={"CACHIX_DEPLOY_WAITS": waits, **env}
    )


def another(peer, number, timeout=20.0):
    """The agent's connection number so-and-so to /ws."""
    wait_until(lambda: len(peer.heads("/ws")) >= number, timeout, f"connection {number}")
    return peer.agent()


def present(host, cache, path):
    host.fetch(cache.url, cache.key.public, path)
    return path


# --- alive -----------------------------------------------------------------------------------------------------------


def test_it_pings_and_connects_again_when_nothing_is_heard(host, peer):
    agent = start(host, peer, waits={"ping": 0.25, "silence": 0.8})
    first = peer.agent()
    wait_until(lambda: len(peer.frames("/ws", "ping")) >= 5, what="five pings")
    pings = peer.frames("/ws", "ping")
    assert all(ping["payload"] == "" and ping["conn"] == first.number for ping in pings)
    gaps = [later["t"] - earlier["t"] for earlier, later in zip(pings, pings[1:])]
    assert all(0.2 < gap < 1.0 for gap in gaps), gaps
    first.pongs = False
    stopped = time.monotonic()
    another(peer, 2)
    assert 0.5 < time.monotonic() - stopped < 5
    agent.wait_for("nothing was heard for 1 s, connecting again")
    wait_until(
        lambda: [ping for ping in peer.frames("/ws", "ping") if ping["conn"] != first.number],
        what="its ping",
    )


def test_whatever_is_heard_counts_as_alive(host, peer):
    agent = start(host, peer, waits={"ping": 0.3, "silence": 0.6})
    connection = peer.agent()
    connection.pongs = False
    began = time.monotonic()
    while time.monotonic() - began < 2:
        connection.send(
            *random.choice([("ping", b"x"), ("pong", b"unasked"), ("text", message("Nothing", {}))])
        )
        time.sleep(0.1)
    assert len(peer.heads("/ws")) == 1 and agent.process.poll() is None
    assert len(peer.frames("/ws", "ping")) >= 4


def test_pings_are_answered_with_their_payload(host, peer):
    start(host, peer)
    connection = peer.agent()
    payloads = [b"srv-ping-payload", b"", b"x" * 125]
    for payload in payloads:
        connection.send("ping", payload)
    wait_until(lambda: len(peer.frames("/ws", "pong")) == 3, what="three pongs")
    assert [pong["payload"].encode() for pong in peer.frames("/ws", "pong")] == payloads


# --- broken off and closed -------------------------------------------------------------------------------------------


def test_every_close_that_cachix_survives_is_survived(host, peer):
    """As recorded in agent-close-codes; a close is answered, and the TCP connection given up at once."""
    labels = [e["label"] for e in transcript("agent-close-codes") if e.get("event") == "scenario"]
    assert labels[-1] == "close without code"
    agent = start(host, peer)
    codes = [
        int(re.search(r"\d{4}", label)[0]) if label not in BROKEN_OFF else None
        for label in labels[:-1]
    ]
    for number, code in enumerate([*codes, 1002, 1003, 1008, 1013, 3000, 4003, 4999], 1):
        connection = another(peer, number)
        if code is None:
            connection.end()
            continue
        connection.send("close", struct.pack(">H", code) + b"some reason")
        assert connection.ended.wait(5), code
        answers = [f for f in peer.frames("/ws", "close") if f["conn"] == connection.number]
        assert len(answers) == 1 and agent.process.poll() is None
        agent.wait_for(rf"closed the connection \({code}\): some reason")
    peer.agent().close(None)
    assert agent.wait(12) == 0


@pytest.mark.parametrize(
    "payload", [b"\x03", b"\x00\x00", b"\x03\xed", b"\x03\xee", b"\xff\xff", b"\x03\xe9\xff\xfe"]
)
def test_closes_that_break_the_protocol(host, peer, payload):
    agent = start(host, peer)
    peer.agent().send("close", payload)
    another(peer, 2)
    assert agent.process.poll() is None and "Traceback" not in agent.text()


@pytest.mark.parametrize(
    "raw",
    [
        b"\x83\x00",  # reserved opcode 3
        b"\xc1\x00",  # a reserved bit
        b"\x80\x00",  # a continuation of nothing
        b"\x89\x7e\x00\x80" + b"x" * 128,  # a ping that is too long
        b"\x09\x00",  # a fragmented ping
        b"\x81\xff" + b"\xff" * 8,  # a length that can't be
        b"HTTP/1.1 400 Bad Request\r\n\r\n",
    ],
)
def test_frames_that_break_the_protocol(host, peer, raw):
    agent = start(host, peer, waits={"silence": 1.5, "ping": 0.5})
    peer.agent().raw(raw)
    another(peer, 2)
    assert agent.process.poll() is None and "Traceback" not in agent.text()


def test_replaced_it_warns_and_comes_back_slowly(host, peer):
    agent = start(host, peer, waits={"slowest": 1.5})
    peer.agent().close(4001)
    began = time.monotonic()
    agent.wait_for(r"\(4001\): another agent named web has connected")
    another(peer, 2)
    assert time.monotonic() - began > 0.8
    peer.agent().close(1012)
    began = time.monotonic()
    agent.wait_for(r"\(1012\): it restarts")
    another(peer, 3)
    assert time.monotonic() - began < 1.2


def test_replaced_while_it_bootstraps_it_finishes_and_ends(host, cache, peer):
    system = present(host, cache, nixos(cache, 1, after=wait_for("/run/go-on")))
    agent = start(host, peer, "--bootstrap")
    deployment = peer.deploy(system)
    wait_until(lambda: host.running() == system, what="the activation")
    peer.agent().close(4001)
    agent.wait_for("another agent of this name has taken over")
    host.path("/run/go-on").touch()
    assert peer.finished(deployment)
    assert agent.wait(12) == 0 and len(peer.heads("/ws")) == 1
    assert peer.log(deployment)[-1] == "Successfully activated the deployment."


# --- refused ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("status", ["301", "302", "307", "308"])
def test_a_redirect_is_not_followed_but_told(host, peer, status):
    peer.misbehave("/ws$", status, times=1)
    agent = start(host, peer)
    agent.wait_for(
        rf"{peer.url}/ws answered HTTP {status} instead of a websocket and points to {peer.url}/elsewhere, which is "
        "not followed: give it as --host"
    )
    another(peer, 2)
    assert not peer.heads("/elsewhere") and TOKEN not in agent.text()


@pytest.mark.parametrize("status", ["200", "400", "404", "426", "500", "502", "503"])
def test_no_websocket_is_told_with_its_status(peer, status):
    peer.misbehave("/ws$", status)
    with pytest.raises(Unreachable, match=f"answered HTTP {status} instead of a websocket$"):
        cachix_connection.connect(cachix_connection.Peer(peer.url, TOKEN, "web"), "/ws")


@pytest.mark.parametrize("status", ["401", "403"])
def test_a_token_that_is_refused_later_is_tried_again_slowly(host, peer, status):
    agent = start(host, peer, waits={"slowest": 0.6})
    first = peer.agent()
    fault = peer.misbehave("/ws$", status, times=2)
    first.close(4003)
    agent.wait_for(rf"(?s)refused the token \(HTTP {status}\).*; still trying")
    another(peer, 4)
    assert fault.times == 0 and agent.process.poll() is None and TOKEN not in agent.text()
    tries = [e["t"] for e in peer.events if e.get("event") == "http-request"]
    assert tries[2] - tries[1] > 0.5 and tries[3] - tries[2] > 0.5


def test_a_broken_connection_is_given_up_before_the_next_attempt(host, peer):
    agent = start(host, peer, waits={"slowest": 60.0})
    first = peer.agent()
    first.send("close", struct.pack(">H", 4001))
    assert first.ended.wait(5) and len(peer.heads("/ws")) == 1
    assert agent.stop() == 0


def test_a_workspace_that_is_down_at_first(host, peer):
    peer.stop()
    agent = start(host, peer)
    agent.wait_for("no connection to .*/ws: .*Connection refused")
    peer.restart()
    agent.wait_for("web is connected to")
    assert agent.stop() == 0


def listen(serve):
    """A TCP server with a function for each connection; its URL."""
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        with contextlib.suppress(OSError):
            while True:
                connection, _ = listener.accept()
                threading.Thread(target=quiet, args=(connection,), daemon=True).start()

    def quiet(connection):
        with contextlib.suppress(OSError), connection:
            serve(connection)

    threading.Thread(target=accept, daemon=True).start()
    return listener, f"http://127.0.0.1:{listener.getsockname()[1]}"


def drip(data, pause=0.05):
    """Answer byte by byte, so that no packet is ever late."""

    def serve(connection):
        connection.recv(1 << 16)
        for byte in data:
            connection.sendall(bytes([byte]))
            time.sleep(pause)

    return serve


@pytest.mark.promise(10)
@pytest.mark.parametrize(
    "serve",
    [
        lambda connection: time.sleep(30),
        drip(b"HTTP/1.1 101 Switching Protocols\r\n" + b"X-A: b\r\n" * 1000),
        drip(b"HTTP/1.1 500 No\r\nContent-Length: 100000\r\n\r\n" + b"x" * 100000),
    ],
)
@pytest.mark.parametrize("scheme", ["http", "https"])
def test_connecting_has_a_deadline(serve, scheme):
    listener, url = listen(serve)
    began = time.monotonic()
    with pytest.raises(Unreachable, match="no connection to|instead of a websocket"):
        cachix_connection.connect(
            cachix_connection.Peer(url.replace("http", scheme, 1), TOKEN), "/ws", timeout=0.6
        )
    assert time.monotonic() - began < 3
    listener.close()


@pytest.mark.promise(10)
def test_reaching_has_a_deadline(peer):
    for kind in ("no-pong", "half-open", "silent"):
        peer.misbehave("/ws-deployment", kind, times=1)
        began = time.monotonic()
        with pytest.raises(Unreachable):
            cachix_connection.reach(cachix_connection.Peer(peer.url, TOKEN, "web"), 0.5)
        assert time.monotonic() - began < 3
    cachix_connection.reach(cachix_connection.Peer(peer.url, TOKEN, "web"), 5)


# --- messages --------------------------------------------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
    ),
    max_leaves=8,
)
KNOWN = {
    "id": AGENT_ID, "storePath": "/nix/store/x", "index": 1, "rollbackScript": None, "resumed": True, "cache": None,
    "reports": "http", "time": "t", "closureSize": 1, "hasSucceeded": True, "uri": "http://a",
    "cacheName": "c", "publicKey": "k", "isPublic": True,
}  # fmt: skip
CONTENTS = st.dictionaries(st.sampled_from(list(KNOWN)), JSON, max_size=3).map(
    lambda changed: {**KNOWN, **changed}
)
TAGS = st.sampled_from(
    ["AgentRegistered", "Deployment", "DeploymentStarted", "DeploymentFinished", "Other"]
)
COMMANDS = st.builds(
    lambda tag, c: {"command": {"tag": tag, "contents": c, **c}},
    TAGS,
    CONTENTS | JSON.map(lambda v: {"cache": v}),
)


TEXTS = st.one_of(st.text(), JSON.map(json.dumps), COMMANDS.map(json.dumps))


@pytest.mark.promise(13)
@settings(deadline=None, max_examples=300)
@given(
    st.one_of(st.binary(), TEXTS, TEXTS.map(lambda text: text.encode("utf-16", "surrogatepass")))
)
def test_decoders_say_undecodable_and_nothing_else(text):
    for decode in (decode_to_agent, decode_from_agent):
        with contextlib.suppress(Undecodable):
            value = decode(text)
            assert cachix_protocol.UUID.fullmatch(value.id)
            if decode is decode_to_agent:
                assert decode(cachix_protocol.encode_to_agent(value)) == value
            else:
                assert decode(cachix_protocol.encode_from_agent(AGENT_ID, value)) == value


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 200_000, "9" * 10_000, b"\xff\xfe", b"\0", "\ud800"]
)
def test_texts_that_break_parsers(text):
    with pytest.raises(Undecodable):
        decode_to_agent(text)


def odd_messages(rng):
    """Messages that are nearly right, deterministically."""
    odd = [
        None,
        True,
        -1,
        0,
        1.5,
        10**30,
        "",
        "x",
        "\0",
        "\ud800",
        "a\nb",
        [],
        {},
        [[]],
        "/nix/store/../etc",
        "--help",
    ]
    for _ in range(150):
        contents = {**KNOWN, "id": rng.choice([AGENT_ID, "x", 1])}
        for name in rng.sample(list(KNOWN), rng.randint(0, 3)):
            contents[name] = rng.choice(odd)
        tag = rng.choice(["AgentRegistered", "Deployment", "Deployment", ""])
        yield json.dumps({"command": {"tag": tag, "contents": contents}})
    for _ in range(50):
        yield "".join(rng.choice('{}[]",:0\\u\n') for _ in range(rng.randint(0, 60)))


@pytest.mark.promise(13)
def test_it_survives_a_heap_of_garbage(host, cache, peer):
    rng = random.Random(2026)
    path = present(host, cache, plain(cache, 1))
    agent = start(host, peer)
    connection = peer.agent()
    for text in odd_messages(rng):
        kind = rng.choice(["text", "binary"])
        connection.send_text(text, rng.randint(1, 3), kind)
    connection.send("text", bytes(rng.randrange(256) for _ in range(1000)))
    peer.register(connection, cache=None)
    deployment = peer.deploy(path)
    assert peer.finished(deployment), peer.log(deployment)
    assert agent.process.poll() is None and len(peer.heads("/ws")) == 1
    assert "Traceback" not in agent.text(), agent.text()


@pytest.mark.promise(6, 13)
def test_every_order_with_an_odd_value_gets_its_report(host, cache, peer):
    """What can be decoded is never met with silence, and is nothing that Nix could take for an option."""
    agent = start(host, peer)
    peer.agent()
    good = present(host, cache, plain(cache, 1))
    for path, script in (
        ("", None), ("--help", None), ("\ud800", None), ("a\0b", None), ("/nix/store/..", None), (good + "/..", None),
        (good, ""), (good, "--option"), (good, "\0"), (good, "/bin/sh"), ("x" * 100_000, None), (good + "\n", None),
    ):  # fmt: skip
        deployment = peer.deploy(path, script)
        assert not peer.finished(deployment, 20)
        wait_until(
            lambda d=deployment: peer.log(d)[-1:] and "is not a store path" in peer.log(d)[-1],
            20,
            "its reason",
        )
    for index in (-1, 0, 10**30):
        assert peer.finished(peer.deploy(good, index=index), 20)
    assert "Traceback" not in agent.text() and host.record() == []


@pytest.mark.promise(13)
@pytest.mark.parametrize(
    ("odd", "public"),
    [
        ({"uri": "http://["}, True),
        ({"uri": "http://["}, False),
        ({"uri": "http://a:b"}, False),
        ({"uri": "\0"}, True),
        ({"uri": "--help"}, False),
        ({"cacheName": "a]", "uri": None}, False),
        ({"publicKey": "\ud800"}, True),
        ({"publicKey": "\0"}, False),
    ],
)
def test_a_cache_that_is_none_ends_the_deployment_with_a_reason(host, cache, peer, odd, public):
    peer.cache = {**cache.wire(), "isPublic": public, **odd}
    agent = start(host, peer)
    deployment = peer.deploy("/nix/store/00000000000000000000000000000000-nope")
    assert not peer.finished(deployment, 20)
    wait_until(
        lambda: [line for line in peer.log(deployment) if line.startswith("Failed to")],
        what="its reason",
    )
    assert agent.process.poll() is None and "Traceback" not in agent.text()
    assert not [name for name in os.listdir(host.state) if "netrc" in name]


@pytest.mark.parametrize("size", [0, 100, 200, 70_000])
def test_masked_frames_are_taken(host, cache, peer, size):
    path = present(host, cache, plain(cache, 1))
    start(host, peer)
    contents = {
        "storePath": path,
        "id": AGENT_ID,
        "index": 1,
        "rollbackScript": None,
        "padding": "x" * size,
    }
    data = message("Deployment", contents).encode()
    mask = b"\x01\x80\xff\x00"
    masked = bytes(byte ^ mask[i % 4] for i, byte in enumerate(data))
    length = (
        struct.pack(">BH", 254, len(data))
        if len(data) < 1 << 16
        else struct.pack(">BQ", 255, len(data))
    )
    peer.agent().raw(b"\x81" + length + mask + masked)
    assert peer.finished(AGENT_ID)


# --- proxies and TLS -------------------------------------------------------------------------------------------------


class Proxy:
    """An HTTP proxy for tests: CONNECT, and requests with absolute URLs. It notes what it is asked."""

    def __init__(self, password=""):
        self.asked, self.password = [], password
        proxy = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def allowed(self):
                proxy.asked.append(f"{self.command} {self.path}")
                wanted = "Basic " + base64.b64encode(proxy.password.encode()).decode()
                if proxy.password and self.headers["Proxy-Authorization"] != wanted:
                    self.send_error(407)
                    return False
                return True

            def do_CONNECT(self):
                if self.allowed():
                    name, _, port = self.path.rpartition(":")
                    with socket.create_connection((name, int(port)), 10) as upstream:
                        self.send_response(200)
                        self.end_headers()
                        pump(self.connection, upstream)
                self.close_connection = True

            def do_PUT(self):
                if self.allowed():
                    parts = cachix_connection.urllib.parse.urlsplit(self.path)
                    upstream = http.client.HTTPConnection(parts.netloc, timeout=10)
                    body = self.rfile.read(int(self.headers["Content-Length"]))
                    kept = {
                        k: v for k, v in self.headers.items() if not k.lower().startswith("proxy-")
                    }
                    upstream.request("PUT", f"{parts.path}?{parts.query}".rstrip("?"), body, kept)
                    answer = upstream.getresponse()
                    data = answer.read()
                    self.send_response(answer.status)
                    self.send_header("Content-Type", answer.headers["Content-Type"])
                    self.send_header("Content-Length", str(len(data)))
                    self.end_headers()
                    self.wfile.write(data)
                    upstream.close()

            def log_message(self, *_):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.port = self.server.server_address[1]
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


def pump(one, other):
    """Carry bytes both ways until either side ends."""

    def carry(source, target):
        with contextlib.suppress(OSError, ValueError):
            while True:
                data = source.recv(1 << 16)
                if not data:
                    break
                target.sendall(data)
        for sock in (source, target):
            with contextlib.suppress(OSError):
                sock.shutdown(socket.SHUT_RDWR)

    thread = threading.Thread(target=carry, args=(other, one), daemon=True)
    thread.start()
    carry(one, other)
    thread.join(10)


@pytest.fixture
def make_proxy():
    made = []

    def make(password=""):
        made.append(Proxy(password))
        return made[-1]

    yield make
    for proxy in made:
        proxy.close()


@pytest.mark.parametrize("form", ["http_proxy", "scheme-less", "credentials"])
def test_the_proxy_of_the_environment_is_used_for_everything(host, cache, peer, make_proxy, form):
    proxy = make_proxy("joe:pass word" if form == "credentials" else "")
    peer.reports = "http"
    url = {"scheme-less": "127.0.0.1", "credentials": "http://joe:pass%20word@127.0.0.1"}.get(
        form, "http://127.0.0.1"
    )
    path = present(host, cache, plain(cache, 1))
    start(host, peer, http_proxy=f"{url}:{proxy.port}")
    assert peer.finished(peer.deploy(path))
    ways = {entry.split(" ")[0] for entry in proxy.asked}
    assert ways == {"CONNECT", "PUT"} and f"CONNECT {peer.url[7:]}" in proxy.asked
    connects = [entry for entry in proxy.asked if entry.startswith("CONNECT")]
    assert len(connects) == len(peer.heads("/ws")) + len(peer.heads("/ws-deployment"))


@pytest.mark.parametrize("name", ["no_proxy", "NO_PROXY"])
@pytest.mark.parametrize("value", ["127.0.0.1", "localhost,127.0.0.1", "*"])
def test_no_proxy(host, cache, peer, make_proxy, name, value):
    proxy = make_proxy()
    peer.reports = "http"
    path = present(host, cache, plain(cache, 1))
    start(host, peer, http_proxy=f"http://127.0.0.1:{proxy.port}", **{name: value})
    assert peer.finished(peer.deploy(path))
    assert proxy.asked == []


def test_a_proxy_that_refuses_is_told(host, peer, make_proxy):
    proxy = make_proxy("joe:secret")
    agent = start(host, peer, http_proxy=f"http://joe:wrong-one@127.0.0.1:{proxy.port}")
    agent.wait_for("no connection to .*proxy.*407")
    assert "wrong-one" not in agent.text() and not peer.heads("/ws")
    assert agent.stop() == 0


@pytest.fixture
def certificate(tmp_path):
    """A certificate of 127.0.0.1 that nobody has signed but itself: files with it, and with its key too."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "tests")])
    today = datetime.datetime(2026, 1, 1)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(today - datetime.timedelta(days=3650))
        .not_valid_after(today + datetime.timedelta(days=36500))
        .add_extension(
            x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False
        )
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), True)
        .sign(key, hashes.SHA256())
    )
    public = made.public_bytes(serialization.Encoding.PEM)
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (tmp_path / "ca.pem").write_bytes(public)
    (tmp_path / "both.pem").write_bytes(public + private)
    return tmp_path / "ca.pem", tmp_path / "both.pem"


@pytest.fixture
def secured(peer, certificate):
    """The peer behind TLS: its URL."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate[1])

    def serve(connection):
        connection.settimeout(60)
        upstream = socket.create_connection(("127.0.0.1", peer.port), 60)
        with upstream, context.wrap_socket(connection, server_side=True) as inside:
            pump(inside, upstream)

    listener, url = listen(serve)
    yield url.replace("http:", "https:")
    listener.close()


@pytest.mark.parametrize("variable", ["SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"])
def test_tls_with_the_bundle_of_the_environment(host, cache, peer, secured, certificate, variable):
    """The agent's websocket, its reports, and the switch process's look whether the workspace can be reached."""
    peer.reports = "http"
    path = present(host, cache, plain(cache, 1))
    agent = start(host, peer, url=secured, **{variable: str(certificate[0])})
    assert peer.finished(peer.deploy(path)), agent.text()
    assert peer.heads("/ws-deployment") and len(peer.heads("/ws")) == 1


def test_tls_through_a_proxy(host, cache, peer, secured, certificate, make_proxy):
    proxy = make_proxy()
    peer.reports = "http"
    path = present(host, cache, plain(cache, 1))
    env = {"https_proxy": f"http://127.0.0.1:{proxy.port}", "SSL_CERT_FILE": str(certificate[0])}
    start(host, peer, url=secured, **env)
    assert peer.finished(peer.deploy(path))
    assert set(proxy.asked) == {f"CONNECT {secured[8:]}"} and len(proxy.asked) >= 3


def test_tls_that_nobody_vouches_for_is_refused(host, peer, secured, monkeypatch):
    agent = start(host, peer, url=secured)
    agent.wait_for(rf"no connection to {secured}/ws: .*certificate verify failed")
    assert not peer.heads() and agent.process.poll() is None
    for name in ("SSL_CERT_FILE", "NIX_SSL_CERT_FILE", "REQUESTS_CA_BUNDLE"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(Unreachable, match="certificate verify failed"):
        cachix_connection.http(cachix_connection.Peer(secured, TOKEN, "web"), "PUT", "/x")
    assert not peer.heads()


def test_tls_for_another_name_is_refused(peer, secured, certificate, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate[0]))
    other = cachix_connection.Peer(secured.replace("127.0.0.1", "localhost"), TOKEN, "web")
    with pytest.raises(Unreachable, match="[Hh]ostname mismatch|doesn't match"):
        cachix_connection.connect(other, "/ws", 5)
    with pytest.raises(Unreachable, match="[Hh]ostname mismatch|doesn't match"):
        cachix_connection.http(other, "PUT", "/x")
    assert not peer.heads()


@pytest.mark.parametrize(
    ("given", "system", "wanted"),
    [
        ("SNR", "1", "S"),
        ("NR", "1", "N"),
        ("R", "1", "R"),
        ("", "12", "1"),
        ("", "2", "2"),
        ("", "", None),
        ("sN", "1", "N"),
        ("snr", "1", "1"),
        ("snr", "", None),
    ],
)
def test_which_bundle_counts(tmp_path, monkeypatch, given, system, wanted):
    """Small letters name files that are not there."""
    names = {"S": "SSL_CERT_FILE", "N": "NIX_SSL_CERT_FILE", "R": "REQUESTS_CA_BUNDLE"}
    for letter, variable in names.items():
        (tmp_path / letter).write_text("")
        monkeypatch.delenv(variable, raising=False)
        if letter in given.upper():
            monkeypatch.setenv(variable, str(tmp_path / (letter if letter in given else "missing")))
    for letter in system:
        (tmp_path / letter).write_text("")
    monkeypatch.setattr(cachix_deploy, "SYSTEM_BUNDLES", (str(tmp_path / "1"), str(tmp_path / "2")))
    assert ca_bundle() == (certifi.where() if wanted is None else str(tmp_path / wanted))


# --- ended -----------------------------------------------------------------------------------------------------------


def ends_in_time(agent):
    began = time.monotonic()
    agent.signal(signal.SIGTERM)
    assert agent.wait(12) == 0
    assert time.monotonic() - began < 10
    assert "Traceback" not in agent.text()


@pytest.mark.promise(10)
@pytest.mark.skipif(os.geteuid() != 0, reason="only root may listen on the port of name servers")
def test_it_ends_while_the_name_server_hangs(host):
    address = f"127.{random.randint(1, 254)}.{random.randint(1, 254)}.77"
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as server:
        server.bind((address, 53))
        server.settimeout(20)
        (host.directory / "resolv.conf").write_text(
            f"nameserver {address}\noptions timeout:30 attempts:5\n"
        )
        host.output("mount", "--bind", str(host.directory / "resolv.conf"), "/etc/resolv.conf")
        agent = start(host, None, url="http://workspace.example")
        assert server.recv(1000)
        ends_in_time(agent)


@pytest.mark.promise(10)
def test_it_ends_while_it_downloads(host, cache, peer):
    peer.cache = cache.wire()
    path = nixos(cache, 1)
    cache.misbehave("/nar/", "stall")
    agent = start(host, peer)
    deployment = peer.deploy(path)
    wait_until(lambda: cache.count("/nar/"), what="the download")
    ends_in_time(agent)
    assert host.step(deployment) == "downloading" and host.record() == []
    wait_until(lambda: not host.processes(), 10, "the end of all that it had started")
    assert not [name for name in os.listdir(host.state) if "netrc" in name]
    cache.heal()
    cache.ended.set()
    start(host, peer)
    assert peer.finished(deployment) and host.running() == path


@pytest.mark.promise(10)
def test_it_ends_while_it_waits_to_connect_again(host, peer):
    peer.stop()
    agent = start(host, peer, waits={"backoff": 60.0, "slowest": 60.0})
    agent.wait_for("no connection")
    began = time.monotonic()
    ends_in_time(agent)
    assert time.monotonic() - began < 3


def test_it_says_goodbye(host, peer):
    agent = start(host, peer)
    agent.wait_for("is connected")
    ends_in_time(agent)
    closes = peer.frames("/ws", "close")
    assert [frame["close_code"] for frame in closes] == [1000]


# --- patience --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("failures", "most"), [(0, 1), (1, 2), (2, 4), (5, 32), (6, 60), (7, 60), (16, 60), (10**6, 60)]
)
def test_backoff_is_exponential_with_full_jitter(failures, most):
    random.seed(failures)
    pauses = [backoff(failures, Waits()) for _ in range(400)]
    assert 0 <= min(pauses) < most * 0.05 and most * 0.95 < max(pauses) <= most
    assert 0.4 * most < sum(pauses) / len(pauses) < 0.6 * most


def test_waits_of_the_environment(monkeypatch):
    monkeypatch.delenv("CACHIX_DEPLOY_WAITS", raising=False)
    assert Waits.from_environment() == Waits()
    assert (Waits().ping, Waits().silence, Waits().slowest) == (30, 60, 60)
    monkeypatch.setenv("CACHIX_DEPLOY_WAITS", '{"ping": 1, "unknown": 2}')
    assert Waits.from_environment() == Waits(ping=1.0)


# --- deadlines for the whole, not for each packet --------------------------------------------------------------------


@pytest.fixture
def trickle():
    """A server that answers a byte every 50 ms, and never comes to an end; its URL."""
    ended = threading.Event()
    listener = socket.create_server(("127.0.0.1", 0))

    def serve():
        with contextlib.suppress(OSError):
            while True:
                accepted = listener.accept()[0]
                threading.Thread(target=answer, args=(accepted,), daemon=True).start()

    def answer(accepted):
        with contextlib.suppress(OSError), accepted:
            while not ended.wait(0.05):
                accepted.sendall(b"H")

    threading.Thread(target=serve, daemon=True).start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    ended.set()
    listener.close()


@pytest.mark.promise(10)
@pytest.mark.parametrize("proxied", [False, True])
@pytest.mark.parametrize(
    "call",
    [
        cachix_connection.connect,
        lambda peer, path, timeout: cachix_connection.http(peer, "GET", path, timeout),
    ],
)
def test_an_answer_that_trickles_has_a_deadline(trickle, monkeypatch, call, proxied):
    if proxied:
        monkeypatch.setenv("http_proxy", trickle)
        monkeypatch.setenv("no_proxy", "")
    peer = cachix_connection.Peer("http://example.invalid" if proxied else trickle, "token", "web")
    began = time.monotonic()
    with pytest.raises(cachix_protocol.Unreachable, match="no answer within 1 s"):
        call(peer, "/ws", 1.0)
    assert time.monotonic() - began < 5
