"""The API for tokens, people and webhooks."""

from __future__ import annotations

from cachix_protocol import UsageError, utc_now
from cachix_workspace import (
    audit,
    cache,
    enrolment,
    owners,
    people,
    tokens,
    upkeep,
    webhooks,
)
from cachix_workspace.context import current_workspace
from cachix_workspace.enrolment import Terms
from cachix_workspace.management import key_shapes as shapes
from cachix_workspace.management.access import admins, by, operations
from cachix_workspace.management.shapes import Json, Paging, Secret, offset, paged, small
from cachix_workspace.people import Person
from cachix_workspace.refusal import Refusal
from cachix_workspace.tokens import AGENT

blueprint = operations("keys", "Tokens, people and webhooks")


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
    answer = [
        shapes.token(row, now, users.get(row.id, []), caches.get(row.cache_id or 0)) for row in rows
    ]
    return paged(answer, query["page"], limit, "tokens")


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
            enrolled = enrolment.add_many(connection, patterns, new["count"], terms, who)
            return {"id": enrolled.token_id, "kind": kind, "secret": enrolled.secret}
        if new["count"] is not None:
            raise Refusal(400, "`count` goes with a token of kind agent for patterns of names")
        cache_id = terms.check(connection)
        number, secret = tokens.create(
            connection, kind, new["description"], days, cache_id, agents=patterns
        )
        whose = f", for agents {patterns}" if patterns else ""
        detail = f"{number} ({kind}{whose}) {new['description']}".rstrip()
        audit.record(connection, who.name, "token create", detail, who.address)
    return {"id": number, "kind": kind, "secret": secret}


def _patterns(new: Json) -> str | None:
    """The agents that a token is for: without any, one of agents is for the first that is new."""
    is_agents = new["kind"] == AGENT
    if new["shared"] and (new["agents"] or not is_agents):
        raise Refusal(400, "`shared` goes with a token of kind agent, and without `agents`")
    if not new["agents"]:
        return "" if is_agents and not new["shared"] else None
    try:
        return tokens.checked_patterns(new["agents"], "`agents`")
    except UsageError as error:
        raise Refusal(400, str(error)) from None


@blueprint.post("/tokens/batch")
@blueprint.arguments(shapes.NewTokens)
@blueprint.response(201, shapes.Batch)
@admins
def create_tokens(new: Json) -> Json:
    """Create a token for each of some agents, or none if that fails"""
    terms = Terms(new["expiresInDays"], new["cache"], new["description"])
    with current_workspace().database.write() as connection:
        enrolled = enrolment.for_each(connection, new["agents"], terms, by())
    answer = [{"id": one.token_id, "agent": one.agents, "secret": one.secret} for one in enrolled]
    return {"tokens": answer}


@blueprint.post("/tokens/<int:number>/rotate")
@blueprint.response(201, Secret)
@admins
def rotate_token(number: int) -> Json:
    """Make the successor of a token"""
    with current_workspace().database.write() as connection:
        former, successor, secret = upkeep.rotate_token(connection, small(number), by())
    return {"id": successor, "kind": former.kind, "secret": secret}


@blueprint.delete("/tokens/<int:number>")
@blueprint.arguments(shapes.Revocation, location="query")
@blueprint.response(200, shapes.Revoked)
@admins
def revoke_token(query: Json, number: int) -> Json:
    """Revoke a token, and those that agents got for it if `andAgents` is true"""
    and_agents = query["andAgents"]
    workspace = current_workspace()
    with workspace.database.write() as connection:
        issued = upkeep.revoke_token(connection, small(number), and_agents, by())
    workspace.note_revoked([number, *issued])
    return {"id": number, "agents": len(issued)}


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
    with current_workspace().database.write() as connection:
        return _with_link(*upkeep.add_person(connection, new["name"], new["role"], by()))


@blueprint.post("/people/<name>/link")
@blueprint.response(201, shapes.PersonWithLink)
@admins
def make_link(name: str) -> Json:
    """Make a link that signs a person in, in place of one that is not used"""
    with current_workspace().database.write() as connection:
        return _with_link(*upkeep.make_link(connection, name, by()))


@blueprint.patch("/people/<name>")
@blueprint.arguments(shapes.Role)
@blueprint.response(200, shapes.PersonShape)
@admins
def change_role(change: Json, name: str) -> Json:
    """Give a person another role"""
    with current_workspace().database.write() as connection:
        return shapes.person(upkeep.change_role(connection, name, change["role"], by()))


@blueprint.delete("/people/<name>")
@blueprint.response(204)
@admins
def remove_person(name: str) -> None:
    """Remove a person, who is signed out by that"""
    with current_workspace().database.write() as connection:
        upkeep.remove_person(connection, name, by())


@blueprint.get("/sessions")
@blueprint.response(200, shapes.Sessions)
@admins
def list_sessions() -> Json:
    """List who is signed in, those of late first"""
    with current_workspace().database.read() as connection:
        sessions = people.list_sessions(connection)
    return {"sessions": [shapes.session(one) for one in sessions]}


@blueprint.delete("/sessions/<int:number>")
@blueprint.response(204)
@admins
def end_session(number: int) -> None:
    """Sign a browser out"""
    with current_workspace().database.write() as connection:
        upkeep.end_session(connection, small(number), by())


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
    with current_workspace().database.write() as connection:
        row = upkeep.create_webhook(
            connection, new["url"], new["format"], new["events"], new["label"], by()
        )
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
    with current_workspace().database.write() as connection:
        upkeep.remove_webhook(connection, small(number), by())
