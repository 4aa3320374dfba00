"""The decisions: what an activation's end means, and what recovery does, each a table over a pure function."""

import dataclasses
import itertools

import pytest

from activate import journal, recovery, verdict

NEW, OLD, OTHER = ("/nix/store/" + letter * 32 + "-s" for letter in "abc")
ROLLBACK, TOLERATE = verdict.Settings(), verdict.Settings(on_unit_failure="tolerate", on_reboot_needed="boot")


@pytest.mark.parametrize(
    ("kind", "status", "new_runs", "said", "settings", "move"),
    [
        ("NixOS", 0, True, "", ROLLBACK, verdict.GO),
        ("NixOS", 0, False, "", ROLLBACK, verdict.UNDO),
        ("NixOS", 1, True, "", ROLLBACK, verdict.UNDO),
        ("NixOS", 2, True, "", TOLERATE, verdict.UNDO),
        ("NixOS", 2, False, "", TOLERATE, verdict.UNDO),
        ("NixOS", 4, True, "", ROLLBACK, verdict.RECHECK),
        ("NixOS", 4, True, "", TOLERATE, verdict.GO),
        ("NixOS", 4, False, "", TOLERATE, verdict.UNDO),
        ("NixOS", 100, False, "", ROLLBACK, verdict.UNTOUCHED),
        ("NixOS", 100, False, "", TOLERATE, verdict.BOOT),
        ("NixOS", 0, True, "Failed to install bootloader", ROLLBACK, verdict.UNDO),
        ("NixOS", -9, True, "", ROLLBACK, verdict.UNDO),
        ("nix-darwin", 4, True, "", TOLERATE, verdict.UNDO),
        ("nix-darwin", 0, True, "", ROLLBACK, verdict.GO),
        ("home-manager", 0, False, "", ROLLBACK, verdict.UNDO),
        ("plain path", 0, True, "", ROLLBACK, verdict.GO),
        ("plain path", 100, False, "", TOLERATE, verdict.UNDO),
    ],
)
def test_judge(kind, status, new_runs, said, settings, move):
    found, reason = verdict.judge(kind, status, new_runs, said, settings)
    assert found == move
    assert (reason == "") == (move == verdict.GO and status == 0)


def test_failed_units_and_their_recovery():
    said = "starting...\nwarning: the following units failed: a.service, b.service\nmore\n"
    assert verdict.failed_units(said) == ["a.service", "b.service"]
    assert verdict.recovered(["a", "b"], ["active", "inactive"])
    assert not verdict.recovered(["a", "b"], ["active", "activating"])
    assert not verdict.recovered(["a", "b"], ["active", "failed"])
    assert not verdict.recovered(["a", "b"], ["active"])
    assert not verdict.recovered([], [])


def record(step, attempts=0, previous=OLD):
    return journal.Record(
        "id",
        1,
        "agent",
        "http://h",
        NEW,
        step=step,
        attempts=attempts,
        previous_running=previous,
        previous_profile=previous,
    )


@pytest.mark.parametrize(("step", "attempts"), list(itertools.product(sorted(journal.STEPS), range(5))))
@pytest.mark.parametrize("running", [NEW, OLD, OTHER, None])
@pytest.mark.parametrize("holder", [None, "id", "another"])
def test_next_action_over_the_whole_product(step, attempts, running, holder):
    action = recovery.next_action(record(step, attempts), recovery.Facts(holder, running, running))
    if holder == "id":
        assert action.do == recovery.ADOPT
    elif step in journal.FINAL:
        assert action.do == recovery.REPORT
    elif step in journal.HARMLESS:
        assert action.do == (recovery.START if attempts < 3 else recovery.END)
        assert action.step in ("", journal.FAILED)
    elif running in (OTHER, None):
        assert (action.do, action.step) == (recovery.END, journal.FAILED)
    elif step in (journal.ACTIVATING, journal.CHECKING):
        assert action.do == recovery.ROLL_BACK
    elif step == journal.COMMITTING and attempts < 3:
        assert action.do == (recovery.COMMIT if running == NEW else recovery.ACTIVATE)
    elif step == journal.COMMITTING:
        assert action.do == recovery.ROLL_BACK
    else:
        assert step == journal.ROLLING_BACK
        assert (action.do, action.step) == (
            (recovery.ROLL_BACK, "") if attempts < 3 else (recovery.END, journal.ROLLBACK_FAILED)
        )


def test_a_first_profile_may_run_nothing():
    """Without a previous path, nothing running is what ran before."""
    action = recovery.next_action(record(journal.ACTIVATING, previous=None), recovery.Facts(None, None, None))
    assert action.do == recovery.ROLL_BACK


def test_steps_reset_the_attempts(tmp_path):
    entry = journal.Journal(str(tmp_path / "d"), record(journal.RECEIVED, attempts=2))
    entry.enter(journal.DOWNLOADING)
    assert entry.record.attempts == 2
    entry.enter(journal.ACTIVATING)
    assert entry.record.attempts == 0
    entry.enter(journal.ACTIVATING, attempts=1)
    entry.enter(journal.CHECKING)
    assert entry.record.attempts == 1


def test_journal_keeps_unknown_keys_and_reads_a_newer_version(tmp_path):
    entry = journal.Journal(str(tmp_path / "d"), record(journal.READY))
    entry.enter(journal.READY)
    path = tmp_path / "d" / "journal.json"
    text = path.read_text().replace('"version": 1', '"version": 9, "moon": [1]')
    path.write_text(text)
    found = journal.load(str(tmp_path / "d"))
    assert found.record.version == 9
    found.enter(journal.ACTIVATING)
    assert '"moon": [\n' in path.read_text() and '"version": 9' in path.read_text()


def test_journal_is_readable_or_set_aside_whatever_its_bytes(tmp_path):
    entry = journal.Journal(str(tmp_path / "d"), record(journal.CHECKING))
    entry.enter(journal.CHECKING)
    whole = entry.record.to_json()
    for length in range(len(whole)):
        (tmp_path / "d" / "journal.json").write_bytes(whole[:length])
        with pytest.raises(journal.Unreadable):
            journal.load(str(tmp_path / "d"))
        assert not (tmp_path / "d" / "journal.json").exists()
    assert journal.load_all(str(tmp_path))[0] == []


NEARLY = b'{"id":"a","index":1,"agent":"a","host":"h","store_path":"p",'


@pytest.mark.parametrize(
    "text",
    [b"\0" * 300, b"[]", b"null", b"7", b'{"id": 1}', b"[" * 100000]
    + [NEARLY + b'"step":"moon"}', NEARLY + b'"times":{"a":"b"}}'],
)
def test_journal_of_garbage_is_set_aside(tmp_path, text):
    (tmp_path / "deployments/x").mkdir(parents=True)
    (tmp_path / "deployments/x/journal.json").write_bytes(text)
    journals, problems = journal.load_all(str(tmp_path))
    assert journals == [] and len(problems) == 1 and "was set aside" in problems[0]


def test_old_journals_are_pruned(tmp_path):
    entries = []
    for number in range(25):
        entry = journal.Journal(str(tmp_path / f"{number:02}"), record(journal.SUCCEEDED))
        entry.enter(journal.SUCCEEDED)
        entries.append(entry)
    journal.prune(entries)
    assert sorted(path.name for path in tmp_path.iterdir()) == [f"{number:02}" for number in range(5, 25)]


def test_record_is_the_journal_byte_for_byte(tmp_path):
    first = dataclasses.replace(record(journal.READY), rooted=(NEW, OLD), times={journal.READY: 12.5})
    assert journal.Record.from_json(first.to_json()) == first
