"""`cachix-deploy status`: facts and words, for any user, without a connection."""

import json
import os
import re
import sys
from pathlib import Path

import closures
import pytest
from hosts import SYSTEM, command, wait_until

import cachix_status
from activate import journal
from activate.agent import mark, present

FIRST, SECOND = (f"/nix/store/{letter * 32}-system" for letter in "ab")
HEAVY = {"requests", "ssl", "docopt", "websocket", "cachix_deploy", "cachix_connection"}


def status(host, *args):
    """The facts that `status --json` prints on a host."""
    result = host.run([*command("cachix-deploy"), "status", "--json", *args])
    assert result.returncode == 0 and result.stderr == "", result.stderr
    return json.loads(result.stdout)


def words(host):
    """The words that `status` prints on a host."""
    return host.output(*command("cachix-deploy"), "status")


def write(state, number, **facts):
    """Write a journal of a deployment."""
    record = journal.Record(
        **{"id": f"id-{number}", "index": number, "agent": "web", "host": "http://w", **facts},
        sequence=number,
    )
    entry = journal.Journal(str(state / "deployments" / record.id), record)
    entry.enter(record.step)


@pytest.fixture
def state(tmp_path, monkeypatch):
    """A state directory of this test."""
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path


def test_a_machine_that_has_nothing(host):
    facts = status(host)
    assert facts == {
        name: [] for name in ("agents", "deployments", "systems", "results", "withheld")
    }
    assert words(host) == "no agent has run here\n"


def test_an_agent_and_its_deployments(machine):
    host, first = machine.host, closures.nixos(machine.files, 1)
    machine.workspace.push(first)
    host.install(machine.workspace.cache_url, machine.files.key.public, first)
    bad = closures.nixos(machine.files, 2, after="exit 1")
    assert machine.deploy(bad).step == "rolled-back"
    facts = status(host)
    (agent,) = facts["agents"]
    assert agent["name"] == machine.name and agent["pid"] == machine.agent.pid
    assert agent["connected"] and agent["workspace"] == machine.workspace.url
    (result,) = facts["results"]
    assert (result["step"], result["outcome"], result["storePath"]) == (
        *("rolled-back", "rolled-back", bad),
    )
    assert "ended with status 1; rolled back to" in result["reason"]
    (system,) = facts["systems"]
    wanted = {"kind": "nixos", "profile": SYSTEM, "running": first, "profilePath": first}
    assert wanted.items() <= system.items() and system["agree"] and not system["rebootNeeded"]
    text = words(host)
    assert f"agent {machine.name} (pid {machine.agent.pid}, version " in text
    assert re.search(rf"connected to {machine.workspace.url} since 20\d\d-", text)
    assert f"runs        {first}\n  profile     the same\n  boots next  unknown" in text
    assert f"deployment 1: rolled-back  {bad}\n      the activation ended with status 1" in text


def test_a_deployment_under_way(machine):
    host = machine.host
    slow = closures.nixos(machine.files, 1, before=closures.wait_for("/run/go-on"))
    deployment = machine.order(slow)
    wait_until(lambda: host.step(deployment) == "activating", 30, "the activation")
    (fact,) = status(host)["deployments"]
    assert (fact["step"], fact["led"], fact["storePath"]) == ("activating", True, slow)
    assert re.search(r"deployment 1 of \S+: activating since 20\S+ \S+ UTC\n", words(host))
    host.path("/run/go-on").touch()
    machine.outcome(deployment)


@pytest.mark.long
def test_an_agent_that_lost_its_connection(make_machine, make_workspace):
    workspace = make_workspace()
    machine = make_machine(workspace=workspace, check=False)
    host = machine.host
    assert status(host)["agents"][0]["connected"]
    workspace.stop()
    wait_until(lambda: not status(host)["agents"][0]["connected"], 30, "the loss to be noted")
    assert "NOT connected to" in words(host)
    machine.agent.stop()
    (agent,) = status(host)["agents"]
    assert agent["pid"] is None and agent["lastConnected"]
    assert "not running, last connected 20" in words(host)


def test_a_deployment_that_nobody_leads(state):
    write(state, 1, store_path=FIRST, step=journal.ACTIVATING, kind="NixOS", profile=SYSTEM)
    facts = cachix_status.gather(str(state))
    assert facts["deployments"][0]["led"] is False
    assert any("INTERRUPTED" in line for line in cachix_status.describe(facts))


def test_only_the_last_results_are_shown(state):
    for number in range(1, 9):
        write(state, number, store_path=FIRST, step=journal.SUPERSEDED)
    indexes = [fact["index"] for fact in cachix_status.gather(str(state))["results"]]
    assert indexes == [8, 7, 6, 5, 4]


def test_paths_that_differ(state, monkeypatch):
    monkeypatch.setattr("activate.kinds.nixos.running_path", lambda profile: FIRST)
    monkeypatch.setattr("activate.nix.target", lambda link: SECOND)
    write(state, 1, store_path=SECOND, step=journal.SUCCEEDED, kind="NixOS", profile=SYSTEM)
    facts = cachix_status.gather(str(state))
    assert facts["systems"][0]["agree"] is False
    assert f"  profile     {SECOND}, ANOTHER ONE" in cachix_status.describe(facts)


def test_a_reason_does_nothing_to_the_terminal(state, capsys):
    write(state, 1, store_path=FIRST, step=journal.FAILED, reason="bad \x1b[2J\x1b]0;title\x07 end")
    cachix_status.status_command(as_json=False)
    assert "\x1b" not in capsys.readouterr().out


def test_the_mark_of_an_agent(tmp_path):
    agent = mark.Mark(str(tmp_path), "web", "http://w", "1.0")
    agent.lose()  # it was never connected
    assert mark.load(agent.path) == {}
    agent.set({"id": "x"})
    agent.lose()
    first = mark.load(agent.path)
    agent.lose()
    assert mark.load(agent.path) == first and first["lost"] >= first["time"]
    agent.set({"id": "x"})
    assert "lost" not in mark.load(agent.path)
    Path(agent.path).write_text("[")
    assert mark.load(agent.path) == {}


GRUB = "set default=0\nmenuentry new {{\n linux (hd0)//k init={}/init quiet\n}}\nmenuentry {{\n}}\n"


@pytest.mark.parametrize(
    "files",
    [
        {
            "loader/loader.conf": "timeout 5\ndefault nixos-generation-2.conf\n",
            "loader/entries/nixos-generation-1.conf": f"options init={FIRST}/init\n",
            "loader/entries/nixos-generation-2.conf": f"options init={SECOND}/init loglevel=4\n",
        },
        {"grub/grub.cfg": GRUB.format(SECOND)},
        {"extlinux/extlinux.conf": f"DEFAULT d\nLABEL d\n APPEND init={SECOND}/init\n"},
    ],
)
def test_boot_loaders(tmp_path, files):
    assert present.boots_next((str(tmp_path),)) is None
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert present.boots_next((str(tmp_path / "no"), str(tmp_path))) == SECOND


@pytest.mark.skipif(os.geteuid() != 0, reason="only root has other users")
def test_another_user_is_told_what_root_sees(monkeypatch, tmp_path):
    monkeypatch.setattr(cachix_status, "ROOT_STATE", str(tmp_path))
    monkeypatch.delenv("STATE_DIRECTORY", raising=False)
    assert cachix_status.withheld("/somewhere") == []
    monkeypatch.setattr("os.geteuid", lambda: 1000)
    assert "sudo cachix-deploy status" in cachix_status.withheld("/somewhere")[0]


def test_it_loads_little(host):
    """bench/start.py has the time that it takes."""
    code = "import sys, cachix_entry; cachix_entry.main(['status']); print(*sys.modules)"
    loaded = host.output(sys.executable, "-c", code).split()
    assert "cachix_status" in loaded and not HEAVY & set(loaded)
