"""The switch process as its agent sees it: it starts early, waits for "go", then is on its own."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import time

from activate import environment, holder, journal, pipe, process, recovery, startup
from activate.agent.hooks import AgentHooks
from activate.process import Error

END_TIMEOUT = 5.0  # seconds
READY_TIMEOUT = 30.0  # seconds; less within a scope, see `AgentHooks.scope_timeout`


class Lost(Error):
    """Somebody has ended the switch process while it waited for "go"."""


def in_scope(argv: list[str]) -> list[str]:
    """`argv` in a scope of its own if systemd runs, so that it outlives the agent's service."""
    if not os.path.isdir("/run/systemd/system"):
        return argv
    import shutil  # brings compressors: 0.5 MiB that an agent at rest does without

    program = shutil.which("systemd-run", path=environment.for_commands()["PATH"])
    if program is None:
        return argv
    user = [] if os.geteuid() == 0 else ["--user"]
    title = f"--description=Deployment {argv[-1]}"  # instead of the whole command line
    options = ["--scope", "--collect", "--quiet", "--no-ask-password", title, *user]
    return [program, *options, "--", *argv]


class SwitchProcess:
    """A switch process, and the agent's end of its pipe. `step` is the last that it entered."""

    pipe: pipe.AgentEnd

    def __init__(self, hooks: AgentHooks, entry: journal.Journal, taken: holder.Locks) -> None:
        """Start it with the deployment's locks. It loads while the agent goes on. Raises Error."""
        self.step = ""
        self.may_run = False  # "go" was sent: it is not killed any more
        self.files = hooks.switch_files
        self.argv = [*hooks.switch_command, "switch", entry.record.id]
        self.config = {**hooks.config, "directory": entry.directory, "locks": taken.fds}
        self.scope_until = time.monotonic() + hooks.scope_timeout
        self.spawn(in_scope(self.argv))

    def spawn(self, argv: list[str]) -> None:
        """Start the program, and hand over the configuration by its stdin. Raises Error."""
        self.scoped = argv != self.argv
        try:
            with startup.former_limits():  # it hands them on to what it runs
                self.process = subprocess.Popen(
                    argv,
                    stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.DEVNULL,
                    cwd="/",
                    pass_fds=[*self.config["locks"], *self.files],
                    start_new_session=True,
                    env=environment.for_switch(),
                    bufsize=0,
                )
        except OSError as error:
            raise Error(f"the switch process could not be started: {error}") from None
        if self.process.stdin is None or self.process.stdout is None:
            raise Error("the switch process has no pipes")
        self.pipe = pipe.AgentEnd(self.process.stdout, self.process.stdin)
        with contextlib.suppress(OSError):
            self.pipe.configure(self.config)

    def go(self, action: str, record: journal.Record) -> None:
        """Wait until it is ready, and let it begin with the content of the journal. Raises Error.

        Without a bus systemd-run is silent or fails; then a plain new session has to do.
        """
        left = self.scope_until - time.monotonic() if self.scoped else READY_TIMEOUT
        if not self.pipe.is_ready(max(0.1, left)):
            self.kill()
            if not self.scoped:
                limit = f"{READY_TIMEOUT:.0f} s"
                raise Error(f"the switch process ended, or was not ready within {limit}")
            self.close()
            self.spawn(self.argv)
            self.go(action, record)
            return
        if action != recovery.START:
            self.step = journal.ACTIVATING if action == recovery.ACTIVATE else record.step
        self.may_run = True
        try:
            self.pipe.go(action, record)
        except OSError:
            raise Lost("the switch process ended before it began") from None

    def kill(self) -> None:
        """Kill it and its group, only ever before "go". A hung systemd-run has a child, too."""
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self.process.pid, signal.SIGKILL)
        process.wait(self.process, END_TIMEOUT)

    def close(self) -> None:
        """Close the pipe. A switch process that waits for "go" ends then, or is killed."""
        for file in (self.process.stdin, self.process.stdout):
            if file is not None:
                with contextlib.suppress(OSError):
                    file.close()
        if not process.wait(self.process, END_TIMEOUT) and not self.may_run:
            self.kill()
