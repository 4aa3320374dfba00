"""The present system of this machine: the path that runs, what boots next, and a needed reboot."""

from __future__ import annotations

import contextlib
import fnmatch
import os
import re
import time
from typing import Optional

from activate import journal, kinds, machine, nix, outcomes
from activate.kinds import darwin, home_manager, nixos, plain
from activate.machine import needs_reboot as needs_reboot

CURRENT_SYSTEM = "/run/current-system"
BOOT_DIRECTORIES = ("/boot", "/efi", "/boot/efi")
MENUS = ("grub/grub.cfg", "extlinux/extlinux.conf")  # their first entry is the default
INIT = re.compile(r"\binit=(/nix/store/[^/\s]+)/init\b")
WORDS = {
    nixos.NAME: "nixos",
    darwin.NAME: "darwin",
    home_manager.NAME: "home-manager",
    plain.NAME: "profile",
}


def last_deployed(
    records: list[journal.Record], name: str, profile_name: Optional[str]
) -> Optional[tuple[kinds.Kind, str]]:
    """The kind and the profile of the agent's last deployment, the newest of the records first."""
    for record in records:
        kind = kinds.find(record.kind)
        if (record.agent, record.profile_name) == (name, profile_name) and kind and record.profile:
            return kind, record.profile
    return None


def detect(profile_name: Optional[str]) -> Optional[tuple[kinds.Kind, str]]:
    """The kind that has such a profile on this machine, which this user may change."""
    for kind in kinds.KINDS:
        profile = kind.profile_path(profile_name)
        target = nix.target(profile)
        is_ours = os.access(os.path.dirname(profile), os.W_OK)
        if target is not None and is_ours and os.path.lexists(target) and kind.detect(target):
            return kind, profile
    return None


def changed_on(link: str) -> Optional[str]:
    """When a link was made, by this machine's clock."""
    with contextlib.suppress(OSError, ValueError, OverflowError):
        moment = time.gmtime(os.lstat(link).st_mtime)
        return time.strftime("%Y-%m-%dT%H:%M:%S.000000Z", moment)
    return None


def waits_for_boot(records: list[journal.Record]) -> bool:
    """Whether the newest of these that succeeded can only run after a boot, and none came since."""
    for record in records:
        if record.is_confirmed:
            is_waiting = outcomes.of(record) == outcomes.REBOOT_NEEDED
            return is_waiting and record.boot_id == machine.boot_id()
    return False


def boots_next(directories: tuple[str, ...] = BOOT_DIRECTORIES) -> Optional[str]:
    """The NixOS system that the boot loader starts by default; None if that can't be read."""
    for directory in directories:
        for path in (_default_entry(directory), *(f"{directory}/{menu}" for menu in MENUS)):
            match = INIT.search(_read(path))
            if match:
                return match[1]
    return None


def _default_entry(directory: str) -> str:
    """The file of the entry that systemd-boot starts; empty if there is none."""
    setting = re.search(r"(?m)^default\s+(\S+)", _read(f"{directory}/loader/loader.conf"))
    entries = f"{directory}/loader/entries"
    with contextlib.suppress(OSError):
        names = sorted(fnmatch.filter(os.listdir(entries), setting[1])) if setting else []
        return f"{entries}/{names[-1]}" if names else ""
    return ""


def _read(path: str) -> str:
    """A text file of the boot loader; empty if it can't be read."""
    with contextlib.suppress(OSError), open(path, encoding="utf-8", errors="replace") as file:
        return file.read(1 << 20)
    return ""
