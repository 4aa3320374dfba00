"""The workspace's decisions, without a server."""

from __future__ import annotations

import base64
import configparser
import contextlib
import io
import json
import re
from pathlib import Path

import pytest
from gunicorn.http.unreader import Unreader
from gunicorn.workers.gthread import ThreadWorker
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection
from workspace_support import ROOT, STORE_PATHS

from cachix_cache import offer
from cachix_protocol import Error, Spec, Undecodable, loads
from cachix_workspace import agents, cache, deployments, logs, orders, tokens
from cachix_workspace.database import Database, open_database, put_meta
from cachix_workspace.deployments import DeploymentRow, Open
from cachix_workspace.orders import Actor
from cachix_workspace.refusal import Refusal
from cachix_workspace.reports import Report, transition
from cachix_workspace.server import WorkspaceWorker
from cachix_workspace.settings import Settings

P, R, S, F, C = "Pending", "InProgress", "Succeeded", "Failed", "Cancelled"
TIME = "2026-11-24T01:00:00.123456789Z"


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(Settings(tmp_path), create=True)


@pytest.mark.parametrize("current", [P, R, S, F, C])
@pytest.mark.parametrize("reported", [R, S, F])
def test_transitions(current: str, reported: str) -> None:
    expected = reported if current in (P, R, reported) else None
    assert transition(current, reported) == expected


def deploy(connection: Connection, name: str = "web", path: int = 0) -> DeploymentRow:
    spec = Spec({name: STORE_PATHS[path]}, {})
    return orders.order(connection, spec, Actor("CI")).rows[name]


def report(connection: Connection, row: DeploymentRow, status: str) -> tuple[DeploymentRow, bool]:
    current = deployments.find(connection, row.id, lock=True)
    return deployments.apply_report(connection, current, Report(status, TIME))


def test_the_life_of_a_deployment(database: Database) -> None:
    with database.write() as c:
        agent = agents.register(c, "web", "x86_64-linux", "1")
        first, second = deploy(c), deploy(c, path=1)
        assert (first.index, second.index) == (1, 2)
        replaced = deployments.find(c, first.id)
        assert (replaced.status, replaced.reason) == (C, "replaced by deployment 2")
        assert deployments.find_open(c, [agent.id])[agent.id] == Open(None, second)
        assert not deployments.to_wire(second).resumed
        running, accepted = report(c, second, R)
        assert accepted and running.started_on == TIME
        third = deploy(c, path=2)
        assert deployments.find_open(c, [agent.id])[agent.id] == Open(running, third)
        assert deployments.to_wire(running).resumed
        ended, _ = report(c, second, S)
        assert (ended.status, report(c, second, S)) == (S, (ended, True))
        assert report(c, second, F) == (ended, False)
        assert deployments.find_open(c, [agent.id])[agent.id] == Open(None, third)


def test_a_newer_start_fails_an_older_deployment_in_progress(database: Database) -> None:
    with database.write() as c:
        agents.register(c, "web", "x86_64-linux", "1")
        first = deploy(c)
        report(c, first, R)
        report(c, deploy(c, path=1), R)
        older = deployments.find(c, first.id)
        assert older.status == F and older.reason is not None
        assert "went on to deployment 2" in older.reason


@pytest.mark.parametrize("status", [S, F])
def test_an_end_that_is_reported_late_counts(database: Database, status: str) -> None:
    """The report of the newer deployment overtook it, or it came back after a silence."""
    with database.write() as c:
        agents.register(c, "web", "x86_64-linux", "1")
        first = deploy(c)
        report(c, first, R)
        second = deploy(c, path=1)
        report(c, second, R)
        assert deployments.find(c, first.id).outcome == "unreported"
        assert report(c, first, R)[1] is False, "it may not go on"
        report(c, second, S)
        late = Report(status, TIME, reason="why", outcome="rolled-back")
        ended, accepted = deployments.apply_report(c, first, late)
        assert accepted and (ended.status, ended.reason) == (status, "why")
        assert (ended.outcome, ended.finished_on) == ("rolled-back", TIME)
        assert report(c, first, R)[1] is False
        (agent,) = agents.list_all(c)
        assert agent.deployed == second.store_path, "the newer one came after it"


def test_a_wrong_time_is_replaced_by_ours(database: Database) -> None:
    with database.write() as c:
        agents.register(c, "web", "x86_64-linux", "1")
        row, _ = deployments.apply_report(c, deploy(c), Report(R, "yesterday\n" * 1000))
        assert row.started_on is not None and deployments.TIME.fullmatch(row.started_on)


def test_a_reason_is_made_storable() -> None:
    record = {"status": F, "time": TIME, "closureSize": 1, "reason": "a\0b\ud800"}
    assert Report.from_json(record) == Report(F, TIME, 1, "a\N{REPLACEMENT CHARACTER}b?")


# --- tokens ---------------------------------------------------------------------------------------


def test_tokens_are_hashed_and_end(database: Database) -> None:
    with database.write() as c:
        number, secret = tokens.create(c, "agent", "for web")
        _, expired = tokens.create(c, "agent", expires_in=0)
        assert secret not in repr(tokens.list_all(c))
        assert tokens.authenticate(c, f"Bearer {secret}", tokens.AGENTS).id == number
        basic = base64.b64encode(f":{secret}".encode()).decode()
        assert tokens.authenticate(c, f"Basic {basic}", tokens.ANY).id == number
        sentence = "needs an activate token or an admin token, and yours is an agent token"
        with pytest.raises(Refusal, match=sentence) as e:
            tokens.authenticate(c, f"Bearer {secret}", tokens.CI)
        assert e.value.code == 403
        assert tokens.invalid_ids(c) == {2}
        assert tokens.revoke(c, number) and tokens.revoke(c, number) and not tokens.revoke(c, 99)
        wrong = {secret: "revoked", expired: "expired", "x": "unknown", "": "send it as"}
        for token, reason in wrong.items():
            with pytest.raises(Refusal, match=reason) as e:
                tokens.authenticate(c, f"Bearer {token}", tokens.AGENTS)
            assert e.value.code == 401


@given(st.text())
def test_any_authorization_is_read(text: str) -> None:
    secret = tokens.secret_of(text)
    assert secret is None or isinstance(tokens.digest(secret), str)


# --- logs -----------------------------------------------------------------------------------------


@given(st.binary())
def test_any_log_is_decoded_or_refused(body: bytes) -> None:
    with contextlib.suppress(Undecodable):
        logs.decode_many(body)


@given(st.lists(st.text(), max_size=20), st.text())
def test_lines_survive(lines: list[str], more: str) -> None:
    records = [{"line": line, "time": "T"} for line in lines]
    body = "".join(json.dumps({**record, "more": more}) + "\n" for record in records)
    assert [loads(line) for line in logs.decode_many(body.encode())] == records


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert loads(logs.decode('{"line":"a\\ud800b\\u0000","time":"T"}'))["line"] == "a?b\0"


def test_appending_by_offset(database: Database) -> None:
    def append(offset: int | None, *lines: str) -> int:
        current = deployments.find(c, row.id, lock=True)
        return logs.append(c, current, offset, [json.dumps(line) for line in lines])

    with database.write() as c:
        agents.register(c, "web", "x86_64-linux", "1")
        row = deploy(c)
        assert append(0, "a", "b") == 2
        assert append(0, "a", "b", "c") == 3
        assert append(1, "b") == 3
        assert append(0) == 3
        with pytest.raises(logs.Gap) as gap:
            append(4, "e")
        assert gap.value.next == 3
        assert append(None, "d", "e") == 5
        lines = [json.dumps(line) for line in "abcde"]
        for offset in range(7):
            assert logs.read(c, row.id, offset) == lines[offset:]


def test_chunks_are_bounded() -> None:
    chunks = logs.split(["x" * 1000] * 5000 + ["y" * (1 << 20)])
    assert sum(map(len, chunks)) == 5001
    assert all(len(chunk) <= 1000 and sum(map(len, chunk)) <= 1 << 18 for chunk in chunks[:-1])


# --- database -------------------------------------------------------------------------------------


def test_a_database_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    database = open_database(Settings(tmp_path), create=True)
    with database.write() as c:
        put_meta(c, "version", "99")
    with pytest.raises(Error, match="schema 99"):
        open_database(Settings(tmp_path))


# --- libraries ------------------------------------------------------------------------------------


def test_the_internals_that_are_overridden_exist() -> None:
    worker = ("init_process", "handle_exit", "handle_quit", "is_parent_alive", "accept")
    for name in (*worker, "run", "handle_request"):
        assert name in vars(WorkspaceWorker) and callable(getattr(ThreadWorker, name)), name
    assert isinstance(Unreader().buf, io.BytesIO)  # what was read beyond a request


@pytest.mark.parametrize("library", ["gunicorn", "wsproto"])
def test_libraries_with_overridden_internals_are_bounded(library: str) -> None:
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg", encoding="utf-8")
    needed = config["options.extras_require"]["workspace"].splitlines()
    assert any(re.fullmatch(rf"{library} >=[\d.]+,(!=[\d.*]+,)*<\d+", line) for line in needed), (
        needed
    )


# --- caches ---------------------------------------------------------------------------------------


def test_the_name_of_a_key_has_no_colon(database: Database) -> None:
    """To Nix the name of a key ends at its first colon."""
    settings = Settings(Path("/x"), "http://[fd00::1]:8080")
    with database.write() as c:
        row, secret = cache.create(c, "mycache", True, settings)
        wire = cache.find_for_agent(c, None, settings, "[fd00::1]:8080")
    assert secret.startswith("mycache.fd00--1-1:") and secret.count(":") == 1
    assert wire is not None
    assert offer("http://[fd00::1]:8080", wire).keys == (row.key,)


def test_both_kinds_of_agent_find_the_same_key(database: Database) -> None:
    settings = Settings(Path("/x"), "https://deploy.example.org:8443/sub")
    with database.write() as c:
        row, secret = cache.create(c, "mycache", True, settings)
        derivable = cache.find_for_agent(c, None, settings, "deploy.example.org:8443")
        elsewhere = cache.find_for_agent(c, None, settings, "10.0.0.1:8080")
    assert secret.startswith("mycache.deploy.example.org-1:")
    assert len(base64.b64decode(secret.partition(":")[2])) == 64
    assert derivable is not None and elsewhere is not None
    ours = offer("https://deploy.example.org:8443/sub", derivable)
    # Cachix's agent derives the name of the key
    assert row.key == f"mycache.deploy.example.org-1:{derivable.public_key}"
    assert ours.keys == (row.key,)
    assert ours.url == "https://deploy.example.org:8443/sub/cache/mycache"
    assert offer("http://10.0.0.1:8080", elsewhere).keys == (row.key,)


@pytest.mark.parametrize(
    ("name", "good"),
    [
        ("a" * 32 + ".narinfo", True),
        ("nar/" + "1" * 52 + ".nar", True),
        ("nar/" + "1" * 52 + ".nar.xz", True),
        ("nar/" + "1" * 52 + ".nar.zst", True),
        ("e" * 32 + ".narinfo", False),
        ("../" + "a" * 32 + ".narinfo", False),
        ("nar/../../../etc/passwd", False),
        ("nar/" + "1" * 52 + ".nar/x", False),
        ("log/" + "a" * 32 + "-x.drv", False),
        ("a" * 32 + ".narinfo\n", False),
        ("", False),
    ],
)
def test_file_names(name: str, good: bool) -> None:
    assert cache.is_file_name(name) == good
