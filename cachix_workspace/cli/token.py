"""The commands `token create`, `token list`, `token rotate` and `token revoke`."""

from __future__ import annotations

import os
import re
from typing import Any

from cachix_console import positive, tell
from cachix_protocol import Error, UsageError, is_agent_name, listed
from cachix_workspace import tokens
from cachix_workspace.cli.backend import backend, every
from cachix_workspace.cli.output import Json, new_files, show_json, show_secret, show_table

MAX_DAYS = 36_500


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


# --- create ---------------------------------------------------------------------------------------


def create(options: dict[str, Any]) -> None:
    """Create a token and print its secret, or write it into a file."""
    if options["--names-from"]:
        create_many(options)
        return
    kind, out = kind_of(options), options["--out"]
    body = {**terms_of(options), "kind": kind, "agents": agents_of(options)}
    body.update(shared=bool(options["--shared"]), count=count_of(options))
    where = backend(options)
    with new_files([out] if out else []) as write:
        answer = where.call("POST", "/tokens", body)
        write([answer["secret"]])
    show_secret(f"{kind} token {answer['id']}", answer["secret"], out)


def create_many(options: dict[str, Any]) -> None:
    """Create a token for each agent that a file names, a line each. Raises Error."""
    path, directory = options["--names-from"], options["--out-dir"]
    if not options["agent"] or not directory:
        raise UsageError("--names-from makes tokens for agents, in files below --out-dir")
    terms, where = terms_of(options), backend(options)
    try:
        with open(path, encoding="utf-8") as file:
            names = list(dict.fromkeys(name for line in file if (name := line.strip())))
        os.makedirs(directory, mode=0o700, exist_ok=True)
    except (OSError, UnicodeDecodeError) as error:
        raise Error(f"{path} or {directory} can't be used: {error}") from None
    wrong = [name for name in names if not is_agent_name(name)]
    if wrong or not names:
        raise Error(f"{path} must have an agent's name in each line, not {listed(wrong) or 'none'}")
    with new_files([os.path.join(directory, name) for name in names]) as write:
        answers = where.call("POST", "/tokens/batch", {**terms, "agents": names})["tokens"]
        write([one["secret"] for one in answers])
    tell(f"{len(names)} agent tokens, which are not shown again: in {directory}")


def kind_of(options: dict[str, Any]) -> str:
    """The kind of token that a command line names."""
    return next(kind for kind in tokens.KINDS if options[kind])


def terms_of(options: dict[str, Any]) -> Json:
    """The options that any token has. Raises UsageError."""
    days = positive(options, "--expires", "days", MAX_DAYS) if options["--expires"] else None
    description, cache = options["--description"] or "", options["--cache"] or ""
    return {"description": description, "expiresInDays": days, "cache": cache}


def agents_of(options: dict[str, Any]) -> str | None:
    """The agents that a token is for, if a command line names any. Raises UsageError."""
    given = [option for option in ("--name", "--names", "--agents") if options[option] is not None]
    if options["--shared"] and not options["agent"]:
        raise UsageError("--shared is for agent tokens: other ones are for all agents anyway")
    if not given:
        return None
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


# --- rotate, revoke and list ----------------------------------------------------------------------


def number_of(options: dict[str, Any]) -> int:
    """The number of the token that a command is about. Raises UsageError."""
    number = options["ID"]
    if not re.fullmatch("[0-9]{1,18}", number):
        raise UsageError(f"ID is a number of `cachix-workspace token list`, not {number[:20]!r}")
    return int(number)


def rotate(options: dict[str, Any]) -> None:
    """Create a token's successor."""
    number, out, where = number_of(options), options["--out"], backend(options)
    with new_files([out] if out else []) as write:
        answer = where.call("POST", f"/tokens/{number}/rotate")
        write([answer["secret"]])
    ends = f"token {number} ends when this one is used, in {tokens.OVERLAP:.0f} days at the latest"
    tell(ends)
    show_secret(f"{answer['kind']} token {answer['id']}", answer["secret"], out)


def revoke(options: dict[str, Any]) -> None:
    """Revoke a token."""
    number, and_agents = number_of(options), bool(options["--and-agents"])
    query = "?andAgents=true" if and_agents else ""
    done = backend(options).call("DELETE", f"/tokens/{number}{query}")
    also = f" and {done['agents']} of its agents are" if and_agents else " is"
    tell(f"token {number}{also} revoked")


def list_all(options: dict[str, Any]) -> None:
    """List the tokens, the newest last."""
    rows = every(backend(options), "/tokens", "tokens")[::-1]
    if options["--json"]:
        show_json(rows)
        return
    some = any(one["agents"] is not None for one in rows)
    table = [["ID", "KIND", "STATE", *["AGENTS"] * some, "CREATED", "EXPIRES", "DESCRIPTION"]]
    for one in rows:
        dates = [one["createdOn"][:10], (one["expiresOn"] or "-")[:10]]
        whose = "any" if one["agents"] is None else one["agents"] or "the first"
        row = [str(one["id"]), _kind(one), one["state"], *[whose] * some, *dates]
        table.append([*row, one["description"]])
    show_table(table)
    _tell_replaced(rows)


def _kind(one: Json) -> str:
    """A token's kind for people: whoever has a shared one can be any agent."""
    if one["kind"] != tokens.AGENT:
        return str(one["kind"])
    if one["issuedBy"] is not None:
        return "agent's own"
    if one["agents"] is None:
        return "agent, shared"
    return "agent, enrols" if set("*,") & set(one["agents"]) else "agent"


def _tell_replaced(rows: list[Json]) -> None:
    """Say which tokens are still valid although they have a successor."""
    replaced = {one["replaces"]: one["id"] for one in rows if one["replaces"] is not None}
    for one in rows:
        if one["id"] in replaced and one["state"] == "valid":
            still = f", which {listed(one['usedBy'])} still use" if one["usedBy"] else ""
            tell(f"token {one['id']} is replaced by token {replaced[one['id']]}{still}")
