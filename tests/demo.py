"""The whole job from end to end on this machine: `make run`.

There are three hosts, each with its own /nix and /run by a mount namespace: a workspace, a CI
server that builds and pushes, and a machine with an agent. All files are below build/run, and no
process is left running.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Optional

from closures import nixos_script
from hosts import PROJECT, Host, Program

DIRECTORY = PROJECT / "build" / "run"
AGENT = "web1"
SECONDS = 120  # for any one command


class Unexpected(Exception):
    """Something went differently from what the demonstration shows: a sentence."""


class Screen:
    """Prints numbered steps, commands, and their output."""

    def __init__(self) -> None:
        self.start = time.monotonic()
        self.number = 0
        self.bold, self.plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")

    def step(self, text: str) -> None:
        self.number += 1
        print(f"\n{self.bold}{self.number}. {text}{self.plain}", flush=True)

    def say(self, text: str) -> None:
        for line in text.splitlines():
            print(f"   {line}", flush=True)


def expect(condition: object, sentence: str) -> None:
    """Raise Unexpected with a sentence unless the condition is true."""
    if not condition:
        raise Unexpected(sentence)


def short(path: Optional[str]) -> str:
    """Return the name of a store path without its hash."""
    return "nothing" if path is None else os.path.basename(path)[33:]


class Demo:
    """The hosts, and the ways to run commands on them."""

    def __init__(self, screen: Screen, workspace: Host, ci: Host, machine: Host) -> None:
        self.screen, self.workspace, self.ci, self.machine = screen, workspace, ci, machine
        self.url = ""
        self.activate_token = ""
        self.secret_key = ""

    def command(self, host: Host, *argv: str, show: bool = True, **kw: Any) -> str:
        """Run a command on a host, print it, and return its stdout. Raises Unexpected."""
        result = self.attempt(host, *argv, show=show, **kw)
        messages = result.stderr.strip()[-600:]
        expect(
            result.returncode == 0,
            f"`{' '.join(argv)}` ended with status {result.returncode}: {messages}",
        )
        return result.stdout.strip()

    def attempt(
        self, host: Host, *argv: str, show: bool = True, **kw: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as `command` does, but accept any status. Prints stderr too."""
        self.screen.say(f"[{host.directory.name}] $ {' '.join(argv)}")
        if show:
            kw.setdefault("stderr", subprocess.STDOUT)
        process = host.popen(
            list(argv),
            cwd=host.directory,
            text=True,
            stdout=subprocess.PIPE,
            **{"stderr": subprocess.PIPE, **kw},
        )
        if not show:
            out, err = process.communicate(timeout=SECONDS)
            return subprocess.CompletedProcess(argv, process.returncode, out, err)
        lines = []
        for line in process.stdout or ():
            lines.append(line)
            self.screen.say(f"  {line.rstrip()}")
        return subprocess.CompletedProcess(
            argv, process.wait(SECONDS), "".join(lines), "".join(lines[-5:])
        )

    def serve(self) -> None:
        """Start the workspace."""
        data = f"--data={self.workspace.directory / 'data'}"
        argv = ["cachix-workspace", "serve", "--listen=127.0.0.1:0", data]
        self.screen.say(f"[workspace] $ {' '.join(argv)} &")
        program = self.workspace.start("workspace", argv)
        self.url = program.wait_for(r"listening on (http://\S+)")[1].rstrip("/")
        self.screen.say(f"  listening on {self.url}")

    def secret(self, *words: str) -> str:
        """Run a command of the workspace that prints a secret, and return it without showing it."""
        data = f"--data={self.workspace.directory / 'data'}"
        secret = self.command(self.workspace, "cachix-workspace", *words, data, show=False)
        self.screen.say("  (a secret, not shown here)")
        return secret

    def prepare(self) -> str:
        """Make the cache and the tokens, for CI too. Returns the agent's token."""
        self.secret_key = self.secret("cache", "create", "demo")
        self.activate_token = self.secret("token", "create", "activate", "--description=CI")
        return self.secret("token", "create", "agent", "--description=web1")

    def build(self, version: str, attribute: str = "system") -> str:
        """Build on CI with nix-build, and return the store path."""
        switch = self.ci.directory / "switch-to-configuration"
        switch.write_text(nixos_script())
        words = ["nix-build", str(PROJECT / "tests/demo.nix"), "--attr", attribute]
        words += ["--argstr", "version", version, "--arg", "switch", str(switch), "--no-out-link"]
        result = self.attempt(self.ci, *words, show=False)
        lines = [line for line in result.stderr.splitlines() if not line.startswith("  ")]
        self.screen.say("\n".join(f"  {line}" for line in lines))
        expect(result.returncode == 0, "nix-build failed")
        return result.stdout.strip()

    def agent(self, token: str) -> Program:
        """Start the agent on the machine."""
        self.screen.say(f"[machine] $ cachix-deploy --host {self.url} agent {AGENT} &")
        program = self.machine.agent(AGENT, self.url, token)
        program.wait_for("is connected to")
        self.screen.say(f"  {program.text().strip()}")
        return program

    def deploy(self, path: str, script: Optional[str] = None) -> int:
        """Push and deploy as CI does. Returns the status of `cachix-deploy activate`."""
        spec: dict[str, Any] = {"agents": {AGENT: path}}
        if script is not None:
            spec["rollbackScript"] = {f"{os.uname().machine}-linux": script}
        (self.ci.directory / "deploy.json").write_text(json.dumps(spec, indent=2) + "\n")
        self.screen.say(json.dumps(spec, indent=2))
        argv = ["cachix-deploy", "activate", "--push", "--upstream=none", "deploy.json"]
        env = {
            "CACHIX_HOST": self.url,
            "CACHIX_ACTIVATE_TOKEN": self.activate_token,
            "CACHIX_SIGNING_KEY": self.secret_key,
        }
        return self.attempt(self.ci, *argv, env=env).returncode

    def show(self) -> tuple[Optional[str], Optional[str], Optional[str]]:
        """Print and return the running system, the profile's system, and the boot loader's."""
        paths = (self.machine.running(), self.machine.profile(), self.machine.boot_default())
        for label, path in zip(("runs", "system profile", "would boot"), paths):
            self.screen.say(f"{label + ':':16}{path or 'nothing yet'}")
        return paths

    def expect_version(self, version: str, path: str) -> None:
        """Show the machine, and check that it runs and boots a system, and that this works."""
        expect(self.show() == (path,) * 3, f"the machine should run and boot version {version}")
        self.command(self.machine, "/run/current-system/sw/bin/web-server")

    def run(self) -> list[str]:
        """Run the whole demonstration, and return its summary."""
        step = self.screen.step
        step("Start a workspace: it holds agents, tokens, deployments, logs and a binary cache.")
        self.serve()
        step("Create a binary cache and two tokens: one for CI, one for the machine's agent.")
        token = self.prepare()
        step("CI builds version 1 of the machine's system: three store paths, one of them NixOS.")
        first = self.build("1")
        self.command(self.ci, "nix-store", "--query", "--requisites", first)
        step("The agent connects. Nothing was deployed to its machine yet, and its store is empty.")
        agent = self.agent(token)
        self.show()
        step("CI signs and pushes the closure of version 1, deploys it, and follows the log.")
        expect(self.deploy(first) == 0, "the first deployment should have succeeded")
        self.expect_version("1", first)
        step("CI deploys version 2 with a rollback script that finds it unhealthy: roll back.")
        second, script = self.build("2"), self.build("2", "healthCheck")
        expect(self.deploy(second, script) == 1, "`activate` should have ended with status 1")
        self.expect_version("1", first)
        calls, record = [("test", first), ("boot", first)], self.machine.record()
        calls += [("test", second), ("test", first)]
        expect(record == calls, f"the machine should have been called for {calls}, not {record}")
        step("Stop the agent.")
        expect(agent.stop() == 0, f"the agent should have ended with status 0:\n{agent.text()}")
        lines = [f"  {action:16}{short(path)}" for action, path in record]
        return ["These are all activations on the machine, in order:", *lines]


def clear(directory: Path) -> None:
    """Empty the directory of an earlier run, even of a store's read-only directories."""
    for parent, _, _ in os.walk(directory):
        with contextlib.suppress(OSError):
            os.chmod(parent, 0o700)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


@contextlib.contextmanager
def three_hosts() -> Iterator[list[Host]]:
    """Yield the hosts of the demonstration, and end all their processes afterwards."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Host(DIRECTORY / name)) for name in ("workspace", "ci", "machine")
        ]


def main() -> int:
    """Run the demonstration; return the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    screen = Screen()
    print("cachix-deploy on this machine: a workspace, a CI server, and a machine to deploy to.")
    try:
        clear(DIRECTORY)
        with three_hosts() as hosts:
            summary = Demo(screen, *hosts).run()
    except (Unexpected, AssertionError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        logs = DIRECTORY.relative_to(PROJECT)
        print(f"\nerror: {error}\n(the output of all programs is below {logs})", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        return 130
    screen.step("Summary")
    screen.say("\n".join(summary))
    screen.say("Version 1 was deployed, checked and committed. Version 2 ran, failed its check and")
    screen.say("was rolled back; it never became the system to boot. All processes have ended, and")
    screen.say("their files are in build/run.")
    screen.say(f"This took {time.monotonic() - screen.start:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
