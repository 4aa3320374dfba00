"""What the tests of chains share: the chain without faults, and deployments that wait for the test."""

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
    """The chain of a NixOS deployment without faults."""
    return GOOD.replace("second", version)


def system(world: World, extra: str, version: Any = "second") -> str:
    """A NixOS system whose activation runs `extra` too."""
    return scenes.nixos(world.files, version, extra=extra)


def go_on(world: World) -> None:
    """Let the activation of a `held` deployment go on."""
    world.host.path("/run/go-on").touch()


def log_of(world: World, deployment: str) -> str:
    """The log of a deployment on its machine."""
    with contextlib.suppress(OSError):
        return (world.host.state / "deployments" / deployment / "log").read_text()
    return ""


def agent_lock(world: World, kind: str = "agent") -> str:
    """A lock of the agent's name, which Cachix's agent takes too, as the test sees it; also its `deployment` lock."""
    return str(world.host.directory / f"home/cache/cachix/deploy/locks/{kind}-{world.name}.lock")


def kill_agent(world: World) -> None:
    """End the agent; nobody starts another one."""
    os.kill(world.agent.pid, signal.SIGKILL)
    world.agent.wait(10)


@contextlib.contextmanager
def another_holds(path: Union[str, Path]) -> Iterator[None]:
    """Hold a lock as another program would; its file is seen by the host too."""
    held = lock.take(str(path))
    assert held is not None
    try:
        yield
    finally:
        held.close()
