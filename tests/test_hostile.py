"""A workspace, or an agent, that is out to fool or to fill whoever talks to it."""

import base64
import contextlib
import gc
import gzip
import io
import json
import os
import re
import struct
import subprocess
import sys
import threading
import tracemalloc
from pathlib import Path
from urllib.parse import quote

import closures
import pytest
from hosts import PROJECT, command, wait_until
from hypothesis import given
from hypothesis import strategies as st
from peer import Gone, message

import cachix_connection
import cachix_console
from activate import journal, lock, outcomes, process
from activate import text as texts
from activate.text import brief, clean
from cachix_protocol import Unreachable
from cachix_websocket import TooLarge

TOKEN = "hostile-SECRET/" + "k" * 20
EVIL = (
    "\x1b]0;title\x07\x1b[2J\x1b[1;1H\x9b2J\x9d0;x\x9c\r\x1bP+q\x1b\\\x08\x0b\x0c\x85\u2028\u2029"
    "\u202a\u202e\u2066\u2069\u200f\u00ad"
)
BAD = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f\xad\u200e\u200f\u2028-\u202e\u2066-\u2069]")
SPELLINGS = [
    TOKEN,
    quote(TOKEN, safe=""),
    *(base64.b64encode(f"{user}:{TOKEN}".encode()).decode() for user in ("", "x", "jo")),
]
MEBIBYTE = 1 << 20


@pytest.fixture
def hidden(monkeypatch):
    """The token, hidden for this test alone."""
    monkeypatch.setattr(texts, "_secrets", {})
    texts.hide(TOKEN)


def shows_token(text):
    """Whether a text has the token in any spelling, or six bytes of it in base64."""
    middle = {base64.b64encode(b"\0" * n + TOKEN.encode())[8:24].decode() for n in range(3)}
    return any(part in text for part in (*SPELLINGS, *middle))


# --- what is printed ------------------------------------------------------------------------------


@given(st.text(st.sampled_from("\x1b[]m;0123?PX^_\\\x07\x9b\x9d\r\nab\u202e") | st.characters()))
def test_nothing_of_a_text_does_anything_to_a_terminal(text):
    for most in (5, 20, 500):
        for colour in (False, True):
            cleaned = clean(text, colour, most)
            plain = re.sub(r"\x1b\[[0-9;:]*m", "", cleaned)
            assert not BAD.search(plain) and len(plain) <= most
        assert "\x1b" not in clean(text, most=most)


def test_a_text_of_others_is_one_line_of_500_characters():
    assert len(brief("x" * 5_000_000)) == 500
    assert brief("a\r\nb\u2028c\x85d") == "a b c d"
    assert not BAD.search(brief(EVIL + "\nerror: forged"))


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_token_is_hidden_in_every_spelling(hidden, spelling):
    for text in (
        f"you sent {spelling}",
        "x" * 490 + spelling,
        f"{spelling[:9]}\x1b[K{spelling[9:]}",
    ):
        assert not shows_token(clean(text)) and not shows_token(brief(text))
    assert texts.REDACTED in clean(f"you sent {spelling}")


def test_short_words_are_no_secrets(monkeypatch):
    monkeypatch.setattr(texts, "_secrets", {})
    texts.hide("t")
    assert clean("a test") == "a test"


def test_stderr_takes_text_of_any_kind_from_anybody(monkeypatch):
    raw = io.BytesIO()
    stream = cachix_console.Stderr(raw, "utf-8", "backslashreplace", line_buffering=True)
    monkeypatch.setattr(sys, "stderr", stream)
    print(f"some library: {EVIL}", file=sys.stderr)
    cachix_console.tell(f"first{EVIL}\nforged\rline" + "x" * 5_000_000)
    cachix_console.complain(ValueError(f"{EVIL}\nerror: forged"))
    lines = raw.getvalue().decode().split("\n")
    assert not [line for line in lines if BAD.search(line) or len(line) > 2000]
    assert len([line for line in lines if line.startswith("error:")]) == 1
    assert lines[3].startswith("  ValueError: ")


def test_results_on_stdout_are_lines_of_their_own(capsys):
    from cachix_workspace.cli.output import show_json, show_table

    show_table([["NAME", "VERSION"], [f"web{EVIL}", f"1\nforged{EVIL}" + "y" * 5000]])
    out = capsys.readouterr().out
    lines = out.split("\n")
    assert len(lines) == 3 and not any(map(BAD.search, lines)) and len(out) < 1200
    show_json([{"name": EVIL}])
    assert json.loads(capsys.readouterr().out) == [{"name": EVIL}]


def test_reasons_and_our_own_lines_of_a_log(hidden, tmp_path):
    record = journal.Record("i", 1, "web", "http://x", "p", reason=f"no{EVIL} {TOKEN}", detail=EVIL)
    lines = (outcomes.reason_of(record) or "").split("\n")
    assert len(lines) == 2 and not any(map(BAD.search, lines)) and not shows_token(lines[0])
    file = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    process.say(file, f"refused: {EVIL} {TOKEN}")
    os.close(file)
    text = (tmp_path / "log").read_text()
    assert not BAD.search(text.rstrip("\n")) and not shows_token(text)


# --- a workspace that misbehaves ------------------------------------------------------------------


def test_an_agent_prints_nothing_that_a_workspace_forges(host, peer):
    agent = host.agent("web", peer.url, TOKEN, env={"CACHIX_DEPLOY_WAITS": '{"backoff": 0.05}'})
    connection = peer.agent()
    connection.send_text(message(f"{EVIL}\nforged", {}))
    connection.send_text(message("Deployment", {"id": EVIL, "storePath": "x", "index": 1}))
    agent.wait_for("unknown tag")
    for reason in (*SPELLINGS, f"{EVIL}\rforged"):
        connection = peer.agent()
        connection.close(4000, reason)
        wait_until(lambda former=connection: peer.agent() is not former, what="a new connection")
    agent.wait_for(r"\(4000\)")
    text = agent.text()
    assert agent.process.poll() is None and not shows_token(text)
    lines = text.split("\n")
    assert not any(map(BAD.search, lines)) and max(map(len, lines)) < 2100
    assert not [line for line in lines if line.startswith("forged")]


def test_activate_does_not_print_a_token_that_is_echoed(peer, tmp_path):
    echo = {"error": f"{EVIL}\nerror: forged; you sent "}
    spec = tmp_path / "deploy.json"
    spec.write_text(json.dumps({"agents": {"web": "/nix/store/" + "0" * 32 + "-x"}}))
    for spelling in SPELLINGS:
        peer.answers.clear()
        peer.answer("POST", lambda _, s=spelling: (422, {"error": echo["error"] + s}))
        argv = [*command("cachix-deploy"), "--verbose", "--host", peer.url, "activate", str(spec)]
        environment = {"PATH": os.environ["PATH"], "CACHIX_ACTIVATE_TOKEN": TOKEN}
        done = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
        assert done.returncode == 1 and texts.REDACTED in done.stderr
        assert not shows_token(done.stdout + done.stderr) and "\x1b" not in done.stderr
        assert len(re.findall("(?m)^error:", done.stderr)) == 1


# --- memory ---------------------------------------------------------------------------------------


@contextlib.contextmanager
def at_most(size):
    """Check that not more than so many bytes are allocated meanwhile."""
    tracemalloc.start()
    try:
        yield
        assert tracemalloc.get_traced_memory()[1] < size
    finally:
        tracemalloc.stop()


def header(first, size):
    return bytes([first, 127]) + struct.pack(">Q", size)


def a_large_frame(connection, limit):
    connection.raw(header(0x81, limit + 1))  # not a byte of it has to come


def a_terabyte(connection, limit):
    connection.raw(header(0x82, 1 << 40))


def large_fragments(connection, limit):
    connection.raw(header(0x01, limit) + b"x" * limit + b"\x00\x01x")


def many_fragments(connection, limit):
    connection.raw(b"\x01\x01x" + b"\x00\x00" * 10_000)


@pytest.mark.parametrize(
    "flood", [a_large_frame, a_terabyte, large_fragments, many_fragments], ids=lambda f: f.__name__
)
@pytest.mark.parametrize(
    ("path", "limit"), [("/ws", MEBIBYTE), ("/api/v1/deploy/log/x?view=true", 32 * MEBIBYTE)]
)
def test_a_message_has_a_limit(peer, path, limit, flood):
    sock = cachix_connection.connect(cachix_connection.Peer.create(peer.url, TOKEN), path)
    connection = peer.connection(path.partition("?")[0])
    if path == "/ws":
        sock.recv_data_frame()
    threading.Thread(target=flood, args=(connection, limit), daemon=True).start()
    problem = f"a message of more than {limit >> 20} MiB"
    with pytest.raises(TooLarge, match=problem), at_most(4 * limit + 4 * MEBIBYTE):
        while True:
            sock.recv_data_frame(control_frame=True)
    assert connection.ended.wait(5)
    codes = [frame["close_code"] for frame in peer.frames(kind="close")]
    assert codes == [1009]


@pytest.mark.parametrize("path", ["/ws", "/api/v1/deploy/log/x?view=true"])
def test_messages_up_to_the_limit_arrive(peer, path):
    sock = cachix_connection.connect(cachix_connection.Peer.create(peer.url, TOKEN), path)
    connection = peer.connection(path.partition("?")[0])
    if path == "/ws":
        sock.recv_data_frame()
    size = MEBIBYTE if path == "/ws" else 4 * MEBIBYTE
    for _ in range(3):  # each counts for itself
        frames = header(0x01, size // 2) + b"x" * (size // 2) + b"\x89\x01y"
        frames += header(0x80, size // 2) + b"x" * (size // 2)
        threading.Thread(target=connection.raw, args=(frames,), daemon=True).start()
        frames = [sock.recv_data_frame(control_frame=True) for _ in range(2)]
        assert sorted(len(frame.data) for _, frame in frames) == [1, size]


def test_an_agent_says_so_and_connects_again(host, peer):
    agent = host.agent("web", peer.url, TOKEN, env={"CACHIX_DEPLOY_WAITS": '{"backoff": 0.05}'})
    connection = peer.agent()
    before = agent.memory()
    with contextlib.suppress(Gone):
        connection.raw(header(0x81, 1 << 40))
        for _ in range(100):
            connection.raw(b"x" * MEBIBYTE)
    agent.wait_for("the connection was lost: a message of more than 1 MiB")
    wait_until(lambda: len(peer.heads("/ws")) == 2, what="the second connection")
    assert agent.memory() - before < 30 * MEBIBYTE


BOMB = gzip.compress(b"\0" * (64 * MEBIBYTE), 9)


@pytest.mark.parametrize(
    ("head", "body", "problem"),
    [
        (f"Content-Length: {2 * MEBIBYTE}", b"x" * 2 * MEBIBYTE, "larger than 1 MiB"),
        ("X: endless", b"x" * 8 * MEBIBYTE, "larger than 1 MiB"),
        (
            "Transfer-Encoding: chunked",
            b"800000\r\n" + b"x" * 8 * MEBIBYTE,
            "larger than 1 MiB",
        ),
        ("Transfer-Encoding: chunked", b"1" * 8 * MEBIBYTE, ""),
        (f"Content-Encoding: gzip\r\nContent-Length: {len(BOMB)}", BOMB, "is encoded as"),
        (f"Content-Encoding: gzip, gzip\r\nContent-Length: {len(BOMB)}", BOMB, "is encoded as"),
    ],
    ids=["large", "endless", "chunked", "endless-chunk-size", "gzip", "gzip-gzip"],
)
def test_an_answer_to_an_agent_has_a_limit(peer, monkeypatch, head, body, problem):
    def respond(connection, status, answer):
        with contextlib.suppress(Exception):
            connection.write(f"HTTP/1.1 200 OK\r\n{head}\r\n\r\n".encode())
            for at in range(0, len(body), 1 << 16):
                connection.write(body[at : at + (1 << 16)])
        connection.end()

    monkeypatch.setattr(peer, "_respond", respond)
    agent = cachix_connection.Peer.create(peer.url, TOKEN, "web")
    with pytest.raises(Unreachable, match=problem), at_most(6 * MEBIBYTE):
        cachix_connection.http(agent, "GET", "/x")
    assert "accept-encoding: identity" in peer.heads("/x")[0].lower()


def test_answers_are_in_no_reference_cycle(peer):
    body = {"x": "y" * 900_000}
    peer.answer("GET /small", lambda _: (200, body))
    peer.answer("GET /large", lambda _: (200, {"x": "y" * 2_000_000}))
    agent = cachix_connection.Peer.create(peer.url, TOKEN, "web")
    cachix_connection.http(agent, "GET", "/small")
    gc.collect()
    gc.disable()
    tracemalloc.start()
    problems = []
    try:
        for _ in range(20):
            assert cachix_connection.http(agent, "GET", "/small").status == 200
            try:
                cachix_connection.http(agent, "GET", "/large")
            except Unreachable as error:
                problems.append(error)  # as a caller may do
        peer.events.clear()
        objects = [
            trace.size
            for trace in tracemalloc.take_snapshot().statistics("lineno")
            if "cachix_" in trace.traceback[0].filename
        ]
        assert sum(objects) < 2 * MEBIBYTE and len(problems) == 20
    finally:
        tracemalloc.stop()
        gc.enable()


# --- the program's own protection -----------------------------------------------------------------

PROTECTED = """
import ctypes, os, resource, subprocess, sys
sys.path.insert(0, sys.argv[1])
from activate import process, startup
startup.protect()
startup.protect()
print(ctypes.CDLL(None).prctl(3, 0, 0, 0, 0), resource.getrlimit(resource.RLIMIT_CORE)[0])
print(oct(os.umask(0)), os.path.exists(f"/proc/self/fd/{os.open('/', os.O_RDONLY)}"))
print(process.output(["sh", "-c", "umask; ulimit -S -c"]).split())
print(resource.getrlimit(resource.RLIMIT_CORE)[0])
"""


def user_of_test():
    """An ordinary user where there is one to be had."""
    return {"user": 65534, "group": 65534, "extra_groups": []} if os.geteuid() == 0 else {}


def test_a_protected_process_dumps_nothing_and_what_it_runs_may(tmp_path):
    def limit():
        import resource

        resource.setrlimit(resource.RLIMIT_CORE, (4096, 8192))

    for more in ({}, user_of_test()):
        python = "/usr/bin/python3" if more else sys.executable  # which may be below /root
        if not os.path.exists(python):
            pytest.skip("the user of the test has no Python of Debian's")
        argv = [python, "-c", PROTECTED, str(PROJECT)]
        done = subprocess.run(
            argv, capture_output=True, text=True, preexec_fn=limit, cwd="/", **more
        )
        expected = ["0 0", "0o77 True", "['0022', '8']", "0"]  # blocks of 512 bytes
        assert done.stdout.splitlines() == expected, done.stderr


FOREIGN = {"AWS_SECRET_ACCESS_KEY": "other-secret", "DATABASE_URL": "other-secret"}
SCRIPT = """
umask >/nix/var/umask; ulimit -S -c >/nix/var/cores; env >/nix/var/env; touch /nix/var/recorded
while [ ! -e /nix/var/go-on ]; do sleep 0.1; done
"""


def core_limit(pid):
    return re.search(r"core file size\s+(\S+)", Path(f"/proc/{pid}/limits").read_text())[1]


def test_the_switch_process_has_no_secrets_and_commands_have_the_usual_limits(make_machine):
    kept = {"https_proxy": "", "NIX_EXTRA": "1", "SSL_CERT_DIR": "/nowhere"}
    machine = make_machine(env={**FOREIGN, **kept})
    pids = []

    def look():
        wait_until(lambda: machine.host.path("/nix/var/recorded").exists(), what="the activation")
        pids.extend(pid for pid, line in machine.host.processes().items() if " switch " in line)
        result = [
            (Path(f"/proc/{pid}/environ").read_text(), core_limit(pid), process_umask(pid))
            for pid in pids
        ]
        machine.host.path("/nix/var/go-on").touch()
        return result

    results = []
    thread = threading.Thread(target=lambda: results.extend(look()))
    thread.start()
    outcome = machine.deploy(closures.nixos(machine.files, 1, after=SCRIPT))
    thread.join()
    assert outcome.status == "Succeeded" and results
    for environment, cores, umask in results:
        assert "other-secret" not in environment and "NIX_EXTRA=1" in environment
        assert "SSL_CERT_DIR" in environment and (cores, umask) == ("0", "0077")
    assert core_limit(machine.agent.pid) == "0" and process_umask(machine.agent.pid) == "0077"
    assert machine.host.path("/nix/var/umask").read_text().strip() == "0022"
    expected = subprocess.run(["sh", "-c", "ulimit -S -c"], capture_output=True, text=True).stdout
    assert machine.host.path("/nix/var/cores").read_text() == expected
    assert "other-secret" not in machine.host.path("/nix/var/env").read_text()


def process_umask(pid):
    return re.search(r"Umask:\s+(\S+)", Path(f"/proc/{pid}/status").read_text())[1]


# --- a lock directory of another user -------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_a_lock_directory_of_another_user_is_left_alone(host, peer, cache, tmp_path):
    victim = tmp_path / "important"
    victim.write_text("important\n")
    locks = Path(host.environment["XDG_CACHE_HOME"]) / "cachix/deploy/locks"
    locks.mkdir(parents=True)
    os.chown(locks, 1000, 1000)
    for name in ("agent-web.pid", "agent-web.lock", "deployment-web.lock"):
        (locks / name).symlink_to(victim)
    os.mkfifo(locks / "agent-other.lock")
    peer.cache, peer.reports = cache.wire(), "http"
    agent = host.agent("web", peer.url, TOKEN)
    agent.wait_for("is connected to")
    assert peer.finished(peer.deploy(closures.plain(cache, 1)))
    assert agent.text().count(f"{locks} belongs to user 1000: going on without the locks") == 1
    second = host.agent("web", peer.url, TOKEN, "--if-stopped")
    assert second.wait(20) == 0  # the lock in the state directory counts all the same
    assert victim.read_text() == "important\n" and len(list(locks.iterdir())) == 4
    assert not lock.held(str(locks / "agent-other.lock"))
