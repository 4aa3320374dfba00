"""A textfile for Prometheus' node_exporter: what an agent's journals and machine say."""

from __future__ import annotations

import contextlib
import os
import threading
from typing import Optional

from activate import history, journal, outcomes
from activate.agent import mark
from cachix_connection import Waits
from cachix_protocol import __version__
from cachix_repeats import Repeats
from cachix_report_state import MachineState, look

MODE = 0o644  # node_exporter is another user
PREFIX = "cachix_deploy_"
HASH = slice(len("/nix/store/"), len("/nix/store/") + 32)
Sample = tuple[str, str, dict[str, str], float]  # name, help, labels, value


class Textfile(threading.Thread):
    """The thread that keeps the file `path` up to date: at each step, and each minute."""

    def __init__(
        self, path: str, state: str, name: str, profile: Optional[str], repeats: Repeats
    ) -> None:
        super().__init__(name="textfile", daemon=True)
        self.path, self.state, self.agent, self.profile = path, state, name, profile
        self.repeats, self.wake = repeats, threading.Event()
        self.waits = Waits.from_environment()

    def run(self) -> None:
        """Write until the process exits."""
        while True:
            try:
                write(self.path, self.text())
            except OSError as error:
                self.repeats.tell(f"--metrics-file {self.path} can't be written: {error.strerror}")
            self.wake.wait(self.waits.look)
            self.wake.clear()

    def text(self) -> str:
        """The metrics as they are now."""
        records = [entry.record for entry in reversed(history.load_all(self.state)[0])]
        note = mark.load(os.path.join(self.state, f"registered-{self.agent}.json"))
        connected = note.get("pid") == os.getpid() and "lost" not in note
        machine = look(self.state, self.agent, self.profile)
        mine = [record for record in records if record.agent == self.agent]
        host = str(note.get("host") or "")
        return render([*_of_agent(host, connected), *_of_machine(machine), *_of_results(mine)])


def _of_agent(host: str, connected: bool) -> list[Sample]:
    facts = {"version": __version__, "workspace": host}
    return [
        ("agent_info", "The agent, which runs.", facts, 1),
        ("connected", "Whether the agent is connected to its workspace.", {}, connected),
    ]


def _of_machine(machine: MachineState) -> list[Sample]:
    samples: list[Sample] = [
        ("reboot_needed", "Whether the machine needs a reboot.", {}, machine.needs_reboot),
        ("drift", "Whether others have changed what was confirmed.", {}, machine.drift is not None),
    ]
    if machine.running is not None:
        facts = {"hash": machine.running[HASH], "kind": machine.kind or ""}
        facts["profile"] = machine.profile or ""
        samples.append(("running_info", "The store path that runs, by its hash.", facts, 1))
    return samples


def _of_results(records: list[journal.Record]) -> list[Sample]:
    """The last result and the last success; the newest of the records come first."""
    going = any(record.step not in journal.FINAL for record in records)
    samples: list[Sample] = [
        ("deployment_in_progress", "Whether a deployment has not ended.", {}, going)
    ]
    ended = [record for record in records if record.step in journal.FINAL]
    if ended:
        last = ended[0]
        facts = {"outcome": outcomes.of(last) or last.step, "operation": last.operation}
        facts["by_hand"] = last.by_hand or ""
        end, begin = last.times.get(last.step, 0.0), min(last.times.values(), default=0.0)
        succeeded = last.step == journal.SUCCEEDED
        samples += [
            ("last_result_info", "How the last deployment ended.", facts, 1),
            ("last_result_success", "Whether the last deployment succeeded.", {}, succeeded),
            ("last_result_timestamp_seconds", "When the last deployment ended.", {}, end),
            ("last_result_duration_seconds", "How long it took.", {}, max(0.0, end - begin)),
        ]
    good = next((record for record in ended if record.is_confirmed), None)
    if good is not None:
        moment = good.times.get(good.step, 0.0)
        words = "When a deployment was confirmed last."
        samples.append(("last_success_timestamp_seconds", words, {}, moment))
    return samples


def render(samples: list[Sample]) -> str:
    """The samples in Prometheus' text format."""
    lines = []
    for name, words, labels, value in samples:
        pairs = ",".join(f'{label}="{_escaped(text)}"' for label, text in labels.items())
        lines += [
            f"# HELP {PREFIX}{name} {words}",
            f"# TYPE {PREFIX}{name} gauge",
            f"{PREFIX}{name}{f'{{{pairs}}}' if pairs else ''} {float(value)!r}",
        ]
    return "\n".join(lines) + "\n"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")


def write(path: str, text: str) -> None:
    """Replace the file as a whole; node_exporter reads no file of the temporary name.

    Raises OSError.
    """
    temporary = f"{path}.new"
    with contextlib.suppress(FileNotFoundError):
        os.unlink(temporary)
    fd = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, MODE)
    try:
        os.fchmod(fd, MODE)  # whatever the umask is
        with open(fd, "w", encoding="utf-8", closefd=False) as file:
            file.write(text)
    finally:
        os.close(fd)
    os.rename(temporary, path)
