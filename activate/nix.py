"""Nix: one function for each command, named after it; arguments in, parsed values out."""

from __future__ import annotations

import contextlib
import os
import re
from typing import Optional

from activate.files import make_public
from activate.process import CommandFailed, Error, Run, ask, checked, output
from activate.source import DRY_RUN_OPTIONS
from activate.source import Source as Source
from activate.source import option as option
from activate.text import is_store_path

STORE = "/nix/store"
PROFILES = "/nix/var/nix/profiles"
MOST_LINKS = 40  # as in the kernel, against loops
EXPERIMENTAL = option("experimental-features", "nix-command")


def check_paths(*paths: Optional[str]) -> None:
    """Raise Error unless every path is one of a build's output, so that Nix can take it safely."""
    for path in paths:
        if path is not None and not is_store_path(path):
            raise Error(f"the workspace sent {path[:300]!r}, which is not a store path")
        if path is not None and path.endswith(".drv"):
            raise Error(f"{path} is a derivation, which would have to be built: deploy its output")


def _realise(paths: list[str], link: str) -> list[str]:
    """The command that gives each path a GC root, which are LINK, LINK-2, LINK-3 and so on."""
    return ["nix-store", "--realise", *paths, "--add-root", link, "--indirect"]


def realise(paths: list[str], link: str, source: Source, run: Run) -> int:
    """Download closures, with a GC root for each path; the exit status."""
    return run([*_realise(paths, link), *source.options()])


def realise_present(paths: list[str], link: str, timeout: float) -> bool:
    """Add a GC root for each path if all are valid already, without any download."""
    options = [*option("substitute", "false"), "--max-jobs", "0"]
    return ask([*_realise(paths, link), *options], timeout)[0] == 0


def realise_dry_run(paths: list[str], source: Source, run: Run) -> int:
    """Print the paths and sizes that a download would fetch; the exit status.

    The answers of the substituters go into Nix's cache, so that the download does not ask again.
    """
    options = [*source.options(), *DRY_RUN_OPTIONS]
    return run(["nix-store", "--realise", "--dry-run", *paths, *options])


def add_roots(paths: list[str], link: str, run: Run) -> None:
    """Add a GC root for each path. Raises CommandFailed."""
    checked(run, _realise(paths, link))


def requisites(paths: list[str], timeout: float) -> list[str]:
    """The paths in the closures of `paths`. Raises CommandFailed if Nix does not have them."""
    return output(["nix-store", "--query", "--requisites", *paths], timeout).split()


def damaged_paths(paths: list[str], timeout: float) -> list[str]:
    """The paths in the closures of `paths` whose contents have changed. Nix reads all of them."""
    closure = requisites(paths, timeout)
    messages = ask(["nix-store", "--verify-path", *closure], timeout)[2]
    return [path for path in closure if f"path '{path}' was modified" in messages]


def repair(paths: list[str], source: Source, run: Run) -> int:
    """Replace the contents of valid paths by those of a substituter; the exit status."""
    return run(["nix-store", "--repair-path", *paths, *source.options()])


def substituters() -> list[str]:
    """The substituters of this machine's nix.conf. Nix 2.3 keeps the extra ones apart."""
    config = show_config()
    names = ("substituters", "extra-substituters")
    return list(dict.fromkeys(url for name in names for url in config.get(name, "").split()))


def may_forbid_substitution() -> bool:
    """Whether `substitute` may be set to false: a daemon ignores that from untrusted users."""
    return os.geteuid() == 0 or os.access("/nix/var/nix/db", os.W_OK)


def path_info_size(path: str) -> int:
    """The size of the closure of `path` in bytes. Raises Error."""
    text = output(["nix", "path-info", "-S", path, *EXPERIMENTAL], 300)
    with contextlib.suppress(ValueError, IndexError):
        return int(text.split()[1])
    raise Error(f"`nix path-info -S {path}` printed no size: {text[:200]!r}")


def show_config() -> dict[str, str]:
    """The settings of Nix; empty if neither the old nor the new name of the command works."""
    for words in (["show-config"], ["config", "show"]):
        with contextlib.suppress(CommandFailed):
            lines = output(["nix", *words, *EXPERIMENTAL]).splitlines()
            pairs = [line.partition("=") for line in lines if "=" in line]
            return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def set_profile(profile: str, path: str, run: Run) -> None:
    """Point a profile at `path` by a new generation, atomically. Raises CommandFailed."""
    make_public(os.path.dirname(profile))
    checked(run, ["nix-env", "--profile", profile, "--set", path])


def switch_generation(profile: str, number: int, run: Run) -> None:
    """Point a profile at one of its generations. Raises CommandFailed."""
    checked(run, ["nix-env", "--profile", profile, "--switch-generation", str(number)])


def switch_to_configuration(path: str, action: str, run: Run) -> int:
    """Run a NixOS system now (`test`), or let it boot from now on (`boot`); the exit status."""
    return run([f"{path}/bin/switch-to-configuration", action])


def target(link: str) -> Optional[str]:
    """The store path that a chain of links leads to, even if it is missing; None if there is none.

    A store path that is a link itself is not followed.
    """
    with contextlib.suppress(OSError):
        for _ in range(MOST_LINKS):
            if os.path.dirname(link) == STORE:
                return link
            link = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
    return None


def store_path_of(file: str) -> str:
    """The store path that a file, or the target of a link, is in."""
    return "/".join(os.path.realpath(file).split("/")[:4])


def generation(profile: str) -> Optional[int]:
    """The number of the profile's present generation; None if it has no generations."""
    with contextlib.suppress(OSError):
        name = re.escape(os.path.basename(profile))
        match = re.fullmatch(rf"{name}-(\d+)-link", os.path.basename(os.readlink(profile)))
        return int(match[1]) if match else None
    return None
