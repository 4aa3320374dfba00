"""Shared by tests of chains: the chain without faults, and deployments that wait for the test."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Union

import closures
import scenes
from world import World

from activate import lock

DOWNLOAD = r"^nix-store .*--indirect --max-jobs 32"
COMMITTED = "committing: set second, boot second"
GOOD = f"""\
downloading: download second
activating: test second
checking: script good
{COMMITTED}"""
PATIENT = ("--activation-timeout=60", "--confirm-timeout=20")  # an activation may wait for the test
HOLD = closures.wait_for("/run/go-on")
MACHINE_LOCK = "/nix/var/nix/profiles/.cachix-deploy-system.lock"
WAITING = "waiting for another deployment of /nix/var/nix/profiles/system to end"


def deployed(version: str) -> str:
    """Return the chain of a NixOS deployment without faults."""
    return GOOD.replace("second", version)


def system(world: World, extra: str, version: Any = "second") -> str:
    """Add a NixOS system whose activation also runs `extra`."""
    return scenes.nixos(world.files, version, extra=extra)


def go_on(world: World) -> None:
    """Let the activation of a deployment of the fixture `held` go on."""
    world.host.path("/run/go-on").touch()


def log_of(world: World, deployment: str) -> str:
    """Return the log of a deployment as it is on its machine; empty without one."""
    with contextlib.suppress(OSError):
        return (world.host.state / "deployments" / deployment / "log").read_text()
    return ""


def agent_lock(world: World, kind: str = "agent") -> str:
    """Return where the test finds a lock of the agent's name (`kind`: agent or deployment).

    Cachix's agent takes the same locks.
    """
    return str(world.host.directory / f"home/cache/cachix/deploy/locks/{kind}-{world.name}.lock")


def kill_agent(world: World) -> None:
    """Kill the agent without starting another one."""
    os.kill(world.agent.pid, signal.SIGKILL)
    world.agent.wait(10)


@contextlib.contextmanager
def another_holds(path: Union[str, Path]) -> Iterator[None]:
    """Hold a lock as another program would. The host sees the same file."""
    taken = lock.take(str(path))
    assert taken is not None
    try:
        yield
    finally:
        taken.close()
