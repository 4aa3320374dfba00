"""The main job from end to end on this machine: `make run`.

Three hosts, each with its own /nix and /run by a mount namespace: a workspace, a CI server that builds and pushes, and
a machine with an agent. All files are below build/run, and nothing is left running.
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
    """The demonstration shows something else than it should: a sentence."""


class Screen:
    """What the person who runs it sees: numbered steps, commands, and what they print."""

    def __init__(self) -> None:
        self.begin = time.monotonic()
        self.number = 0
        self.bold, self.plain = ("\x1b[1m", "\x1b[0m") if sys.stdout.isatty() else ("", "")

    def step(self, text: str) -> None:
        self.number += 1
        print(f"\n{self.bold}{self.number}. {text}{self.plain}", flush=True)

    def say(self, text: str) -> None:
        for line in text.splitlines():
            print(f"   {line}", flush=True)


def expect(condition: object, sentence: str) -> None:
    """Go on only if what the demonstration promises is so."""
    if not condition:
        raise Unexpected(sentence)


def short(path: Optional[str]) -> str:
    """A store path without its hash."""
    return "nothing" if path is None else os.path.basename(path)[33:]


class Demo:
    """The hosts, and the ways to run commands on them."""

    def __init__(self, screen: Screen, workspace: Host, ci: Host, machine: Host) -> None:
        self.screen, self.workspace, self.ci, self.machine = screen, workspace, ci, machine
        self.url = ""
        self.activate_token = ""
        self.secret_key = ci.directory / "cache-secret-key"
        self.netrc = ci.directory / "netrc"

    def command(self, host: Host, *argv: str, show: bool = True, **kw: Any) -> str:
        """Run a command on a host, shown with what it prints; gives its stdout. Only status 0 is good enough."""
        done = self.attempt(host, *argv, show=show, **kw)
        expect(
            done.returncode == 0,
            f"`{' '.join(argv)}` ended with status {done.returncode}: {done.stderr.strip()[-600:]}",
        )
        return done.stdout.strip()

    def attempt(
        self, host: Host, *argv: str, show: bool = True, **kw: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run a command as `command` does, whatever its status is. Messages are part of what is shown."""
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
        argv = [
            "cachix-workspace",
            "serve",
            "--listen=127.0.0.1:0",
            f"--data={self.workspace.directory / 'data'}",
        ]
        self.screen.say(f"[workspace] $ {' '.join(argv)} &")
        program = self.workspace.start("workspace", argv)
        self.url = program.wait_for(r"listening on (http://\S+)")[1].rstrip("/")
        self.screen.say(f"  listening on {self.url}")

    def secret(self, *words: str) -> str:
        """What a command of the workspace prints only once; it is not shown."""
        data = f"--data={self.workspace.directory / 'data'}"
        secret = self.command(self.workspace, "cachix-workspace", *words, data, show=False)
        self.screen.say("  (a secret, not shown here)")
        return secret

    def prepare(self) -> str:
        """Make the cache and the tokens, and give CI what it needs; the agent's token."""
        write_secret(self.secret_key, self.secret("cache", "create", "demo"))
        self.activate_token = self.secret("token", "create", "activate", "--description=CI")
        write_secret(self.netrc, f"machine 127.0.0.1 password {self.activate_token}\n")
        return self.secret("token", "create", "agent", "--description=web1")

    def build(self, version: str, attribute: str = "system") -> str:
        """Build on CI with nix-build, for real; the store path."""
        switch = self.ci.directory / "switch-to-configuration"
        switch.write_text(nixos_script())
        words = [
            "--attr",
            attribute,
            "--argstr",
            "version",
            version,
            "--arg",
            "switch",
            str(switch),
            "--no-out-link",
        ]
        done = self.attempt(
            self.ci, "nix-build", str(PROJECT / "tests/demo.nix"), *words, show=False
        )
        self.screen.say(
            "\n".join(f"  {line}" for line in done.stderr.splitlines() if not line.startswith("  "))
        )
        expect(done.returncode == 0, "nix-build failed")
        return done.stdout.strip()

    def push(self, *paths: str) -> None:
        """Sign closures and push them to the workspace's cache with `nix copy`."""
        target = f"{self.url}/cache/demo?secret-key={self.secret_key}"
        self.command(
            self.ci,
            "nix",
            "copy",
            "--to",
            target,
            *paths,
            "--option",
            "netrc-file",
            str(self.netrc),
        )

    def agent(self, token: str) -> Program:
        """Start the agent on the machine."""
        self.screen.say(f"[machine] $ cachix-deploy --host {self.url} agent {AGENT} &")
        program = self.machine.agent(AGENT, self.url, token)
        program.wait_for("is connected to")
        self.screen.say(f"  {program.text().strip()}")
        return program

    def deploy(self, path: str, script: Optional[str] = None) -> int:
        """Deploy with a deploy.json as CI does; the exit status of `cachix-deploy activate`."""
        spec: dict[str, Any] = {"agents": {AGENT: path}}
        if script is not None:
            spec["rollbackScript"] = {f"{os.uname().machine}-linux": script}
        (self.ci.directory / "deploy.json").write_text(json.dumps(spec, indent=2) + "\n")
        self.screen.say(json.dumps(spec, indent=2))
        argv = ["cachix-deploy", "--host", self.url, "activate", "deploy.json"]
        return self.attempt(
            self.ci, *argv, env={"CACHIX_ACTIVATE_TOKEN": self.activate_token}
        ).returncode

    def show(self) -> tuple[Optional[str], Optional[str], Optional[str]]:
        """Show what the machine runs; the running system, the profile's and the boot loader's."""
        found = (self.machine.running(), self.machine.profile(), self.machine.boot_default())
        for label, path in zip(("runs", "system profile", "would boot"), found):
            self.screen.say(f"{label + ':':16}{path or 'nothing yet'}")
        return found

    def tell(self) -> list[str]:
        """The whole story; its summary."""
        screen = self.screen
        screen.step(
            "A workspace is started: it holds agents, tokens, deployments, logs and a binary cache."
        )
        self.serve()
        screen.step(
            "A binary cache and two tokens are created: one for CI, one for the machine's agent."
        )
        token = self.prepare()
        screen.step(
            "CI builds version 1 of the machine's system: three store paths, the last marked as NixOS."
        )
        first = self.build("1")
        self.command(self.ci, "nix-store", "--query", "--requisites", first)
        screen.step("CI signs the closure and pushes it to the workspace's cache.")
        self.push(first)
        screen.step(
            "On the machine the agent connects. Nothing was deployed to it yet, its store is empty."
        )
        agent = self.agent(token)
        self.show()
        screen.step("CI deploys version 1 and follows the log.")
        expect(self.deploy(first) == 0, "the first deployment should have succeeded")
        expect(self.show() == (first,) * 3, "the machine should run and boot version 1")
        self.command(self.machine, "/run/current-system/sw/bin/web-server")
        screen.step(
            "CI deploys version 2 with a rollback script that finds it unhealthy: the machine must come back."
        )
        second, script = self.build("2"), self.build("2", "healthCheck")
        self.push(second, script)
        expect(self.deploy(second, script) == 1, "`activate` should have ended with status 1")
        expect(
            self.show() == (first,) * 3,
            "the machine should be back on version 1, running and to boot",
        )
        self.command(self.machine, "/run/current-system/sw/bin/web-server")
        wanted = [("test", first), ("boot", first), ("test", second), ("test", first)]
        expect(
            self.machine.record() == wanted,
            f"the machine was asked for something else: {self.machine.record()}",
        )
        screen.step("The agent is asked to stop.")
        expect(agent.stop() == 0, f"the agent should have ended with status 0:\n{agent.text()}")
        done = [f"  {action:16}{short(path)}" for action, path in self.machine.record()]
        return ["What the machine was asked, in this order:", *done]


def write_secret(path: Path, text: str) -> None:
    """Write a file that only its owner can read."""
    with open(
        os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w", encoding="utf-8"
    ) as file:
        file.write(text)


def clear(directory: Path) -> None:
    """Remove what an earlier run left; the directories of a store can't be written."""
    for parent, _, _ in os.walk(directory):
        with contextlib.suppress(OSError):
            os.chmod(parent, 0o700)
    shutil.rmtree(directory, ignore_errors=True)
    directory.mkdir(parents=True)


@contextlib.contextmanager
def three_hosts() -> Iterator[list[Host]]:
    """The hosts of the demonstration; they end with all that runs in them."""
    with contextlib.ExitStack() as stack:
        yield [
            stack.enter_context(Host(DIRECTORY / name)) for name in ("workspace", "ci", "machine")
        ]


def main() -> int:
    """Tell the story; the exit status."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    screen = Screen()
    print(
        "cachix-deploy on this machine: a workspace, a CI server and a machine to deploy to, all below build/run."
    )
    try:
        clear(DIRECTORY)
        with three_hosts() as hosts:
            summary = Demo(screen, *hosts).tell()
    except (Unexpected, AssertionError, RuntimeError, OSError, subprocess.SubprocessError) as error:
        print(
            f"\nerror: {error}\n(what the programs said is below {DIRECTORY.relative_to(PROJECT)})",
            file=sys.stderr,
        )
        return 1
    except KeyboardInterrupt:
        return 130
    screen.step("Summary")
    screen.say("\n".join(summary))
    screen.say(
        "Version 1 was deployed, checked and committed. Version 2 ran, failed its check and was rolled back:"
    )
    screen.say(
        "it was never made the system to boot. All processes have ended; what they wrote is in build/run."
    )
    screen.say(f"This took {time.monotonic() - screen.begin:.1f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
