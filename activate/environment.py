"""The environment: of this process, as it is read, and of commands, which is built anew."""

from __future__ import annotations

import os
import pwd

FALLBACK_PATH = (
    "/run/current-system/sw/bin",
    "/nix/var/nix/profiles/default/bin",
    "/usr/bin",
    "/bin",
)
# Variables that commands may see: no token, and none that ties a process to a systemd service.
LOCALE = ("LANG", "LANGUAGE", "TZ", "TZDIR")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
KEPT = frozenset((*LOCALE, *PROXIES, *(name.upper() for name in PROXIES))) | frozenset(
    ("SHELL", "TMPDIR", "TERM", "SSL_CERT_FILE", "DBUS_SESSION_BUS_ADDRESS")
)
KEPT_PREFIXES = ("LC_", "LOCALE_ARCHIVE", "XDG_", "NIX_")


def home() -> str:
    """The home directory: $HOME, else that of the passwd entry."""
    return os.environ.get("HOME") or pwd.getpwuid(os.geteuid()).pw_dir


def user() -> str:
    """The name of the effective user."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return os.environ.get("USER") or str(os.geteuid())


def state_home() -> str:
    """The directory for the state of programs: $XDG_STATE_HOME, else ~/.local/state."""
    return _base_directory("XDG_STATE_HOME", ".local/state")


def cache_home() -> str:
    """The directory for the caches of programs: $XDG_CACHE_HOME, else ~/.cache."""
    return _base_directory("XDG_CACHE_HOME", ".cache")


def _base_directory(name: str, default: str) -> str:
    """A directory of the XDG specification, which says that relative values are ignored."""
    value = os.environ.get(name, "")
    return value if value.startswith("/") else os.path.join(home(), default)


def for_commands() -> dict[str, str]:
    """The environment that every command gets."""
    ours = {k: v for k, v in os.environ.items() if k in KEPT or k.startswith(KEPT_PREFIXES)}
    present = [part for part in os.environ.get("PATH", "").split(":") if part.startswith("/")]
    path = [*present, *(part for part in FALLBACK_PATH if part not in present)]
    return {**ours, "PATH": ":".join(path), "HOME": home(), "USER": user(), "LOGNAME": user()}
