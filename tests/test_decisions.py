"""The decisions, each a table over a pure function: after an activation, and by recovery."""

import dataclasses
import itertools
import json
import resource
import time

import pytest

from activate import history, journal, kinds, outcomes, recovery, window
from activate.kinds import verdict
from activate.process import Error
from activate.switch import previous as previous_system
from cachix_reported import KEPT_JOURNALS, Reported, prune

NEW, OLD, OLDER, OTHER = ("/nix/store/" + letter * 32 + "-s" for letter in "abcd")
ROLLBACK = verdict.Policy()
TOLERATE = verdict.Policy(on_unit_failure="tolerate", on_reboot_needed="boot")


@pytest.mark.parametrize(
    ("kind", "status", "new_runs", "output", "policy", "move"),
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
def test_judge(kind, status, new_runs, output, policy, move):
    decision = kinds.find(kind).judge(status, new_runs, output, policy)
    assert decision.move == move
    assert (decision.reason == "") == (move == verdict.GO and status == 0)


def test_a_switch_process_gets_only_what_differs_from_its_defaults():
    assert verdict.Policy().changes() == {}
    assert TOLERATE.changes() == {"on_unit_failure": "tolerate", "on_reboot_needed": "boot"}
    assert verdict.Policy(**TOLERATE.changes()) == TOLERATE


def test_failed_units_and_their_recovery():
    output = "starting...\nwarning: the following units failed: a.service, b.service\nmore\n"
    assert verdict.failed_units(output) == ["a.service", "b.service"]
    assert verdict.recovered(["a", "b"], ["active", "inactive"])
    assert not verdict.recovered(["a", "b"], ["active", "activating"])
    assert not verdict.recovered(["a", "b"], ["active", "failed"])
    assert not verdict.recovered(["a", "b"], ["active"])
    assert not verdict.recovered([], [])


REFUSALS = {
    "NixOS": "Could not acquire lock",
    "nix-darwin": "\x1b[1;31merror: Unexpected files in /etc, aborting activation\x1b[0m\n  /etc/x",
    "home-manager": "Activating checkLinkTargets\nExisting file '/home/jo/x' would be clobbered",
}


@pytest.mark.parametrize("kind", REFUSALS)
def test_a_refusal_is_found_in_its_words_unless_the_activation_had_begun(kind):
    module = kinds.find(kind)
    words = REFUSALS[kind]
    line = verdict.refusal(f"warning: no locale\n{words}\n", module.REFUSAL, module.BEGUN)
    assert line and line in words
    for begun in (
        "activating the configuration...",
        "setting up /etc...",
        "Activating writeBoundary",
    ):
        if module.BEGUN.match(begun):
            assert verdict.refusal(f"{begun}\n{words}", module.REFUSAL, module.BEGUN) == ""
            break
    else:
        pytest.fail("nothing says that it has begun")
    assert verdict.refusal("some other failure\n", module.REFUSAL, module.BEGUN) == ""


def test_a_plain_path_refuses_nothing():
    plain = kinds.find("plain path")
    assert verdict.refusal("Could not acquire lock", plain.REFUSAL, plain.BEGUN) == ""


def test_a_kind_is_not_guessed_from_a_path_that_does_not_exist():
    with pytest.raises(Error, match="does not exist"):
        kinds.detect(NEW)


def record(step, attempts=0, previous=OLD, boot_id=""):
    return journal.Record(
        id="id",
        index=1,
        agent="agent",
        host="http://h",
        store_path=NEW,
        previous_running=previous,
        previous_profile=None if previous is None else OLDER,
        boot_id=boot_id,
        step=step,
        attempts=attempts,
    )


PATHS = [NEW, OLD, OLDER, OTHER, None]


def expected(step, attempts, is_led, boot, running, target):
    """The table of design.md, section 5, written once more: the action, and the step of an end."""
    if is_led:
        return recovery.ADOPT, ""
    if step in journal.FINAL:
        return recovery.REPORT, ""
    if step in journal.HARMLESS:
        return (recovery.START, "") if attempts < 3 else (recovery.END, journal.FAILED)
    ours = running in (NEW, OLD, OLDER) if running else target in (NEW, OLD, OLDER)
    if not ours:
        return recovery.END, journal.FAILED
    if step in (journal.AWAITING_REBOOT, journal.REBOOTING) and attempts < 3:
        if boot == "this":
            return recovery.REBOOT, ""
        return (recovery.CONFIRM if (running or target) == NEW else recovery.ROLL_BACK), ""
    if step == journal.COMMITTING and attempts < 3:
        return (recovery.COMMIT if running == NEW else recovery.ACTIVATE), ""
    if step == journal.ROLLING_BACK and attempts >= 3:
        return recovery.END, journal.ROLLBACK_FAILED
    return recovery.ROLL_BACK, ""


@pytest.mark.promise(2, 7, 15)
@pytest.mark.parametrize("step", sorted(journal.STEPS))
def test_next_action_over_the_whole_product(step):
    for attempts, is_led, boot, running, target in itertools.product(
        range(5), (False, True), ("this", "before", ""), PATHS, PATHS
    ):
        facts = recovery.Facts(is_led, boot, running, target)
        action = recovery.next_action(record(step, attempts, boot_id="this"), facts)
        right = expected(step, attempts, is_led, boot, running, target)
        assert (action.do, action.step) == right, (facts, attempts)
        if action.do in (recovery.END, recovery.ROLL_BACK, recovery.COMMIT, recovery.ACTIVATE):
            assert action.reason
        is_before = step not in (journal.AWAITING_REBOOT, journal.REBOOTING)
        if action.do in (recovery.COMMIT, recovery.ACTIVATE, recovery.ROLL_BACK) and is_before:
            assert ("the machine restarted" in action.reason) == (boot != "this")


WAITS = dataclasses.replace(
    record(journal.AWAITING_REBOOT, boot_id="this"), operation="switch", reboot="window"
)


@pytest.mark.parametrize(
    ("changes", "facts", "do"),
    [
        ({}, {}, recovery.REBOOT),
        ({}, {"window_is_open": False}, recovery.WAIT),
        ({"attempts": 3}, {}, recovery.ROLL_BACK),
        # it was asked for already: the window may have closed since
        ({"step": journal.REBOOTING}, {"window_is_open": False}, recovery.REBOOT),
        ({}, {"no_reboot": "a newer deployment arrived"}, recovery.END),
        ({}, {"no_reboot": "x", "window_is_open": False}, recovery.END),
        ({"step": journal.REBOOTING}, {"no_reboot": "x"}, recovery.REBOOT),
        # whoever has rebooted it, the new system is to be confirmed
        ({}, {"boot_id": "next"}, recovery.CONFIRM),
        ({}, {"boot_id": "next", "no_reboot": "x"}, recovery.CONFIRM),
        ({}, {"boot_id": "next", "running": OLD}, recovery.ROLL_BACK),
        ({"step": journal.REBOOTING}, {"boot_id": "next"}, recovery.CONFIRM),
        ({"step": journal.REBOOTING}, {"boot_id": "next", "running": OLD}, recovery.ROLL_BACK),
        ({"step": journal.REBOOTING, "attempts": 3}, {"boot_id": "next"}, recovery.ROLL_BACK),
        ({"step": journal.ROLLING_BACK, "reboots": 2}, {"boot_id": "next"}, recovery.ROLL_BACK),
    ],
)
@pytest.mark.promise(2, 7)
def test_a_reboot(changes, facts, do):
    """At most one forth, and none without a record of the boot that it leaves."""
    facts = recovery.Facts(**{"boot_id": "this", "running": NEW, "target": NEW, **facts})
    action = recovery.next_action(dataclasses.replace(WAITS, **changes), facts)
    assert action.do == do
    if do == recovery.END:
        assert (action.step, action.outcome) == (journal.SUCCEEDED, outcomes.REBOOT_NEEDED)
        assert action.reason.endswith("so that the machine was not rebooted")


def test_what_is_only_to_boot_is_committed_without_an_activation():
    interrupted = dataclasses.replace(record(journal.COMMITTING), operation="boot")
    for running in (OLD, NEW):
        facts = recovery.Facts(running=running, target=OLD)
        assert recovery.next_action(interrupted, facts).do == recovery.COMMIT


@pytest.mark.parametrize(
    ("text", "moments"),
    [  # a weekday from Monday on, and the hour: whether the window is open then
        ("02:00-04:00", {"0 01:59": 0, "0 02:00": 1, "6 03:59": 1, "3 04:00": 0}),
        ("Mon..Fri 02:00-04:00", {"0 02:30": 1, "4 02:30": 1, "5 02:30": 0, "6 02:30": 0}),
        (
            "Sat,Sun 22:00-06:00",
            {"5 22:00": 1, "6 05:59": 1, "0 05:59": 1, "1 05:00": 0, "5 05:00": 0},
        ),
        ("Fri..Mon 00:00-24:00", {"4 00:00": 1, "6 23:59": 1, "0 12:00": 1, "1 00:00": 0}),
    ],
)
def test_a_window(text, moments):
    for moment, is_open in moments.items():
        now = time.strptime(f"2026-11-{23 + int(moment[0])} {moment[2:]}", "%Y-%m-%d %H:%M")
        assert now.tm_wday == int(moment[0])
        assert window.parse(text).is_open(now) == bool(is_open), moment


@pytest.mark.parametrize(
    "text",
    ["", "night", "02:00", "2:00-4:00", "02:00-02:00", "25:00-26:00", "24:00-02:00", "02:60-03:00"]
    + ["Mo 02:00-04:00", "Mon.. 02:00-04:00", "Mon..Xyz 02:00-04:00", "mon 02:00-04:00"],
)
def test_no_window(text):
    with pytest.raises(Error, match="a reboot window is such as"):
        window.parse(text)


def test_the_reason_of_a_rollback_is_not_forgotten():
    interrupted = dataclasses.replace(record(journal.ROLLING_BACK, 1), reason="the script failed")
    action = recovery.next_action(interrupted, recovery.Facts(False, "", NEW, NEW))
    assert action.reason == "the script failed"


def test_a_first_profile_may_run_nothing():
    """Without a previous path, "nothing runs" is the previous state."""
    first = record(journal.ACTIVATING, previous=None)
    action = recovery.next_action(first, recovery.Facts())
    assert action.do == recovery.ROLL_BACK


@pytest.mark.promise(4)
@pytest.mark.parametrize("step", sorted(journal.STEPS - journal.HARMLESS - journal.FINAL))
@pytest.mark.parametrize(
    ("before", "now", "is_left"),
    [
        ("a", "b", True),
        ("", "b", True),
        ("a", "a", False),
        ("a", "", False),  # the file of the machine lock was lost
        ("a", "id", False),  # its own, by a process that was killed right after
        (None, "b", False),  # a journal of an earlier release
    ],
)
def test_a_deployment_that_was_confirmed_since_is_left_alone(step, before, now, is_left):
    """It may be of the same path, and in another state directory."""
    interrupted = dataclasses.replace(record(step), confirmed=before)
    facts = recovery.Facts(running=NEW, target=NEW, confirmed=now)
    action = recovery.next_action(interrupted, facts)
    assert (action.do == recovery.END) == is_left
    if is_left:
        assert (
            action.outcome == outcomes.CHANGED_BY_OTHERS and "was confirmed since" in action.reason
        )


def test_the_first_time_in_a_step_starts_a_new_count_of_attempts(tmp_path):
    entry = journal.Journal(str(tmp_path / "d"), record(journal.RECEIVED, attempts=2))
    entry.enter(journal.DOWNLOADING)
    assert entry.record.attempts == 2
    entry.enter(journal.ACTIVATING)
    assert entry.record.attempts == 0
    entry.enter(journal.COMMITTING)
    entry.enter(journal.COMMITTING, attempts=1)
    entry.enter(journal.CHECKING)
    entry.enter(journal.COMMITTING)
    assert entry.record.attempts == 1, "a commit that is checked again each time must have a limit"
    assert entry.record.revision == 6


@pytest.mark.promise(12)
def test_facts_that_could_not_be_written_are_not_forgotten(tmp_path):
    """The journal on disk is older than that of the process which could not write."""
    entry = journal.Journal(str(tmp_path / "d"), record(journal.ACTIVATING))
    entry.enter(journal.ACTIVATING)
    (tmp_path / "d/journal.json.new").mkdir()
    with pytest.raises(OSError):
        entry.enter(journal.ROLLING_BACK, attempts=2)
    entry.reload()
    assert (entry.record.step, entry.record.attempts) == (journal.ROLLING_BACK, 2)
    (tmp_path / "d/journal.json.new").rmdir()
    other = journal.Journal(str(tmp_path / "d"), entry.record)
    other.enter(journal.ROLLED_BACK)
    entry.reload()
    assert entry.record.step == journal.ROLLED_BACK


@pytest.mark.promise(8)
def test_the_journal_of_the_first_version_is_read(tmp_path):
    values = {"id": "i", "index": 1, "agent": "a", "host": "h", "store_path": "p"}
    values.update({"step": "activating", "kind": "NixOS"})
    (tmp_path / "journal.json").write_text(json.dumps(values))
    old = journal.load(str(tmp_path)).record
    assert (old.step, old.kind) == (journal.ACTIVATING, "NixOS")
    assert (old.attempts, old.revision, old.previous_running) == (0, 0, None)


@pytest.mark.promise(8)
def test_journal_keeps_unknown_keys_and_reads_a_newer_version(tmp_path):
    entry = journal.Journal(str(tmp_path / "d"), record(journal.READY))
    entry.enter(journal.READY)
    path = tmp_path / "d" / "journal.json"
    text = path.read_text().replace(f'"version": {journal.VERSION}', '"version": 9, "moon": [1]')
    path.write_text(text)
    newer = journal.load(str(tmp_path / "d"))
    assert newer.record.version == 9
    newer.enter(journal.ACTIVATING)
    assert '"moon": [\n' in path.read_text() and '"version": 9' in path.read_text()


@pytest.mark.promise(12, 15)
def test_journal_is_readable_or_set_aside_whatever_its_bytes(tmp_path):
    entry = journal.Journal(str(tmp_path / "d"), record(journal.CHECKING))
    entry.enter(journal.CHECKING)
    whole = entry.record.to_json()
    for length in range(len(whole)):
        (tmp_path / "d" / "journal.json").write_bytes(whole[:length])
        with pytest.raises(journal.Unreadable):
            journal.load(str(tmp_path / "d"))
        assert not (tmp_path / "d" / "journal.json").exists()
    assert history.load_all(str(tmp_path))[0] == []


NEARLY = b'{"id":"a","index":1,"agent":"a","host":"h","store_path":"p",'


@pytest.mark.promise(12)
@pytest.mark.usefixtures("no_collector")
@pytest.mark.parametrize(
    "text",
    [b"\0" * 300, b"[]", b"null", b"7", b'{"id": 1}', b"[" * 100000]
    + [NEARLY + b'"step":"moon"}', NEARLY + b'"times":{"a":"b"}}'],
)
def test_journal_of_garbage_is_set_aside(tmp_path, text):
    (tmp_path / "deployments/x").mkdir(parents=True)
    (tmp_path / "deployments/x/journal.json").write_bytes(text)
    journals, problems = history.load_all(str(tmp_path))
    assert journals == [] and len(problems) == 1 and "was set aside" in problems[0]


@pytest.mark.promise(12)
def test_a_journal_that_can_not_be_opened_stays(tmp_path, monkeypatch):
    entry = journal.Journal(str(tmp_path / "d"), record(journal.CHECKING))
    entry.enter(journal.CHECKING)
    limit = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (3, limit[1]))
    try:
        with pytest.raises(journal.Unreadable):
            journal.load(str(tmp_path / "d"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, limit)
    assert journal.load(str(tmp_path / "d")).record.step == journal.CHECKING
    assert not history.was_set_aside(str(tmp_path / "d"))


@pytest.mark.promise(12)
@pytest.mark.parametrize("instead", ["directory", "zeros"])
def test_anything_in_the_place_of_a_journal_is_set_aside(tmp_path, instead):
    if instead == "directory":
        (tmp_path / "journal.json").mkdir()
    else:
        (tmp_path / "journal.json").write_bytes(b"\0" * 900)
    with pytest.raises(journal.Unreadable, match="was set aside"):
        journal.load(str(tmp_path))
    assert journal.load(str(tmp_path)) is None and history.was_set_aside(str(tmp_path))


def test_old_deployments_are_pruned_once_they_are_reported(tmp_path):
    for number in range(25):
        times = {journal.RECEIVED: -number}  # the clock went backwards
        received = dataclasses.replace(record(journal.RECEIVED), times=times, sequence=number)
        entry = journal.Journal(str(tmp_path / f"deployments/{number:02}"), received)
        entry.enter(journal.SUCCEEDED)
        reported = dataclasses.asdict(Reported(logged=number != 3, ended=True))
        (tmp_path / f"deployments/{number:02}/reported.json").write_text(json.dumps(reported))
    prune(str(tmp_path))
    names = sorted(path.name for path in (tmp_path / "deployments").iterdir())
    assert names == ["03", *(f"{number:02}" for number in range(25 - KEPT_JOURNALS, 25))]


def entries(tmp_path, *facts):
    """Journals with these steps, sequences and times, as they lie on the disk."""
    for number, (step, sequence, moment) in enumerate(facts):
        entry = dataclasses.replace(
            record(step), id=str(number), sequence=sequence, times={step: moment}, profile="/p/x"
        )
        directory = tmp_path / f"deployments/{9 - number}"
        directory.mkdir(parents=True)
        (directory / "journal.json").write_bytes(entry.to_json())
    return [journal_.record.id for journal_ in history.load_all(str(tmp_path))[0]]


def test_deployments_are_ordered_by_number_and_those_without_by_their_times(tmp_path):
    done = journal.SUCCEEDED
    facts = [(done, 2, 100), (done, 3, 5), (done, 1, 1e12), (done, 0, 7e12), (done, 0, 6e12)]
    assert entries(tmp_path, *facts) == ["4", "3", "2", "0", "1"]


def test_the_next_number_is_higher_than_any_even_if_the_last_journal_is_lost(tmp_path):
    assert history.next_sequence([]) == 1
    entries(tmp_path, (journal.SUCCEEDED, 7, 1), (journal.SUCCEEDED, 8, 2))
    assert history.next_sequence(history.load_all(str(tmp_path))[0]) == 9
    (tmp_path / "deployments/8/journal.json").write_bytes(b"\0" * 500)
    assert history.next_sequence(history.load_all(str(tmp_path))[0]) == 8


FAILED, DONE = journal.ROLLBACK_FAILED, journal.SUCCEEDED
A, B = ("/nix/store/" + letter * 32 + "-x" for letter in "fg")


@pytest.mark.promise(3)
@pytest.mark.parametrize(
    ("earlier", "now", "previous"),
    [
        ([], (OLD, OLD), (OLD, OLD)),
        ([(FAILED, A)], (A, A), (OLD, OLDER)),  # it was left on an unconfirmed path
        ([(FAILED, A)], (A, OLDER), (OLD, OLDER)),
        ([(FAILED, A)], (OTHER, OTHER), (OTHER, OTHER)),  # somebody has deployed since
        ([(FAILED, A)], (OLD, OLDER), (OLD, OLDER)),  # nothing had failed to roll back
        ([(FAILED, A), (FAILED, B)], (A, A), (OLD, OLDER)),
        ([(FAILED, A), (journal.FAILED, B)], (A, A), (OLD, OLDER)),  # B has changed nothing
        ([(FAILED, A), (DONE, B)], (B, B), (B, B)),
        ([(FAILED, A), (DONE, A)], (A, A), (A, A)),
        ([(FAILED, A), (journal.ROLLED_BACK, B)], (A, A), (A, A)),
        ([(journal.ACTIVATING, A)], (A, OLDER), (OLD, OLDER)),  # interrupted, and not undone yet
    ],
)
def test_the_previous_system_is_what_runs_unless_that_was_never_confirmed(earlier, now, previous):
    profile = "/nix/var/nix/profiles/system"
    journals = [
        journal.Journal(
            f"/d/{number}",
            dataclasses.replace(
                record(step), id=str(number), store_path=path, profile=profile, sequence=number + 1
            ),
        )
        for number, (step, path) in enumerate(earlier)
    ]
    present = journal.Journal("/d/now", record(journal.READY))
    suspects = previous_system.unconfirmed(present, profile, journals)
    facts = previous_system.confirmed(now, 7, profile, suspects)
    assert (facts["previous_running"], facts["previous_profile"]) == previous


def test_record_is_the_journal_byte_for_byte(tmp_path):
    times = {journal.READY: 12.5}
    first = dataclasses.replace(record(journal.READY), rooted=(NEW, OLD), times=times)
    assert journal.Record.from_json(first.to_json()) == first
