"""The facts that recovery decides by, besides the journal."""

from __future__ import annotations

from typing import Optional

from activate import cancellation, holder, journal, kinds, machine, nix, recovery, window
from activate.agent.hooks import AgentHooks
from activate.operation import WINDOW


def gather(
    hooks: AgentHooks, entry: journal.Journal, taken: Optional[holder.Locks]
) -> recovery.Facts:
    """Look at the machine. `taken` are the deployment's locks, if this process has them."""
    record = entry.record
    kind, profile = kinds.find(record.kind), str(record.profile)
    no_reboot = "a newer deployment arrived" if hooks.is_replaced(entry) else ""
    if cancellation.is_requested(entry):
        no_reboot = cancellation.REASON
    times = str(hooks.config.get("policy", {}).get("reboot_window", ""))
    return recovery.Facts(
        is_led=taken is None and holder.is_led(entry),
        boot_id=machine.boot_id(),
        running=None if kind is None else kind.running_path(profile),
        target=nix.target(profile),
        confirmed=holder.last_confirmed(record.profile),
        window_is_open=record.reboot != WINDOW or window.is_open(times),
        no_reboot=no_reboot,
    )
