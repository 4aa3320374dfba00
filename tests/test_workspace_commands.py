"""Commands that work beside the workspace and from afar, and where the workspace is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from workspace_support import (
    DEADLINE,
    OURS,
    STORE_PATHS,
    Connection,
    Peer,
    Server,
    environment,
    running,
    wait_for,
)


@pytest.fixture(scope="module")
def peer(server: Server) -> Peer:
    return Peer(server)


@pytest.fixture(scope="module")
def token_file(server: Server, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path: Path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(server.token("admin"))
    return path


def run(*arguments: str, status: int = 0, **more: str) -> tuple[str, str]:
    """stdout and stderr of a command."""
    argv = [sys.executable, "-m", "cachix_workspace", *arguments]
    process = subprocess.run(
        argv,
        env={**environment(), **more},
        capture_output=True,
        text=True,
        timeout=DEADLINE,
        check=False,
        stdin=subprocess.DEVNULL,
    )
    assert process.returncode == status, process
    return process.stdout, process.stderr


@pytest.fixture(params=["beside", pytest.param("afar", marks=pytest.mark.long)])
def where(request: pytest.FixtureRequest, server: Server, token_file: Path) -> list[str]:
    """The options that name the workspace: its directory, or its URL and a token."""
    if request.param == "beside":
        return [f"--data={server.data}"]
    return [f"--url={server.url}", f"--token-file={token_file}"]


# --- the same from both places --------------------------------------------------------------------


@pytest.mark.long
def test_an_agent_is_paused_labelled_renamed_and_removed(
    where: list[str], peer: Peer, name: str
) -> None:
    agent = peer.registered(name, **OURS)
    out, _ = run("agent", "label", name, "prod", "db", *where)
    assert re.search(r"^labels +db, prod$", out, re.M)
    run("agent", "pause", name, *where)
    peer.activate({name: STORE_PATHS[0]})
    assert agent.is_silent()
    run("agent", "resume", name, *where)
    assert agent.expect_text()["method"] == "Deployment"  # a server beside us hears of it
    assert json.loads(run("agent", "show", name, "--json", *where)[0])["labels"] == ["db", "prod"]
    run("agent", "rename", name, f"{name}-new", *where)
    assert agent.expect_close() == 1012
    run("agent", "remove", f"{name}-new", *where)
    _, err = run("agent", "show", f"{name}-new", *where, status=1)
    assert err == f"error: there is no agent {name}-new\n"


@pytest.mark.long
def test_deployments_and_runs(where: list[str], peer: Peer, name: str) -> None:
    peer.registered(name, **OURS)
    for path in (0, 1):
        deployment = peer.activate({name: STORE_PATHS[path]})[name]
        peer.report(name, deployment, "Succeeded", outcome="succeeded")
    peer.log(name, deployment, 0, ["one \x1b[31mred", "two"])
    number = str(peer.status(deployment)["run"])
    listed = json.loads(run("deployment", "list", f"--agent={name}", "--json", *where)[0])
    assert [one["index"] for one in listed] == [2, 1]
    assert "two\n" in run("deployment", "log", name, "2", *where)[0]
    assert re.search(r"^state +succeeded$", run("deployment", "show", name, "2", *where)[0], re.M)
    assert "has ended already" in run("deployment", "cancel", name, "2", *where, status=1)[1]
    assert "1 succeeded" in run("run", "show", number, *where)[0]
    _, err = run("run", "rollback", number, *where, status=1)
    assert f"{name}: to {STORE_PATHS[0]}" in err and "--yes" in err
    out, _ = run("run", "rollback", number, "--yes", *where)
    assert "roll-back" in out and STORE_PATHS[0] in out
    assert name in run("deployment", "retry", name, "1", *where)[0]


@pytest.mark.long
def test_people_webhooks_caches_and_the_freeze(
    where: list[str], server: Server, peer: Peer, name: str
) -> None:
    person = f"p-{len(where)}"
    out, _ = run("person", "add", person, "--role=viewer", *where)
    assert out.startswith(f"{server.url}/sign-in/")
    run("person", "role", person, "operator", *where)
    assert re.search(f"^{person} +operator", run("person", "list", *where)[0], re.M)
    assert run("login-link", person, *where)[0].startswith(f"{server.url}/sign-in/")
    run("person", "remove", person, *where)
    out, err = run("webhook", "add", "http://127.0.0.1:9/secret-path", "--events=failed", *where)
    number = re.findall(r"webhook (\d+)", err)[0]
    assert out.strip() not in run("webhook", "list", "--json", *where)[0]
    run("webhook", "test", number, *where)
    run("webhook", "remove", number, *where)
    assert run("cache", "list", *where)[0].startswith("NAME")
    peer.registered(name, **OURS)
    run("freeze", "the audit", *where)
    answer = peer.http("POST", "/api/v2/deploy/activate", json={"agents": {name: STORE_PATHS[0]}})
    assert answer.status_code == 423 and "the audit" in answer.text
    run("thaw", *where)
    assert peer.activate({name: STORE_PATHS[0]})


@pytest.mark.long
def test_tokens_caches_and_the_audit(where: list[str], peer: Peer, name: str) -> None:
    out, err = run("token", "create", "agent", f"--name={name}", "--expires=7", *where)
    assert out.startswith("agent-")
    number = re.findall(r"token (\d+)", err)[0]
    assert re.search(rf"^{number} +agent.*{name}", run("token", "list", *where)[0], re.M)
    after, _ = run("token", "rotate", number, *where)
    assert after.startswith("agent-") and after != out
    run("token", "revoke", number, *where)
    assert "revoked" in run("token", "list", "--json", *where)[0]
    cache = f"c{len(where)}"
    secret, _ = run("cache", "create", cache, "--private", *where)
    assert secret.startswith(f"{cache}.") and cache in run("cache", "show", cache, *where)[0]
    run("cache", "key", "rotate", cache, *where)
    run("cache", "key", "retire", cache, *where)
    assert "cache key retire" in run("audit", "--limit=5", *where)[0]
    peer.registered(name, **OURS)


@pytest.mark.long
def test_tokens(where: list[str], server: Server, tmp_path: Path, name: str) -> None:
    out, err = run("token", "create", "activate", f"--description={name}", *where)
    match = re.fullmatch(r"activate token (\d+), which is not shown again:\n", err)
    assert match, err
    number = match[1]
    assert out.startswith("activate-") and out.count("\n") == 1
    result = json.loads(run("token", "list", "--json", *where)[0])
    mine = next(one for one in result if one["description"] == name)
    assert str(mine["id"]) == number and out.strip() not in str(result)
    file = tmp_path / "successor"
    out, err = run("token", "rotate", number, f"--out={file}", *where)
    assert out == "" and f"not shown again: in {file}" in err
    assert file.read_text().startswith("activate-") and file.stat().st_mode & 0o777 == 0o600
    _, err = run("token", "list", *where)
    assert f"token {number} is replaced by token" in err
    assert run("token", "revoke", number, *where)[1] == f"token {number} is revoked\n"
    assert "has a successor" not in run("token", "rotate", number, *where, status=1)[1]
    before = len(result) + 1
    assert (
        "name a new file" in run("token", "create", "admin", f"--out={file}", *where, status=1)[1]
    )
    assert (
        "there is no cache no"
        in run("token", "create", "admin", "--cache=no", f"--out={file}-2", *where, status=1)[1]
    )
    assert not Path(f"{file}-2").exists()
    assert len(json.loads(run("token", "list", "--json", *where)[0])) == before
    run("token", "create", "agent", "--shared", f"--description={name}-shared", *where)
    table = run("token", "list", *where)[0]
    assert re.search(f"agent, shared .*{name}-shared$", table, re.M)


def test_tokens_for_many_agents(where: list[str], tmp_path: Path, name: str) -> None:
    names, directory = tmp_path / "names", tmp_path / "tokens"
    names.write_text("".join(f"{name}-{number}\n" for number in range(20)))
    many = ["token", "create", "agent", f"--names-from={names}", f"--out-dir={directory}"]
    assert "20 agent tokens" in run(*many, *where)[1]
    secrets = {(directory / f"{name}-{number}").read_text() for number in range(20)}
    assert len(secrets) == 20 and all(secret.startswith("agent-") for secret in secrets)
    listed = json.loads(run("token", "list", "--json", *where)[0])
    mine = sorted(one["agents"] for one in listed if (one["agents"] or "").startswith(f"{name}-"))
    assert mine == sorted(f"{name}-{number}" for number in range(20))
    (directory / f"{name}-0").unlink()
    assert "name a new file" in run(*many, *where, status=1)[1]  # the others are there already
    assert not (directory / f"{name}-0").exists()


@pytest.mark.long
def test_a_cache_is_made_shown_and_gets_another_key(where: list[str], tmp_path: Path) -> None:
    name, file = f"cache-{len(where)}", tmp_path / "key"
    out, err = run("cache", "create", name, "--private", *where)
    assert out.startswith(f"{name}.127.0.0.1-1:") and "public key" in err
    assert re.search(r"^public +False$", run("cache", "show", name, *where)[0], re.M)
    run("cache", "key", "rotate", name, f"--out={file}", *where)
    assert file.read_text().startswith(f"{name}.127.0.0.1-2:")
    facts = json.loads(run("cache", "show", name, "--json", *where)[0])
    assert facts["former_key"].startswith(f"{name}.127.0.0.1-1:") and facts["recent"] == []
    assert "has one key" in run("cache", "key", "retire", name, *where)[1]
    assert "there is no cache no" in run("cache", "show", "no", *where, status=1)[1]


def test_an_agent_is_moved(where: list[str], server: Server, name: str) -> None:
    shared = run("token", "create", "agent", f"--names={name}-*", *where)[0].strip()
    peer = Peer(server)
    peer.agent_token = shared
    own = peer.agent(f"{name}-1", **OURS).expect_text()["command"]["contents"]["secret"]
    peer.agent_token = own
    peer.registered(f"{name}-1", **OURS)
    listed = run("agent", "list", *where)[0]
    assert re.search(rf"^{name}-1 .* its own$", listed, re.M)
    assert "is free" in run("agent", "move", f"{name}-1", *where)[1]
    assert "is not bound" in run("agent", "move", f"{name}-1", *where)[1]


def without_times(output: tuple[str, str]) -> tuple[str, str]:
    """Output without the times of the last use, which go on."""
    return re.sub(r'"(used|seen)_on": "[^"]*"', "", output[0]), output[1]


@pytest.mark.long
def test_both_places_print_the_same(
    server: Server, token_file: Path, peer: Peer, name: str
) -> None:
    for each in ("a", "b"):
        peer.registered(f"{name}-{each}", **OURS)
    run("agent", "label", f"{name}-a", "cellar", f"--data={server.data}")
    order = peer.activate({f"{name}-a": STORE_PATHS[0], f"{name}-b": STORE_PATHS[1]})
    number = str(peer.status(order[f"{name}-a"])["run"])
    for command in (
        ["agent", "list"],
        ["agent", "list", "--label=cellar"],
        ["agent", "list", "--state=never"],
        ["agent", "show", f"{name}-a"],
        ["deployment", "list"],
        ["deployment", "show", f"{name}-a", "1"],
        ["deployment", "log", f"{name}-a", "1"],
        ["run", "list"],
        ["run", "show", number],
        ["person", "list"],
        ["token", "list"],
        ["cache", "list"],
        ["webhook", "list"],
        ["audit", "--limit=20"],
    ):
        for form in ([], ["--json"] * (command[1] != "log")):
            here = run(*command, *form, f"--data={server.data}")
            away = run(*command, *form, f"--url={server.url}", f"--token-file={token_file}")
            assert without_times(here) == without_times(away), command


def test_who_did_it_is_noted(server: Server, token_file: Path, peer: Peer, name: str) -> None:
    peer.registered(name, **OURS)
    run("agent", "pause", name, f"--data={server.data}")
    run("agent", "resume", name, f"--url={server.url}", f"--token-file={token_file}")
    entries = json.loads(run("audit", "--json", f"--data={server.data}")[0])
    mine = {entry["action"]: entry["actor"] for entry in entries if entry["detail"] == name}
    assert mine["agent pause"].startswith("command of ")
    assert mine["agent resume"].startswith("token ")


# --- from afar ------------------------------------------------------------------------------------


def test_what_is_wrong_from_afar_is_said(server: Server, token_file: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong"
    wrong.write_text("no-token")
    url = f"--url={server.url}"
    assert "unknown here" in run("agent", "list", url, f"--token-file={wrong}", status=1)[1]
    run("agent", "list", url, CACHIX_WORKSPACE_TOKEN=token_file.read_text())
    assert "there is no token" in run("agent", "list", url, status=64)[1]
    away = "--url=http://127.0.0.1:9"
    assert "can't be reached" in run("thaw", away, f"--token-file={token_file}", status=1)[1]
    err = run("thaw", f"--token-file={token_file}", f"--data={server.data}", status=64)[1]
    assert "missing or unexpected arguments" in err or "goes with --url" in err


def test_a_secret_that_can_not_be_kept_is_not_made(
    server: Server, token_file: Path, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    out.write_text("what is there already")
    afar = (f"--url={server.url}", f"--token-file={token_file}")

    def listed(**more: str) -> list[int]:
        return [one["id"] for one in json.loads(run("token", "list", "--json", *afar, **more)[0])]

    before = listed()
    _, err = run("token", "create", "admin", f"--out={out}", *afar, status=1)
    assert "File exists" in err and listed() == before
    netrc = tmp_path / ".netrc"
    netrc.write_text("machine 127.0.0.1 login x password wrong\n")
    netrc.chmod(0o600)
    assert listed(HOME=str(tmp_path)) == before


# --- where the workspace is -----------------------------------------------------------------------


@pytest.mark.long
def test_only_init_and_serve_make_a_workspace(tmp_path: Path) -> None:
    data = tmp_path / "data"
    for command in (["token", "create", "admin"], ["cache", "create", "x"], ["login-link"]):
        _, err = run(*command, f"--data={data}", status=1)
        assert f"no workspace at {data}" in err and "cachix-workspace init" in err
        assert not data.exists()
    run("init", f"--data={data}")
    run("init", f"--data={data}")
    out, _ = run("token", "create", "admin", f"--data={data}")
    assert out.startswith("admin-")


def test_the_environment_names_the_directory(tmp_path: Path) -> None:
    one, two = str(tmp_path / "one"), str(tmp_path / "two")
    run("init", STATE_DIRECTORY=f"{two}:{one}")
    run("init", CACHIX_WORKSPACE_DATA=one, STATE_DIRECTORY=two)
    assert os.path.exists(f"{one}/workspace.db") and os.path.exists(f"{two}/workspace.db")
    run("token", "list", CACHIX_WORKSPACE_DATA=one)
    if os.geteuid() == 0:
        assert "/var/lib/cachix-workspace" in run("token", "list", status=1)[1]


# --- signing in -----------------------------------------------------------------------------------


@pytest.mark.long
def test_a_terminal_shows_the_first_link_and_a_log_never_does(tmp_path: Path) -> None:
    serve = f"{sys.executable} -m cachix_workspace serve --listen=127.0.0.1:0 --data=data"
    script = ["script", "-qfec", serve, "/dev/null"]
    process = subprocess.Popen(
        script,
        cwd=tmp_path,
        env=environment(),
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout is not None
    lines = []
    for line in process.stdout:
        lines.append(line.strip())
        if "listening on" in line:
            break
    os.killpg(process.pid, 15)
    process.wait(DEADLINE)
    url = lines[-1].split()[-1]
    assert any(re.fullmatch(f"{re.escape(url)}/sign-in/[\\w-]+", line) for line in lines), lines
    out, _ = run("login-link", f"--data={tmp_path / 'data'}")
    with running() as quiet:
        assert not any("/sign-in/" in line for line in quiet.lines)
        link = run("login-link", f"--data={quiet.data}")[0].strip()
        connection = Connection(quiet.port)
        path = link.removeprefix(quiet.url)
        connection.send(f"GET {path} HTTP/1.1\r\nHost: x\r\nAccept: text/html\r\n\r\n".encode())
        assert "200" in connection.read_head()
        wait_for(lambda: True)
        assert not any("/sign-in/" in line for line in quiet.lines)
