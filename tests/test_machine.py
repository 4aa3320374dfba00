"""Commands that an interrupted process left running: found by a mark, ended with their group."""

import os
import pathlib
import subprocess
import sys
import threading
import time

import pytest
from hosts import PROJECT, wait_until

from activate import leftovers, machine, process

pytestmark = pytest.mark.promise(1, 2)

# A process that runs a command as a switch process does, and is killed while it waits for it.
HOLDER = """
import os, sys
sys.path.insert(0, sys.argv[1])
from activate import leftovers, lock, process
taken = lock.take(sys.argv[2])
leftovers.clear(taken.fd)
log = os.open(sys.argv[3], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
process.run(["/bin/sh", "-c", sys.argv[4]], log, 60, leftovers.marker(taken.fd))
"""


@pytest.fixture
def log(tmp_path):
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield fd
    os.close(fd)


@pytest.fixture
def file(tmp_path):
    fd = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    yield fd
    os.close(fd)


def runs(pid):
    """Whether a process runs, and is not a zombie."""
    try:
        return pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.parametrize("leader", ["runs", "has ended", "ignores SIGTERM"])
def test_the_group_of_a_killed_holder_is_ended(tmp_path, file, log, monkeypatch, leader):
    monkeypatch.setattr(process, "KILL_AFTER", 1.0)
    pids_file = tmp_path / "pids"
    trap = "trap '' TERM; " if leader == "ignores SIGTERM" else ""
    end = "kill -9 $PPID; exit" if leader == "has ended" else "sleep 300"
    note = f"echo $$ $! > {pids_file}.new; mv {pids_file}.new {pids_file}"
    code = f"{trap}sleep 300 & {note}; {end}"
    files = [str(tmp_path / "lock"), str(tmp_path / "out")]
    holder = subprocess.Popen([sys.executable, "-c", HOLDER, str(PROJECT), *files, code])
    words = wait_until(lambda: pids_file.exists() and pids_file.read_text().split())
    pids = [int(word) for word in words]
    if leader == "has ended":
        wait_until(lambda: not runs(pids[0]))
    holder.kill()
    holder.wait()
    assert runs(pids[1])
    leftovers.end_marked(file, log, 30)
    assert not any(map(runs, pids))
    assert b"ending what an interrupted deployment has left running" in os.pread(log, 999, 0)


def test_the_mark_is_removed_when_the_command_has_ended(tmp_path, file, log):
    fd = os.dup(file)
    process.run(["/bin/sh", "-c", "sleep 300 & echo $! >&2; :"], log, 10, leftovers.marker(fd))
    child = int(os.pread(log, 999, 0).split(b"\n")[1])
    assert len(os.pread(file, 999, 0)) == leftovers.MARK_BYTES
    leftovers.clear(fd)
    leftovers.end_marked(file, log, 30)
    assert runs(child), "a command that has ended may leave processes behind"
    os.kill(child, 9)


@pytest.mark.parametrize("mark", [b"", b"\0" * 96, b"garbage", b"1 2", b"-1 - x", b"\xff" * 96])
def test_a_mark_of_garbage_ends_nothing(file, log, mark):
    os.pwrite(file, mark, 0)
    leftovers.end_marked(file, log, 1)
    assert os.fstat(log).st_size == 0


@pytest.mark.parametrize("wrong", ["boot", "start"])
def test_another_process_of_that_number_is_left_alone(file, log, wrong):
    innocent = subprocess.Popen(["/bin/sleep", "300"], start_new_session=True)
    start = leftovers.start_time(innocent.pid) if wrong == "boot" else "17"
    boot = machine.boot_id() if wrong == "start" else "another"
    os.pwrite(file, f"{innocent.pid} {start} {boot}".ljust(leftovers.MARK_BYTES).encode(), 0)
    leftovers.end_marked(file, log, 1)
    assert innocent.poll() is None
    innocent.kill()
    innocent.wait()


def test_without_a_start_time_the_process_is_waited_for(file, log):
    sleeper = subprocess.Popen(["/bin/sh", "-c", "sleep 0.5"], start_new_session=True)
    os.pwrite(file, f"{sleeper.pid} - {machine.boot_id()}".ljust(leftovers.MARK_BYTES).encode(), 0)
    began = time.monotonic()
    threading.Thread(target=sleeper.wait).start()
    leftovers.end_marked(file, log, 30)
    wait_until(lambda: sleeper.returncode == 0)
    assert time.monotonic() - began > 0.3


def test_commands_are_found_by_their_arguments(tmp_path):
    mark = str(tmp_path / "here" / "new")
    words = ["/bin/sh", "-c", "sleep 300 & wait", "sh", "--add-root", mark]
    ours = subprocess.Popen(words, start_new_session=True)
    other = subprocess.Popen([*words[:-1], str(tmp_path / "hereafter/new")], start_new_session=True)
    for pid in (ours.pid, other.pid):  # the kernel shows the arguments a little later
        file = pathlib.Path(f"/proc/{pid}/cmdline")
        wait_until(lambda file=file: b"--add-root" in file.read_bytes())
    leftovers.end_commands(str(tmp_path / "here"))
    assert ours.wait(10) == -15 and other.poll() is None
    os.killpg(other.pid, 9)
    other.wait()


def test_only_a_systemd_run_whose_agent_is_gone_is_ended():
    """A switch process goes on without its agent, and an agent may still wait for its own."""
    switch = ["python3", "-c", "…", "cachix-deploy", "switch", "id"]
    scope = ["/bin/systemd-run", "--scope", "--", *switch]
    lines = [scope, scope, switch, [*scope[:-1], "other"]]
    sleepers = [
        subprocess.Popen(
            ["/bin/sh", "-c", "sleep 300 & wait", *line],
            stdin=subprocess.PIPE,
            start_new_session=True,
        )
        for line in lines
    ]
    for sleeper in sleepers:
        file = pathlib.Path(f"/proc/{sleeper.pid}/cmdline")
        wait_until(lambda file=file: b"switch" in file.read_bytes())
    for sleeper in (sleepers[0], *sleepers[2:]):
        sleeper.stdin.close()
    leftovers.end_starters("id")
    assert sleepers[0].wait(10) == -15
    assert [sleeper.poll() for sleeper in sleepers[1:]] == [None, None, None]
    for sleeper in sleepers[1:]:
        os.killpg(sleeper.pid, 9)
        sleeper.wait()
    sleepers[1].stdin.close()
