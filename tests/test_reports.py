"""Reports: the log in wire lines, their progress, and workspaces that fail, restart or forget."""

import contextlib
import http.server
import json
import random
import socket
import threading
import time
from dataclasses import asdict

import closures
import pytest
from hosts import wait_until
from hypothesis import example, given, settings
from hypothesis import strategies as st
from quiet import QuietServer

import cachix_protocol
import cachix_reports
from activate import journal, lock, outcomes
from activate.logfile import LINE_BYTES, cut
from activate.text import printable
from cachix_channels import HttpChannel, SocketChannel
from cachix_connection import Peer, Waits
from cachix_protocol import (
    FAILED,
    FAILURE_LINE,
    IN_PROGRESS,
    SUCCEEDED,
    SUCCESS_LINE,
    Gone,
    Refused,
    Unreachable,
)
from cachix_reports import Delivery, Reported, Reporter

pytestmark = pytest.mark.promise(6)

ID = "00000000-0000-4000-8000-000000000001"
WAITS = json.dumps({"unit_recheck": 0.1, "backoff": 0.05, "slowest": 0.2})
QUICK = {"CACHIX_DEPLOY_WAITS": WAITS}
LONG_LINES = [b"x" * (LINE_BYTES + more) for more in (-1, 0, 1)]
PARTS = st.one_of(st.binary(max_size=20), st.sampled_from([b"\n", b"\n\n", b"\xff\0", *LONG_LINES]))
LOGS = st.lists(PARTS, max_size=8).map(b"".join)


# --- the log in wire lines ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("data", "final", "sizes", "left"),
    [
        (b"", False, [], 0),
        (b"", True, [], 0),
        (b"\n", False, [0], 0),
        (b"a\nb", False, [1], 1),
        (b"a\nb", True, [1, 1], 0),
        (b"x" * LINE_BYTES, False, [], LINE_BYTES),
        (b"x" * LINE_BYTES, True, [LINE_BYTES], 0),
        (b"x" * LINE_BYTES + b"\n", False, [LINE_BYTES], 0),
        (b"x" * (LINE_BYTES - 1) + b"\n", False, [LINE_BYTES - 1], 0),
        (b"x" * (LINE_BYTES + 1), False, [LINE_BYTES], 1),
        (b"x" * (LINE_BYTES + 1) + b"\n", False, [LINE_BYTES, 1], 0),
        (b"x" * 2 * LINE_BYTES + b"\n\n", False, [LINE_BYTES, LINE_BYTES, 0], 0),
        (b"x" * 2 * LINE_BYTES, False, [LINE_BYTES], LINE_BYTES),
    ],
)
def test_where_lines_are_cut(data, final, sizes, left):
    lines, size = cut(data, 100, final)
    assert [len(line) for line in lines] == sizes and len(data) - size == left
    assert b"".join(lines).replace(b"\n", b"") == data[:size].replace(b"\n", b"")


def in_chunks(log, chunks, most):
    """The lines of a log that grows chunk by chunk, and is read `most` lines at a time."""
    result, start, end = [], 0, 0
    for chunk in [*chunks, len(log)]:
        end = min(len(log), end + chunk)
        while True:
            lines, size = cut(log[start:end], most, final=end == len(log))
            result, start = result + lines, start + size
            if not lines:
                break
    return result


@settings(deadline=None)
@given(LOGS, st.lists(st.integers(1, 2 * LINE_BYTES), max_size=12), st.integers(1, 5))
def test_the_same_log_has_the_same_lines_however_it_grows(log, chunks, most):
    whole, size = cut(log, 1 << 30, True)
    assert size == len(log)
    assert all(len(line) <= LINE_BYTES and b"\n" not in line for line in whole)
    assert in_chunks(log, chunks, most) == whole


@settings(deadline=None)
@given(st.binary(max_size=200))
@example(b"\0\xff\xc3\xa4\xed\xa0\x80")
def test_a_line_is_text_without_nul(line):
    text = printable(line)
    assert "\0" not in text
    assert json.loads(cachix_protocol.dumps({"line": text}).encode())["line"] == text
    with contextlib.suppress(UnicodeDecodeError):
        assert text == line.decode().replace("\0", "\ufffd")


# --- the progress of a report ---------------------------------------------------------------------

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3)
    ),
    max_leaves=5,
)
FIELDS = list(asdict(Reported()))


@settings(deadline=None)
@given(
    st.one_of(
        st.binary(),
        JSON.map(lambda value: json.dumps(value).encode()),
        st.fixed_dictionaries(dict.fromkeys(FIELDS, JSON)).map(lambda v: json.dumps(v).encode()),
    )
)
@example(json.dumps({**asdict(Reported()), "line": float("inf")}).encode())
@example(json.dumps({**asdict(Reported()), "offset": -1}).encode())
@example(json.dumps({**asdict(Reported()), "line": 10**400}).encode())
def test_a_damaged_record_counts_as_the_beginning(tmp_path_factory, text):
    path = tmp_path_factory.getbasetemp() / "reported.json"
    path.write_bytes(text)
    reported = Reported.load(str(path))
    assert reported.line >= 0 and reported.offset >= 0 and isinstance(reported.whole, bool)
    assert reported.size is None or reported.size >= 0


@pytest.mark.usefixtures("no_collector")
def test_a_record_that_nests_too_deep_counts_as_the_beginning(tmp_path):
    (tmp_path / "reported.json").write_bytes(b"[" * 100_000)
    assert Reported.load(str(tmp_path / "reported.json")) == Reported()


def test_a_record_is_read_as_it_was_written(tmp_path):
    text = Reported(True, True, 7, 300, False, True, 4096, "t")
    (tmp_path / "reported.json").write_text(json.dumps(asdict(text)))
    read = Reported.load(str(tmp_path / "reported.json"))
    assert {**asdict(read), "time": "t"} == asdict(text)
    assert Reported.load(str(tmp_path / "none")) == Reported()


# --- a delivery, over a channel in memory ---------------------------------------------------------


class Channel:
    """A workspace in memory. The calls of a name raise its `problems` one after the other."""

    def __init__(self):
        self.statuses, self.steps, self.log, self.calls = [], [], [], []
        self.problems = {"status": [], "lines": []}

    def fail(self, name):
        if self.problems[name]:
            problem = self.problems[name].pop(0)
            if problem is not None:
                raise problem

    def status(self, status, size, reason=None, step=None, outcome=None):
        self.calls.append(status)
        self.fail("status")
        self.statuses.append((status, size, reason))
        self.steps.append((step, outcome))
        return True

    def lines(self, index, lines):
        self.calls.append(("lines", index, len(lines)))
        self.fail("lines")
        if index > len(self.log):
            return len(self.log)
        self.log += lines[len(self.log) - index :]
        return len(self.log)

    def close(self):
        pass


@pytest.fixture
def make(tmp_path):
    """Make a delivery of a deployment with this log: `make(b"a\\n", journal.SUCCEEDED)`."""

    def make(log, step=journal.ACTIVATING, sizes=None, **facts):
        directory = tmp_path / "deployments" / ID
        directory.mkdir(parents=True, exist_ok=True)
        (directory / "log").write_bytes(log)
        entry = journal.Journal(
            str(directory), journal.Record(ID, 1, "web", "http://a", "/nix/store/x", **facts)
        )
        entry.enter(step)
        return Delivery(entry, lock.take(entry.path("reported.lock")), sizes or {})

    return make


def test_a_whole_report_in_its_order(make):
    delivery, channel = make(b"one\ntwo", sizes={ID: 42}), Channel()
    delivery.ship(channel)
    assert channel.statuses == [(IN_PROGRESS, None, None), (IN_PROGRESS, 42, None)]
    assert channel.log == ["one"]
    delivery.entry.enter(journal.SUCCEEDED)
    delivery.ship(channel)
    assert channel.statuses[2:] == [(SUCCEEDED, 42, None)]
    assert channel.log == ["one", "two", SUCCESS_LINE]
    assert delivery.reported.whole
    before = list(channel.calls)
    delivery.ship(channel)
    assert channel.calls == before
    assert Reported.load(delivery.entry.path("reported.json")).whole


def test_an_end_after_the_log_waits_for_the_closing_line(make):
    class Ending(Channel):
        def status(self, status, size, *more, **facts):
            if size is not None and delivery.entry.record.step not in journal.FINAL:
                delivery.entry.enter(journal.SUCCEEDED)
            events.append((status, list(self.log)))
            return super().status(status, size, *more, **facts)

    events: list = []
    delivery, channel = make(b"one\n", sizes={ID: 42}), Ending()
    delivery.ship(channel)
    assert events == [(IN_PROGRESS, []), (IN_PROGRESS, ["one"])]
    delivery.ship(channel)
    assert events[2:] == [(SUCCEEDED, ["one", SUCCESS_LINE])] and delivery.reported.whole


def test_a_begin_that_the_workspace_knows_is_not_told_again(make):
    delivery, channel = make(b"one\n"), Channel()
    delivery.begun = {ID}
    delivery.ship(channel)
    assert channel.statuses == [] and delivery.reported.started
    delivery.entry.enter(journal.SUCCEEDED)
    delivery.ship(channel)
    assert channel.statuses == [(SUCCEEDED, None, None)] and delivery.reported.whole


@pytest.mark.parametrize("problem", [None, Unreachable("cut"), Refused("no"), Gone("lost")])
@pytest.mark.parametrize("is_cancelled", [False, True])
def test_the_question_for_a_cancellation_tells_of_the_begin(
    make, monkeypatch, problem, is_cancelled
):
    def status(channel, *more, **facts):
        if problem is not None:
            raise problem
        return not is_cancelled

    monkeypatch.setattr(HttpChannel, "status", status)
    entry, reporter = make(b"").entry, Reporter(Peer("http://a", "t", "web"), Waits())
    assert not reporter.is_cancelled(entry) and not reporter.begun  # by sockets nobody can ask
    reporter.register(cachix_protocol.AgentRegistered(ID, reports="http"))
    assert reporter.is_cancelled(entry) == (is_cancelled and problem is None)
    assert reporter.begun == ({ID} if problem is None else set())


def test_a_failure_is_reported_with_its_reason(make):
    facts = {"reason": "the disk is full", "detail": "line\nline"}
    delivery, channel = make(b"", journal.ROLLED_BACK, **facts), Channel()
    delivery.ship(channel)
    assert channel.statuses[-1] == (FAILED, None, "the disk is full\nline\nline")
    assert channel.log == [f"{FAILURE_LINE} the disk is full"]


def test_output_after_the_end_does_not_count(make):
    delivery, channel = make(b"a\nb\nlate\n", journal.SUCCEEDED, log_size=4), Channel()
    delivery.ship(channel)
    assert channel.log == ["a", "b", SUCCESS_LINE]


def test_a_log_that_is_gone_gets_its_closing_line_all_the_same(make, tmp_path):
    delivery, channel = make(b"a\nb\n"), Channel()
    delivery.ship(channel)
    (tmp_path / "deployments" / ID / "log").unlink()
    delivery.entry.enter(journal.SUCCEEDED)
    delivery.ship(channel)
    assert channel.log == ["a", "b", SUCCESS_LINE] and delivery.reported.whole


@pytest.mark.parametrize("final", [False, True])
@pytest.mark.parametrize("kept", [0, 1, 37, 25_000])
def test_lines_that_the_workspace_has_lost_are_sent_again(make, final, kept):
    """The workspace answers a gap with the line that it expects: the delivery returns to that."""
    rng = random.Random(kept)
    lines = [b"%d " % i + b"x" * rng.choice([0, 1, 30]) + b"\n" for i in range(30_000)]
    log = b"".join([*lines, b"y" * 200_000])
    expected = [line.decode() for line in cut(log, 1 << 30, True)[0]]
    delivery, channel = make(log), Channel()
    while len(channel.log) < 27_000:
        delivery.ship(channel)
    del channel.log[kept:]
    if final:
        delivery.entry.enter(journal.SUCCEEDED)
    delivery.ship(channel)
    delivery.entry.enter(journal.SUCCEEDED)
    while not delivery.reported.whole:
        delivery.ship(channel)
    assert channel.log == [*expected, SUCCESS_LINE]


def test_lines_that_the_workspace_has_already_are_not_repeated(make, tmp_path):
    log = b"".join(b"line %d\n" % i for i in range(20_000))
    delivery, channel = make(log), Channel()
    delivery.ship(channel)
    (tmp_path / "deployments" / ID / "reported.json").write_text("damaged")
    delivery.lock.close()
    delivery = make(log, journal.SUCCEEDED)
    delivery.ship(channel)
    assert channel.log == [*(f"line {i}" for i in range(20_000)), SUCCESS_LINE]


@pytest.mark.parametrize(("kept", "noted"), [(0, 0), (0, 2), (0, 4), (1, 2), (1, 4), (2, 4)])
@pytest.mark.parametrize("arrived", [0, 1, 2, 3, 5])
def test_the_closing_line_of_a_log_that_is_lost(make, arrived, kept, noted):
    """Lines arrived, which was not noted, and the log is gone: the closing line goes after them."""
    delivery, channel = make(b"a\n" * 5), Channel()
    channel.log = ["a"] * max(arrived, noted // 2)
    delivery.note(started=True, line=noted // 2, offset=noted)
    delivery.lock.close()
    delivery = make(b"b\n"[:kept], journal.SUCCEEDED)
    before = list(channel.log)
    for _ in range(3):
        delivery.ship(channel)
    assert delivery.reported.whole and channel.log[: len(before)] == before
    assert channel.log[-1] == SUCCESS_LINE and channel.log.count(SUCCESS_LINE) == 1


@pytest.mark.parametrize("log", [b"", b"a\n", b"a\nb\n"])
@pytest.mark.parametrize("shipped", [False, True])
@pytest.mark.parametrize("lost", ["answer", "call", "note", "notes"])
def test_the_closing_line_comes_once_whatever_is_cut(make, monkeypatch, log, shipped, lost):
    """Its call or its answer is cut, its note is lost, or all notes (by a power loss)."""
    delivery, channel, step = make(log), Channel(), journal.SUCCEEDED if log else journal.SUPERSEDED
    if shipped:
        delivery.ship(channel)
    delivery.entry.enter(step)
    closing = cachix_reports.closing_line(delivery.entry.record)
    take, note = channel.lines, delivery.note

    def lines(index, lines):
        if closing in lines and lost in ("answer", "call"):
            if lost == "answer":
                take(index, lines)
            raise Unreachable("cut")
        return take(index, lines)

    def no_note(**facts):
        if facts.get("logged"):
            raise Unreachable("killed")
        if lost != "notes":
            note(**facts)

    channel.lines = lines
    monkeypatch.setattr(delivery, "note", no_note)
    with pytest.raises(Unreachable):
        delivery.ship(channel)
    channel.lines = take
    delivery.lock.close()
    delivery = make(log, step)
    delivery.ship(channel)
    assert delivery.reported.whole and channel.log == [*log.decode().splitlines(), closing]


@pytest.mark.parametrize(
    "problem", [Unreachable("no"), Refused("no"), Gone("no"), Unreachable("later", 5.0)]
)
def test_a_failing_log_does_not_hold_back_the_end(make, problem):
    delivery, channel = make(b"a\n", journal.SUCCEEDED), Channel()
    channel.problems["lines"] = [problem] * 3
    for _ in range(3):
        with pytest.raises(type(problem)):
            delivery.ship(channel)
    assert channel.statuses == [(IN_PROGRESS, None, None), (SUCCEEDED, None, None)]
    assert channel.log == []
    assert channel.calls.index(SUCCEEDED) < [call[0] for call in channel.calls].index("lines") + 2
    delivery.ship(channel)
    assert channel.log == ["a", SUCCESS_LINE] and delivery.reported.whole


def test_a_log_arrives_over_a_link_that_is_too_slow_for_whole_batches(make):
    """A call has a deadline. After a failure it is retried with fewer lines, down to one."""
    log = b"".join(b"%d " % i + b"x" * 1000 + b"\n" for i in range(300))
    delivery, channel, most = make(log, journal.SUCCEEDED), Channel(), []
    take = channel.lines

    def lines(index, lines):
        most.append(len(lines))
        if sum(map(len, lines)) > 1100:
            raise Unreachable("no answer within 10 s")
        return take(index, lines)

    channel.lines = lines
    for _ in range(2000):
        with contextlib.suppress(Unreachable):
            delivery.ship(channel)
        if delivery.reported.whole:
            break
    assert channel.log == [*log.decode().splitlines(), SUCCESS_LINE] and min(most) == 1


def test_after_a_long_outage_the_log_comes_at_full_speed_again(make):
    delivery, channel = make(b"x\n" * 100_000, journal.SUCCEEDED), Channel()
    channel.problems["lines"] = [Unreachable("no")] * 20
    while not delivery.reported.whole:
        with contextlib.suppress(Unreachable):
            delivery.ship(channel)
    assert len(channel.log) == 100_001 and len(channel.calls) < 20 + 100


def test_slow_frames_have_a_deadline_together():
    """Each of them is in time, but not all together."""
    frames = []

    class Socket:
        def send_all(self, all_frames, timeout):
            for frame in all_frames:
                frames.append(frame)
                time.sleep(0.1)
            raise AssertionError("all frames were sent")

        settimeout = shutdown = lambda self, *_: None

    channel = SocketChannel(Peer("http://127.0.0.1:1", "token", "web"), ID, ID, Waits(call=0.5))
    path = f"/api/v1/deploy/log/{ID}"
    channel.sockets[path] = Socket()
    with pytest.raises(Unreachable, match="no answer"):
        channel.lines(0, ["x"] * 100)
    assert len(frames) < 50 and path not in channel.sockets


def test_a_workspace_that_takes_no_lines_gets_a_pause(make):
    delivery, channel = make(b"a\n", journal.SUCCEEDED), Channel()
    channel.lines = lambda index, lines: channel.calls.append("lines") or 0
    with pytest.raises(Unreachable, match="took none of the 2 lines that were sent"):
        delivery.ship(channel)
    assert channel.statuses[-1][0] == SUCCEEDED and not delivery.reported.logged
    assert channel.calls.count("lines") == 1


def test_a_state_that_can_not_be_written_stops_no_report(make, monkeypatch):
    delivery, channel = make(b"a\n", journal.SUCCEEDED), Channel()
    real = open

    def full(name, mode="r", *args, **kw):
        if "w" in mode:
            raise OSError(28, "No space left on device")
        return real(name, mode, *args, **kw)

    monkeypatch.setattr("builtins.open", full)
    delivery.ship(channel)
    assert channel.log == ["a", SUCCESS_LINE] and delivery.reported.whole


# --- the reporter's thread ------------------------------------------------------------------------


@pytest.fixture
def reporter(make, monkeypatch, tmp_path):
    """A running reporter, and its channel in memory."""
    waits = Waits(backoff=0.02, slowest=0.05, tail=0.01)
    thread, channel = Reporter(Peer("http://a", "t", "web"), waits), Channel()
    monkeypatch.setattr(thread, "channel", lambda delivery, registered: channel)
    thread.start()
    return thread, channel


def send(reporter, delivery):
    delivery.lock.close()
    reporter.add(delivery.entry)
    reporter.register(cachix_protocol.AgentRegistered(ID))


def test_the_reporter_retries_until_everything_is_delivered(make, reporter):
    reporter, channel = reporter
    channel.problems = {
        "status": [Unreachable("a"), None, Refused("b")],
        "lines": [Unreachable("c"), Unreachable("d")],
    }
    send(reporter, make(b"a\n", journal.SUCCEEDED))
    assert reporter.idle.wait(10)
    assert channel.statuses == [(SUCCEEDED, None, None)] and channel.log == ["a", SUCCESS_LINE]


def test_the_report_of_an_unknown_deployment_is_dropped(make, reporter, capsys):
    reporter, channel = reporter
    channel.problems["status"] = [Gone("http://a does not know deployment 1")] * 9
    send(reporter, make(b"a\n", journal.SUCCEEDED))
    assert reporter.idle.wait(10)
    message = "http://a does not know deployment 1: its report was dropped"
    assert message in capsys.readouterr().err


def test_a_bug_in_one_report_does_not_end_the_reporter(make, reporter, capsys):
    reporter, channel = reporter
    bugs = [RuntimeError("a bug"), UnicodeEncodeError("utf-8", "\ud800", 0, 1, "no")]
    channel.problems["status"] = bugs
    send(reporter, make(b"a\n", journal.SUCCEEDED))
    assert reporter.idle.wait(10) and reporter.is_alive()
    assert channel.statuses[-1][0] == SUCCEEDED
    assert "a bug" in capsys.readouterr().err


def test_the_pause_that_a_workspace_asks_for_is_kept(make, reporter, capsys):
    reporter, channel = reporter
    channel.problems["status"] = [Unreachable("http://a answered HTTP 429", retry_after=0.5)]
    begin = time.monotonic()
    send(reporter, make(b"a\n", journal.SUCCEEDED))
    assert reporter.idle.wait(10) and time.monotonic() - begin >= 0.5
    assert channel.calls.count(IN_PROGRESS) == 2
    assert "not reported yet, trying again: http://a ans" in capsys.readouterr().err


def test_a_report_that_fails_again_and_again_is_counted(make, reporter, capsys):
    reporter, channel = reporter
    channel.problems["status"] = [Unreachable("http://a answered HTTP 502")] * 20
    send(reporter, make(b"a\n", journal.SUCCEEDED))
    assert reporter.idle.wait(10)
    assert capsys.readouterr().err.count("not reported yet") == 1


@pytest.mark.parametrize("early", [False, True])
def test_a_log_that_stalls_delays_no_end(make, reporter, early):
    """The call for the log hangs, from before the end or with it; another deployment ends too."""
    reporter, channel = reporter
    go_on, asked, take = threading.Event(), threading.Event(), channel.lines

    def lines(index, lines):
        asked.set()
        go_on.wait(20)
        return take(index, lines)

    channel.lines = lines
    delivery = make(b"a\n", journal.ACTIVATING if early else journal.SUCCEEDED)
    send(reporter, delivery)
    assert asked.wait(5)
    begin = time.monotonic()
    if early:
        delivery.entry.enter(journal.SUCCEEDED)
        reporter.wake.set()
    wait_until(lambda: SUCCEEDED in channel.calls, 15, "the end")
    assert time.monotonic() - begin < 18 and channel.log == []
    go_on.set()
    assert reporter.idle.wait(10)
    assert channel.log == ["a", SUCCESS_LINE]


@pytest.mark.parametrize(
    ("step", "facts", "outcome"),
    [
        (journal.SUCCEEDED, {}, "succeeded"),
        (journal.SUCCEEDED, {"outcome": outcomes.REBOOT_NEEDED}, "reboot-needed"),
        (journal.ROLLED_BACK, {}, "rolled-back"),
        (journal.ROLLBACK_FAILED, {}, "rollback-failed"),
        (journal.CANCELLED, {}, "nothing-changed"),
        (journal.SUPERSEDED, {}, "nothing-changed"),
        (journal.FAILED, {}, "nothing-changed"),
        (journal.FAILED, {"outcome": outcomes.STATE_LOST}, "state-lost"),
        (journal.FAILED, {"times": {journal.ACTIVATING: 1.0}}, None),
        (
            journal.FAILED,
            {"times": {journal.ACTIVATING: 1.0}, "outcome": outcomes.CHANGED_BY_OTHERS},
            "changed-by-others",
        ),
    ],
)
def test_an_end_is_reported_with_its_outcome(make, step, facts, outcome):
    delivery, channel = make(b"", step, **facts), Channel()
    delivery.ship(channel)
    assert channel.steps == [(None, None), (step, outcome)]


def test_a_report_names_the_step(make):
    delivery, channel = make(b"", journal.DOWNLOADING), Channel()
    delivery.ship(channel)
    assert channel.steps == [(journal.DOWNLOADING, None)]


# --- answers over HTTP ----------------------------------------------------------------------------


class Server:
    """An HTTP server. `queue` has its next answers: status, headers, body."""

    def __init__(self):
        self.queue, self.seen = [], []
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_PUT(self):
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                server.seen.append((time.monotonic(), self.command, self.path, body))
                if server.queue:
                    status, headers, answer = server.queue.pop(0)
                else:
                    status, headers, answer = server.answer(self.path, body)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(answer)), **headers}.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(answer)

            def log_message(self, *_):
                pass

        self.server = QuietServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        threading.Thread(target=self.server.serve_forever, args=(0.02,), daemon=True).start()

    def answer(self, path, body):
        """The answer while the queue is empty."""
        return 200, {"Content-Type": "application/json"}, b'{"status":"InProgress","next":1}'

    def close(self):
        self.server.shutdown()
        self.server.server_close()


@pytest.fixture
def server():
    instance = Server()
    yield instance
    instance.close()


PAGE = {"Content-Type": "text/html"}
OF_JSON = {"Content-Type": "application/json"}


@pytest.mark.parametrize(
    ("status", "headers", "body", "result"),
    [
        (200, OF_JSON, b'{"status":"InProgress"}', True),
        (409, OF_JSON, b'{"status":"Cancelled"}', False),
        (401, PAGE, b"", Refused),
        (403, OF_JSON, b"{}", Refused),
        (404, OF_JSON, b'{"error":"unknown"}', Gone),
        (404, PAGE, b"<h1>Not Found</h1>", Unreachable),
        (302, {"Location": "http://127.0.0.1:1/"}, b"", Unreachable),
        (429, {"Retry-After": "7"}, b"", Unreachable),
        (500, PAGE, b"<h1>oops</h1>", Unreachable),
        (502, PAGE, b"<h1>Bad Gateway</h1>", Unreachable),
        (503, {"Retry-After": "soon"}, b"", Unreachable),
        (200, PAGE, b"<h1>Please log in to this network</h1>", Unreachable),
        (409, PAGE, b"<h1>Conflict</h1>", Unreachable),
        (200, {"Content-Length": "100"}, b"short", Unreachable),
        (200, {"Content-Encoding": "gzip"}, b"no gzip", Unreachable),
    ],
)
def test_answers_to_a_status(server, status, headers, body, result):
    server.queue.append((status, headers, body))
    channel = HttpChannel(Peer(server.url, "t", "web"), ID, timeout=4.0)
    if isinstance(result, bool):
        assert channel.status(IN_PROGRESS, None) is result
    else:
        with pytest.raises(result) as raised:
            channel.status(IN_PROGRESS, None)
        assert getattr(raised.value, "retry_after", 0.0) == (7.0 if status == 429 else 0.0)
    assert len(server.seen) == 1


@pytest.mark.parametrize(
    "body", [b"", b"[]", b"{}", b'{"next":"1"}', b'{"next":true}', b'{"next":1.5}', b"\xff", b"["]
)
def test_answers_to_a_log_without_the_next_line(server, body):
    server.queue.append((200, OF_JSON, body))
    with pytest.raises(Unreachable, match="answered without the next line's index"):
        HttpChannel(Peer(server.url, "t", "web"), ID).lines(0, ["a"])


def test_a_gap_is_no_error(server):
    server.queue.append((416, OF_JSON, b'{"next":3}'))
    assert HttpChannel(Peer(server.url, "t", "web"), ID).lines(9, ["a"]) == 3


@pytest.mark.promise(6)
@pytest.mark.parametrize("step", [journal.SUCCEEDED, journal.CHECKING])
@pytest.mark.parametrize("expected", [0, 1, 9])
def test_a_log_that_takes_no_more_lines_is_not_sent_again(make, server, capsys, step, expected):
    """The end is reported all the same."""
    delivery = make(b"a\nb\nc\n", step)
    asked = []

    def take(path, body):
        asked.append(path)
        status = 409 if "/log/" in path else 200
        return status, OF_JSON, json.dumps({"status": "", "next": expected}).encode()

    server.answer = take
    for _ in range(5):
        delivery.ship(HttpChannel(Peer(server.url, "t", "web"), ID))
    assert delivery.reported.logged and delivery.reported.whole == (step == journal.SUCCEEDED)
    assert len([path for path in asked if "/log/" in path]) == 1
    assert not delivery.log_failed
    assert "takes no more lines of the log" in capsys.readouterr().err


def test_an_answer_without_end_has_a_deadline():
    """Bytes come all the time, so that no packet is ever late."""
    listener = socket.create_server(("127.0.0.1", 0))
    ended = threading.Event()
    head = (
        b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    )

    def drip():
        connection, _ = listener.accept()
        connection.recv(1 << 16)
        with contextlib.suppress(OSError):
            connection.sendall(head)
            while not ended.wait(0.05):
                connection.sendall(b"1\r\n \r\n")
        connection.close()

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    began = time.monotonic()
    with pytest.raises(Unreachable):
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        HttpChannel(Peer(url, "t"), ID, timeout=0.5).status(IN_PROGRESS, None)
    assert time.monotonic() - began < 20
    ended.set()
    thread.join(5)
    listener.close()


def test_no_body_is_larger_than_proxies_allow(make, server):
    """By default nginx refuses more than 1 MiB, so that a larger report would never arrive."""
    delivery = make(b'\\"quoted"\\' * 150_000 + b"\n" + b"short\n" * 20_000, journal.SUCCEEDED)
    lines = []

    def take(path, body):
        if len(body) > 1 << 20:
            return 413, PAGE, b"<h1>Request Entity Too Large</h1>"
        if "/log/" in path:
            lines.extend(body.splitlines())
        return 200, OF_JSON, json.dumps({"status": "", "next": len(lines)}).encode()

    server.answer = take
    delivery.ship(HttpChannel(Peer(server.url, "t", "web"), ID))
    while not delivery.reported.whole:
        delivery.ship(HttpChannel(Peer(server.url, "t", "web"), ID))
    assert json.loads(lines[-1])["line"] == SUCCESS_LINE


# --- live -----------------------------------------------------------------------------------------


def numbered(lines):
    """The numbers of the lines `line 1` and so on, in their order."""
    return [int(line[5:]) for line in lines if line.startswith("line ")]


def talk(rounds, count):
    """A shell command that prints `count` numbered lines in each of its rounds, without haste."""
    lines = f"seq -f 'line %.0f' $((i * {count} - {count - 1})) $((i * {count}))"
    return f"for i in $(seq 1 {rounds}); do {lines}; sleep 0.03; done"


@pytest.mark.long
def test_a_workspace_that_is_killed_during_a_deployment(make_workspace, make_machine):
    """It gets all log lines exactly once and in order, and one end."""
    workspace = make_workspace()
    machine = make_machine(workspace=workspace, env=QUICK)
    after = f"{talk(60, 500)}; {closures.wait_for('/run/go-on')}; echo line 30001"
    path = closures.nixos(machine.files, 1, after=after)
    deployment = machine.order(path)
    for most in (2_000, 12_000):
        wait_until(lambda n=most: len(machine.workspace.log(deployment)) > n, what=f"{most} lines")
        workspace.kill()
        log = machine.host.state / f"deployments/{deployment}/log"
        wait_until(lambda n=most, log=log: log.stat().st_size > n * 12, what="more lines")
        workspace.serve()
    machine.host.path("/run/go-on").touch()
    outcome = machine.outcome(deployment)
    assert outcome.status == "Succeeded"
    wait_until(lambda: workspace.log(deployment)[-1] == SUCCESS_LINE, what="the log's end")
    lines = workspace.log(deployment)
    assert numbered(lines) == list(range(1, 30_002))
    assert lines.count(SUCCESS_LINE) == 1


def test_bad_answers_for_a_while(host, cache, peer):
    peer.reports, left = "http", {"n": 12}

    def bad(request):
        left["n"] -= 1
        if left["n"] < 0:
            is_status = "status" in request.path
            return peer._take_status(ID, request.json()) if is_status else take(request)
        return [(500, b"<h1>oops</h1>"), (429, b""), (502, b""), (413, b"")][left["n"] % 4]

    def take(request):
        offset = request.path.partition("offset=")[2]
        return peer._take_log(ID, int(offset), request.body) if offset else (404, b"")

    peer.answer("PUT /api/v1/deploy/", bad)
    host.fetch(cache.url, cache.key.public, path := closures.plain(cache, 1))
    script = closures.script(cache, "loud", closures.lines(3000))
    host.fetch(cache.url, cache.key.public, script)
    host.agent("web", peer.url, "t0ken", env=QUICK)
    peer.deploy(path, script, id=ID)
    assert peer.finished(ID) and left["n"] < 0
    wait_until(lambda: peer.log(ID)[-1:] == [SUCCESS_LINE], what="the log's end")
    assert numbered(peer.log(ID)) == list(range(1, 3001))
    assert [s["status"] for s in peer.statuses[ID]].count(SUCCEEDED) == 1


def test_sockets_that_are_cut_during_the_log(host, cache, peer):
    """In Cachix's protocol nothing tells which lines arrived: some come twice, but none is lost."""
    after = f"{talk(40, 50)}; {closures.wait_for('/run/go-on')}"
    path = closures.nixos(cache, 1, after=after)
    host.fetch(cache.url, cache.key.public, path)
    host.agent("web", peer.url, "t0ken", env=QUICK)
    deployment = peer.deploy(path)
    for most in (100, 700, 1500):
        wait_until(lambda n=most: len(peer.log(deployment)) > n, what=f"{most} lines")
        peer.connection(f"/api/v1/deploy/log/{deployment}").reset()
        for connection in [one for one in peer.connections if one.path == "/ws-deployment"]:
            connection.reset()
    peer.agent().reset()
    host.path("/run/go-on").touch()
    assert peer.finished(deployment)
    wait_until(lambda: peer.log(deployment)[-1:] == [SUCCESS_LINE], what="the log's end")
    assert sorted(set(numbered(peer.log(deployment)))) == list(range(1, 2001))
    ends = peer.messages(deployment, "DeploymentFinished")
    assert len({end["command"]["hasSucceeded"] for end in ends}) == 1


@pytest.mark.parametrize("reports", ["http", None])
def test_a_killed_agents_report_is_delivered_by_its_successor(host, cache, peer, reports):
    peer.reports = reports
    path = closures.nixos(cache, 1, after=closures.lines(100))
    host.fetch(cache.url, cache.key.public, path)
    agent = host.agent("web", peer.url, "t0ken", env=QUICK)
    peer.agent()
    peer.misbehave("/api/", "500")
    deployment = peer.deploy(path)
    wait_until(lambda: host.step(deployment) == "succeeded", what="the end of the activation")
    agent.kill()
    assert not peer.log(deployment)
    peer.heal()
    agent = host.agent("web", peer.url, "t0ken", env=QUICK)
    assert peer.finished(deployment)
    wait_until(lambda: peer.log(deployment)[-1:] == [SUCCESS_LINE], what="the log's end")
    assert numbered(peer.log(deployment)) == list(range(1, 101))
    record = host.state / f"deployments/{deployment}/reported.json"
    wait_until(lambda: json.loads(record.read_text())["logged"], what="the note of the log's end")
    assert host.record() == [("test", path), ("boot", path)]
    assert agent.stop() == 0
