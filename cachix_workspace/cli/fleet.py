"""The commands `agent`, `deployment` and `run`, by the management API."""

from __future__ import annotations

import re
import sys
from typing import Any
from urllib.parse import quote, urlencode

from cachix_console import tell
from cachix_protocol import Error, UsageError
from cachix_workspace.cli.backend import Backend, backend, every
from cachix_workspace.cli.output import Json, show, show_json, show_table

SHOWN = ("description", "state", "connected", "seenOn", "system", "kind", "version", "labels")
MORE = ("pausedSince", "pausedBy", "running", "runningSince", "rebootNeededSince", "deployment")
NOTABLE = ("rollback-failed", "lost", "failed", "by-hand", "reboot-needed")  # of AGENT_STATES
LAST = ("lastDeployment", "lastState", "lastEndedOn", "token")


def run(options: dict[str, Any]) -> None:
    """Run one of the commands. Raises Error."""
    where = backend(options)
    if options["agent"]:
        _agent(where, options)
    elif options["deployment"]:
        _deployment(where, options)
    else:
        _run(where, options)


def limit_of(options: dict[str, Any]) -> int:
    """The value of --limit. Raises UsageError."""
    text = options["--limit"]
    if not re.fullmatch("[1-9][0-9]{0,2}|1000", text):
        raise UsageError(f"--limit must be a number from 1 to 1000, not {text[:20]!r}")
    return int(text)


def number_of(options: dict[str, Any], argument: str) -> int:
    """A number among the arguments. Raises UsageError."""
    text = options[argument]
    if not re.fullmatch("[0-9]{1,9}", text):
        raise UsageError(f"{argument} is a number, not {text[:20]!r}")
    return int(text)


def show_facts(facts: Json, names: tuple[str, ...] = ()) -> None:
    """Show the values of a thing, each with its name."""
    table = []
    for name in names or tuple(facts):
        value = facts.get(name)
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        words = re.sub("([A-Z])", lambda match: f" {match[1].lower()}", name)
        table.append([words, "-" if value in (None, "", []) else text])
    show_table(table)


# --- agents ---------------------------------------------------------------------------------------


def _agent(where: Backend, options: dict[str, Any]) -> None:
    if options["list"]:
        _list_agents(where, options)
        return
    name = options["NAME"]
    path = f"/agents/{quote(name, safe='')}"
    if options["remove"]:
        where.call("DELETE", path)
        tell(f"agent {name} is removed; stop it on its machine")
        return
    if options["move"]:
        _move(where, name, path)
        return
    if options["show"]:
        answer = where.call("GET", path)
    else:
        answer = where.call("PATCH", path, _change(options))
    if options["--json"]:
        show_json(answer)
    else:
        show_table([["name", answer["name"]]])
        show_facts(answer, (*SHOWN, *MORE, *LAST))


def _change(options: dict[str, Any]) -> Json:
    if options["rename"]:
        return {"name": options["NEW"]}
    if options["label"]:
        return {"labels": options["LABEL"]}
    return {"paused": bool(options["pause"])}


def _list_agents(where: Backend, options: dict[str, Any]) -> None:
    query = {"label": options["--label"] or "", "state": options["--state"] or ""}
    agents = every(where, f"/agents?{urlencode(query)}", "agents")
    if options["--json"]:
        show_json(agents)
        return
    labels = any(one["labels"] for one in agents)
    bound = any(one["bound"] for one in agents)
    head = ["NAME", "STATE", "SYSTEM", "VERSION", "SINCE"]
    table = [[*head, *["LABELS"] * labels, *["TOKEN"] * bound]]
    for one in agents:
        program = f"cachix-deploy {one['client']}" if one["client"] else one["version"] or "-"
        row = [one["name"], _state(one), one["system"] or "-", program, one["seenOn"] or "-"]
        row += [",".join(one["labels"]) or "-"] * labels
        table.append([*row, *[_binding(one)] * bound])
    show_table(table)


def _state(one: Json) -> str:
    """Whether an agent is connected, and what an operator must know besides."""
    place = "online" if one["connected"] else "offline"
    notes = [
        place,
        *[one["state"]] * (one["state"] in NOTABLE),
        *["paused"] * bool(one["pausedSince"]),
    ]
    return ", ".join(notes)


def _binding(one: Json) -> str:
    """Why nobody else can use an agent's name, or that others can."""
    if not one["bound"]:
        return "not bound to a machine"
    return "its own" if one["hasOwnToken"] else f"token {one['token']}"


def _move(where: Backend, name: str, path: str) -> None:
    """Let another machine have a name."""
    if where.call("GET", path)["hasOwnToken"] is False:
        tell(f"{name} is not bound to a machine: any that has a token for it can connect")
        return
    where.call("POST", f"{path}/move")
    tell(f"{name} is free: the next machine that connects with an enrolment token has it")


# --- deployments ----------------------------------------------------------------------------------


def _deployment(where: Backend, options: dict[str, Any]) -> None:
    if options["list"]:
        _list_deployments(where, options)
        return
    name, index = options["AGENT"], number_of(options, "INDEX")
    path = f"/agents/{quote(name, safe='')}/deployments/{index}"
    if options["log"]:
        lines = where.call("GET", f"{path}/log").split("\n")
        for line in lines[:-1]:
            show(line)
        return
    if options["show"]:
        answer = where.call("GET", path)
    else:
        answer = where.call("POST", f"{path}/{'retry' if options['retry'] else 'cancel'}")
    show_json(answer) if options["--json"] else show_facts(answer)


def _list_deployments(where: Backend, options: dict[str, Any]) -> None:
    query = {"limit": limit_of(options)}
    if options["--agent"]:
        query["agent"] = options["--agent"]
    rows = where.call("GET", f"/deployments?{urlencode(query)}")["deployments"]
    if options["--json"]:
        show_json(rows)
        return
    table = [["AGENT", "INDEX", "STATE", "ORDERED", "BY", "PATH"]]
    for one in rows:
        facts = [one["createdOn"][:19], one["startedBy"] or "-", one["storePath"]]
        table.append([one["agent"], str(one["index"]), one["state"], *facts])
    show_table(table)


# --- runs -----------------------------------------------------------------------------------------


def _run(where: Backend, options: dict[str, Any]) -> None:
    if options["list"]:
        runs = where.call("GET", f"/runs?{urlencode({'limit': limit_of(options)})}")["runs"]
        show_json(runs) if options["--json"] else _show_runs(runs)
        return
    path = f"/runs/{number_of(options, 'RUN')}"
    if options["rollback"]:
        answer = _roll_back(where, path, bool(options["--yes"]))
    elif options["retry"]:
        answer = where.call("POST", f"{path}/retry")
    else:
        answer = where.call("GET", path)
    if options["--json"]:
        show_json(answer)
        return
    _show_runs([answer])
    table = [["AGENT", "INDEX", "STATE", "PATH", "REASON"]]
    for one in answer["deployments"]:
        reason = (one["reason"] or "").partition("\n")[0]
        facts = [one["state"], one["storePath"], reason]
        table.append([one["agent"], str(one["index"]), *facts])
    show_table(table)


def _show_runs(runs: list[Json]) -> None:
    table = [["RUN", "WHEN", "WHAT", "BY", "OUTCOME"]]
    for one in runs:
        title = one["source"].get("title") or one["source"].get("commit", "")
        counts = ", ".join(f"{count} {state}" for state, count in one["counts"].items())
        facts = [one["createdOn"][:19], title or one["action"], one["startedBy"], counts]
        table.append([str(one["id"]), *facts])
    show_table(table)


def _roll_back(where: Backend, path: str, is_sure: bool) -> Json:
    """Show what would happen, ask whoever sits there, and do it. Raises Error."""
    plan = where.call("GET", f"{path}/roll-back")["agents"]
    for one in plan:
        to = f"to {one['then']}" if one["then"] else f"stays: {one['reason']}"
        tell(f"{one['agent']}: {to}")
    names = [one["agent"] for one in plan if one["then"]]
    if not names:
        raise Error("there is nothing to roll back: no agent ran anything else before")
    if not is_sure:
        if not sys.stdin.isatty():
            raise Error("nothing was rolled back: repeat the command with --yes")
        tell(f"roll back {len(names)} agents? [y/N]")
        if sys.stdin.readline().strip().lower() not in ("y", "yes"):
            raise Error("nothing was rolled back")
    answer: Json = where.call("POST", f"{path}/roll-back", {"agents": names})
    return answer
