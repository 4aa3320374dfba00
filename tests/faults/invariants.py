"""The invariants, which hold after every case whatever has happened: `assert_invariants(world)`."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any, Optional

from hosts import CURRENT_SYSTEM, wait_until
from machines import FINAL
from world import UNKNOWN, Asked, World

from activate import journal, logfile
from activate.text import printable
from cachix_protocol import FAILURE_LINE, SUCCESS_LINE

KEPT = re.compile(
    r"(journal|reported|post-deploy)\.json(\.unreadable-\d+)?|(reported|owner|leader)\.lock|log"
    r"|cancel|post-deploy\.(log|mark)|(previous|new)(-\d+)?"
)
STAYS = re.compile(
    r"agent-.+\.lock|by-hand\.lock|(executed|secret|post-deploy)-.+\.json"
)  # some agents have these
# How a deployment may end that was cancelled in time.
UNTOUCHED = (journal.CANCELLED, journal.SUPERSEDED, journal.FAILED)
# The steps in which each program may run, as the journal must have the step before.
STEPS = {
    "test": {"activating", "committing", "rolling-back"},
    "boot": {"committing", "rolling-back"},
    "activate": {"activating", "committing", "rolling-back"},
    "script": {"checking"},
    "nix-env": {"activating", "committing", "rolling-back"},
    "dry-activate": {"ready"},
    "reboot": {"rebooting", "rolling-back"},
}


def assert_invariants(world: World) -> None:
    """Check everything that is promised about a machine whose deployments have all ended."""
    assert world.problems == []
    assert world.overlaps == [], "two programs changed the machine at a time"
    settled(world)
    journals = world.journals()
    for asked in world.asked:
        unreported = world.lost | world.by_hand
        if asked.id not in unreported and not never_came(world, asked, journals):
            told(world, asked, journals[asked.id])
            logged(world, asked.id, journals[asked.id])
    running(world, journals)
    order(world)
    assert world.leaks() == [], "the token can be read"


def settled(world: World) -> None:
    """Check that one agent runs and nothing else, and that only files remain that are needed."""
    assert world.agent.process.poll() is None, f"the agent has ended:\n{world.agent.text()[-3000:]}"

    def others() -> dict[int, str]:
        return {pid: line for pid, line in world.host.processes().items() if pid != world.agent.pid}

    wait_until(lambda: not others(), 10, f"all but the agent to end: {others()}")
    state = world.host.state
    # Waits, because the agent may connect anew at this moment and write its file.
    names = ["deployments", f"registered-{world.name}.json"]
    wait_until(
        lambda: sorted(name for name in os.listdir(state) if not STAYS.fullmatch(name)) == names,
        10,
        f"nothing but {names} in the state: {os.listdir(state)}",
    )
    for directory in (state / "deployments").iterdir():
        settled_directory(directory, world.host.step(directory.name))
    locks = [path.name for path in (world.host.directory / "home").resolve().rglob("*.lock")]
    assert all(name.startswith(("agent-", "deployment-")) or "nix" in name for name in locks), locks


def settled_directory(directory: Path, step: str) -> None:
    """Check that a deployment's directory has neither temporary files nor GC roots any more."""

    def strange() -> list[str]:
        return [path.name for path in directory.iterdir() if not KEPT.fullmatch(path.name)]

    def roots() -> list[Path]:
        return [path for path in directory.iterdir() if path.is_symlink()]

    wait_until(lambda: not strange(), 10, f"{strange()} to be removed")
    if step != journal.ROLLBACK_FAILED:
        wait_until(lambda: not roots(), 10, "the GC roots to be removed")


def never_came(world: World, asked: Asked, journals: dict[str, dict[str, Any]]) -> bool:
    """Whether a deployment was replaced by the next one before the workspace had sent it."""
    status = world.workspace.deployment(asked.id)["status"]
    return asked.id not in journals and bool(status == "Cancelled")


def told(world: World, asked: Asked, entry: dict[str, Any]) -> None:
    """Check that the final report says how the deployment ended on the machine."""
    report = world.workspace.deployment(asked.id)
    status = "Succeeded" if entry["step"] == journal.SUCCEEDED else "Failed"
    assert entry["step"] in FINAL, entry
    if report["status"] == "Cancelled":
        assert entry["step"] in UNTOUCHED, (report, entry)
    else:
        assert report["status"] == status and entry["step"] != journal.CANCELLED, (report, entry)
        reason = "\n".join(text for text in (entry["reason"], entry["detail"]) if text) or None
        assert report["reason"] == reason


def logged(world: World, deployment: str, entry: dict[str, Any]) -> None:
    """Check that every line of the log arrived, once and in order, with the closing line last."""
    log = world.host.state / "deployments" / deployment / "log"
    data = log.read_bytes()[: entry["log_size"]] if log.exists() else b""
    lines, _ = logfile.cut(data, 1 << 30, final=True)
    arrived = world.workspace.log(deployment)
    failure = f"{FAILURE_LINE} {entry['reason'] or ''}".rstrip()
    closing = SUCCESS_LINE if entry["step"] == journal.SUCCEEDED else failure
    assert arrived[-1:] == [closing]
    assert arrived[:-1] == [printable(line) for line in lines]


def confirmed(
    world: World, journals: dict[str, dict[str, Any]]
) -> tuple[Optional[str], Optional[str], bool]:
    """Return the paths that must run and boot after all, and whether the last rollback failed."""
    path, in_doubt = world.asked[0].before if world.asked else world.running(), False
    runs, boot = path, (world.host.directory / "boot-id").read_text().strip()
    for asked in world.asked:
        entry = journals.get(asked.id, {"step": "", "boot_id": ""})
        step = entry["step"]
        if step == journal.SUCCEEDED and asked.operation == "test":
            runs, in_doubt = (asked.path if entry["boot_id"] == boot else path), False
        elif step == journal.SUCCEEDED and asked.operation == "boot":
            path, in_doubt = asked.path, False
            runs = runs if entry["boot_id"] == boot else path
        elif step == journal.SUCCEEDED and asked.operation == "switch":
            path, in_doubt = asked.path, False
            runs = path
        elif step == journal.ROLLED_BACK:
            in_doubt = False
        elif step == journal.ROLLBACK_FAILED:
            in_doubt = True
    return runs, path, in_doubt


def running(world: World, journals: dict[str, dict[str, Any]]) -> None:
    """Check that the machine runs a confirmed path and has it as its profile and boot default."""
    runs, path, in_doubt = confirmed(world, journals)
    if in_doubt:
        return  # and the report says so: see `told`
    assert world.running() == runs, f"{world.running()} runs instead of {runs}"
    assert world.profile() == path, f"the profile is {world.profile()} instead of {path}"
    if world.kind == "nixos":
        default = world.host.boot_default()
        assert default == path, f"{default} boots instead of {path}"
        assert world.host.target(CURRENT_SYSTEM) == runs


def order(world: World) -> None:
    """Check that no program ran before the journal had its step."""
    for visit in world.visits:
        name = visit.point.split(".")[0]
        if name in STEPS and visit.step != UNKNOWN:
            assert visit.step in STEPS[name], f"{visit} ran in the step {visit.step!r}"
        if world.kind == "nixos" and name == "nix-env":
            assert visit.step != journal.ACTIVATING, f"{visit}: set before the checks"
