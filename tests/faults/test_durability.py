"""The law of durability, as the kernel sees it: written before the effect, synced before the next step; and no lock
and no token in what is run."""

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
    """A system call that was successful, or the `end` of a process."""

    thread: int
    name: str
    words: str


def calls(text):
    """What strace has written, in the order in which the calls returned."""
    begun, found = {}, []
    for line in text.splitlines():
        thread, _, rest = line.partition(" ")
        rest = rest.strip()
        if rest.endswith("<unfinished ...>"):
            begun[thread] = rest.removesuffix("<unfinished ...>").rstrip()
            continue
        if resumed := re.match(r"<\.\.\. \w+ resumed>,? ?(.*)", rest):
            rest = begun.pop(thread, "") + resumed[1]
        if rest.startswith("+++"):
            found.append(Call(int(thread), "end", rest))
        elif (match := CALL.fullmatch(f"{thread} {rest}")) and not match[4].startswith("-"):
            found.append(Call(int(thread), match[2], match[3]))
    return found


def entries(found):
    """Where each step was entered, by the content that was renamed."""
    said, entered = "", []
    for index, call in enumerate(found):
        if call.name == "write" and "/journal.json.new>" in call.words:
            said = call.words
        elif call.name.startswith("rename") and '/journal.json"' in call.words:
            entered.append((index, re.search(r'\\"step\\": \\"([a-z-]+)', said)[1]))
    return entered


def changes(found):
    """Where each program that changes the machine began and ended."""
    for index, call in enumerate(found):
        if call.name == "execve" and re.match(
            r'"[^"]*/(switch-to-configuration|bin/nix-env)", \["\S*nix', call.words
        ):
            ends = (
                i
                for i, c in enumerate(found)
                if i > index and (c.thread, c.name) == (call.thread, "end")
            )
            yield index, next(ends)


def is_durable(found, index):
    """A journal was written whole before its rename, and its directory before anything else happens."""
    thread, before, after = found[index].thread, found[:index], found[index + 1 :]
    file = [
        call.name for call in before if call.thread == thread and "/journal.json.new>" in call.words
    ]
    assert file[-2:] == ["write", "fsync"]
    first = next(call for call in after if call.thread == thread)
    assert first.name == "fsync" and re.search(r"/deployments/[0-9a-f-]{36}>", first.words), first


def is_synced(found, start, end):
    """What Nix and activations have written was flushed in between."""
    assert any(call.name == "syncfs" and "</nix/" in call.words for call in found[start:end]), (
        found[start:end]
    )


@pytest.fixture
def traced(make_world):
    """The system calls of an agent and all it starts, in a deployment of which something is bad, and how that ended."""
    if os.geteuid() != 0 or shutil.which("strace") is None:
        pytest.skip(
            "to look at system calls needs strace, and a disk for the state needs root: `make setup`"
        )

    def run(how):
        options = ("--activation-timeout=60", "--confirm-timeout=60")
        world = make_world(start=False, waits={**WAITS, "download": 60.0, "ready": 20.0})
        world.separate_state("8m")  # else a sync of the state would hide that the store was not
        trace = world.faults / "trace"
        argv = ["strace", "-f", "-y", "-s", "4096", "-e", f"trace={CALLS}", "-o", str(trace)]
        argv += [
            *command("cachix-deploy"),
            "--host",
            world.workspace.url,
            "agent",
            world.name,
            *options,
        ]
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
def test_what_is_entered_is_durable_before_its_effect_and_that_before_the_next_step(
    traced, how, steps
):
    found, ended = traced(how)
    entered = entries(found)
    assert [
        step for _, step in entered if step != journal.RECEIVED
    ] == steps.split() and ended == steps.split()[-1]
    for index, _ in entered:
        is_durable(found, index)
    places = {step: index for index, step in entered}
    is_synced(found, places[journal.READY], places[journal.ACTIVATING])
    effects = list(changes(found))
    assert len(effects) >= (3 if how != scenes.BAD else 2), (
        "the activation, the commit, the rollback"
    )
    for _, end in effects:
        later = (index for index, step in entered if index > end and step != journal.ROLLING_BACK)
        is_synced(
            found, end, next(later)
        )  # a rollback waits for no disk: it does not count on what was done
    realised = [
        call.words for call in found if call.name == "execve" and '"--max-jobs", "32"' in call.words
    ]
    assert any(
        '"--option", "fsync-store-paths", "true"' in words
        for words in realised
        if "--add-root" in words
    )


@pytest.mark.promise(1, 11)
@pytest.mark.parametrize("how", [scenes.GOOD, scenes.BAD, scenes.BAD_COMMIT])
def test_no_program_holds_a_lock_or_knows_the_token(world, finish, how):
    seen = []

    def look(world, visit):
        place = Path(f"/proc/{visit.pid}")
        held = [os.readlink(fd) for fd in (place / "fd").iterdir() if LOCKS.search(os.readlink(fd))]
        told = [
            name
            for name in ("environ", "cmdline")
            if world.token.encode() in (place / name).read_bytes()
        ]
        seen.append((visit.point, held, told))
        return "go"

    # systemd-run becomes the switch process, which is to inherit the lock of the deployment
    world.order("^(?!systemd-run)", look, ALWAYS)
    world.ended(scenes.deploy(world, "second", how))
    assert {"test", "nix-store"} <= {point for point, _, _ in seen}
    assert [one for one in seen if one[1] or one[2]] == []
    finish(world)
