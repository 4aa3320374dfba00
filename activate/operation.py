"""The operation that a deployment asks for, as `nixos-rebuild` knows it, and its reboot."""

from __future__ import annotations

SWITCH, BOOT, TEST, DRY_ACTIVATE = "switch", "boot", "test", "dry-activate"
OPERATIONS = (SWITCH, BOOT, TEST, DRY_ACTIVATE)
NEVER, WHEN_NEEDED, WINDOW = "never", "when-needed", "window"
REBOOTS = (NEVER, WHEN_NEEDED, WINDOW)
LASTING = (SWITCH, BOOT)  # the new system boots from now on


def contradiction(operation: str, reboot: str) -> str:
    """Why an operation can't be combined with a reboot; empty if it can."""
    if reboot == NEVER or operation in LASTING:
        return ""
    return f"`{operation}` leaves the former system to boot: `reboot` must be `{NEVER}` with it"
