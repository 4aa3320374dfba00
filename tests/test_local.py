"""Other users of the machine: directories that are theirs, links that they have planted, modes."""

import os
import stat

import pytest

from activate import files, journal, lock, logfile
from cachix_reports import Reported

pytestmark = pytest.mark.promise(11, 12)
as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root can give files away")


def mode(path):
    return stat.S_IMODE(os.stat(path).st_mode)


@pytest.fixture
def victim(tmp_path):
    path = tmp_path / "victim"
    path.write_text("important")
    yield path
    assert path.read_text() == "important" and mode(path) == 0o644


@pytest.fixture(autouse=True)
def umask():
    before = os.umask(0o022)
    yield
    os.umask(before)


def test_no_lock_follows_a_link(tmp_path, victim):
    path = tmp_path / "locks" / "a.lock"
    path.parent.mkdir()
    for target in (victim, tmp_path / "made-by-root"):
        path.unlink(missing_ok=True)
        path.symlink_to(target)
        with pytest.raises(OSError, match="symbolic links"):
            lock.take(str(path))
    assert not (tmp_path / "made-by-root").exists()


@as_root
def test_no_lock_lies_in_a_directory_of_another_user(tmp_path):
    directory = tmp_path / "locks"
    directory.mkdir()
    os.chown(directory, 54321, 54321)
    with pytest.raises(PermissionError, match="belongs to user 54321"):
        lock.take(str(directory / "a.lock"))
    assert list(directory.iterdir()) == []


def test_a_lock_is_private(tmp_path):
    os.umask(0)
    lock.take(str(tmp_path / "new" / "a.lock")).close()
    assert mode(tmp_path / "new" / "a.lock") == 0o600 and mode(tmp_path / "new") == 0o700


def test_a_file_that_is_replaced_follows_no_link(tmp_path, victim):
    (tmp_path / "journal.json.new").symlink_to(victim)
    files.write_durably(str(tmp_path / "journal.json"), b"new")
    assert (tmp_path / "journal.json").read_bytes() == b"new"
    assert mode(tmp_path / "journal.json") == 0o600


def entry_in(tmp_path):
    record = journal.Record(id="id", index=1, agent="web", host="h", store_path="/nix/store/x")
    entry = journal.Journal(str(tmp_path / "id"), record)
    entry.enter(journal.RECEIVED)
    return entry


def test_a_log_follows_no_link(tmp_path, victim, capsys):
    entry = entry_in(tmp_path)
    os.symlink(victim, entry.path("log"))
    os.write(log := logfile.open_log(entry), b"lost")
    os.close(log)
    assert "is lost" in capsys.readouterr().err
    os.unlink(entry.path("log"))
    os.close(logfile.open_log(entry))
    assert mode(entry.path("log")) == 0o600


def test_the_file_of_a_report_is_private(tmp_path):
    os.umask(0)
    path = str(tmp_path / "reported.json")
    with open(path, "w", opener=logfile.private) as file:
        file.write("{}")
    assert mode(path) == 0o600 and not Reported.load(path).whole


@pytest.mark.parametrize(
    ("before", "says"), [(0o700, False), (0o755, False), (0o775, True), (0o777, True)]
)
def test_the_state_is_made_private(tmp_path, before, says):
    directory = tmp_path / "state"
    directory.mkdir()
    directory.chmod(before)
    assert ("others could write" in files.make_private(str(directory))) == says
    assert mode(directory) == 0o700


@as_root
def test_the_state_of_another_user_is_spoken_of(tmp_path):
    os.chown(tmp_path, 54321, 54321)
    assert "belongs to user 54321" in files.make_private(str(tmp_path))
    os.chown(tmp_path, 0, 0)


@as_root
def test_an_agent_repairs_its_state(host, live, name):
    host.state.mkdir(parents=True, exist_ok=True)
    host.state.chmod(0o777)
    agent = host.agent(name, live.url, live.token("agent"))
    agent.wait_for("is connected to")
    assert "others could write to" in agent.text() and mode(host.state) == 0o700
    assert mode(host.state / "deployments") == 0o700
    assert agent.stop() == 0


def test_the_database_is_private(tmp_path):
    from cachix_workspace.database import open_database, put_meta
    from cachix_workspace.settings import Settings

    settings = Settings(tmp_path / "data")
    database = open_database(settings, create=True)
    with database.write() as connection:
        put_meta(connection, "a", "b")
    (tmp_path / "data" / "workspace.db").chmod(0o644)
    again = open_database(settings)
    modes = {path.name: mode(path) for path in (tmp_path / "data").iterdir()}
    assert set(modes.values()) == {0o600} and len(modes) >= 2, modes
    again.close()
    database.close()
