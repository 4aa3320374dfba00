"""The data directory: one server, signals, other files in it, disks that are full."""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests
from pages_support import Browser
from sqlalchemy import update
from workspace_support import (
    OURS,
    STORE_PATHS,
    Connection,
    Peer,
    Server,
    command,
    environment,
    running,
    wait_for,
)

from cachix_workspace.database import open_database
from cachix_workspace.directory import RESERVE
from cachix_workspace.settings import Settings
from cachix_workspace.tables import sessions

pytestmark = pytest.mark.sqlite

# --- one server -----------------------------------------------------------------------------------


@pytest.mark.long
def test_a_second_server_touches_nothing() -> None:
    with running() as server:
        peer = Peer(server)
        server.command("cache", "create", "main")
        web = peer.registered("web")
        upload = server.data / "cache" / "main" / ".upload-x"
        upload.parent.mkdir(parents=True, exist_ok=True)
        upload.touch()
        second = command(
            "serve",
            "--listen=127.0.0.1:0",
            f"--data={server.data}",
            "--public-url=http://x",
            status=1,
        )
        assert second.stderr == f"error: another server serves {server.data}: stop it first\n"
        assert upload.exists()
        agent = json.loads(server.command("agent", "list", "--json"))[0]
        assert agent["connected"] is True
        assert web.is_silent()
        assert server.url in server.command("cache", "show", "main")


def test_a_killed_server_leaves_nothing_stale() -> None:
    with running() as server:
        server.kill()
        server.start()
        assert requests.get(f"{server.url}/healthz", timeout=10).ok
        assert server.stop() == 0
        server.start()
        assert [file.name for file in server.data.iterdir() if "lock" in file.name] == []


# --- signals --------------------------------------------------------------------------------------


def workers(server: Server) -> list[int]:
    path = f"/proc/{server.process.pid}/task/{server.process.pid}/children"
    return [int(pid) for pid in Path(path).read_text().split()]


@pytest.mark.long
def test_signals_of_gunicorn_are_ignored() -> None:
    with running() as server:
        agent = Peer(server).registered("web")
        before = workers(server)
        for name in ("TTIN", "TTOU", "USR1", "USR2", "WINCH", "TTIN"):
            server.process.send_signal(getattr(signal, f"SIG{name}"))
        os.killpg(server.process.pid, signal.SIGUSR2)
        assert agent.is_silent(2.0) and workers(server) == before
        assert requests.get(f"{server.url}/healthz", timeout=10).ok
        assert server.stop() == 0


def test_a_closed_terminal_ends_it_in_order() -> None:
    with running() as server:
        agent = Peer(server).registered("web")
        os.killpg(server.process.pid, signal.SIGHUP)
        assert agent.expect_close() == 1012
        assert server.process.wait(10) == 0
        assert not any("Traceback" in line for line in server.lines)


@pytest.mark.long
def test_nohup_is_respected(tmp_path: Path) -> None:
    argv = [sys.executable, "-m", "cachix_workspace", "serve", "--listen=127.0.0.1:0"]
    out = tmp_path / "err"
    with open(out, "wb") as file:
        process = subprocess.Popen(
            ["nohup", *argv, f"--data={tmp_path}/data"],
            env=environment(),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=file,
            start_new_session=True,
        )
    try:
        wait_for(lambda: "listening on" in out.read_text())
        os.killpg(process.pid, signal.SIGHUP)
        time.sleep(2)
        assert process.poll() is None
    finally:
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0


# --- other files ----------------------------------------------------------------------------------


def test_lost_and_found_and_hidden_files_are_no_obstacle(tmp_path: Path) -> None:
    data = tmp_path / "data"
    (data / "lost+found").mkdir(parents=True)
    (data / ".keep").touch()
    command("init", f"--data={data}")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "letter.txt").touch()
    refused = command("init", f"--data={tmp_path}/other", status=1)
    assert "holds other files" in refused.stderr


# --- addresses ------------------------------------------------------------------------------------


@pytest.mark.long
def test_agents_are_told_the_address_that_they_came_by(tmp_path: Path) -> None:
    """On a wildcard address nobody knows our name; a name that is given counts alone."""
    with running() as server:
        server.stop()
        server.argv = [arg.replace("127.0.0.1", "0.0.0.0") for arg in server.argv]
        server.start()
        key = server.command("cache", "create", "main").partition(":")[0]
        assert key == f"main.{socket.gethostname()}-1"
        peer = Peer(server)
        for host in ("10.77.0.1:8080", "[fd00::1]:8080", "deploy"):
            contents = peer.agent("web", Host=host).expect_text()["command"]["contents"]
            assert contents["cache"]["uri"] == f"http://{host}/cache/main"
        contents = peer.agent("web", Host="a/b@evil").expect_text()["command"]["contents"]
        port = server.url.rpartition(":")[2]
        assert contents["cache"]["uri"] == f"http://{socket.gethostname()}:{port}/cache/main"
        body = {"agents": {"web": STORE_PATHS[0]}}
        headers = {"Host": "10.77.0.1:8080"}
        answer = peer.http("POST", "/api/v2/deploy/activate", json=body, headers=headers).json()
        assert answer["agents"]["web"]["url"].startswith("http://10.77.0.1:8080/agents/")
        assert any("--public-url" in line for line in server.lines)
        server.stop()
        server.argv.append("--public-url=http://deploy.lan")
        server.start()
        contents = Peer(server).agent("web", Host="10.1.1.1").expect_text()["command"]["contents"]
        assert contents["cache"]["uri"] == "http://deploy.lan/cache/main"


def test_no_colon_is_in_the_name_of_a_key() -> None:
    with running("--public-url=http://[fd00::1]:8080") as server:
        secret = server.command("cache", "create", "main").strip()
        assert secret.count(":") == 1


# --- disks ----------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Iterator[Path]:
    """A data directory on a disk of its own, of 16 MiB, which `fill` fills."""
    data = tmp_path / "data"
    data.mkdir()
    argv = ["mount", "-t", "tmpfs", "-o", "size=16m", "tmpfs", str(data)]
    if os.geteuid() != 0 or subprocess.run(argv, capture_output=True, check=False).returncode:
        pytest.skip("only root mounts a small disk")
    try:
        yield data
    finally:
        subprocess.run(["umount", "--lazy", str(data)], check=True)


def fill(data: Path) -> Path:
    """Fill the disk, to the last byte; the file that does."""
    ballast = data / ".ballast"
    with open(ballast, "ab", buffering=0) as file:
        try:
            while True:
                file.write(bytes(4096))
        except OSError:
            return ballast


def long_ago(server: Server) -> None:
    """Let sessions have been used long ago: their use is noted again."""
    database = open_database(Settings(server.data))
    with database.write() as connection:
        connection.execute(update(sessions).values(seen_on="2026-01-01T00:00:00Z"))
    database.close()


def served(data: Path) -> Server:
    return Server(data, "--keep-free=0")


@pytest.mark.long
@pytest.mark.slow
def test_a_full_disk_lets_everything_be_read(small: Path) -> None:
    server = served(small)
    try:
        peer = Peer(server)
        server.command("cache", "create", "main")
        agent = peer.registered("web", **OURS)
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        agent.expect_text()
        assert peer.report("web", deployment, "InProgress", step="activating").ok
        first = server.new_token("activate")[0]
        successor = server.command("token", "rotate", str(first)).strip()
        browser = Browser(server)
        long_ago(server)
        ballast = fill(small)
        for path in ("/", "/agents/web", "/agents/web/deployments/1", "/tokens"):
            assert "web" in browser.get(path) or path == "/tokens"
        assert peer.http("GET", "/api/v1/deploy/deployments", successor).status_code == 200
        big = peer.http("PUT", f"/cache/main/nar/{'1' * 52}.nar", data=b"x" * (1 << 20))
        assert big.status_code == 507
        refused = peer.http(
            "POST", "/api/v2/deploy/activate", json={"agents": {"web": STORE_PATHS[1]}}
        )
        assert refused.status_code in (503, 507) and "disk is full" in refused.json()["error"]
        assert peer.report("web", deployment, "Succeeded").status_code in (503, 507)
        newcomer = peer.agent("db", **OURS)
        assert newcomer.expect_close() == 1013  # comes again
        assert peer.status(deployment)["status"] == "InProgress"
        assert peer.http("GET", "/cache/main/nix-cache-info").status_code == 200
        failure = command("token", "create", "activate", f"--data={small}", status=1)
        assert failure.stderr.count("\n") == 1 and failure.stderr.startswith("error: ")
        assert "web" in server.command("agent", "list")
        server.kill()
        fill(small)
        server.start()
        assert peer.status(deployment)["status"] == "InProgress"
        ballast.unlink()
        assert peer.report("web", deployment, "Succeeded").ok
        assert not any("Traceback" in line for line in server.lines), server.lines
    finally:
        server.kill()


@pytest.mark.long
@pytest.mark.slow
def test_a_full_disk_holds_back_no_deployment(small: Path) -> None:
    server = served(small)
    try:
        peer = Peer(server)
        peer.registered("web", **OURS).close()
        deployment = peer.activate({"web": STORE_PATHS[0]})["web"]
        fill(small)
        agent = peer.registered("web", **OURS)
        assert agent.expect_text()["command"]["contents"]["id"] == deployment
        assert agent.is_silent(2.0)  # and it stays connected
        agent.send_frame(9, b"still")
        assert agent.expect(10) == b"still"
    finally:
        server.kill()


@pytest.mark.long
@pytest.mark.slow
def test_a_disk_that_is_full_to_the_last_byte_lets_it_start(small: Path) -> None:
    """SQLite needs some room to open a database that was closed in order."""
    server = served(small)
    try:
        token = server.token("activate")
        assert (small / RESERVE).stat().st_size >= 1 << 20
        assert server.stop() == 0
        ballast = fill(small)
        server.start()
        url = f"{server.url}/api/v1/deploy/deployments"
        answer = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=10)
        assert answer.status_code == 200
        assert server.stop() == 0
        ballast.unlink()
        server.start()
        assert (small / RESERVE).exists()
    finally:
        server.kill()


@pytest.mark.long
def test_stderr_that_takes_nothing(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    argv = [sys.executable, "-m", "cachix_workspace", "serve", f"--listen=127.0.0.1:{port}"]
    with open("/dev/full", "wb") as full:
        process = subprocess.Popen(
            [*argv, f"--data={tmp_path}/data"],
            env=environment(),
            stderr=full,
            start_new_session=True,
        )

    def answers() -> bool:
        try:
            return requests.get(f"http://127.0.0.1:{port}/healthz", timeout=5).ok
        except requests.ConnectionError:
            return False

    try:
        wait_for(answers)
        path = f"/proc/{process.pid}/task/{process.pid}/children"
        before = Path(path).read_text()
        time.sleep(2)
        assert before and Path(path).read_text() == before and answers()
        os.killpg(process.pid, signal.SIGTERM)
        assert process.wait(10) == 0
    finally:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)


@pytest.mark.slow
def test_no_directory_for_temporary_files(tmp_path: Path) -> None:
    if os.geteuid() != 0 or not shutil.which("unshare"):
        pytest.skip("only root has mounts of its own")
    script = "for d in /tmp /var/tmp; do mount --bind $d $d && mount -o remount,ro,bind $d"
    script += ' || exit 7; done; cd /proc && exec "$@"'
    where = Path.home() / f".cachix-workspace-test-{os.getpid()}"  # `tmp_path` is below /tmp
    data = where / "data"
    try:
        server = Server.__new__(Server)
        server.data, server.lines = data, []
        serve = [sys.executable, "-m", "cachix_workspace", "serve", "--listen=127.0.0.1:0"]
        server.argv = ["unshare", "-m", "sh", "-c", script, "sh", *serve, f"--data={data}"]
        server.start()
        assert requests.get(f"{server.url}/healthz", timeout=10).ok
        assert server.stop() == 0
    finally:
        shutil.rmtree(where, ignore_errors=True)


# --- commands that fail ---------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="only root becomes somebody else")
@pytest.mark.parametrize("case", ["unreadable", "root-owned"])
def test_a_failure_is_one_sentence(tmp_path: Path, case: str) -> None:
    data = tmp_path / "data"
    command("init", f"--data={data}")
    if case == "root-owned":
        os.chown(data, 65534, 65534)
    for parent in [tmp_path, *tmp_path.parents][:-2]:
        parent.chmod(0o755)
    # The interpreter may lie where only root reads: one run of root's loads all that it needs.
    command("init", f"--data={tmp_path}/other")
    program = f"""
import os, sys
sys.path[:0] = {[str(Path(__file__).parent.parent)]!r}
from cachix_workspace.__main__ import main as run
from cachix_workspace.cli import people
run(["token", "list", "--data={tmp_path}/other"])
os.setgid(65534); os.setuid(65534)
sys.exit(run(["token", "list", "--data={data}"]))
"""
    result = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=30, check=False
    )
    assert result.returncode == 1, result
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1, result.stderr
    if case == "root-owned":
        assert "belongs to user 0" in result.stderr


@pytest.mark.long
def test_a_database_that_another_program_holds() -> None:
    """Agents and requests are told to come again; nobody gets 1011, or a traceback."""
    with running() as server:
        peer = Peer(server)
        peer.registered("web")
        database = open_database(Settings(server.data))
        with database.engine.connect() as connection:
            connection.exec_driver_sql("ROLLBACK")
            connection.exec_driver_sql("BEGIN EXCLUSIVE")
            agents = [peer.agent(f"db-{number}") for number in range(3)]
            assert {agent.expect_close(40) for agent in agents} == {1013}
            connection.exec_driver_sql("ROLLBACK")
        peer.registered("db-0").close()
        assert not any("Traceback" in line for line in server.lines)
        failures = [line for line in server.lines if "locked" in line or "busy" in line]
        assert 1 <= len(failures) <= 12, server.lines


# --- framing --------------------------------------------------------------------------------------


def test_uploads_whose_end_could_not_be_told() -> None:
    with running() as server:
        peer = Peer(server)
        server.command("cache", "create", "main")
        path = f"/cache/main/nar/{'1' * 52}.nar"
        for version, status in (("1.0", "411"), ("1.1", "411")):
            connection = Connection(server.port)
            head = f"PUT {path} HTTP/{version}\r\nHost: x\r\n"
            connection.send(f"{head}Authorization: Bearer {peer.ci_token}\r\n\r\n".encode())
            assert connection.read_head().split()[1] == status
        answer = peer.http("PUT", path, data=b"hello", headers={"Content-Range": "bytes 0-4/10"})
        assert answer.status_code == 400 and "Content-Range" in answer.json()["error"]
