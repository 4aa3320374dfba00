"""Webhooks: who is told of failures and of agents that are offline, and what he is told.

A message may have several events: what happens within a minute is told together. Messages are kept
in the database until they are delivered, so that no restart loses one.
"""

from __future__ import annotations

import datetime
import hashlib
import hmac
import json
import secrets
import urllib.parse
from collections.abc import Collection
from dataclasses import asdict, dataclass

from sqlalchemy import Connection, delete, func, insert, select, update

from cachix_protocol import utc_now
from cachix_workspace.refusal import Refusal
from cachix_workspace.tables import webhook_messages, webhooks

JSON, SLACK, NTFY = "json", "slack", "ntfy"
FORMATS = (JSON, SLACK, NTFY)  # Mattermost and others take what Slack takes
FAILED, ROLLBACK_FAILED, OFFLINE, BACK = "failed", "rollback-failed", "offline", "back"
EVENTS = (FAILED, ROLLBACK_FAILED, OFFLINE, BACK)
TEST = "test"
SIGNATURE = "X-Signature-256"  # the HMAC of the body, in hexadecimal after `sha256=`
CLAIMED = 60.0  # seconds that a node has for sending a message
GATHER = 60.0  # seconds in which events become one message
LASTS = datetime.timedelta(days=1)  # for so long a message is tried
PAUSES = (30, 60, 300, 900, 1800)  # seconds after each failure; the last one from then on
MAX_URL = 2000
MAX_ANSWER = 300  # characters
KEPT = 50  # messages of a webhook that have ended


@dataclass(frozen=True)
class Webhook:
    """A webhook as the database has it."""

    id: int
    url: str
    format: str
    events: str
    label: str | None
    key: str
    created_on: str

    @property
    def shown_url(self) -> str:
        """The URL for people: what follows the host is a secret with most services."""
        parts = urllib.parse.urlsplit(self.url)
        host = (parts.netloc or "").rpartition("@")[2]
        rest = parts.path if len(parts.path) <= 12 else f"{parts.path[:8]}…"
        return f"{parts.scheme}://{host}{rest}"

    def wants(self, event: Event) -> bool:
        """Whether it is about this event."""
        is_its = self.label is None or self.label in event.labels
        return event.kind == TEST or (event.kind in self.events.split(",") and is_its)


@dataclass(frozen=True)
class Event:
    """Something that happened to an agent: a sentence, and where one reads more."""

    kind: str
    agent: str
    text: str
    url: str
    time: str
    labels: tuple[str, ...] = ()


@dataclass(frozen=True)
class Message:
    """A message as the database has it."""

    id: int
    webhook_id: int
    created_on: str
    body: str
    due_on: str | None
    tries: int
    answer: str | None
    delivered_on: str | None

    @property
    def events(self) -> list[Event]:
        """The event, in words."""
        return [
            Event(**{**event, "labels": tuple(event["labels"])}) for event in json.loads(self.body)
        ]


# --- webhooks -------------------------------------------------------------------------------------


def create(
    connection: Connection, url: str, format: str, events: Collection[str], label: str | None
) -> Webhook:
    """Make a webhook. Raises Refusal (400)."""
    parts = _parts(url)
    if parts is None or parts.scheme not in ("http", "https") or not parts.hostname:
        raise Refusal(400, "a webhook has a URL with http or https, as the service shows it")
    if format not in FORMATS:
        raise Refusal(400, f"a webhook's format is {', '.join(FORMATS)}, not {format[:40]!r}")
    wrong = sorted(set(events) - set(EVENTS))
    if wrong or not events:
        raise Refusal(400, f"a webhook's events are of {', '.join(EVENTS)}")
    values = {
        "url": url,
        "format": format,
        "events": ",".join(event for event in EVENTS if event in events),
        "label": label or None,
        "key": secrets.token_hex(24),
        "created_on": utc_now(),
    }
    query = insert(webhooks).values(**values).returning(webhooks.c.id)
    return get(connection, int(connection.execute(query).scalar_one()))


def _parts(url: str) -> urllib.parse.SplitResult | None:
    if len(url) > MAX_URL or not url.isprintable() or " " in url:
        return None
    try:
        parts = urllib.parse.urlsplit(url)
        parts.port  # noqa: B018  # it is read only here
    except ValueError:
        return None
    return parts


def get(connection: Connection, webhook_id: int) -> Webhook:
    """The webhook of this number. Raises Refusal (404)."""
    query = select(webhooks).where(webhooks.c.id == min(webhook_id, (1 << 31) - 1))
    row = connection.execute(query).one_or_none()
    if row is None:
        raise Refusal(404, f"there is no webhook {webhook_id}")
    return Webhook(**row._mapping)


def list_all(connection: Connection) -> list[Webhook]:
    """All webhooks, the oldest first."""
    rows = connection.execute(select(webhooks).order_by(webhooks.c.id))
    return [Webhook(**row._mapping) for row in rows]


def remove(connection: Connection, webhook_id: int) -> Webhook:
    """Remove a webhook, and what it has not been told yet. Raises Refusal (404)."""
    webhook = get(connection, webhook_id)
    mine = webhook_messages.c.webhook_id == webhook.id
    connection.execute(delete(webhook_messages).where(mine))
    connection.execute(delete(webhooks).where(webhooks.c.id == webhook.id))
    return webhook


# --- messages -------------------------------------------------------------------------------------


def _in(seconds: float) -> str:
    moment = datetime.datetime.now(datetime.timezone.utc) + datetime.timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def tell(connection: Connection, events: Collection[Event]) -> None:
    """Let each webhook that wants to hear of it be told, within GATHER seconds."""
    for webhook in list_all(connection):
        wanted = [event for event in events if webhook.wants(event)]
        if wanted:
            _gather(connection, webhook, wanted)


def _gather(connection: Connection, webhook: Webhook, events: list[Event]) -> None:
    """Add events to the message that is waiting for more, or begin one."""
    waiting = (webhook_messages.c.webhook_id == webhook.id) & (webhook_messages.c.tries == 0)
    due = webhook_messages.c.due_on > utc_now()
    row = connection.execute(select(webhook_messages).where(waiting & due).limit(1)).one_or_none()
    new = [asdict(event) for event in events]
    if row is not None:
        body = json.dumps([*json.loads(row.body), *new])
        mine = webhook_messages.c.id == row.id
        connection.execute(update(webhook_messages).where(mine).values(body=body))
        return
    values = {"webhook_id": webhook.id, "created_on": utc_now(), "body": json.dumps(new)}
    connection.execute(insert(webhook_messages).values(**values, due_on=_in(GATHER), tries=0))


def test(connection: Connection, webhook_id: int, url: str) -> None:
    """Let a webhook be told at once that it works. Raises Refusal (404)."""
    webhook = get(connection, webhook_id)
    event = Event(TEST, "", "This is a test: the webhook works.", url, utc_now())
    values = {"webhook_id": webhook.id, "created_on": utc_now(), "due_on": utc_now(), "tries": 0}
    body = json.dumps([asdict(event)])
    connection.execute(insert(webhook_messages).values(**values, body=body))


def due(connection: Connection) -> list[tuple[Webhook, Message]]:
    """The messages that are to be sent now, with their webhooks."""
    rows = connection.execute(
        select(webhook_messages).where(webhook_messages.c.due_on <= utc_now()).limit(50)
    )
    by_id = {webhook.id: webhook for webhook in list_all(connection)}
    messages = [Message(**row._mapping) for row in rows]
    return [(by_id[each.webhook_id], each) for each in messages if each.webhook_id in by_id]


def claim(connection: Connection, message: Message) -> bool:
    """Take a message that is due, so that no other node sends it; False if one has.

    If this node dies meanwhile, another one sends it later.
    """
    mine = (webhook_messages.c.id == message.id) & (webhook_messages.c.due_on == message.due_on)
    query = update(webhook_messages).where(mine).values(due_on=_in(CLAIMED))
    return bool(connection.execute(query).rowcount)


def note_answer(connection: Connection, message: Message, ok: bool, answer: str) -> None:
    """Note how a try ended, and when the next one is due, if there is to be one."""
    tries = message.tries + 1
    pause = PAUSES[min(tries, len(PAUSES)) - 1]
    begun = datetime.datetime.fromisoformat(message.created_on.replace("Z", "+00:00"))
    is_over = ok or datetime.datetime.now(datetime.timezone.utc) > begun + LASTS
    values = {
        "tries": tries,
        "answer": answer[:MAX_ANSWER],
        "due_on": None if is_over else _in(pause),
        "delivered_on": utc_now() if ok else None,
    }
    mine = webhook_messages.c.id == message.id
    connection.execute(update(webhook_messages).where(mine).values(**values))
    _forget_old(connection, message.webhook_id)


def _forget_old(connection: Connection, webhook_id: int) -> None:
    mine = (webhook_messages.c.webhook_id == webhook_id) & webhook_messages.c.due_on.is_(None)
    query = select(func.max(webhook_messages.c.id)).where(mine)
    newest = connection.execute(query).scalar_one_or_none()
    if newest is not None:
        old = mine & (webhook_messages.c.id <= newest - KEPT)
        connection.execute(delete(webhook_messages).where(old))


def last_messages(connection: Connection) -> dict[int, Message]:
    """The newest message of each webhook, by its number."""
    query = select(func.max(webhook_messages.c.id)).group_by(webhook_messages.c.webhook_id)
    rows = connection.execute(select(webhook_messages).where(webhook_messages.c.id.in_(query)))
    messages = [Message(**row._mapping) for row in rows]
    return {message.webhook_id: message for message in messages}


# --- what is sent ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Body:
    """The body that is posted."""

    content: bytes
    headers: dict[str, str]


def body_of(webhook: Webhook, message: Message) -> Body:
    """A message in a webhook's format."""
    events = message.events
    if webhook.format == NTFY:
        title = events[0].text if len(events) == 1 else f"{len(events)} events"
        text = "\n".join(f"{event.text}\n{event.url}".strip() for event in events)
        plain = title.encode("ascii", "replace").decode()[:200]
        return Body(text.encode(), {"Title": plain, "Content-Type": "text/plain; charset=utf-8"})
    if webhook.format == SLACK:
        text = "\n".join(f"{event.text} {event.url}".strip() for event in events)
        return _json({"text": text.replace("&", "&amp;").replace("<", "&lt;")}, {})
    value = {"id": message.id, "events": [asdict(event) for event in events]}
    body = _json(value, {})
    digest = hmac.new(webhook.key.encode(), body.content, hashlib.sha256).hexdigest()
    return Body(body.content, {**body.headers, SIGNATURE: f"sha256={digest}"})


def _json(value: object, headers: dict[str, str]) -> Body:
    return Body(json.dumps(value).encode(), {**headers, "Content-Type": "application/json"})
