"""What holds after every case, whatever has happened: `assert_invariants(world)`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Optional

from hosts import CURRENT_SYSTEM, wait_until
from machines import FINAL
from world import UNKNOWN, Asked, World

from activate import journal, logfile
from cachix_protocol import FAILURE_LINE, SUCCESS_LINE

KEPT = re.compile(
    r"(journal|reported)\.json(\.unreadable-\d+)?|reported\.lock|log|previous(-\d+)?|new(-\d+)?"
)
UNTOUCHED = (
    journal.CANCELLED,
    journal.SUPERSEDED,
    journal.FAILED,
)  # ends of what was cancelled in time
# In which step each program may come: what is done must have been written before.
STEPS = {
    "test": {"activating", "committing", "rolling-back"},
    "boot": {"committing", "rolling-back"},
    "activate": {"activating", "committing", "rolling-back"},
    "script": {"checking"},
    "nix-env": {"activating", "committing", "rolling-back"},
}


def assert_invariants(world: World) -> None:
    """Everything that is promised of a machine whose deployments have all ended."""
    assert world.problems == []
    assert world.overlaps == [], "two programs changed the machine at a time"
    settled(world)
    journals = world.journals()
    for asked in world.asked:
        if asked.id not in world.lost and not never_came(world, asked, journals):
            told(world, asked, journals[asked.id])
            logged(world, asked.id, journals[asked.id])
    running(world, journals)
    order(world)
    assert world.leaks() == [], "the token can be read"


def settled(world: World) -> None:
    """Nothing is left running but one agent, and no file that is not needed any more."""
    assert world.agent.process.poll() is None, f"the agent has ended:\n{world.agent.text()[-3000:]}"

    def left() -> dict[int, str]:
        return {pid: line for pid, line in world.host.processes().items() if pid != world.agent.pid}

    wait_until(lambda: not left(), 10, f"all but the agent to end: {left()}")
    state = world.host.state
    kept = [
        "deployments",
        f"registered-{world.name}.json",
    ]  # the agent may connect anew at this moment
    wait_until(
        lambda: sorted(os.listdir(state)) == kept,
        10,
        f"no more than {kept} in the state: {os.listdir(state)}",
    )
    for directory in (state / "deployments").iterdir():
        strange = [path.name for path in directory.iterdir() if not KEPT.fullmatch(path.name)]
        wait_until(
            lambda: not any(map(Path.exists, (directory / name for name in strange))),
            10,
            f"{strange} to go",
        )
        if world.host.step(directory.name) != journal.ROLLBACK_FAILED:
            wait_until(
                lambda: not any(map(Path.is_symlink, directory.iterdir())), 10, "GC roots to go"
            )
    locks = [path.name for path in (world.host.directory / "home").resolve().rglob("*.lock")]
    assert all(name.startswith(("agent-", "deployment-")) or "nix" in name for name in locks), locks


def never_came(world: World, asked: Asked, journals: dict[str, dict[str, Any]]) -> bool:
    """Whether a deployment was replaced by the next one before the workspace had sent it."""
    return (
        asked.id not in journals and world.workspace.deployment(asked.id)["status"] == "Cancelled"
    )


def told(world: World, asked: Asked, entry: dict[str, Any]) -> None:
    """The terminal report is how it ended on the machine."""
    known = world.workspace.deployment(asked.id)
    wanted = "Succeeded" if entry["step"] == journal.SUCCEEDED else "Failed"
    assert entry["step"] in FINAL, entry
    if known["status"] == "Cancelled":
        assert entry["step"] in UNTOUCHED, (known, entry)
    else:
        assert known["status"] == wanted and entry["step"] != journal.CANCELLED, (known, entry)
        reason = "\n".join(text for text in (entry["reason"], entry["detail"]) if text) or None
        assert known["reason"] == reason


def logged(world: World, deployment: str, entry: dict[str, Any]) -> None:
    """Every line of the log has arrived, once and in order, and the closing line is the last."""
    log = world.host.state / "deployments" / deployment / "log"
    data = log.read_bytes()[: entry["log_size"]] if log.exists() else b""
    lines, _ = logfile.cut(data, 1 << 30, final=True)
    arrived = world.workspace.log(deployment)
    failure = f"{FAILURE_LINE} {entry['reason'] or ''}".rstrip()
    closing = SUCCESS_LINE if entry["step"] == journal.SUCCEEDED else failure
    assert arrived[-1:] == [closing]
    assert arrived[:-1] == [logfile.printable(line) for line in lines]


def confirmed(world: World, journals: dict[str, dict[str, Any]]) -> tuple[Optional[str], bool]:
    """What must run after all deployments, and whether the last change of the machine could not be undone."""
    path, in_doubt = world.asked[0].before if world.asked else world.running(), False
    for asked in world.asked:
        step = journals[asked.id]["step"] if asked.id in journals else ""
        if step == journal.SUCCEEDED:
            path, in_doubt = asked.path, False
        elif step == journal.ROLLED_BACK:
            in_doubt = False
        elif step == journal.ROLLBACK_FAILED:
            in_doubt = True
    return path, in_doubt


def running(world: World, journals: dict[str, dict[str, Any]]) -> None:
    """The machine is on the previous or on a confirmed path, and so it will be when it boots."""
    path, in_doubt = confirmed(world, journals)
    if in_doubt:
        return  # and the report says so: see `told`
    assert world.running() == path, f"{world.running()} runs instead of {path}"
    assert world.profile() == path, f"the profile is {world.profile()} instead of {path}"
    if world.kind == "nixos":
        assert world.host.boot_default() == path, (
            f"{world.host.boot_default()} boots instead of {path}"
        )
        assert world.host.target(CURRENT_SYSTEM) == path


def order(world: World) -> None:
    """No program has run before the journal said so."""
    for visit in world.visits:
        name = visit.point.split(".")[0]
        if name in STEPS and visit.step != UNKNOWN:
            assert visit.step in STEPS[name], f"{visit} ran in the step {visit.step!r}"
        if world.kind == "nixos" and name == "nix-env":
            assert visit.step != journal.ACTIVATING, (
                f"{visit}: the profile is not set before the checks"
            )
