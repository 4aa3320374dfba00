"""People: their roles, the links by which they sign in, and their sessions."""

from __future__ import annotations

import datetime
import hmac
import re
import secrets
from dataclasses import dataclass, replace

from sqlalchemy import Connection, delete, insert, select, update

from cachix_protocol import utc_now
from cachix_workspace import tokens as all_tokens
from cachix_workspace.refusal import Refusal
from cachix_workspace.tables import links, people, sessions
from cachix_workspace.tokens import ACTIVATE, ADMIN, digest

VIEWER, OPERATOR, ADMINISTRATOR = "viewer", "operator", "admin"
ROLES = (VIEWER, OPERATOR, ADMINISTRATOR)  # each may do what those before it may
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@+-]{0,63}")
LINK_LASTS = datetime.timedelta(minutes=15)
INVITATION_LASTS = datetime.timedelta(days=7)
SESSION_LASTS = datetime.timedelta(days=30)
SEEN_INTERVAL = datetime.timedelta(minutes=5)  # between two notes that a session is in use


@dataclass(frozen=True)
class Person:
    """A person as the database has it."""

    id: int
    name: str
    role: str
    created_on: str


@dataclass(frozen=True)
class Viewer:
    """A viewer of pages: a person or a token. `session_id` is 0 if a proxy names him."""

    name: str  # as the header of pages and the audit have it
    role: str
    person_id: int | None = None
    token_id: int | None = None
    session_id: int = 0

    def may(self, role: str) -> bool:
        """Whether he may do what takes this role."""
        return ROLES.index(self.role) >= ROLES.index(role)


@dataclass(frozen=True)
class Link:
    """A link that was found: whose it is, and whether it can be used."""

    id: int
    person: Person
    state: str  # valid, used or expired


@dataclass(frozen=True)
class SessionRow:
    """A session: a person or token, and the browser."""

    id: int
    name: str
    created_on: str
    expires_on: str
    seen_on: str
    address: str
    browser: str


# --- people ---------------------------------------------------------------------------------------


def add(connection: Connection, name: str, role: str) -> Person:
    """Note a person. Raises Refusal: 400 for a bad name or role, 409 if the name is taken."""
    if not NAME.fullmatch(name):
        allowed = "letters, digits and `. _ @ + -`, at most 64"
        raise Refusal(400, f"a person's name has {allowed}, not {name[:80]!r}")
    _check_role(role)
    if find(connection, name) is not None:
        raise Refusal(409, f"there is a person {name} already")
    values = {"name": name, "role": role, "created_on": utc_now()}
    connection.execute(insert(people).values(**values))
    return get(connection, name)


def _check_role(role: str) -> None:
    if role not in ROLES:
        raise Refusal(400, f"a role is {', '.join(ROLES)}, not {role[:40]!r}")


def find(connection: Connection, name: str) -> Person | None:
    """The person of this name, if there is one."""
    row = connection.execute(select(people).where(people.c.name == name)).one_or_none()
    return None if row is None else Person(**row._mapping)


def get(connection: Connection, name: str) -> Person:
    """The person of this name. Raises Refusal (404)."""
    person = find(connection, name)
    if person is None:
        raise Refusal(404, f"there is no person {name[:80]!r}")
    return person


def list_all(connection: Connection) -> list[Person]:
    """All people, by name."""
    rows = connection.execute(select(people).order_by(people.c.name))
    return [Person(**row._mapping) for row in rows]


def change_role(connection: Connection, name: str, role: str) -> Person:
    """Give a person another role. Raises Refusal, also (409) for the last admin."""
    _check_role(role)
    person = get(connection, name)
    if role != ADMINISTRATOR:
        _keep_an_admin(connection, person)
    connection.execute(update(people).where(people.c.id == person.id).values(role=role))
    return get(connection, name)


def remove(connection: Connection, name: str) -> Person:
    """Remove a person, which ends what he is signed in with. Raises Refusal (404 or 409)."""
    person = get(connection, name)
    _keep_an_admin(connection, person)
    for table in (links, sessions):
        connection.execute(delete(table).where(table.c.person_id == person.id))
    connection.execute(delete(people).where(people.c.id == person.id))
    return person


def _keep_an_admin(connection: Connection, person: Person) -> None:
    """Raises Refusal (409) if this person is the only admin."""
    admins = [one for one in list_all(connection) if one.role == ADMINISTRATOR]
    if admins == [person]:
        raise Refusal(409, f"{person.name} is the only admin: make another one first")


# --- links ----------------------------------------------------------------------------------------


def make_link(
    connection: Connection, person: Person, lasts: datetime.timedelta = LINK_LASTS
) -> str:
    """Make a link for a person, in place of those that he has not used; its secret part."""
    secret = secrets.token_urlsafe(24)
    connection.execute(delete(links).where(links.c.person_id == person.id))
    connection.execute(delete(links).where(links.c.expires_on < _in(-INVITATION_LASTS)))
    values = {"hash": digest(secret), "person_id": person.id, "created_on": utc_now()}
    connection.execute(insert(links).values(**values, expires_on=_in(lasts)))
    return secret


def first_admin(connection: Connection) -> Person:
    """The oldest admin; one named admin is made if there is none."""
    admins = [one for one in list_all(connection) if one.role == ADMINISTRATOR]
    if admins:
        return min(admins, key=lambda one: one.id)
    taken = {one.name for one in list_all(connection)}
    free = next(
        name for name in ("admin", *map("admin{}".format, range(2, 10_000))) if name not in taken
    )
    return add(connection, free, ADMINISTRATOR)


def find_link(connection: Connection, secret: str) -> Link | None:
    """The link with this secret, whether it can still be used or not."""
    query = select(links, people.c.name, people.c.role, people.c.created_on.label("person_since"))
    row = connection.execute(query.join(people).where(links.c.hash == digest(secret))).one_or_none()
    if row is None:
        return None
    state = "valid" if row.expires_on > utc_now() else "expired"
    state = "used" if row.used_on is not None else state
    return Link(row.id, Person(row.person_id, row.name, row.role, row.person_since), state)


def use_link(connection: Connection, secret: str) -> Link | None:
    """Use a link; what it was. Only one that was valid signs anybody in, and only once."""
    link = find_link(connection, secret)
    if link is not None and link.state == "valid":
        mine = (links.c.id == link.id) & links.c.used_on.is_(None)
        used = connection.execute(update(links).where(mine).values(used_on=utc_now()))
        return link if used.rowcount else replace(link, state="used")
    return link


def has_signed_in(connection: Connection) -> bool:
    """Whether anybody has ever signed in."""
    return connection.execute(select(sessions.c.id).limit(1)).one_or_none() is not None


# --- sessions -------------------------------------------------------------------------------------


def _in(span: datetime.timedelta) -> str:
    moment = datetime.datetime.now(datetime.timezone.utc) + span
    return moment.strftime("%Y-%m-%dT%H:%M:%S.%fZ")


def begin(
    connection: Connection,
    address: str,
    browser: str,
    person_id: int | None = None,
    token_id: int | None = None,
) -> str:
    """Begin a session of a person or of a token; the value of its cookie."""
    secret, now = secrets.token_urlsafe(32), utc_now()
    values = {
        "hash": digest(secret),
        "person_id": person_id,
        "token_id": token_id,
        "created_on": now,
        "expires_on": _in(SESSION_LASTS),
        "seen_on": now,
        "address": address,
        "browser": browser[:200],
    }
    connection.execute(insert(sessions).values(**values))
    return secret


def viewer(connection: Connection, cookie: str) -> Viewer | None:
    """The viewer of a session, unless that has ended, or its person or token has."""
    hashed = digest(cookie)
    row = connection.execute(select(sessions).where(sessions.c.hash == hashed)).one_or_none()
    if row is None or row.expires_on <= utc_now() or not hmac.compare_digest(row.hash, hashed):
        return None
    if row.person_id is not None:
        person = connection.execute(
            select(people).where(people.c.id == row.person_id)
        ).one_or_none()
        if person is None:
            return None
        return Viewer(person.name, person.role, person_id=person.id, session_id=row.id)
    token = all_tokens.get(connection, row.token_id)
    role = None if token is None else role_of(token)
    if token is None or role is None:
        return None
    return Viewer(token.label, role, token_id=token.id, session_id=row.id)


def role_of(token: all_tokens.Token) -> str | None:
    """The role of whoever signs in with a token; None if nobody can.

    A token that is for some agents only is no key to pages that show all.
    """
    if token.state(utc_now()) != "valid" or token.agents is not None:
        return None
    return {ADMIN: ADMINISTRATOR, ACTIVATE: OPERATOR}.get(token.kind)


def note_seen(connection: Connection, session_id: int) -> None:
    """Note that a session is in use, now and then."""
    mine = (sessions.c.id == session_id) & (sessions.c.seen_on < _in(-SEEN_INTERVAL))
    connection.execute(update(sessions).where(mine).values(seen_on=utc_now()))


def is_seen_long_ago(connection: Connection, session_id: int) -> bool:
    """Whether the session's last note of its use is old."""
    mine = (sessions.c.id == session_id) & (sessions.c.seen_on < _in(-SEEN_INTERVAL))
    return connection.execute(select(sessions.c.id).where(mine)).one_or_none() is not None


def list_sessions(connection: Connection) -> list[SessionRow]:
    """The sessions that have not ended, the latest first."""
    query = select(sessions, people.c.name).outerjoin(people)
    query = query.where(sessions.c.expires_on > utc_now()).order_by(sessions.c.seen_on.desc())
    return [
        SessionRow(
            row.id,
            row.name or f"token {row.token_id}",
            *(row.created_on, row.expires_on, row.seen_on, row.address, row.browser),
        )
        for row in connection.execute(query)
    ]


def end(connection: Connection, session_id: int) -> None:
    """End a session. It stays noted, so that somebody has signed in."""
    mine = sessions.c.id == session_id
    connection.execute(update(sessions).where(mine).values(expires_on=utc_now()))
