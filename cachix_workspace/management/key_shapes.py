"""The API's schemas of tokens, caches, people, webhooks, the audit and the workspace."""

from __future__ import annotations

from marshmallow import Schema, fields, validate

from cachix_workspace.audit import Entry
from cachix_workspace.freeze import Frozen
from cachix_workspace.management.shapes import NAME, TEXT, Json, Paging
from cachix_workspace.people import ROLES, Person, SessionRow
from cachix_workspace.tokens import KINDS, Token
from cachix_workspace.webhooks import EVENTS, FORMATS, Message, Webhook

MOST_TOKENS = 5000  # that are made at a time


class NewToken(Schema):
    """A token. `agents` are patterns of names: whom it is for, or may deploy to.

    One of kind agent without them is for the first agent that comes with it, or for any number of
    agents if it is `shared`.
    """

    kind = fields.String(required=True, validate=validate.OneOf(KINDS))
    description = fields.String(load_default="", validate=TEXT)
    agents = fields.String(load_default=None, allow_none=True, validate=TEXT)
    shared = fields.Boolean(load_default=False)
    count = fields.Integer(load_default=None, allow_none=True, validate=validate.Range(1))
    expiresInDays = fields.Float(load_default=None, allow_none=True)
    cache = fields.String(load_default="")


class NewTokens(Schema):
    """Tokens, one for each of these agents."""

    agents = fields.List(
        fields.String(validate=NAME), required=True, validate=validate.Length(1, MOST_TOKENS)
    )
    description = fields.String(load_default="", validate=TEXT)
    expiresInDays = fields.Float(load_default=None, allow_none=True)
    cache = fields.String(load_default="")


class SecretOf(Schema):
    """The token of an agent with its secret, which is shown this once."""

    id = fields.Integer(required=True)
    agent = fields.String(required=True)
    secret = fields.String(required=True)


class Batch(Schema):
    """The tokens that were made, in the order of the agents."""

    tokens = fields.List(fields.Nested(SecretOf), required=True)


class TokenShape(Schema):
    """A token, without its secret."""

    id = fields.Integer(required=True)
    kind = fields.String(required=True)
    state = fields.String(required=True)
    description = fields.String()
    agents = fields.String(allow_none=True)
    createdOn = fields.String()
    expiresOn = fields.String(allow_none=True)
    revokedOn = fields.String(allow_none=True)
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
        "revokedOn": row.revoked_on,
        "cache": cache,
        "count": row.most,
        "usedOn": row.used_on,
        "usedBy": users,
        "replaces": row.replaces,
        "issuedBy": row.issued_by,
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
    """Select entries: those that have this text anywhere."""

    text = fields.String(load_default="", validate=validate.Length(max=200))


class EntryShape(Schema):
    """An entry of the audit."""

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
    """A change of the workspace."""

    name = fields.String(required=True, validate=validate.Length(1, 200))
