"""/ws: agents register, and are sent each deployment when it is due."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from sqlalchemy import Connection

from cachix_protocol import ABILITY, IN_PROGRESS, AgentRegistered, Cache, encode_to_agent
from cachix_workspace import (
    agents,
    audit,
    cache,
    claims,
    deployments,
    life,
    nodes,
    orders,
    owners,
    tokens,
)
from cachix_workspace.context import Workspace
from cachix_workspace.database import Lock
from cachix_workspace.deployments import DeploymentRow
from cachix_workspace.handlers import Handler, Messages, by_name
from cachix_workspace.life import Decision, Sent
from cachix_workspace.notify import DUE
from cachix_workspace.refusal import Refusal
from cachix_workspace.roster import Member, comes_again, read_members
from cachix_workspace.tokens import Token
from cachix_workspace.websocket import REPLACED, RESTART, REVOKED, Socket

RETRY = 0.05  # seconds until what has changed under our hands is looked at again


@dataclass(frozen=True)
class Arrival:
    """How an agent came: its token, and what its headers say."""

    token: Token
    name: str
    system: str
    version: str
    user_agent: str
    host: str
    address: str

    @property
    def client(self) -> str | None:
        """The version of cachix-deploy, if it is that."""
        return agents.client_of(self.user_agent)

    @property
    def abilities(self) -> str | None:
        """The words about what it knows."""
        return agents.abilities_of(self.user_agent)


class AgentHandler(Handler):
    """The socket of an agent."""

    __slots__ = ("agent_id", "arrival", "is_ours", "knows_wishes", "name", "number", "sent")
    path = "/ws"
    may_wait = True

    def __init__(self, workspace: Workspace, sock: Socket, arrival: Arrival) -> None:
        super().__init__(workspace, sock)
        self.arrival: Arrival | None = arrival  # until it has registered
        self.name, self.is_ours = arrival.name, arrival.client is not None
        self.knows_wishes = ABILITY in (arrival.abilities or "").split()
        self.agent_id, self.number = "", 0
        self.sent = Sent()

    @classmethod
    def handle(cls, visits: Sequence[tuple[Any, Messages]]) -> None:
        """Register those that have come, and send all what is due. Agents send nothing here."""
        handlers: list[AgentHandler] = [handler for handler, _ in visits if handler.sock.open]
        new = [handler for handler in handlers if handler.arrival is not None]
        if new:
            _register(new)
        known = [handler for handler in handlers if handler.agent_id and handler.sock.open]
        # until its presence is written, nothing can be claimed for an agent: then it is woken
        known = [each for each in known if not each.must_wait()]
        if known:
            _send_due(known)

    def must_wait(self) -> bool:
        """Whether other nodes do not know yet that the agent is here."""
        workspace = self.workspace
        return workspace.news.is_shared and workspace.presence.is_pending(self.number)

    @classmethod
    def leave(cls, handlers: Sequence[Any]) -> None:
        """Note that these agents are gone, unless they have come again."""
        workspace: Workspace = handlers[0].workspace
        registered = [handler for handler in handlers if handler.agent_id]
        for handler in registered:
            if handler.is_ours:
                workspace.signs.leave(handler.agent_id)
        hub = workspace.hub
        gone = [each.number for each in registered if hub.unregister(each.agent_id, each.sock)]
        workspace.presence.note_gone(gone)


def _register(handlers: list[AgentHandler]) -> None:
    """Note that agents have connected, and greet them.

    Those that come as they came before wait for no transaction: see presence.py.
    """
    workspace = handlers[0].workspace
    with workspace.database.read() as connection:
        members = read_members(connection, [handler.name for handler in handlers])
        again = [each for each in handlers if _is_as_before(each.arrival, members.get(each.name))]
        offers = _offers(connection, workspace, [each.arrival for each in again if each.arrival])
    greetings = []
    for handler, number in zip(again, workspace.presence.take_numbers(len(again))):
        assert handler.arrival is not None
        handler.number = number
        its_cache = offers[handler.arrival.token.cache_id, handler.arrival.host, handler.is_ours]
        hello = _hello(handler.arrival, members[handler.name].agent_id, its_cache, None)
        greetings.append((handler, hello))
    workspace.presence.note_here({hello.id: handler.number for handler, hello in greetings})
    _greet(greetings)
    others = [handler for handler in handlers if handler.arrival is not None]
    if others:
        _register_new(others)


def _is_as_before(arrival: Arrival | None, member: Member | None) -> bool:
    """Whether nothing is to be written but that an agent is connected."""
    if arrival is None or member is None or not comes_again(member, arrival.token):
        return False
    before = (member.client, member.abilities, member.system, member.version)
    now = (arrival.client, arrival.abilities, arrival.system, arrival.version)
    return bool(arrival.system) and before == now


def _offers(
    connection: Connection, workspace: Workspace, arrivals: list[Arrival]
) -> dict[tuple[int | None, str, bool], Cache | None]:
    """The caches that agents are to use, by their tokens' cache, their host and whose they are."""
    keys = {(each.token.cache_id, each.host, each.client is not None) for each in arrivals}
    settings = workspace.settings
    return {
        (cache_id, host, is_ours): cache.find_for_agent(
            connection, cache_id, settings, host, is_ours
        )
        for cache_id, host, is_ours in keys
    }


def _register_new(handlers: list[AgentHandler]) -> None:
    """Register agents that are new, or come otherwise than before, in one transaction."""
    workspace = handlers[0].workspace
    greetings, refused = [], []
    with workspace.database.write(Lock.SHARED) as connection:
        numbers = nodes.next_numbers(connection, len(handlers))
        for handler, number in zip(handlers, numbers):
            handler.number = number
        greetings += _add(connection, workspace, handlers)
        added = {handler for handler, _ in greetings}
        for handler in sorted(set(handlers) - added, key=by_name):
            try:
                with connection.begin_nested():
                    greetings.append((handler, _admit(connection, workspace, handler)))
            except Refusal as refusal:  # another agent was faster after the handshake
                refused.append((handler, str(refusal)))
    for handler, reason in refused:
        handler.sock.end(REVOKED[0], reason)
    _greet(greetings)
    ids = [hello.id for _, hello in greetings]
    workspace.news.tell(DUE, ids)  # another node may have the former connection of one
    workspace.publish("agents", *(f"agent:{each}" for each in ids))


def _add(
    connection: Connection, workspace: Workspace, handlers: list[AgentHandler]
) -> list[tuple[AgentHandler, AgentRegistered]]:
    """Register those of whom nothing is known, in a few statements; their greetings.

    A fleet that comes for the first time would wait for a dozen statements for each agent.
    """
    # of two with one name the first is added, and the second replaces it
    arrivals = {handler.name: (handler, handler.arrival) for handler in reversed(handlers)}
    newcomers = []
    for name in sorted(agents.unknown_names(connection, list(arrivals))):
        handler, arrival = arrivals[name]
        if arrival is not None and owners.is_simple(arrival.token):
            facts = (arrival.system, arrival.version, arrival.client, arrival.abilities)
            newcomers.append(agents.Newcomer(name, *facts, handler.number, arrival.token.id))
    if not newcomers:
        return []
    ids = agents.register_new(connection, workspace.node.id, newcomers)
    new = [(handler, arrival) for name in ids for handler, arrival in [arrivals[name]] if arrival]
    entries = [(each.token.label, f"{each.name} connected first", each.address) for _, each in new]
    audit.record_many(connection, "agent", entries)
    offers = _offers(connection, workspace, [arrival for _, arrival in new])
    greetings = []
    for handler, arrival in new:
        its_cache = offers[arrival.token.cache_id, arrival.host, handler.is_ours]
        greetings.append((handler, _hello(arrival, ids[handler.name], its_cache, None)))
    return greetings


def _greet(greetings: list[tuple[AgentHandler, AgentRegistered]]) -> None:
    """Tell agents that they have registered. Other sockets of theirs are closed."""
    for handler, hello in greetings:
        workspace = handler.workspace
        handler.arrival, handler.agent_id = None, hello.id
        if handler.is_ours:
            workspace.signs.enter(hello.id, is_known=True)
        workspace.hub.register(hello.id, handler.sock)
        handler.sock.send_texts([encode_to_agent(hello)])
        workspace.signs.note(hello.id)


def _admit(connection: Connection, workspace: Workspace, handler: AgentHandler) -> AgentRegistered:
    """Note that an agent has connected; its greeting. Raises Refusal."""
    arrival = handler.arrival
    assert arrival is not None
    token, name = arrival.token, arrival.name
    known = agents.find_known(connection, name)
    is_new = known is None or not known.has_connected
    facts = (arrival.system, arrival.version, arrival.client, arrival.abilities)
    agent = agents.register(connection, name, *facts, (workspace.node.id, handler.number))
    if is_new:
        detail = f"{name} connected first"
        audit.record(connection, token.label, "agent", detail, arrival.address)
    secret = owners.admit(connection, token, agent)
    if token.issued_by is not None and agent.owner_id is None:
        audit.record(connection, token.label, "agent", f"{name} is bound to it", arrival.address)
    orders.choose_scripts(connection, agent)
    place = (token.cache_id, workspace.settings, arrival.host, agent.is_ours)
    return _hello(arrival, agent.id, cache.find_for_agent(connection, *place), secret)


def _hello(
    arrival: Arrival, agent_id: str, its_cache: Cache | None, secret: str | None
) -> AgentRegistered:
    """The greeting of an agent."""
    token = arrival.token
    expires = token.expires_on if tokens.days_left(token) <= max(tokens.WARN) else None
    return AgentRegistered(agent_id, its_cache, "http", secret, expires)


def _send_due(handlers: list[AgentHandler]) -> None:
    """Send each agent the deployment that is due, if there is one."""
    workspace = handlers[0].workspace
    with workspace.database.read() as connection:
        places = agents.whereabouts(connection, [each.agent_id for each in handlers])
        is_open = deployments.find_open(connection, list(places))
    decisions, shared = [], workspace.news.is_shared  # alone, the hub knows who was replaced
    for handler in handlers:
        place = places.get(handler.agent_id)
        if place is None or place.name != handler.name:  # renamed or removed
            handler.sock.end(*RESTART)
        elif shared and (place.node_id, place.connection) != (workspace.node.id, handler.number):
            handler.sock.end(*REPLACED)
        else:
            decision = _decide(workspace, handler, is_open[handler.agent_id])
            decisions.append((handler, _prepared(handler, decision)))
    claimed = _claim(workspace, decisions)
    for handler, decision in decisions:
        row = decision.send
        if row is not None and row.id not in claimed:
            handler.look_again(RETRY)  # it has changed meanwhile
            continue
        if row is not None:
            handler.sock.send_texts([encode_to_agent(deployments.to_wire(row))])
        handler.sent = life.after(handler.sent, decision)
        handler.look_again(decision.pause)
    workspace.signs.note(*claimed)


def _prepared(handler: AgentHandler, decision: Decision) -> Decision:
    """A decision without what can't be sent, once that has ended."""
    if decision.end is not None and decision.send is not None:
        _give_up(handler.workspace, decision.end, decision.send)
    if decision.send is not None and _is_beyond(handler, decision.send):
        _refuse(handler, decision.send)
        handler.sent = life.after(handler.sent, decision)
        return replace(decision, send=None)
    return decision


def _claim(workspace: Workspace, decisions: list[tuple[AgentHandler, Decision]]) -> set[str]:
    """Claim what is to be sent: no other node sends it too; the ids of what may be sent."""
    rows = [decision.send for _, decision in decisions if decision.send is not None]
    if not rows or not workspace.news.is_shared:  # nobody else sends them, and a disk may be full
        return {row.id for row in rows}
    numbers = [handler.number for handler, decision in decisions if decision.send is not None]
    work = (workspace.node.id, numbers, rows)
    return workspace.grouped.run(workspace.database, lambda c: claims.claim(c, *work))


def _decide(workspace: Workspace, handler: AgentHandler, now: deployments.Open) -> Decision:
    """The decision on what to send an agent now."""
    agent_id, patience = handler.agent_id, workspace.settings.patience
    silence = workspace.signs.silence(now.running.id, agent_id) if now.running else 0.0
    return life.decide(now, handler.is_ours, handler.sent, silence, patience)


def _is_beyond(handler: AgentHandler, row: DeploymentRow) -> bool:
    """Whether an agent would not run a deployment as it was ordered, but switch.

    An agent of ours answers from its own record what it was sent before.
    """
    is_asked = row.status == IN_PROGRESS and handler.is_ours
    return not (row.wish.is_plain or handler.knows_wishes or is_asked)


def _refuse(handler: AgentHandler, row: DeploymentRow) -> None:
    """End a deployment that was ordered before the agent could be asked."""
    workspace = handler.workspace
    with workspace.database.write(Lock.ROWS) as connection:
        agent = agents.get(connection, row.agent_id)
        deployments.refuse(connection, row, orders.beyond([agent], row.wish))
    workspace.note_deployments(row)


def _give_up(workspace: Workspace, running: DeploymentRow, waiting: DeploymentRow) -> None:
    """End a deployment whose process has died unreported."""
    with workspace.database.write(Lock.ROWS) as connection:
        deployments.give_up(connection, running, waiting)
    workspace.signs.forget(running.id)
    workspace.note_deployments(running)
