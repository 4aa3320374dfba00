"""Backups: made beside a server, restored elsewhere, with agents that have gone on meanwhile."""

from __future__ import annotations

import json
import re
import threading
from pathlib import Path

import closures
import pytest
from caches import Files, Key
from hosts import Host
from live import Workspace
from machines import Machine
from pages_support import Browser, words
from workspace_support import OURS, STORE_PATHS, Peer, command, running, wait_for

pytestmark = pytest.mark.sqlite

NAR = "nar/" + "1" * 52 + ".nar"


def files(directory: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def test_a_backup_is_complete_and_private(tmp_path: Path) -> None:
    with running() as server:
        peer = Peer(server)
        secret = server.command("cache", "create", "main").strip()
        path = Files(tmp_path / "files", Key.parse(secret))
        peer.registered("web", **OURS)
        cache = server.data / "cache" / "main" / "nar"
        cache.mkdir(parents=True)
        (cache / "a.nar").write_bytes(b"nar")
        (cache / ".upload-1").write_bytes(b"half")
        target = tmp_path / "backup"
        command("backup", str(target), f"--data={server.data}")
        assert set(files(target)) == {"workspace.db", "backup.json", "cache/main/nar/a.nar"}
        assert target.stat().st_mode & 0o777 == 0o700
        assert (target / "workspace.db").stat().st_mode & 0o077 == 0
        refused = command("backup", str(target), f"--data={server.data}", status=1)
        assert "name a new directory" in refused.stderr
        del path


def test_hard_links_where_they_can_be(tmp_path: Path) -> None:
    data = tmp_path / "data"
    command("init", f"--data={data}")
    nar = data / "cache" / "main" / "nar" / "a.nar"
    nar.parent.mkdir(parents=True)
    nar.write_bytes(b"nar")
    command("backup", str(tmp_path / "backup"), f"--data={data}")
    copy = tmp_path / "backup" / "cache" / "main" / "nar" / "a.nar"
    assert copy.samefile(nar)
    command("restore", str(tmp_path / "backup"), f"--data={tmp_path}/new")
    assert (tmp_path / "new" / "cache" / "main" / "nar" / "a.nar").read_bytes() == b"nar"


@pytest.mark.long
def test_a_backup_below_the_directory_itself(tmp_path: Path) -> None:
    """The module of NixOS lets the command write nowhere else."""
    data = tmp_path / "data"
    command("init", f"--data={data}")
    (data / "cache" / "main" / "nar").mkdir(parents=True)
    (data / "cache" / "main" / "nar" / "a.nar").write_bytes(b"nar")
    command("backup", str(data / ".backups" / "one"), f"--data={data}")
    command("backup", str(data / ".backups" / "two"), f"--data={data}")
    assert not (data / ".backups" / "two" / ".backups").exists()
    new = tmp_path / "new"
    (data / ".backups" / "two").rename(new.with_suffix(".backup"))
    new.mkdir()
    new.with_suffix(".backup").rename(new / ".backup")
    command("restore", str(new / ".backup"), f"--data={new}")
    assert (new / "cache" / "main" / "nar" / "a.nar").read_bytes() == b"nar"
    assert "there is a workspace" in command("init", f"--data={new}").stderr


@pytest.mark.long
def test_a_backup_that_is_not_complete(tmp_path: Path) -> None:
    command("init", f"--data={tmp_path}/data")
    target = tmp_path / "backup"
    command("backup", str(target), f"--data={tmp_path}/data")
    refused = command("restore", str(target), f"--data={tmp_path}/data", status=1)
    assert "move that directory away" in refused.stderr
    (target / "workspace.db").write_bytes(b"no database at all" * 1000)
    refused = command("restore", str(target), f"--data={tmp_path}/new", status=1)
    assert refused.stderr.startswith("error: ") and refused.stderr.count("\n") == 1
    (target / "backup.json").unlink()
    refused = command("restore", str(target), f"--data={tmp_path}/new", status=1)
    assert "has no complete backup" in refused.stderr
    refused = command("restore", f"{tmp_path}/nothing", f"--data={tmp_path}/new", status=1)
    assert "has no complete backup" in refused.stderr
    assert not (tmp_path / "new" / "workspace.db").exists()


def test_a_running_server_is_not_overwritten(tmp_path: Path) -> None:
    with running() as server:
        command("backup", str(tmp_path / "backup"), f"--data={server.data}")
        refused = command("restore", str(tmp_path / "backup"), f"--data={server.data}", status=1)
        assert "stop it first" in refused.stderr


def test_what_had_not_ended_is_ended(tmp_path: Path) -> None:
    with running() as server:
        peer = Peer(server)
        ids = {}
        for name, headers in (("ours", OURS), ("cachix", {}), ("waits", OURS)):
            with_socket = peer.registered(name, **headers)
            ids[name] = peer.activate({name: STORE_PATHS[0]})[name]
            with_socket.expect_text()
            if name != "waits":
                peer.report(name, ids[name], "InProgress", step="activating")
            with_socket.close()
        command("backup", str(tmp_path / "backup"), f"--data={server.data}")
        server.kill()
        restored = tmp_path / "new"
        result = command("restore", str(tmp_path / "backup"), f"--data={restored}")
        assert "2 deployments had not ended" in result.stderr
        assert "--refresh" in result.stderr
        server.argv = [arg.replace(str(server.data), str(restored)) for arg in server.argv]
        server.data = restored
        server.start()
        states = {name: peer.status(each)["status"] for name, each in ids.items()}
        assert states == {"ours": "InProgress", "cachix": "Failed", "waits": "Cancelled"}
        assert "restored from a backup" in peer.status(ids["waits"])["reason"]
        cachix, ours = peer.registered("cachix"), peer.registered("ours", **OURS)
        assert ours.expect_text()["command"]["contents"]["resumed"] is True
        assert cachix.is_silent(1.0)
        page = words(Browser(server).get("/"))
        assert "from a backup" in page and "are missing" in page


@pytest.mark.long
@pytest.mark.slow
def test_drill(tmp_path: Path) -> None:
    """A new directory from an older backup, in the middle of deployments of real agents."""
    workspace = Workspace(tmp_path / "ws")
    try:
        workspace.serve()
        workspace.cache()
        workspace.token("activate")
        with Host(tmp_path / "m") as host:
            machine = Machine(host, workspace, "web")
            first, second = (closures.nixos(machine.files, number) for number in (1, 2))
            slow = closures.nixos(machine.files, 3, before=closures.wait_for("/run/go"))
            assert machine.deploy(first).status == "Succeeded"
            workspace.push(second, slow)
            workspace.cli("backup", str(tmp_path / "backup"))
            assert workspace.wait(workspace.deploy("web", second)) == "Succeeded"
            going = workspace.deploy("web", slow)  # the backup knows of neither
            wait_for(lambda: host.step(going) == "activating")
            workspace.kill()
            workspace.data = tmp_path / "new"
            workspace.cli("restore", str(tmp_path / "backup"))
            workspace.serve()
            assert workspace.request("GET", f"/api/v1/deploy/deployment/{going}")[0] == 404
            host.path("/run/go").touch()
            wait_for(lambda: host.running() == slow)
            last = closures.nixos(machine.files, 4)
            again = machine.deploy(last)
            assert again.status == "Succeeded"
            tried = [path for action, path in host.record() if action == "test"]
            assert tried == [first, second, slow, last]  # each of them once
            agents = json.loads(workspace.cli("agent", "list", "--json"))
            assert [agent["connected"] for agent in agents] == [True]
    finally:
        workspace.kill()


@pytest.mark.long
def test_a_backup_in_the_middle_of_a_push(tmp_path: Path) -> None:
    """Each narinfo of the backup has its NAR, whatever is pushed meanwhile."""
    workspace = Workspace(tmp_path / "ws")
    try:
        workspace.serve()
        files = workspace.cache()
        paths = [closures.plain(files, number) for number in range(120)]
        pushing = threading.Thread(target=lambda: [workspace.push(path) for path in paths])
        pushing.start()
        numbers = []
        for number in range(3):
            workspace.cli("backup", str(tmp_path / f"backup-{number}"))
            cache = tmp_path / f"backup-{number}" / "cache" / "main"
            narinfos = list(cache.glob("*.narinfo"))
            numbers.append(len(narinfos))
            for narinfo in narinfos:
                url = re.search(r"^URL: (.+)$", narinfo.read_text(), re.M)
                assert url and (cache / url[1]).is_file()
        pushing.join()
        assert numbers == sorted(numbers)
    finally:
        workspace.kill()
