"""Roll-outs: the decisions by tables, and the command at a scripted workspace that remembers."""

from __future__ import annotations

import json
import pathlib
import random
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, Callable, Optional

import pytest
from fleet_model import NEW, OLD, REASON, Fleet

import cachix_ci
import cachix_deploy
import cachix_follow
import cachix_order
from activate import startup
from cachix_protocol import CANCELLED, FAILED, SUCCEEDED, UsageError
from cachix_rollout import (
    End,
    Fact,
    Plan,
    Rollout,
    batches,
    plan,
    refusal,
    selection,
    size,
    verdict,
    wants_labels,
)
from cachix_summary import few

ROOT = pathlib.Path(cachix_ci.__file__).parent
TOKEN = "ACTIVATE-TOKEN"
DOCUMENT = ROOT / "docs" / "activate-json.rst"
CI = ("GITHUB_ACTIONS", "GITLAB_CI", "GITHUB_STEP_SUMMARY", "GITHUB_SHA", "FORCE_COLOR", "NO_COLOR")

# --- decisions ------------------------------------------------------------------------------------

ABC = ["a", "b", "c", "d", "e"]


@pytest.mark.parametrize(
    ("names", "canary", "batch", "parts"),
    [
        (ABC, "", "", [ABC]),
        (ABC, "", "2", [["a", "b"], ["c", "d"], ["e"]]),
        (ABC, "", "9", [ABC]),
        (ABC, "", "40%", [["a", "b"], ["c", "d"], ["e"]]),
        (ABC, "", "1%", [["a"], ["b"], ["c"], ["d"], ["e"]]),
        (ABC, "", "100%", [ABC]),
        (ABC, "c", "", [["c"], ["a", "b", "d", "e"]]),
        (ABC, "ca", "2", [["a", "c"], ["b", "d"], ["e"]]),
        (ABC, "abcde", "2", [ABC]),
        (["a"], "a", "", [["a"]]),
        ([], "", "", []),
        ([], "", "10%", []),
        (list(map(str, range(50))), "", "10%", None),
    ],
)
def test_batches(names: list[str], canary: str, batch: str, parts: Optional[list[Any]]) -> None:
    result = batches(names, set(canary), batch)
    assert parts is None or result == parts
    assert sorted(name for part in result for name in part) == sorted(names) and all(result)
    assert parts is not None or [len(part) for part in result] == [5] * 10


@pytest.mark.parametrize(
    ("batch", "count", "expected"),
    [("10%", 50, 5), ("10%", 51, 6), ("10%", 3, 1), ("7", 50, 7), ("100%", 3, 3)],
)
def test_size(batch: str, count: int, expected: int) -> None:
    assert size(batch, count) == expected


@pytest.mark.parametrize("batch", ["0", "0%", "101%", "-1", "ten", "1.5", "10 %", "%", "9" * 10])
def test_sizes_that_are_none(batch: str) -> None:
    with pytest.raises(UsageError, match="--batch must be a number of agents, or a share"):
        size(batch, 10)


FLEET = {
    "web1": Fact(labels=("eu", "web")),
    "web2": Fact(labels=("us",)),
    "db": Fact(labels=("eu",)),
    "eu": Fact(),
}


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["web1"], ["web1"]),
        (["db", "web1"], ["web1", "db"]),
        (["web*"], ["web1", "web2"]),
        (["web[!1]"], ["web2"]),
        (["us"], ["web2"]),
        (["us", "d?"], ["web2", "db"]),
        (["eu"], ["eu"]),  # the agent of this name, although there is such a label
        (["web"], ["web1"]),
    ],
)
def test_selection(words: list[str], names: list[str]) -> None:
    assert selection(words, list(FLEET), FLEET) == names


@pytest.mark.parametrize("words", [["nobody"], ["web1", "WEB1"], ["x*"], ["us/"]])
def test_a_word_that_selects_none(words: list[str]) -> None:
    for fleet in (FLEET, None):
        with pytest.raises(UsageError, match=re.escape(repr(words[-1]))):
            selection(words, list(FLEET), fleet)


def test_only_words_that_can_be_nothing_else_are_labels() -> None:
    assert wants_labels(["us"], FLEET) and wants_labels(["web1", "us"], FLEET)
    assert not wants_labels(["web1", "x*", "eu"], FLEET)


def fact(**changes: Any) -> Fact:
    values = {"running": NEW, "last_path": NEW, "last_state": "succeeded"}
    return Fact(**{**values, **changes})


@pytest.mark.parametrize(
    ("changes", "has_it"),
    [
        ({}, True),
        ({"running": OLD}, False),
        ({"last_path": OLD}, False),
        ({"last_state": "reboot-needed"}, False),
        ({"last_state": "rolled-back"}, False),
        ({"under_way": True}, False),
        ({"online": False}, True),
        ({"running": None, "last_path": None}, False),
    ],
)
def test_what_runs_its_path_already(changes: dict[str, Any], has_it: bool) -> None:
    assert fact(**changes).has(NEW) is has_it


AGENTS = {"a": NEW, "b": NEW, "c": NEW, "d": NEW}
KNOWN = {"a": Fact(), "b": fact(), "c": Fact(online=False)}


@pytest.mark.parametrize(
    ("rollout", "fleet", "expected"),
    [
        ({}, None, Plan([["a", "b", "c", "d"]])),
        ({"batch": "2"}, None, Plan([["a", "b"], ["c", "d"]])),
        ({}, KNOWN, Plan([["a", "b", "c"]], unknown=["d"])),
        ({"batch": "9"}, KNOWN, Plan([["a", "c"]], unknown=["d"], unchanged=["b"])),
        ({"batch": "9", "force": True}, KNOWN, Plan([["a", "b", "c"]], unknown=["d"])),
        ({"offline": "skip"}, KNOWN, Plan([["a", "b"]], unknown=["d"], offline=["c"])),
        ({"on": ("a", "b")}, KNOWN, Plan([["a", "b"]])),
        (
            {"canary": ("c",), "offline": "skip"},
            KNOWN,
            Plan([["a"]], missing=["c"], unknown=["d"], unchanged=["b"], offline=["c"]),
        ),
    ],
)
def test_plan(rollout: dict[str, Any], fleet: Any, expected: Plan) -> None:
    assert plan(Rollout(**rollout), AGENTS, fleet) == expected


@pytest.mark.parametrize(
    ("rollout", "parts", "words"),
    [
        ({}, {}, ""),
        ({}, {"unknown": ["x"]}, "unknown agents: x"),
        ({"unknown": "skip"}, {"unknown": ["x"]}, ""),
        ({"offline": "fail"}, {"offline": ["x", "y"]}, "offline: x, y"),
        ({"offline": "skip"}, {"offline": ["x"]}, ""),
        ({"offline": "skip"}, {"offline": ["x"], "missing": ["x"]}, "canaries are offline"),
    ],
)
def test_refusal(rollout: dict[str, Any], parts: dict[str, Any], words: str) -> None:
    text = refusal(Rollout(**rollout), Plan([["a"]], **parts))
    assert words in text and bool(text) == bool(words)


@pytest.mark.parametrize(
    ("statuses", "most", "sentence"),
    [
        ([SUCCEEDED], 0, ""),
        ([], 0, ""),
        ([SUCCEEDED, FAILED, SUCCEEDED], 0, "stopped after 3 of 50: web1 failed: REASON"),
        ([SUCCEEDED, FAILED], 1, ""),
        ([FAILED, FAILED], 1, "stopped after 2 of 50: web0 failed: REASON, and 1 more failed"),
        ([CANCELLED], 0, "stopped after 1 of 50: web0 was cancelled: REASON"),
    ],
)
def test_verdict(statuses: list[str], most: int, sentence: str) -> None:
    ends = [End(f"web{index}", status, "REASON") for index, status in enumerate(statuses)]
    assert verdict(ends, most, 50) == sentence


def test_a_verdict_is_one_line() -> None:
    text = verdict([End("web", FAILED, "one\ntwo \x1b[2J" + "x" * 5000)], 0, 1)
    assert "one two" in text and text.isprintable() and len(text) < 300


@pytest.mark.parametrize(
    ("names", "text"),
    [
        ([], ""),
        (["a", "b"], "a, b"),
        (["x" * 50, "y" * 50, "z"], "x" * 50 + " and 2 more"),
        (["x" * 500], "x" * 70),
    ],
)
def test_few_names(names: list[str], text: str) -> None:
    assert few(names) == text


# --- the command ----------------------------------------------------------------------------------


class Result:
    """The exit status of the command, and what it printed."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err
        self.lines = out.splitlines()

    @property
    def events(self) -> list[dict[str, Any]]:
        return [json.loads(line) for line in self.lines]

    @property
    def summary(self) -> dict[str, Any]:
        assert self.events[-1]["event"] == "summary"
        return self.events[-1]


@pytest.fixture
def fleets() -> Iterator[Callable[..., Fleet]]:
    running: list[Fleet] = []

    def make(*names: str, **more: Any) -> Fleet:
        running.append(Fleet(*(names or ("web1", "web2", "web3", "db")), **more))
        return running[-1]

    yield make
    for fleet in running:
        fleet.__exit__()


@pytest.fixture
def activate(
    tmp_path: pathlib.Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Result]:
    """Run the command in this process, with shorter waits."""
    for name in CI:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("CACHIX_ACTIVATE_TOKEN", TOKEN)
    monkeypatch.setattr(startup, "protect", lambda writes=True: None)  # this is the tests' process
    monkeypatch.setattr(cachix_order, "ORDER_PATIENCE", 0.5)
    monkeypatch.setattr(cachix_follow, "POLL_SECONDS", 0.05)
    monkeypatch.setattr(cachix_follow, "QUIET_SECONDS", 0.4)
    monkeypatch.setattr(random, "uniform", lambda low, high: low / 10)

    def run(fleet: Fleet, *words: str, spec: Any = None) -> Result:
        path = tmp_path / "deploy.json"
        path.write_text(json.dumps(spec or fleet.spec))
        capfd.readouterr()
        status = cachix_deploy.run(["activate", str(path), f"--host={fleet.host}", *words])
        out, err = capfd.readouterr()
        assert TOKEN not in out + err and "Traceback" not in err
        return Result(status, out, err)

    return run


def test_without_options_nothing_is_asked(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.running["db"] = NEW
    result = activate(fleet)
    assert result.status == 0 and fleet.orders == [fleet.names]
    assert {word.split("/")[-2] for word in fleet.asked} <= {"deploy", "deployment"}
    assert result.lines[0] == f"Run 1: {fleet.host}/runs/1"


def test_a_roll_out_goes_to_its_end(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    result = activate(fleet, "--canary=db", "--batch=2", "--pause=0")
    assert result.status == 0
    assert fleet.orders == [["db"], ["web1", "web2"], ["web3"]]
    assert len(fleet.runs) == 1 and [body.get("run") for body in fleet.bodies] == [None, 1, 1]
    assert set(fleet.running.values()) == {NEW}
    heads = [line for line in result.lines if line.startswith("Batch")]
    assert heads == [
        "Batch 1 of 3, 1 agent",
        "Batch 2 of 3, 2 agents",
        "Batch 3 of 3, 1 agent",
    ]


def test_the_next_batch_waits_for_the_former(fleets: Any, activate: Any) -> None:
    fleet = fleets()

    def check(names: list[str]) -> None:
        ordered = {name for order in fleet.orders for name in order}
        assert all(fleet.running[name] == NEW for name in ordered), (names, ordered)

    fleet.on_order = check
    assert activate(fleet, "--batch=1").status == 0 and len(fleet.orders) == 4


def test_a_failure_in_the_second_batch_stops(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.failing["web2"] = REASON
    result = activate(fleet, "--batch=1")
    assert result.status == 1 and fleet.orders == [["web1"], ["web2"]]
    assert f"error: stopped after 2 of 4: web2 failed: {REASON}\n" in result.err
    assert result.lines[-1] == "2 not posted: web3, db"
    assert fleet.running == {"web1": NEW, "web2": OLD, "web3": OLD, "db": OLD}


def test_a_canary_that_fails_stops(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.failing["db"] = REASON
    result = activate(fleet, "--canary=d*")
    assert result.status == 1 and fleet.orders == [["db"]]
    assert "stopped after 1 of 4: db failed" in result.err


def test_some_failures_may_be_allowed(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.failing.update(web1="one", web3="two")
    result = activate(fleet, "--batch=1", "--max-failures=1", "--json")
    assert result.status == 1 and fleet.orders == [["web1"], ["web2"], ["web3"]]
    assert result.summary["stopped"] == "stopped after 3 of 4: web1 failed: one, and 1 more failed"
    del fleet.failing["web3"]
    result = activate(fleet, "--batch=1", "--max-failures=1", "--json")
    assert result.status == 1 and result.summary["stopped"] is None
    assert result.summary["failed"] == ["web1"] and fleet.running["db"] == NEW


def test_a_pause_is_made_between_batches_only(
    fleets: Any, activate: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    pauses = []
    monkeypatch.setattr(cachix_ci, "sleep", pauses.append)
    result = activate(fleets(), "--batch=2", "--pause=60")
    assert result.status == 0 and pauses == [60]
    assert "batch 1 of 2 has ended well, the next one is in 60 s" in result.err
    fleet = fleets()
    result = activate(fleet, "--batch=2", "--pause=60", "--timeout=30")
    assert result.status == 1 and len(fleet.orders) == 1
    assert "2 not posted; the same command line goes on from there" in result.err
    assert "gave up waiting at the --timeout" in result.err


def test_what_had_succeeded_is_taken_back(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.running["web1"] = OLD.replace("1", "0")
    before = dict(fleet.running)
    fleet.failing["web3"] = REASON
    result = activate(fleet, "--batch=1", "--rollback-succeeded", "--json")
    assert result.status == 1 and fleet.running == before
    assert fleet.orders == [["web1"], ["web2"], ["web3"], ["web1", "web2"]]
    assert result.summary["rolledBack"] == ["web1", "web2"]
    assert result.summary["notPosted"] == ["db"] and result.summary["failed"] == ["web3"]
    assert "taking back 2 that had succeeded: web1, web2" in result.err
    result = activate(fleet, "--rollback-succeeded")
    assert result.status == 1 and fleet.running == before
    assert "Taken back:" in result.lines


def test_what_can_not_be_taken_back_is_named(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.running["web1"] = None
    fleet.running["web2"] = NEW
    fleet.failing["web3"] = REASON
    result = activate(fleet, "--rollback-succeeded")
    assert result.status == 1 and fleet.orders[1:] == [["db"]]
    assert "2 not taken back: web1, web2" in result.lines


def test_with_a_signature_it_is_taken_back_by_a_signed_order(
    fleets: Any, activate: Any, tmp_path: pathlib.Path
) -> None:
    fleet = fleets()
    fleet.failing["web2"] = REASON
    key = tmp_path / "ci.key"
    assert cachix_deploy.run(["key", "create", "ci-1", str(key)]) == 0
    words = ("--batch=1", "--rollback-succeeded", f"--signing-key={key}", "--json")
    result = activate(fleet, *words)
    assert result.summary["rolledBack"] == ["web1"] and fleet.running["web1"] == OLD
    last = fleet.bodies[-1]
    assert last["agents"] == {"web1": OLD} and last["signatures"]["web1"]["allowDowngrade"]


@pytest.mark.parametrize(
    ("words", "orders", "sentence"),
    [
        ((), [["web1", "web2", "web3", "db"]], "web2: never connected so far, waiting for it"),
        (("--offline=skip",), [["web1", "web3", "db"], ["web2"]], ""),
        (("--offline=skip", "--batch=2"), [["web1", "web3"], ["db"], ["web2"]], ""),
        (("--offline=fail",), [], "nothing was deployed, as agents are offline: web2"),
        (("--offline=skip", "--canary=web2"), [], "canaries are offline or unknown: web2"),
    ],
)
def test_agents_that_are_offline(
    fleets: Any, activate: Any, words: tuple[str, ...], orders: list[Any], sentence: str
) -> None:
    fleet = fleets()
    fleet.offline.add("web2")
    result = activate(fleet, *words, "--timeout=4")
    assert fleet.orders == orders and sentence in result.err
    assert result.status == (0 if not sentence else 1)
    last = "1 offline, deployed when they connect: web2"
    assert (last == (result.lines or [""])[-1]) is (not sentence)


def test_what_is_offline_is_not_queued_after_a_stop(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.offline.add("web2")
    fleet.failing["db"] = REASON
    result = activate(fleet, "--offline=skip", "--batch=2", "--json")
    assert result.status == 1 and fleet.orders == [["web1", "web3"], ["db"]]
    assert result.summary["notPosted"] == ["web2"] and result.summary["offline"] == []
    fleet.orders.clear()
    result = activate(fleet, "--offline=skip", "--json")
    assert result.status == 1 and fleet.orders == [["web1", "web3", "db"], ["web2"]]


def test_what_could_not_be_taken_back_is_named(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.failing["web2"] = REASON
    fleet.roll_back = lambda number, names: (409, {"error": "they take signed ones only"})
    result = activate(fleet, "--batch=1", "--rollback-succeeded", "--json")
    assert result.status == 1 and result.summary["notRolledBack"] == ["web1"]
    assert "stopped after 2 of 4" in result.err and "they take signed ones only" in result.err


def test_an_agent_that_goes_offline_meanwhile_is_skipped(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.on_order = lambda names: fleet.offline.add("web3")
    result = activate(fleet, "--offline=skip", "--batch=2", "--json")
    assert result.status == 0 and fleet.orders == [["web1", "web2"], ["db"], ["web3"]]
    assert result.summary["offline"] == ["web3"] and result.summary["notPosted"] == []


def test_agents_that_are_unknown(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    spec = {"agents": {**fleet.spec["agents"], "new": NEW}}
    result = activate(fleet, "--batch=2", spec=spec)
    assert result.status == 1 and fleet.orders == [] and "unknown agents: new" in result.err
    result = activate(fleet, spec=spec)  # the workspace says so itself
    assert result.status == 1 and fleet.orders == [] and "unknown agents: new" in result.err
    result = activate(fleet, "--unknown=skip", spec=spec)
    assert result.status == 0 and fleet.orders == [fleet.names]
    assert result.lines[-1] == "1 unknown to the workspace, left out: new"


def test_labels_select(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.labels = {"web1": ["staging"], "db": ["staging", "eu"]}
    assert activate(fleet, "--on=staging").status == 0
    assert activate(fleet, "--on=web[23], db").status == 0
    result = activate(fleet, "--on=staging", "--agent=db")
    assert result.status == 64 and "--agent and --on" in result.err
    assert fleet.orders == [["web1", "db"], ["web2", "web3", "db"]]
    result = activate(fleet, "--on=nothing")
    assert result.status == 64 and "'nothing' is no name, glob or label" in result.err


HOSTED = ["--rollback-succeeded", "--offline=skip", "--offline=fail", "--unknown=skip", "--on=eu"]


@pytest.mark.parametrize("option", HOSTED)
def test_what_cachix_can_not_do_is_refused_before_anything_is_deployed(
    fleets: Any, activate: Any, monkeypatch: pytest.MonkeyPatch, option: str
) -> None:
    fleet = fleets(is_ours=False)
    result = activate(fleet, option)
    assert result.status == 64 and fleet.orders == [] and result.err.count("error: ") == 1
    monkeypatch.setattr(cachix_order, "HOSTED", fleet.host)
    fleet.asked.clear()
    result = activate(fleet, option)
    assert result.status == 64 and fleet.asked == [] and result.err.count("error: ") == 1


def test_a_roll_out_by_cachix(fleets: Any, activate: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    fleet = fleets(is_ours=False)
    monkeypatch.setattr(cachix_order, "HOSTED", fleet.host)
    fleet.failing["web3"] = REASON
    words = ("--on=web*", "--canary=web1", "--batch=1", "--message=Mend it")
    assert activate(fleet, *words).status == 1
    assert fleet.bodies == [{"agents": {name: NEW}} for name in ("web1", "web2", "web3")]
    assert not any("agents" in word for word in fleet.asked)


@pytest.mark.parametrize("option", ["--canary=web1", "--batch=2", "--rollback-succeeded"])
def test_who_does_not_wait_can_not_roll_out(fleets: Any, activate: Any, option: str) -> None:
    fleet = fleets()
    result = activate(fleet, option, "--async")
    assert result.status == 64 and fleet.asked == [] and "--async does not" in result.err


def test_async_leaves_out_what_is_unknown(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.offline.add("web1")
    spec = {"agents": {**fleet.spec["agents"], "new": NEW}}
    result = activate(fleet, "--async", "--unknown=skip", "--offline=skip", spec=spec)
    assert result.status == 0 and fleet.orders == [["web2", "web3", "db"], ["web1"]]
    assert result.lines[-2].endswith("left out: new") and result.lines[-1].endswith(": web1")


# --- interrupted, and once more -------------------------------------------------------------------


class Program:
    """The command in a process of its own."""

    def __init__(self, fleet: Fleet, directory: pathlib.Path, *words: str) -> None:
        path = directory / "again.json"
        path.write_text(json.dumps(fleet.spec))
        argv = [sys.executable, "-m", "cachix_deploy", "activate", str(path)]
        self.process = subprocess.Popen(
            [*argv, f"--host={fleet.host}", *words],
            cwd=ROOT,
            preexec_fn=lambda: signal.signal(
                signal.SIGINT, signal.SIG_DFL
            ),  # a shell may ignore it
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def kill_at(self, words: str, number: int = signal.SIGTERM, stream: str = "stdout") -> str:
        """Send a signal once it prints a line with these words; the rest of stderr."""
        for line in getattr(self.process, stream):
            if words in line:
                break
        self.process.send_signal(number)
        return self.process.communicate(timeout=20)[1]


AGAIN = "the same command line goes on from there\n"


def test_killed_in_the_middle_and_once_more(
    fleets: Any, activate: Any, tmp_path: pathlib.Path
) -> None:
    fleet = fleets()
    fleet.hanging.add("web2")
    program = Program(fleet, tmp_path, "--batch=1")
    err = program.kill_at("web2 |")  # it is followed
    assert program.process.returncode == 143
    assert f"interrupted: the deployments go on; 2 not posted; {AGAIN}" in err
    fleet.hanging.clear()
    for record in fleet.deployments.values():  # it has gone on meanwhile
        fleet.poll(record["id"])
    result = activate(fleet, "--batch=1")
    assert result.status == 0 and fleet.orders[2:] == [["web3"], ["db"]]
    assert result.lines[-1] == "2 ran the path already: web1, web2"
    result = activate(fleet, "--batch=2")
    assert result.status == 0 and len(fleet.orders) == 4
    assert result.lines == ["4 ran the path already: web1, web2, web3, db"]
    assert activate(fleet, "--batch=2", "--force").status == 0 and len(fleet.orders) == 6
    assert activate(fleet).status == 0 and len(fleet.orders) == 7


@pytest.mark.parametrize(
    ("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)], ids=["term", "int"]
)
def test_killed_in_a_pause(
    fleets: Any, activate: Any, tmp_path: pathlib.Path, number: int, status: int
) -> None:
    fleet = fleets()
    program = Program(fleet, tmp_path, "--batch=1", "--pause=3600")
    err = program.kill_at("the next one is in 3600 s", number, "stderr")
    assert program.process.returncode == status and fleet.orders == [["web1"]]
    assert f"interrupted: no deployment is under way; 3 not posted; {AGAIN}" in err


def test_an_order_that_is_refused_in_the_middle(fleets: Any, activate: Any) -> None:
    fleet = fleets()

    def order(body: dict[str, Any], order: Any = fleet.order) -> tuple[int, Any]:
        return (423, {"error": "frozen by anna"}) if len(fleet.orders) == 2 else order(body)

    fleet.order = order
    result = activate(fleet, "--batch=1", "--json")
    assert result.status == 1 and fleet.orders == [["web1"], ["web2"]]
    assert f"2 not posted; {AGAIN}error: frozen by anna\n" in result.err
    assert result.summary["notPosted"] == ["web3", "db"]
    assert result.summary["succeeded"] == ["web1", "web2"] and result.summary["status"] == 1


# --- output ---------------------------------------------------------------------------------------

FIFTY = tuple(f"machine-{number:02}.example" for number in range(50))


def test_the_summary_of_fifty_agents_fits_a_screen(fleets: Any, activate: Any) -> None:
    fleet = fleets(*FIFTY)
    fleet.failing = dict.fromkeys(FIFTY[7:27], f"{REASON}\nand more")
    fleet.lines = {name: [] for name in FIFTY}
    result = activate(fleet)
    start = max(index for index, line in enumerate(result.lines) if not line)
    summary = result.lines[start + 1 :]
    assert len(summary) <= 24 and summary[-1].startswith("30 succeeded, the slowest (")
    assert summary[0].startswith(f"{FIFTY[7]}  Failed, rolled back  ")
    assert summary[0].endswith(f"  {REASON} and more")
    assert summary[10].startswith("and 10 more did not succeed: machine-17.example, ")
    assert summary[10].endswith(" more") and len(summary) == 12


def test_rollbacks_that_failed_come_first(fleets: Any, activate: Any) -> None:
    fleet = fleets(*FIFTY)
    fleet.hanging.add(FIFTY[30])
    fleet.failing[FIFTY[3]] = REASON
    poll = fleet.poll

    def poll_too(id: str) -> dict[str, Any]:
        record = poll(id)
        if record["agent"] == FIFTY[30]:
            record.update(status="Failed", outcome="rollback-failed", reason="no disk")
        return record

    fleet.poll = poll_too
    lines = activate(fleet).lines
    start = max(index for index, line in enumerate(lines) if not line)
    assert lines[start + 1].startswith(f"{FIFTY[30]}  ROLLBACK FAILED: {FIFTY[30]} needs you")
    assert lines[start + 2].startswith(FIFTY[3]) and lines[start + 3].startswith("48 succeeded")


def documented() -> dict[str, str]:
    """Return the text that describes each event."""
    parts = re.split(r"^``([a-z]+)``\n", DOCUMENT.read_text(), flags=re.M)
    return dict(zip(parts[1::2], parts[2::2]))


def test_json_is_as_documented(fleets: Any, activate: Any) -> None:
    fleet = fleets()
    fleet.failing["web3"] = REASON
    fleet.lines["web1"] = ["\u00fc\x1b[31m ::error::x ##[error]y", "two"]
    result = activate(fleet, "--batch=2", "--rollback-succeeded", "--json")
    assert result.out.isascii() and result.status == result.summary["status"] == 1
    assert {event["event"] for event in result.events} == set(documented())
    for event in result.events:
        text = documented()[event["event"]]
        names = set(event) - {"event"}
        assert {name for name in names if f"``{name}``" not in text} == set(), event["event"]
    assert [event["event"] for event in result.events[:2]] == ["run", "batch"]
    ends = {event["agent"]: event for event in result.events if event["event"] == "ended"}
    assert ends["web3"]["reason"] == REASON and ends["web3"]["outcome"] == "rolled-back"
    mine = [event for event in result.events if event.get("agent") == "web1"]
    lines = [event["line"] for event in mine if event["event"] == "line"][:2]
    assert lines == ["\u00fc ::error::x ##[error]y", "two"]
    names = {field for field in result.summary if isinstance(result.summary[field], list)}
    every = [name for field in names for name in result.summary[field]]
    assert sorted(set(every)) == sorted(fleet.names)


EVIL = [
    "::error::owned",
    "  ::add-mask::a",
    "##[set-output name=x]y",
    "fine ##[error]x",
    "\x1b[0m::stop-commands::z",
    "\x1b[0Ksection_end:1:x\r\x1b[0K",
    "\r::warning::w",
]
COMMANDS = re.compile(r"^\s*::(?!group::|endgroup::)|##\[", re.M)


@pytest.mark.parametrize("words", [(), ("--json",), ("--batch=1",)])
@pytest.mark.parametrize("colour", ["", "1"])
def test_a_log_commands_no_runner_of_github(
    fleets: Any, activate: Any, monkeypatch: pytest.MonkeyPatch, words: Any, colour: str
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    monkeypatch.setenv("FORCE_COLOR", colour)
    fleet = fleets()
    fleet.lines = dict.fromkeys(fleet.names, EVIL)
    fleet.failing = {"web2": "::error::owned\n##[error]y"}
    result = activate(fleet, *words, "--max-failures=9")
    plain = re.sub(r"\x1b\[[0-9;]*m", "", result.out + result.err)
    assert "owned" in plain and COMMANDS.findall(plain) == []
    if not words:
        assert plain.count("::group::") == plain.count("::endgroup::") == 4


def groups(lines: list[str], begin: str, end: str) -> dict[str, list[str]]:
    """Return the lines of each group, by its first line. Groups must not be nested."""
    blocks: dict[str, list[str]] = {}
    title = None
    for line in lines:
        if begin in line:
            assert title is None
            title = line
            blocks[title] = []
        elif end in line:
            title = None
        elif title is not None:
            blocks[title].append(line)
    assert title is None
    return blocks


@pytest.mark.parametrize(
    ("variable", "begin", "end"),
    [
        ("GITHUB_ACTIONS", "::group::", "::endgroup::"),
        ("GITLAB_CI", "section_start:", "section_end:"),
    ],
)
def test_a_log_is_a_group(
    fleets: Any,
    activate: Any,
    monkeypatch: pytest.MonkeyPatch,
    variable: str,
    begin: str,
    end: str,
) -> None:
    monkeypatch.setenv(variable, "true")
    fleet = fleets()
    fleet.lines = {name: [f"{name} {number}" for number in range(200)] for name in fleet.names}
    fleet.failing["web2"] = REASON
    blocks = groups(activate(fleet).out.replace("\r", "").split("\n"), begin, end)
    assert len(blocks) == 4
    for title, lines in blocks.items():
        name = next(name for name in fleet.names if name in title)
        assert lines == [f"{name:4} | {name} {number}" for number in range(200)]
        result = "Failed, rolled back" if name == "web2" else "Succeeded"
        assert title.endswith(f"{name}: {result}")
    blocks = groups(activate(fleet, "--agent=db").out.replace("\r", "").split("\n"), begin, end)
    assert len(blocks) == 1 and len(next(iter(blocks.values()))) == 200


@pytest.mark.parametrize("words", [("--async", "--agent=db"), ("--offline=skip", "--batch=4")])
def test_no_group_is_begun_without_a_log(
    fleets: Any, activate: Any, monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]
) -> None:
    monkeypatch.setenv("GITHUB_ACTIONS", "true")
    fleet = fleets()
    fleet.offline.add("db")
    out = activate(fleet, *words).out
    assert out.count("::group::") == out.count("::endgroup::") == (3 if len(words[0]) > 8 else 0)


def test_the_page_of_githubs_job(
    fleets: Any, activate: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: pathlib.Path
) -> None:
    path = tmp_path / "summary.md"
    path.write_text("before\n")
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(path))
    fleet = fleets()
    fleet.failing["web2"] = "a | b <script>x</script> [x](https://evil.example) `c` @all"
    assert activate(fleet, "--batch=3").status == 1
    text = path.read_text()
    assert text.startswith(f"before\n### [Deployment]({fleet.host}/runs/1)\n")
    rows = [line for line in text.splitlines() if line.startswith("| [")]
    assert len(rows) == 3 and rows[0].startswith("| [web2](") and rows[0].count("|") == 5
    assert not re.search(r"<script|\]\(https://evil|`|@all", text)
    assert "- 1 not posted: db" in text
    monkeypatch.setenv("GITHUB_STEP_SUMMARY", str(tmp_path / "missing" / "x"))
    assert activate(fleet, "--agent=db").status == 0


@pytest.mark.parametrize(
    ("variables", "colour"),
    [
        ({}, False),
        ({"FORCE_COLOR": "1"}, True),
        ({"FORCE_COLOR": "0"}, False),
        ({"FORCE_COLOR": ""}, False),
        ({"FORCE_COLOR": "1", "NO_COLOR": "1"}, False),
    ],
)
def test_colours_may_be_forced(
    fleets: Any, activate: Any, monkeypatch: pytest.MonkeyPatch, variables: Any, colour: bool
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert ("\x1b[" in activate(fleets()).out) is colour
