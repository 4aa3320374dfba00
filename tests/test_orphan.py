"""An end whose agent is gone: another agent reports it, else the switch process does."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time

import closures
import pytest
from hosts import PROJECT, command, wait_until
from peer import AGENT_ID
from servers import Certificate

from activate import journal, lock, machine, pipe
from cachix_orphan import Orphan
from cachix_protocol import SUCCESS_LINE

pytestmark = pytest.mark.promise(6)

ID = "00000000-0000-4000-8000-000000000001"
MACHINE_LOCK = "/nix/var/nix/profiles/.cachix-deploy-system.lock"
DEPLOYMENT_LOCK = "home/cache/cachix/deploy/locks/deployment-web.lock"
AT, GO = "/run/at", "/run/go"
HELD = f"touch {AT}; {closures.wait_for(GO)}"
COUNT = 3000
BOTH = pytest.mark.parametrize("reports", ["http", None], ids=["http", "hosted"])


def waits(**changes):
    """The environment for an agent with short waits."""
    values = {"backoff": 0.05, "slowest": 0.2, "orphan": 1.5, "orphan_reports": 60, **changes}
    return {"CACHIX_DEPLOY_WAITS": json.dumps(values)}


class Scene:
    """A deployment that waits in its commit, where its agent may end."""

    def __init__(self, host, cache, peer):
        self.host, self.cache, self.peer = host, cache, peer

    def begin(self, argv=None, env=None, url=None, **words):
        """Start an agent, and a deployment that waits before it is committed."""
        words = words or {"before_boot": f"{HELD}; {closures.lines(COUNT)}"}
        script = words.pop("script", None)
        if script is None:
            self.path = closures.nixos(self.cache, 1, **words)
        else:
            self.path, script = closures.plain(self.cache, 1), closures.script(self.cache, *script)
        paths = [path for path in (self.path, script) if path]
        self.host.fetch(self.cache.url, self.cache.key.public, *paths)
        self.start(argv, env, url)
        self.peer.agent()
        self.id = self.peer.deploy(self.path, script)
        wait_until(self.host.path(AT).exists, what="the activation")

    def start(self, argv=None, env=None, url=None):
        variables = {"CACHIX_AGENT_TOKEN": "s3cret-t0ken", **(env or waits())}
        words = [*(argv or command("cachix-deploy")), "--host", url or self.peer.url]
        words += ["agent", "web", "--confirm-timeout=2"]
        self.agent = self.host.start("agent-web", words, variables)

    def end(self, step="succeeded"):
        """Let the deployment go on, and wait for the end in its journal."""
        self.host.path(GO).touch()
        wait_until(lambda: self.host.step(self.id) == step, what="the end")

    def switches(self):
        lines = self.host.processes().items()
        return [pid for pid, line in lines if re.search(r" switch [0-9a-f-]{36}\s*$", line)]

    def ends_soon(self, timeout=5):
        wait_until(lambda: not self.switches(), timeout, "the end of the switch process")

    def locks(self):
        """The locks that are held."""
        places = [self.host.path(MACHINE_LOCK), self.host.directory / DEPLOYMENT_LOCK]
        assert all(place.exists() for place in places)
        return [place.name for place in places if lock.held(str(place))]

    def reported(self):
        path = self.host.state / "deployments" / self.id / "reported.json"
        record = json.loads(path.read_text())
        return record["logged"] and record["ended"]

    def check(self, count=COUNT):
        """Check that the end and all lines have arrived, each exactly once."""
        assert self.peer.finished(self.id)
        wait_until(lambda: self.peer.log(self.id)[-1:] == [SUCCESS_LINE], what="the log's end")
        wait_until(self.reported, what="the note of the end")
        lines = [line for line in self.peer.log(self.id) if line.startswith("line ")]
        assert lines == [f"line {number}" for number in range(1, count + 1)]
        assert self.peer.log(self.id).count(SUCCESS_LINE) == 1
        ends = [one for one in self.peer.statuses.get(self.id, []) if one["status"] != "InProgress"]
        assert len(ends) + len(self.peer.messages(self.id, "DeploymentFinished")) == 1
        assert self.host.profile() == self.path


@pytest.fixture
def scene(host, cache, peer):
    return Scene(host, cache, peer)


@BOTH
def test_an_agent_that_never_comes_back(scene, reports):
    scene.peer.reports = reports
    scene.begin()
    scene.agent.kill()
    scene.end()
    wait_until(lambda: scene.locks() == [], 1, "free locks")  # while it waits
    assert scene.switches() and "line 1" not in scene.peer.log(scene.id)
    places = [f"/proc/{pid}/{name}" for pid in scene.switches() for name in ("environ", "cmdline")]
    for path in [*places, *filter(os.path.isfile, scene.host.state.rglob("*"))]:
        with open(path, "rb") as file:
            assert b"s3cret" not in file.read(), path
    scene.check()
    scene.ends_soon()
    directory = scene.host.state / "deployments" / scene.id
    assert not [path for path in directory.iterdir() if path.is_symlink()]


@BOTH
@pytest.mark.parametrize("where", ["after", "script"])
def test_an_agent_that_another_one_replaces(scene, reports, where):
    """The activation, or a check, stops ours, which says no goodbye then, and starts Cachix's."""
    scene.peer.reports = reports
    code = f"{HELD}; {closures.lines(COUNT)}"
    scene.begin(**({"after": code} if where == "after" else {"script": ("replace", code)}))
    assert scene.agent.stop() == 0
    cachix = lock.take(f"{scene.host.directory}/home/cache/cachix/deploy/locks/agent-web.lock")
    scene.end()
    scene.check()
    scene.ends_soon()
    cachix.close()


def test_a_failure(scene):
    """No agent takes the place of the one that was killed, neither ours nor Cachix's."""
    scene.peer.reports = "http"
    before = closures.nixos(scene.cache, 0)
    scene.host.install(scene.cache.url, scene.cache.key.public, before)
    scene.begin(after=HELD)
    scene.agent.kill()
    scene.end("rolled-back")
    assert not scene.peer.finished(scene.id)
    assert "no agent came back within 2 s" in scene.peer.statuses[scene.id][-1]["reason"]
    scene.ends_soon()
    assert scene.host.profile() == before


def test_an_agent_says_whether_it_stays():
    (source, theirs), (ours, sink) = os.pipe(), os.pipe()
    with open(source, "rb", 0) as source_file, open(sink, "wb", 0) as sink_file:
        switch = pipe.SwitchEnd(source_file, sink_file)
        with open(ours, "rb", 0) as ours_file, open(theirs, "wb", 0) as theirs_file:
            agent = pipe.AgentEnd(ours_file, theirs_file)
            assert switch.stays()
            agent.say_leaving()
            assert not switch.stays() and switch.is_alive() and not switch.has_left
            agent.say_goodbye()
            assert not switch.stays() and switch.is_alive() and switch.has_left
        assert not switch.is_alive() and not switch.was_lost()


@BOTH
def test_an_agent_that_comes_back_in_time(scene, reports):
    scene.peer.reports = reports
    scene.begin(env=waits(orphan=30))
    scene.agent.kill()
    scene.end()
    time.sleep(1)
    assert scene.switches() and "line 1" not in scene.peer.log(scene.id)
    scene.start()
    scene.ends_soon()
    scene.check()


def test_an_agent_that_stays(scene):
    """Its switch process ends at once, as always."""
    scene.begin(env=waits(orphan=30))
    scene.end()
    scene.ends_soon()
    scene.check()


@BOTH
@pytest.mark.parametrize("when", ["at-once", "in-the-middle", "in-vain"])
def test_an_agent_that_comes_back_while_the_switch_process_reports(scene, reports, when):
    scene.peer.reports, count = reports, 60_000
    scene.begin(before_boot=f"{HELD}; {closures.lines(count)}")
    scene.agent.kill()
    if when == "in-vain":  # nothing that it sends arrives: the agent does not wait for it
        scene.peer.misbehave("/api/", "500")
        scene.peer.misbehave("/ws-deployment", "500")
    scene.end()
    report = scene.host.state / "deployments" / scene.id / "reported.lock"
    wait_until(lambda: lock.held(str(report)), what="the reporting")
    if when == "in-the-middle":
        wait_until(lambda: "line 1" in scene.peer.log(scene.id), what="the first lines")
    scene.start()
    scene.peer.agent()
    scene.peer.heal()
    scene.check(count)
    scene.ends_soon(15)
    assert scene.agent.process.poll() is None


@BOTH
def test_a_workspace_that_is_off_for_a_while(scene, reports):
    scene.peer.reports = reports
    scene.begin()
    scene.agent.kill()
    scene.peer.stop()
    scene.end()
    report = scene.host.state / "deployments" / scene.id / "reported.lock"
    wait_until(lambda: lock.held(str(report)), what="the reporting")
    time.sleep(1)
    scene.peer.restart()
    scene.check()
    scene.ends_soon()


def test_a_workspace_that_stays_off(scene):
    """The report is left to a later agent."""
    scene.begin(env=waits(orphan=0.5, orphan_reports=1))
    scene.agent.kill()
    scene.peer.stop()
    scene.end()
    scene.ends_soon()
    scene.peer.restart()
    scene.start()
    scene.check()


@pytest.mark.parametrize("when", ["waiting", "reporting"])
def test_a_signal_ends_it_at_once(scene, when):
    scene.begin(env=waits(orphan=30 if when == "waiting" else 0))
    scene.agent.kill()
    scene.peer.stop()
    scene.end()
    time.sleep(1)
    for pid in scene.switches():
        os.kill(pid, signal.SIGTERM)
    scene.ends_soon()
    scene.peer.restart()
    scene.start()
    scene.check()


def mark(**changes):
    """The content of registered-NAME.json."""
    known = {"id": AGENT_ID, "cache": None, "reports": "http"}
    common = {"pid": 1, "boot_id": machine.boot_id(), "host": "http://w", "registered": known}
    return {**common, "time": time.time() + 3600, **changes}


@pytest.mark.parametrize(
    ("text", "reports", "successor"),
    [
        (json.dumps(mark()), "http", True),
        (json.dumps(mark(time=time.time() - 3600)), "http", False),
        (json.dumps(mark(boot_id="another")), "http", False),
        (json.dumps(mark(host="http://elsewhere")), None, False),
        (json.dumps(mark(registered={"id": "no uuid"})), None, True),
        (json.dumps({"pid": 1, "boot_id": "b", "time": 1.0}), None, False),  # by an older release
        (json.dumps(mark(time="now")), None, False),
        ("[", None, False),
        ("[]", None, False),
        ("[" * 60000, None, False),
        ("", None, False),
    ],
)
def test_what_the_last_registration_tells(tmp_path, text, reports, successor):
    config = {"host": "http://w", "token": "t", "name": "web"}
    record = journal.Record(ID, 1, "web", "http://w", "/nix/store/x")
    entry = journal.Journal(str(tmp_path / "deployments" / ID), record)
    entry.enter(journal.SUCCEEDED)
    orphan = Orphan(entry, config, threading.Event())
    assert orphan.registration() is None and not orphan.has_successor()
    (tmp_path / "registered-web.json").write_text(text)
    known = orphan.registration()
    assert (known and known.reports, orphan.has_successor()) == (reports, successor)
    registered = {"id": AGENT_ID, "cache": None}  # in this process' memory: it counts first
    assert Orphan(entry, {**config, "registered": registered}, orphan.stop).registration()


@pytest.mark.parametrize("other", [{"name": "other"}, {"host": "http://elsewhere"}])
def test_a_deployment_of_another_agent_is_only_finished(tmp_path, other):
    config = {"host": "http://w", "token": "t", "name": "web", "registered": mark()["registered"]}
    record = journal.Record(ID, 1, "web", "http://w", "/nix/store/x")
    entry = journal.Journal(str(tmp_path / "deployments" / ID), record)
    entry.enter(journal.SUCCEEDED)
    start = time.monotonic()
    Orphan(entry, {**config, **other}, threading.Event()).attend(lambda: False)
    assert time.monotonic() - start < 20 and not os.path.exists(entry.path("reported.lock"))


# --- files that are gone --------------------------------------------------------------------------

PACKAGES = ("requests", "urllib3", "idna", "certifi", "websocket")


def pyz(directory):
    """The program in one file."""
    path = directory / "cachix-deploy.pyz"
    subprocess.run([sys.executable, str(PROJECT / "tools/pyz.py"), str(path)], check=True)
    return [sys.executable, str(path)]


def venv(directory):
    """A source tree, and a virtual environment for it."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    site = next(directory.glob("lib/python*/site-packages"))
    for name in PACKAGES:
        shutil.copytree(f"{sysconfig.get_path('purelib')}/{name}", site / name)
    shutil.copy(f"{sysconfig.get_path('purelib')}/docopt.py", site)
    for path in PROJECT.glob("cachix_*.py"):
        shutil.copy(path, directory)
    shutil.copytree(PROJECT / "activate", directory / "activate")
    return [str(directory / "bin/python"), str(directory / "cachix_deploy.py")]


@BOTH
@pytest.mark.parametrize("install", [pyz, venv])
def test_the_files_are_removed_by_the_activation(scene, tmp_path, reports, install):
    scene.peer.reports = reports
    directory = tmp_path / "installed"
    directory.mkdir()
    argv = install(directory)
    scene.begin(argv, before=f"rm -r {directory}", before_boot=f"{HELD}; {closures.lines(COUNT)}")
    scene.agent.kill()
    assert not directory.exists()
    scene.end()
    scene.check()
    scene.ends_soon()


@BOTH
def test_the_authorities_are_removed_by_the_activation(scene, tmp_path, reports):
    scene.peer.reports = reports
    certificate = Certificate(tmp_path / "tls")
    listener, url = certificate.serve(scene.peer.port)
    env = {**waits(), "SSL_CERT_FILE": str(certificate.public)}
    removal = f"rm {certificate.public}"
    scene.begin(url=url, env=env, before=removal, before_boot=f"{HELD}; {closures.lines(COUNT)}")
    scene.agent.kill()
    scene.end()
    scene.check()
    listener.close()


LATER = """
import json, sys, threading
import cachix_switch
from activate import journal
config = json.loads(sys.argv[1])
cachix_switch.load_reach(config)
before = set(sys.modules)
entry = journal.load(sys.argv[2])
from cachix_orphan import Orphan
Orphan(entry, config, threading.Event()).attend(lambda: False)
print(*sorted(set(sys.modules) - before))
"""

PATH = f"import sys; sys.path[:] = {[str(PROJECT), *sys.path]!r}; "
PATHS = ("/ws-deployment", "/api/v1/deploy")


@BOTH
def test_a_report_needs_no_module_that_was_not_loaded_before(peer, tmp_path, reports):
    """Those of Python may be gone too. The first calls fail, as errors need modules as well."""
    peer.reports = reports
    registered = {"id": AGENT_ID, "cache": None, "reports": reports}
    certificate = Certificate(tmp_path / "tls")
    listener, url = certificate.serve(peer.port)
    config = {"host": url, "token": "t", "name": "web", "registered": registered}
    record = journal.Record(ID, 1, "web", url, "/nix/store/x", step=journal.SUCCEEDED)
    entry = journal.Journal(str(tmp_path / "deployments" / ID), record)
    entry.enter(journal.SUCCEEDED)
    (tmp_path / "deployments" / ID / "log").write_text("line 1\nline 2\n")
    faults = [peer.misbehave(path, kind, 2) for path in PATHS for kind in ("500", "cut", "302")]
    argv = [sys.executable, "-I", "-S", "-c", PATH + LATER]
    argv += [json.dumps(config), entry.directory]
    env = {**waits(orphan=0), "SSL_CERT_FILE": str(certificate.public)}
    result = subprocess.run(argv, env=env, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, "\n"), (result.stdout, result.stderr)
    assert peer.log(ID) == ["line 1", "line 2", SUCCESS_LINE] and len(faults) == 6
    listener.close()


SILENT = """
import os, sys, threading
import cachix_switch
from activate import pipe
source, sink = os.pipe()
agent = pipe.SwitchEnd(open(source, "rb", 0), None)
if sys.argv[1] == "go":
    os.write(sink, b"go\\n")
cachix_switch.load_while_silent(agent, {})
print("requests" in sys.modules, "cachix_connection" in sys.modules)
"""


@pytest.mark.parametrize(("word", "loaded"), [("go", "False False"), ("", "True True")])
def test_a_download_is_used_to_load_modules_and_nothing_waits_for_them(word, loaded):
    argv = [sys.executable, "-I", "-S", "-c", PATH + SILENT, word]
    assert subprocess.check_output(argv, text=True, timeout=30).strip() == loaded
