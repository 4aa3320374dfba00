"""The database of an earlier, and of a later, release."""

from __future__ import annotations

import contextlib
import sqlite3
from pathlib import Path

import pytest
from alembic.config import Config
from alembic.script import ScriptDirectory
from sqlalchemy import Connection, inspect
from workspace_support import OURS, ROOT, STORE_PATHS, Peer, Server

from cachix_protocol import Error, __version__
from cachix_workspace import database
from cachix_workspace.database import open_database
from cachix_workspace.settings import Settings

pytestmark = pytest.mark.sqlite

RUNNING, SUCCEEDED, FAILED = "InProgress", "Succeeded", "Failed"


def earlier(data: Path) -> None:
    """Make the database of schema 1, as its program did."""
    data.mkdir(mode=0o700)
    with contextlib.closing(sqlite3.connect(data / "workspace.db")) as connection:
        connection.executescript((ROOT / "tests" / "schemas" / "1.sql").read_text())


def structure(data: Path) -> dict[str, object]:
    """The columns and indexes of each table."""
    database = open_database(Settings(data), create=True)
    result = inspect(database.engine)
    tables = {
        name: (
            {
                column["name"]: (str(column["type"]), column["nullable"], column["primary_key"])
                for column in result.get_columns(name)
            },
            result.get_indexes(name),
            result.get_unique_constraints(name),
        )
        for name in result.get_table_names()
        if name != "alembic_version"  # Alembic's own note, made with the first migration
    }
    database.close()
    return dict(tables)


def test_an_upgraded_database_is_like_a_new_one(tmp_path: Path) -> None:
    earlier(tmp_path / "earlier")
    assert structure(tmp_path / "earlier") == structure(tmp_path / "new")


def test_an_upgrade_that_is_interrupted_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(connection: Connection, *_: object) -> None:
        raise Error("the power failed")

    data = tmp_path / "data"
    earlier(data)
    with contextlib.closing(sqlite3.connect(data / "workspace.db")) as connection:
        before = list(connection.iterdump())
    with monkeypatch.context() as patch:
        patch.setattr("cachix_workspace.database.put_meta", fail)
        with pytest.raises(Error, match="the power failed"):
            open_database(Settings(data))
    with contextlib.closing(sqlite3.connect(data / "workspace.db")) as connection:
        assert list(connection.iterdump()) == before
    open_database(Settings(data)).close()


def test_a_database_of_schema_1_keeps_everything(tmp_path: Path) -> None:
    data = tmp_path / "data"
    earlier(data)
    server = Server(data)
    try:
        peer = Peer(server)
        failed, deployment = [
            peer.http("GET", f"/agents/web/deployments/{index}").json() for index in (1, 2)
        ]
        assert (failed["status"], failed["reason"], failed["closureSize"]) == (
            FAILED,
            "it failed",
            4711,
        )
        assert (deployment["status"], deployment["step"]) == (RUNNING, None)
        assert (deployment["agentVersion"], deployment["agentOnline"]) == (None, False)
        assert peer.lines(deployment["id"]) == ["a line"]
        agent = peer.registered("web", **OURS)
        contents = agent.expect_text()["command"]["contents"]
        assert (contents["id"], contents["resumed"]) == (deployment["id"], True)
        assert contents["rollbackScript"] == f"/nix/store/{'c' * 32}-script"
        peer.report("web", deployment["id"], SUCCEEDED, outcome="succeeded")
        facts = peer.status(deployment["id"])
        assert (facts["outcome"], facts["agentVersion"]) == ("succeeded", "0.1.0")
        assert peer.status(peer.activate({"web": STORE_PATHS[0]})["web"])["index"] == 3
    finally:
        server.kill()


def test_the_newest_schema_is_that_of_the_newest_migration() -> None:
    config = Config()
    config.set_main_option("script_location", str(database.MIGRATIONS))
    assert ScriptDirectory.from_config(config).get_current_head() == str(database.SCHEMA)


def test_a_backup_is_made_before_a_migration(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = tmp_path / "data"
    earlier(data)
    with contextlib.closing(sqlite3.connect(data / "workspace.db")) as connection:
        before = list(connection.iterdump())
    open_database(Settings(data)).close()
    backup = data / "workspace.db.schema-1"
    assert backup.stat().st_mode & 0o777 == 0o600 and str(backup) in capsys.readouterr().err
    with contextlib.closing(sqlite3.connect(backup)) as connection:
        assert list(connection.iterdump()) == before
    open_database(Settings(data)).close()
    assert capsys.readouterr().err == ""


def test_a_new_database_needs_no_backup(tmp_path: Path) -> None:
    open_database(Settings(tmp_path / "data"), create=True).close()
    assert [path.name for path in tmp_path.glob("data/*schema*")] == []


@pytest.mark.parametrize(
    ("program", "remedy"),
    [("9.8.7", "cachix-workspace 9.8.7 or newer"), (None, "a newer cachix-workspace")],
)
def test_an_older_program_says_which_one_to_use(
    tmp_path: Path, program: str | None, remedy: str
) -> None:
    settings = Settings(tmp_path / "data")
    emptied = open_database(settings, create=True)
    with emptied.write() as connection:
        assert database.get_meta(connection, "program") == __version__
        database.put_meta(connection, "version", "99")
        database.put_meta(connection, "program", program or "")
    emptied.close()
    with pytest.raises(Error, match=f"schema 99, and this program, .*: use {remedy}"):
        open_database(settings)
