"""The thread that tells webhooks: what happened to deployments and agents, found out by looking.

It looks at the database now and then, and keeps there what it has told: neither a restart nor a
network that is down loses an event, or tells one twice.
"""

from __future__ import annotations

import datetime
import json
import logging
import threading
import time

import requests
from sqlalchemy import Connection, select

from cachix_protocol import FAILED, utc_now
from cachix_workspace import fleet, membership, sentences, webhooks
from cachix_workspace.context import Workspace
from cachix_workspace.database import get_meta, put_meta, reason_of
from cachix_workspace.fleet import Brief
from cachix_workspace.tables import agents, deployments
from cachix_workspace.webhooks import BACK, OFFLINE, ROLLBACK_FAILED, Event, Message, Webhook

logger = logging.getLogger(__name__)

OFFLINE_AFTER = 300.0  # seconds; also after the start, as all agents must have time to come back
LEADS = 45.0  # seconds for which no other node tells
TIMEOUT = 10.0  # seconds for a webhook's answer
MAY_BE_OFFLINE = "may-be-offline"  # the label of laptops and the like
TOLD_OFFLINE, TOLD_ENDED = "told_offline", "told_ended"  # keys of the meta table
MOST_ENDED = 500  # deployments that are looked at at a time


def deliver_all(workspace: Workspace) -> None:
    """Look and tell, until the process ends."""
    pause, started, settings = threading.Event(), time.monotonic(), workspace.settings
    while not pause.wait(min(settings.look_interval, settings.revocation_interval)):
        try:
            if membership.leads(workspace, "webhooks", LEADS):
                look(workspace, is_settled=time.monotonic() > started + OFFLINE_AFTER)
                deliver(workspace)
        except Exception as error:  # this thread is the only one that tells: it must go on
            logger.warning("webhooks could not be told: %s", reason_of(error))


def look(workspace: Workspace, is_settled: bool) -> None:
    """Find out what happened since the last look, and note whom to tell."""
    with workspace.database.read() as connection:
        if not webhooks.list_all(connection):
            _begin(workspace, connection)
            return
        url = workspace.settings.public_url
        ended, last = _ended(connection, url)
        absent, offline = _offline(workspace, connection, url) if is_settled else ([], None)
    if not ended and not absent and last is None and offline is None:
        return
    with workspace.database.write() as connection:
        webhooks.tell(connection, [*ended, *absent])
        if last is not None:
            put_meta(connection, TOLD_ENDED, last)
        if offline is not None:
            put_meta(connection, TOLD_OFFLINE, json.dumps(offline))


def _begin(workspace: Workspace, connection: Connection) -> None:
    """Without a webhook nothing is to be told later of what happens now."""
    last_time = get_meta(connection, TOLD_ENDED) or ""
    if last_time < _ago(60.0):
        with workspace.database.write() as other:
            put_meta(other, TOLD_ENDED, utc_now())


def _ago(seconds: float) -> str:
    moment = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(seconds=seconds)
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def _ended(connection: Connection, url: str) -> tuple[list[Event], str | None]:
    """The failures since the last look, and the end of the last one; None if nothing ended."""
    last_time = get_meta(connection, TOLD_ENDED) or utc_now()
    new = (deployments.c.status == FAILED) & (deployments.c.ended_on > last_time)
    columns = (agents.c.name, agents.c.labels, deployments)
    query = select(*columns).join_from(deployments, agents).where(new)
    rows = connection.execute(query.order_by(deployments.c.ended_on).limit(MOST_ENDED)).all()
    events = []
    for row in rows:
        index = row._mapping["index"]
        reason = sentences.first_line(row.reason) or "the agent did not say why"
        is_broken = row.outcome == ROLLBACK_FAILED
        what = "rollback failed" if is_broken else "failed"
        events.append(
            Event(
                ROLLBACK_FAILED if is_broken else webhooks.FAILED,
                row.name,
                f"{row.name}: deployment {index} {what}: {reason}",
                f"{url}/agents/{row.name}/deployments/{index}",
                row.ended_on,
                tuple(filter(None, (row.labels or "").split(","))),
            )
        )
    if rows:
        return events, str(rows[-1].ended_on)
    return events, last_time if get_meta(connection, TOLD_ENDED) is None else None


def _offline(
    workspace: Workspace, connection: Connection, url: str
) -> tuple[list[Event], list[str] | None]:
    """Agents that have gone or come back since the last look, and all that are gone now.

    None if that is as before.
    """
    reported = set(json.loads(get_meta(connection, TOLD_OFFLINE) or "[]"))
    lost_after = workspace.settings.lost_after
    briefs = fleet.brief_of_all(connection, workspace.signs, lost_after)
    before = _ago(OFFLINE_AFTER)
    absent = {brief.name for brief in briefs if _is_gone(brief, before)}
    # one that has gone, and was paused or labelled since, is neither gone nor back
    here = {brief.name for brief in briefs if brief.connected}
    events = [
        _event(OFFLINE if brief.name in absent else BACK, brief, url)
        for brief in briefs
        if brief.name in (absent - reported) | (reported & here)
    ]
    now = sorted((absent | reported) - here)
    return events, now if set(now) != reported else None


def _is_gone(brief: Brief, before: str) -> bool:
    is_quiet = not brief.connected and bool(brief.seen_on) and brief.seen_on < before
    return is_quiet and brief.paused_on is None and MAY_BE_OFFLINE not in brief.labels


def _event(kind: str, brief: Brief, url: str) -> Event:
    since = sentences.clock(brief.seen_on)
    text = f"offline since {since}" if kind == OFFLINE else "back"
    link = f"{url}/agents/{brief.name}"
    return Event(kind, brief.name, f"{brief.name} is {text}", link, utc_now(), brief.labels)


def deliver(workspace: Workspace) -> None:
    """Send what is due. No transaction is open meanwhile."""
    with workspace.database.read() as connection:
        todo = webhooks.due(connection)
    for webhook, message in todo:
        with workspace.database.write() as connection:
            if not webhooks.claim(connection, message):
                continue  # another node sends it
        ok, answer = send(webhook, message)
        with workspace.database.write() as connection:
            webhooks.note_answer(connection, message, ok, answer)


def send(webhook: Webhook, message: Message) -> tuple[bool, str]:
    """Post a message; whether it was taken, and what was answered."""
    body = webhooks.body_of(webhook, message)
    try:
        with requests.post(
            webhook.url,
            data=body.content,
            headers=body.headers,
            timeout=TIMEOUT,
            allow_redirects=False,
            stream=True,
        ) as answer:
            return answer.status_code // 100 == 2, f"{answer.status_code} {answer.reason}"
    except requests.RequestException as error:
        return False, f"no answer: {type(error).__name__}"
    except (ValueError, OSError) as error:
        return False, f"it can't be sent: {error}"
