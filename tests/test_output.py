"""The output of commands: a pipe that always takes it, and the drainer that empties it."""

import os
import random
import signal
import subprocess
import sys
import time

import pytest
from hosts import wait_until

from activate import process
from activate.switch import drainer
from activate.switch.drainer import KEPT_BYTES, Tally
from activate.switch.output import Output

pytestmark = pytest.mark.promise(9)


@pytest.fixture
def log(tmp_path):
    fd = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT | os.O_APPEND)
    yield fd
    os.close(fd)


@pytest.fixture
def output(log):
    """Output into the file `log`, whose drainer is waited for in the end."""
    output = Output(log)
    yield output
    output.close()
    if output.pid:
        os.waitpid(output.pid, 0)


def content(output):
    return os.pread(output.log, output.size(), 0).decode()


def run(output, code, timeout=20.0):
    return process.run(["sh", "-c", code], output, timeout)


def test_own_lines_and_those_of_commands_are_in_order(output):
    assert run(output, "printf one; printf two >&2") == 0
    output.say("said")
    output.say("again")
    head = "$ sh -c printf one; printf two >&2\n"
    assert content(output) == head + "onetwo\nsaid\nagain\n"


def test_a_log_that_was_begun_before_is_continued_on_a_new_line(tmp_path):
    (tmp_path / "log").write_text("downloading")
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_APPEND)
    output = Output(log)
    output.say("ready")
    assert content(output) == "downloading\nready\n"
    output.close()


@pytest.mark.parametrize("again", ["echo b >/dev/stderr", "echo b | tee /dev/stderr >/dev/null"])
def test_nobody_truncates_it(output, again):
    assert run(output, f"echo a; {again}; echo c") == 0
    assert content(output).splitlines()[1:] == ["a", "b", "c"]


def test_another_user_may_open_it_again(output):
    other = "setpriv --reuid=54321 --regid=54321 --clear-groups sh -c 'echo b > /dev/stderr'"
    assert run(output, f"echo a; {other}") == 0, content(output)
    assert content(output).splitlines()[1:] == ["a", "b"]


def test_a_command_that_leaves_it_non_blocking_does_no_harm(output):
    code = "import os; os.set_blocking(1, False)"
    assert process.run([sys.executable, "-c", code], output, 20) == 0
    assert run(output, "head -c 1000000 /dev/zero") == 0
    assert output.size() > 1000000


@pytest.mark.promise(3)
def test_a_full_disk_fails_no_command(tmp_path):
    output = Output(os.open("/dev/full", os.O_RDWR))
    code = 'set -e; echo "the following units failed: a"; head -c 300000 /dev/zero; exit 4'
    start = output.position()
    assert run(output, code) == 4
    assert len(output.since(start)) == KEPT_BYTES
    assert output.missing().startswith(f"{output.tally.total} bytes")
    output.close()


def test_the_log_says_how_much_a_full_disk_has_cost(tmp_path, log, monkeypatch):
    full = tmp_path / "full"
    monkeypatch.setattr(drainer, "has_room", lambda *_: not full.exists())
    output = Output(log)
    assert run(output, "echo one") == 0
    output.settle()
    full.touch()
    assert run(output, "echo 12345") == 0
    lost = len("$ sh -c echo 12345\n12345\n")
    assert str(lost) in output.missing()
    full.unlink()
    output.say("two")
    assert content(output) == f"$ sh -c echo one\none\n\n[{drainer.describe(lost)}]\ntwo\n"
    assert output.missing() == ""
    output.close()


def test_the_disk_keeps_room_for_the_journal(output, monkeypatch):
    class Disk:
        f_bfree = f_bavail = 100
        f_frsize = 4096

    monkeypatch.setattr(os, "fstatvfs", lambda _: Disk)
    most = 100 * 4096 - drainer.RESERVE
    assert drainer.has_room(output.log, most)
    assert not drainer.has_room(output.log, most + 1)


@pytest.mark.promise(2)
def test_a_killed_drainer_is_replaced(output):
    process_ids = set()
    command = process.start(
        ["sh", "-c", "seq 200000 && echo more >/dev/stderr && sleep 0.5 && echo end"],
        output.fileno(),
        output.fileno(),
    )
    deadline = time.monotonic() + 10
    while not process.wait(command, 0.02) and time.monotonic() < deadline:
        process_ids.add(output.pid)
        os.kill(output.pid, signal.SIGKILL)
    assert command.returncode == 0 and len(process_ids) > 2
    output.say("said")
    output.settle()
    assert content(output).splitlines()[-2:] == ["end", "said"]


def test_what_was_written_is_still_known_after_a_killed_drainer(output):
    start = output.position()
    run(output, "echo 'the following units failed: a'")
    output.settle()
    os.kill(output.pid, signal.SIGKILL)
    assert output.since(start).endswith("the following units failed: a\n")


def test_a_thread_drains_where_there_can_be_no_more_processes(log, monkeypatch):
    def fork():
        raise BlockingIOError("no more processes")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fork", fork)
        output = Output(log)
    assert run(output, "seq 100000") == 0
    assert content(output).endswith("\n100000\n")
    output.close()


@pytest.mark.promise(10, 11)
def test_the_drainer_keeps_nothing_else_and_ends_with_the_last_writer(tmp_path, log):
    secret = os.open(tmp_path / "lock", os.O_RDWR | os.O_CREAT)
    os.set_inheritable(secret, True)
    output = Output(log)
    output.settle()
    directory = f"/proc/{output.pid}"
    links = {os.readlink(f"{directory}/fd/{fd}") for fd in os.listdir(f"{directory}/fd")}
    assert len(links) == 3 and str(tmp_path / "log") in links
    with open(f"{directory}/cmdline", "rb") as file:
        assert file.read().rstrip(b"\0") == drainer.TITLE
    for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT):
        os.kill(output.pid, number)
    assert os.getsid(output.pid) == output.pid
    output.settle()
    writer = os.dup(output.sink)
    output.close()
    assert os.waitpid(output.pid, os.WNOHANG) == (0, 0)
    os.close(writer)
    wait_until(lambda: os.waitpid(output.pid, os.WNOHANG)[0], 5, "the end of the drainer")
    os.close(secret)


SWITCH = """
import os, signal, subprocess, sys
from activate.switch.output import Output
log = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT | os.O_APPEND)
output = Output(log)
output.say("begin")
code = "sleep 0.2; for i in $(seq 20000); do echo line; done; echo $? >" + sys.argv[2]
subprocess.Popen(["sh", "-c", code], stdout=output, stderr=output, start_new_session=True)
output.settle()
os.kill(os.getpid(), signal.SIGKILL)
"""


@pytest.mark.promise(2)
def test_a_service_goes_on_behind_a_killed_switch_process(tmp_path):
    """It is neither blocked nor killed, and its output goes nowhere."""
    log, ended = tmp_path / "log", tmp_path / "ended"
    root = os.path.dirname(os.path.dirname(os.path.abspath(process.__file__)))
    argv = [sys.executable, "-c", SWITCH, str(log), str(ended)]
    subprocess.run(argv, cwd=root, check=False)
    wait_until(ended.exists, 20, "the end of what goes on")
    wait_until(lambda: ended.read_text(), 5, "its status")
    assert ended.read_text() == "0\n"
    assert log.read_text() == "begin\n"


def test_a_service_does_not_fill_the_log_of_a_deployment_that_has_ended(output):
    service = process.start(["yes"], output.fileno(), output.fileno())
    try:
        wait_until(lambda: output.size() > 1 << 20, 10, "some output")
        output.close()
        time.sleep(0.2)
        size = os.fstat(output.log).st_size
        time.sleep(0.5)
        assert os.fstat(output.log).st_size == size and service.poll() is None
    finally:
        process.end(service)


def test_the_latest_output_is_kept():
    tally, whole, dice = Tally(), b"", random.Random(7)
    for _ in range(60):
        data = dice.randbytes(dice.choice([1, 100, KEPT_BYTES // 7, KEPT_BYTES + 5]))
        tally.add(data)
        whole += data
        start = dice.randrange(len(whole))
        assert tally.total == len(whole)
        assert tally.since(start) == whole[start:][-KEPT_BYTES:]
    assert tally.since(len(whole)) == b""
