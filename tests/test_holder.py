"""The locks of a deployment, and who holds them."""

import dataclasses
import os

import pytest

from activate import holder, journal, leftovers, lock
from activate.process import Error
from activate.switch import previous
from activate.switch.progress import Progress

pytestmark = pytest.mark.promise(1)

ID = "0a1b2c3d-0000-4000-8000-000000000000"
OTHER = "ffffffff-0000-4000-8000-000000000000"


@pytest.fixture
def entry(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    profile = str(tmp_path / "profiles" / "system")
    record = journal.Record(
        id=ID, index=1, agent="web", host="h", store_path="/nix/store/x", profile=profile
    )
    return journal.Journal(str(tmp_path / "state" / "deployments" / ID), record)


def machine(entry, deployment):
    taken = lock.take(lock.machine_path(entry.record.profile))
    holder.note_holder(taken.fd, deployment)
    return taken


def test_nobody_else_gets_the_locks(entry):
    assert holder.is_free(entry)
    taken = holder.take(entry)
    assert holder.take(entry) is None and holder.is_led(entry) and not holder.is_free(entry)
    taken.close()
    assert holder.is_free(entry)
    holder.take(entry).close()


@pytest.mark.parametrize("lost", ["shared", "own"])
def test_one_of_the_locks_is_enough(entry, lost):
    taken = holder.take(entry)
    os.unlink(holder.own_path(entry) if lost == "own" else lock.shared_path("deployment", "web"))
    assert holder.is_led(entry) and holder.take(entry) is None
    taken.close()
    assert holder.is_free(entry)


def test_the_machine_lock_counts_for_its_holder_alone(entry):
    taken = machine(entry, ID)
    assert holder.is_led(entry) and holder.take(entry) is None
    holder.note_holder(taken.fd, OTHER)
    assert holder.is_free(entry)
    taken.close()
    holder.take(entry).close()


def test_the_lock_of_cachix_counts_for_its_holder_alone(entry):
    taken = lock.take(lock.shared_path("deployment", "web"), text=OTHER)
    assert not holder.is_led(entry) and not holder.is_free(entry)
    assert holder.take(entry) is None  # but one deployment of an agent's name at a time
    taken.write(ID)
    assert holder.is_led(entry)
    taken.close()


def test_a_deployment_without_a_journal_here(entry):
    profiles = [entry.record.profile, "/elsewhere"]
    assert not holder.is_led_elsewhere(ID, "web", profiles)
    taken = machine(entry, ID)
    assert holder.is_led_elsewhere(ID, "web", profiles)
    assert not holder.is_led_elsewhere(OTHER, "web", profiles)
    taken.close()
    assert not holder.is_led_elsewhere(ID, "web", profiles)


def test_who_was_confirmed_outlives_the_holders(entry):
    assert holder.last_confirmed(entry.record.profile) == ""
    taken = machine(entry, OTHER)
    assert holder.last_confirmed(entry.record.profile) == ""
    holder.note_confirmed(taken.fd, OTHER)
    holder.note_holder(taken.fd, ID)
    assert holder.last_confirmed(entry.record.profile) == OTHER
    taken.close()


def test_the_ids_stand_behind_the_mark_of_the_command_that_runs(entry):
    """Earlier releases read the mark alone."""
    taken = machine(entry, ID)
    leftovers.marker(taken.fd)()
    mark = os.pread(taken.fd, leftovers.MARK_BYTES, 0).split()
    assert mark[0] == str(os.getpid()).encode() and len(mark) == 3
    assert holder.is_led(entry)
    leftovers.clear(taken.fd)
    assert holder.is_led(entry)
    taken.close()


def test_a_lock_whose_file_was_replaced_is_none(tmp_path):
    path = str(tmp_path / "a.lock")
    first = lock.take(path)
    os.unlink(path)
    second = lock.take(path)
    assert second is not None and second.is_in_place() and not first.is_in_place()
    assert lock.take(path) is None
    first.close()
    second.close()


def test_a_file_that_is_deleted_between_open_and_lock(tmp_path, monkeypatch):
    path, tries = str(tmp_path / "a.lock"), []
    attempt = lock._try

    def delete_first(fd):
        tries.append(fd)
        if len(tries) == 1:
            os.unlink(path)
        return attempt(fd)

    monkeypatch.setattr(lock, "_try", delete_first)
    taken = lock.take(path)
    assert len(tries) == 2 and taken.is_in_place()
    taken.close()


def test_who_waits_while_the_directory_goes_gets_a_new_file(tmp_path, monkeypatch):
    path, tries = str(tmp_path / "locks" / "a.lock"), []
    make = os.makedirs

    def make_late(*args, **kw):
        tries.append(args)
        if len(tries) > 1:
            make(*args, **kw)

    monkeypatch.setattr(os, "makedirs", make_late)
    lock.take(path).close()
    assert len(tries) == 2


@pytest.mark.promise(5, 12)
@pytest.mark.parametrize("step", [journal.READY, journal.ACTIVATING])
def test_only_a_rollback_goes_on_where_no_lock_file_can_be_made(entry, tmp_path, step):
    (tmp_path / "cache").write_text("a file")
    (tmp_path / "state").write_text("a file")
    entry.record = dataclasses.replace(entry.record, step=step)
    if step == journal.READY:
        with pytest.raises(Error, match="can't be locked"):
            holder.take(entry)
    else:
        assert holder.take(entry).fds == []


def test_an_end_on_the_disk_is_final(entry):
    entry.enter(journal.ACTIVATING)
    other = journal.load(entry.directory)
    other.enter(journal.SUCCEEDED)
    entry.record = dataclasses.replace(entry.record, revision=99)
    entry.reload()
    assert entry.record.step == journal.SUCCEEDED


@pytest.mark.promise(7)
@pytest.mark.parametrize("goes_on", [True, False])
def test_a_shutdown_uncounts_its_own_attempt_only(entry, goes_on):
    entry.enter(journal.ROLLING_BACK, attempts=2)
    progress = Progress(entry, None, None, None)
    if goes_on:
        journal.load(entry.directory).enter(journal.ROLLED_BACK)
    progress.uncount()
    on_disk = journal.load(entry.directory).record
    expected = (journal.ROLLED_BACK, 2) if goes_on else (journal.ROLLING_BACK, 1)
    assert (on_disk.step, on_disk.attempts) == expected


@pytest.mark.promise(4)
@pytest.mark.parametrize(("last", "counts"), [("", True), ("a", True), ("b", False)])
def test_a_failed_rollback_does_not_count_once_another_state_directory_has_deployed(
    entry, last, counts
):
    """Whatever runs then was confirmed, although this state directory does not know it."""
    facts = {"kind": "NixOS", "profile": entry.record.profile, "confirmed": "a"}
    entry.enter(journal.ROLLBACK_FAILED, **facts)
    fresh = journal.Journal(
        entry.directory + "-b", dataclasses.replace(entry.record, id=OTHER, step=journal.READY)
    )
    result = previous.unconfirmed(fresh, entry.record.profile, [entry], last)
    assert result == ([entry.record] if counts else [])


def test_a_file_that_never_stays_in_place_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(lock.Lock, "is_in_place", lambda _: False)
    before = len(os.listdir("/proc/self/fd"))
    with pytest.raises(OSError, match="again and again"):
        lock.take(str(tmp_path / "a.lock"))
    assert len(os.listdir("/proc/self/fd")) == before
