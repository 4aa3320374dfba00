"""Changes at the machine: the path to go back to, the command line, and the end of it."""

import json
import os
import stat

import closures
import pytest
from hosts import SYSTEM, command

import cachix_leader
import cachix_local
import cachix_report_state
from activate import cancellation, history, journal, recovery
from activate.agent import local
from activate.kinds import nixos
from cachix_deploy import main
from cachix_protocol import Error, UsageError
from cachix_reported import prune

A, B, C, D = (f"/nix/store/{letter * 32}-{letter}" for letter in "abcd")
ROLLBACK, ACTIVATION = journal.ROLLBACK, journal.ACTIVATION


def record(path, step=journal.SUCCEEDED, index=1, before=A, **facts):
    """A deployment of a NixOS system."""
    given = {"kind": "NixOS", "profile": SYSTEM, "previous_running": before, **facts}
    return journal.Record(f"id-{index}", index, "web", "http://w", path, step=step, **given)


def back(path):
    """A rollback by hand."""
    return record(path, by_hand=ROLLBACK)


# --- the way back ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("records", "paths"),
    [
        ([], []),
        ([record(B)], [A, B]),
        ([record(B), record(C)], [A, B, C]),
        ([record(B), record(B)], [A, B]),
        ([record(B), record(C, journal.ROLLED_BACK)], [A, B]),
        ([record(B), record(C), back(B)], [A, B]),
        ([record(B), record(C), back(A)], [A]),
        ([record(B), record(C), back(A), record(D)], [A, D]),
        ([record(B), record(C), record(B)], [A, B, C, B]),  # ordered by a workspace
        ([record(B), back(D)], [A, B, D]),  # by --to
        ([record(B, before=None)], [B]),
    ],
)
def test_paths_that_were_confirmed(records, paths):
    assert local.confirmed_paths(records) == paths


@pytest.mark.parametrize(
    ("running", "confirmed", "older", "paths"),
    [
        (C, [A, B, C], [], [B, A]),
        (B, [A, B, C], [], [A]),
        (D, [A, B, C], [], [C, B, A]),  # changed by hand, or a rollback has failed
        (B, [], [A, B], [A]),  # Cachix's agent has deployed
        (A, [A], [C, D, A], [D, C]),
        (A, [A], [], []),
        (B, [A, B, C, B], [], [C, A]),
        (None, [], [], []),
    ],
)
def test_the_way_back(running, confirmed, older, paths):
    assert local.way_back(running, confirmed, older) == paths


def test_the_number_of_a_deployment():
    records = [record(C, journal.FAILED, 3), record(B, index=2), back(A)]
    assert local.target_of(records, nixos, SYSTEM, "2") == B
    for to, words in (("3", "deployment 3 was not confirmed"), ("9", "deployment 9 is not known")):
        with pytest.raises(Error, match=words):
            local.target_of(records, nixos, SYSTEM, to)
    assert local.target_of(records, nixos, SYSTEM, D) == D


def test_a_path_that_is_gone(monkeypatch):
    monkeypatch.setattr("activate.kinds.nixos.running_path", lambda profile: B)
    monkeypatch.setattr(local, "generations", lambda profile: [])
    with pytest.raises(Error, match=f"{A}, which ran before, is not in the store any more"):
        local.target_of([record(B)], nixos, SYSTEM, "")
    with pytest.raises(Error, match="no path is known"):
        local.target_of([record(B, before=None)], nixos, SYSTEM, "")


def test_generations(tmp_path, monkeypatch):
    monkeypatch.setattr("activate.nix.STORE", str(tmp_path))
    for number in (9, 10, 11):
        (tmp_path / f"system-{number}-link").symlink_to(tmp_path / f"path-{number}")
        (tmp_path / "system").unlink(missing_ok=True)
    (tmp_path / "system").symlink_to("system-10-link")
    (tmp_path / "system-other-1-link").symlink_to(tmp_path / "path-1")
    names = [os.path.basename(path) for path in local.generations(str(tmp_path / "system"))]
    assert names in (["path-9", "path-10"], [f"system-{n}-link" for n in (9, 10)])


def test_several_profiles():
    other = record(
        B, profile="/nix/var/nix/profiles/tools", profile_name="tools", kind="plain path"
    )
    with pytest.raises(Error, match="several profiles, name one of them: .*tools"):
        local.profile_of([record(B), other], None)
    assert local.profile_of([record(B), other], "tools")[1:] == (other.profile, "tools")
    assert local.profile_of([record(B)], None) == (nixos, SYSTEM, None)


def test_the_agent_of_the_machine(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    assert local.agent_of(str(tmp_path), [], "host") == "host"
    assert local.agent_of(str(tmp_path), [record(B)], "host") == "web"
    for number, name in enumerate(("old", "new")):
        path = tmp_path / f"registered-{name}.json"
        path.touch()
        os.utime(path, (number, number))
    assert local.agent_of(str(tmp_path), [record(B)], "host") == "new"


# --- what was begun by hand, and is not ended -----------------------------------------------------


@pytest.mark.parametrize(("attempts", "do"), [(0, recovery.START), (1, recovery.END)])
def test_it_is_not_begun_again(attempts, do):
    """Nobody may want it any more; a deployment of a workspace is begun again."""
    begun = record(B, journal.READY, by_hand=ROLLBACK, attempts=attempts)
    action = recovery.next_action(begun, recovery.Facts())
    assert action.do == do
    if do == recovery.END:
        assert action.reason == "it was interrupted before anything was changed"


def test_a_journal_keeps_who_began_it():
    begun = record(B, by_hand=ACTIVATION, needs_workspace=False)
    assert journal.Record.from_json(begun.to_json()) == begun
    values = json.loads(begun.to_json())
    for name, bad in (("by_hand", 1), ("needs_workspace", "no")):
        with pytest.raises(journal.Unreadable):
            journal.Record.from_json(json.dumps({**values, name: bad}).encode())
    del values["by_hand"], values["needs_workspace"]  # of an older release
    older = journal.Record.from_json(json.dumps(values).encode())
    assert older.by_hand is None and older.needs_workspace


def test_a_cancellation(tmp_path):
    entry = journal.Journal(str(tmp_path / "id"), record(B))
    entry.enter(journal.READY)
    cancellation.check(entry)
    cancellation.request(entry)
    with pytest.raises(Error, match="it was cancelled by hand"):
        cancellation.check(entry)


def test_old_ones_are_removed(tmp_path):
    for number in range(25):
        entry = journal.Journal(
            str(tmp_path / "deployments" / f"{number:02}"),
            record(B, index=0, by_hand=ROLLBACK, sequence=number),
        )
        entry.enter(journal.SUCCEEDED)
    prune(str(tmp_path))
    assert len(history.load_all(str(tmp_path))[0]) == 20


@pytest.mark.parametrize(
    ("step", "begun", "back"),
    [
        (journal.ROLLED_BACK, True, True),
        (journal.FAILED, True, True),
        (journal.FAILED, False, False),  # nothing was activated: the present path is to be left
        (journal.SUCCEEDED, True, False),  # it was too late
        (journal.ROLLBACK_FAILED, True, False),
    ],
)
def test_a_cancelled_deployment_may_be_the_way_back(tmp_path, step, begun, back):
    times = {journal.ACTIVATING: 1.0} if begun else {}
    entry = journal.Journal(str(tmp_path), record(B, step, times=times))
    assert cachix_leader.is_back([entry]) is back and not cachix_leader.is_back([])


@pytest.mark.parametrize(
    ("entry", "status", "words"),
    [
        (back(A), 0, f"rolled back to {A}"),
        (record(B, by_hand=ACTIVATION), 0, f"this machine runs {B}"),
        (record(B, journal.FAILED, reason="why", by_hand=ACTIVATION), 1, "failed (why)"),
        (record(B, journal.READY, by_hand=ACTIVATION), 1, "it has not ended: an agent that"),
    ],
)
def test_ends(entry, status, words):
    ended = cachix_leader.status_and_words(cachix_leader.conclusion(entry))
    assert ended[0] == status and ended[1].startswith(words)


@pytest.mark.parametrize(
    ("records", "action"),
    [
        ([], None),
        ([record(B)], None),
        ([back(A), record(B)], "rollback"),
        ([record(C, journal.ROLLED_BACK), back(A)], "rollback"),
        ([record(A), back(A)], None),
    ],
)
def test_the_workspace_is_told(records, action):
    """The newest of the records come first."""
    fact = cachix_report_state.done_by_hand(records, SYSTEM, A)
    assert (fact and fact["action"]) == action


@pytest.mark.parametrize(
    ("records", "running", "target", "words"),
    [
        ([], A, A, None),
        ([record(A)], A, A, None),
        ([record(A)], B, A, f"{B} runs, but {A} was confirmed last"),
        ([record(A)], A, B, f"{SYSTEM} is {B}, but {A} was confirmed last"),
        ([record(A)], B, C, f"{B} runs and {SYSTEM} is {C}, but {A} was confirmed last"),
        ([record(B, journal.ROLLED_BACK), record(A)], A, A, None),
        ([record(B, journal.CHECKING), record(A)], B, A, None),  # it may yet be confirmed
        ([record(B, journal.READY, profile=None), record(A)], B, A, None),
        ([back(B), record(A)], B, B, None),
    ],
)
def test_drift(records, running, target, words):
    assert cachix_report_state.drifted(records, SYSTEM, running, target) == words


# --- the command line -----------------------------------------------------------------------------


@pytest.fixture
def state(tmp_path, monkeypatch):
    monkeypatch.setenv("STATE_DIRECTORY", str(tmp_path / "state"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CACHIX_AGENT_TOKEN", raising=False)
    return tmp_path


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["activate-local"], "activate-local needs a store path"),
        (["activate-local", "/etc/passwd"], "SPEC must be /nix/store/"),
        (["activate-local", "none.json"], "none.json can't be read"),
        (["activate-local", "/"], "SPEC must be /nix/store/"),
        (["activate-local", A, "--trusted-key=a-1:" + "A" * 43 + "="], "--substituter=URL, which"),
        (["activate-local", A, "--substituter=ftp://a"], "--substituter must be a URL"),
        (["rollback", "--to=../x"], "--to must be /nix/store/"),
        (["rollback", "a/b"], "PROFILE 'a/b' is not usable"),
    ],
)
def test_what_is_refused(state, capsys, words, message):
    assert main(words) in (1, 64)
    assert message in capsys.readouterr().err


@pytest.fixture
def orders(state, monkeypatch):
    """The orders that leaders would get."""
    orders = []

    def run(front):
        orders.append(front.order)
        return 0

    monkeypatch.setattr(cachix_local.Front, "run", run)
    return orders


def test_an_order_to_roll_back(orders):
    assert main(["rollback", "system", "--to=7", "--cancel", "--on-unit-failure=rollback"]) == 0
    assert main(["rollback"]) == 0
    first, second = orders
    assert (first["profile"], first["path"], first["cancel"]) == ("system", "7", True)
    assert (second["profile"], second["path"], second["cancel"]) == (None, None, False)
    assert first["policy"] == {"on_unit_failure": "tolerate", "on_reboot_needed": "boot"}
    assert first["token"] == first["host"] == ""


def test_an_order_to_activate(orders, state, monkeypatch):
    spec = state / "deploy.json"
    spec.write_text(json.dumps({"agents": {"web": A, "db": B}}))
    assert main(["activate-local", str(spec), "--agent=db", "--substituter=file:///mnt"]) == 0
    monkeypatch.setenv("CACHIX_AGENT_TOKEN", "secret-of-this-test")
    assert main(["activate-local", A, "tools", "--host=http://w"]) == 0
    first, second = orders
    assert (first["path"], first["substituter"], first["token"]) == (B, "file:///mnt", "")
    assert (second["path"], second["profile"], second["host"]) == (A, "tools", "http://w")
    assert second["token"] == "secret-of-this-test"


def test_an_agent_that_the_specification_lacks(state):
    spec = state / "deploy.json"
    spec.write_text(json.dumps({"agents": {"web": A}}))
    (state / "linked").symlink_to(spec)
    linked = cachix_local.content_of(str(state / "linked"), ["db", "web"])
    plain = {"operation": "switch", "reboot": "never"}
    assert linked == {"path": A, "script": None, **plain}
    with pytest.raises(UsageError, match="has no agent db: give --agent=NAME, one of web"):
        cachix_local.content_of(str(spec), ["db"])
    spec.write_text(json.dumps({"agents": {"web": A}, "options": {"operation": "boot"}}))
    assert cachix_local.content_of(str(spec), ["web"])["operation"] == "boot"
    (state / "result").symlink_to(A)
    assert cachix_local.content_of(str(state / "result"), ["db"]) == {"path": A}


# --- on a machine ---------------------------------------------------------------------------------


def test_a_machine_without_agent_and_workspace(host, cache):
    """The first system of a machine, from a cache that is a directory to nobody but its owner."""
    first, second = (closures.plain(cache, number) for number in (1, 2))
    bad = closures.script(cache, "bad", "exit 1")
    options = [f"--substituter={cache.url}", f"--trusted-key={cache.key.public}"]

    def do(*words):
        return host.run([*command("cachix-deploy"), *words])

    for path in (first, second):
        result = do("activate-local", path, *options)
        assert result.returncode == 0, result.stderr
        assert result.stdout.endswith(f"this machine runs {path}\n") and host.profile() == path
    result = do("rollback")
    assert result.returncode == 0 and host.profile() == first, result.stderr
    assert do("rollback").returncode == 1 and host.profile() == first
    spec = host.directory / "deploy.json"
    system = os.uname().machine + "-linux"
    spec.write_text(json.dumps({"agents": {"web": second}, "rollbackScript": {system: bad}}))
    result = do("activate-local", str(spec), "--agent=web", *options)
    assert result.returncode == 1 and host.profile() == first
    assert "error: rolled-back (the rollback script" in result.stderr
    facts = json.loads(do("status", "--json").stdout)
    assert [fact["byHand"] for fact in facts["results"]] == [
        ACTIVATION,
        ROLLBACK,
        *[ACTIVATION] * 2,
    ]
    assert stat.S_IMODE(os.stat(host.state / "deployments").st_mode) == 0o700


def test_with_a_token_the_new_system_must_reach_the_workspace(machine):
    host, path = machine.host, closures.plain(machine.files, 1)
    machine.workspace.push(path)
    options = [f"--substituter={machine.workspace.cache_url}", "--confirm-timeout=2"]
    options += [f"--trusted-key={machine.files.key.public}"]
    token = {"CACHIX_AGENT_TOKEN": machine.workspace.token("agent")}
    argv = [*command("cachix-deploy"), "activate-local", path, *options]
    lost = host.run([*argv, "--host=http://127.0.0.1:9"], env=token)
    assert lost.returncode == 1 and "the workspace could not be reached for 2 s" in lost.stderr
    assert host.run([*argv, f"--host={machine.workspace.url}"], env=token).returncode == 0
    assert host.profile() == path
