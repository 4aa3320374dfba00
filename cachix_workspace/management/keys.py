"""The API for tokens, caches, people and webhooks."""

from __future__ import annotations

from cachix_protocol import UsageError, utc_now
from cachix_workspace import (
    audit,
    cache,
    enrolment,
    owners,
    people,
    recent,
    tokens,
    upkeep,
    webhooks,
)
from cachix_workspace.cache import CacheRow
from cachix_workspace.context import current_workspace
from cachix_workspace.enrolment import Terms
from cachix_workspace.management import key_shapes as shapes
from cachix_workspace.management.access import admins, allows_cache, by, operations, operators
from cachix_workspace.management.shapes import Json, Paging, Secret, offset, paged, small
from cachix_workspace.people import INVITATION_LASTS, Person
from cachix_workspace.refusal import Refusal
from cachix_workspace.tokens import AGENT

blueprint = operations("keys", "Tokens, caches, people and webhooks")


# --- tokens ---------------------------------------------------------------------------------------


@blueprint.get("/tokens")
@blueprint.arguments(Paging, location="query")
@blueprint.response(200, shapes.Tokens)
@admins
def list_tokens(query: Json) -> Json:
    """List tokens, the newest first, without their secrets"""
    now, first, limit = utc_now(), offset(query), query["limit"]
    with current_workspace().database.read() as connection:
        rows = tokens.list_all(connection)[::-1][first : first + limit + 1]
        users = owners.users_of(connection, [row.id for row in rows])
        caches = {row.id: row.name for row in cache.list_all(connection)}
    shown = [
        shapes.token(row, now, users.get(row.id, []), caches.get(row.cache_id or 0)) for row in rows
    ]
    return paged(shown, query["page"], limit, "tokens")


@blueprint.post("/tokens")
@blueprint.arguments(shapes.NewToken)
@blueprint.response(201, Secret)
@admins
def create_token(new: Json) -> Json:
    """Create a token"""
    kind, days, who = new["kind"], new["expiresInDays"], by()
    patterns = _patterns(new)
    terms = Terms(days, new["cache"], new["description"])
    with current_workspace().database.write() as connection:
        if kind == AGENT and patterns and set("*,") & set(patterns):
            made = enrolment.add_many(connection, patterns, new["count"], terms, who)
            return {"id": made.token_id, "secret": made.secret}
        if new["count"] is not None:
            raise Refusal(400, "`count` goes with a token of kind agent for patterns of names")
        cache_id = terms.check(connection)
        number, secret = tokens.create(
            connection, kind, new["description"], days, cache_id, agents=patterns
        )
        whose = f", for agents {patterns}" if patterns else ""
        detail = f"{number} ({kind}{whose}) {new['description']}".rstrip()
        audit.record(connection, who.name, "token create", detail, who.address)
    return {"id": number, "secret": secret}


def _patterns(new: Json) -> str | None:
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
        _, successor, secret = upkeep.rotate_token(connection, small(number), by())
    return {"id": successor, "secret": secret}


@blueprint.delete("/tokens/<int:number>")
@blueprint.arguments(shapes.Revocation, location="query")
@blueprint.response(200, shapes.Revoked)
@admins
def revoke_token(query: Json, number: int) -> Json:
    """Revoke a token, and those that agents got for it if `andAgents` is true"""
    and_agents = query["andAgents"]
    with current_workspace().database.write() as connection:
        issued = upkeep.revoke_token(connection, small(number), and_agents, by())
    return {"id": number, "agents": issued}


# --- caches ---------------------------------------------------------------------------------------


def _shown(row: CacheRow, secret: str | None = None) -> Json:
    return shapes.cache(row, cache.url(current_workspace().settings, row.name), secret)


@blueprint.get("/caches")
@blueprint.response(200, shapes.Caches)
@operators
def list_caches() -> Json:
    """List caches, the one that agents use by default first"""
    with current_workspace().database.read() as connection:
        rows = cache.list_all(connection)
    return {"caches": [_shown(row) for row in rows if allows_cache(row.id)]}


@blueprint.post("/caches")
@blueprint.arguments(shapes.NewCache)
@blueprint.response(201, shapes.CacheWithKey)
@admins
def create_cache(new: Json) -> Json:
    """Create a cache; the answer has its secret key"""
    workspace, who = current_workspace(), by()
    with workspace.database.write() as connection:
        row, secret = cache.create(connection, new["name"], new["public"], workspace.settings)
        detail = f"{row.name} ({'public' if row.public else 'private'})"
        audit.record(connection, who.name, "cache create", detail, who.address)
    workspace.feed.publish("all")
    return _shown(row, secret)


@blueprint.get("/caches/<name>")
@blueprint.response(200, shapes.CacheDetail)
@operators
def show_cache(name: str) -> Json:
    """Show a cache, what was pushed to it of late, and what no key of it has signed"""
    settings = current_workspace().settings
    with current_workspace().database.read() as connection:
        row = cache.find_named(connection, name)
    if not allows_cache(row.id):
        raise Refusal(403, "this token is for another cache")
    pushed = [shapes.pushed(one) for one in recent.recent(settings, row)]
    return {**_shown(row), "recent": pushed, "unsigned": cache.unsigned(settings, row)}


@blueprint.post("/caches/<name>/rotate")
@blueprint.response(201, shapes.CacheWithKey)
@admins
def rotate_cache_key(name: str) -> Json:
    """Make a new key for a cache; the answer has the secret one"""
    who = by()
    with current_workspace().database.write() as connection:
        row, secret = cache.rotate(connection, name)
        detail = f"{row.name}, now {row.key}"
        audit.record(connection, who.name, "cache key rotate", detail, who.address)
    return _shown(row, secret)


@blueprint.post("/caches/<name>/retire")
@blueprint.response(200, shapes.Cache)
@admins
def retire_cache_key(name: str) -> Json:
    """Drop the former key of a cache"""
    who = by()
    with current_workspace().database.write() as connection:
        row = cache.retire(connection, name)
        detail = f"{row.name}, left {row.key}"
        audit.record(connection, who.name, "cache key retire", detail, who.address)
    return _shown(row)


# --- people ---------------------------------------------------------------------------------------


def _with_link(person: Person, secret: str) -> Json:
    url = f"{current_workspace().settings.public_url}/sign-in/{secret}"
    return {**shapes.person(person), "link": url}


@blueprint.get("/people")
@blueprint.response(200, shapes.People)
@admins
def list_people() -> Json:
    """List people"""
    with current_workspace().database.read() as connection:
        return {"people": [shapes.person(one) for one in people.list_all(connection)]}


@blueprint.post("/people")
@blueprint.arguments(shapes.NewPerson)
@blueprint.response(201, shapes.PersonWithLink)
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


@blueprint.post("/people/<name>/link")
@blueprint.response(201, shapes.PersonWithLink)
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


@blueprint.get("/sessions")
@blueprint.response(200, shapes.Sessions)
@admins
def list_sessions() -> Json:
    """List who is signed in, those of late first"""
    with current_workspace().database.read() as connection:
        found = people.list_sessions(connection)
    return {"sessions": [shapes.session(one) for one in found]}


@blueprint.delete("/sessions/<int:number>")
@blueprint.response(204)
@admins
def end_session(number: int) -> None:
    """Sign a browser out"""
    who = by()
    with current_workspace().database.write() as connection:
        people.end(connection, small(number))
        audit.record(connection, who.name, "session end", str(number), who.address)


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
@blueprint.response(201, shapes.WebhookWithKey)
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
    return {**shapes.webhook(row), "key": row.key}


@blueprint.post("/webhooks/<int:number>/test")
@blueprint.response(202, shapes.WebhookShape)
@admins
def test_webhook(number: int) -> Json:
    """Send a test to a webhook"""
    url = current_workspace().settings.public_url
    with current_workspace().database.write() as connection:
        webhooks.test(connection, small(number), url)
        return shapes.webhook(webhooks.get(connection, small(number)))


@blueprint.delete("/webhooks/<int:number>")
@blueprint.response(204)
@admins
def remove_webhook(number: int) -> None:
    """Remove a webhook"""
    who = by()
    with current_workspace().database.write() as connection:
        row = webhooks.remove(connection, small(number))
        detail = f"{row.id} {row.shown_url}"
        audit.record(connection, who.name, "webhook remove", detail, who.address)
