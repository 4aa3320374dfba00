"""The activate command against a scripted workspace: what it sends, shows and ends with, and each bad input by name."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import http.server
import json
import os
import pathlib
import pty
import re
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Iterator
from typing import Any, Callable, Optional, Union

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import cachix_ci
import cachix_connection
import cachix_deploy
import cachix_protocol
from activate.nix import STORE_PATH
from cachix_ci import ActivateOptions, activate_command, clean, decode_spec
from cachix_protocol import Error, Spec, UsageError

TRANSCRIPTS = pathlib.Path(__file__).with_name("transcripts")
ROOT = pathlib.Path(cachix_deploy.__file__).parent
TOKEN = "ACTIVATE-TOKEN"
SYSTEM, SCRIPT = f"/nix/store/{'a' * 32}-system", f"/nix/store/{'b' * 32}-rollback"
URL = "https://app.example.org/deploy/1"
Step = Union[str, float, int, bytes, threading.Event, None]

# --- a scripted workspace --------------------------------------------------------------------------------------------


def frame(opcode: int, payload: bytes) -> bytes:
    size = len(payload)
    head = (
        struct.pack("!BB", 0x80 | opcode, size)
        if size < 126
        else struct.pack("!BBQ", 0x80 | opcode, 127, size)
    )
    return head + payload


class Answer:
    """An HTTP answer: JSON, or raw text."""

    def __init__(self, body: Any = "", status: int = 200, **headers: str) -> None:
        text = body if isinstance(body, (bytes, str)) else json.dumps(body)
        self.body = text if isinstance(text, bytes) else text.encode()
        self.status, self.headers = (
            status,
            {name.replace("_", "-"): value for name, value in headers.items()},
        )


def state(status: str, **more: Any) -> Answer:
    known = {
        "id": str(uuid.uuid4()),
        "index": 3,
        "createdOn": "2026-11-23T19:00:00Z",
        "startedOn": None,
    }
    return Answer(
        {
            **known,
            "finishedOn": None,
            "storePath": SYSTEM,
            "closureSize": None,
            "status": status,
            **more,
        }
    )


class Workspace:
    """Answers by its script. `states` and `logs` hold a list for each agent, whose last item stays.

    A connection of `logs` is a list of steps: text is a line of the log, bytes a frame as it is, a number a close code,
    an Event is waited for, None is a connection that breaks; after the last step the socket stays open.
    """

    def __init__(self, *agents: str) -> None:
        self.ids = {agent: str(uuid.uuid4()) for agent in agents}
        made = {agent: {"id": id, "url": f"{URL}/{agent}"} for agent, id in self.ids.items()}
        self.orders: list[Answer] = [Answer({"agents": made})]
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
                key = self.headers["Sec-WebSocket-Key"] + "258EAFA5-E914-47DA-95CA-C5AB0DC85B11"
                accept = base64.b64encode(hashlib.sha1(key.encode()).digest()).decode()
                self.send_response(101)
                self.send_header("Upgrade", "websocket")
                self.send_header("Connection", "Upgrade")
                self.send_header("Sec-WebSocket-Accept", accept)
                self.end_headers()
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

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.host = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def sent(self) -> list[str]:
        """The requests, each in a word or two."""
        words = {"POST": "order", "GET": "status"}
        return [
            f"log of {path[-46:-10]}" if "view" in path else words[method]
            for method, path, _, _ in self.requests
        ]


@pytest.fixture
def workspaces() -> Iterator[Callable[..., Workspace]]:
    made: list[Workspace] = []

    def make(*agents: str) -> Workspace:
        made.append(Workspace(*(agents or ("web",))))
        return made[-1]

    yield make
    for workspace in made:
        workspace.server.shutdown()
        workspace.server.server_close()


class Result:
    def __init__(self, status: int, out: str, err: str, seconds: float) -> None:
        self.status, self.out, self.err, self.seconds = status, out, err, seconds
        self.lines = out.splitlines()
        self.log = [line for line in self.lines if " | " in line]


@pytest.fixture
def activate(
    tmp_path: pathlib.Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run the command in this process, with waits a tenth as long."""
    for name, value in (
        ("POLL_SECONDS", 0.1),
        ("QUIET_SECONDS", 0.4),
        ("PATIENCE", 1.0),
        ("ORDER_PATIENCE", 0.5),
    ):
        monkeypatch.setattr(cachix_ci, name, value)
    monkeypatch.setattr(cachix_ci.random, "uniform", lambda least, most: least / 10)

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
            known = {"host": host, "token": TOKEN, "spec_path": str(path)}
            status = activate_command(ActivateOptions(**{**known, **options}))
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
    """What subprocess needs to run the program itself."""
    env = {
        name: value
        for name, value in os.environ.items()
        if name not in ("NO_COLOR", "TERM", "PYTHONIOENCODING")
    }
    env.update(
        {"CACHIX_ACTIVATE_TOKEN": TOKEN, "PYTHONPATH": str(ROOT), "TERM": "xterm", **environment}
    )
    return {
        "args": [sys.executable, "-m", "cachix_deploy", f"--host={host}", "activate", *arguments],
        "env": env,
    }


# --- what it sends ---------------------------------------------------------------------------------------------------


def recorded(name: str) -> list[dict[str, Any]]:
    text = (TRANSCRIPTS / f"activate-{name}.jsonl").read_text()
    # Cachix's client does not check the paths, ours does.
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
    assert (
        result.log
        == [f"agent1 | {line}" for line in workspace.logs["agent1"][0]][: len(result.log)]
    )
    assert bool(result.log) == (name != "cancelled")
    theirs = [
        parse_request(event["raw"]) for event in events if event.get("event") == "http-request"
    ]
    ours = workspace.requests
    assert [(method, path) for method, path, _, _ in ours] == [
        (method, path) for method, path, _ in theirs
    ]
    assert ours[0][3] == body.encode()
    for (_, path, mine, _), (_, _, recorded_headers) in zip(ours, theirs):
        for key in (
            "Authorization",
            "Content-Type",
            *(("Upgrade", "Connection") if "view" in path else ()),
        ):
            assert mine.get(key) == recorded_headers.get(key)
        assert not {"name", "version", "system", "Origin", "Sec-WebSocket-Extensions"} & set(mine)


def test_only_the_chosen_agents_are_deployed(workspaces: Any, activate: Any) -> None:
    workspace = workspaces("web", "db")
    spec = {"agents": {"web": SYSTEM, "other": SYSTEM, "db": SCRIPT}, "rollbackScript": None}
    assert activate(workspace, spec, agents=("db", "web", "db")).status == 0
    assert json.loads(workspace.requests[0][3]) == {"agents": {"web": SYSTEM, "db": SCRIPT}}


def test_async_starts_and_does_not_wait(workspaces: Any, activate: Any) -> None:
    workspace = workspaces("web", "database")
    result = activate(workspace, asynchronous=True)
    assert result.status == 0 and workspace.sent() == ["order"]
    assert f"web       {URL}/web       {SYSTEM}" in result.lines
    assert f"database  {URL}/database  {SYSTEM}" in result.lines


def test_v1_of_the_api_can_only_start(workspaces: Any, activate: Any) -> None:
    for asynchronous, status in ((True, 0), (False, 1)):
        workspace = workspaces()
        workspace.orders, workspace.old_orders = (
            [Answer("", 404)],
            [Answer({"agents": {"web": URL}})],
        )
        result = activate(workspace, asynchronous=asynchronous)
        assert result.status == status and URL in result.out
        assert [path for _, path, _, _ in workspace.requests] == [
            "/api/v2/deploy/activate",
            "/api/v1/deploy/activate",
        ]
        assert ("v1 of its API" in result.err) is not asynchronous


# --- how it ends -----------------------------------------------------------------------------------------------------


def test_the_summary_has_a_line_for_each_agent(workspaces: Any, activate: Any) -> None:
    workspace = workspaces("web", "db", "mail")
    known = {"startedOn": "2026-11-23T19:00:00.5Z", "closureSize": 3 << 29}
    workspace.states["web"] = [
        state("Succeeded", finishedOn="2026-11-23T19:00:12.734567891Z", **known)
    ]
    workspace.states["db"] = [state("Failed", finishedOn="2026-11-23T20:01:00Z", **known)]
    workspace.states["mail"] = [state("Cancelled")]
    result = activate(workspace)
    assert result.status == 1 and result.err == ""
    assert result.lines[-4:] == [
        "",
        f"web   Succeeded  12.2 s   1.5 GiB  {URL}/web",
        f"db    Failed     1:01:00  1.5 GiB  {URL}/db",
        f"mail  Cancelled  -        -        {URL}/mail",
    ]
    assert not any(id in word for word in workspace.sent() for id in [workspace.ids["mail"]])


@pytest.mark.parametrize("line, status, code", [
    ("Successfully activated the deployment.", "Failed", 1),
    ("Failed to activate the deployment. It says.", "Succeeded", 0),
])  # fmt: skip
def test_the_status_counts_and_not_the_log(
    line: str, status: str, code: int, workspaces: Any, activate: Any
) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [[line, 1000]]
    workspace.states["web"] = [state("InProgress"), state("InProgress"), state(status)]
    result = activate(workspace)
    assert result.status == code and f"web | {line}" in result.log


def test_it_ends_at_once_when_the_workspace_closes_the_log(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cachix_ci, "POLL_SECONDS", 5.0)
    workspace = workspaces()
    assert activate(workspace).seconds < 1
    assert workspace.sent() == ["order", "status", f"log of {workspace.ids['web']}", "status"]


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
    assert result.log == ["web | one"] and 0.4 <= result.seconds < 2


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
    workspace.on_state = lambda _: workspace.states.update(
        web=[
            state(
                "Succeeded" if sum("log" in word for word in workspace.sent()) > 3 else "InProgress"
            )
        ]
    )
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


def test_a_log_that_can_not_be_had_does_not_matter(workspaces: Any, activate: Any) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [[b"not a frame at all \xff\xff", None]]
    assert activate(workspace).status == 0
    odd = [frame(1, b"[]"), frame(1, b"{"), frame(2, b'{"line": "bytes"}'), frame(9, b"p")]
    workspace.logs["web"] = [[*odd, "text", 1000]]
    result = activate(workspace)
    assert result.status == 0 and result.log == ["web | bytes", "web | text"]
    assert result.err.count("a line of the log of web is skipped") == 2


@pytest.mark.parametrize("busy", [
    [Answer("slow down", 429, Retry_After="1")], [Answer("", 429)], [Answer("<html>", 502), Answer("no", 500)],
    [Answer("<html>welcome to the hotel")], [Answer({"status": 7})], [Answer([])], [Answer(b"\xff\xfe")],
], ids=["429 with a time", "429", "5xx", "html", "wrong type", "list", "bytes"])  # fmt: skip
def test_a_status_that_can_not_be_had_is_asked_for_again(
    busy: list[Answer], workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cachix_ci, "PATIENCE", 60.0)
    pauses: list[float] = []
    monkeypatch.setattr(cachix_ci.time, "sleep", pauses.append)
    workspace = workspaces()
    workspace.states["web"] = [state("Pending"), *busy, state("Succeeded")]
    result = activate(workspace)
    assert result.status == 0 and result.err.count("; trying again") == 1
    assert pauses == [1.0] if busy[0].headers else pauses == [2.0, 4.0][: len(busy)]


def test_a_workspace_that_goes_away_ends_it_after_a_minute(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    workspace = workspaces("web", "db")
    workspace.states["db"] = [state("Succeeded")]
    workspace.states["web"] = [state("InProgress"), Answer("<h1>Bad gateway</h1>", 502)]
    monkeypatch.setattr(
        cachix_ci.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.3))
    )
    result = activate(workspace)
    assert result.status == 69 and result.seconds < 3
    assert (
        f"no answer for 1 s, the deployments go on unseen: {workspace.host} answered HTTP 502\n"
        in result.err
    )
    assert "web  InProgress" in result.out and "db   Succeeded" in result.out


def test_one_deployment_without_answers_does_not_hide_the_others(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        cachix_ci.time, "sleep", lambda seconds, sleep=time.sleep: sleep(min(seconds, 0.3))
    )
    workspace = workspaces("web", "db")
    workspace.states["web"] = [Answer("", 500)]
    workspace.states["db"] = [
        state("Pending"),
        state("InProgress"),
        state("InProgress"),
        state("Succeeded"),
    ]
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


def test_the_timeout_says_what_is_not_done(workspaces: Any, activate: Any) -> None:
    workspace = workspaces("web", "db", "mail")
    workspace.states["web"], workspace.states["db"] = [state("Pending")], [state("InProgress")]
    workspace.logs["db"] = [["working"]]
    result = activate(workspace, timeout=0.6)
    assert result.status == 1 and 0.5 < result.seconds < 2
    assert (
        "gave up waiting at the --timeout: web is Pending, db is InProgress; the deployments go on"
        in result.err
    )
    assert (
        "mail  Succeeded" in result.out
        and "db    InProgress" in result.out
        and "db   | working" in result.log
    )


def test_many_agents_at_once_keep_their_lines_whole(workspaces: Any, activate: Any) -> None:
    names = [f"agent{number}" for number in range(20)]
    workspace = workspaces(*names)
    for name in names:
        workspace.logs[name] = [[f"{name} {number} {'x' * 200}" for number in range(100)] + [1000]]
    result = activate(workspace)
    assert result.status == 0 and len(result.log) == 2000
    for name in names:
        expected = [
            f"{name:7} | {line}"
            for line in [f"{name} {number} {'x' * 200}" for number in range(100)]
        ]
        assert [line for line in result.log if line.startswith(f"{name} ")] == expected


# --- what goes wrong at the order ------------------------------------------------------------------------------------


@pytest.mark.parametrize("answer, status, sentence", [
    (Answer({"error": "no agent\n named web"}, 400), 1, "refused the request (HTTP 400): no agent named web"),
    (Answer({"message": "no agent named web"}, 400), 1, "refused the request (HTTP 400): no agent named web"),
    (Answer("no agent named web", 400), 1, "refused the request (HTTP 400): no agent named web"),
    (Answer('"no agent named web"', 400), 1, "refused the request (HTTP 400): no agent named web"),
    (Answer({"error": {"agents": ["web"]}}, 400), 1, 'refused the request (HTTP 400): {"error": {"agents": ["web"]}}'),
    (Answer(" <html><h1>Bad request</h1>", 400), 1, "refused the request (HTTP 400)\n"),
    (Answer("\x1b[2Jgone", 410), 1, "refused the request (HTTP 410): gone"),
    (Answer({"error": "this is an agent token"}, 403), 77, "refused the token (HTTP 403): this is an agent token"),
    (Answer("", 401), 77, "refused the token (HTTP 401): check it, or create a new one"),
    (Answer("", 301, Location="https://new.example"), 64, "points to https://new.example, which is not followed"),
    (Answer("", 404), 69, "is no workspace: it knows neither v2 nor v1 of the API (HTTP 404)"),
    (Answer("<html>welcome"), 69, "answered, but not as a workspace does: not JSON"),
    (Answer([]), 69, "answered, but not as a workspace does: an object was expected"),
    (Answer({"agents": []}), 69, "`agents` is missing or of the wrong type"),
    (Answer({"agents": {"db": {}}}), 69, "`web` is missing or of the wrong type"),
    (Answer({"agents": {"web": {"id": "../..", "url": ""}}}), 69, "`id` is not a UUID"),
    (Answer("", 204), 69, "answered, but not as a workspace does"),
    (Answer({"error": "maintenance"}, 503), 69, "answered HTTP 503: maintenance"),
    (Answer("", 429, Retry_After="3600"), 69, "answered HTTP 429"),
])  # fmt: skip
def test_an_order_that_is_not_taken(
    answer: Answer,
    status: int,
    sentence: str,
    workspaces: Any,
    activate: Any,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cachix_ci, "PATIENCE", 0.0)
    workspace = workspaces()
    workspace.orders = [answer]
    result = activate(workspace)
    assert result.status == status and result.out == ""
    assert result.err.startswith(f"error: {workspace.host} ") and sentence in result.err


def test_an_order_is_repeated_while_the_workspace_restarts(
    workspaces: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cachix_ci, "PATIENCE", 60.0)
    monkeypatch.setattr(cachix_ci.time, "sleep", lambda seconds: None)
    workspace = workspaces()
    workspace.orders = [Answer("", 503), Answer("", 429, Retry_After="7"), *workspace.orders]
    result = activate(workspace)
    assert result.status == 0
    assert (
        "HTTP 503; trying again in 1 s" in result.err
        and "HTTP 429; trying again in 7 s" in result.err
    )


def test_nobody_listens(activate: Any) -> None:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        result = activate(
            f"http://127.0.0.1:{listener.getsockname()[1]}", {"agents": {"web": SYSTEM}}
        )
    assert result.status == 69 and "Connection refused" in result.err


@pytest.mark.parametrize("token", [None, ""])
def test_no_token(token: Optional[str], activate: Any) -> None:
    result = activate("http://127.0.0.1:1", {"agents": {"web": SYSTEM}}, token=token)
    assert result.status == 64 and "CACHIX_ACTIVATE_TOKEN" in result.err


# --- what is wrong in deploy.json ------------------------------------------------------------------------------------


@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize("raw, sentence", [
    (b"", "is not JSON: line 1, column 1: "),
    (b'{"agents": {\n  "web": }}', "is not JSON: line 2, column 10: "),
    (b'{"agents": {"web": "/nix/store/x"}} trailing', "is not JSON: line 1, column 37: "),
    (b"\xff\xfe{\x00", "is not UTF-8 text: byte 0 is 0xff"),
    (b"[" * 200_000, "is not JSON that can be read: "),
    (b"9" * 10_000, "d"),  # Python refuses it, or it is no object
    (b"[]", "must hold an object such as "),
    (b"null", "must hold an object such as "),
    (b"{}", "names no agents: "),
    (b'{"agents": {}}', "names no agents: "),
    (b'{"agents": ["web"]}', "names no agents: "),
    (b'{"agents": {"web": "%s"}, "rollbackScript": []}' % SYSTEM.encode(), "`rollbackScript` in "),
    (b'{"agents": {"web": "%s", "web": "x"}}' % SYSTEM.encode(), 'has the key "web" twice'),
    (b'{"agents": {"": "%s", "a\\u0007": "%s"}}' % (SYSTEM.encode(), SYSTEM.encode()), 'printed: "", "a\\u0007"'),
    (b'{"agents": {"\\ud800": "%s"}}' % SYSTEM.encode(), '"\\ud800"'),
])  # fmt: skip
def test_a_file_that_is_wrong(raw: bytes, sentence: str, activate: Any) -> None:
    result = activate("http://127.0.0.1:1", raw)
    assert result.status == 1 and "deploy.json" in result.err and sentence in result.err


def test_all_values_that_are_no_store_paths_are_listed(activate: Any) -> None:
    agents = {"web": "result", "db": SYSTEM, "mail": None, "cd": f"{SYSTEM}/bin/x", "opt": "--help"}
    result = activate(
        "http://127.0.0.1:1", {"agents": agents, "rollbackScript": {"x86_64-linux": "/bin/sh"}}
    )
    assert result.status == 1
    assert (
        'agents.web is "result", agents.mail is null, ' in result.err
        and 'agents.opt is "--help", ' in result.err
    )
    assert (
        'rollbackScript.x86_64-linux is "/bin/sh"' in result.err and "agents.db" not in result.err
    )


def test_an_unknown_agent_lists_those_that_are_known(activate: Any) -> None:
    result = activate(
        "http://127.0.0.1:1", {"agents": {"web": SYSTEM, "db": SYSTEM}}, agents=("wbe", "web", "x")
    )
    assert (
        result.status == 64
        and "no agent wbe, x in " in result.err
        and "which has db, web" in result.err
    )


def test_files_that_can_not_be_read(activate: Any, tmp_path: pathlib.Path) -> None:
    for path, reason in (("missing.json", "No such file"), (".", "Is a directory")):
        result = activate("http://127.0.0.1:1", {}, spec_path=str(tmp_path / path))
        assert result.status == 1 and "can't be read: " + reason in result.err


def test_an_unknown_key_is_told(workspaces: Any, activate: Any) -> None:
    result = activate(
        workspaces(),
        b'\xef\xbb\xbf{"agents": {"web": "%s"}, "rolbackScript": {}}' % SYSTEM.encode(),
    )
    assert result.status == 0 and 'unknown key, which is ignored: "rolbackScript"' in result.err


def test_a_host_that_is_none(activate: Any) -> None:
    assert activate("ftp://example.org", {"agents": {"web": SYSTEM}}).status == 64


json_values = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from([SYSTEM, SCRIPT]),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(
            st.sampled_from(["agents", "rollbackScript", "web"]) | st.text(), inner, max_size=4
        )
    ),
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
def test_every_good_spec_comes_back_as_it_was(
    agents: dict[str, str], scripts: dict[str, str]
) -> None:
    spec = Spec(agents, scripts)
    assert decode_spec(json.dumps(spec.to_json()).encode(), "x") == spec


# --- what it shows ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text, plain, coloured", [
    ("tab\tand \u00fc\u2713", "tab\tand \u00fc\u2713", "tab\tand \u00fc\u2713"),
    ("\x1b[1;31mred\x1b[0m", "red", "\x1b[1;31mred\x1b[0m\x1b[0m"),
    ("\x1b[38:5:1mred", "red", "\x1b[38:5:1mred\x1b[0m"),
    ("\x1b[2J\x1b[1;1H\x1b[?25lgone\x1b[K", "gone", "gone"),
    ("\x1b]0;title\x07text\x1b]8;;http://x\x1b\\link\x1b]8;;\x1b\\", "textlink", "textlink"),
    ("\x1b]0;never ended", "0;never ended", "0;never ended"),
    ("\x1bPq#0\x1b\\sixel\x1bc\x1b(B\x1b", "sixel", "sixel"),
    ("\x9b31mC1\x00\x07\x08\x7f\u202eabc\u2066", "31mC1abc", "31mC1abc"),
])  # fmt: skip
def test_what_is_left_of_escape_sequences(text: str, plain: str, coloured: str) -> None:
    assert (clean(text), clean(text, True)) == (plain, coloured)


@given(st.text(st.sampled_from("\x1b[]m;0123?PX^_\\\x07\x9b\x9d\r\nabcJ") | st.characters()))
def test_nothing_that_moves_the_cursor_is_left(text: str) -> None:
    assert not re.search(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", clean(text))
    assert not re.search(
        r"[\x00-\x08\x0a-\x1f\x7f-\x9f]", re.sub(r"\x1b\[[0-9;:]*m", "", clean(text, True))
    )


def test_cleaning_takes_linear_time() -> None:
    begin = time.monotonic()
    for text in (
        "\x1b]" * 100_000,
        "\x1b[" + "1" * 500_000,
        "\x1bP" + "x" * 500_000,
        "\x1b[ " * 100_000,
    ):
        clean(text)
    assert time.monotonic() - begin < 2


def test_progress_bars_and_odd_text(workspaces: Any, activate: Any) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [
        ["10%\r20%\r", "", "\ud800\u00fc", "\x1b[31mred\x1b[0m\x1b[2K", "x" * 200_000, 1000]
    ]
    result = activate(workspace)
    assert result.log == [
        "web | 10%",
        "web | 20%",
        "web | \\ud800\u00fc",
        "web | red",
        "web | " + "x" * 200_000,
    ]
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
    with subprocess.Popen(
        **command(spec_file, host=workspace.host, NO_COLOR=no_colour), stdout=follower
    ) as process:
        os.close(follower)
        shown = b""
        with contextlib.suppress(OSError):
            while part := os.read(leader, 4096):
                shown += part
    os.close(leader)
    assert process.returncode == 0 and b"\x1b[2J" not in shown
    assert (b"\x1b[36mweb\x1b[0m | \x1b[31mred\x1b[0m" in shown) is not bool(no_colour)
    assert (b"\x1b[32mSucceeded" in shown) is not bool(no_colour)
    assert (b"\x1b" in shown) is not bool(no_colour)


def test_a_terminal_that_only_knows_ascii(workspaces: Any, spec_file: str) -> None:
    workspace = workspaces()
    workspace.logs["web"] = [["\u00fc \u2713", 1000]]
    spec = pathlib.Path(spec_file).read_bytes()
    done = subprocess.run(
        **command("-", host=workspace.host, PYTHONIOENCODING="ascii"),
        input=spec,
        capture_output=True,
        timeout=20,
    )
    assert done.returncode == 0 and b"web | \\xfc \\u2713\n" in done.stdout and done.stderr == b""


def test_a_broken_pipe_ends_quietly(workspaces: Any, spec_file: str) -> None:
    workspace = workspaces()
    workspace.states["web"] = [state("InProgress")]
    closed = threading.Event()
    workspace.logs["web"] = [["one", closed, *map(str, range(100))]]
    heeds = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    }  # CI may ignore it
    with subprocess.Popen(
        **command(spec_file, host=workspace.host), **heeds, stdout=-1, stderr=-1
    ) as process:
        assert process.stdout and process.stderr
        while not process.stdout.readline().startswith(b"web | one"):
            pass
        process.stdout.close()
        closed.set()
        assert process.wait(10) == 1 and process.stderr.read() == b""


def test_interrupted(workspaces: Any, spec_file: str) -> None:
    workspace = workspaces()
    workspace.states["web"] = [state("InProgress")]
    workspace.logs["web"] = [["one"]]
    heeds = {
        "preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)
    }  # CI may ignore it
    with subprocess.Popen(
        **command(spec_file, host=workspace.host), **heeds, stdout=-1, stderr=-1
    ) as process:
        assert process.stdout and process.stderr
        while not process.stdout.readline().startswith(b"web | one"):
            pass
        process.send_signal(signal.SIGINT)
        assert process.wait(10) == 130
        assert process.stderr.read() == b"interrupted: the deployments that were started go on\n"
        assert b"web  InProgress" in process.stdout.read()


def test_the_program_says_what_is_wrong(spec_file: str) -> None:
    done = subprocess.run(**command("missing.json"), capture_output=True, text=True, timeout=20)
    assert done.returncode == 1 and done.stdout == ""
    assert done.stderr == "error: missing.json can't be read: No such file or directory\n"
    done = subprocess.run(
        **command(spec_file, "--agent=x", CACHIX_ACTIVATE_TOKEN=""), capture_output=True, timeout=20
    )
    assert done.returncode == 64 and b"CACHIX_ACTIVATE_TOKEN" in done.stderr


# --- against our own workspace ---------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, str, str]]:
    """A real workspace: its URL, an agent's token, and one for CI."""
    pytest.importorskip("flask")
    tmp_path = tmp_path_factory.mktemp("workspace")
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    data = f"--data={tmp_path / 'data'}"

    def workspace(*arguments: str) -> list[str]:
        return [sys.executable, "-m", "cachix_workspace", *arguments, data]

    tokens = [
        subprocess.run(
            workspace("token", "create", kind), env=env, capture_output=True, check=True, text=True
        ).stdout
        for kind in ("agent", "activate")
    ]
    said = tmp_path / "serve.log"
    with said.open("wb") as log:
        process = subprocess.Popen(
            workspace("serve", "--listen=127.0.0.1:0"), env=env, stdout=log, stderr=log
        )
    try:
        deadline = time.monotonic() + 15
        while not (found := re.search(r"listening on (http://\S+)", said.read_text())):
            assert process.poll() is None and time.monotonic() < deadline, said.read_text()
            time.sleep(0.05)
        yield found[1], tokens[0].split()[-1], tokens[1].split()[-1]
        process.terminate()
        process.wait(15)
    finally:
        process.kill()
        process.wait()


@pytest.mark.parametrize("status", ["Succeeded", "Failed"])
def test_our_workspace_from_the_order_to_the_summary(
    status: str, served: Any, activate: Any
) -> None:
    host, agent_token, token = served
    agent = cachix_connection.Peer.create(host, agent_token, "web")
    socket_ = cachix_connection.connect(agent, "/ws")
    lines = ["$ one", "\u00fc" * 1000, *map(str, range(300))]
    closing = (
        "Successfully activated the deployment."
        if status == "Succeeded"
        else "Failed to activate the deployment. x"
    )

    def deploy() -> None:
        cachix_protocol.decode_to_agent(socket_.recv())
        deployment = cachix_protocol.decode_to_agent(socket_.recv())
        assert (
            isinstance(deployment, cachix_protocol.Deployment) and deployment.store_path == SYSTEM
        )

        def put(path: str, body: str) -> None:
            cachix_connection.http(
                agent, "PUT", f"/api/v1/deploy/{path}", data=body.encode()
            ).raise_for_status()

        def report(value: str) -> None:
            body = {
                "status": value,
                "time": cachix_protocol.utc_now(),
                "closureSize": 2048,
                "reason": None,
            }
            put(f"deployment/{deployment.id}/status", json.dumps(body))

        def log(offset: int, texts: list[str]) -> None:
            records = [
                json.dumps({"line": text, "time": cachix_protocol.utc_now()}) + "\n"
                for text in texts
            ]
            put(f"log/{deployment.id}?offset={offset}", "".join(records))

        report("InProgress")
        log(0, lines)
        report(status)
        log(len(lines), ["after the end", closing])

    worker = threading.Thread(target=deploy, daemon=True)
    worker.start()
    result = activate(host, {"agents": {"web": SYSTEM}}, token=token)
    worker.join(5)
    cachix_connection.hang_up(socket_)
    assert result.status == (0 if status == "Succeeded" else 1) and result.err == ""
    assert result.log == [f"web | {line}" for line in [*lines, "after the end", closing]]
    assert (
        result.lines[-1].startswith(f"web  {status}  ")
        and "2.0 KiB" in result.lines[-1]
        and result.seconds < 3
    )


def test_what_our_workspace_refuses(served: Any, activate: Any) -> None:
    host, agent_token, token = served
    result = activate(host, {"agents": {"nobody": SYSTEM}}, token=token)
    assert result.status == 1 and "(HTTP 400)" in result.err and "nobody" in result.err
    result = activate(host, {"agents": {"nobody": SYSTEM}}, token=agent_token)
    assert result.status == 77 and "activate" in result.err
    result = activate(host, {"agents": {"nobody": SYSTEM}}, token="wrong")
    assert result.status == 77
