"""Closures of every kind that report their steps to the test, and the faults that may happen."""

from __future__ import annotations

import contextlib
import os
import signal
import time
from typing import Any, Callable, Optional

import closures
from caches import Files, Link
from hosts import wait_until
from world import Reply, Visit, World

# How a new system behaves without any fault: all is good, or its activation, the commit, or the
# rollback script fails.
GOOD, BAD, BAD_COMMIT, BAD_CHECK = "good", "bad", "bad-commit", "bad-check"


def _visit(point: str) -> str:
    return f'visit {point} "$self" || exit $?'


def nixos(
    files: Files,
    version: Any,
    how: str = GOOD,
    extra: str = "",
    kernel: str = "",
    more: Optional[dict[str, Any]] = None,
) -> str:
    """Add a NixOS system. `extra` runs in its activation; `kernel` tells kernels apart.

    `more` are further files.
    """
    parts = ("kernel", "initrd", "kernel-modules") if kernel else ()
    after = f"{extra or ':'}; {_visit('test.end')}; {'exit 1' if how == BAD else ':'}"
    after_boot = f"{_visit('boot.end')}; {'exit 1' if how == BAD_COMMIT else ':'}"
    return closures.nixos(
        files,
        version,
        _visit("test"),
        after,
        _visit("boot"),
        after_boot,
        parts=1,
        dry=_visit("dry-activate"),
        extra={
            **{part: Link(files.add(f"{part}-{kernel}", f"{part} {kernel}\n")) for part in parts},
            **(more or {}),
        },
    )


def darwin(files: Files, version: Any, how: str = GOOD, extra: str = "") -> str:
    """Add a nix-darwin system."""
    after = f"{extra or ':'}; {_visit('activate.end')}; {'exit 1' if how == BAD else ':'}"
    return closures.darwin(files, version, _visit("activate"), after)


def home_manager(files: Files, version: Any, how: str = GOOD, extra: str = "") -> str:
    """Add a Home Manager generation."""
    middle = _visit("activate.middle")
    after = f"{extra or ':'}; {_visit('activate.end')}; {'exit 1' if how == BAD else ':'}"
    return closures.home_manager(files, version, _visit("activate"), middle, after)


def plain(files: Files, version: Any, how: str = GOOD, extra: str = "") -> str:
    """Add a package. It never fails by itself, only by a rollback script."""
    return closures.plain(files, version)


KINDS: dict[str, Callable[..., str]] = {
    "nixos": nixos,
    "darwin": darwin,
    "home_manager": home_manager,
    "plain": plain,
}


def script(files: Files, how: str = GOOD) -> str:
    """Add a rollback script."""
    code = f"{_visit('script')}; {'exit 1' if how == BAD else ':'}"
    return closures.script(files, f"faults-{how}", code)


# --- faults: what the test does while a program waits at a point, and its answer ------------------

LINGER = "linger 0.4"  # seconds: longer than a successor needs if it takes the program for dead


def kill_switch(world: World, visit: Visit) -> str:
    """Kill the switch process; the program that it has started goes on after a while."""
    world.kill(switch=True)
    return LINGER


def kill_agent(world: World, visit: Visit) -> str:
    """Kill the agent, and start another one."""
    world.kill(agent=True)
    return "go"


def kill_both(world: World, visit: Visit) -> str:
    """Kill both at once; the program that the switch process has started hangs."""
    world.kill(switch=True, agent=True)
    return "hang"


def power(world: World, visit: Visit) -> str:
    """Cut the power, and boot again."""
    world.lose_power()
    return "gone"


def shutdown(world: World, visit: Visit) -> str:
    """Shut the machine down in order, and boot again."""
    world.shut_down()
    return "gone"


def stop_agent(world: World, visit: Visit) -> str:
    """Stop the agent with SIGTERM once it handles that, and start another one."""
    wait_until(lambda: world.agent.catches(signal.SIGTERM), 10, "the agent to handle SIGTERM")
    start = time.monotonic()
    status = world.agent.stop(20)
    if status != 0 or time.monotonic() - start > 10:
        world.problems.append(f"SIGTERM: status {status} after {time.monotonic() - start:.1f} s")
    world.start()
    return "go"


def stop_switch(world: World, visit: Visit) -> str:
    """Send SIGTERM to the switch process and all its descendants, and to nothing else."""
    for pid in world.descendants(world.switches()):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGTERM)
    return "go"


FAULTS: dict[str, Reply] = {
    "exit": "exit 1",
    "hang": "hang",
    "die": "die",
    "kill-switch": kill_switch,
    "kill-agent": kill_agent,
    "kill-both": kill_both,
    "power": power,
}
ENDINGS: dict[str, Reply] = {
    "shutdown": shutdown,
    "stop-agent": stop_agent,
    "stop-switch": stop_switch,
}


def deploy(world: World, version: Any, how: str = GOOD, **options: str) -> str:
    """Order a deployment of the world's kind, with a rollback script. Returns its id."""
    path = KINDS[world.kind](world.files, version, how)
    return world.deploy(path, script(world.files, BAD if how == BAD_CHECK else GOOD), **options)
