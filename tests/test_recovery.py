"""Deployments that are interrupted: by kill -9 of either process or both, by power loss, by a lost state directory."""

import dataclasses
import json
import os
import re
import shutil
import signal

import closures
import pytest
from hosts import wait_until

from activate import journal, logfile

pytestmark = pytest.mark.promise(2, 6, 7, 15)

WAITS = json.dumps({"unit_recheck": 0.2, "backoff": 0.1, "slowest": 0.5})
ONCE = "[ -e /nix/var/{name} ] || {{ touch /nix/var/{name}; {code}; }}"


def once(name, code):
    """Shell code that does something the first time only, also over a reboot."""
    return ONCE.format(name=name, code=code)


@pytest.fixture
def nixos_machine(make_machine):
    """A machine that runs a NixOS system, and that system's path."""
    machine = make_machine(env={"CACHIX_DEPLOY_WAITS": WAITS})
    first = closures.nixos(machine.files, f"{machine.name}-first")
    assert machine.deploy(first).status == "Succeeded"
    return machine, first


def switches(machine):
    return [
        pid
        for pid, line in machine.host.processes().items()
        if re.search(r" switch [0-9a-f-]{36}", line)
    ]


def kill_switch(machine):
    for pid in wait_until(lambda: switches(machine)):
        os.kill(pid, signal.SIGKILL)


def interrupt(machine, how):
    """Kill the switch process, the agent, both, or cut the power; an agent runs afterwards."""
    if how == "power":
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
    deployment = machine.order(
        closures.nixos(machine.files, 2, after="touch /run/here; " + closures.hang())
    )
    wait_until(lambda: machine.host.path("/run/here").exists())
    interrupt(machine, how)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    what = "the machine restarted" if how == "power" else "it was interrupted"
    assert f"{what} before it was confirmed" in outcome.reason
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == first
    assert outcome.log.splitlines()[-1].startswith("Failed to activate the deployment. ")
    assert machine.deploy(closures.nixos(machine.files, 3)).status == "Succeeded"


def test_the_agent_alone_in_the_activation_changes_nothing(nixos_machine):
    machine, _ = nixos_machine
    new = closures.nixos(
        machine.files, 2, after="touch /run/here; " + closures.wait_for("/run/go-on")
    )
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
    new = closures.nixos(
        machine.files, 2, before_boot=once("boot", f"touch /run/here; {closures.hang()}")
    )
    deployment = machine.order(new)
    wait_until(lambda: machine.host.path("/run/here").exists())
    interrupt(machine, how)
    assert machine.outcome(deployment).status == "Succeeded"
    assert machine.host.running() == machine.host.profile() == machine.host.boot_default() == new
    assert machine.host.record().count(("test", new)) == (2 if how == "power" else 1)


@pytest.mark.parametrize("how", ["switch", "both", "power"])
def test_in_the_rollback_is_rolled_back_again(nixos_machine, how):
    machine, _ = nixos_machine
    fallback = closures.nixos(
        machine.files, "fallback", before=once("first", ":") + "; " + once_second()
    )
    assert machine.deploy(fallback).status == "Succeeded"
    deployment = machine.order(closures.nixos(machine.files, 3, after="exit 1"))
    wait_until(lambda: machine.host.path("/run/here").exists())
    interrupt(machine, how)
    outcome = machine.outcome(deployment)
    assert (outcome.status, outcome.step) == ("Failed", "rolled-back")
    assert "the activation ended with status 1" in outcome.reason
    assert (
        machine.host.running() == machine.host.profile() == machine.host.boot_default() == fallback
    )


def once_second():
    """Hang the second time that the script runs: in the first rollback to it."""
    hang = f"touch /nix/var/hung /run/here; {closures.hang()}"
    return f"if [ -e /nix/var/ran ] && [ ! -e /nix/var/hung ]; then {hang}; fi; touch /nix/var/ran"


def test_a_rollback_that_never_gets_through_ends(nixos_machine):
    machine, _ = nixos_machine
    hang = "[ ! -e /run/broken ] || { kill -9 $PPID; sleep 3600; }"
    fallback = closures.nixos(machine.files, "fallback", before=hang)
    assert machine.deploy(fallback).status == "Succeeded"
    outcome = machine.deploy(closures.nixos(machine.files, 3, before="touch /run/broken; exit 1"))
    assert (outcome.status, outcome.step) == ("Failed", "rollback-failed")
    assert "the rollback was interrupted 3 times" in outcome.reason
    machine.host.path("/run/broken").unlink()
    assert machine.deploy(closures.nixos(machine.files, 4)).status == "Succeeded"


def test_the_agent_in_the_download_starts_again(nixos_machine):
    machine, _ = nixos_machine
    wrappers = machine.host.directory / "wrappers"
    wrappers.mkdir()
    real = shutil.which("nix-store")
    hold = "touch /run/here; " + closures.wait_for("/run/go-on")
    (wrappers / "nix-store").write_text(f'#!/bin/sh\n{hold}\nexec {real} "$@"\n')
    (wrappers / "nix-store").chmod(0o755)
    machine.agent.stop()
    machine.env = {
        "PATH": f"{wrappers}:{machine.host.environment['PATH']}",
        "CACHIX_DEPLOY_WAITS": WAITS,
    }
    machine.start()
    deployment = machine.order(closures.nixos(machine.files, 2))
    wait_until(lambda: machine.host.path("/run/here").exists())
    machine.agent.kill()
    machine.start()
    machine.host.path("/run/go-on").touch()
    outcome = machine.outcome(deployment)
    assert outcome.status == "Succeeded", outcome


def test_a_deployment_that_is_interrupted_again_and_again_before_it_begins_ends(nixos_machine):
    machine, first = nixos_machine
    wrappers = machine.host.directory / "wrappers"
    wrappers.mkdir()
    (wrappers / "nix-store").write_text("#!/bin/sh\ntouch /run/here\nexec sleep 3600\n")
    (wrappers / "nix-store").chmod(0o755)
    machine.agent.stop()
    machine.env = {
        "PATH": f"{wrappers}:{machine.host.environment['PATH']}",
        "CACHIX_DEPLOY_WAITS": WAITS,
    }
    machine.start()
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


def test_a_lost_state_is_reported_and_nothing_executed(nixos_machine):
    machine, _ = nixos_machine
    deployment = machine.order(
        closures.nixos(machine.files, 2, after="touch /run/here; " + closures.hang())
    )
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


# --- damaged files, byte by byte -------------------------------------------------------------------------------------

OLD, NEW = (f"/nix/store/{letter * 32}-system" for letter in "ab")
WHOLE = journal.Record(
    "0a1b", 7, "web", "https://ours", NEW, NEW, None, "NixOS", "/nix/var/nix/profiles/system", OLD, OLD, 4, (OLD,),
    "boot", journal.COMMITTING, 1, 5, "why", None, {journal.RECEIVED: 1.5, journal.COMMITTING: 2.5}, 70,
)  # fmt: skip
FIELDS = [field.name for field in dataclasses.fields(journal.Record)]
REPORTED = logfile.Reported(True, True, 12, 345, False, False, 678, "2026-01-01T00:00:00Z")


def places(text):
    """For each byte of a journal: the key of its line, and whether it is part of that key's value."""
    key = ""
    for line in text.decode().splitlines(keepends=True):
        found = re.match(r' "(\w+)": ', line)
        key = found[1] if found else key
        start = found.end() if found else 0
        yield from ((key, index >= start) for index in range(len(line)))


def read(text):
    """What a journal says; None where that can't be relied on."""
    try:
        return journal.Record.from_json(text)
    except journal.Unreadable:
        return None


def test_a_journal_of_any_length_but_its_own_says_nothing():
    text = WHOLE.to_json()
    assert read(text) == WHOLE
    assert [length for length in range(len(text)) if read(text[:length])] == []
    assert [
        length for length in range(len(text)) if read(text[:length].ljust(len(text), b"\0"))
    ] == []


def test_a_zero_anywhere_in_a_journal_is_noticed():
    text = WHOLE.to_json()
    assert [at for at in range(len(text)) if read(text[:at] + b"\0" + text[at + 1 :])] == []


def test_a_flipped_bit_in_a_journal_is_noticed_or_changes_the_value_in_which_it_is():
    text = WHOLE.to_json()
    kept = 0
    for at, (key, in_value) in enumerate(places(text)):
        for bit in range(8):
            found = read(text[:at] + bytes([text[at] ^ 1 << bit]) + text[at + 1 :])
            if found is not None:
                differ = {
                    name for name in FIELDS if getattr(found, name) != getattr(WHOLE, name)
                } - {"unknown"}
                assert differ <= ({key} if in_value else set()), (at, bit, differ)
                kept += 1
    assert kept < 8 * len(text) / 2, "most of it is noticed"


def test_of_a_journal_of_this_version_no_key_may_be_missing():
    values = json.loads(WHOLE.to_json())
    for name in values:
        less = {key: value for key, value in values.items() if key != name}
        found = read(json.dumps(less).encode())
        assert found is None or (name, found) == ("version", WHOLE)


@pytest.mark.parametrize("version", [None, 0])
def test_of_an_older_journal_keys_may_be_missing(version):
    known = {
        "id": "i",
        "index": 1,
        "agent": "a",
        "host": "h",
        "store_path": NEW,
        "step": journal.CHECKING,
    }
    found = read(json.dumps(known if version is None else {**known, "version": version}).encode())
    assert found is not None and (found.step, found.previous_running, found.attempts) == (
        journal.CHECKING,
        None,
        0,
    )


def test_a_newer_journal_keeps_its_keys_and_one_with_a_step_of_its_own_is_set_aside(tmp_path):
    newer = {**json.loads(WHOLE.to_json()), "version": 2, "moon": {"phase": 3}}
    found = read(json.dumps(newer).encode())
    assert found is not None and json.loads(found.to_json()) == newer
    (tmp_path / "journal.json").write_text(json.dumps({**newer, "step": "waning"}))
    with pytest.raises(journal.Unreadable, match="was set aside"):
        journal.load(str(tmp_path))
    assert journal.was_set_aside(str(tmp_path))


def test_of_a_damaged_report_nothing_is_believed(tmp_path):
    """It begins anew then: lines may come twice, none is left out."""
    path, text = tmp_path / "reported.json", json.dumps(dataclasses.asdict(REPORTED)).encode()
    path.write_bytes(text)
    assert dataclasses.replace(logfile.Reported.load(str(path)), time=REPORTED.time) == REPORTED
    for at in range(len(text)):
        for damaged in (
            text[:at],
            text[:at] + b"\0" + text[at + 1 :],
            text[:at].ljust(len(text), b"\0"),
        ):
            path.write_bytes(damaged)
            assert logfile.Reported.load(str(path)) == logfile.Reported()


def test_a_directory_in_the_place_of_a_report_is_set_aside(tmp_path):
    (tmp_path / "reported.json").mkdir()
    assert logfile.Reported.load(str(tmp_path / "reported.json")) == logfile.Reported()
    assert not (tmp_path / "reported.json").exists()
