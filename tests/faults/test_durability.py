"""Durability as the kernel sees it, and that no program gets a lock or the token.

A step is durable before its effect, and the effect is synced before the next step.
"""

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest
import scenes
from hosts import command, wait_until
from world import ALWAYS, WAITS

from activate import journal

CALLS = "fsync,fdatasync,syncfs,rename,renameat,renameat2,execve,write,exit_group"
CALL = re.compile(r"(\d+) +(\w+)\((.*)\) += (\S+).*")
LOCKS = re.compile(r"\.cachix-deploy-\S+\.lock|(agent|deployment)-\S+\.lock|reported\.lock")


@dataclass(frozen=True)
class Call:
    """A successful system call, or the `end` of a process."""

    thread: int
    name: str
    words: str


def calls(text):
    """Parse the output of strace into calls, in the order in which they returned."""
    unfinished, calls = {}, []
    for line in text.splitlines():
        thread, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            unfinished[thread] = rest.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>,? ?(.*)", rest):
            rest = unfinished.pop(thread, "") + resumed[1]
        if rest.startswith("+++"):
            calls.append(Call(int(thread), "end", rest))
        elif (match := CALL.fullmatch(f"{thread} {rest}")) and not match[4].startswith("-"):
            calls.append(Call(int(thread), match[2], match[3]))
    return calls


def entries(trace):
    """Return (index, step) for each step that was entered, from the content that was renamed."""
    content, entries = "", []
    for index, call in enumerate(trace):
        if call.name == "write" and "/journal.json.new>" in call.words:
            content = call.words
        elif call.name.startswith("rename") and '/journal.json"' in call.words:
            entries.append((index, re.search(r'\\"step\\": \\"([a-z-]+)', content)[1]))
    return entries


def changes(trace):
    """Yield the indexes of start and end of each program that changes the machine."""
    program = re.compile(r'"[^"]*/(switch-to-configuration|bin/nix-env)", \["\S*nix')
    for start, call in enumerate(trace):
        if call.name == "execve" and program.match(call.words):
            ends = (
                index
                for index, later in enumerate(trace)
                if index > start and (later.thread, later.name) == (call.thread, "end")
            )
            yield start, next(ends)


def assert_durable(trace, index):
    """Check that a journal was synced before its rename, and its directory right after that."""
    thread, before, after = trace[index].thread, trace[:index], trace[index + 1 :]
    file = [
        call.name for call in before if call.thread == thread and "/journal.json.new>" in call.words
    ]
    assert file[-2:] == ["write", "fsync"]
    first = next(call for call in after if call.thread == thread)
    assert first.name == "fsync" and re.search(r"/deployments/[0-9a-f-]{36}>", first.words), first


def assert_synced(trace, start, end):
    """Check that the file system of the store was synced in between."""
    between = trace[start:end]
    assert any(call.name == "syncfs" and "</nix/" in call.words for call in between), between


@pytest.fixture
def traced(make_world):
    """Trace the system calls of an agent and its descendants: `calls, step = traced(scenes.BAD)`.

    `step` is the last one of the deployment.
    """
    if os.geteuid() != 0 or shutil.which("strace") is None:
        pytest.skip("tracing system calls needs strace, and root for a disk: run `make setup`")

    def run(how):
        options = ("--activation-timeout=60", "--confirm-timeout=60")
        world = make_world(start=False, waits={**WAITS, "download": 60.0, "ready": 20.0})
        world.separate_state("8m")  # else a sync of the state would be one of the store too
        trace = world.faults / "trace"
        argv = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(trace)]
        argv += [*command("cachix-deploy"), "--host", world.workspace.url]
        argv += ["agent", world.name, *options]
        world.agents.append(world.host.start("traced", argv, {"CACHIX_AGENT_TOKEN": world.token}))
        world.connected()
        ended = world.ended(scenes.deploy(world, "second", how))
        wait_until(lambda: not world.switches(), 10, "the switch process to end")
        return calls(trace.read_text(errors="replace")), ended

    return run


@pytest.mark.promise(2, 3)
@pytest.mark.parametrize(
    "how, steps",
    [
        (scenes.GOOD, "downloading ready activating checking committing succeeded"),
        (scenes.BAD, "downloading ready activating rolling-back rolled-back"),
        (
            scenes.BAD_COMMIT,
            "downloading ready activating checking committing rolling-back rolled-back",
        ),
    ],
)
def test_steps_are_durable_before_effects_and_effects_before_the_next_step(traced, how, steps):
    trace, last = traced(how)
    entered = entries(trace)
    assert [step for _, step in entered if step != journal.RECEIVED] == steps.split()
    assert last == steps.split()[-1]
    for index, _ in entered:
        assert_durable(trace, index)
    places = {step: index for index, step in entered}
    assert_synced(trace, places[journal.READY], places[journal.ACTIVATING])
    effects = list(changes(trace))
    assert len(effects) >= (3 if how != scenes.BAD else 2), "activation, commit, rollback"
    for _, end in effects:
        # A rollback waits for no disk, as it does not rely on the effect.
        later = (index for index, step in entered if index > end and step != journal.ROLLING_BACK)
        assert_synced(trace, end, next(later))
    programs = [call.words for call in trace if call.name == "execve"]
    downloads = [words for words in programs if '"max-substitution-jobs"' in words]
    assert any(
        '"--option", "fsync-store-paths", "true"' in words and "--add-root" in words
        for words in downloads
    )


@pytest.mark.promise(1, 11)
@pytest.mark.parametrize("how", [scenes.GOOD, scenes.BAD, scenes.BAD_COMMIT])
def test_no_program_holds_a_lock_or_knows_the_token(world, finish, how):
    points, leaks = set(), []

    def look(world, visit):
        process = Path(f"/proc/{visit.pid}")
        points.add(visit.point)
        targets = [os.readlink(fd) for fd in (process / "fd").iterdir()]
        leaks.extend((visit.point, target) for target in targets if LOCKS.search(target))
        for name in ("environ", "cmdline"):
            if world.token.encode() in (process / name).read_bytes():
                leaks.append((visit.point, name))
        return "go"

    # systemd-run becomes the switch process, which must inherit the lock of the deployment.
    world.order("^(?!systemd-run)", look, ALWAYS)
    world.ended(scenes.deploy(world, "second", how))
    assert {"test", "nix-store"} <= points
    assert leaks == []
    finish(world)
