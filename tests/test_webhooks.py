"""Webhooks: what is told, to whom, in which form, and again until it is heard."""

from __future__ import annotations

import datetime
import hashlib
import hmac
import http.server
import json
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from cachix_protocol import FAILED, Spec
from cachix_workspace import agents, delivery, orders, webhooks
from cachix_workspace.context import Workspace
from cachix_workspace.database import open_database
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
from cachix_workspace.orders import Actor
from cachix_workspace.refusal import Refusal
from cachix_workspace.settings import Settings
from cachix_workspace.tables import agents as agents_table
from cachix_workspace.tables import deployments as deployments_table
from cachix_workspace.tables import webhook_messages
from cachix_workspace.webhooks import EVENTS, Event, Message

PATH = f"/nix/store/{'a' * 32}-system"
EVENT = Event(
    "failed", "web", "web: deployment 1 failed: <no>", "http://w/1", "2026-01-01T00:00:00Z"
)


class Receiver(http.server.HTTPServer):
    """A service that keeps what it gets, and answers with `statuses`, then 200."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.got: list[tuple[dict[str, str], bytes]] = []
        self.statuses: list[int] = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}/hook"


class Handler(http.server.BaseHTTPRequestHandler):
    server: Receiver

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        self.server.got.append((dict(self.headers), body))
        status = self.server.statuses.pop(0) if self.server.statuses else 200
        self.send_response(status)
        self.send_header("Location", "/elsewhere")
        self.end_headers()

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def receiver() -> Iterator[Receiver]:
    receiver = Receiver()
    yield receiver
    receiver.shutdown()
    receiver.server_close()


@pytest.fixture
def workspace(tmp_path: Path) -> Iterator[Workspace]:
    settings = Settings(tmp_path / "data", "http://w")
    database = open_database(settings, create=True)
    yield Workspace(settings, database, Hub(9), Signs())
    database.close()


def make_due(workspace: Workspace) -> None:
    """Let what waits for more events be sent now."""
    with workspace.database.write() as connection:
        due = webhook_messages.c.due_on.is_not(None)
        connection.execute(
            webhook_messages.update().where(due).values(due_on="2020-01-01T00:00:00Z")
        )


def messages(workspace: Workspace) -> list[Message]:
    with workspace.database.read() as connection:
        rows = connection.execute(webhook_messages.select().order_by(webhook_messages.c.id))
        return [Message(**row._mapping) for row in rows]


def hook(workspace: Workspace, url: str, format: str = "json", label: str | None = None) -> int:
    with workspace.database.write() as connection:
        return webhooks.create(connection, url, format, EVENTS, label).id


def tell(workspace: Workspace, *events: Event) -> None:
    with workspace.database.write() as connection:
        webhooks.tell(connection, events)


def test_several_events_in_a_minute_are_one_message(
    workspace: Workspace, receiver: Receiver
) -> None:
    hook(workspace, receiver.url)
    tell(workspace, EVENT)
    tell(workspace, EVENT, EVENT)
    delivery.deliver(workspace)
    assert receiver.got == []  # more may come
    make_due(workspace)
    delivery.deliver(workspace)
    delivery.deliver(workspace)
    [(headers, body)] = receiver.got
    assert [event["text"] for event in json.loads(body)["events"]] == [EVENT.text] * 3
    with workspace.database.read() as connection:
        key = webhooks.list_all(connection)[0].key
    digest = hmac.new(key.encode(), body, hashlib.sha256).hexdigest()
    assert headers[webhooks.SIGNATURE] == f"sha256={digest}"


def test_each_service_gets_what_it_reads(workspace: Workspace, receiver: Receiver) -> None:
    hook(workspace, receiver.url, "slack")
    hook(workspace, receiver.url, "ntfy")
    tell(workspace, EVENT)
    make_due(workspace)
    delivery.deliver(workspace)
    (_, slack), (headers, ntfy) = receiver.got
    assert json.loads(slack) == {"text": "web: deployment 1 failed: &lt;no> http://w/1"}
    assert ntfy.decode() == f"{EVENT.text}\nhttp://w/1" and headers["Title"] == EVENT.text


@pytest.mark.parametrize("status", [500, 404, 302])
def test_what_was_not_taken_is_tried_again_for_a_day(
    workspace: Workspace, receiver: Receiver, status: int
) -> None:
    hook(workspace, receiver.url)
    tell(workspace, EVENT)
    receiver.statuses = [status]
    make_due(workspace)
    delivery.deliver(workspace)
    [message] = messages(workspace)
    assert message.answer is not None and message.answer.startswith(str(status))
    assert message.tries == 1 and message.due_on is not None and message.delivered_on is None
    make_due(workspace)
    delivery.deliver(workspace)
    assert messages(workspace)[0].delivered_on is not None
    assert [body for _, body in receiver.got][0] == receiver.got[1][1]


def test_after_a_day_it_is_given_up(workspace: Workspace) -> None:
    hook(workspace, "http://127.0.0.1:9/")
    tell(workspace, EVENT)
    with workspace.database.write() as connection:
        old = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=2)
        moment = old.strftime("%Y-%m-%dT%H:%M:%S.%fZ")
        connection.execute(webhook_messages.update().values(created_on=moment))
    make_due(workspace)
    delivery.deliver(workspace)
    [message] = messages(workspace)
    assert message.due_on is None and message.answer == "no answer: ConnectionError"


def order(workspace: Workspace, name: str) -> str:
    with workspace.database.write() as connection:
        if agents.find_known(connection, name) is None:
            agents.register(connection, name, "x86_64-linux", "1")
        return orders.order(connection, Spec({name: PATH}, {}), Actor("CI")).rows[name].id


def fail(workspace: Workspace, deployment: str, ended: str, outcome: str | None = None) -> None:
    with workspace.database.write() as connection:
        mine = deployments_table.c.id == deployment
        values = {"status": FAILED, "outcome": outcome, "ended_on": ended, "reason": "no\nspace"}
        connection.execute(deployments_table.update().where(mine).values(**values))


def test_a_failure_is_told_once_whatever_restarts(workspace: Workspace) -> None:
    hook(workspace, "http://127.0.0.1:9/")
    delivery.look(workspace, is_settled=False)
    first, second = order(workspace, "web"), order(workspace, "db")
    now = datetime.datetime.now(datetime.timezone.utc)
    times = [
        (now + datetime.timedelta(seconds=s)).strftime("%Y-%m-%dT%H:%M:%S.%fZ") for s in (1, 2)
    ]
    fail(workspace, first, times[0])
    fail(workspace, second, times[1], "rollback-failed")
    for _ in range(3):  # as if the server was started again
        delivery.look(workspace, is_settled=False)
    [message] = messages(workspace)
    assert [event.kind for event in message.events] == ["failed", "rollback-failed"]
    assert message.events[0].text == "web: deployment 1 failed: no"
    assert message.events[0].url == "http://w/agents/web/deployments/1"


def test_an_agent_that_goes_and_comes_back_is_told_of(workspace: Workspace) -> None:
    hook(workspace, "http://127.0.0.1:9/")
    with workspace.database.write() as connection:
        for name in ("web", "laptop", "paused", "new"):
            agents.register(connection, name, "x86_64-linux", "1")
        agents.set_labels(connection, ["laptop"], ["may-be-offline"])
        agents.pause(connection, ["paused"], "anna")
        absent = {"connected": False, "seen_on": "2020-01-02T14:02:00Z"}
        connection.execute(agents_table.update().values(**absent))
        mine = agents_table.c.name == "new"
        connection.execute(agents_table.update().where(mine).values(seen_on=""))
    delivery.look(workspace, is_settled=False)
    assert messages(workspace) == []  # all must have time to come back after a start
    for _ in range(2):
        delivery.look(workspace, is_settled=True)
    [message] = messages(workspace)
    assert [event.text for event in message.events] == ["web is offline since 2020-01-02 14:02 UTC"]
    with workspace.database.write() as connection:
        agents.register(connection, "web", "x86_64-linux", "1")
    for _ in range(2):
        delivery.look(workspace, is_settled=True)
    assert [event.text for event in messages(workspace)[0].events][1:] == ["web is back"]


def test_a_label_limits_whom_it_is_about(workspace: Workspace) -> None:
    hook(workspace, "http://127.0.0.1:9/", label="prod")
    tell(workspace, EVENT)
    assert messages(workspace) == []
    tell(workspace, Event("failed", "db", "db failed", "", "", ("prod",)))
    assert len(messages(workspace)) == 1


@pytest.mark.parametrize("url", ["file:///etc/passwd", "http://", "", "http://[", "ftp://x/"])
def test_a_webhook_needs_a_url_of_the_web(workspace: Workspace, url: str) -> None:
    with workspace.database.write() as connection, pytest.raises(Refusal):
        webhooks.create(connection, url, "json", EVENTS, None)


def test_a_url_is_shown_without_its_secret(workspace: Workspace) -> None:
    number = hook(workspace, "https://user:pass@hooks.example/services/T000/SECRET", "slack")
    with workspace.database.read() as connection:
        facts = webhooks.get(connection, number).shown_url
    assert facts == "https://hooks.example/service…"
