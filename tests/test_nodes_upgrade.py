"""Nodes of two releases: the newer one changes the tables while the older one serves."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
from nodes_support import PATH, Nodes, assert_all_is_there, at_work
from workspace_support import DEADLINE, OURS, ROOT, environment, wait_for

from cachix_workspace import database

pytestmark = [pytest.mark.long, pytest.mark.slow]
EARLIER = ROOT / "tests" / "releases" / "8cb51e2.tar.xz"
NEXT = database.SCHEMA + 1
MIGRATION = f'''
"""A column that may be null, and a table."""
import sqlalchemy as sa
from alembic import op
revision, down_revision = "{NEXT}", "{NEXT - 1}"
def upgrade():
    op.add_column("agents", sa.Column("later", sa.String()))
    op.add_column("deployments", sa.Column("later", sa.String()))
    op.create_table("later", sa.Column("id", sa.Integer, primary_key=True))
'''


@pytest.fixture
def nodes(tmp_path: Path) -> Iterator[Nodes]:
    with Nodes(tmp_path / "nodes", count=2) as nodes:
        yield nodes


@pytest.fixture
def earlier(tmp_path: Path) -> Path:
    """A directory with the workspace of an earlier release."""
    with tarfile.open(EARLIER) as archive:
        archive.extractall(tmp_path / "earlier")
    return tmp_path / "earlier"


@pytest.fixture
def later(tmp_path: Path) -> Path:
    """A directory with a workspace like this one, but for its schema, which is newer."""
    place = tmp_path / "later"
    shutil.copytree(ROOT / "cachix_workspace", place / "cachix_workspace")
    module = place / "cachix_workspace" / "database.py"
    text, count = re.subn(r"(?m)^SCHEMA = \d+", f"SCHEMA = {NEXT}", module.read_text())
    assert count == 1
    module.write_text(text)
    versions = place / "cachix_workspace" / "migrations" / "versions"
    versions.joinpath(f"{NEXT}_later.py").write_text(MIGRATION)
    return place


def test_nodes_are_upgraded_one_after_the_other(nodes: Nodes, earlier: Path, later: Path) -> None:
    first, second = nodes.servers
    for node in nodes.servers:
        node.run_from(earlier)
    with at_work(nodes, 6) as (agents, ci):
        wait_for(lambda: len(ci.accepted) > 5, 30)
        first.run_from(later)
        assert any(f"the database gets schema {NEXT}" in line for line in first.lines)
        older = nodes.peer_of(1)
        agent = older.registered("between", **OURS)
        deployment = nodes.peer_of(0).activate({"between": PATH})["between"]
        assert agent.expect_text()["command"]["contents"]["id"] == deployment
        assert older.report("between", deployment, "InProgress").status_code == 200
        before = len(ci.accepted)
        wait_for(lambda: len(ci.accepted) > before + 5, 30)
        second.run_from(later)
        assert nodes.peer_of(1).report("between", deployment, "Succeeded").status_code == 200
        assert_all_is_there(nodes, agents, ci)


def test_a_node_that_is_older_than_the_tables_ends_with_one_sentence(nodes: Nodes) -> None:
    first, second = nodes.servers
    name = nodes.database.partition("@/")[2].partition("?")[0]
    for key, value in (("version", str(NEXT)), ("program", "9.8.7")):
        nodes.cluster.sql(name, f"UPDATE meta SET value = '{value}' WHERE key = '{key}'")
    peer = nodes.peer_of(0)
    peer.registered("goes-on", **OURS).close()  # a node that serves goes on
    sentence = f"the database has schema {NEXT}, and this program"
    serve = ["serve", f"--data={second.data}", "--listen=127.0.0.1:0", "--cache-shared"]
    argv = [sys.executable, "-m", "cachix_workspace", *serve, f"--cache-directory={nodes.caches}"]
    second.stop()
    process = subprocess.run(
        argv, env=environment(), capture_output=True, text=True, timeout=60, check=False
    )
    assert process.returncode == 1 and process.stderr.count("\n") == 1, process.stderr
    assert process.stderr.startswith(f"error: {sentence}") and "9.8.7" in process.stderr
    [worker] = subprocess.check_output(["pgrep", "-P", str(first.process.pid)]).split()
    os.kill(int(worker), signal.SIGKILL)  # the next one finds the new tables
    assert first.process.wait(DEADLINE) != 0
    assert [line for line in first.lines if sentence in line] and nodes.tracebacks() == []
