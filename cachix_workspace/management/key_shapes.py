"""What the API takes and answers of everything but agents, deployments and runs."""

from __future__ import annotations

import datetime

from marshmallow import Schema, fields, validate

from cachix_workspace.audit import Entry
from cachix_workspace.cache import CacheRow
from cachix_workspace.freeze import Frozen
from cachix_workspace.management.shapes import TEXT, Json, Paging
from cachix_workspace.people import ROLES, Person, SessionRow
from cachix_workspace.recent import Recent
from cachix_workspace.tokens import KINDS, Token
from cachix_workspace.webhooks import EVENTS, FORMATS, Message, Webhook


class NewToken(Schema):
    """A token. `agents` are patterns of names: whom it is for, or may deploy to."""

    kind = fields.String(required=True, validate=validate.OneOf(KINDS))
    description = fields.String(load_default="", validate=TEXT)
    agents = fields.String(load_default=None, allow_none=True, validate=TEXT)
    count = fields.Integer(load_default=None, allow_none=True, validate=validate.Range(1))
    expiresInDays = fields.Float(load_default=None, allow_none=True)
    cache = fields.String(load_default="")


class TokenShape(Schema):
    """A token, without its secret."""

    id = fields.Integer(required=True)
    kind = fields.String(required=True)
    state = fields.String(required=True)
    description = fields.String()
    agents = fields.String(allow_none=True)
    createdOn = fields.String()
    expiresOn = fields.String(allow_none=True)
    cache = fields.String(allow_none=True)
    count = fields.Integer(allow_none=True)
    usedOn = fields.String(allow_none=True)
    usedBy = fields.List(fields.String())
    replaces = fields.Integer(allow_none=True)
    issuedBy = fields.Integer(allow_none=True)


class Tokens(Schema):
    """A page of tokens, the newest first."""

    tokens = fields.List(fields.Nested(TokenShape), required=True)
    next = fields.Integer(allow_none=True)


class Revocation(Schema):
    """Whether the tokens that agents got for an enrolment token end with it."""

    andAgents = fields.Boolean(load_default=False)


class Revoked(Schema):
    """A token that is revoked, and how many that agents got for it."""

    id = fields.Integer(required=True)
    agents = fields.Integer(required=True)


def token(row: Token, now: str, users: list[str], cache: str | None) -> Json:
    """A token as the API shows it."""
    return {
        "id": row.id,
        "kind": row.kind,
        "state": row.state(now),
        "description": row.description,
        "agents": row.agents,
        "createdOn": row.created_on,
        "expiresOn": row.expires_on,
        "cache": cache,
        "count": row.most,
        "usedOn": row.used_on,
        "usedBy": users,
        "replaces": row.replaces,
        "issuedBy": row.issued_by,
    }


class NewCache(Schema):
    """A cache."""

    name = fields.String(required=True, validate=validate.Length(max=63))
    public = fields.Boolean(load_default=True)


class Cache(Schema):
    """A cache."""

    name = fields.String(required=True)
    url = fields.String(required=True)
    publicKey = fields.String(required=True)
    formerKey = fields.String(allow_none=True)
    public = fields.Boolean(required=True)


class CacheWithKey(Cache):
    """A cache with its secret key, which is shown this once."""

    secretKey = fields.String(required=True)


class Pushed(Schema):
    """A top-level path that was pushed of late. `size` is in bytes."""

    storePath = fields.String(required=True)
    pushedOn = fields.String(required=True)
    size = fields.Integer(required=True)
    kind = fields.String(required=True)
    system = fields.String(allow_none=True)
    isSigned = fields.Boolean(required=True)


class CacheDetail(Cache):
    """A cache with what was pushed to it of late, and with paths that no key of it has signed."""

    recent = fields.List(fields.Nested(Pushed), required=True)
    unsigned = fields.List(fields.String(), required=True)


class Caches(Schema):
    """All caches."""

    caches = fields.List(fields.Nested(Cache), required=True)


def cache(row: CacheRow, url: str, secret: str | None = None) -> Json:
    """A cache as the API shows it."""
    former = f"{row.old_key_name}:{row.old_public_key}" if row.old_key_name else None
    facts = {"name": row.name, "url": url, "publicKey": row.key, "public": row.public}
    return {**facts, "formerKey": former, **({} if secret is None else {"secretKey": secret})}


def pushed(one: Recent) -> Json:
    """A path that was pushed of late."""
    moment = datetime.datetime.fromtimestamp(one.pushed, datetime.timezone.utc)
    return {
        "storePath": one.store_path,
        "pushedOn": moment.strftime("%Y-%m-%dT%H:%M:%SZ"),
        "size": one.size,
        "kind": one.kind,
        "system": one.system,
        "isSigned": one.is_signed,
    }


# --- people ---------------------------------------------------------------------------------------


class NewPerson(Schema):
    """A person."""

    name = fields.String(required=True, validate=validate.Length(max=64))
    role = fields.String(required=True, validate=validate.OneOf(ROLES))


class Role(Schema):
    """A role."""

    role = fields.String(required=True, validate=validate.OneOf(ROLES))


class PersonShape(Schema):
    """A person."""

    name = fields.String(required=True)
    role = fields.String(required=True)
    createdOn = fields.String(required=True)


class PersonWithLink(PersonShape):
    """A person with a link that signs him in, once. It is shown this once."""

    link = fields.String(required=True)


class People(Schema):
    """All people."""

    people = fields.List(fields.Nested(PersonShape), required=True)


def person(one: Person) -> Json:
    """A person as the API shows him."""
    return {"name": one.name, "role": one.role, "createdOn": one.created_on}


class Session(Schema):
    """A browser that is signed in."""

    id = fields.Integer(required=True)
    name = fields.String(required=True)
    createdOn = fields.String(required=True)
    expiresOn = fields.String(required=True)
    seenOn = fields.String(required=True)
    address = fields.String(required=True)
    browser = fields.String(required=True)


class Sessions(Schema):
    """All browsers that are signed in."""

    sessions = fields.List(fields.Nested(Session), required=True)


def session(one: SessionRow) -> Json:
    """A session as the API shows it."""
    return {
        "id": one.id,
        "name": one.name,
        "createdOn": one.created_on,
        "expiresOn": one.expires_on,
        "seenOn": one.seen_on,
        "address": one.address,
        "browser": one.browser,
    }


# --- webhooks, audit, workspace -------------------------------------------------------------------


class NewWebhook(Schema):
    """A webhook."""

    url = fields.String(required=True, validate=validate.Length(max=2000))
    format = fields.String(load_default="json", validate=validate.OneOf(FORMATS))
    events = fields.List(
        fields.String(validate=validate.OneOf(EVENTS)), load_default=lambda: list(EVENTS)
    )
    label = fields.String(load_default=None, allow_none=True)


class WebhookShape(Schema):
    """A webhook."""

    id = fields.Integer(required=True)
    url = fields.String(required=True)
    format = fields.String(required=True)
    events = fields.List(fields.String())
    label = fields.String(allow_none=True)
    createdOn = fields.String(required=True)
    lastAnswer = fields.String(allow_none=True)
    lastDeliveredOn = fields.String(allow_none=True)


class WebhookWithKey(WebhookShape):
    """A webhook with the key that signs its messages, which is shown this once."""

    key = fields.String(required=True)


class Webhooks(Schema):
    """All webhooks."""

    webhooks = fields.List(fields.Nested(WebhookShape), required=True)


def webhook(row: Webhook, last: Message | None = None) -> Json:
    """A webhook as the API shows it."""
    return {
        "id": row.id,
        "url": row.shown_url,
        "format": row.format,
        "events": row.events.split(","),
        "label": row.label,
        "createdOn": row.created_on,
        "lastAnswer": None if last is None else last.answer,
        "lastDeliveredOn": None if last is None else last.delivered_on,
    }


class AuditQuery(Paging):
    """Which entries: those that have this text anywhere."""

    text = fields.String(load_default="", validate=validate.Length(max=200))


class EntryShape(Schema):
    """Who did what when."""

    id = fields.Integer(required=True)
    time = fields.String(required=True)
    actor = fields.String(required=True)
    address = fields.String()
    action = fields.String(required=True)
    detail = fields.String()


class Entries(Schema):
    """A page of the audit, the newest entries first."""

    entries = fields.List(fields.Nested(EntryShape), required=True)
    next = fields.Integer(allow_none=True)


def entry(one: Entry) -> Json:
    """An entry of the audit as the API shows it."""
    return dict(vars(one))


class Reason(Schema):
    """Why the workspace is frozen."""

    reason = fields.String(required=True, validate=validate.Length(1, 500))


class Freeze(Schema):
    """Whether the workspace takes orders; if not, why, since when and by whom."""

    frozen = fields.Boolean(required=True)
    reason = fields.String(allow_none=True)
    since = fields.String(allow_none=True)
    by = fields.String(allow_none=True)


def freeze(frozen: Frozen | None) -> Json:
    """The freeze as the API shows it."""
    if frozen is None:
        return {"frozen": False, "reason": None, "since": None, "by": None}
    return {"frozen": True, "reason": frozen.reason, "since": frozen.since, "by": frozen.by}


class Workspace(Schema):
    """The workspace: its name and URL, how many agents are in which state, how many are paused."""

    name = fields.String(allow_none=True)
    url = fields.String(required=True)
    version = fields.String(required=True)
    agents = fields.Integer(required=True)
    states = fields.Dict(keys=fields.String(), values=fields.Integer(), required=True)
    paused = fields.Integer(required=True)
    freeze = fields.Nested(Freeze, required=True)


class WorkspaceChange(Schema):
    """What changes of the workspace."""

    name = fields.String(required=True, validate=validate.Length(1, 200))
