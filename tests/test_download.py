"""Failures of downloads: other substituters, old narinfos, and the reasons that a report gives."""

import os
import re
import shutil
import signal
import subprocess
import sys
import time

import closures
import pytest
from caches import Cache, nar
from hosts import NIX_CONF, PROJECT, SYSTEM, wait_until
from machines import Machine

from activate import nix
from activate.agent import download, failure
from activate.agent.failure import DownloadFailed
from activate.agent.listen import Messages
from activate.agent.route import Answer, Route
from activate.agent.substituters import Substituters

NEW = "/nix/store/" + "a" * 32 + "-new"
OLD = "/nix/store/" + "b" * 32 + "-old"
OURS, NAS, HYDRA = "http://ours/cache/main", "http://nas", "https://hydra/"
SOURCE = nix.Source(OURS, ("k:1",))
DEAD = "http://127.0.0.1:9"

# --- parsing --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("these 3 paths will be fetched (0.04 MiB download, 0.05 MiB unpacked):", (41943, 52428)),
        (
            "this path will be fetched (1.50 GiB download, 2.00 GiB unpacked):",
            (1610612736, 2147483648),
        ),
        ("these 2 paths will be fetched (0.00 KiB download, 512 KiB unpacked):", (0, 524288)),
        ("", None),
        ("don't know how to build these paths:\n  /nix/store/x", None),
    ],
)
def test_estimate(text, expected):
    assert download.parse_estimate(text) == expected


RESTRICTED = "warning: ignoring the client-specified setting 'netrc-file', because it is restricted"
UNKNOWN = "don't know how to build these paths"


@pytest.mark.parametrize(
    ("message", "name"),
    [
        ("error: cannot add path 'P' because it lacks a signature by a trusted key", "signature"),
        ("warning: substituter 'u' does not have a valid signature for path 'P'", "signature"),
        ("error: path 'P' is not signed by any of the keys in trusted-public-keys", "signature"),
        (
            "warning: ignoring substitute for 'P', as it's not signed by any of the keys",
            "signature",
        ),
        ("error: hash mismatch importing path 'P'", "corrupt"),
        ("error: std::bad_alloc", "corrupt"),
        ("error: bad archive: input doesn't look like a Nix archive", "corrupt"),
        ("error: NAR for 'P' fetched from 'http://c' is incomplete", "corrupt"),
        ("error: NAR info file 'a.narinfo' is corrupt: expecting ':' at line 1", "network"),
        ("error: file 'nar/1.nar' does not exist in binary cache 'http://c'", "stale"),
        ("error: unable to download 'http://c/x.narinfo': HTTP error 401", "credentials"),
        ("error: 'http://c' does not appear to be a binary cache", "credentials"),
        ("error: unable to download 'http://c/x': Couldn't connect to server (7)", "network"),
        ("error: unable to download 'http://c/x.nar': Timeout was reached (28)", "network"),
        ("error: unable to download 'http://c/nix/x': Permission denied", "network"),
        ("error: cannot connect to 'nobody@nas'", "network"),
        ("error: failed to start SSH connection to 'nas'", "network"),
        (f"{UNKNOWN}:\n  P\nerror: build of 'P' failed", "missing"),
        ("error: some references of path 'P' could not be realised", "missing"),
        ("error: writing to file: No space left on device\nerror: build of 'P' failed", "space"),
        ("opening lock file 'P.lock': No space left on device", "space"),
        ("error: write of 8 bytes: Disk quota exceeded", "space"),
        ("error: committing transaction: database or disk is full (in '/nix/db')", "space"),
        ("error: cannot connect to daemon at '/nix/s': No such file or directory", "daemon"),
        ("error: cannot connect to socket at '/nix/s': Connection refused", "daemon"),
        ("error: cannot connect to socket at '/nix/s': Permission denied", "permission"),
        ("error: Nix daemon disconnected unexpectedly (maybe it crashed?)", "daemon"),
        ("error: opening lock file '/nix/var/nix/db/big-lock': Permission denied", "permission"),
        ("error: user 'joe' is not allowed to connect to the Nix daemon", "permission"),
        ('error: creating directory "/nix/store/.links": Read-only file system', "read-only"),
        (f"warning: ignoring untrusted substituter 'u'\n{UNKNOWN}", "untrusted"),
        (f"{RESTRICTED}\n{UNKNOWN}", "untrusted"),
        (f"{RESTRICTED}\nerror: something new", ""),
        ("error: something new", ""),
    ],
)
def test_classes_of_failure(message, name):
    message = message.replace("'P", f"'{NEW}")
    assert failure.classify(message) == name
    reason = failure.explain(message, nix.Source("http://c", ("k:1",)), OLD)
    assert "\n" not in reason and not reason.endswith("failed")
    if name == "signature":
        assert reason.startswith(
            f"the signature of {NEW} is by none of the keys k:1: push it again"
        )
        assert "nix copy --refresh" in reason


@pytest.mark.parametrize(
    ("output", "status", "quoted"),
    [
        ("error (ignored): error: a\nerror: something new\nerror: build of 'P' failed", 1, "a"),
        ("warning: b\nerror: something new\nerror: build of 'P' failed", 1, "something new"),
        # 2.3 has no `error:` before the cause
        ("these paths will be fetched:\n  P\ncause\nerror: build of 'P' failed", 1, "cause"),
        # 2.34 has the cause behind what it belongs to
        ("error:\n       … while x\n\n       error: the cause", 1, "the cause"),
        ("", 1, "nix-store ended with status 1 without a message"),
        ("", -9, "nix-store was ended by signal 9 (out of memory?)"),
    ],
)
def test_the_reason_of_an_unknown_failure_quotes_nix(output, status, quoted):
    text = output.replace("P", NEW)
    assert failure.explain(text, SOURCE, NEW, status) == f"the download failed: {quoted}"


# --- the substituter that has failed --------------------------------------------------------------


@pytest.fixture
def known(monkeypatch):
    """The substituters of a machine whose nix.conf has three."""
    monkeypatch.setattr(nix, "substituters", lambda: [f"{NAS}?priority=10", HYDRA, f"{OURS}/"])
    return Substituters(OURS)


FAILED = "unable to download '{}/x.narinfo': HTTP error 502"
AGAIN = "; retrying in 301 ms (attempt 1/5)"
BOTH = [f"{NAS}?priority=10", HYDRA]


@pytest.mark.parametrize(
    ("line", "retried", "culprits"),
    [
        ("error: " + FAILED.format(NAS), False, BOTH[:1]),
        ("warning: error: " + FAILED.format(NAS) + AGAIN, False, []),
        ("warning: error: " + FAILED.format(NAS) + AGAIN, True, BOTH[:1]),
        ("warning: unable to download 'https://hydra/nix-cache-info': x (7)", False, [HYDRA]),
        (
            f"warning: unable to download '{NAS}/x': Timeout was reached (28){AGAIN}",
            False,
            BOTH[:1],
        ),
        ("error: " + FAILED.format(OURS), True, [OURS]),
        ("warning: error: " + FAILED.format(OURS) + AGAIN, True, []),
        ("error: " + FAILED.format("http://s3/bucket"), True, BOTH),
        ("error: " + FAILED.format("http://nasty"), True, BOTH),
        ("copying path 'P' from 'http://nas'...", True, []),
    ],
)
def test_the_substituter_that_a_line_is_about(known, line, retried, culprits):
    assert list(known.blame(line, retried)) == culprits


def pretend(monkeypatch, having, failing):
    """Let Nix have two substituters; some have everything, some fail."""

    def listen(urls, timeout, hear, tick=None):
        for url in urls:
            if url in failing and hear(f"error: unable to download '{url}/x': Timeout (28)"):
                return -15
        if set(failing) & set(urls):
            return 1
        if not set(having) & set(urls):
            hear(f"{UNKNOWN}:")
        return 0

    def dry_run(paths, source, run):
        return run(source.only or (NAS, HYDRA, OURS))  # in place of a command

    monkeypatch.setattr(nix, "substituters", lambda: [NAS, HYDRA])
    monkeypatch.setattr(nix, "realise_dry_run", dry_run)
    monkeypatch.setattr("activate.agent.route.listen", listen)


@pytest.fixture
def route(tmp_path):
    """A download, with its log."""
    log = os.open(tmp_path / "log", os.O_RDWR | os.O_CREAT)
    yield Route([NEW], SOURCE, log, 60)
    os.close(log)


@pytest.mark.parametrize(
    ("having", "failing", "only"),
    [
        ([OURS], [], None),
        ([OURS], [NAS], (OURS, HYDRA)),
        ([HYDRA], [NAS], (OURS, HYDRA)),
        ([OURS], [NAS, HYDRA], (OURS,)),
        ([NAS], [OURS], (NAS, HYDRA)),
        ([NAS], [NAS], None),  # nobody else has it: Nix tries on
        ([OURS], [OURS, NAS, HYDRA], None),
    ],
)
def test_substituters_that_fail_are_left_out(monkeypatch, tmp_path, route, having, failing, only):
    pretend(monkeypatch, having, failing)
    answer = route.dry_run()
    assert route.source.only == only
    assert answer.has_everything == (only is not None or not failing)
    text = (tmp_path / "log").read_text()
    for url in failing if only else ():
        assert re.search(f"^{re.escape(route.substituters.label(url))} failed: unable", text, re.M)
    assert only is None or text.endswith(f"downloading from {' and '.join(only)} alone\n")


def answer_of(status, line):
    """The answer of a download that has said this line."""
    messages = Messages()
    messages.add(line)
    return Answer(status, messages)


def test_the_reason_names_what_has_failed_and_what_the_others_lack(monkeypatch, route):
    pretend(monkeypatch, [NAS], [NAS])
    route.dry_run()
    answer = answer_of(1, f"error: unable to download '{NAS}/x': Timeout (28)")
    assert not route.remedy(answer), "it was left out in vain already"
    assert route.reason(answer) == (
        f"{NEW} is not in {OURS}: push it there first; {NAS} (of this machine's nix.conf) failed: "
        f"unable to download '{NAS}/x': Timeout (28)"
    )


@pytest.mark.parametrize("status", [1, -15])
def test_old_narinfos_are_asked_for_once_more(monkeypatch, route, status):
    """But not if the agent exits."""
    pretend(monkeypatch, [OURS], [])
    answer = answer_of(status, "error: file 'nar/1.nar' does not exist in binary cache 'http://o'")
    assert route.remedy(answer) == route.source.fresh == (status > 0)
    assert not route.remedy(answer)


@pytest.mark.parametrize(
    ("status", "line"), [(1, "error: interrupted by the user"), (-15, "error: path is not valid")]
)
def test_a_download_that_a_signal_has_ended(monkeypatch, route, status, line):
    """The agent exits: nothing else is asked or tried, and no substituter is to blame."""
    pretend(monkeypatch, [OURS], [])
    answer = answer_of(status, line)
    assert not route.culprits(answer, retried=True) and not route.remedy(answer)
    assert not route.refresh(answer)
    with monkeypatch.context() as patch:
        patch.setattr(route, "dry_run", lambda: answer)
        with pytest.raises(DownloadFailed) as info:
            download.estimate(route)
    assert not info.value.is_clear
    monkeypatch.setattr(route, "run", lambda act, tick: answer)
    with pytest.raises(DownloadFailed) as info:
        download.attempt(route, lambda source, run: status, None)
    assert not info.value.is_clear


# --- on a machine ---------------------------------------------------------------------------------


def hasten(host):
    """Let Nix give up a stalled transfer after a second; environment variables for the agent."""
    directory = host.directory / "hasty"
    directory.mkdir()
    words = 'for word; do shift; case "$word" in 30|10) word=1;; esac; set -- "$@" "$word"; done'
    script = f'#!/bin/sh\n{words}\nexec {shutil.which("nix-store")} "$@"\n'
    (directory / "nix-store").write_text(script)
    (directory / "nix-store").chmod(0o755)
    return {"env": {"PATH": f"{directory}:{host.environment['PATH']}"}}


def configure(host, *substituters, cache=None, more=""):
    """Give a host substituters of its own; it trusts those paths of `cache` too."""
    urls = " ".join([*substituters, *([cache.url] if cache else [])])
    text = NIX_CONF.replace("\nsubstituters =", f"\nsubstituters = {urls}")
    if cache:
        text = text.replace("public-keys =", f"public-keys = {cache.key.public}")
    (host.directory / "etc/nix.conf").write_text(f"{text}{more}\n")


FAULTS = {
    "502": ("narinfo$", "502"),
    "400": ("narinfo$", "400"),
    "reset": ("narinfo$", "reset"),
    "silent": ("narinfo$", "stall"),
    "silent at first": ("cache-info$", "stall"),
    "archives: 502": ("nar/", "502"),
    "archives: silent": ("nar/", "stall"),
}


@pytest.mark.parametrize("how", ["refused", "no name", "no TLS", *FAULTS])
def test_another_substituter_is_down(host, live, name, cache, how):
    """The workspace's cache has everything: it alone is asked then, and the log says why."""
    path = closures.chain(live.files, 6, 100, name)
    assert closures.chain(cache, 6, 100, name) == path
    (cache.directory / "nix-cache-info").write_text("StoreDir: /nix/store\nPriority: 1\n")
    urls = {"refused": DEAD, "no name": "http://nas.invalid"}
    urls["no TLS"] = cache.url.replace("http", "https")
    if how in FAULTS:
        cache.misbehave(*FAULTS[how])
        configure(host, cache=cache)
    else:
        configure(host, urls[how])
    machine = Machine(host, live, name, **hasten(host))
    start = time.monotonic()
    outcome = machine.deploy(path)
    assert outcome.status == "Succeeded", outcome
    assert time.monotonic() - start < 25
    url = urls.get(how, cache.url)
    assert f"{url} (of this machine's nix.conf) failed: unable to download '{url}/" in outcome.log
    assert f"downloading from {live.cache_url} alone" in outcome.log.splitlines()


def test_a_substituter_that_nix_remembers_is_switched_off(host, live, name, tmp_path):
    """Nix does not look for it then, and fails at each narinfo."""
    nas = Cache(tmp_path / "nas")
    configure(host, nas.url)
    machine = Machine(host, live, name)
    assert machine.deploy(closures.plain(live.files, name)).status == "Succeeded"
    nas.close()
    path = closures.plain(live.files, f"{name}-2")
    outcome = machine.deploy(path)
    assert outcome.status == "Succeeded" and host.profile() == path, outcome


def test_a_portal_answers_in_the_place_of_a_substituter(host, live, name, cache):
    """Nix does not say whose narinfo is none."""
    cache.misbehave("narinfo$", "200")
    configure(host, cache=cache)
    outcome = Machine(host, live, name).deploy(closures.plain(live.files, name))
    assert outcome.status == "Succeeded", outcome
    # newer versions of Nix go on by themselves
    assert "copying path" in outcome.log and f" from '{live.cache_url}'" in outcome.log


def part_of(files, path):
    """A store path that `path` refers to."""
    return next(one for one in files.closure(path) if "-part-0-" in one)


@pytest.mark.long
def test_a_substituter_that_works_is_kept(host, make_workspace, name, cache):
    """One substituter is down, and another has what the workspace's cache lacks."""
    workspace = make_workspace()
    configure(host, DEAD, cache=cache)
    machine = Machine(host, workspace, name)
    path = closures.plain(machine.files, name)
    assert closures.plain(cache, name) == path
    workspace.push(path)
    for file in workspace.data.glob(f"cache/main/{os.path.basename(part_of(cache, path))[:32]}*"):
        file.unlink()
    outcome = machine.deploy(path, push=False)
    assert outcome.status == "Succeeded", outcome
    assert f"downloading from {workspace.cache_url} and {cache.url} alone" in outcome.log


@pytest.mark.long
def test_the_one_substituter_that_has_a_path_is_down(host, live, name):
    configure(host, DEAD)
    path = closures.plain(live.files, name)
    outcome = Machine(host, live, name).deploy(path, push=False)
    assert outcome.status == "Failed"
    assert f"{path} is not in {live.cache_url}: push it there first" in outcome.reason
    assert f"{DEAD} (of this machine's nix.conf) failed: unable to download" in outcome.reason


def test_a_repair_beside_a_substituter_that_is_down(host, live, name, cache):
    """A valid path that is gone from the disk is downloaded again from the one that works."""
    path = closures.plain(live.files, name)
    live.push(path)
    host.fetch(live.cache_url, live.files.key.public, path)
    shutil.rmtree(host.path(path))
    cache.misbehave("narinfo$", "502")
    configure(host, cache=cache, more="download-attempts = 1")
    outcome = Machine(host, live, name).deploy(path)
    assert outcome.status == "Succeeded", outcome
    assert os.path.lexists(host.path(path))


@pytest.mark.promise(10)
def test_the_agent_exits_while_a_substituter_is_silent(host, live, name, cache):
    cache.misbehave("narinfo$", "stall")
    configure(host, cache=cache)
    machine = Machine(host, live, name)
    machine.order(closures.plain(live.files, name))
    wait_until(lambda: cache.count("narinfo"), what="Nix")
    start = time.monotonic()
    machine.agent.signal(signal.SIGTERM)
    assert machine.agent.wait() == 0 and time.monotonic() - start < 10
    assert not [line for line in host.processes().values() if "nix-store" in line]


# --- old narinfos ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["archive", "contents", "references"])
def test_a_path_was_built_again(host, live, name, cache, how):
    """Not reproducibly: Nix remembers the former one for 30 days."""
    configure(host, cache=cache)
    machine = Machine(host, live, name)
    path = closures.plain(cache, "built", extra={"date": "Monday\n"})
    for one in (path, closures.plain(cache, "other")):
        assert machine.deploy(one, push=False).status == "Succeeded"
    host.output("nix-env", "--profile", SYSTEM, "--delete-generations", "old")
    shutil.rmtree(host.state / "deployments")
    host.output("nix-store", "--gc")
    assert not host.valid(path)
    old, part = cache.archive(path), part_of(cache, path)
    references = [] if how == "references" else [os.path.basename(part)]
    cache.write(path, nar({"share": "built\n", "date": "Tuesday, a longer day\n"}), references)
    if how == "contents":  # under its former name
        os.replace(cache.archive(path), old)
        info = cache.narinfo(path)
        info.write_text(re.sub("URL: .*", f"URL: nar/{old.name}", info.read_text()))
    else:
        old.unlink()
    if how == "references":
        cache.archive(part).unlink()
        cache.narinfo(part).unlink()
    outcome = machine.deploy(path, push=False)
    assert outcome.status == "Succeeded", outcome
    assert "Tuesday" in (host.path(path) / "date").read_text()
    assert "what Nix remembers of the substituters may be old: asking them again" in outcome.log


def test_a_path_was_signed_later(host, live, name, cache):
    configure(host, cache=cache)
    machine = Machine(host, live, name)
    path = closures.plain(cache, "signed-later")
    signed = cache.narinfo(path).read_text()
    cache.damage(path, "unsigned")
    outcome = machine.deploy(path, push=False)
    assert outcome.status == "Failed"
    assert f"the signature of {path} is by none of the keys" in outcome.reason
    assert "`nix copy --refresh` if the push copies 0 paths" in outcome.reason
    cache.narinfo(path).write_text(signed)
    outcome = machine.deploy(path, push=False)
    assert outcome.status == "Succeeded" and host.profile() == path, outcome


@pytest.mark.long
def test_a_cache_has_lost_an_archive(host, make_workspace, name):
    workspace = make_workspace()
    path = closures.plain(workspace.files, name)
    workspace.push(path)
    archive = workspace.files.archive(path).relative_to(workspace.files.directory)
    (workspace.data / "cache/main" / archive).unlink()
    outcome = Machine(host, workspace, name).deploy(path, push=False)
    assert outcome.status == "Failed"
    assert "does not exist in binary cache" in outcome.reason
    assert f"remove the narinfo of {path} from the cache, and push" in outcome.reason


# --- the machine itself ---------------------------------------------------------------------------


def mount(host, place, options):
    """Give a host a small file system."""
    host.path(place).mkdir(parents=True, exist_ok=True)
    host.output("mount", "-t", "tmpfs", "-o", options, "tmpfs", place)


@pytest.mark.parametrize("options", ["nr_inodes=60", "size=1m"])
@pytest.mark.long
def test_the_store_is_full(host, live, name, options):
    """The estimate of Nix does not count inodes, nor what the file system adds."""
    mount(host, "/nix/store", options)
    path = closures.chain(live.files, 300, 50, name)
    outcome = Machine(host, live, name).deploy(path)
    assert (outcome.status, outcome.step) == ("Failed", "failed")
    free = "the file system of /nix/store has .* and .* inodes free; collect garbage or enlarge it"
    assert re.search(f"No space left on device: {free}", outcome.reason), outcome.reason


@pytest.mark.parametrize("how", ["never started", "dead"])
def test_the_daemon_does_not_run(host, live, name, how):
    if how == "dead":
        host.path("/nix/var/nix/daemon-socket").mkdir(parents=True)
        socket = "/nix/var/nix/daemon-socket/socket"
        host.output("python3", "-c", f"import socket; socket.socket(1).bind('{socket}')")
    machine = Machine(host, live, name, env={"NIX_REMOTE": "daemon"})
    outcome = machine.deploy(closures.plain(live.files, name))
    assert outcome.status == "Failed"
    assert re.search("the Nix daemon is not there: cannot connect to .* at", outcome.reason)
    assert "start it (`systemctl start nix-daemon`)" in outcome.reason


def test_the_store_is_read_only(host, live, name):
    mount(host, "/nix/store", "ro")
    outcome = Machine(host, live, name).deploy(closures.plain(live.files, name))
    assert outcome.status == "Failed"
    assert re.search("/nix/store.*: Read-only file system: mount it writable", outcome.reason)


# --- a user of the daemon -------------------------------------------------------------------------


@pytest.fixture
def as_nobody(host, name):
    """Start an agent as an ordinary user: `as_nobody(workspace, more, NIX_REMOTE="daemon")`.

    `more` is added to nix.conf. A daemon runs if NIX_REMOTE is set.
    """
    programs = []

    def start(workspace, more="", **env):
        for place in (host.directory, *host.directory.parents):
            if str(place).startswith("/tmp/"):
                os.chmod(place, 0o755)
        configure(host, more=more)
        if env:
            programs.append(host.start("daemon", ["nix-daemon"]))  # it leaves the host's namespace
            socket = host.path("/nix/var/nix/daemon-socket/socket")
            wait_until(socket.exists, what="the daemon")
        else:
            host.output("nix-store", "--init")
        home = host.directory / "nobody"
        for place in ("", "tmp", "s", "CACHE", "STATE", "CONFIG", "DATA"):
            (home / place).mkdir()
            shutil.chown(home / place, "nobody")
        env |= {"HOME": str(home), "TMPDIR": str(home / "tmp"), "STATE_DIRECTORY": str(home / "s")}
        env |= {f"XDG_{one}_HOME": f"{home}/{one}" for one in ("CACHE", "STATE", "CONFIG", "DATA")}
        env |= {"CACHIX_AGENT_TOKEN": workspace.token("agent")}
        drop = ["setpriv", "--reuid=nobody", "--clear-groups", "--inh-caps=-all"]
        pyz = host.directory / "cachix-deploy.pyz"  # the Python of the tests may be root's own
        build = [sys.executable, str(PROJECT / "tools/pyz.py"), str(pyz)]
        subprocess.run(build, check=True, capture_output=True)
        argv = [*drop, "/usr/bin/python3", str(pyz), "--host", workspace.url, "agent", name]
        agent = host.start(f"agent-{name}", argv, env)
        programs.append(agent)
        agent.wait_for("is connected to")

    yield start
    for program in programs:
        program.kill()


def reason_of_failure(workspace, name):
    """The reason for which the deployment of a home-manager generation fails."""
    path = closures.home_manager(workspace.files, name)
    workspace.push(path)
    deployment = workspace.deploy(name, path)
    assert workspace.wait(deployment) == "Failed"
    return workspace.deployment(deployment)["reason"]


@pytest.mark.long
@pytest.mark.parametrize("private", [False, True])
def test_the_daemon_does_not_trust_the_user(as_nobody, make_workspace, name, private):
    workspace = make_workspace(private=private)
    as_nobody(workspace, NIX_REMOTE="daemon")
    reason = reason_of_failure(workspace, name)
    assert "add nobody to trusted-users in this machine's nix.conf" in reason
    assert f"the Nix daemon ignores {workspace.cache_url}, because" in reason


@pytest.mark.long
def test_the_daemon_knows_the_cache_but_ignores_the_token(as_nobody, make_workspace, name):
    """The substituter is trusted, so that Nix does not warn of it."""
    workspace = make_workspace(private=True)
    as_nobody(workspace, f"trusted-substituters = {workspace.cache_url}", NIX_REMOTE="daemon")
    assert "add nobody to trusted-users" in reason_of_failure(workspace, name)


def test_a_user_without_the_daemon_may_not_write_the_store(as_nobody, live, name):
    as_nobody(live)
    reason = reason_of_failure(live, name)
    assert "run the agent as root, or let user nobody use the Nix daemon" in reason, reason
