"""The locks of a deployment, and who holds them."""

import os

import pytest

from activate import holder, journal, leftovers, lock

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
