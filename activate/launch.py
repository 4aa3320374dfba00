"""The switch process as its agent sees it: started when a deployment arrives, waiting for "go", then on its own."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
import time
from typing import Any, Optional

from activate import journal, lock, process, recovery
from activate.process import Error

END_TIMEOUT = 5.0  # seconds
READY_TIMEOUT = 30.0  # seconds; within a scope much less, see `SwitchProcess`
# What would hand a token over, or tie the process to the service that started it.
WITHHELD = frozenset(
    ("CACHIX_AGENT_TOKEN", "CACHIX_ACTIVATE_TOKEN", "CREDENTIALS_DIRECTORY")
    + ("NOTIFY_SOCKET", "JOURNAL_STREAM", "INVOCATION_ID")
)


class Lost(Error):
    """Somebody has ended the switch process while it waited for "go"."""


def own_command() -> list[str]:
    """The command that starts this program once more, at the module `boot`: what a switch process has no use for, and
    the search for modules that this process has done, would make it start later than Nix has looked into the store."""
    path = [os.path.abspath(place) for place in sys.path]
    code = f"import gc, sys; gc.disable(); sys.path[:] = {path!r}"
    code += "; from activate import boot; sys.exit(boot.main(sys.argv[3]))"
    return [sys.executable, "-S", "-c", code, os.path.abspath(sys.argv[0])]


def scoped(argv: list[str]) -> list[str]:
    """`argv` in a scope of its own where systemd runs, so that it does not end with the agent's service."""
    import shutil

    program = shutil.which("systemd-run", path=process.environment()["PATH"])
    if not os.path.isdir("/run/systemd/system") or program is None:
        return argv
    user = [] if os.geteuid() == 0 else ["--user"]
    named = f"--description=Deployment {argv[-1]}"  # else it is the whole command line, in every journal
    return [program, "--scope", "--collect", "--quiet", "--no-ask-password", named, *user, "--", *argv]


class SwitchProcess:
    """A switch process, and the agent's ends of its pipes. `step` is the last that it has entered."""

    def __init__(self, deployment_id: str, config: dict[str, Any], held: lock.Lock, scope_timeout: float) -> None:
        """Start it with the deployment lock; it boots while the agent goes on. Raises Error."""
        self.step = ""
        self.begun = False
        self.argv = [*own_command(), "switch", deployment_id]
        self.config = json.dumps({**config, "lock": held.fd})
        self.held = held
        self.scope_until = time.monotonic() + scope_timeout
        self.boot(scoped(self.argv))

    def boot(self, argv: list[str]) -> None:
        """Start the program and tell it the token and the rest by its stdin. Raises Error."""
        self.text = b""
        self.scoped = argv != self.argv
        env = {name: value for name, value in os.environ.items() if name not in WITHHELD}
        try:
            self.process = subprocess.Popen(
                argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, cwd="/",
                pass_fds=[self.held.fd], start_new_session=True, env=env,
            )  # fmt: skip
        except OSError as error:
            raise Error(f"the switch process could not be started: {error}") from None
        with contextlib.suppress(OSError):
            self.write(self.config)

    def go(self, action: str, record: journal.Record) -> None:
        """Wait until it is ready, and give it the word with what the journal says. Raises Error.

        A scope that can't be had (no bus) shows by silence or an early end: then a plain new session has to do.
        """
        left = self.scope_until - time.monotonic() if self.scoped else READY_TIMEOUT
        if self.read(max(0.1, left)) != "ready":
            self.kill()
            if not self.scoped:
                raise Error("the switch process did not get ready")
            self.close()
            self.boot(self.argv)
            self.go(action, record)
            return
        if action != recovery.START:
            self.step = journal.ACTIVATING if action == recovery.ACTIVATE else record.step
        self.begun = True
        try:
            self.write(f"go {action} {record.to_json().decode().replace(chr(10), '')}")
        except OSError:
            raise Lost("the switch process ended before it began") from None

    def write(self, line: str) -> None:
        """Say something to it. Raises OSError where it has ended."""
        assert self.process.stdin is not None
        try:
            os.write(self.process.stdin.fileno(), line.encode() + b"\n")
        except ValueError:
            raise BrokenPipeError("closed") from None  # by the worker's thread

    def read(self, timeout: float) -> Optional[str]:
        """Its next line; None where it has ended, or says nothing for `timeout` seconds."""
        assert self.process.stdout is not None
        deadline = time.monotonic() + timeout
        while b"\n" not in self.text:
            if not select.select([self.process.stdout], [], [], max(0.0, deadline - time.monotonic()))[0]:
                return None
            said = os.read(self.process.stdout.fileno(), 1 << 12)
            if not said:
                return None
            self.text += said
        line, _, self.text = self.text.partition(b"\n")
        return line.decode()

    def kill(self) -> None:
        """End it; only ever done before "go". What a systemd-run that hangs has started holds the lock too."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        process.wait(self.process, END_TIMEOUT)

    def close(self) -> None:
        """Let go of it, and see it end: before "go" it does so without a trace."""
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                with contextlib.suppress(OSError):
                    pipe.close()
        if not process.wait(self.process, END_TIMEOUT) and not self.begun:
            self.kill()
