"""Whether anything starts an agent when the machine boots, by the units of a system.

Nobody notices at once that a system was deployed without one: the agent runs on until the next
boot.
"""

from __future__ import annotations

import contextlib
import os

WARNING = "nothing starts an agent after a reboot"
AGENT = "cachix"  # in the name or the text of a unit of Cachix's agent and of ours
# Where a system of each kind has its units; below HOME and / others may be.
UNITS = {
    "NixOS": ("etc/systemd/system",),
    "nix-darwin": ("Library/LaunchDaemons", "Library/LaunchAgents"),
    "home-manager": ("home-files/.config/systemd/user", "LaunchAgents"),
}
ELSEWHERE = (
    *("/etc/systemd/system", "/etc/systemd/user", "/usr/lib/systemd/system", "/etc/init.d"),
    *("/Library/LaunchDaemons", "/etc/crontab", "/etc/cron.d", "/var/spool/cron"),
)
MOST = 1 << 18  # bytes of a unit that are read


def warning(kind: str, system: str, elsewhere: tuple[str, ...] = ELSEWHERE) -> str:
    """A warning if a system has units, but none, here or elsewhere, starts an agent; else empty.

    Of NixOS and nix-darwin all units come from the system.
    """
    places = [f"{system}/{place}" for place in UNITS.get(kind, ())]
    if not any(map(os.path.isdir, places)):
        return ""
    if kind == "home-manager":
        places += elsewhere
    return "" if any(map(starts_agent, places)) else WARNING


def starts_agent(place: str) -> bool:
    """Whether a unit in a directory, or this file, starts an agent."""
    if not os.path.isdir(place):
        return _names_agent(place)
    with contextlib.suppress(OSError):
        return any(AGENT in name or _names_agent(f"{place}/{name}") for name in os.listdir(place))
    return False


def _names_agent(path: str) -> bool:
    """Whether a file says something of an agent."""
    with contextlib.suppress(OSError), open(path, "rb") as file:
        return AGENT.encode() in file.read(MOST)
    return False
