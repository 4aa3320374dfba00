"""The commands `token create`, `token list`, `token rotate` and `token revoke`."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Any

from cachix_console import positive, tell, write_secret
from cachix_protocol import Error, UsageError, is_agent_name, listed, utc_now
from cachix_workspace import audit, cache, owners, tokens, upkeep
from cachix_workspace.cli.output import show_json, show_secret, show_table
from cachix_workspace.cli.place import open_workspace, operator
from cachix_workspace.orders import Actor

MAX_DAYS = 36_500
JSON_FIELDS = (
    "id",
    "kind",
    "description",
    "agents",
    "created_on",
    "expires_on",
    "revoked_on",
    "used_on",
    "issued_by",
    "most",
    "replaces",
)


def run(options: dict[str, Any]) -> None:
    """Run one of the commands. Raises Error."""
    if options["create"]:
        create(options)
    elif options["rotate"]:
        rotate(options)
    elif options["revoke"]:
        revoke(options)
    else:
        list_all(options)


def create(options: dict[str, Any]) -> None:
    """Create a token and print its secret, or write it into a file."""
    if options["--names-from"]:
        create_many(options)
        return
    out = options["--out"]
    number, secret = create_all(options, [(agents_of(options), out)])[0]
    kind = kind_of(options)
    show_secret(f"{kind} token {number}", secret, out)


def create_many(options: dict[str, Any]) -> None:
    """Create a token for each agent that a file names, a line each. Raises Error."""
    path, directory = options["--names-from"], options["--out-dir"]
    if not options["agent"] or not directory:
        raise UsageError("--names-from makes tokens for agents, in files below --out-dir")
    try:
        with open(path, encoding="utf-8") as file:
            names = [name for line in file if (name := line.strip())]
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except (OSError, UnicodeDecodeError) as error:
        raise Error(f"{path} or {directory} can't be used: {error}") from None
    wrong = [name for name in names if not is_agent_name(name)]
    if wrong or not names:
        raise Error(f"{path} must have an agent's name in each line, not {listed(wrong) or 'none'}")
    create_all(options, [(name, os.path.join(directory, name)) for name in dict.fromkeys(names)])
    tell(f"{len(set(names))} agent tokens, which are not shown again: in {directory}")


def kind_of(options: dict[str, Any]) -> str:
    """The kind of token that a command line names."""
    return next(kind for kind in tokens.KINDS if options[kind])


def create_all(
    options: dict[str, Any], wanted: list[tuple[str | None, str | None]]
) -> list[tuple[int, str]]:
    """Create tokens, each for some agents and into a file, if it names one; numbers and secrets.

    If one file can't be written no token is made.
    """
    kind, created, most = kind_of(options), [], count_of(options)
    days = positive(options, "--expires", "days", MAX_DAYS) if options["--expires"] else None
    description = options["--description"] or ""
    database, _ = open_workspace(options)
    with contextlib.ExitStack() as written, database.write() as connection:
        cache_id = None
        if options["--cache"]:
            cache_id = cache.find_named(connection, options["--cache"]).id
        for agents, path in wanted:
            made = tokens.create(
                connection, kind, description, days, cache_id, agents=agents, most=most
            )
            whose = f", for agents {agents}" if agents else ""
            detail = f"{made[0]} ({kind}{whose}) {description}".rstrip()
            audit.record(connection, operator(), "token create", detail)
            if path:
                write_secret(made[1], path)
                written.callback(os.unlink, path)
            created.append(made)
        written.pop_all()
    return created


def agents_of(options: dict[str, Any]) -> str | None:
    """The agents that a token is for: None for any, empty for the first. Raises UsageError."""
    given = [option for option in ("--name", "--names", "--agents") if options[option] is not None]
    if options["--shared"] and not options["agent"]:
        raise UsageError("--shared is for agent tokens: other ones are for all agents anyway")
    if not given:
        return "" if options["agent"] and not options["--shared"] else None
    (option,), text = given, str(options[given[0]])
    if (option == "--agents") == bool(options["agent"]):
        right = "--name or --names" if options["agent"] else "--agents"
        raise UsageError(f"{option} does not fit this kind of token: use {right}")
    if option != "--name":
        return tokens.checked_patterns(text, option)
    if not is_agent_name(text):
        raise UsageError(f"--name must be an agent's name, not {text[:100]!r}")
    return text


def count_of(options: dict[str, Any]) -> int | None:
    """The number of agents that may enrol; None for any. Raises UsageError."""
    text = options["--count"]
    if text is None:
        return None
    if options["--names"] is None or not re.fullmatch("[1-9][0-9]{0,6}", text):
        raise UsageError("--count is a number of agents, and goes with --names")
    return int(text)


def number_of(options: dict[str, Any]) -> int:
    """The number of the token that a command is about. Raises UsageError."""
    number = options["ID"]
    if not re.fullmatch("[0-9]{1,18}", number):
        raise UsageError(f"ID is a number of `cachix-workspace token list`, not {number[:20]!r}")
    return int(number)


def rotate(options: dict[str, Any]) -> None:
    """Create a token's successor."""
    number = number_of(options)
    database, _ = open_workspace(options)
    with database.write() as connection:
        token, successor, secret = upkeep.rotate_token(connection, number, Actor(operator()))
        if options["--out"]:
            write_secret(secret, options["--out"])
    ends = f"token {number} ends when this one is used, in {tokens.OVERLAP:.0f} days at the latest"
    tell(ends)
    show_secret(f"{token.kind} token {successor}", secret, options["--out"])


def revoke(options: dict[str, Any]) -> None:
    """Revoke a token."""
    number, and_agents = number_of(options), bool(options["--and-agents"])
    database, _ = open_workspace(options)
    with database.write() as connection:
        issued = upkeep.revoke_token(connection, number, and_agents, Actor(operator()))
    also = f" and {issued} of its agents are" if and_agents else " is"
    tell(f"token {number}{also} revoked")


def list_all(options: dict[str, Any]) -> None:
    """List the tokens."""
    database, _ = open_workspace(options)
    with database.read() as connection:
        rows = tokens.list_all(connection)
        users = {token.id: owners.users(connection, token.id) for token in rows}
    now = utc_now()
    if options["--json"]:
        show_json([_facts(token, now) | {"used_by": users[token.id]} for token in rows])
        return
    some = any(token.agents is not None for token in rows)
    table = [["ID", "KIND", "STATE", *["AGENTS"] * some, "CREATED", "EXPIRES", "DESCRIPTION"]]
    for token in rows:
        kind = _kind(token)
        dates = [token.created_on[:10], (token.expires_on or "-")[:10]]
        agents = [token.agents or ("the first" if token.is_unbound else "any")] * some
        table.append([str(token.id), kind, token.state(now), *agents, *dates, token.description])
    show_table(table)
    replaced = {token.replaces: token.id for token in rows if token.replaces is not None}
    for token in rows:
        if token.id in replaced and token.state(now) == "valid":
            still = f", which {listed(users[token.id])} still use" if users[token.id] else ""
            tell(f"token {token.id} is replaced by token {replaced[token.id]}{still}")


def _kind(token: tokens.Token) -> str:
    """A token's kind for people: whoever has a shared one can be any agent."""
    if token.kind != tokens.AGENT:
        return token.kind
    if token.issued_by is not None:
        return "agent's own"
    if token.is_enrolment:
        return "agent, enrols"
    return "agent, shared" if token.agents is None else "agent"


def _facts(token: tokens.Token, now: str) -> dict[str, Any]:
    return {field: getattr(token, field) for field in JSON_FIELDS} | {"state": token.state(now)}
