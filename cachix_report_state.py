"""What the machine runs, told to a workspace of ours: after each deployment, and when it changes.

By this the workspace shows what was changed by hand, and that a reboot is needed. It comes last:
neither a deployment nor its report ever waits for it.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from dataclasses import dataclass
from typing import Any, Optional

from activate import history, journal, kinds, machine, nix, outcomes
from activate.kinds import darwin, home_manager, nixos, plain
from cachix_connection import Peer, Waits, http
from cachix_console import complain, debug
from cachix_protocol import AgentRegistered, Error, Unreachable, __version__, is_store_path

QUIET_SECONDS = 0.5  # after an event: a deployment may come with the registration
BOOTED_SYSTEM, CURRENT_SYSTEM = "/run/booted-system", "/run/current-system"
BOOT_PARTS = ("kernel", "initrd", "kernel-modules")  # as NixOS itself compares them
WORDS = {
    nixos.NAME: "nixos",
    darwin.NAME: "darwin",
    home_manager.NAME: "home-manager",
    plain.NAME: "profile",
}


@dataclass(frozen=True)
class MachineState:
    """What a machine runs: a store path, since when, and the profile that is for its agent.

    All is None as long as there is no profile.
    """

    running: Optional[str] = None
    since: Optional[str] = None
    profile: Optional[str] = None
    kind: Optional[str] = None
    needs_reboot: bool = False

    def to_json(self) -> dict[str, Any]:
        """As docs/protocol.rst has it."""
        return {
            "running": self.running,
            "runningSince": self.since,
            "profile": self.profile,
            "kind": self.kind,
            "agentVersion": __version__,
            "rebootNeeded": self.needs_reboot,
        }


def look(state: str, name: str, profile_name: Optional[str]) -> MachineState:
    """What the machine of the agent `name` runs now. `state` is the agent's directory."""
    records = [entry.record for entry in reversed(history.load_all(state)[0])]
    found = _last_deployed(records, name, profile_name) or _present(profile_name)
    if found is None:
        return MachineState()
    kind, profile = found
    running = kind.running_path(profile)
    if running is None or not is_store_path(running):
        return MachineState(profile=profile, kind=WORDS[kind.NAME])
    is_system = kind.NAME in (nixos.NAME, darwin.NAME)
    since = _changed_on(CURRENT_SYSTEM if is_system else profile)
    waits = kind.NAME == nixos.NAME and (needs_reboot(running, profile) or waits_for_boot(records))
    return MachineState(running, since, profile, WORDS[kind.NAME], waits)


def _last_deployed(
    records: list[journal.Record], name: str, profile_name: Optional[str]
) -> Optional[tuple[kinds.Kind, str]]:
    """The kind and the profile of the agent's last deployment, the newest of the records first."""
    for record in records:
        kind = kinds.find(record.kind)
        if (record.agent, record.profile_name) == (name, profile_name) and kind and record.profile:
            return kind, record.profile
    return None


def _present(profile_name: Optional[str]) -> Optional[tuple[kinds.Kind, str]]:
    """The kind that has such a profile on this machine, which this user may change."""
    for kind in kinds.KINDS:
        profile = kind.profile_path(profile_name)
        target = nix.target(profile)
        is_ours = os.access(os.path.dirname(profile), os.W_OK)
        if target is not None and is_ours and os.path.lexists(target) and kind.detect(target):
            return kind, profile
    return None


def _changed_on(link: str) -> Optional[str]:
    """When a link was made, by this machine's clock."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        moment = time.gmtime(os.lstat(link).st_mtime)
        return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", moment)
    return None


def needs_reboot(running: str, profile: str, booted: str = BOOTED_SYSTEM) -> bool:
    """Whether a NixOS machine was booted with another kernel than that of its system.

    Both the system that runs and the one that will boot count. In a container there is no kernel.
    """

    def parts(system: str) -> list[str]:
        with contextlib.suppress(OSError):
            return [os.readlink(f"{system}/{part}") for part in BOOT_PARTS]
        return []

    now = parts(booted)
    return bool(now) and any(other and other != now for other in map(parts, (running, profile)))


def waits_for_boot(records: list[journal.Record]) -> bool:
    """Whether the newest of these that succeeded can only run after a boot, and none came since."""
    for record in records:
        if record.step == journal.SUCCEEDED:
            is_waiting = outcomes.of(record) == outcomes.REBOOT_NEEDED
            return is_waiting and record.boot_id == machine.boot_id()
    return False


class StateReporter(threading.Thread):
    """The thread that tells the workspace what the machine runs.

    `wake` tells it that a deployment may have ended. A workspace that does not know the request is
    not asked again before the next registration.
    """

    def __init__(
        self, peer: Peer, waits: Waits, state: str, profile: Optional[str], idle: threading.Event
    ) -> None:
        """`idle` is set while no deployment is in progress, and none is to be reported."""
        super().__init__(name="state", daemon=True)
        self.peer, self.waits, self.state, self.profile = peer, waits, state, profile
        self.idle, self.wake = idle, threading.Event()
        self.registered: Optional[AgentRegistered] = None  # None: there is nobody to tell
        self.told: tuple[Optional[AgentRegistered], MachineState] = (None, MachineState())

    def register(self, registered: AgentRegistered) -> None:
        """Tell this workspace from now on, if it is one of ours."""
        self.registered = registered if registered.reports == "http" else None
        self.wake.set()

    def run(self) -> None:
        """Tell until the process exits."""
        while True:
            self.wake.wait(self.waits.look if self.registered is not None else None)
            self.wake.clear()
            time.sleep(QUIET_SECONDS)
            self.idle.wait()
            try:
                self.tell()
            except Error as error:
                debug(f"the workspace was not told what the machine runs: {error}")
            except Exception as error:  # a bug must not end the thread
                complain(error)

    def tell(self) -> None:
        """Tell what the machine runs, unless this was told already. Raises Error."""
        registered = self.registered
        if registered is None:
            return
        now = look(self.state, str(self.peer.name), self.profile)
        if self.told[0] is registered and self.told[1] == now:
            return
        path = f"/api/v1/deploy/agent/{registered.id}/state"
        answer = http(self.peer, "PUT", path, self.waits.call, json=now.to_json())
        if answer.status == 404 and self.registered is registered:
            self.registered = None
        elif answer.status != 200:
            raise Unreachable(f"{self.peer.host} answered HTTP {answer.status}")
        self.told = (registered, now)
