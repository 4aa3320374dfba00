"""The command `activate` at a scripted workspace: its requests, output and exit status."""

from __future__ import annotations

import contextlib
import http.server
import json
import os
import pathlib
import pty
import random
import re
import signal
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Callable, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from quiet import QuietServer, switch_to_websocket

import cachix_channels
import cachix_ci
import cachix_connection
import cachix_deploy
import cachix_follow
import cachix_order
import cachix_protocol
import cachix_state
from activate.text import STORE_PATH, clean
from cachix_ci import activate_command
from cachix_connection import Peer
from cachix_protocol import Error, Spec, UsageError
from cachix_signed import SecretKey, Signer
from cachix_spec import ActivateOptions, decode_spec

pytestmark = pytest.mark.slow

TRANSCRIPTS = pathlib.Path(__file__).with_name("transcripts")
ROOT = pathlib.Path(cachix_ci.__file__).parent
TOKEN = "ACTIVATE-TOKEN"
SYSTEM, SCRIPT = f"/nix/store/{'a' * 32}-system", f"/nix/store/{'b' * 32}-rollback"
URL = "https://app.example.org/deploy/1"
Step = Union[str, float, int, bytes, threading.Event, None]

# --- a scripted workspace -------------------------------------------------------------------------


def frame(opcode: int, payload: bytes) -> bytes:
    """A websocket frame of a server."""
    size = len(payload)
    if size < 126:
        return struct.pack("!BB", 0x80 | opcode, size) + payload
    return struct.pack("!BBQ", 0x80 | opcode, 127, size) + payload


class Answer:
    """An HTTP answer: JSON, or raw text."""

    def __init__(self, body: Any = "", status: int = 200, **headers: str) -> None:
        text = body if isinstance(body, (bytes, str)) else json.dumps(body)
        self.body = text if isinstance(text, bytes) else text.encode()
        self.status = status
        self.headers = {name.replace("_", "-"): value for name, value in headers.items()}


def state(status: str, **changes: Any) -> Answer:
    """The answer for a deployment with this status."""
    times = {"createdOn": "2026-11-23T19:00:00Z", "startedOn": None, "finishedOn": None}
    record = {"id": str(uuid.uuid4()), "index": 3, "storePath": SYSTEM, "closureSize": None}
    return Answer({**record, **times, "status": status, **changes})


class Workspace:
    """Answers by its script. `states` and `logs` have a list for each agent, whose last item stays.

    A connection of `logs` is a list of steps: a text is a line of the log, bytes are a raw frame, a
    number is a close code, an Event is waited for, and None breaks the connection. After the last
    step the connection stays open.
    """

    def __init__(self, *agents: str) -> None:
        self.ids = {agent: str(uuid.uuid4()) for agent in agents}
        records = {agent: {"id": id, "url": f"{URL}/{agent}"} for agent, id in self.ids.items()}
        self.orders: list[Answer] = [Answer({"agents": records})]
        self.old_orders: list[Answer] = [Answer("no such page", 404)]
        self.states: dict[str, list[Answer]] = {
            agent: [state("Pending"), state("Succeeded")] for agent in agents
        }
        self.logs: dict[str, list[list[Step]]] = {agent: [["hello", 1000]] for agent in agents}
        self.requests: list[tuple[str, str, dict[str, str], bytes]] = []
        self.on_state: Callable[[str], None] = lambda status: None
        workspace = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def handle_one_request(self) -> None:
                with contextlib.suppress(OSError):
                    super().handle_one_request()
                    return
                self.close_connection = True

            def log_message(self, *args: Any) -> None:
                pass

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                workspace.requests.append(("POST", self.path, dict(self.headers.items()), body))
                self.answer(take(workspace.orders if "/v2/" in self.path else workspace.old_orders))

            def do_GET(self) -> None:
                workspace.requests.append(("GET", self.path, dict(self.headers.items()), b""))
                agent = next(agent for agent, id in workspace.ids.items() if id in self.path)
                if "/log/" in self.path:
                    self.close_connection = True
                    self.stream(take(workspace.logs[agent]))
                    return
                answer = take(workspace.states[agent])
                self.answer(answer)
                workspace.on_state(answer.body.decode("utf-8", "replace"))

            def answer(self, answer: Answer) -> None:
                self.send_response(answer.status)
                for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(answer.body)))
                self.end_headers()
                self.wfile.write(answer.body)

            def stream(self, steps: list[Step]) -> None:
                switch_to_websocket(self)
                for step in steps:
                    if isinstance(step, str):
                        line = json.dumps({"line": step, "time": "2026-11-23T19:00:00Z"}).encode()
                        self.wfile.write(frame(1, line))
                    elif isinstance(step, bytes):
                        self.wfile.write(step)
                    elif isinstance(step, threading.Event):
                        assert step.wait(10)
                    elif step is None:
                        return
                    else:
                        self.wfile.write(frame(8, struct.pack("!H", int(step)) if step else b""))
                        break
                while self.rfile.read(1):
                    pass

        def take(script: list[Any]) -> Any:
            return script.pop(0) if len(script) > 1 else script[0]

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        self.host = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def seen(self) -> list[str]:
        """The requests so far, each in a word or two."""
        words = {"POST": "order", "GET": "status"}
        return [
            f"log of {path[-46:-10]}" if "view" in path else words[method]
            for method, path, _, _ in self.requests
        ]


@pytest.fixture
def workspaces() -> Iterator[Callable[..., Workspace]]:
    running: list[Workspace] = []

    def make(*agents: str) -> Workspace:
        running.append(Workspace(*(agents or ("web",))))
        return running[-1]

    yield make
    for workspace in running:
        workspace.server.shutdown()
        workspace.server.server_close()


class Result:
    """The exit status of the command, what it printed, and how long it took."""

    def __init__(self, status: int, out: str, err: str, seconds: float) -> None:
        self.status, self.out, self.err, self.seconds = status, out, err, seconds
        self.lines = out.splitlines()
        self.log = [line for line in self.lines if " | " in line]


def patient(monkeypatch: pytest.MonkeyPatch, seconds: float) -> None:
    """Let the command go on for so many seconds without a usable answer."""
    for module in (cachix_order, cachix_follow):
        monkeypatch.setattr(module, "PATIENCE", seconds)


@pytest.fixture
def activate(
    tmp_path: pathlib.Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run the command in this process, with shorter waits."""
    patient(monkeypatch, 1.0)
    monkeypatch.setattr(cachix_order, "ORDER_PATIENCE", 0.5)
    for name in ("GITHUB_ACTIONS", "GITLAB_CI", "GITHUB_STEP_SUMMARY", "FORCE_COLOR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(cachix_follow, "POLL_SECONDS", 0.1)
    monkeypatch.setattr(cachix_follow, "QUIET_SECONDS", 0.4)
    monkeypatch.setattr(random, "uniform", lambda low, high: low / 10)

    def run(workspace: Union[Workspace, str], spec: Any = None, **options: Any) -> Result:
        if spec is None and isinstance(workspace, Workspace):
            spec = {"agents": dict.fromkeys(workspace.ids, SYSTEM)}
        path = tmp_path / "deploy.json"
        path.write_bytes(spec if isinstance(spec, bytes) else json.dumps(spec).encode())
        host = workspace.host if isinstance(workspace, Workspace) else workspace
        begin = time.monotonic()
        capfd.readouterr()
        message = ""
        try:
            defaults = {"host": host, "token": TOKEN, "spec_path": str(path)}
            status = activate_command(ActivateOptions(**{**defaults, **options}))
        except Error as error:
            status, message = error.status, f"error: {error}\n"
        seconds = time.monotonic() - begin
        out, err = capfd.readouterr()
        assert TOKEN not in out + err + message and "Traceback" not in err
        assert message.count("\n") <= 1, "an error is one line"
        return Result(status, out, err + message, seconds)

    return run


def command(
    *arguments: str, host: str = "http://127.0.0.1:1", **environment: str
) -> dict[str, Any]:
    """Arguments of subprocess that run the program itself."""
    env = {**os.environ, "CACHIX_ACTIVATE_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "TERM": "xterm"}
    for name in ("NO_COLOR", "FORCE_COLOR", "GITHUB_ACTIONS", "GITLAB_CI", "PYTHONIOENCODING"):
        env.pop(name, None)
    argv = [sys.executable, "-m", "cachix_deploy", f"--host={host}", "activate", *arguments]
    return {"args": argv, "env": {**env, **environment}}


# --- requests -------------------------------------------------------------------------------------


def recorded(name: str) -> list[dict[str, Any]]:
    """The events of a recorded session of Cachix's client."""
    text = (TRANSCRIPTS / f"activate-{name}.jsonl").read_text()
    # Cachix's client does not check the store paths, but ours does
    text = text.replace("/nix/store/aaa", SYSTEM).replace("/nix/store/bbb", SCRIPT)
    return [json.loads(line) for line in text.splitlines()]


def parse_request(raw: str) -> tuple[str, str, dict[str, str]]:
    first, *headers = raw.strip().split("\r\n")
    method, path, _ = first.split(" ")
    return method, path.rstrip("?"), dict(header.split(": ", 1) for header in headers)


@pytest.mark.parametrize("name, status", [("succeeded", 0), ("failed", 1), ("cancelled", 1)])
def test_requests_are_those_of_cachix(
    name: str, status: int, workspaces: Any, activate: Any
) -> None:
    events = recorded(name)
    answers = [
        event for event in events if event.get("event") == "http-response" and "body" in event
    ]
    body = next(event["body"] for event in events if event.get("event") == "http-body")
    workspace = workspaces("agent1")
    workspace.ids["agent1"] = json.loads(answers[0]["body"])["agents"]["agent1"]["id"]
    workspace.orders = [Answer(answers[0]["body"])]
    workspace.states["agent1"] = [Answer(answer["body"]) for answer in answers[1:]]
    workspace.logs["agent1"] = [
        [json.loads(event["payload"])["line"] for event in events if event.get("dir") == "S->C"]
    ]
    result = activate(workspace, json.loads(body))

    assert result.status == status
    lines = [f"agent1 | {line}" for line in workspace.logs["agent1"][0]]
    assert result.log == lines[: len(result.log)]
    assert bool(result.log) == (name != "cancelled")
    raw_requests = [event["raw"] for event in events if event.get("event") == "http-request"]
    theirs = [parse_request(raw) for raw in raw_requests]
    # the viewer has a thread of its own, and may be a moment later here
    ours = sorted(workspace.requests, key=lambda request: "view=true" in request[1])
    theirs.sort(key=lambda request: "view=true" in request[1])
    assert [request[:2] for request in ours] == [request[:2] for request in theirs]
    assert ours[0][3] == body.encode()
    for (_, path, headers, _), (_, _, their_headers) in zip(ours, theirs):
        names = ["Authorization", "Content-Type"]
        for key in [*names, "Upgrade", "Connection"] if "view" in path else names:
            assert headers.get(key) == their_headers.get(key)
        foreign = {"name", "version", "system", "Origin", "Sec-WebSocket-Extensions"}
        assert not foreign & set(headers)


SOURCE = {"commit": "a1b2c3", "title": "Mend \u00fc"}


def test_the_order_has_what_ci_says_about_itself(workspaces: Any, activate: Any) -> None:
    workspace = workspaces()
    assert activate(workspace, source=SOURCE, agents=("web",)).status == 0
    assert json.loads(workspace.requests[0][3]) == {"agents": {"web": SYSTEM}, "source": SOURCE}


def test_cachix_gets_nothing_but_what_it_knows(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspaces()
    monkeypatch.setattr(cachix_order, "HOSTED", workspace.host)
    result = activate(workspace, source=SOURCE, signer=Signer(SecretKey.create("ci-1")))
    assert result.status == 0 and "has no place for signatures" in result.err
    assert json.loads(workspace.requests[0][3]) == {"agents": {"web": SYSTEM}}


def test_a_job_of_github_is_found_in_the_environment(workspaces: Any) -> None:
    """And that `--wait` is passed on."""
    workspace = workspaces()
    workspace.orders = [Answer({"error": FROZEN}, 423)]
    own = {"GITHUB_SHA": "a1b2c3", "GITHUB_REF_NAME": "main", "GITHUB_TOKEN": "secret-of-github"}
    with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
        json.dump({"agents": {"web": SYSTEM}}, file)
        file.flush()
        words = (file.name, "--wait", "--timeout=3")
        process = command(*words, host=workspace.host, **own)
        result = subprocess.run(**process, capture_output=True, text=True, timeout=60)
    assert result.returncode == 1 and result.stderr.count(FROZEN) == 2, result
    body = json.loads(workspace.requests[0][3])
    assert body["source"] == {"commit": "a1b2c3", "branch": "main"}


def test_only_the_chosen_agents_are_deployed(workspaces: Any, activate: Any) -> None:
    workspace = workspaces("web", "db")
    spec = {"agents": {"web": SYSTEM, "other": SYSTEM, "db": SCRIPT}, "rollbackScript": None}
    assert activate(workspace, spec, agents=("db", "web", "db")).status == 0
    assert json.loads(workspace.requests[0][3]) == {"agents": {"web": SYSTEM, "db": SCRIPT}}


def test_paths_on_the_command_line(workspaces: Any, activate: Any) -> None:
    workspace = workspaces("web", "db")
    targets = (f"web={SYSTEM}", f"db={SCRIPT}")
    assert activate(workspace, targets=targets, agents=("web",)).status == 0
    assert json.loads(workspace.requests[0][3]) == {"agents": {"web": SYSTEM}}


@pytest.mark.parametrize(
    ("words", "sentence"),
    [
        (["one.json", "two.json"], "takes one deploy.json"),
        ([f"web={SYSTEM}", "two.json"], "not 'two.json'"),
        ([f"web={SYSTEM}", "db=result"], "not 'db=result'"),
        ([f"web={SYSTEM}", f"web={SCRIPT}"], "agent web is named twice"),
        (["web=/nix/store/short"], 'agents.web is "/nix/store/short"'),
        ([f"={SYSTEM}"], "empty"),
        ([f"dir/web={SYSTEM}"], "can't be read"),
    ],
)
def test_wrong_arguments_of_activate(
    words: list[str], sentence: str, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("CACHIX_ACTIVATE_TOKEN", TOKEN)
    monkeypatch.setattr(cachix_deploy.startup, "protect", lambda writes: None)
    assert cachix_deploy.run(["activate", *words]) in (1, 64)
    assert sentence in capfd.readouterr().err


def test_the_result_of_a_build_is_a_spec(
    workspaces: Any, activate: Any, tmp_path: pathlib.Path
) -> None:
    workspace = workspaces()
    store = tmp_path / "store"
    store.mkdir()
    (store / "deploy.json").write_text(json.dumps({"agents": {"web": SYSTEM}}))
    (tmp_path / "result").symlink_to(store / "deploy.json")
    assert activate(workspace, {}, spec_path=str(tmp_path / "result")).status == 0
    assert json.loads(workspace.requests[0][3]) == {"agents": {"web": SYSTEM}}


def test_async_starts_and_does_not_wait(workspaces: Any, activate: Any) -> None:
    workspace = workspaces("web", "database")
    result = activate(workspace, asynchronous=True)
    assert result.status == 0 and workspace.seen() == ["order"]
    assert f"web       {URL}/web       {SYSTEM}" in result.lines
    assert f"database  {URL}/database  {SYSTEM}" in result.lines


def test_v1_of_the_api_can_only_start(workspaces: Any, activate: Any) -> None:
    for asynchronous, status in ((True, 0), (False, 1)):
        workspace = workspaces()
        workspace.orders = [Answer("", 404)]
        workspace.old_orders = [Answer({"agents": {"web": URL}})]
        result = activate(workspace, asynchronous=asynchronous)
        assert result.status == status and URL in result.out
        paths = [path for _, path, _, _ in workspace.requests]
        assert paths == ["/api/v2/deploy/activate", "/api/v1/deploy/activate"]
        assert ("v1 of its API" in result.err) is not asynchronous


# --- the end --------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [10**400, 1 << 80, -1])
def test_a_size_that_is_none_is_not_shown(workspaces: Any, activate: Any, size: int) -> None:
    workspace = workspaces("web")
    workspace.states["web"] = [state("Succeeded", closureSize=size)]
    result = activate(workspace)
    assert result.status == 0 and result.lines[-1].split()[-2:] == ["-", f"{URL}/web"]


def test_the_summary_has_a_line_for_each_agent(workspaces: Any, activate: Any) -> None:
    workspace = workspaces("web", "db", "mail")
    facts = {"startedOn": "2026-11-23T19:00:00.5Z", "closureSize": 3 << 29}
    end = "2026-11-23T19:00:12.734567891Z"
    workspace.states["web"] = [state("Succeeded", finishedOn=end, **facts)]
    workspace.states["db"] = [state("Failed", finishedOn="2026-11-23T20:01:00Z", **facts)]
    workspace.states["mail"] = [state("Cancelled")]
    result = activate(workspace)
    assert result.status == 1 and result.err == ""
    assert result.lines[-4:] == [
        "",
        f"web   Succeeded  12.2 s   1.5 GiB  {URL}/web",
        f"db    Failed     1:01:00  1.5 GiB  {URL}/db",
        f"mail  Cancelled  -        -        {URL}/mail",
    ]
    assert not any(id in word for word in workspace.seen() for id in [workspace.ids["mail"]])


@pytest.mark.parametrize(
    "line, status, code",
    [
        ("Successfully activated the deployment.", "Failed", 1),
        ("Failed to activate the deployment. It says.", "Succeeded", 0),
    ],
)
def test_the_status_counts_and_not_the_log(
    line: str, status: str, code: int, workspaces: Any, activate: Any
) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [[line, 1000]]
    workspace.states["web"] = [state("InProgress"), state("InProgress"), state(status)]
    result = activate(workspace)
    assert result.status == code and f"web | {line}" in result.log


def test_it_ends_as_soon_as_the_workspace_closes_the_log(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cachix_follow, "POLL_SECONDS", 60.0)
    workspace = workspaces()
    assert activate(workspace).seconds < 30
    assert workspace.seen() == ["order", "status", f"log of {workspace.ids['web']}", "status"]


def test_an_end_during_the_viewers_pause_needs_no_further_connection(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log is complete before the workspace knows of the end."""
    monkeypatch.setattr(random, "uniform", lambda low, high: 10 * high)
    workspace = workspaces()
    workspace.states["web"] = [state("InProgress")] * 4 + [state("Succeeded")]
    result = activate(workspace)
    assert result.status == 0 and result.log == ["web | hello"]
    assert workspace.seen().count(f"log of {workspace.ids['web']}") == 1


def test_the_rest_of_the_log_is_shown_after_the_end(workspaces: Any, activate: Any) -> None:
    ended = threading.Event()
    workspace = workspaces()
    workspace.on_state = lambda body: ended.set() if "Succeeded" in body else None
    workspace.logs["web"] = [["before", ended, *map(str, range(5000)), 1000]]
    assert activate(workspace).log == [
        "web | before",
        *(f"web | {number}" for number in range(5000)),
    ]


def test_a_log_that_is_never_closed_ends_by_its_silence(workspaces: Any, activate: Any) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [["one"]]
    result = activate(workspace)
    assert result.log == ["web | one"] and 0.4 <= result.seconds < 30


@pytest.mark.parametrize("early", [True, False])
def test_the_closing_line_and_an_end_are_enough(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch, early: bool
) -> None:
    """Cachix's backend keeps the connection of a log open; the status may come a little later."""
    monkeypatch.setattr(cachix_follow, "QUIET_SECONDS", 60.0)
    monkeypatch.setattr(cachix_follow, "POLL_SECONDS", 60.0)
    workspace = workspaces()
    workspace.logs["web"] = [["one", "Failed to activate the deployment. It says."]]
    ends = [state("InProgress")] * 3 + [state("Failed")]
    workspace.states["web"] = ends[3:] if early else ends
    result = activate(workspace)
    assert result.seconds < 30 and len(result.log) == 2


def test_a_line_that_looks_like_the_closing_one_hides_nothing(
    workspaces: Any, activate: Any
) -> None:
    workspace = workspaces()
    ended = threading.Event()
    workspace.on_state = lambda body: ended.set() if "Succeeded" in body else None
    line = "Successfully activated the deployment."
    workspace.logs["web"] = [[line, "more", ended, "and more", line]]
    workspace.states["web"] = [state("InProgress"), state("Succeeded")]
    assert activate(workspace).log == [f"web | {word}" for word in (line, "more", "and more", line)]


@pytest.mark.parametrize(
    ("status", "facts", "words"),
    [
        (
            "Failed",
            {"outcome": "rolled-back", "reason": f"status 1; rolled back to {SYSTEM}, but a: b"},
            f"Failed, rolled back to {SYSTEM}",
        ),
        ("Failed", {"outcome": "rolled-back"}, "Failed, rolled back"),
        ("Failed", {"outcome": "nothing-changed"}, "Failed, nothing was changed"),
        ("Failed", {"outcome": "rollback-failed"}, "ROLLBACK FAILED: web needs you"),
        (
            "Failed",
            {"outcome": "changed-by-others"},
            "Failed, somebody else has changed the machine",
        ),
        ("Failed", {"outcome": "state-lost"}, "Failed, the agent has lost its state"),
        ("Succeeded", {"outcome": "reboot-needed"}, "Succeeded, a reboot is needed"),
        ("Succeeded", {"outcome": "succeeded"}, "Succeeded"),
        ("Failed", {"outcome": "of a later version"}, "Failed"),
        ("Failed", {"outcome": 7, "reason": ["no text"]}, "Failed"),
        ("Cancelled", {"outcome": "nothing-changed", "reason": "replaced"}, "Cancelled"),
    ],
)
def test_the_summary_says_what_the_end_means(
    workspaces: Any, activate: Any, status: str, facts: dict[str, Any], words: str
) -> None:
    workspace = workspaces()
    workspace.states["web"] = [state(status, **facts)]
    result = activate(workspace)
    row = [line for line in result.lines if line.startswith("web  ")][-1]
    assert row.split("  ")[1] == words, row
    if isinstance(facts.get("reason"), str):
        assert result.lines[-1] == f"web: {facts['reason']}"
    assert result.status == (0 if status == "Succeeded" else 1)


def test_a_reason_of_several_lines_does_nothing_to_the_terminal(
    workspaces: Any, activate: Any
) -> None:
    workspace = workspaces()
    workspace.states["web"] = [state("Failed", reason="one\x1b[2J\n\ntwo\r")]
    assert activate(workspace).lines[-2:] == ["web: one", "web: two"]


@pytest.mark.parametrize(
    ("status", "facts", "words"),
    [
        (
            "Pending",
            {"agentOnline": False, "agentOfflineSince": "2026-11-26T18:00:12.5Z"},
            "web: offline since 2026-11-26 18:00 UTC, waiting for it",
        ),
        ("Pending", {"agentOnline": False}, "web: never connected so far, waiting for it"),
        (
            "Pending",
            {"agentOnline": False, "agentPausedSince": "2026-11-26T18:00:12.5Z"},
            "web: paused since 2026-11-26 18:00 UTC, waiting for it",
        ),
        ("InProgress", {"agentPausedSince": "2026-11-26T18:00:12.5Z"}, ""),
        ("Pending", {}, "web: not started yet, its agent may be offline or busy"),
        (
            "InProgress",
            {"lostSince": "2026-11-26T18:00:00Z"},
            "web: no sign of life since 2026-11-26 18:00 UTC",
        ),
        ("InProgress", {"cancelRequested": "2026-11-26T18:00:00Z"}, "web: it is to be cancelled"),
        ("Pending", {"agentOnline": True}, ""),
    ],
)
@pytest.mark.parametrize("timeout", [None, 30.0])
def test_it_says_once_why_nothing_happens(
    workspaces: Any,
    activate: Any,
    monkeypatch: pytest.MonkeyPatch,
    status: str,
    facts: dict[str, Any],
    words: str,
    timeout: Optional[float],
) -> None:
    monkeypatch.setattr(cachix_state, "PATIENCE", 0.2)
    workspace = workspaces()
    workspace.states["web"] = [state(status, **facts)] * 6 + [state("Succeeded")]
    result = activate(workspace, timeout=timeout)
    assert result.status == 0 and result.err.count("\n") == bool(words)
    assert result.err.startswith(words)
    assert not words or ("--timeout=SECONDS" in result.err) == (timeout is None)


@pytest.mark.parametrize("end", [None, 1012, 1011], ids=["eof", "1012", "1011"])
def test_a_log_that_breaks_is_resumed_without_repetition(
    end: Step, workspaces: Any, activate: Any
) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [
        ["a", "a", end],
        ["a", end],
        ["a", "a", "b", end],
        ["a", "a", "b", "c", 1000],
    ]
    workspace.states["web"] = [state("InProgress")]

    def end_after_four_connections(_: str) -> None:
        if sum("log" in request for request in workspace.seen()) > 3:
            workspace.states["web"] = [state("Succeeded")]

    workspace.on_state = end_after_four_connections
    result = activate(workspace)
    assert result.status == 0 and result.log == ["web | a", "web | a", "web | b", "web | c"]


def test_a_log_that_breaks_after_the_end_is_completed(workspaces: Any, activate: Any) -> None:
    ended = threading.Event()
    workspace = workspaces()
    workspace.on_state = lambda body: ended.set() if "Succeeded" in body else None
    workspace.logs["web"] = [
        ["a", ended, "b", None],
        ["a", "b", "c", None],
        ["a", "b", "c", "d", None],
    ]
    result = activate(workspace)
    assert result.log == ["web | a", "web | b", "web | c", "web | d"]


def test_a_broken_log_does_not_matter(workspaces: Any, activate: Any) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [[b"not a frame at all \xff\xff", None]]
    assert activate(workspace).status == 0
    odd = [frame(1, b"[]"), frame(1, b"{"), frame(2, b'{"line": "bytes"}'), frame(9, b"p")]
    workspace.logs["web"] = [[*odd, "text", 1000]]
    result = activate(workspace)
    assert result.status == 0 and result.log == ["web | bytes", "web | text"]
    assert result.err.count("warning: skipped a line of the log of web: ") == 2


BAD_ANSWERS = {
    "429 with a time": [Answer("slow down", 429, Retry_After="1")],
    "429": [Answer("", 429)],
    "5xx": [Answer("<html>", 502), Answer("no", 500)],
    "html": [Answer("<html>welcome to the hotel")],
    "wrong type": [Answer({"status": 7})],
    "list": [Answer([])],
    "bytes": [Answer(b"\xff\xfe")],
}


@pytest.mark.parametrize("answers", BAD_ANSWERS.values(), ids=list(BAD_ANSWERS))
def test_a_status_without_a_usable_answer_is_retried(
    answers: list[Answer], workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 60.0)
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    workspace = workspaces()
    workspace.states["web"] = [state("Pending"), *answers, state("Succeeded")]
    result = activate(workspace)
    assert result.status == 0 and result.err.count("; trying again") == 1
    assert pauses == ([1.0] if answers[0].headers else [2.0, 4.0][: len(answers)])


def test_it_gives_up_after_a_minute_without_the_workspace(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspaces("web", "db")
    workspace.states["db"] = [state("Succeeded")]
    workspace.states["web"] = [state("InProgress"), Answer("<h1>Bad gateway</h1>", 502)]
    monkeypatch.setattr(
        cachix_ci.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.3))
    )
    result = activate(workspace)
    assert result.status == 69 and result.seconds < 30
    silence = "no answer for 1 s, the deployments go on unseen"
    assert f"{silence}: {workspace.host} answered HTTP 502\n" in result.err
    assert "web  InProgress" in result.out and "db   Succeeded" in result.out


def test_one_deployment_without_answers_does_not_hide_the_others(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cachix_ci.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.3))
    )
    workspace = workspaces("web", "db")
    workspace.states["web"] = [Answer("", 500)]
    statuses = ("Pending", "InProgress", "InProgress", "Succeeded")
    workspace.states["db"] = [state(status) for status in statuses]
    result = activate(workspace)
    assert result.status == 69 and "db   Succeeded" in result.out and "web  Unknown" in result.out


def test_a_token_that_is_revoked_meanwhile(workspaces: Any, activate: Any) -> None:
    workspace = workspaces()
    workspace.states["web"] = [state("InProgress"), Answer({"error": "revoked"}, 401)]
    result = activate(workspace)
    assert result.status == 77 and "refused the token (HTTP 401): revoked" in result.err


def test_a_deployment_that_is_gone(workspaces: Any, activate: Any) -> None:
    workspace = workspaces()
    workspace.states["web"] = [Answer({"message": "no such deployment"}, 404)]
    result = activate(workspace)
    assert result.status == 1 and "(HTTP 404): no such deployment" in result.err


def test_the_timeout_lists_the_unfinished_deployments(workspaces: Any, activate: Any) -> None:
    workspace = workspaces("web", "db", "mail")
    workspace.states["web"], workspace.states["db"] = [state("Pending")], [state("InProgress")]
    workspace.logs["db"] = [["working"]]
    result = activate(workspace, timeout=3)
    assert result.status == 1 and 2.9 < result.seconds < 30
    missing = "web is Pending, db is InProgress"
    assert f"gave up waiting at the --timeout: {missing}; the deployments go on" in result.err
    assert "mail  Succeeded" in result.out and "db    InProgress" in result.out
    assert "db   | working" in result.log


def test_many_agents_at_once_keep_their_lines_whole(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cachix_follow, "QUIET_SECONDS", 10.0)
    names = [f"agent{number}" for number in range(20)]
    workspace = workspaces(*names)
    lines = [f"{number} {'x' * 200}" for number in range(100)]
    for name in names:
        workspace.logs[name] = [[*(f"{name} {line}" for line in lines), 1000]]
    result = activate(workspace)
    assert result.status == 0 and len(result.log) == 2000
    for name in names:
        expected = [f"{name:7} | {name} {line}" for line in lines]
        assert [line for line in result.log if line.startswith(f"{name} ")] == expected


# --- problems with the order ----------------------------------------------------------------------


NO_AGENT, UNEXPECTED = (
    "no agent named web",
    "unexpected response: is this a Cachix Deploy workspace?",
)
REFUSED = [
    (Answer({"error": "no agent\n named web"}, 400), f"(HTTP 400): {NO_AGENT}"),
    (Answer({"message": NO_AGENT}, 400), f"(HTTP 400): {NO_AGENT}"),
    (Answer(NO_AGENT, 400), f"(HTTP 400): {NO_AGENT}"),
    (Answer(f'"{NO_AGENT}"', 400), f"(HTTP 400): {NO_AGENT}"),
    (Answer({"error": {"a": ["web"]}}, 400), '(HTTP 400): {"error": {"a": ["web"]}}'),
    (Answer(" <html><h1>Bad request</h1>", 400), "(HTTP 400)\n"),
    (Answer("\x1b[2Jgone", 410), "(HTTP 410): gone"),
]
UNREACHABLE = [
    (Answer("", 404), "is not a workspace: it has no deploy API (HTTP 404)"),
    (Answer("<html>welcome"), f"{UNEXPECTED} (not JSON"),
    (Answer([]), f"{UNEXPECTED} (an object was expected)"),
    (Answer({"agents": []}), f"{UNEXPECTED} (`agents` is missing or of the wrong type)"),
    (Answer({"agents": {"db": {}}}), "`web` is missing or of the wrong type"),
    (Answer({"agents": {"web": {"id": "../..", "url": ""}}}), "`id` is not a UUID"),
    (Answer("", 204), UNEXPECTED),
    (Answer({"error": "maintenance"}, 503), "answered HTTP 503: maintenance"),
    (Answer("", 429, Retry_After="3600"), "answered HTTP 429"),
]
MOVED = Answer("", 301, Location="https://new.example")


@pytest.mark.parametrize(
    "answer, status, sentence",
    [
        *((answer, 1, f"refused the request {rest}") for answer, rest in REFUSED),
        *((answer, 69, sentence) for answer, sentence in UNREACHABLE),
        (MOVED, 64, "points to https://new.example, which is not followed"),
        (Answer("", 401), 77, "refused the token (HTTP 401): check it, or create a new one"),
        (Answer({"error": "agents only"}, 403), 77, "refused the token (HTTP 403): agents only"),
    ],
)
def test_an_order_that_is_refused(
    answer: Answer,
    status: int,
    sentence: str,
    workspaces: Any,
    activate: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    patient(monkeypatch, 0.0)
    workspace = workspaces()
    workspace.orders = [answer]
    result = activate(workspace)
    assert result.status == status and result.out == ""
    assert result.err.startswith(f"error: {workspace.host}") and sentence in result.err


def test_an_order_is_repeated_while_the_workspace_restarts(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    patient(monkeypatch, 60.0)
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    workspace = workspaces()
    workspace.orders = [Answer("", 503), Answer("", 429, Retry_After="7"), *workspace.orders]
    result = activate(workspace)
    assert result.status == 0
    assert "HTTP 503; trying again in 1 s" in result.err
    assert "HTTP 429; trying again in 7 s" in result.err


FROZEN = "the workspace is frozen since 2026-11-27T18:52Z by anna: the database moves"


def test_a_frozen_workspace_says_why(workspaces: Any, activate: Any) -> None:
    workspace = workspaces()
    workspace.orders = [Answer({"error": FROZEN}, 423)]
    result = activate(workspace)
    assert (result.status, result.out) == (1, "")
    assert result.err == f"error: {FROZEN}\n"
    assert workspace.seen() == ["order"]


def test_a_frozen_workspace_is_waited_for(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With growing pauses, each reason said once, and each order signed anew."""
    pauses: list[float] = []
    monkeypatch.setattr(time, "sleep", pauses.append)
    workspace = workspaces()
    locked = Answer({"error": FROZEN}, 423)
    other = Answer({"error": "frozen by bob"}, 423)
    workspace.orders = [*[locked] * 9, other, other, *workspace.orders]
    key = SecretKey.create("ci-1")
    result = activate(workspace, waits=True, signer=Signer(key))
    assert result.status == 0
    assert result.err.splitlines() == [
        f"{FROZEN}; waiting until it takes orders again",
        "frozen by bob; waiting until it takes orders again",
    ]
    waits = pauses[:11]
    assert waits[0] == 2 and waits == sorted(waits) and max(waits) == 30
    bodies = [json.loads(body) for method, _, _, body in workspace.requests if method == "POST"]
    sequences = [body["signatures"]["web"]["sequence"] for body in bodies]
    assert len(sequences) == 12 and sequences == sorted(set(sequences))


def test_a_frozen_workspace_is_waited_for_until_the_deadline(
    workspaces: Any, activate: Any
) -> None:
    workspace = workspaces()
    workspace.orders = [Answer({"error": FROZEN}, 423)]
    result = activate(workspace, waits=True, timeout=0.5)
    assert result.status == 1 and result.err.endswith(f"error: {FROZEN}\n")
    assert workspace.seen() == ["order"] * 2


def test_an_order_whose_answer_is_lost_may_have_been_started(
    workspaces: Any, activate: Any
) -> None:
    workspace = workspaces()
    workspace.orders = [Answer("<html>", 502)]
    error = activate(workspace).err.splitlines()[-1]
    hint = f"the deployments may have been started: look at {workspace.host}"
    assert error.endswith(hint)
    workspace.orders = [Answer({"error": "too many requests"}, 429)]
    assert "may have been started" not in activate(workspace).err


def test_an_order_that_hangs_up_may_have_been_started(activate: Any) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:

        def hang_up() -> None:
            with contextlib.suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    connection.recv(1 << 16)
                    connection.close()

        threading.Thread(target=hang_up, daemon=True).start()
        host = f"http://127.0.0.1:{server.getsockname()[1]}"
        result = activate(host, {"agents": {"web": SYSTEM}})
        assert result.status == 69 and "may have been started: look at http" in result.err


def test_nobody_listens(activate: Any) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        result = activate(url, {"agents": {"web": SYSTEM}})
    assert result.status == 69 and "Connection refused" in result.err


@pytest.mark.parametrize("token", [None, ""])
def test_no_token(token: Optional[str], activate: Any) -> None:
    result = activate("http://127.0.0.1:1", {"agents": {"web": SYSTEM}}, token=token)
    assert result.status == 64 and "CACHIX_ACTIVATE_TOKEN" in result.err


# --- problems with deploy.json --------------------------------------------------------------------


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "raw, sentence",
    [
        (b"", "is not JSON: line 1, column 1: "),
        (b'{"agents": {\n  "web": }}', "is not JSON: line 2, column 10: "),
        (b'{"agents": {"web": "/nix/store/x"}} trailing', "is not JSON: line 1, column 37: "),
        (b"\xff\xfe{\x00", "is not UTF-8 text: byte 0 is 0xff"),
        (b"[" * 200_000, "is not JSON that can be read: "),
        (b"9" * 10_000, "d"),  # Python refuses it, or it is not an object
        (b"[]", "can't be deployed: a deploy.json must hold an object such as "),
        (b"null", "can't be deployed: a deploy.json must hold an object such as "),
        (b"{}", "can't be deployed: `agents` must be an object with at least one agent, as in "),
        (b'{"agents": {}}', "`agents` must be an object with at least one agent"),
        (b'{"agents": ["web"]}', "`agents` must be an object with at least one agent"),
        (b'{"agents": {"web": "S"}, "rollbackScript": []}', "`rollbackScript` must be an object "),
        (b'{"agents": {"web": "S", "web": "x"}}', 'has the key "web" twice'),
        (b'{"agents": {"": "S", "a\\u0007": "S"}}', 'be printed: "", "a\\u0007"'),
        (b'{"agents": {"\\ud800": "S"}}', r'"\ud800"'),
        (b'{"agents": {"web": [[["S"]]]}}', "agents.web is a list"),
        (b'{"agents": {"web": {"S": 1}}}', "agents.web is an object"),
        (b'{"agents": {"web": %s}}' % (b"[" * 900 + b"]" * 900), "agents.web is a list"),
    ],
)
def test_bad_files(raw: bytes, sentence: str, activate: Any) -> None:
    result = activate("http://127.0.0.1:1", raw.replace(b'"S"', f'"{SYSTEM}"'.encode()))
    assert result.status == 1 and "deploy.json" in result.err and sentence in result.err


def test_bad_store_paths_are_listed(activate: Any) -> None:
    agents = {"web": "result", "db": SYSTEM, "mail": None, "cd": f"{SYSTEM}/bin/x", "opt": "--help"}
    spec = {"agents": agents, "rollbackScript": {"x86_64-linux": "/bin/sh"}}
    result = activate("http://127.0.0.1:1", spec)
    assert result.status == 1 and "agents.db" not in result.err
    values = f'web is "result", agents.mail is null, agents.cd is "{SYSTEM}/bin/x", agents.opt is '
    sentence = "deploy.json can't be deployed: not a store path (/nix/store/HASH-NAME): agents."
    assert f'{sentence}{values}"--help", rollbackScript.x86_64-linux is "/bin/sh"\n' in result.err


def test_only_the_first_of_many_bad_store_paths_are_listed(activate: Any) -> None:
    result = activate("http://127.0.0.1:1", {"agents": {f"a{n}": "x" * 999 for n in range(500)}})
    assert "agents.a19 is " in result.err and result.err.endswith(" and 480 more\n")
    assert "agents.a20 is " not in result.err and len(result.err) < 6000


def test_an_unknown_agent_is_refused_with_a_list_of_the_others(activate: Any) -> None:
    spec = {"agents": {"web": SYSTEM, "db": SYSTEM}}
    result = activate("http://127.0.0.1:1", spec, agents=("wbe", "web", "x"))
    assert result.status == 64 and "no agent wbe, x in " in result.err
    assert "which has db, web" in result.err


@pytest.mark.slow
def test_a_specification_of_100_000_agents(activate: Any) -> None:
    """It is read at once, and no message names them all. A slow way would take minutes."""
    spec = {"agents": {f"host-{number}": SYSTEM for number in range(100_000)}}
    refused = activate("http://127.0.0.1:1", spec, agents=("nobody",))
    assert refused.status == 64 and refused.err.endswith(" and 99980 more\n")
    assert activate("http://127.0.0.1:1", spec).status == 69


def test_files_that_can_not_be_read(activate: Any, tmp_path: pathlib.Path) -> None:
    for path, reason in (("missing.json", "No such file"), (".", "Is a directory")):
        result = activate("http://127.0.0.1:1", {}, spec_path=str(tmp_path / path))
        assert result.status == 1 and "can't be read: " + reason in result.err


def test_an_unknown_key_gets_a_warning(workspaces: Any, activate: Any) -> None:
    text = f'\ufeff{{"agents": {{"web": "{SYSTEM}"}}, "rolbackScript": {{}}}}'
    result = activate(workspaces(), text.encode())
    assert result.status == 0 and 'unknown key, which is ignored: "rolbackScript"' in result.err


def test_a_bad_host(activate: Any) -> None:
    assert activate("ftp://example.org", {"agents": {"web": SYSTEM}}).status == 64


leaves = st.none() | st.booleans() | st.integers() | st.floats() | st.text()
keys = st.sampled_from(["agents", "rollbackScript", "web"]) | st.text()
json_values = st.recursive(
    leaves | st.sampled_from([SYSTEM, SCRIPT]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=4),
    max_leaves=10,
)


@settings(max_examples=300, deadline=None)
@given(st.binary() | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_file_is_a_spec_or_one_sentence(raw: bytes) -> None:
    try:
        spec = decode_spec(raw, "deploy.json")
    except UsageError:
        pytest.fail("a bad file is not a wrong command line")
    except Error as error:
        assert str(error).isprintable() and "deploy.json" in str(error)
    else:
        assert spec.agents and decode_spec(json.dumps(spec.to_json()).encode(), "x") == spec


names = st.text(st.characters(whitelist_categories=("L", "N", "P")), min_size=1, max_size=20)
entries = st.dictionaries(names, st.from_regex(STORE_PATH, fullmatch=True), max_size=5)


@settings(max_examples=100, deadline=None)
@given(entries.filter(bool), entries)
def test_every_good_spec_survives_encoding_and_decoding(
    agents: dict[str, str], scripts: dict[str, str]
) -> None:
    spec = Spec(agents, scripts)
    assert decode_spec(json.dumps(spec.to_json()).encode(), "x") == spec


# --- the output -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, plain, coloured",
    [
        ("tab\tand \u00fc\u2713", "tab\tand \u00fc\u2713", "tab\tand \u00fc\u2713"),
        ("\x1b[1;31mred\x1b[0m", "red", "\x1b[1;31mred\x1b[0m"),
        ("\x1b[38:5:1mred", "red", "\x1b[38:5:1mred\x1b[0m"),
        ("\x1b[2J\x1b[1;1H\x1b[?25lgone\x1b[K", "gone", "gone"),
        ("\x1b]0;title\x07text\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "textlink", "textlink"),
        ("\x1b]0;never ended", "0;never ended", "0;never ended"),
        ("\x1bPq#0\x1b\\sixel\x1bc\x1b(B\x1b", "sixel", "sixel"),
        ("\x9b31mC1\x00\x07\x08\x7f\u202eabc\u2066", "31mC1abc", "31mC1abc"),
    ],
)
def test_escape_sequences_are_removed_but_for_colours(text: str, plain: str, coloured: str) -> None:
    assert (clean(text), clean(text, True)) == (plain, coloured)


@given(st.text(st.sampled_from("\x1b[]m;0123?PX^_\\\x07\x9b\x9d\r\nabcJ") | st.characters()))
def test_nothing_that_moves_the_cursor_is_left(text: str) -> None:
    for result in (clean(text), re.sub(r"\x1b\[[0-9;:]*m", "", clean(text, True))):
        assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", result)


def test_cleaning_takes_linear_time() -> None:
    texts = ["\x1b]" * 100_000, "\x1b[ " * 100_000]
    texts += ["\x1b[" + "1" * 500_000, "\x1bP" + "x" * 500_000]
    begin = time.monotonic()
    for text in texts:
        clean(text)
    assert time.monotonic() - begin < 30


def test_progress_bars_and_odd_text(workspaces: Any, activate: Any) -> None:
    workspace = workspaces()
    texts = ["10%\r20%\r", "", "\ud800\u00fc", "\x1b[31mred\x1b[0m\x1b[2K", "x" * 200_000]
    workspace.logs["web"] = [[*texts, 1000]]
    result = activate(workspace)
    whole = 65536 - len("web | ...")
    lines = ["10%", "20%", "\\ud800\u00fc", "red", "x" * whole + "..."]
    assert result.log == [f"web | {line}" for line in lines]
    assert "web |" in result.lines


@pytest.fixture
def spec_file(tmp_path: pathlib.Path) -> str:
    path = tmp_path / "deploy.json"
    path.write_text(json.dumps({"agents": {"web": SYSTEM}}))
    return str(path)


@pytest.mark.parametrize("no_colour", ["", "1"])
def test_colours_on_a_terminal_only(no_colour: str, workspaces: Any, spec_file: str) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [["\x1b[31mred\x1b[0m\x1b[2J", 1000]]
    leader, follower = pty.openpty()
    arguments = command(spec_file, host=workspace.host, NO_COLOR=no_colour)
    with subprocess.Popen(**arguments, stdout=follower) as process:
        os.close(follower)
        output = b""
        with contextlib.suppress(OSError):
            while part := os.read(leader, 4096):
                output += part
    os.close(leader)
    assert process.returncode == 0 and b"\x1b[2J" not in output
    assert (b"\x1b[36mweb\x1b[0m | \x1b[31mred\x1b[0m" in output) is not bool(no_colour)
    assert (b"\x1b[32mSucceeded" in output) is not bool(no_colour)
    assert (b"\x1b" in output) is not bool(no_colour)


def test_a_terminal_that_only_knows_ascii(workspaces: Any, spec_file: str) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [["\u00fc \u2713", 1000]]
    spec = pathlib.Path(spec_file).read_bytes()
    arguments = command("-", host=workspace.host, PYTHONIOENCODING="ascii")
    done = subprocess.run(**arguments, input=spec, capture_output=True, timeout=20)
    assert done.returncode == 0 and b"web | \\xfc \\u2713\n" in done.stdout and done.stderr == b""


def start(spec_file: str, host: str) -> subprocess.Popen[bytes]:
    """Start the program, and wait for the first line of the log."""
    process = subprocess.Popen(
        **command(spec_file, host=host),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # CI may have made us ignore SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    assert process.stdout
    while not process.stdout.readline().startswith(b"web | one"):
        pass
    return process


@pytest.mark.parametrize(("end", "status"), [("Succeeded", 0), ("Failed", 1)])
def test_the_result_counts_although_nobody_reads_stdout(
    workspaces: Any, spec_file: str, end: str, status: int
) -> None:
    """Its reader has left (`| head`), or it was closed from the start (`>&-`)."""
    workspace = workspaces()
    workspace.states["web"] = [state("InProgress"), state("InProgress"), state(end)]
    closed = threading.Event()
    workspace.logs["web"] = [["one", closed, *map(str, range(100)), 1000]]
    with start(spec_file, workspace.host) as process:
        assert process.stdout and process.stderr
        process.stdout.close()
        closed.set()
        assert process.wait(20) == status and process.stderr.read() == b""
    workspace.states["web"] = [state("InProgress"), state(end)]
    arguments = command(spec_file, host=workspace.host)
    arguments["args"] = ["sh", "-c", 'exec "$@" >&-', "sh", *arguments["args"]]
    done = subprocess.run(**arguments, stderr=subprocess.PIPE, timeout=20, check=False)
    assert (done.returncode, done.stderr) == (status, b"")


def test_a_slow_reader_of_a_pipe_that_does_not_block(workspaces: Any, spec_file: str) -> None:
    """Node sets the pipes of its children so, and CI runners are written in Node."""
    workspace = workspaces()
    workspace.logs["web"] = [[*(f"line {number}" for number in range(5000)), 1000]]
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    arguments = command(spec_file, host=workspace.host)
    with subprocess.Popen(**arguments, stdout=writer, stderr=writer) as process:
        os.close(writer)
        time.sleep(2)
        output = b""
        while part := os.read(reader, 2048):
            output += part
            time.sleep(0.001)
    os.close(reader)
    assert process.returncode == 0 and b"warning" not in output
    lines = output.decode().splitlines()
    numbers = [int(line.rpartition(" ")[2]) for line in lines if line.startswith("web | line")]
    assert numbers == list(range(5000)) and "Succeeded" in lines[-1]


@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted(workspaces: Any, spec_file: str, number: int, status: int) -> None:
    workspace = workspaces()
    workspace.states["web"] = [state("InProgress")]
    workspace.logs["web"] = [["one"]]
    with start(spec_file, workspace.host) as process:
        assert process.stdout and process.stderr
        process.send_signal(number)
        assert process.wait(10) == status
        assert process.stderr.read() == b"interrupted: the deployments go on\n"
        assert b"web  InProgress" in process.stdout.read()


def test_the_program_prints_its_errors(spec_file: str) -> None:
    done = subprocess.run(**command("missing.json"), capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: missing.json can't be read: No such file or directory\n"
    arguments = command(spec_file, "--agent=x", CACHIX_ACTIVATE_TOKEN="")
    done = subprocess.run(**arguments, capture_output=True, timeout=20)
    assert done.returncode == 64 and b"CACHIX_ACTIVATE_TOKEN" in done.stderr


# --- at our own workspace -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """A running workspace: its URL, a token for agents, and one for CI."""
    pytest.importorskip("flask")
    tmp_path = tmp_path_factory.mktemp("workspace")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    data = f"--data={tmp_path / 'data'}"

    def workspace(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "cachix_workspace", *arguments, data]

    def token(kind: str) -> str:
        output = subprocess.check_output(workspace("token", "create", kind), env=env, text=True)
        return output.split()[-1]

    log, argv = tmp_path / "serve.log", workspace("serve", "--listen=127.0.0.1:0")
    subprocess.run(workspace("init"), env=env, check=True)
    agent_token, activate_token = token("agent"), token("activate")
    with log.open("wb") as file:
        process = subprocess.Popen(argv, env=env, stdout=file, stderr=file)
    try:
        deadline = time.monotonic() + 60
        while not (match := re.search(r"listening on (http://\S+)", log.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, log.read_text()
            time.sleep(0.05)
        yield match[1], agent_token, activate_token
        process.terminate()
        process.wait(60)
    finally:
        process.kill()
        process.wait()


def report(agent: Peer, sock: Any, status: str, lines: list[str], closing: str) -> None:
    """Take one deployment from the agent's websocket, and report its log and its end."""
    cachix_protocol.decode_to_agent(sock.recv())
    deployment = cachix_protocol.decode_to_agent(sock.recv())
    assert isinstance(deployment, cachix_protocol.Deployment) and deployment.store_path == SYSTEM
    channel = cachix_channels.HttpChannel(agent, deployment.id)
    assert channel.status("InProgress", None)
    assert channel.lines(0, lines) == len(lines)
    assert channel.status(status, 2048)
    assert channel.lines(len(lines), ["after the end", closing]) == len(lines) + 2


@pytest.mark.parametrize(
    ("status", "closing"),
    [
        ("Succeeded", "Successfully activated the deployment."),
        ("Failed", "Failed to activate the deployment. x"),
    ],
)
def test_our_workspace_from_the_order_to_the_summary(
    status: str, closing: str, served: Any, activate: Any
) -> None:
    host, agent_token, token = served
    agent = Peer.create(host, agent_token, "web")
    sock = cachix_connection.connect(agent, "/ws")
    lines = ["$ one", "\u00fc" * 1000, *map(str, range(300))]
    arguments = (agent, sock, status, lines, closing)
    reporting = threading.Thread(target=report, args=arguments, daemon=True)
    reporting.start()
    result = activate(host, {"agents": {"web": SYSTEM}}, token=token)
    reporting.join(5)
    cachix_connection.hang_up(sock)
    assert result.status == (0 if status == "Succeeded" else 1) and result.err == ""
    assert result.log == [f"web | {line}" for line in [*lines, "after the end", closing]]
    summary = result.lines[-1]
    assert summary.startswith(f"web  {status}  ") and "2.0 KiB" in summary


def test_refusals_of_our_workspace(served: Any, activate: Any) -> None:
    host, agent_token, token = served
    result = activate(host, {"agents": {"nobody": SYSTEM}}, token=token)
    assert result.status == 1 and "(HTTP 400)" in result.err and "nobody" in result.err
    result = activate(host, {"agents": {"nobody": SYSTEM}}, token=agent_token)
    assert result.status == 77 and "activate" in result.err
    result = activate(host, {"agents": {"nobody": SYSTEM}}, token="wrong")
    assert result.status == 77
