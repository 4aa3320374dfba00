"""Programs, their deadlines and their environment; locks."""

import fcntl
import os
import pathlib
import signal
import struct
import subprocess
import sys
import time

import pytest

from activate import environment, lock, process


@pytest.fixture
def log(tmp_path):
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield fd
    os.close(fd)


def content(log):
    return os.pread(log, 1 << 20, 0).decode()


def test_the_command_stands_before_its_output_and_always_on_a_line_of_its_own(log):
    assert process.run(["/bin/sh", "-c", "printf one; printf two >&2"], log, 10) == 0
    assert process.run(["/bin/sh", "-c", "exit 7"], log, 10) == 7
    assert content(log) == "$ /bin/sh -c printf one; printf two >&2\nonetwo\n$ /bin/sh -c exit 7\n"


@pytest.mark.parametrize("command", ["kill -TERM $$", "echo interrupted by the user >&2; exit 1"])
def test_a_question_that_a_signal_ended_has_no_answer(command):
    """Nix, when it is asked whether a path is signed or damaged, must not seem to say no."""
    with pytest.raises(process.CommandFailed, match="ended by a signal") as info:
        process.ask(["/bin/sh", "-c", command], 10)
    assert not info.value.is_clear
    assert process.ask(["/bin/sh", "-c", "exit 1"], 10) == (1, "", "")


@pytest.mark.promise(10)
def test_a_deadline_ends_the_whole_group(log, tmp_path, monkeypatch):
    monkeypatch.setattr(process, "KILL_AFTER", 0.2)
    script = f"trap '' TERM; sleep 300 & echo $! > {tmp_path}/child; wait"
    began = time.monotonic()
    with pytest.raises(process.DeadlinePassed, match="ran longer than 1 s"):
        process.run(["/bin/sh", "-c", script], log, 0.6)
    assert time.monotonic() - began < 60
    child = int((tmp_path / "child").read_text())
    for _ in range(100):
        stat = pathlib.Path(f"/proc/{child}/stat")
        state = stat.read_text().split()[2] if stat.exists() else "gone"
        if state in ("Z", "gone"):
            break
        time.sleep(0.05)
    assert state in ("Z", "gone")


def test_a_program_that_is_missing(log):
    with pytest.raises(process.CommandFailed, match="could not be started .No such file"):
        process.run(["/nonexistent/program"], log, 1)


@pytest.mark.promise(9)
def test_a_background_child_that_keeps_the_log_open_does_not_delay(log, tmp_path):
    began = time.monotonic()
    script = f"sleep 60 & echo $! > {tmp_path}/child; exit 0"
    assert process.run(["/bin/sh", "-c", script], log, 30) == 0
    assert time.monotonic() - began < 30
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)


def test_output_names_the_failure():
    assert process.output(["/bin/echo", "hello"]) == "hello\n"
    with pytest.raises(process.CommandFailed, match="ended with status 3: bad news"):
        process.output(["/bin/sh", "-c", "echo bad news >&2; exit 3"])
    with pytest.raises(process.DeadlinePassed):
        process.output(["/bin/sleep", "60"], 0.2)


def test_end_all_ends_the_commands_that_we_wait_for(log):
    import threading

    threading.Timer(0.3, process.end_all).start()
    assert process.run(["/bin/sleep", "60"], log, 30) == -signal.SIGTERM


def test_the_environment_is_built(monkeypatch):
    for name in ("CACHIX_AGENT_TOKEN", "CREDENTIALS_DIRECTORY"):
        monkeypatch.setenv(name, "secret")
    for name in ("NOTIFY_SOCKET", "JOURNAL_STREAM", "INVOCATION_ID"):
        monkeypatch.setenv(name, "secret")
    monkeypatch.setenv("XDG_STATE_HOME", "/state")
    monkeypatch.setenv("LC_ALL", "C")
    monkeypatch.setenv("PATH", "/somewhere::relative")
    monkeypatch.delenv("HOME")
    env = environment.for_commands()
    assert "secret" not in env.values()
    assert env["PATH"].split(":")[:2] == ["/somewhere", "/run/current-system/sw/bin"]
    assert env["PATH"].endswith(":/nix/var/nix/profiles/default/bin:/usr/bin:/bin")
    assert env["XDG_STATE_HOME"] == "/state" and env["LC_ALL"] == "C"
    assert env["HOME"].startswith("/")
    assert env["USER"] and env["LOGNAME"] == env["USER"]


@pytest.mark.promise(11)
def test_a_command_sees_no_token_and_inherits_no_descriptor(log, monkeypatch):
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "secret-token")
    script = "env; ls /proc/self/fd | wc -l; readlink /proc/self/fd/0"
    process.run(["/bin/sh", "-c", script], log, 10)
    assert "secret-token" not in content(log)
    assert content(log).endswith("/dev/null\n")


@pytest.mark.promise(1)
def test_a_lock_is_exclusive_and_ends_with_its_holder(tmp_path):
    path = str(tmp_path / "dir" / "a.lock")
    taken = lock.take(path, text="one")
    assert lock.take(path) is None and lock.held(path) and lock.read(path) == "one"
    began = time.monotonic()
    assert lock.take(path, timeout=0.3) is None and time.monotonic() - began > 0.25
    taken.close()
    assert not lock.held(path)
    again = lock.take(path, text="2")
    assert lock.read(path) == "2"
    again.close()


@pytest.mark.promise(1)
def test_an_inherited_lock_is_held_until_the_last_copy_is_closed(tmp_path):
    path = str(tmp_path / "a.lock")
    taken = lock.take(path)
    child = subprocess.Popen(["/bin/sleep", "60"], pass_fds=[taken.fd])
    taken.close()
    assert lock.held(path)
    child.kill()
    child.wait()
    assert not lock.held(path)


@pytest.mark.promise(1)
@pytest.mark.skipif(not lock.OFD, reason="flock elsewhere")
def test_locks_are_those_of_cachix_and_not_lost_by_closing_another_descriptor(tmp_path):
    path = str(tmp_path / "a.lock")
    theirs = os.open(path, os.O_RDWR | os.O_CREAT)
    fcntl.fcntl(theirs, fcntl.F_OFD_SETLK, struct.pack("hhqqi4x", fcntl.F_WRLCK, 0, 0, 0, 0))
    assert lock.take(path) is None and lock.held(path)
    os.close(theirs)
    ours = lock.take(path)
    os.close(os.open(path, os.O_RDWR))
    assert lock.held(path)
    ours.close()


def test_lock_files_are_where_cachix_has_them(monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", "/c")
    assert lock.shared_path("agent", "web") == "/c/cachix/deploy/locks/agent-web.lock"
    assert lock.shared_path("deployment", "web") == "/c/cachix/deploy/locks/deployment-web.lock"
    monkeypatch.setenv("XDG_CACHE_HOME", "relative")
    monkeypatch.setenv("HOME", "/home/x")
    assert lock.shared_path("agent", "web") == "/home/x/.cache/cachix/deploy/locks/agent-web.lock"


@pytest.mark.promise(1)
def test_all_system_profiles_share_one_machine_lock():
    root = "/nix/var/nix/profiles"
    assert lock.machine_path(f"{root}/system") == f"{root}/.cachix-deploy-system.lock"
    spare = lock.machine_path(f"{root}/system-profiles/spare")
    assert spare == f"{root}/.cachix-deploy-system.lock"
    assert lock.machine_path(f"{root}/tools") == f"{root}/.cachix-deploy-tools.lock"


def test_all_that_touches_the_machine_needs_only_the_standard_library():
    modules = "activate.switch.steps, activate.agent.conductor, cachix_switch"
    code = f"import sys; sys.path.insert(0, '.'); import {modules}; "
    code += "assert not {'requests', 'websocket', 'docopt'} & set(sys.modules)"
    root = os.path.dirname(os.path.dirname(__file__))
    subprocess.run([sys.executable, "-S", "-c", code], check=True, cwd=root)


def test_a_lock_that_is_closed_twice_closes_nothing_else(tmp_path):
    """Its number is another file's by then: the socket of a report, say."""
    taken = lock.take(str(tmp_path / "lock"))
    fd = taken.fd
    taken.close()
    with open(tmp_path / "other", "wb") as other:
        assert other.fileno() == fd
        taken.close()
        other.write(b"all is well")
    assert (tmp_path / "other").read_bytes() == b"all is well"
