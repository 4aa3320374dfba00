"""Closures that tell the test where they are, for machines of every kind, and the faults that may happen there."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any, Callable

import closures
from caches import Files
from hosts import wait_until
from world import Reply, Visit, World

# How a new system behaves without any fault: its activation, the commit or the rollback script may fail.
GOOD, BAD, BAD_COMMIT, BAD_CHECK = "good", "bad", "bad-commit", "bad-check"


def _visit(point: str) -> str:
    return f'visit {point} "$self" || exit $?'


def nixos(files: Files, version: Any, how: str = GOOD, extra: str = "") -> str:
    """A NixOS system. `extra` runs in its activation."""
    after = f"{extra or ':'}; {_visit('test.end')}; {'exit 1' if how == BAD else ':'}"
    after_boot = f"{_visit('boot.end')}; {'exit 1' if how == BAD_COMMIT else ':'}"
    return closures.nixos(
        files, version, _visit("test"), after, _visit("boot"), after_boot, parts=1
    )


def darwin(files: Files, version: Any, how: str = GOOD, extra: str = "") -> str:
    """A nix-darwin system."""
    after = f"{extra or ':'}; {_visit('activate.end')}; {'exit 1' if how == BAD else ':'}"
    return closures.darwin(files, version, _visit("activate"), after)


def home_manager(files: Files, version: Any, how: str = GOOD, extra: str = "") -> str:
    """A Home Manager generation."""
    after = f"{extra or ':'}; {_visit('activate.end')}; {'exit 1' if how == BAD else ':'}"
    return closures.home_manager(
        files, version, _visit("activate"), _visit("activate.middle"), after
    )


def plain(files: Files, version: Any, how: str = GOOD, extra: str = "") -> str:
    """A package: its profile is set by nix-env, which tells by itself. What is bad about it a rollback script finds."""
    return closures.plain(files, version)


KINDS: dict[str, Callable[..., str]] = {
    "nixos": nixos, "darwin": darwin, "home_manager": home_manager, "plain": plain
}  # fmt: skip


def script(files: Files, how: str = GOOD) -> str:
    """A rollback script."""
    return closures.script(
        files, f"faults-{how}", f"{_visit('script')}; {'exit 1' if how == BAD else ':'}"
    )


# --- faults: what the test does while a program waits at a point, and what it answers --------------------------------

LINGER = "linger 0.4"  # long enough for whoever thinks that it is dead


def kill_switch(world: World, visit: Visit) -> str:
    """The switch process is killed; what it has started goes on after a while."""
    world.kill(switch=True)
    return LINGER


def kill_agent(world: World, visit: Visit) -> str:
    """The agent is killed, and another one starts."""
    world.kill(agent=True)
    return "go"


def kill_both(world: World, visit: Visit) -> str:
    """Both are killed at once; what the switch process has started hangs."""
    world.kill(switch=True, agent=True)
    return "hang"


def power(world: World, visit: Visit) -> str:
    """The power goes."""
    world.lose_power()
    return "gone"


def shutdown(world: World, visit: Visit) -> str:
    """The machine is shut down in order, and boots again."""
    world.shut_down()
    return "gone"


def stop_agent(world: World, visit: Visit) -> str:
    """Somebody stops the agent by SIGTERM, as soon as it can take that, and starts it again."""
    wait_until(lambda: world.agent.catches(signal.SIGTERM), 10, "the agent to begin")
    began = time.monotonic()
    status = world.agent.stop(20)
    if status != 0 or time.monotonic() - began > 10:
        world.problems.append(f"SIGTERM: status {status} after {time.monotonic() - began:.1f} s")
    world.start()
    return "go"


def stop_switch(world: World, visit: Visit) -> str:
    """SIGTERM reaches the switch process and all that it has started, and nobody else."""
    for pid in world.descendants(world.switches()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return "go"


FAULTS: dict[str, Reply] = {
    "exit": "exit 1", "hang": "hang", "die": "die", "kill-switch": kill_switch, "kill-agent": kill_agent,
    "kill-both": kill_both, "power": power,
}  # fmt: skip
ENDINGS: dict[str, Reply] = {
    "shutdown": shutdown,
    "stop-agent": stop_agent,
    "stop-switch": stop_switch,
}


def deploy(world: World, version: Any, how: str = GOOD) -> str:
    """Order a deployment of the world's kind, with a rollback script; its id."""
    path = KINDS[world.kind](world.files, version, how)
    return world.deploy(path, script(world.files, BAD if how == BAD_CHECK else GOOD))
