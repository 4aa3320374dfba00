"""Interrupted deployments: by kill -9 of either process or both, a power loss, a lost state."""

import dataclasses
import json
import os
import re
import shutil
import signal

import closures
import pytest
from hosts import wait_until

from activate import history, journal
from cachix_reports import Reported

pytestmark = pytest.mark.promise(2, 6, 7, 15)

WAITS = json.dumps({"unit_recheck": 0.2, "retry": 0.1, "backoff": 0.1, "slowest": 0.5})


def once(name, code):
    """Shell code that runs `code` the first time only, even if the host is rebooted."""
    return f"[ -e /nix/var/{name} ] || {{ touch /nix/var/{name}; {code}; }}"


@pytest.fixture
def nixos_machine(make_machine):
    """A machine that runs a NixOS system, and that system's path."""
    machine = make_machine(env={"CACHIX_DEPLOY_WAITS": WAITS})
    first = closures.nixos(machine.files, f"{machine.name}-first")
    assert machine.deploy(first).status == "Succeeded"
    return machine, first


def switches(machine):
    """The PIDs of the switch processes."""
    lines = machine.host.processes().items()
    return [pid for pid, line in lines if re.search(r" switch [0-9a-f-]{36}", line)]


def kill_switch(machine):
    for pid in wait_until(lambda: switches(machine)):
        os.kill(pid, signal.SIGKILL)


def interrupt(machine, how):
    """Kill the switch process, the agent or both, or cut the power. An agent runs afterwards."""
    if how == "power":
        machine.agent.kill()  # else it may see the switch process end before it ends itself
        machine.host.reboot()
    elif how in ("agent", "both"):
        machine.agent.kill()
    if how in ("switch", "both"):
        kill_switch(machine)
    if how != "switch":
        machine.start()


@pytest.mark.parametrize("how", ["switch", "both", "power"])
def test_in_the_activation_is_rolled_back(nixos_machine, how):
    machine, first = nixos_machine
    hang = "touch /run/here; " + closures.hang()
    deployment = machine.order(closures.nixos(machine.files, 2, after=hang))
    wait_until(lambda: machine.host.path("/run/here").exists())
    interrupt(machine, how)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    event = "the machine restarted" if how == "power" else "it was interrupted"
    assert f"{event} before it was confirmed" in outcome.reason
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == first
    assert outcome.log.splitlines()[-1].startswith("Failed to activate the deployment. ")
    assert machine.deploy(closures.nixos(machine.files, 3)).status == "Succeeded"


def test_the_agent_alone_in_the_activation_changes_nothing(nixos_machine):
    machine, _ = nixos_machine
    hold = "touch /run/here; " + closures.wait_for("/run/go-on")
    new = closures.nixos(machine.files, 2, after=hold)
    deployment = machine.order(new)
    wait_until(lambda: machine.host.path("/run/here").exists())
    machine.agent.kill()
    machine.start()
    machine.host.path("/run/go-on").touch()
    assert machine.outcome(deployment).status == "Succeeded"
    assert machine.host.record().count(("test", new)) == 1


@pytest.mark.parametrize("how", ["switch", "both", "power"])
def test_in_the_commit_goes_forward(nixos_machine, how):
    machine, _ = nixos_machine
    hang = once("boot", f"touch /run/here; {closures.hang()}")
    new = closures.nixos(machine.files, 2, before_boot=hang)
    deployment = machine.order(new)
    wait_until(lambda: machine.host.path("/run/here").exists())
    interrupt(machine, how)
    assert machine.outcome(deployment).status == "Succeeded"
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == new
    assert machine.host.record().count(("test", new)) == (2 if how == "power" else 1)


@pytest.mark.parametrize("how", ["switch", "both", "power"])
def test_in_the_rollback_is_rolled_back_again(nixos_machine, how):
    machine, _ = nixos_machine
    fallback = closures.nixos(machine.files, "fallback", before=second_time_hangs())
    assert machine.deploy(fallback).status == "Succeeded"
    deployment = machine.order(closures.nixos(machine.files, 3, after="exit 1"))
    wait_until(lambda: machine.host.path("/run/here").exists())
    interrupt(machine, how)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    assert "the activation ended with status 1" in outcome.reason
    host = machine.host
    assert host.running() == host.profile() == host.boot_default() == fallback


def second_time_hangs():
    """Shell code that hangs the second time that it runs: in the first rollback."""
    hang = f"touch /nix/var/hung /run/here; {closures.hang()}"
    return f"if [ -e /nix/var/ran ] && [ ! -e /nix/var/hung ]; then {hang}; fi; touch /nix/var/ran"


def test_a_rollback_that_is_always_interrupted_ends(nixos_machine):
    machine, _ = nixos_machine
    hang = "[ ! -e /run/broken ] || { kill -9 $PPID; sleep 3600; }"
    fallback = closures.nixos(machine.files, "fallback", before=hang)
    assert machine.deploy(fallback).status == "Succeeded"
    outcome = machine.deploy(closures.nixos(machine.files, 3, before="touch /run/broken; exit 1"))
    assert (outcome.status, outcome.step) == ("Failed", "rollback-failed")
    assert "the rollback was interrupted 3 times" in outcome.reason
    machine.host.path("/run/broken").unlink()
    assert machine.deploy(closures.nixos(machine.files, 4)).status == "Succeeded"


def wrap_nix_store(machine, script):
    """Restart the agent with a shell script in place of `nix-store`."""
    wrappers = machine.host.directory / "wrappers"
    wrappers.mkdir()
    (wrappers / "nix-store").write_text(f"#!/bin/sh\n{script}\n")
    (wrappers / "nix-store").chmod(0o755)
    machine.agent.stop()
    path = f"{wrappers}:{machine.host.environment['PATH']}"
    machine.env = {"PATH": path, "CACHIX_DEPLOY_WAITS": WAITS}
    machine.start()


def test_the_agent_in_the_download_starts_again(nixos_machine):
    machine, _ = nixos_machine
    hold = "touch /run/here; " + closures.wait_for("/run/go-on")
    wrap_nix_store(machine, f'{hold}\nexec {shutil.which("nix-store")} "$@"')
    deployment = machine.order(closures.nixos(machine.files, 2))
    wait_until(lambda: machine.host.path("/run/here").exists())
    machine.agent.kill()
    machine.start()
    machine.host.path("/run/go-on").touch()
    outcome = machine.outcome(deployment)
    assert outcome.status == "Succeeded", outcome


def test_a_deployment_that_is_always_interrupted_before_it_begins_ends(nixos_machine):
    machine, first = nixos_machine
    wrap_nix_store(machine, "touch /run/here\nexec sleep 3600")
    deployment = machine.order(closures.nixos(machine.files, 2))
    for _ in range(3):
        wait_until(lambda: machine.host.path("/run/here").exists())
        machine.agent.kill()
        machine.host.path("/run/here").unlink()
        machine.start()
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert "it was interrupted 3 times before anything was changed" in outcome.reason
    assert machine.host.running() == first


def test_a_lost_state_is_reported_and_nothing_is_executed(nixos_machine):
    machine, _ = nixos_machine
    hang = "touch /run/here; " + closures.hang()
    deployment = machine.order(closures.nixos(machine.files, 2, after=hang))
    wait_until(lambda: machine.host.path("/run/here").exists())
    machine.host.close()
    shutil.rmtree(machine.host.state)
    machine.host.state.mkdir()
    shutil.rmtree(machine.host.path("/run"))
    machine.host.path("/run").mkdir()
    machine.host.boot()
    calls = len(machine.host.record())
    machine.start()
    outcome = machine.outcome(deployment)
    assert outcome.status == "Failed" and "state lost" in outcome.reason
    assert len(machine.host.record()) == calls


def test_a_journal_of_garbage_stops_nothing(nixos_machine):
    machine, _ = nixos_machine
    machine.agent.stop()
    for number, text in enumerate([b"", b"\0" * 4096, b"[]", b'{"id": 7}']):
        directory = machine.host.state / "deployments" / f"garbage-{number}"
        directory.mkdir()
        (directory / "journal.json").write_bytes(text)
    machine.start()
    machine.agent.wait_for("can't be read and was set aside")
    assert machine.deploy(closures.nixos(machine.files, 2)).status == "Succeeded"
    for directory in machine.host.state.glob("deployments/garbage-*"):
        shutil.rmtree(directory)


def test_somebody_elses_deployment_is_left_alone(nixos_machine):
    machine, first = nixos_machine
    other = closures.nixos(machine.files, "by-hand")
    machine.workspace.push(other)
    machine.host.fetch(machine.workspace.cache_url, machine.files.key.public, other)
    takes_over = f"{other}/bin/switch-to-configuration test"
    outcome = machine.deploy(closures.nixos(machine.files, 2, after=takes_over + "; exit 1"))
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    assert f"{other} runs now, so somebody else has deployed: it is left alone" in outcome.reason
    assert machine.host.running() == other and machine.host.profile() == first
    machine.host.output(f"{first}/bin/switch-to-configuration", "test")


# --- damaged files, byte by byte ------------------------------------------------------------------

OLD, NEW = (f"/nix/store/{letter * 32}-system" for letter in "ab")
WHOLE = journal.Record(
    id="0a1b",
    index=7,
    agent="web",
    host="https://ours",
    store_path=NEW,
    rollback_script=NEW,
    kind="NixOS",
    profile="/nix/var/nix/profiles/system",
    previous_running=OLD,
    previous_profile=OLD,
    previous_generation=4,
    rooted=(OLD,),
    boot_id="boot",
    step=journal.COMMITTING,
    attempts=1,
    revision=5,
    sequence=9,
    reason="why",
    times={journal.RECEIVED: 1.5, journal.COMMITTING: 2.5},
    log_size=70,
)
FIELDS = [field.name for field in dataclasses.fields(journal.Record)]
REPORTED = Reported(
    started=True, sized=True, line=12, offset=345, size=678, time="2026-01-01T00:00:00Z"
)


def places(text):
    """For each byte : the key of its line, and whether the byte belongs to the value."""
    key = ""
    for line in text.decode().splitlines(keepends=True):
        match = re.match(r' "(\w+)": ', line)
        key = match[1] if match else key
        start = match.end() if match else 0
        yield from ((key, index >= start) for index in range(len(line)))


def read(text):
    """The record of a journal; None if it can't be relied on."""
    try:
        return journal.Record.from_json(text)
    except journal.Unreadable:
        return None


def test_a_journal_of_any_other_length_is_unreadable():
    text = WHOLE.to_json()
    assert read(text) == WHOLE
    size = len(text)
    assert [length for length in range(size) if read(text[:length])] == []
    assert [length for length in range(size) if read(text[:length].ljust(size, b"\0"))] == []


def test_a_zero_anywhere_in_a_journal_is_noticed():
    text = WHOLE.to_json()
    assert [at for at in range(len(text)) if read(text[:at] + b"\0" + text[at + 1 :])] == []


def test_a_flipped_bit_in_a_journal_is_noticed_or_changes_only_its_value():
    text = WHOLE.to_json()
    count = 0
    for at, (key, in_value) in enumerate(places(text)):
        for bit in range(8):
            record = read(text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :])
            if record is not None:
                names = {n for n in FIELDS if getattr(record, n) != getattr(WHOLE, n)}
                assert names - {"unknown"} <= ({key} if in_value else set()), (at, bit, names)
                count += 1
    assert count < 8 * len(text) / 2, "most flipped bits are noticed"


OPTIONAL = ("version", "outcome", "confirmed", "signature", "by_hand", "needs_workspace")
OPTIONAL += ("operation", "reboot", "reboots")


def test_no_key_may_be_missing_in_a_journal_of_this_version():
    values = json.loads(WHOLE.to_json())
    for name in values:
        less = {key: value for key, value in values.items() if key != name}
        record = read(json.dumps(less).encode())
        assert record is None or (name in OPTIONAL and record == WHOLE)


def test_a_journal_of_version_1_is_read_without_the_keys_of_version_2():
    values = {**json.loads(WHOLE.to_json()), "version": 1}
    for name in journal.ADDED:
        del values[name]
    expected = dataclasses.replace(WHOLE, version=1, sequence=0)
    assert read(json.dumps(values).encode()) == expected
    del values["previous_running"]
    assert read(json.dumps(values).encode()) is None


@pytest.mark.parametrize("step", [journal.RECEIVED, journal.READY, journal.COMMITTING])
@pytest.mark.parametrize("wish", [{"operation": "boot"}, {"reboot": "window"}, {}])
def test_an_older_agent_does_not_begin_an_operation(step, wish):
    """It knows no operations, and would switch: to it the journal is none before anything began."""
    record = dataclasses.replace(WHOLE, step=step, **wish)
    values = json.loads(record.to_json())
    assert read(record.to_json()) == record
    is_hidden = bool(wish) and step != journal.COMMITTING
    assert isinstance(values["rooted"], list) != is_hidden  # older ones make a tuple of it


@pytest.mark.parametrize("version", [None, 0])
def test_keys_may_be_missing_in_an_older_journal(version):
    values = {"id": "i", "index": 1, "agent": "a", "host": "h", "store_path": NEW}
    values["step"] = journal.CHECKING
    if version is not None:
        values["version"] = version
    record = read(json.dumps(values).encode())
    assert record is not None
    assert (record.step, record.previous_running, record.attempts) == (journal.CHECKING, None, 0)


def test_a_newer_journal_keeps_its_keys_and_one_with_an_unknown_step_is_set_aside(tmp_path):
    newer = {**json.loads(WHOLE.to_json()), "version": 99, "moon": {"phase": 3}}
    record = read(json.dumps(newer).encode())
    assert record is not None and json.loads(record.to_json()) == newer
    (tmp_path / "journal.json").write_text(json.dumps({**newer, "step": "waning"}))
    with pytest.raises(journal.Unreadable, match="was set aside"):
        journal.load(str(tmp_path))
    assert history.was_set_aside(str(tmp_path))


def test_a_damaged_report_is_not_believed(tmp_path):
    """It starts from the beginning then: lines may arrive twice, but none is left out."""
    path, text = tmp_path / "reported.json", json.dumps(dataclasses.asdict(REPORTED)).encode()
    path.write_bytes(text)
    assert dataclasses.replace(Reported.load(str(path)), time=REPORTED.time) == REPORTED
    for at in range(len(text)):
        zero = text[:at] + b"\0" + text[at + 1 :]
        for damaged in (text[:at], zero, text[:at].ljust(len(text), b"\0")):
            path.write_bytes(damaged)
            assert Reported.load(str(path)) == Reported()


def test_a_directory_in_the_place_of_a_report_is_set_aside(tmp_path):
    (tmp_path / "reported.json").mkdir()
    assert Reported.load(str(tmp_path / "reported.json")) == Reported()
    assert not (tmp_path / "reported.json").exists()


def test_a_journal_is_read_again_when_its_file_was_replaced(tmp_path, monkeypatch):
    """Also when the new file has all marks of the old one, which was written a moment ago."""
    record = journal.Record("x", 1, "web", "http://a", "/nix/store/x", times={"received": 1.0})
    entry = journal.Journal(str(tmp_path), record)
    parsed, parse = [], journal.Record.from_json
    monkeypatch.setattr(
        journal.Record, "from_json", lambda text: parsed.append(text) or parse(text)
    )
    entry.enter(journal.RECEIVED)
    assert journal.load(str(tmp_path)).record == journal.load(str(tmp_path)).record
    assert len(parsed) == 2, "a file this new may be replaced by one with the same marks"
    os.utime(entry.path("journal.json"), (1, 1))
    assert journal.load(str(tmp_path)).record == journal.load(str(tmp_path)).record
    assert len(parsed) == 3, "an old one is remembered"
    entry.enter(journal.DOWNLOADING)
    assert journal.load(str(tmp_path)).record.step == journal.DOWNLOADING
