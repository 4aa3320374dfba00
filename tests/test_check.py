"""`check`: each thing that is looked at, in order and broken."""

import grp
import json
import time

import pytest
from hosts import command

import cachix_check
from activate.kinds import boot
from cachix_check import GOOD, PROBLEM, WARNING, Facts


@pytest.fixture
def facts(tmp_path, monkeypatch):
    """A machine without an agent, and without a token."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CACHIX_AGENT_TOKEN", raising=False)
    monkeypatch.delenv("CACHIX_AGENT_TRUSTED_KEYS", raising=False)
    options = {"PROFILE": None, "--token-file": None, "--trusted-key": []}
    return Facts(options, str(tmp_path), "web", "http://127.0.0.1:9", {})


def states(lines):
    return {line.name: line.state for line in lines}


def test_a_machine_that_is_ready(machine):
    host = machine.host
    token = {"CACHIX_AGENT_TOKEN": machine.workspace.token("agent")}
    result = host.run([*command("cachix-deploy"), "check", "--json"], env=token)
    lines = {line["name"]: line for line in json.loads(result.stdout)}
    wanted = ("nix", "store", "trust", "state", "space", "agent", "token", "workspace", "clock")
    assert {name: lines[name]["state"] for name in wanted} == dict.fromkeys(wanted, GOOD)
    assert lines["cache"]["text"] == machine.workspace.cache_url and lines["key"]["state"] == GOOD
    assert result.returncode == 0
    assert machine.agent.process.poll() is None and "has connected" not in machine.agent.text()
    bare = host.run([*command("cachix-deploy"), "check"])  # the token is that of a unit alone
    assert bare.returncode == 0 and "the agent has one, and is connected to" in bare.stdout
    words = host.run([*command("cachix-deploy"), "doctor"], env=token)
    assert words.returncode == 0 and f"ok       agent      {machine.name} runs" in words.stdout


def test_what_is_missing_has_a_remedy(host):
    result = host.run([*command("cachix-deploy"), "check"])
    assert result.returncode == 1
    assert "PROBLEM  token      there is no token" in result.stdout
    assert "or make one: cachix-workspace token create agent" in result.stdout
    assert "warning  agent " in result.stdout


def test_a_token_that_is_refused(host, live):
    argv = [*command("cachix-deploy"), f"--host={live.url}", "check"]
    result = host.run(argv, env={"CACHIX_AGENT_TOKEN": "not-a-token-of-this-workspace"})
    assert result.returncode == 1 and "PROBLEM  workspace" in result.stdout
    assert "not-a-token" not in result.stdout + result.stderr


def test_a_workspace_out_of_reach(facts, monkeypatch):
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "token-of-this-test")
    lines = list(cachix_check.check_workspace(facts))
    assert states(lines) == {"token": GOOD, "workspace": PROBLEM}
    assert "127.0.0.1:9" in lines[1].text and lines[1].remedy


@pytest.mark.parametrize(("skew", "state"), [(0, GOOD), (-30, GOOD), (3600, WARNING)])
def test_clocks(monkeypatch, skew, state):
    class Answer:
        headers = {"Date": time.strftime("%a, %d %b %Y %H:%M:%S GMT", time.gmtime())}

    monkeypatch.setattr(cachix_check, "http", lambda *_: Answer)
    now = time.time()
    monkeypatch.setattr("cachix_check.time.time", lambda: now + skew)
    (line,) = cachix_check.check_clock(None)
    assert line.state == state


def test_a_user_whom_nix_does_not_trust(monkeypatch):
    monkeypatch.setattr("activate.nix.may_forbid_substitution", lambda: False)
    monkeypatch.setattr("os.getgroups", lambda: [0])
    group = grp.getgrgid(0).gr_name
    for words, trusted in (("nobody", False), ("*", True), (f"@{group}", True)):
        monkeypatch.setattr(
            "activate.nix.show_config", lambda words=words: {"trusted-users": words}
        )
        monkeypatch.setattr("activate.environment.user", lambda: "anna")
        assert cachix_check.is_trusted() is trusted


def test_little_room(facts, monkeypatch):
    monkeypatch.setattr("activate.agent.failure.space", lambda: (1 << 20, 1 << 20))
    assert states(cachix_check.check_space(facts))["space"] == WARNING


@pytest.mark.parametrize(
    ("answer", "state"),
    [
        ("ProtectSystem=no\nPrivateTmp=no\nNoNewPrivileges=no\nProtectHome=\n", GOOD),
        ("ProtectSystem=strict\nPrivateTmp=yes\n", PROBLEM),
    ],
)
def test_units_that_confine(monkeypatch, answer, state):
    monkeypatch.setattr(cachix_check, "unit_of", lambda pid: "cachix-deploy.service")
    monkeypatch.setattr("os.path.isdir", lambda path: True)
    monkeypatch.setattr(cachix_check, "ask", lambda argv, timeout: (0, answer, ""))
    (line,) = cachix_check.check_unit(1)
    assert line.state == state
    assert state == GOOD or line.text == (
        "cachix-deploy.service: ProtectSystem=strict, PrivateTmp=yes"
    )


def test_a_cache_that_is_not_usable_or_not_trusted(facts, monkeypatch):
    from cachix_connection import Peer

    peer = Peer("https://w.example", "")
    monkeypatch.setattr(cachix_check, "ask", lambda argv, timeout: (0, "", ""))
    assert states(cachix_check.check_cache(facts, peer)) == {"cache": WARNING}
    facts.note["cache"] = {"cacheName": "a b", "publicKey": "x", "isPublic": True}
    assert states(cachix_check.check_cache(facts, peer)) == {"cache": PROBLEM}
    key = "main-1:" + "A" * 43 + "="
    facts.note["cache"] = {"cacheName": "main", "publicKey": key, "isPublic": True}
    assert states(cachix_check.check_cache(facts, peer)) == {"cache": GOOD, "key": GOOD}
    facts.options["--trusted-key"] = ["other-1:" + "A" * 43 + "="]
    assert states(cachix_check.check_cache(facts, peer)) == {"cache": GOOD, "key": PROBLEM}
    monkeypatch.setattr(cachix_check, "ask", lambda argv, timeout: (1, "", "error: not there"))
    assert states(cachix_check.check_cache(facts, peer))["cache"] == PROBLEM


def test_a_check_that_fails_itself_is_a_problem(facts, monkeypatch):
    def check_nothing(facts):
        raise OSError("no such thing")
        yield

    monkeypatch.setattr(cachix_check, "CHECKS", (check_nothing,))
    (line,) = cachix_check.look(facts)
    assert (line.name, line.state) == ("nothing", PROBLEM)


# --- what starts an agent -------------------------------------------------------------------------

UNITS = {
    "NixOS": "etc/systemd/system",
    "nix-darwin": "Library/LaunchDaemons",
    "home-manager": "home-files/.config/systemd/user",
}


@pytest.mark.parametrize("kind", UNITS)
def test_units_that_start_an_agent(tmp_path, kind):
    place = tmp_path / UNITS[kind]
    assert boot.warning(kind, str(tmp_path), ()) == ""  # nothing is known of its units
    place.mkdir(parents=True)
    (place / "other.service").write_text("[Service]\nExecStart=/bin/true\n")
    assert boot.warning(kind, str(tmp_path), ()) == "nothing starts an agent after a reboot"
    (place / "deploy.service").write_text("[Service]\nExecStart=/bin/cachix-deploy agent web\n")
    assert boot.warning(kind, str(tmp_path), ()) == ""
    (place / "deploy.service").unlink()
    (place / "cachix-agent.service").symlink_to("/nowhere")  # Cachix's module, a script of its own
    assert boot.warning(kind, str(tmp_path), ()) == ""


def test_a_home_on_another_system(tmp_path):
    """The agent of a home may be started by a unit of the system, or by cron."""
    (tmp_path / UNITS["home-manager"]).mkdir(parents=True)
    crontab = tmp_path / "crontab"
    crontab.write_text("@reboot cachix-deploy agent web --if-stopped\n")
    assert boot.warning("home-manager", str(tmp_path), (str(crontab),)) == ""
    assert boot.warning("plain path", str(tmp_path)) == ""


@pytest.mark.parametrize("unit", ["cachix-deploy.service", "sshd.service"])
def test_a_deployment_without_an_agent_is_warned_of(machine, unit):
    import closures

    units = {"etc": {"systemd": {"system": {unit: "[Service]\n"}}}}
    path = closures.nixos(machine.files, unit[:4], extra=units)
    outcome = machine.deploy(path)
    assert outcome.status == "Succeeded"
    words = "nothing starts an agent after a reboot"
    assert outcome.reason == (words if unit == "sshd.service" else None)
    assert (f"\nwarning: {words}\n" in outcome.log) == (unit == "sshd.service")


@pytest.mark.long
def test_a_private_cache(make_machine, make_workspace):
    """It is asked as a download would ask it: with the agent's token."""
    workspace = make_workspace(private=True)
    machine = make_machine(workspace=workspace)

    def line(token):
        env = {"CACHIX_AGENT_TOKEN": token} if token else {}
        result = machine.host.run([*command("cachix-deploy"), "check", "--json"], env=env)
        return next(line for line in json.loads(result.stdout) if line["name"] == "cache")

    accepted = line(workspace.token("agent"))
    words = f"{workspace.cache_url} is private, and takes the agent's token"
    assert (accepted["state"], accepted["text"]) == (GOOD, words)
    assert line("")["state"] == WARNING
    workspace.cli("cache", "create", "other")
    refused = line(workspace.token("agent", "--shared", "--cache=other"))
    words = f"{workspace.cache_url} refuses the agent's token (HTTP 403)"
    assert (refused["state"], refused["text"]) == (PROBLEM, words)
    assert refused["remedy"] == "give the agent a token for this cache"
