"""A machine that builds, as CI is: its store has paths, and it pushes them to a workspace."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any, Optional

from caches import Files, Key
from hosts import Host, Program, command
from live import Workspace


class Builder:
    """A host with a store, and a workspace. `built` has what the host may be given."""

    def __init__(self, host: Host, workspace: Workspace) -> None:
        self.host, self.workspace = host, workspace
        self.built = Files(host.directory / "built", Key("built-1"))
        self.key = workspace.files.key.secret
        self.token = workspace.token("activate")
        self.program = command("cachix-deploy")

    def have(self, *paths: str) -> None:
        """Let the host's store have closures of `built`."""
        url, key = f"file://{self.built.directory}", self.built.key.public
        options = ["--option", "substituters", url, "--option", "trusted-public-keys", key]
        argv = ["nix-store", "--realise", *paths, *options, "--max-jobs", "16"]
        self.host.output(*argv, timeout=100)

    def give(self, upstream: Files) -> None:
        """Let an upstream have all that was built so far."""
        shutil.copytree(self.built.directory, upstream.directory, dirs_exist_ok=True)

    def environment(self, **changes: Optional[str]) -> dict[str, str]:
        """Return the three variables of CI, with changes; None removes one."""
        variables = {
            "CACHIX_HOST": self.workspace.url,
            "CACHIX_ACTIVATE_TOKEN": self.token,
            "CACHIX_SIGNING_KEY": self.key,
            **changes,
        }
        return {name: text for name, text in variables.items() if text is not None}

    def run(
        self, *words: str, upstream: str = "none", cwd: Any = "/", **changes: Optional[str]
    ) -> subprocess.CompletedProcess[str]:
        """Run `cachix-deploy WORDS` with the variables of CI."""
        argv = [*self.program, *words, f"--upstream={upstream}"]
        return self.host.run(argv, 100, self.environment(**changes), cwd=cwd)

    def start(self, *words: str) -> Program:
        """Start `cachix-deploy push WORDS`."""
        argv = [*self.program, "push", *words, "--upstream=none"]
        return self.host.start("push", argv, self.environment())

    def push(self, *words: str, **more: Any) -> str:
        """Push, and return the line that says what was done. Fails unless all went well."""
        result = self.run("push", *words, **more)
        problems = [line for line in result.stderr.splitlines() if line[:9] != "pushing: "]
        assert result.returncode == 0 and not problems, result
        return result.stdout.strip()

    def refused(self, *words: str, **more: Any) -> tuple[int, str]:
        """Push in vain; return the status and the only line, which says why."""
        result = self.run("push", *words, **more)
        problems = [line for line in result.stderr.splitlines() if line[:9] != "pushing: "]
        assert result.stdout == "" and len(problems) == 1, result
        return result.returncode, problems[0]

    def directory(self, cache: str = "main") -> Path:
        """Return the directory of a cache of the workspace."""
        return self.workspace.data / "cache" / cache

    def pushed(self, cache: str = "main") -> set[str]:
        """Return the names of the store paths in a cache of the workspace.

        Fails if any lacks its archive, or a reference that is not in the upstream.
        """
        texts = [path.read_text() for path in self.directory(cache).glob("*.narinfo")]
        fields = [dict(re.findall(r"^(\w+): (.*)$", text, re.M)) for text in texts]
        for one in fields:
            archive = self.directory(cache) / one["URL"]
            assert archive.stat().st_size == int(one["FileSize"]), one["StorePath"]
        return {os.path.basename(one["StorePath"]) for one in fields}

    def dangling(self) -> set[str]:
        """Return the names that narinfos in the cache refer to without being there."""
        texts = [path.read_text() for path in self.directory().glob("*.narinfo")]
        names = {name for text in texts for name in re.findall(r"^References: (.*)$", text, re.M)}
        return {name for each in names for name in each.split()} - self.pushed()


def names(paths: Any) -> set[str]:
    """Return the names of store paths."""
    return {os.path.basename(path) for path in paths}
