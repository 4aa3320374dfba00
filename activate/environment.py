"""The environment: of this process, as it is read, and of commands, which is built anew."""

from __future__ import annotations

import os
import pwd

SYSTEM_PATH = "/run/current-system/sw/bin"
FALLBACK_PATH = ("/nix/var/nix/profiles/default/bin", "/usr/bin", "/bin")
# Variables that commands may see: no token, and none that ties a process to a systemd service.
LOCALE = ("LANG", "LANGUAGE", "TZ", "TZDIR")
PROXIES = ("http_proxy", "https_proxy", "all_proxy", "no_proxy")
KEPT = frozenset((*LOCALE, *PROXIES, *(name.upper() for name in PROXIES))) | frozenset(
    ("SHELL", "TMPDIR", "TERM", "SSL_CERT_FILE", "DBUS_SESSION_BUS_ADDRESS")
)
# Variables that a switch process needs itself: to find its state and its libraries, to reach the
# workspace, and to build the environment of its commands.
FOR_SWITCH = frozenset(
    ("PATH", "HOME", "USER", "LOGNAME", "STATE_DIRECTORY", "CACHIX_DEPLOY_WAITS", "PYTHONHOME")
    + ("REQUESTS_CA_BUNDLE", "SSL_CERT_DIR", "OPENSSL_CONF", "OPENSSL_MODULES", "RES_OPTIONS")
    + ("LD_LIBRARY_PATH", "DYLD_LIBRARY_PATH", "DYLD_FALLBACK_LIBRARY_PATH")
)
KEPT_PREFIXES = ("LC_", "LOCALE_ARCHIVE", "XDG_", "NIX_")

# Directories of the user: root uses none that belong to somebody else.
PERSONAL = (
    *("HOME", "XDG_CACHE_HOME", "XDG_CONFIG_HOME", "XDG_DATA_HOME", "XDG_STATE_HOME"),
    "XDG_RUNTIME_DIR",
)

proxies: dict[str, str] = {}  # set by the agent: variables that replace those of our environment


class NoHome(Exception):
    """The user has no home directory. The message says what to set."""


def home() -> str:
    """The home directory: $HOME, else that of the passwd entry, else $STATE_DIRECTORY.

    Raises NoHome if there is none of these: a container may run as any user id.
    """
    for candidate in (os.environ.get("HOME", ""), _passwd_home(), given_state()):
        if candidate.startswith("/"):
            return candidate
    user, hint = os.geteuid(), "set HOME, or STATE_DIRECTORY to a directory for its files"
    raise NoHome(f"user {user} has no passwd entry, thus no home directory: {hint}")


def leave_others() -> list[str]:
    """Forget the directories of other users, if this is root; the variables that named them.

    `sudo` may keep HOME: whoever owns that could plant links where root writes.
    """
    if os.geteuid() != 0:
        return []
    foreign = [name for name in PERSONAL if _is_foreign(os.environ.get(name, ""))]
    for name in foreign:
        del os.environ[name]
    return foreign


def _is_foreign(directory: str) -> bool:
    """Whether a directory, or the one that it would be made in, belongs to another user."""
    while directory.startswith("/"):
        try:
            return os.stat(directory).st_uid != os.geteuid()
        except OSError:  # it is not there yet
            directory = os.path.dirname(directory.rstrip("/")) or "/"
    return False


def _passwd_home() -> str:
    """The home directory of the effective user's passwd entry; empty if there is none."""
    try:
        return pwd.getpwuid(os.geteuid()).pw_dir
    except KeyError:
        return "/root" if os.geteuid() == 0 else ""


def given_state() -> str:
    """The directory for state that systemd or the operator names; empty if there is none.

    systemd may name several in $STATE_DIRECTORY: the first one counts.
    """
    first = os.environ.get("STATE_DIRECTORY", "").split(":")[0]
    return first if first.startswith("/") else ""


def state_directory() -> str:
    """The directory for state: $STATE_DIRECTORY, or root's own, or below $XDG_STATE_HOME."""
    if given_state():
        return given_state()
    if os.geteuid() == 0:
        return "/var/lib/cachix-deploy"
    return os.path.join(state_home(), "cachix-deploy")


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


def nix_profiles() -> tuple[str, str]:
    """The links to the profile of a Nix that is installed for one user alone: old and new place."""
    return f"{home()}/.nix-profile", f"{state_home()}/nix/profile"


def search_path() -> str:
    """The PATH of commands: ours, and where Nix may be although cron, say, does not name it."""
    own = [f"{profile}/bin" for profile in nix_profiles()]
    present = [part for part in os.environ.get("PATH", "").split(":") if part.startswith("/")]
    return ":".join(dict.fromkeys([*present, SYSTEM_PATH, *own, *FALLBACK_PATH]))


def is_kept(name: str) -> bool:
    """Whether commands may see this variable of ours."""
    return name in KEPT or name.startswith(KEPT_PREFIXES)


def for_switch() -> dict[str, str]:
    """The environment that a switch process gets: nothing of the agent's service but its needs."""
    return {k: v for k, v in os.environ.items() if k in FOR_SWITCH or is_kept(k)}


def for_commands() -> dict[str, str]:
    """The environment that every command gets. Raises NoHome."""
    ours = {k: v for k, v in os.environ.items() if is_kept(k)}
    ours.update(proxies)
    return {**ours, "PATH": search_path(), "HOME": home(), "USER": user(), "LOGNAME": user()}
