"""Whose a token is: each endpoint for tokens of one agent, of some, of any, and of CI for some."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from workspace_support import STORE_PATHS, Connection, Peer, command, handshake, running

from cachix_protocol import UsageError
from cachix_workspace import app, tokens
from cachix_workspace.context import Workspace
from cachix_workspace.database import open_database
from cachix_workspace.hub import Hub
from cachix_workspace.life import Signs
from cachix_workspace.settings import Settings
from cachix_workspace.tokens import Token

RUNNING, SUCCEEDED = "InProgress", "Succeeded"


def token(agents: str | None, cache_id: int | None = None) -> Token:
    return Token(1, "agent", "", "", cache_id, "", None, None, agents)


@pytest.mark.parametrize(
    ("agents", "allowed", "refused"),
    [
        (None, ["web", "x.y"], []),
        ("*", ["web", "x.y"], []),
        ("web", ["web"], ["web2", "we", "", "WEB", "web\n", "xweb"]),
        ("web,db", ["web", "db"], ["web,db", "w"]),
        ("web-*", ["web-1", "web-"], ["web", "xweb-1"]),
        ("*-db", ["a-db", "-db"], ["db", "a-dbx"]),
        ("a*b*c", ["abc", "axxbyyc"], ["ab", "acb", "abcd"]),
        ("w.b", ["w.b"], ["web"]),  # a dot is a dot
    ],
)
def test_the_names_that_a_token_is_for(
    agents: str | None, allowed: list[str], refused: list[str]
) -> None:
    assert all(token(agents).allows(name) for name in allowed)
    assert not any(token(agents).allows(name) for name in refused)


@pytest.mark.parametrize("text", ["", ",", "a,", "a b", "../x", "a;b", "ü", "-a", "a" * 129, "a\n"])
def test_patterns_that_are_none(text: str) -> None:
    with pytest.raises(UsageError, match="--names must be names such as"):
        tokens.checked_patterns(text, "--names")


def test_patterns_are_kept_once() -> None:
    assert tokens.checked_patterns("web, db-*,web", "--names") == "web,db-*"


# --- a workspace with tokens of every kind --------------------------------------------------------


@pytest.fixture(scope="module")
def peer() -> Iterator[Peer]:
    with running("--public-url=http://ws.test") as server:
        yield Peer(server)


@pytest.fixture(scope="module")
def secrets(peer: Peer) -> dict[str, str]:
    """Tokens: of web, of some agents, and of CI for web alone. The peer's own are for any."""

    def create(*arguments: str) -> str:
        return peer.server.command("token", "create", *arguments).strip()

    return {
        "web": create("agent", "--name=web"),
        "some": create("agent", "--names=db-*,mail"),
        "ci-web": create("activate", "--agents=web"),
        "admin-web": create("admin", "--agents=web"),
    }


@pytest.fixture(scope="module")
def running_deployments(peer: Peer) -> dict[str, str]:
    """A deployment for each of two agents, which they have begun."""
    result = {}
    for name in ("web", "db-1"):
        peer.registered(name).close()
        result[name] = peer.activate({name: STORE_PATHS[0]})[name]
        assert peer.report(name, result[name], RUNNING).status_code == 200
    return result


def open_as(peer: Peer, secret: str, path: str, name: str) -> str:
    """Try a websocket; the status of the answer."""
    connection = Connection(peer.server.port)
    connection.send(handshake(path, secret, name=name))
    status = connection.read_head().split()[1]
    connection.close()
    return status


@pytest.mark.parametrize(
    ("secret", "name", "allowed"),
    [
        ("web", "web", True),
        ("web", "db-1", False),
        ("web", "new", False),
        ("some", "db-1", True),
        ("some", "web", False),
    ],
)
def test_every_endpoint_of_an_agent(
    peer: Peer,
    secrets: dict[str, str],
    running_deployments: dict[str, str],
    secret: str,
    name: str,
    allowed: bool,
) -> None:
    """Also where the deployment is the token's own: the name decides."""
    own = running_deployments["web" if secret == "web" else "db-1"]
    for deployment in (running_deployments.get(name, own), own):
        log = f"/api/v1/deploy/log/{deployment}"
        status = f"/api/v1/deploy/deployment/{deployment}/status"
        fits = allowed and running_deployments[name] == deployment
        headers = {"name": name}
        body = {"status": RUNNING, "time": "T"}
        answers = [
            peer.http("PUT", status, secrets[secret], json=body, headers=headers).status_code,
            peer.http("PUT", f"{log}?offset=0", secrets[secret], headers=headers).status_code,
        ]
        assert answers == [200 if fits else 403] * 2
        assert open_as(peer, secrets[secret], log, name) == ("101" if fits else "403")
        for path in ("/ws", "/ws-deployment"):
            assert open_as(peer, secrets[secret], path, name) == ("101" if allowed else "403")


def test_the_sentence_names_the_agent(peer: Peer, secrets: dict[str, str]) -> None:
    def sentence(secret: str) -> str:
        path = f"/api/v1/deploy/log/{'0' * 8}-0000-4000-8000-{'0' * 12}"
        answer = peer.http("PUT", path, secrets[secret], headers={"name": "other"})
        assert answer.status_code == 403
        return str(answer.json()["error"])

    assert sentence("web") == "this token belongs to agent web, and not for 'other'"
    assert sentence("some") == "this token is for agents db-*,mail, and not for 'other'"


@pytest.mark.parametrize("secret", ["ci-web", "admin-web"])
def test_every_endpoint_of_ci(
    peer: Peer, secrets: dict[str, str], running_deployments: dict[str, str], secret: str
) -> None:
    for name, deployment in running_deployments.items():
        fits = name == "web"
        result = 200 if fits else 404
        for path in (
            f"/api/v1/deploy/deployment/{deployment}",
            f"/api/v1/deploy/log/{deployment}?offset=0",
            f"/agents/{name}/deployments/1",
        ):
            assert peer.http("GET", path, secrets[secret]).status_code == result, path
        cancel = f"/api/v1/deploy/deployment/{deployment}/cancel"
        expected = 409 if fits else 404  # it has started
        assert peer.http("POST", cancel, secrets[secret]).status_code == expected
        view = f"/api/v1/deploy/log/{deployment}?view=true"
        assert open_as(peer, secrets[secret], view, "") == ("101" if fits else "404")
    listed = peer.http("GET", "/api/v1/deploy/deployments", secrets[secret]).json()["deployments"]
    assert {each["agent"] for each in listed} == {"web"}


def test_ci_for_one_agent_deploys_to_no_other(
    peer: Peer, secrets: dict[str, str], running_deployments: dict[str, str]
) -> None:
    def order(*names: str) -> tuple[int, str]:
        spec = {"agents": dict.fromkeys(names, STORE_PATHS[1])}
        answer = peer.http("POST", "/api/v2/deploy/activate", secrets["ci-web"], json=spec)
        return answer.status_code, answer.text

    status, text = order("web", "db-1")
    assert status == 403 and "this token is for agents web, not for db-1" in text
    assert order("web")[0] == 200


@pytest.mark.long
def test_a_token_for_one_cache(peer: Peer) -> None:
    for name in ("one", "two"):
        peer.server.command("cache", "create", name, "--private")

    def create(kind: str) -> str:
        return peer.server.command("token", "create", kind, "--cache=one").strip()

    narinfo = f"{'a' * 32}.narinfo"
    for kind in ("agent", "activate", "admin"):
        secret = create(kind)
        assert peer.http("GET", f"/cache/one/{narinfo}", secret).status_code == 404
        refused = peer.http("GET", f"/cache/two/{narinfo}", secret)
        assert refused.status_code == 403 and "another cache" in refused.json()["error"]
        nar = f"nar/{'1' * 52}.nar"
        expected = [403, 403] if kind == "agent" else [400, 403]
        assert [
            peer.http("PUT", f"/cache/{name}/{nar}", secret, data=b"x").status_code
            for name in ("one", "two")
        ] == expected


def test_the_list_says_whose_a_token_is(peer: Peer, secrets: dict[str, str]) -> None:
    listed = json.loads(peer.server.command("token", "list", "--json"))
    by_agents = {each["agents"]: each["kind"] for each in listed}
    assert by_agents["web"] in ("agent", "activate", "admin") and None in by_agents
    table = peer.server.command("token", "list")
    assert re.search(r"agent, enrols +valid +db-\*,mail ", table)
    assert re.search(r"agent, shared +valid +any ", table)


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        *[
            (["agent", f"--name={name}"], "--name must be an agent's name")
            for name in ("", "*", "a,b")
        ],
        (["agent", "--names=a b"], "--names must be names such as"),
        (["agent", "--agents=web"], "--agents does not fit this kind of token: use --name or"),
        (["activate", "--name=web"], "--name does not fit this kind of token: use --agents"),
        (["admin", "--names=web"], "--names does not fit this kind of token: use --agents"),
    ],
)
def test_options_that_do_not_fit(peer: Peer, arguments: list[str], sentence: str) -> None:
    data = f"--data={peer.server.data}"
    assert sentence in command("token", "create", *arguments, data, status=64).stderr


# --- files ----------------------------------------------------------------------------------------


def count(peer: Peer) -> int:
    return len(json.loads(peer.server.command("token", "list", "--json")))


def test_a_secret_in_a_file(peer: Peer, tmp_path: Path) -> None:
    out = tmp_path / "agent.token"
    assert peer.server.command("token", "create", "agent", "--name=web", f"--out={out}") == ""
    assert out.stat().st_mode & 0o777 == 0o600
    assert peer.agent("web", Authorization=f"Bearer {out.read_text().strip()}")
    key = tmp_path / "key"
    assert peer.server.command("cache", "create", "in-a-file", f"--out={key}") == ""
    assert key.read_text().startswith("in-a-file.ws.test-1:") and key.stat().st_mode & 0o77 == 0


@pytest.mark.parametrize("kind", ["exists", "link", "nowhere"])
@pytest.mark.long
def test_a_token_that_can_not_be_written_is_not_made(peer: Peer, tmp_path: Path, kind: str) -> None:
    out = tmp_path / ("no/where" if kind == "nowhere" else "out")
    if kind == "exists":
        out.write_text("mine")
    if kind == "link":
        out.symlink_to(tmp_path / "victim")
    before = count(peer)
    data = f"--data={peer.server.data}"
    refused = command("token", "create", "agent", f"--out={out}", data, status=1)
    assert "can't be written" in refused.stderr and refused.stdout == ""
    assert count(peer) == before and not (tmp_path / "victim").exists()
    assert kind != "exists" or out.read_text() == "mine"


@pytest.mark.long
def test_tokens_for_a_list_of_agents(peer: Peer, tmp_path: Path) -> None:
    names, directory = tmp_path / "names", tmp_path / "tokens"
    names.write_text("web\n\ndb-1\nweb\n")
    arguments = ("token", "create", "agent", f"--names-from={names}", f"--out-dir={directory}")
    peer.server.command(*arguments)
    assert sorted(path.name for path in directory.iterdir()) == ["db-1", "web"]
    assert directory.stat().st_mode & 0o777 == 0o700
    for name, other in (("web", "db-1"), ("db-1", "web")):
        secret = (directory / name).read_text().strip()
        assert open_as(peer, secret, "/ws", name) == "101"
        assert open_as(peer, secret, "/ws", other) == "403"
    before, data = count(peer), f"--data={peer.server.data}"
    (directory / "db-1").unlink()
    names.write_text("db-1\nweb\n")
    command(*arguments, data, status=1)  # the second file is there
    assert [path.name for path in directory.iterdir()] == ["web"]
    names.write_text("good\nno good\n")
    assert "not no good" in command(*arguments, data, status=1).stderr
    assert count(peer) == before and not (directory / "good").exists()


def test_a_token_is_forgotten_before_its_sockets_are_closed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    database = open_database(Settings(tmp_path), create=True)
    workspace = Workspace(Settings(tmp_path, revocation_interval=0.01), database, Hub(9), Signs())
    with database.write() as connection:
        number, _ = tokens.create(connection, tokens.AGENT)
        tokens.revoke(connection, number)
    steps: list[object] = []

    def close(ended: set[int]) -> None:
        steps.append(ended)
        raise SystemExit  # which ends the thread

    monkeypatch.setattr(workspace.hub, "token_ids", lambda: {number, number + 1})
    monkeypatch.setattr(workspace.hub, "revoke", close)
    monkeypatch.setattr(workspace.roster, "forget", lambda: steps.append("forgotten"))
    with pytest.raises(SystemExit):
        app._watch_tokens(workspace)
    assert steps == ["forgotten", {number}]
    database.close()
