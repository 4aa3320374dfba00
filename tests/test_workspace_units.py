"""The workspace's decisions, without a server."""

from __future__ import annotations

import base64
import contextlib
import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from sqlalchemy import Connection
from workspace_support import STORE_PATHS

from cachix_connection import Peer
from cachix_protocol import Spec, Undecodable, loads
from cachix_workspace import (
    Error,
    Refusal,
    Settings,
    UsageError,
    cache,
    deployments,
    logs,
    tables,
    tokens,
)
from cachix_workspace.__main__ import main, parse, public_url
from cachix_workspace.tables import Database, open_database

P, R, S, F, C = "Pending", "InProgress", "Succeeded", "Failed", "Cancelled"


@pytest.fixture
def database(tmp_path: Path) -> Database:
    return open_database(Settings(tmp_path), create=True)


@pytest.mark.parametrize(
    ("current", "reported", "expected"),
    [
        (P, R, R), (P, S, S), (P, F, F),
        (R, R, R), (R, S, S), (R, F, F),
        (S, R, None), (S, S, S), (S, F, None),
        (F, R, None), (F, S, None), (F, F, F),
        (C, R, None), (C, S, None), (C, F, None),
    ],
)  # fmt: skip
def test_transitions(current: str, reported: str, expected: str | None) -> None:
    assert deployments.transition(current, reported) == expected


def deploy(connection: Connection, name: str = "web", path: int = 0) -> deployments.Record:
    return deployments.activate(connection, Spec({name: STORE_PATHS[path]}, {})).records[name]


def tell(
    connection: Connection, record: deployments.Record, status: str
) -> tuple[deployments.Record, bool]:
    found = deployments.find(connection, record.id, lock=True)
    return deployments.report(
        connection, found, deployments.Report(status, "2026-11-24T01:00:00.123456789Z")
    )


def test_the_life_of_a_deployment(database: Database) -> None:
    with database.write() as c:
        agent = deployments.register(c, "web", "x86_64-linux", "1")
        first, second = deploy(c), deploy(c, path=1)
        assert (first.index, second.index) == (1, 2)
        replaced = deployments.find(c, first.id)
        assert (replaced.status, replaced.reason) == (C, "replaced by deployment 2")
        order = deployments.due(c, agent.id, registering=False)
        assert order is not None and (order.id, order.resumed) == (second.id, False)
        running, accepted = tell(c, second, R)
        assert accepted and running.started_on == "2026-11-24T01:00:00.123456789Z"
        third = deploy(c, path=2)
        assert deployments.due(c, agent.id, registering=False) is None
        again = deployments.due(c, agent.id, registering=True)
        assert again is not None and (again.id, again.resumed) == (second.id, True)
        ended, _ = tell(c, second, S)
        assert (ended.status, tell(c, second, S)) == (S, (ended, True))
        assert tell(c, second, F) == (ended, False)
        following = deployments.due(c, agent.id, registering=False)
        assert following is not None and following.id == third.id


def test_an_agent_that_went_on_has_ended_what_it_left(database: Database) -> None:
    with database.write() as c:
        deployments.register(c, "web", "x86_64-linux", "1")
        first = deploy(c)
        tell(c, first, R)
        second = deploy(c, path=1)
        tell(c, second, R)
        left = deployments.find(c, first.id)
        assert (
            left.status == F
            and left.reason is not None
            and "went on to deployment 2" in left.reason
        )


def test_a_wrong_time_is_replaced_by_ours(database: Database) -> None:
    with database.write() as c:
        deployments.register(c, "web", "x86_64-linux", "1")
        report = deployments.Report(R, "yesterday\n" * 1000)
        record, _ = deployments.report(c, deploy(c), report)
        assert record.started_on is not None and deployments.TIME.fullmatch(record.started_on)


def test_tokens_are_hashed_and_end(database: Database) -> None:
    with database.write() as c:
        number, secret = tokens.create(c, "agent", "for web")
        _, expired = tokens.create(c, "agent", expires_in=0)
        assert secret not in repr(tokens.everyone(c))
        assert tokens.authenticate(c, f"Bearer {secret}", tokens.MACHINE).id == number
        basic = base64.b64encode(f":{secret}".encode()).decode()
        assert tokens.authenticate(c, f"Basic {basic}", tokens.ANY).id == number
        with pytest.raises(
            Refusal, match="needs an activate token or an admin token, and yours is an agent token"
        ) as e:
            tokens.authenticate(c, f"Bearer {secret}", tokens.CI)
        assert e.value.code == 403
        assert tokens.invalid_ids(c) == {2}
        assert tokens.revoke(c, number) and tokens.revoke(c, number) and not tokens.revoke(c, 99)
        for wrong, reason in (
            (secret, "revoked"),
            (expired, "expired"),
            ("x", "unknown"),
            ("", "send it as"),
        ):
            with pytest.raises(Refusal, match=reason) as e:
                tokens.authenticate(c, f"Bearer {wrong}", tokens.MACHINE)
            assert e.value.code == 401


@given(st.text())
def test_any_authorization_is_read(text: str) -> None:
    secret = tokens.secret_of(text)
    assert secret is None or isinstance(tokens.digest(secret), str)


@given(st.binary())
def test_any_log_is_decoded_or_refused(body: bytes) -> None:
    with contextlib.suppress(Undecodable):
        logs.decode_many(body)


@given(st.lists(st.text(), max_size=20), st.text())
def test_lines_survive(lines: list[str], more: str) -> None:
    body = "".join(
        json.dumps({"line": line, "time": "T", "more": more}) + "\n" for line in lines
    ).encode()
    assert [loads(line) for line in logs.decode_many(body)] == [
        {"line": line, "time": "T"} for line in lines
    ]


def test_half_a_surrogate_pair_is_replaced() -> None:
    assert loads(logs.decode('{"line":"a\\ud800b\\u0000","time":"T"}'))["line"] == "a?b\0"


def test_appending_by_offset(database: Database) -> None:
    def append(offset: int | None, *lines: str) -> int:
        found = deployments.find(c, record.id, lock=True)
        return logs.append(c, found, offset, [json.dumps(line) for line in lines])

    with database.write() as c:
        deployments.register(c, "web", "x86_64-linux", "1")
        record = deploy(c)
        assert append(0, "a", "b") == 2
        assert append(0, "a", "b", "c") == 3
        assert append(1, "b") == 3
        assert append(0) == 3
        with pytest.raises(logs.Gap) as gap:
            append(4, "e")
        assert gap.value.next == 3
        assert append(None, "d", "e") == 5
        for offset in range(7):
            assert (
                logs.read(c, record.id, offset) == [json.dumps(line) for line in "abcde"][offset:]
            )


def test_chunks_are_bounded() -> None:
    pieces = logs.chunks(["x" * 1000] * 5000 + ["y" * (1 << 20)])
    assert sum(map(len, pieces)) == 5001
    assert all(len(piece) <= 1000 and sum(map(len, piece)) <= 1 << 18 for piece in pieces[:-1])


def test_a_database_of_a_newer_program_is_left_alone(tmp_path: Path) -> None:
    database = open_database(Settings(tmp_path), create=True)
    with database.write() as c:
        tables.put_meta(c, "version", "99")
    with pytest.raises(Error, match="schema 99"):
        open_database(Settings(tmp_path))


def test_both_kinds_of_agent_find_the_same_key(database: Database) -> None:
    settings = Settings(Path("/x"), "https://deploy.example.org:8443/sub")
    with database.write() as c:
        made, secret = cache.create(c, "mycache", True, settings)
        told = cache.for_agent(c, None, settings, "deploy.example.org:8443")
        elsewhere = cache.for_agent(c, None, settings, "10.0.0.1:8080")
    assert (
        secret.startswith("mycache.deploy.example.org-1:")
        and len(base64.b64decode(secret.partition(":")[2])) == 64
    )
    assert told is not None and elsewhere is not None
    ours = Peer.create("https://deploy.example.org:8443/sub", "t", "web")
    assert (
        ours.public_key(told) == made.key == f"mycache.deploy.example.org-1:{told.public_key}"
    )  # Cachix's rule
    assert ours.substituter(told) == "https://deploy.example.org:8443/sub/cache/mycache"
    assert Peer.create("http://10.0.0.1:8080", "t", "web").public_key(elsewhere) == made.key


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


@pytest.mark.parametrize("missing", ["StorePath", "URL", "NarHash", None])
def test_narinfo(missing: str | None) -> None:
    fields = {
        "StorePath": STORE_PATHS[0],
        "URL": "nar/" + "1" * 52 + ".nar.xz",
        "NarHash": "sha256:" + "1" * 52,
    }
    content = "".join(
        f"{name}: {value}\n" for name, value in fields.items() if name != missing
    ).encode()
    if missing is None:
        cache.check_narinfo("a" * 32 + ".narinfo", content)
        with pytest.raises(Refusal, match="StorePath"):
            cache.check_narinfo("b" * 32 + ".narinfo", content)
    else:
        with pytest.raises(Refusal, match=missing):
            cache.check_narinfo("a" * 32 + ".narinfo", content)


# --- command line ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [
        (["serve", "--lis=127.0.0.1:1"], "no option --lis"),
        (["serve", "--listen"], "requires argument"),
        (["serve", "--listen=x"], "HOST:PORT"),
        (["serve", "--public-url=ftp://x"], "--public-url must be"),
        (["serve", "--max-connections=none"], "--max-connections must be"),
        (["token", "create"], "fit no form"),
        (["token", "create", "agent", "--expires=never"], "--expires must be"),
        (["token", "revoke", "x"], "ID is a number"),
        ([], "fit no form"),
    ],
)
def test_wrong_usage(
    argv: list[str], sentence: str, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    assert main([*([f"--data={tmp_path}"] if argv else []), *argv]) == 64
    shown = capsys.readouterr()
    assert (
        shown.err.startswith("error: ")
        and sentence in shown.err
        and shown.err.count("\n") == 1
        and not shown.out
    )


@given(
    st.lists(
        st.sampled_from(
            [
                "serve",
                "token",
                "create",
                "agent",
                "--data",
                "--json",
                "-h",
                "--",
                "x",
                "--x=y",
                "-x",
            ]
        )
    )
)
def test_the_front_never_raises_anything_else(argv: list[str]) -> None:
    with contextlib.suppress(UsageError):
        parse(argv)


def test_public_urls() -> None:
    assert public_url("https://x.org/sub/") == "https://x.org/sub"
    for wrong in ("x.org", "https://", "https://u@x.org", "https://x.org?a", "http://x:99999"):
        with pytest.raises(UsageError):
            public_url(wrong)


def test_a_person_makes_tokens_and_a_cache(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = f"--data={tmp_path / 'new'}"
    assert main(["token", "list", data]) == 1
    assert "there is no workspace" in capsys.readouterr().err
    assert main(["cache", "create", "mine", "--public-url=https://x.org", data]) == 0
    shown = capsys.readouterr()
    assert shown.out.startswith("mine.x.org-1:") and shown.out.count("\n") == 1
    assert main(["cache", "create", "mine", data]) == 1
    assert main(["cache", "create", "Not/good", data]) == 1
    assert main(["cache", "show", "other", data]) == 1
    assert main(["token", "create", "agent", "--cache=other", data]) == 1
    assert all(line.startswith("error: ") for line in capsys.readouterr().err.splitlines())
    assert (
        main(
            ["token", "create", "agent", "--cache=mine", "--expires=30", "--description=web", data]
        )
        == 0
    )
    secret = capsys.readouterr().out
    assert secret.startswith("agent-") and secret.count("\n") == 1
    assert main(["token", "list", "--json", data]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [(token["id"], token["kind"], token["state"]) for token in listed] == [
        (1, "agent", "valid")
    ]
    assert "hash" not in listed[0]
    assert main(["token", "revoke", "1", data]) == 0 and main(["token", "revoke", "7", data]) == 1
    assert (tmp_path / "new").stat().st_mode & 0o777 == 0o700
