"""A real workspace for the tests: `cachix-workspace` as its users run it."""

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
    """A workspace with its data in a directory. Call `serve`, then make tokens and caches."""

    def __init__(self, directory: Union[str, Path]) -> None:
        self.directory = Path(directory).resolve()
        self.environment = clean_environment(self.directory)
        self.data = self.directory / "data"
        self.program: Optional[Program] = None
        self.url = ""
        self.tokens: dict[str, str] = {}
        self.files: Files = Files(self.directory / "files")  # for the newest cache
        self.cache_url = ""

    def serve(self, *args: str, listen: str = "") -> None:
        """Start it, on its former port if it has run before, and wait until it listens."""
        listen = listen or self.url.rpartition("/")[2] or "127.0.0.1:0"
        argv = [*command("cachix-workspace"), "serve", f"--listen={listen}"]
        argv += [f"--data={self.data}", *args]
        kw = {"env": self.environment, "stdin": subprocess.DEVNULL, "cwd": self.directory}
        output = self.directory / f"workspace-{time.monotonic_ns()}.out"
        self.program = Program(argv, output, subprocess.Popen, **kw)
        self.url = self.program.wait_for(r"listening on (https?://\S+)")[1].rstrip("/")

    def stop(self) -> int:
        """Send SIGTERM, and return its exit status."""
        assert self.program is not None
        return self.program.stop(30)

    def kill(self) -> None:
        """Kill it and all of its processes."""
        if self.program is not None:
            kill_group(self.program.process)

    def cli(self, *args: str) -> str:
        """Run `cachix-workspace ARGS` and return what it prints. Fails if its status is not 0."""
        argv = [*command("cachix-workspace"), *args, f"--data={self.data}"]
        result = subprocess.run(
            argv,
            env=self.environment,
            cwd=self.directory,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=60,
        )
        status = result.returncode
        assert status == 0, f"{argv} ended with status {status}:\n{result.stderr}"
        return result.stdout.strip()

    def token(self, kind: str, *args: str) -> str:
        """Return a token of a kind (agent, activate, admin).

        It is always the same one, and one for agents is shared; with `args` for `token create` it
        is a new one. The command
        refuses `--expires=0`: a token that has expired is given a nanosecond of a day to live.
        """
        if args:
            args = tuple("--expires=1e-9" if arg == "--expires=0" else arg for arg in args)
            return self.cli("token", "create", kind, *args)
        if kind not in self.tokens:
            shared = ["--shared"] if kind == "agent" else []  # its agents have many names
            self.tokens[kind] = self.cli("token", "create", kind, *shared)
        return self.tokens[kind]

    def cache(self, name: str = "main", private: bool = False) -> Files:
        """Make a binary cache. Its key signs the files that are added; `push` uploads them."""
        secret = self.cli("cache", "create", name, *(["--private"] if private else []))
        self.cache_url = f"{self.url}/cache/{name}"
        self.files = Files(self.directory / f"files-{name}", Key.parse(secret))
        return self.files

    def push(self, *paths: str) -> None:
        """Upload closures to the newest cache."""
        self.files.push(self.cache_url, self.token("activate"), *paths)

    def request(self, method: str, path: str, body: Any = None, token: str = "") -> tuple[int, Any]:
        """Make an HTTP request with the activate token, or another; return status and answer."""
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

    def deploy(
        self, agent: str, path: str, rollback_script: Optional[str] = None, **options: str
    ) -> str:
        """Order a deployment, perhaps with an operation or a reboot, and return its id."""
        spec: dict[str, Any] = {"agents": {agent: path}}
        if options:
            spec["options"] = options
        if rollback_script is not None:
            spec["rollbackScript"] = {"x86_64-linux": rollback_script}
        status, answer = self.request("POST", "/api/v2/deploy/activate", spec)
        assert status == 200, answer
        return str(answer["agents"][agent]["id"])

    def deployment(self, deployment_id: str) -> dict[str, Any]:
        """Return what the workspace knows about a deployment."""
        status, answer = self.request("GET", f"/api/v1/deploy/deployment/{deployment_id}")
        assert status == 200, answer
        return dict(answer)

    def wait(self, deployment_id: str, timeout: float = 60.0) -> str:
        """Wait for the final status of a deployment. Fails after `timeout` seconds."""
        deadline = time.monotonic() + timeout
        while True:
            status = str(self.deployment(deployment_id)["status"])
            if status in TERMINAL:
                return status
            if time.monotonic() > deadline:
                log = self.text(deployment_id)[-4000:]
                raise AssertionError(f"still {status} after {timeout:.0f} s:\n{log}")
            time.sleep(0.02)

    def log(self, deployment_id: str, offset: int = 0) -> list[str]:
        """Return the lines of a deployment's log that the workspace has."""
        lines: list[str] = []
        while True:
            start = offset + len(lines)
            path = f"/api/v1/deploy/log/{deployment_id}?offset={start}"
            status, answer = self.request("GET", path)
            assert status == 200, answer
            if not answer["lines"]:
                return lines
            lines += [line["line"] for line in answer["lines"]]

    def text(self, deployment_id: str) -> str:
        """Return the log as one text."""
        return "\n".join(self.log(deployment_id))

    def agents(self) -> list[dict[str, Any]]:
        """Return the agents that the workspace knows."""
        return list(json.loads(self.cli("agent", "list", "--json")))
