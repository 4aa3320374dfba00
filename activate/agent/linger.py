"""Whether a user's agent lives on after its user has logged out, and after a reboot.

systemd ends a user's manager with his last session unless he lingers:
https://www.freedesktop.org/software/systemd/man/latest/loginctl.html
"""

from __future__ import annotations

import contextlib
import os
import pwd
from typing import Optional

CONTROL_GROUP = "/proc/self/cgroup"
LINGERING = "/var/lib/systemd/linger"  # a file for each user


def problem() -> Optional[str]:
    """The sentence for a service of a user who does not linger; None for any other process."""
    with contextlib.suppress(OSError, KeyError, UnicodeDecodeError):
        user = os.getuid()
        with open(CONTROL_GROUP, encoding="utf-8") as file:
            is_service = f"/user@{user}.service/" in file.read()
        name = pwd.getpwuid(user).pw_name
        if is_service and not os.path.exists(os.path.join(LINGERING, name)):
            remedy = f"`loginctl enable-linger {name}` keeps it running"
            return f"this agent ends when {name} logs out, and starts at the next login: {remedy}"
    return None
