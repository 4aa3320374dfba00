"""Systems to deploy: store paths that behave like NixOS, nix-darwin and Home Manager, or badly.

Each function puts a closure into a cache and returns its store path. `version` only tells paths
apart. A test gives shell code that runs inside the activation script, `before` the script does its
work or `after`; `$self` is the closure's own store path. So `after="exit 4"` makes a system that
runs although some units failed, and `before="exit 2"` one that does not run. Each action is noted
in the host's record (`Host.record`) when it begins.
"""

from __future__ import annotations

import base64
from typing import Any, Union

from caches import SELF, Executable, Files, Link, Tree
from hosts import BOOT_DEFAULT, CURRENT_SYSTEM, RECORD

HEAD = f'#!/bin/sh\nself={SELF}\nnote() {{ echo "$1 $self" >>{RECORD}; }}\n'
POINT = 'point() { ln -s "$1" "$2.$$" && mv -T "$2.$$" "$2"; }\n'

# As with systemd-boot: only a generation of a profile has an entry in the boot menu, and only an
# entry can be the default.
NIXOS = """
action=$1
note "$action"
run() {
    :
    BEFORE_TEST
    point "$self" CURRENT
    echo "activating the configuration..."
    AFTER_TEST
}
boot() {
    :
    BEFORE_BOOT
    entry=
    for link in /nix/var/nix/profiles/system-*-link /nix/var/nix/profiles/system-profiles/*-link; do
        [ "$(readlink "$link")" != "$self" ] || entry=$link
    done
    if [ -n "$entry" ]; then point "$self" DEFAULT
    else echo "warning: $self is in no boot menu"
    fi
    AFTER_BOOT
}
case $action in
test) run ;;
boot) boot ;;
switch) boot; run ;;
dry-activate) echo "would activate the configuration..."; DRY ;;
*) echo "unknown action $action" >&2; exit 1 ;;
esac
"""

DARWIN = """
[ "$1" = activate ] || exit 64
self=$(dirname "$(dirname "$(dirname "$0")")")
note activate
:
BEFORE
point "$self" CURRENT
echo "setting up launchd services..."
AFTER
"""

# The profile is set early and `current-home` last. Whether the profile is set at all depends on
# `current-home`.
HOME_MANAGER = """
set -eu
if [ -n "${DRY_RUN:-}" ]; then note dry-run; echo "would activate"; exit 0; fi
note activate
state=${XDG_STATE_HOME:-$HOME/.local/state}
profiles=/nix/var/nix/profiles/per-user/$USER
if [ -d "$state/nix/profiles" ]; then profiles=$state/nix/profiles
elif [ ! -d "$profiles" ]; then echo "Could not find a profile directory" >&2; exit 1
fi
current=$state/home-manager/gcroots/current-home
BEFORE
if [ "$(readlink -e "$current")" != "$self" ]; then
    echo "Creating new profile generation"
    nix-env --profile "$profiles/home-manager" --set "$self"
else
    echo "No change so reusing latest profile generation"
fi
MIDDLE
echo "version VERSION" >"$HOME/.managed"
nix-store --realise "$self" --add-root "$current" --indirect >/dev/null
AFTER
"""


def _dependencies(cache: Files, version: Any, count: int) -> dict[str, Tree]:
    """Return links to small store paths: one that all versions share, and `count` of its own."""
    shared = cache.add("shared-library", {"lib": {"libshared.so": "the same in all versions\n"}})
    own = [
        cache.add(f"part-{i}-{version}", {"share": f"part {i} of {version}, uses {shared}\n"})
        for i in range(count)
    ]
    return {f"part-{index}": Link(path) for index, path in enumerate([shared, *own])}


def nixos_script(
    before: str = "", after: str = "", before_boot: str = "", after_boot: str = "", dry: str = ""
) -> str:
    """Return a `switch-to-configuration` with `@self@` in place of its system's store path."""
    words = {
        "BEFORE_TEST": before,
        "AFTER_TEST": after,
        "BEFORE_BOOT": before_boot,
        "AFTER_BOOT": after_boot,
        "DRY": dry,
        "CURRENT": CURRENT_SYSTEM,
        "DEFAULT": BOOT_DEFAULT,
    }
    return HEAD + POINT + _fill(NIXOS, words)


def nixos(
    cache: Files,
    version: Any,
    before: str = "",
    after: str = "",
    before_boot: str = "",
    after_boot: str = "",
    parts: int = 3,
    extra: Union[dict[str, Tree], None] = None,
    dry: str = "",
) -> str:
    """Add a NixOS system. `before` and `after` belong to the action `test`, `dry` to a dry run."""
    script = nixos_script(before, after, before_boot, after_boot, dry)
    tree: dict[str, Tree] = {
        "nixos-version": f"24.11.{version}\n",
        "bin": {"switch-to-configuration": Executable(script)},
        "parts": _dependencies(cache, version, parts),
        **(extra or {}),
    }
    return cache.add(f"nixos-system-host-{version}", tree)


def darwin(
    cache: Files, version: Any, before: str = "", after: str = "", marker: str = "darwin-version"
) -> str:
    """Add a nix-darwin system. `marker` may also be darwin-version.json."""
    words = {"BEFORE": before, "AFTER": after, "CURRENT": CURRENT_SYSTEM}
    tree: dict[str, Tree] = {
        marker: f"{version}\n",
        "sw": {"bin": {"darwin-rebuild": Executable(HEAD + POINT + _fill(DARWIN, words))}},
        "parts": _dependencies(cache, version, 1),
    }
    return cache.add(f"darwin-system-{version}", tree)


def home_manager(
    cache: Files, version: Any, before: str = "", middle: str = "", after: str = ""
) -> str:
    """Add a Home Manager generation. `middle` runs between setting profile and `current-home`."""
    words = {"BEFORE": before, "MIDDLE": middle, "AFTER": after, "VERSION": str(version)}
    script = HEAD + POINT + _fill(HOME_MANAGER, words)
    tree: dict[str, Tree] = {
        "hm-version": "24.11\n",
        "activate": Executable(script),
        "parts": _dependencies(cache, version, 1),
    }
    return cache.add(f"home-manager-generation-{version}", tree)


def plain(cache: Files, version: Any, extra: Union[dict[str, Tree], None] = None) -> str:
    """Add a package: a path without the marker of any other kind."""
    tree: dict[str, Tree] = {
        "share": f"{version}\n",
        "parts": _dependencies(cache, version, 1),
        **(extra or {}),
    }
    return cache.add(f"package-{version}", tree)


def script(cache: Files, name: str, code: str) -> str:
    """Add a rollback script, an executable file. It notes `rollback-script` when it runs."""
    text = f"{HEAD}note rollback-script\n{code}\n"
    return cache.add(f"rollback-script-{name}", Executable(text))


def unusable_script(cache: Files, how: str) -> str:
    """Add a rollback script that can't be run: `directory`, `not-executable`, `no-interpreter`."""
    trees: dict[str, Tree] = {
        "directory": {"bin": "nothing to run\n"},
        "not-executable": "#!/bin/sh\nexit 0\n",
        "no-interpreter": Executable("#!/nowhere/interpreter\n"),
    }
    return cache.add(f"rollback-script-{how}", trees[how])


def chain(cache: Files, count: int, size: int = 100, name: str = "many") -> str:
    """Add a plain path that refers to `count` others of `size` incompressible bytes each."""
    seed = base64.b64encode(name.encode()) * (size // len(name) + 1)
    paths = [cache.add(f"{name}-{i}", f"{i}\n".encode() + seed[:size]) for i in range(count)]
    return cache.add(
        f"{name}-all", {"parts": {f"part-{i}": Link(path) for i, path in enumerate(paths)}}
    )


def _fill(text: str, words: dict[str, str]) -> str:
    for word, value in words.items():
        text = text.replace(word, value or ":")
    return text


# --- shell code that misbehaves -------------------------------------------------------------------


def daemon(seconds: float = 300) -> str:
    """Leave a child behind that keeps stdout and stderr open."""
    return f"sleep {seconds} &"


def session(seconds: float = 300) -> str:
    """Leave a child behind in its own session, out of reach of any signal to a process group."""
    return f"setsid sleep {seconds} &"


def lines(count: int) -> str:
    """Print numbered lines: `line 1` to `line COUNT`."""
    return f"seq -f 'line %.0f' {count}"


def long_line(size: int) -> str:
    """Print one line of `size` bytes."""
    return f"head -c {size} /dev/zero | tr '\\0' x; echo"


def output(data: bytes) -> str:
    """Print these bytes, whatever they are."""
    return f"echo {base64.b64encode(data).decode()} | base64 -d"


def hang(seconds: float = 3600, trap: bool = False) -> str:
    """Hang; with `trap` also after SIGTERM."""
    return ("trap '' TERM\n" if trap else "") + f"sleep {seconds}"


def wait_for(file: str) -> str:
    """Wait until the test has created `file` (on the host: below /run or /nix/var)."""
    return f"while [ ! -e {file} ]; do sleep 0.02; done"


def kill(pattern: str, signal: str = "KILL") -> str:
    """Kill the processes of this host whose command lines match `pattern` (for grep)."""
    same_host = '[ "$(readlink "$p/ns/mnt")" = "$(readlink /proc/self/ns/mnt)" ]'
    matches = f"tr '\\0' ' ' <\"$p/cmdline\" 2>/dev/null | grep -q '{pattern}'"
    action = f'kill -{signal} "${{p#/proc/}}"'
    return f"for p in /proc/[0-9]*; do {same_host} && {matches} && {action}; done; :"
