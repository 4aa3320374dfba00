"""Reports on the system that runs: after each deployment, and when it changes.

By this the workspace shows what was changed by hand, and that a reboot is needed. It comes last:
neither a deployment nor its report ever waits for it.
"""

from __future__ import annotations

import threading
import time
from typing import Any, Optional

from activate import history, journal, nix, outcomes
from activate.agent import present
from activate.kinds import darwin, nixos
from activate.operation import TEST
from activate.values import dataclass
from cachix_connection import Peer, Waits, http
from cachix_console import complain, debug, tell
from cachix_protocol import AgentRegistered, Error, Unreachable, __version__, is_store_path

QUIET_SECONDS = 0.5  # after an event: a deployment may come with the registration


@dataclass(frozen=True)
class MachineState:
    """The system of a machine: a store path, since when it runs, and the profile for its agent.

    All is None as long as there is no profile. `by_hand` says who has made it run, if that was no
    deployment of a workspace. `drift` is a sentence if running path or profile are not what was
    confirmed last.
    """

    running: Optional[str] = None
    since: Optional[str] = None
    profile: Optional[str] = None
    kind: Optional[str] = None
    needs_reboot: bool = False
    by_hand: Optional[dict[str, Any]] = None
    drift: Optional[str] = None

    def to_json(self) -> dict[str, Any]:
        """As docs/protocol.rst has it."""
        own = {"byHand": self.by_hand, "drift": self.drift}
        more = {name: value for name, value in own.items() if value is not None}
        return {
            "running": self.running,
            "runningSince": self.since,
            "profile": self.profile,
            "kind": self.kind,
            "agentVersion": __version__,
            "rebootNeeded": self.needs_reboot,
            **more,
        }


def look(state: str, name: str, profile_name: Optional[str]) -> MachineState:
    """The present system of the machine of the agent `name`. `state` is the agent's directory."""
    records = [entry.record for entry in reversed(history.load_all(state)[0])]
    match = present.last_deployed(records, name, profile_name) or present.detect(profile_name)
    if match is None:
        return MachineState()
    kind, profile = match
    running = kind.running_path(profile)
    if running is None or not is_store_path(running):
        return MachineState(profile=profile, kind=present.WORDS[kind.NAME])
    is_system = kind.NAME in (nixos.NAME, darwin.NAME)
    since = present.changed_on(present.CURRENT_SYSTEM if is_system else profile)
    waits = present.waits_for_boot(records)
    drift = None if waits else drifted(records, profile, running, nix.target(profile))
    needs_reboot = kind.NAME == nixos.NAME and (waits or present.needs_reboot(running, profile))
    return MachineState(
        running,
        since,
        profile,
        present.WORDS[kind.NAME],
        needs_reboot,
        done_by_hand(records, profile, running),
        drift,
    )


def drifted(
    records: list[journal.Record], profile: str, running: str, target: Optional[str]
) -> Optional[str]:
    """A sentence if others have changed what was confirmed; None during a deployment.

    The newest of the records come first.
    """
    mine = [record for record in records if record.profile in (profile, None)]
    if any(record.step not in journal.FINAL for record in mine):
        return None
    last = next((r for r in mine if r.settles), None)
    tested = (last.store_path, last.previous_profile) if last and last.operation == TEST else None
    if (running, target) == tested:
        return None  # it boots what was there before
    confirmed = next((r.store_path for r in mine if r.is_confirmed), None)
    if confirmed is None or confirmed == running == target:
        return None
    facts = [f"{running} runs"] if running != confirmed else []
    facts += [f"{profile} is {target}"] if target != confirmed else []
    return f"{' and '.join(facts)}, but {confirmed} was confirmed last"


def done_by_hand(
    records: list[journal.Record], profile: str, running: str
) -> Optional[dict[str, Any]]:
    """The rollback or activation by hand that the running path comes from; None if it is another.

    The newest of the records come first.
    """
    confirmed = (r for r in records if r.profile == profile and r.settles)
    record = next(confirmed, None)
    if record is None or record.by_hand is None or record.store_path != running:
        return None
    moment = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(record.times.get(record.step, 0)))
    return {"action": record.by_hand, "time": moment, "reason": outcomes.reason_of(record)}


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
        self.drift: Optional[str] = None  # the last one
        self.registered: Optional[AgentRegistered] = None  # None: there is nobody to tell
        self.reported: tuple[Optional[AgentRegistered], MachineState] = (None, MachineState())

    def register(self, registered: AgentRegistered) -> None:
        """Tell this workspace from now on, if it is one of ours."""
        self.registered = registered if registered.reports == "http" else None
        self.wake.set()

    def run(self) -> None:
        """Tell until the process exits."""
        while True:
            if self.wake.wait(self.waits.look):
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
        now = look(self.state, str(self.peer.name), self.profile)
        if now.drift is not None and now.drift != self.drift:
            tell(f"warning: {now.drift}")
        self.drift = now.drift
        if registered is None:
            return
        if self.reported[0] is registered and self.reported[1] == now:
            return
        path = f"/api/v1/deploy/agent/{registered.id}/state"
        answer = http(self.peer, "PUT", path, self.waits.call, json=now.to_json())
        if answer.status == 404 and self.registered is registered:
            self.registered = None
        elif answer.status != 200:
            raise Unreachable(f"{self.peer.host} answered HTTP {answer.status}")
        self.reported = (registered, now)
