"""`status`: the agents of this machine, what runs on it, and how its deployments ended.

It reads files and links only. Nothing here loads the network, so that it answers at once.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any, Optional

from activate import (
    environment,
    history,
    holder,
    journal,
    kinds,
    lock,
    nix,
    outcomes,
)
from activate.agent import mark, present, single
from activate.kinds import nixos, plain
from activate.machine import boot_id
from activate.operation import TEST, WINDOW
from activate.text import MOST_LINE, clean

WRONG_USAGE = 64  # the exit status
RESULTS = 5  # as many deployments that have ended are shown
ROOT_STATE = "/var/lib/cachix-deploy"
AGENT_FILES = (("registered-", ".json"), ("agent-", ".lock"))


# --- facts ----------------------------------------------------------------------------------------


def gather(state: str) -> dict[str, Any]:
    """All that `status` knows, as --json prints it."""
    journals = history.load_all(state)[0]
    records = [entry.record for entry in reversed(journals)]
    ended = [record for record in records if record.step in journal.FINAL]
    agents = [agent(state, name) for name in agent_names(state)]
    return {
        "agents": [fact for fact in agents if fact["pid"] or fact["lastConnected"]],
        "deployments": [
            under_way(entry) for entry in journals if entry.record.step not in journal.FINAL
        ],
        "systems": [system(records, kind, profile) for kind, profile in profiles(records)],
        "results": [result(record) for record in ended[:RESULTS]],
        "withheld": withheld(state),
    }


def agent_names(state: str) -> list[str]:
    """The names of all agents that have left a trace here, those of Cachix's client too."""
    names = set()
    for directory in (state, os.path.dirname(lock.shared_path("agent", "x"))):
        for file in listed(directory):
            for head, tail in AGENT_FILES:
                if file.startswith(head) and file.endswith(tail):
                    names.add(file[len(head) : -len(tail)])
    return sorted(names)


def listed(directory: str) -> list[str]:
    """The names of the files in a directory; none if it can't be read."""
    try:
        return os.listdir(directory)
    except OSError:
        return []


def agent(state: str, name: str) -> dict[str, Any]:
    """An agent: whether it runs, and whether it is connected. Times are as in the journal."""
    owner = single.owner(state, name)
    note = mark.load(os.path.join(state, f"registered-{name}.json"))
    pid = int(owner.pid) if owner is not None and owner.pid.isdigit() else None
    runs = owner is not None and not owner.is_gone
    ours = runs and note.get("pid") == pid and note.get("boot_id") == boot_id()
    return {
        "name": name,
        "pid": pid if runs else None,
        "version": note.get("version") if ours else None,
        "workspace": note.get("host"),
        "connected": ours and "lost" not in note,
        "connectedSince": moment(note.get("time")) if ours and "lost" not in note else None,
        "lastConnected": moment(note.get("lost") or note.get("time")),
    }


def under_way(entry: journal.Journal) -> dict[str, Any]:
    """A deployment that has not ended. Without a leader it was interrupted."""
    record = entry.record
    return {**deployment(record), "step": record.step, "led": holder.is_led(entry)}


def result(record: journal.Record) -> dict[str, Any]:
    """A deployment that has ended."""
    facts = {"outcome": outcomes.of(record), "reason": outcomes.reason_of(record)}
    return {**deployment(record), "step": record.step, **facts}


def deployment(record: journal.Record) -> dict[str, Any]:
    """A deployment, without its step. `since` is when it entered that."""
    return {
        "id": record.id,
        "index": None if record.by_hand else record.index,
        "byHand": record.by_hand,
        "title": outcomes.title(record),
        "agent": record.agent,
        "workspace": record.host,
        "storePath": record.store_path,
        "profile": record.profile,
        "operation": record.operation,
        "reboot": record.reboot,
        "since": moment(record.times.get(record.step)),
    }


def profiles(records: list[journal.Record]) -> list[tuple[kinds.Kind, str]]:
    """The profiles of this machine: by its deployments, and those of the kinds that it has."""
    pairs: dict[str, kinds.Kind] = {}
    for record in records:
        kind = kinds.find(record.kind)
        if kind is not None and record.profile:
            pairs.setdefault(record.profile, kind)
    for kind in kinds.KINDS:
        if kind is not plain:
            profile = kind.profile_path(None)
            running = kind.running_path(profile)
            if running is not None and os.path.lexists(running) and kind.detect(running):
                pairs.setdefault(profile, kind)
    return [(kind, profile) for profile, kind in pairs.items()]


def system(records: list[journal.Record], kind: kinds.Kind, profile: str) -> dict[str, Any]:
    """A profile: the path that runs, that of the profile, and the one that boots next."""
    mine = [record for record in records if record.profile == profile]
    running, target = kind.running_path(profile), nix.target(profile)
    is_nixos = kind.NAME == nixos.NAME
    boots = present.boots_next() if is_nixos else None
    confirmed = next((r.store_path for r in mine if r.is_confirmed), None)
    last = next((record for record in mine if record.settles), None)
    is_test = last is not None and (last.operation, last.store_path) == (TEST, running)
    known = [path for path in (running, target, boots) if path is not None]
    needs_reboot = is_nixos and running is not None and target is not None
    return {
        "kind": present.WORDS[kind.NAME],
        "profile": profile,
        "running": running,
        "profilePath": target,
        "bootsNext": boots,
        "agree": len(set(known)) < 2,
        "confirmed": confirmed,
        "runsTest": is_test and running != target,
        "rebootNeeded": needs_reboot
        and (present.needs_reboot(str(running), str(target)) or present.waits_for_boot(mine)),
    }


def withheld(state: str) -> list[str]:
    """A sentence for each thing that another user may see."""
    if os.geteuid() == 0 or environment.given_state():
        return []
    lines = []
    if state != ROOT_STATE and os.path.isdir(ROOT_STATE):
        others = "root's agents and deployments are shown to root only"
        lines.append(f"{others}: sudo cachix-deploy status")
    if os.path.isdir("/run/booted-system") and not os.access("/boot/loader", os.R_OK):
        lines.append("root can see what boots next")
    return lines


def moment(seconds: Optional[float]) -> Optional[str]:
    """A time as the protocol has it, without a fraction."""
    if not seconds:
        return None
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(seconds))


# --- words ----------------------------------------------------------------------------------------


def describe(facts: dict[str, Any]) -> list[str]:
    """The facts in lines for people."""
    lines = [describe_agent(fact) for fact in facts["agents"]]
    lines = lines or ["no agent has run here" + " as this user" * bool(facts["withheld"])]
    lines += [describe_deployment(fact) for fact in facts["deployments"]]
    for fact in facts["systems"]:
        lines += ["", *describe_system(fact)]
    if facts["results"]:
        lines += ["", "last deployments:"]
    for fact in facts["results"]:
        lines += describe_result(fact)
    return lines + (["", *facts["withheld"]] if facts["withheld"] else [])


def describe_agent(fact: dict[str, Any]) -> str:
    """A line about an agent."""
    place = fact["workspace"] or "its workspace"
    name = f"agent {fact['name']}"
    if fact["pid"] is None:
        last = f", last connected {minute(fact['lastConnected'])}" * bool(fact["lastConnected"])
        return f"{name}: not running{last}"
    name += f" (pid {fact['pid']}" + (f", version {fact['version']})" if fact["version"] else ")")
    if fact["connected"]:
        return f"{name}: connected to {place} since {minute(fact['connectedSince'])}"
    if fact["version"]:
        return f"{name}: NOT connected to {place} since {minute(fact['lastConnected'])}"
    return f"{name}: runs, and has not said yet whether it is connected"


def describe_deployment(fact: dict[str, Any]) -> str:
    """A line about a deployment that has not ended."""
    state = f"{fact['step']} since {minute(fact['since'])}"
    interrupted = "" if fact["led"] else ", INTERRUPTED: an agent that starts goes on with it"
    if fact["step"] == journal.AWAITING_REBOOT:
        where = "its reboot window" if fact["reboot"] == WINDOW else "its reboot"
        state, interrupted = f"waits for {where} since {minute(fact['since'])}", ""
    return f"{fact['title']} of {fact['storePath']}: {state}{interrupted}"


def describe_system(fact: dict[str, Any]) -> list[str]:
    """Lines about a profile."""
    running = fact["running"]
    lines = [f"{fact['kind']} ({fact['profile']})", f"  runs        {running or 'nothing'}"]

    def compare(word: str, path: Optional[str], unknown: str) -> None:
        same = "the same" if path == running else f"{path}, ANOTHER ONE"
        lines.append(f"  {word:<12}" + (same if path else unknown))

    compare("profile", fact["profilePath"], "nothing")
    if fact["kind"] == "nixos":
        compare("boots next", fact["bootsNext"], "unknown, the boot loader's files don't say")
    if fact["confirmed"]:
        compare("confirmed", fact["confirmed"], "")
    if fact["runsTest"]:
        lines.append("  it runs as a test, until the next boot")
    if fact["rebootNeeded"]:
        lines.append("  a reboot is needed: another kernel runs")
    return lines


def describe_result(fact: dict[str, Any]) -> list[str]:
    """Lines about a deployment that has ended."""
    outcome = fact["outcome"] or fact["step"]
    word = fact["step"] if outcome == fact["step"] else f"{fact['step']}, {outcome}"
    lines = [f"  {minute(fact['since'])}  {fact['title']}: {word}  {fact['storePath']}"]
    return lines + [f"      {line}" for line in (fact["reason"] or "").splitlines()]


def minute(text: Optional[str]) -> str:
    """A time of the protocol for people."""
    return f"{text[:10]} {text[11:16]} UTC" if text else "an unknown time"


# --- command --------------------------------------------------------------------------------------


def status_command(as_json: bool) -> int:
    """Print the state of this machine; the exit status."""
    environment.leave_others()
    try:
        facts = gather(journal.state_directory())
    except environment.NoHome as error:
        print(f"error: {error}", file=sys.stderr)
        return WRONG_USAGE
    lines = [json.dumps(facts, indent=1)] if as_json else describe(facts)
    texts = [clean(line, most=MOST_LINE) for text in lines for line in text.split("\n")]
    try:
        print("\n".join(texts), flush=True)
    except OSError:  # nobody reads it any more; Python would complain about that when it exits
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0
