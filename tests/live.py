"""A real workspace for tests and for the demonstration: `cachix-workspace` as its users run it."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any, Optional, Union

from caches import Files, Key
from hosts import Program, clean_environment, command, kill_group

TERMINAL = ("Succeeded", "Failed", "Cancelled")


class Workspace:
    """A workspace with its data in a directory; `serve` it, then make tokens and caches."""

    def __init__(self, directory: Union[str, Path]) -> None:
        self.directory = Path(directory).resolve()
        self.environment = clean_environment(self.directory)
        self.data = self.directory / "data"
        self.program: Optional[Program] = None
        self.url = ""
        self.tokens: dict[str, str] = {}
        self.files: Files = Files(self.directory / "files")  # of the cache that was made last
        self.cache_url = ""

    def serve(self, *args: str, listen: str = "") -> None:
        """Start it, on the same port as before if it ran before."""
        listen = listen or self.url.rpartition("/")[2] or "127.0.0.1:0"
        argv = [
            *command("cachix-workspace"),
            "serve",
            f"--listen={listen}",
            f"--data={self.data}",
            *args,
        ]
        kw = {"env": self.environment, "stdin": subprocess.DEVNULL, "cwd": self.directory}
        output = self.directory / f"workspace-{time.monotonic_ns()}.out"
        self.program = Program(argv, output, subprocess.Popen, **kw)
        self.url = self.program.wait_for(r"listening on (http://\S+)")[1].rstrip("/")

    def stop(self) -> int:
        """End it in order (SIGTERM); its exit status."""
        assert self.program is not None
        return self.program.stop(30)

    def kill(self) -> None:
        """End it at once, with all of its processes."""
        if self.program is not None:
            kill_group(self.program.process)

    def cli(self, *args: str) -> str:
        """What `cachix-workspace ARGS` prints; fails with its messages."""
        argv = [*command("cachix-workspace"), *args, f"--data={self.data}"]
        done = subprocess.run(
            argv, env=self.environment, cwd=self.directory, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=60,
        )  # fmt: skip
        assert done.returncode == 0, f"{argv} ended with status {done.returncode}:\n{done.stderr}"
        return done.stdout.strip()

    def token(self, kind: str, *args: str) -> str:
        """A token of a kind (agent, activate, admin): always the same one, unless `args` ask for a special one."""
        if args:
            return self.cli("token", "create", kind, *args)
        if kind not in self.tokens:
            self.tokens[kind] = self.cli("token", "create", kind)
        return self.tokens[kind]

    def cache(self, name: str = "main", private: bool = False) -> Files:
        """Make a binary cache. What is added to the files, which are signed with its key, `push` uploads."""
        secret = self.cli("cache", "create", name, *(["--private"] if private else []))
        self.cache_url = f"{self.url}/cache/{name}"
        self.files = Files(self.directory / f"files-{name}", Key.parse(secret))
        return self.files

    def push(self, *paths: str) -> None:
        """Upload closures to the cache that was made last."""
        self.files.push(self.cache_url, self.token("activate"), *paths)

    def request(self, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
        """Status and decoded answer of an HTTP request with the activate token, or another."""
        headers = {
            "Authorization": f"Bearer {token or self.token('activate')}",
            "Content-Type": "application/json",
        }
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.url + path, data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:
                status, text = answer.status, answer.read()
        except urllib.error.HTTPError as error:
            status, text = error.code, error.read()
        try:
            return status, json.loads(text)
        except ValueError:
            return status, text.decode(errors="replace")

    def deploy(self, agent: str, path: str, rollback_script: Optional[str] = None) -> str:
        """Order a deployment; its id."""
        script = (
            {} if rollback_script is None else {"rollbackScript": {"x86_64-linux": rollback_script}}
        )
        status, answer = self.request(
            "POST", "/api/v2/deploy/activate", {"agents": {agent: path}, **script}
        )
        assert status == 200, answer
        return str(answer["agents"][agent]["id"])

    def deployment(self, deployment_id: str) -> dict[str, Any]:
        """What the workspace knows of a deployment."""
        status, answer = self.request("GET", f"/api/v1/deploy/deployment/{deployment_id}")
        assert status == 200, answer
        return dict(answer)

    def wait(self, deployment_id: str, timeout: float = 60.0) -> str:
        """The final status of a deployment; fails where it has none in time."""
        deadline = time.monotonic() + timeout
        while True:
            status = str(self.deployment(deployment_id)["status"])
            if status in TERMINAL:
                return status
            assert time.monotonic() < deadline, (
                f"still {status} after {timeout:.0f} s:\n{self.text(deployment_id)[-4000:]}"
            )
            time.sleep(0.02)

    def log(self, deployment_id: str, offset: int = 0) -> list[str]:
        """The lines that the workspace has of a deployment's log."""
        found: list[str] = []
        while True:
            start = offset + len(found)
            status, answer = self.request(
                "GET", f"/api/v1/deploy/log/{deployment_id}?offset={start}"
            )
            assert status == 200, answer
            if not answer["lines"]:
                return found
            found += [line["line"] for line in answer["lines"]]

    def text(self, deployment_id: str) -> str:
        """The log as one text."""
        return "\n".join(self.log(deployment_id))

    def agents(self) -> list[dict[str, Any]]:
        """The agents that the workspace knows."""
        return list(json.loads(self.cli("agent", "list", "--json")))
