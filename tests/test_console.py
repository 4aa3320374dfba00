"""Messages on stderr and results on stdout, for readers that are slow, hang, or have left."""

import fcntl
import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import threading
import time

import closures
import pytest
from hosts import PROJECT, command, wait_until

import cachix_console
from cachix_console import MOST_WAITING, PATIENCE, Messages, write_all

SET_SIZE = 1031  # F_SETPIPE_SZ
SMALL = 4096


class Pipe:
    """A small pipe. `fill` takes all of its space; it blocks, unless `blocking` is false."""

    def __init__(self, blocking=True):
        self.reader, self.writer = os.pipe()
        fcntl.fcntl(self.writer, SET_SIZE, SMALL)
        os.set_blocking(self.writer, blocking)

    def fill(self):
        os.set_blocking(self.writer, False)
        try:
            while True:
                os.write(self.writer, b"x" * 63 + b"\n")
        except BlockingIOError:
            os.set_blocking(self.writer, True)
        return self

    def read(self, silence=1.0):
        """All lines but those of `fill`, until there is none for so many seconds."""
        data = b""
        while select.select([self.reader], [], [], silence)[0]:
            part = os.read(self.reader, 1 << 16)
            if not part:
                break
            data += part
        return [line for line in data.decode().splitlines() if not line.startswith("xxx")]

    def close_writer(self):
        os.close(self.writer)
        return self


def stream(pipe):
    return io.TextIOWrapper(Messages(pipe.writer), "utf-8", line_buffering=True)


# --- messages -------------------------------------------------------------------------------------


@pytest.mark.parametrize("blocking", [True, False])
def test_messages_arrive_whole_and_in_order(blocking):
    pipe = Pipe(blocking)
    messages = [f"message {number} {'y' * 500}" for number in range(300)]
    lines = []
    reader = threading.Thread(target=lambda: lines.extend(pipe.read()))
    reader.start()
    output = stream(pipe)
    for message in messages:
        print(message, file=output)
    reader.join()
    assert lines == messages


def test_a_message_is_written_when_print_returns():
    pipe = Pipe()
    print("hello", file=stream(pipe))
    assert pipe.read(0) == ["hello"]


@pytest.mark.promise(10)
def test_nobody_waits_for_a_reader_that_hangs_and_the_newest_messages_are_kept():
    pipe = Pipe().fill()
    output = stream(pipe)
    start = time.monotonic()
    for number in range(3 * MOST_WAITING):
        print(f"message {number}", file=output)
    assert time.monotonic() - start < PATIENCE + 20
    start = time.monotonic()
    output.buffer.finish()
    assert time.monotonic() - start < cachix_console.EXIT_PATIENCE + 20
    first, notice, *rest = pipe.read()
    lost = int(re.fullmatch(r"(\d+) messages were lost", notice)[1])
    assert first == "message 0"  # which the thread was about to write
    assert rest == [f"message {number}" for number in range(lost + 1, 3 * MOST_WAITING)]
    print("all is read", file=output)  # and again whoever prints waits until it is written
    assert pipe.read(0) == ["all is read"]


def test_a_reader_that_has_left_is_no_error():
    pipe = Pipe()
    output = stream(pipe)
    os.close(pipe.reader)
    for _ in range(3):
        print("nobody reads this", file=output)
    assert output.buffer.is_idle()


def test_a_fork_has_messages_of_its_own():
    """gunicorn forks: the child has no thread, and may be forked while the parent's is stuck."""
    pipe, other = Pipe().fill(), Pipe()
    output = stream(pipe)
    print("of the parent", file=output)
    child = os.fork()
    if child == 0:
        os.dup2(other.writer, pipe.writer)
        print("of the child", file=output)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
    assert other.read(0) == ["of the child"]
    assert pipe.read() == ["of the parent"]


def test_without_a_further_thread_messages_are_written_at_once(monkeypatch):
    def start(thread):
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", start)
    pipe = Pipe()
    output = stream(pipe)
    for message in ("one", "two"):
        print(message, file=output)
    assert pipe.read(0) == ["one", "two"]


def test_a_file_that_stays_full_is_given_up(monkeypatch):
    monkeypatch.setattr(cachix_console, "READER_TIMEOUT", 0.2)
    pipe = Pipe(blocking=False)
    with pytest.raises(TimeoutError, match="nobody has read it"):
        write_all(pipe.writer, b"x" * 2 * SMALL)


# --- programs -------------------------------------------------------------------------------------


@pytest.fixture
def deaf(make_host, live, name):
    """Start an agent with a stderr that nobody reads. Its pipe may be full from the start."""

    def start(full):
        pipe = Pipe()
        if full:
            pipe.fill()
        argv = [*command("cachix-deploy"), "--host", live.url, "--verbose", "agent", name]
        env = {"CACHIX_AGENT_TOKEN": live.token("agent")}
        kw = {"stdout": subprocess.DEVNULL, "stderr": pipe.writer, "start_new_session": True}
        return host, host.popen(argv, env, **kw), pipe

    host = make_host()
    return start


@pytest.mark.promise(6, 10)
@pytest.mark.parametrize("full", [True, False])
def test_an_agent_whose_stderr_hangs_deploys_and_ends(deaf, live, name, full):
    host, agent, pipe = deaf(full)
    wait_until(lambda: name in live.cli("agent", "list"))
    if not full:
        pipe.fill()
    for number in range(2):
        system = closures.nixos(live.files, f"{name}-{number}", after="echo hello >&2")
        live.push(system)
        deployment = live.deploy(name, system)
        assert live.wait(deployment) == "Succeeded" and host.running() == system
        assert "hello" in live.log(deployment)
    start = time.monotonic()
    agent.terminate()
    assert agent.wait(12) == 0 and time.monotonic() - start < 5
    pipe.close_writer()
    assert full or f"{name} is connected to {live.url}" in pipe.read(), "an early message is lost"


def test_activate_with_a_stderr_that_hangs(machine, tmp_path):
    spec = tmp_path / "deploy.json"
    path = closures.plain(machine.files, machine.name)
    machine.workspace.push(path)
    unknown = {f"unknown-{number}": {} for number in range(50)}
    spec.write_text(json.dumps({"agents": {machine.name: path}, **unknown}))
    pipe = Pipe().fill()
    argv = [*command("cachix-deploy"), "--host", machine.workspace.url, "activate", str(spec)]
    env = {"CACHIX_ACTIVATE_TOKEN": machine.workspace.token("activate")}
    process = machine.host.popen(argv, env, stdout=subprocess.PIPE, stderr=pipe.writer)
    output = process.communicate(timeout=30)[0].decode()
    assert process.returncode == 0 and f"{machine.name}  Succeeded" in output


@pytest.mark.long
def test_a_workspace_with_a_stderr_that_hangs(make_workspace, make_host, name):
    """Its requests must be answered, though each of these is worth a message in its log."""
    workspace = make_workspace()
    workspace.stop()
    pipe = Pipe().fill()
    port = workspace.url.rpartition("/")[2]
    argv = [*command("cachix-workspace"), "serve", f"--listen={port}", f"--data={workspace.data}"]
    environment, directory = workspace.environment, workspace.directory
    process = subprocess.Popen(argv, env=environment, cwd=directory, stderr=pipe.writer)
    try:
        host = make_host()
        agent = host.agent(name, workspace.url, workspace.token("agent"))
        agent.wait_for("is connected to")
        path = closures.plain(workspace.files, name)
        workspace.push(path)
        assert workspace.wait(workspace.deploy(name, path)) == "Succeeded"
        start = time.monotonic()
        process.send_signal(signal.SIGTERM)
        assert process.wait(15) == 0 and time.monotonic() - start < 10
    finally:
        process.kill()


def test_the_last_message_and_a_traceback_reach_a_slow_reader(tmp_path):
    code = "import cachix_console, sys; cachix_console.prepare()\n"
    code += "for n in range(200): print('y' * 100, n, file=sys.stderr)\n"
    code += "import threading; thread = threading.Thread(target=lambda: 1 / 0)\n"
    code += "thread.start(); thread.join(); raise LookupError('the end')"
    pipe = Pipe()
    argv = [sys.executable, "-c", code]
    with subprocess.Popen(argv, stderr=pipe.writer, cwd=PROJECT) as process:
        pipe.close_writer()
        text = b""
        while part := os.read(pipe.reader, 2048):
            text += part
            time.sleep(0.02)
    assert process.returncode == 1 and text.endswith(b"LookupError: the end\n")
    assert b"ZeroDivisionError" in text and text.count(b"yyy") > 190 and b"lost" not in text
