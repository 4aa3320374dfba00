"""One function for each Nix command, named after it: arguments in, parsed value out. Facts about versions: nix.md."""

from __future__ import annotations

import contextlib
import os
import re
from dataclasses import dataclass
from typing import Optional

from activate.process import CommandFailed, Error, Run, ask, checked, output
from activate.text import is_store_path

STORE = "/nix/store"
PROFILES = "/nix/var/nix/profiles"
EXPERIMENTAL = ["--option", "experimental-features", "nix-command"]
DOWNLOAD_OPTIONS = (
    ["--max-jobs", "32", "--option", "max-substitution-jobs", "32", "--option", "http-connections", "128"]
    + ["--option", "stalled-download-timeout", "30", "--option", "fsync-store-paths", "true"]
)  # fmt: skip


def check_paths(*paths: Optional[str]) -> None:
    """Nothing but the path of something that was built may become an argument of Nix. Raises Error."""
    for path in paths:
        if path is not None and not is_store_path(path):
            raise Error(f"the workspace sent {path[:300]!r}, which is not a store path")
        if path is not None and path.endswith(".drv"):
            raise Error(f"{path} is a derivation, which would have to be built: deploy its output")


@dataclass(frozen=True)
class Source:
    """Where closures come from besides the machine's own substituters: URL, all trusted keys, and a netrc file."""

    substituter: Optional[str] = None
    keys: tuple[str, ...] = ()
    netrc: Optional[str] = None

    def options(self) -> list[str]:
        """The options that name it; the machine's own configuration counts where there is nothing to say."""
        options = list(DOWNLOAD_OPTIONS)
        if self.substituter is not None:
            options += ["--option", "extra-substituters", self.substituter]
            options += ["--option", "trusted-public-keys", " ".join(self.keys)]
        options += ["--option", "narinfo-cache-negative-ttl", "0"]
        return options if self.netrc is None else [*options, "--option", "netrc-file", self.netrc]


def realise(paths: list[str], link: str, source: Source, run: Run) -> int:
    """Download closures; each path gets a GC root in the same step: LINK, LINK-2, LINK-3 and so on."""
    return run(
        ["nix-store", "--realise", *paths, "--add-root", link, "--indirect", *source.options()]
    )


def realise_present(paths: list[str], link: str, timeout: float) -> bool:
    """Give paths a GC root as `realise` does if all are valid already; nothing is downloaded."""
    argv = ["nix-store", "--realise", *paths, "--add-root", link, "--indirect"]
    return ask([*argv, "--option", "substitute", "false", "--max-jobs", "0"], timeout)[0] == 0


def realise_dry_run(paths: list[str], source: Source, timeout: float) -> str:
    """What a download would fetch, in Nix's words; fills Nix's cache of narinfos, so that it does not ask again."""
    return ask(["nix-store", "--realise", "--dry-run", *paths, *source.options()], timeout)[2]


def damaged_paths(paths: list[str], timeout: float) -> list[str]:
    """Those in the closures of `paths` whose contents are not what was registered: all of them are read."""
    closure = output(["nix-store", "--query", "--requisites", *paths], timeout).split()
    said = ask(["nix-store", "--verify-path", *closure], timeout)[2]
    return [path for path in closure if f"path '{path}' was modified" in said]


def repair(paths: list[str], source: Source, run: Run) -> int:
    """Replace the contents of valid paths by those of a substituter."""
    return run(["nix-store", "--repair-path", *paths, *source.options()])


def may_forbid_substitution() -> bool:
    """Whether `--option substitute false` counts: a daemon ignores it from users that it does not trust."""
    return os.geteuid() == 0 or os.access("/nix/var/nix/db", os.W_OK)


def path_info_size(path: str) -> int:
    """The size of the closure of `path` in bytes. Raises CommandFailed."""
    text = output(["nix", "path-info", "-S", path, *EXPERIMENTAL], 300)
    with contextlib.suppress(ValueError, IndexError):
        return int(text.split()[1])
    raise Error(f"`nix path-info -S {path}` printed no size: {text[:200]!r}")


def show_config() -> dict[str, str]:
    """Nix's settings; empty where neither the old nor the new name of the command works."""
    for words in (["show-config"], ["config", "show"]):
        with contextlib.suppress(CommandFailed):
            lines = output(["nix", *words, *EXPERIMENTAL]).splitlines()
            pairs = [line.partition("=") for line in lines if "=" in line]
            return {name.strip(): value.strip() for name, _, value in pairs}
    return {}


def set_profile(profile: str, path: str, run: Run) -> None:
    """Point a profile at `path` by a new generation, atomically. Raises CommandFailed."""
    os.makedirs(os.path.dirname(profile), mode=0o755, exist_ok=True)
    checked(run, ["nix-env", "--profile", profile, "--set", path])


def switch_generation(profile: str, number: int, run: Run) -> None:
    """Point a profile at a generation that it has. Raises CommandFailed."""
    checked(run, ["nix-env", "--profile", profile, "--switch-generation", str(number)])


def switch_to_configuration(path: str, action: str, run: Run) -> int:
    """NixOS: `test` runs a system without booting it, `boot` makes the profile's system the one to boot."""
    return run([f"{path}/bin/switch-to-configuration", action])


def target(link: str) -> Optional[str]:
    """The store path that a link leads to, whether it is there or not; None where it leads to none.

    It ends at the store path itself, which may be a link too.
    """
    with contextlib.suppress(OSError):
        for _ in range(40):
            if os.path.dirname(link) == STORE:
                return link
            link = os.path.normpath(os.path.join(os.path.dirname(link), os.readlink(link)))
    return None


def generation(profile: str) -> Optional[int]:
    """The number of the profile's present generation; None for a link that is no generation."""
    with contextlib.suppress(OSError):
        name = re.escape(os.path.basename(profile))
        found = re.fullmatch(rf"{name}-(\d+)-link", os.path.basename(os.readlink(profile)))
        return int(found[1]) if found else None
    return None
