"""The API for tokens, caches, people, webhooks, the audit and the freeze."""

from __future__ import annotations

from flask_smorest import Blueprint

from cachix_protocol import UsageError, utc_now
from cachix_workspace import (
    audit,
    cache,
    enrolment,
    freeze,
    owners,
    people,
    tokens,
    upkeep,
    webhooks,
)
from cachix_workspace.context import current_workspace
from cachix_workspace.enrolment import Terms
from cachix_workspace.management import key_shapes as shapes
from cachix_workspace.management.access import admins, by, operators
from cachix_workspace.management.shapes import Json, Secret, paged
from cachix_workspace.people import INVITATION_LASTS, Person
from cachix_workspace.refusal import Refusal
from cachix_workspace.tokens import AGENT

blueprint = Blueprint(
    "keys", __name__, url_prefix="/api/v1", description="Tokens, caches, people, webhooks, audit"
)


# --- tokens ---------------------------------------------------------------------------------------


@blueprint.get("/tokens")
@blueprint.response(200, shapes.Tokens)
@admins
def list_tokens() -> Json:
    """List tokens, without their secrets"""
    now = utc_now()
    with current_workspace().database.read() as connection:
        rows = tokens.list_all(connection)
        shown = [shapes.token(row, now, owners.users(connection, row.id)) for row in rows]
    return {"tokens": shown}


@blueprint.post("/tokens")
@blueprint.arguments(shapes.NewToken)
@blueprint.response(201, Secret)
@admins
def create_token(new: Json) -> Json:
    """Create a token"""
    patterns, days, who = new["agents"], new["expiresInDays"], by()
    terms = Terms(days, new["cache"], new["description"])
    with current_workspace().database.write() as connection:
        if new["kind"] == AGENT and patterns and set("*,") & set(patterns):
            made = enrolment.add_many(connection, patterns, new["count"], terms, who)
            return {"id": made.token_id, "secret": made.secret}
        if new["count"] is not None:
            raise Refusal(400, "`count` goes with a token of kind agent for patterns of names")
        cache_id = terms.check(connection)
        number, secret = tokens.create(
            connection, new["kind"], new["description"], days, cache_id, agents=_agents(new)
        )
        audit.record(connection, who.name, "token create", f"{number} ({new['kind']})", who.address)
    return {"id": number, "secret": secret}


def _agents(new: Json) -> str | None:
    """The agents that a token is for: without any, one of agents is for the first that is new."""
    if not new["agents"]:
        return "" if new["kind"] == AGENT else None
    try:
        return tokens.checked_patterns(new["agents"], "`agents`")
    except UsageError as error:
        raise Refusal(400, str(error)) from None


@blueprint.post("/tokens/<int:number>/rotate")
@blueprint.response(201, Secret)
@admins
def rotate_token(number: int) -> Json:
    """Make the successor of a token"""
    with current_workspace().database.write() as connection:
        _, successor, secret = upkeep.rotate_token(connection, _small(number), by())
    return {"id": successor, "secret": secret}


@blueprint.delete("/tokens/<int:number>")
@blueprint.response(204)
@admins
def revoke_token(number: int) -> None:
    """Revoke a token"""
    with current_workspace().database.write() as connection:
        upkeep.revoke_token(connection, _small(number), False, by())


def _small(number: int) -> int:
    """A number that a database takes: larger ones are no number of anything."""
    return min(number, (1 << 31) - 1)


# --- caches ---------------------------------------------------------------------------------------


@blueprint.get("/caches")
@blueprint.response(200, shapes.Caches)
@operators
def list_caches() -> Json:
    """List caches"""
    settings = current_workspace().settings
    with current_workspace().database.read() as connection:
        rows = cache.list_all(connection)
    return {"caches": [shapes.cache(row, cache.url(settings, row.name)) for row in rows]}


@blueprint.post("/caches")
@blueprint.arguments(shapes.NewCache)
@blueprint.response(201, shapes.Cache)
@admins
def create_cache(new: Json) -> Json:
    """Create a cache; the answer has its secret key"""
    settings, who = current_workspace().settings, by()
    with current_workspace().database.write() as connection:
        row, secret = cache.create(connection, new["name"], new["public"], settings)
        detail = f"{row.name} ({'public' if row.public else 'private'})"
        audit.record(connection, who.name, "cache create", detail, who.address)
    return {**shapes.cache(row, cache.url(settings, row.name)), "secretKey": secret}


@blueprint.post("/caches/<name>/rotate")
@blueprint.response(201, shapes.Cache)
@admins
def rotate_cache_key(name: str) -> Json:
    """Make a new key for a cache; the answer has the secret one"""
    settings, who = current_workspace().settings, by()
    with current_workspace().database.write() as connection:
        row, secret = cache.rotate(connection, name)
        detail = f"{row.name}, now {row.key}"
        audit.record(connection, who.name, "cache key rotate", detail, who.address)
    return {**shapes.cache(row, cache.url(settings, row.name)), "secretKey": secret}


@blueprint.post("/caches/<name>/retire")
@blueprint.response(200, shapes.Cache)
@admins
def retire_cache_key(name: str) -> Json:
    """Drop the former key of a cache"""
    settings, who = current_workspace().settings, by()
    with current_workspace().database.write() as connection:
        row = cache.retire(connection, name)
        detail = f"{row.name}, left {row.key}"
        audit.record(connection, who.name, "cache key retire", detail, who.address)
    return shapes.cache(row, cache.url(settings, row.name))


# --- people ---------------------------------------------------------------------------------------


@blueprint.get("/people")
@blueprint.response(200, shapes.People)
@admins
def list_people() -> Json:
    """List people"""
    with current_workspace().database.read() as connection:
        return {"people": [shapes.person(one) for one in people.list_all(connection)]}


@blueprint.post("/people")
@blueprint.arguments(shapes.NewPerson)
@blueprint.response(201, shapes.PersonShape)
@admins
def add_person(new: Json) -> Json:
    """Add a person; the answer has the link that invites him"""
    who = by()
    with current_workspace().database.write() as connection:
        person = people.add(connection, new["name"], new["role"])
        detail = f"{person.name} ({person.role})"
        audit.record(connection, who.name, "person add", detail, who.address)
        secret = people.make_link(connection, person, INVITATION_LASTS)
    return _with_link(person, secret)


def _with_link(person: Person, secret: str) -> Json:
    return shapes.person(person, f"{current_workspace().settings.public_url}/sign-in/{secret}")


@blueprint.post("/people/<name>/link")
@blueprint.response(201, shapes.PersonShape)
@admins
def make_link(name: str) -> Json:
    """Make a link that signs a person in, in place of one that is not used"""
    who = by()
    with current_workspace().database.write() as connection:
        person = people.get(connection, name)
        audit.record(connection, who.name, "login link", name, who.address)
        secret = people.make_link(connection, person)
    return _with_link(person, secret)


@blueprint.patch("/people/<name>")
@blueprint.arguments(shapes.Role)
@blueprint.response(200, shapes.PersonShape)
@admins
def change_role(change: Json, name: str) -> Json:
    """Give a person another role"""
    who = by()
    with current_workspace().database.write() as connection:
        person = people.change_role(connection, name, change["role"])
        audit.record(connection, who.name, "person role", f"{name}: {person.role}", who.address)
    return shapes.person(person)


@blueprint.delete("/people/<name>")
@blueprint.response(204)
@admins
def remove_person(name: str) -> None:
    """Remove a person, who is signed out by that"""
    who = by()
    with current_workspace().database.write() as connection:
        people.remove(connection, name)
        audit.record(connection, who.name, "person remove", name, who.address)


# --- webhooks -------------------------------------------------------------------------------------


@blueprint.get("/webhooks")
@blueprint.response(200, shapes.Webhooks)
@admins
def list_webhooks() -> Json:
    """List webhooks, without their keys"""
    with current_workspace().database.read() as connection:
        rows = webhooks.list_all(connection)
        last = webhooks.last_messages(connection)
    return {"webhooks": [shapes.webhook(row, last.get(row.id)) for row in rows]}


@blueprint.post("/webhooks")
@blueprint.arguments(shapes.NewWebhook)
@blueprint.response(201, shapes.WebhookShape)
@admins
def create_webhook(new: Json) -> Json:
    """Create a webhook; the answer has the key that signs its messages"""
    who = by()
    with current_workspace().database.write() as connection:
        row = webhooks.create(
            connection, new["url"], new["format"], new["events"], new["label"] or None
        )
        detail = f"{row.id} ({row.format}) {row.shown_url}"
        audit.record(connection, who.name, "webhook create", detail, who.address)
    return shapes.webhook(row, with_key=True)


@blueprint.post("/webhooks/<int:number>/test")
@blueprint.response(202, shapes.WebhookShape)
@admins
def test_webhook(number: int) -> Json:
    """Send a test to a webhook"""
    url = current_workspace().settings.public_url
    with current_workspace().database.write() as connection:
        webhooks.test(connection, number, url)
        return shapes.webhook(webhooks.get(connection, number))


@blueprint.delete("/webhooks/<int:number>")
@blueprint.response(204)
@admins
def remove_webhook(number: int) -> None:
    """Remove a webhook"""
    who = by()
    with current_workspace().database.write() as connection:
        row = webhooks.remove(connection, number)
        detail = f"{row.id} {row.shown_url}"
        audit.record(connection, who.name, "webhook remove", detail, who.address)


# --- audit and freeze -----------------------------------------------------------------------------


@blueprint.get("/audit")
@blueprint.arguments(shapes.AuditQuery, location="query")
@blueprint.response(200, shapes.Entries)
@admins
def list_audit(query: Json) -> Json:
    """Show who did what when, the newest first"""
    page, limit = query["page"], query["limit"]
    offset = min((page - 1) * limit, (1 << 31) - 1)
    with current_workspace().database.read() as connection:
        found = audit.list_page(connection, query["text"], limit + 1, offset)
    return paged([shapes.entry(one) for one in found], page, limit, "entries")


@blueprint.get("/freeze")
@blueprint.response(200, shapes.Freeze)
@operators
def show_freeze() -> Json:
    """Show whether the workspace takes orders"""
    with current_workspace().database.read() as connection:
        return shapes.freeze(freeze.get(connection))


@blueprint.put("/freeze")
@blueprint.arguments(shapes.Reason)
@blueprint.response(200, shapes.Freeze)
@admins
def freeze_workspace(new: Json) -> Json:
    """Take no more orders"""
    who = by()
    with current_workspace().database.write() as connection:
        frozen = freeze.freeze(connection, new["reason"], who.name)
        audit.record(connection, who.name, "freeze", frozen.reason, who.address)
    current_workspace().feed.publish("all")
    return shapes.freeze(frozen)


@blueprint.delete("/freeze")
@blueprint.response(200, shapes.Freeze)
@admins
def thaw_workspace() -> Json:
    """Take orders again"""
    who = by()
    with current_workspace().database.write() as connection:
        if freeze.thaw(connection):
            audit.record(connection, who.name, "thaw", "", who.address)
    current_workspace().feed.publish("all")
    return shapes.freeze(None)
