"""Our agent against the recorded sessions of Cachix's own, scenario by scenario: the same frames in the same order."""

import itertools
import json
import re
import shutil

import closures
import pytest
from hosts import wait_until
from peer import AGENT_ID, headers, is_at, message, outline, shape, transcript

from cachix_connection import Peer, reach
from cachix_protocol import FAILURE_LINE, PROTOCOL_VERSION, SUCCESS_LINE
from cachix_protocol import Cache as WireCache

TOKEN = "peer-agent-token"
LOG = "/api/v1/deploy/log/"
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d(\.\d{1,9})?Z")
UUID4 = re.compile(r"[0-9a-f]{8}-[0-9a-f]{4}-4[0-9a-f]{3}-[89ab][0-9a-f]{3}-[0-9a-f]{12}")


def start(host, peer, *args, name="web", **waits):
    quick = json.dumps({"backoff": 0.05, "slowest": 0.2, "unit_recheck": 0.1, **waits})
    return host.agent(name, peer.url, TOKEN, *args, env={"CACHIX_DEPLOY_WAITS": quick})


def present(host, cache, *paths):
    host.fetch(cache.url, cache.key.public, *paths)
    return paths[0] if len(paths) == 1 else paths


def scenarios(name):
    """The events of a recorded session by the labels of its scenarios."""
    found, label = {}, ""
    for event in transcript(name):
        label = event["label"] if event.get("event") == "scenario" else label
        found.setdefault(label, []).append(event)
    return found


def said(events, path):
    """The texts that a client sent to a path."""
    wanted = ("C->S", "text")
    return [
        json.loads(e["payload"])
        for e in events
        if (e.get("dir"), e.get("frame")) == wanted and is_at(e["path"], path)
    ]


def ended(peer, deployment):
    """Wait for the whole report of a deployment and the end of its sockets; whether it has succeeded."""
    succeeded = peer.finished(deployment, 30)
    paths = ("/ws-deployment", LOG + deployment)

    def closed():
        return all(c.ended.is_set() for c in peer.connections if c.path in paths) and peer.log(
            deployment
        )

    wait_until(closed, 20, "the end of the deployment's sockets")
    return succeeded


def check_report(peer, deployment, recorded, events):
    """What both clients have in common, and where ours differs on purpose."""
    assert outline(events, "/ws-deployment") == outline(recorded, "/ws-deployment")
    messages = said(events, "/ws-deployment")
    assert len({one["id"] for one in messages}) == len(messages)
    for one in messages:
        assert (
            one["agent"] == AGENT_ID
            and one["method"] == one["command"]["tag"]
            and UUID4.fullmatch(one["id"])
        )
        assert one["command"]["id"] == deployment and TIME.fullmatch(one["command"]["time"])
    sizes = [one["command"]["closureSize"] for one in messages[:-1]]
    assert sizes[0] is None and all(size > 0 for size in sizes[1:])
    times = [one["command"]["time"] for one in messages]
    assert times == sorted(times)

    lines, theirs = said(events, LOG), said(recorded, LOG)
    assert {repr(shape(line)) for line in lines} == {repr(shape(line)) for line in theirs}
    assert all(TIME.fullmatch(line["time"]) and "\n" not in line["line"] for line in lines)
    texts = [line["line"] for line in lines]
    closing = [text for text in texts if text.startswith((SUCCESS_LINE, FAILURE_LINE))]
    assert closing == texts[-1:]
    last = theirs[-1]["line"]
    assert texts[-1] == last if last == SUCCESS_LINE else texts[-1].startswith(f"{FAILURE_LINE} ")

    for number in {e["conn"] for e in events if "frame" in e and e["path"] != "/ws"}:
        frames = [e for e in events if e.get("conn") == number and e.get("dir") == "C->S"]
        kinds = [frame["frame"] for frame in frames]
        assert (
            kinds[-1] == "close" and frames[-1]["close_code"] == 1000 and kinds.count("close") == 1
        )
        for frame in frames:
            assert (frame["masked"], frame["rsv"], frame["fin"]) == (1, 0, 1)
        if "text" in kinds:  # ours: each batch is followed by a ping, whose pong acknowledges it
            assert kinds[0] == "text" and kinds[-2] == "ping"
            assert all(len(set(part)) == 1 for _, part in itertools.groupby(kinds))
    return texts


def run(peer, label, path, rollback=None):
    """One scenario: deploy, and give the recording's events, ours, the id and whether it has succeeded."""
    mark = len(peer.events)
    deployment = peer.deploy(path, rollback)
    succeeded = ended(peer, deployment)
    return scenarios("agent-deployments")[label], peer.events[mark:], deployment, succeeded


def test_plain_paths_as_recorded(host, cache, peer):
    """agent-deployments, from success over a path that is nowhere to rollback scripts of all kinds."""
    one, two, three = (closures.plain(cache, number) for number in (1, 2, 3))
    fails = closures.script(cache, "fails", "echo to stdout; echo to stderr >&2; exit 1")
    fine = closures.script(cache, "fine", "echo all good")
    text = closures.script(cache, "text", "echo 'café ✓'")
    parts = closures.script(
        cache,
        "parts",
        "for i in 1 2; do printf 'out-%s ' $i; printf 'err-%s ' $i >&2; done; echo; echo",
    )
    useless = closures.unusable_script(cache, "not-executable")
    present(host, cache, one, two, three, fails, fine, text, parts, useless)
    agent = start(host, peer)
    peer.agent()
    for label, path, script, result, runs in (
        ("b-success", one, None, True, one),
        ("b2-redeploy-same", one, None, True, one),
        ("c-nonexistent", "/nix/store/00000000000000000000000000000000-nope", None, False, one),
        ("d-rollback", two, fails, False, one),
        ("d2-rollback-ok", two, fine, True, two),
        ("d3-rollback-noexec", three, useless, False, two),
        ("garbage-path", "not-a-path", None, False, two),
        ("utf8", one, text, True, one),
        ("interleave", one, parts, True, one),
    ):
        recorded, events, deployment, succeeded = run(peer, label, path, script)
        assert succeeded is result, (label, peer.log(deployment))
        lines = check_report(peer, deployment, recorded, events)
        assert host.profile() == runs, label
        expected = {
            "c-nonexistent": r"Failed.* is not in any substituter of this machine: push it there first",
            "d-rollback": rf"Failed.* the rollback script {fails} ended with status 1.*rolled back to {one}",
            "d3-rollback-noexec": rf"Failed.*`{useless}` could not be started.*rolled back to {two}",
            "garbage-path": r"Failed.*'not-a-path', which is not a store path",
            "utf8": "café ✓",
            "interleave": "out-1 err-1 out-2 err-2 ",
        }
        assert any(re.match(expected.get(label, "Success"), line) for line in lines), (label, lines)
        commands = [line for line in lines if line.startswith("$ ")]
        if script and label != "d3-rollback-noexec":
            assert f"$ {script}" in commands
        if (
            label == "b-success"
        ):  # ours: nothing is downloaded, so that no nix-store stands in the log
            assert commands == [f"$ nix-env --profile /nix/var/nix/profiles/system --set {one}"]
        if label == "interleave":
            assert lines[lines.index("out-1 err-1 out-2 err-2 ") + 1] == ""
    assert agent.process.poll() is None and len(peer.heads("/ws")) == 1
    assert agent.stop() == 0
    theirs = [
        e["close_code"]
        for e in scenarios("agent-deployments")["sigterm"]
        if e.get("frame") == "close"
    ]
    ours = [e["close_code"] for e in peer.frames("/ws", "close", "")]
    assert theirs[0] == 1000 and ours[0] == 1000


@pytest.mark.parametrize(
    ("label", "kind", "result", "commands"),
    [
        ("nixos-ok", "nixos", True, ["{path}/bin/switch-to-configuration test", "nix-env --profile {p} --set {path}",
                                     "{path}/bin/switch-to-configuration boot"]),
        ("nixos-fail", "nixos", False, ["{path}/bin/switch-to-configuration test"]),
        ("hm", "home_manager", True, ["{path}/activate"]),
        ("darwin", "darwin", True, ["{path}/sw/bin/darwin-rebuild activate", "nix-env --profile {p} --set {path}"]),
    ],
)  # fmt: skip
def test_systems_as_recorded(host, cache, peer, label, kind, result, commands):
    """The same reports; the commands are our own: nothing boots before it has been checked."""
    host.path("/nix/var/nix/profiles/per-user/root").mkdir(parents=True, exist_ok=True)
    path = getattr(closures, kind)(cache, 1, after="" if result else "echo failing; exit 4")
    present(host, cache, path)
    start(host, peer)
    recorded, events, deployment, succeeded = run(peer, label, path)
    assert succeeded is result, peer.log(deployment)
    lines = check_report(peer, deployment, recorded, events)
    wanted = [f"$ {line.format(path=path, p='/nix/var/nix/profiles/system')}" for line in commands]
    assert [line for line in lines if line.startswith("$ ")] == wanted
    if not result:
        assert "some units failed (status 4)" in lines[-1]


def test_each_handshake_has_the_recorded_headers(host, cache, peer):
    recorded = [
        e["raw"] for e in transcript("agent-deployments") if e.get("event") == "http-request"
    ]
    start(host, peer)
    ended(peer, peer.deploy(present(host, cache, closures.plain(cache, 1))))
    assert {head.split(" ")[1].rpartition("/")[0] + "/" for head in recorded} >= {"/", LOG}
    heads = [head for head in peer.heads() if "Upgrade" in head]
    assert len(heads) >= 3
    for head in heads:
        begin = next(
            path for path in ("/ws-deployment", "/ws", LOG) if is_at(head.split(" ")[1], path)
        )
        theirs = dict(headers(next(raw for raw in recorded if is_at(raw.split(" ")[1], begin))))
        ours = dict(headers(head))
        assert head.split(" ")[0] == "GET" and head.split("\r\n")[0].endswith(" HTTP/1.1")
        assert set(ours) - set(theirs) == {"User-Agent"} and not set(theirs) - set(ours)
        assert ours["version"] == theirs["version"] == PROTOCOL_VERSION
        assert (ours["name"], ours["system"], ours["Authorization"]) == (
            "web",
            theirs["system"],
            f"Bearer {TOKEN}",
        )
        assert len(headers(head)) == len(ours)


def test_a_path_prefix_and_the_port_of_the_host_count(peer):
    for prefix in ("", "/deploy", "/a/b/"):
        before = len(peer.heads())
        reach(Peer.create(peer.url + prefix, TOKEN, "web"), 5)
        head = peer.heads()[before]
        assert head.startswith(f"GET {prefix.rstrip('/')}/ws-deployment HTTP/1.1\r\n")
        assert dict(headers(head))["Host"] == peer.url[7:]


# --- single messages --------------------------------------------------------------------------------------------------

SKIPPED = {
    "not json", "json wrong type", "unknown tag", "empty text", "null", "uuid no dashes", "trailing garbage",
    "Deployment index float 1.5", "Deployment index string", "text invalid utf8",
}  # fmt: skip
REGISTERED = {
    "missing id", "missing agent field", "missing cache field", "missing method", "wrong method right tag",
    "extra fields", "uuid uppercase", "leading/trailing ws", "BOM", "binary frame with valid json", "fragmented",
}  # fmt: skip
ELSEWHERE = {"rollbackScript key missing", "masked server frame", "reserved opcode 3"}


def test_every_recorded_odd_message_is_skipped_with_a_sentence_or_accepted(host, peer):
    agent = start(host, peer)
    connection = peer.agent()
    agent.wait_for("web is connected")
    recorded = scenarios("agent-invalid-messages")
    assert set(recorded) - {""} == SKIPPED | REGISTERED | ELSEWHERE
    for label, events in recorded.items():
        frames = [
            e for e in events if e.get("dir") == "S->C" and e["path"] == "/ws" and e["conn"] == 1
        ]
        if label in ELSEWHERE or not label:
            continue
        before = agent.text()
        for frame in frames:
            kind = {"cont": "continuation"}.get(frame["frame"], frame["frame"])
            payload = (
                bytes.fromhex(frame["payload_hex"]) if "payload_hex" in frame else frame["payload"]
            )
            connection.send(kind, payload, bool(frame["fin"]))
        word = (
            "a message of the workspace was skipped: "
            if label in SKIPPED
            else "web is connected to "
        )
        wait_until(
            lambda b=before, w=word: w in agent.text()[len(b) :], 10, f"{word} after `{label}`"
        )
        assert agent.text()[len(before) :].count("\n") == 1, label
    deployment = json.loads(recorded["rollbackScript key missing"][1]["payload"])
    connection.send_text(json.dumps(deployment))
    contents = deployment["command"]["contents"]
    assert "rollbackScript" not in contents and not peer.finished(contents["id"])
    assert len(peer.heads("/ws")) == 1 and "Traceback" not in agent.text()
    assert not peer.messages("11111111-2222-4333-8444-555555555555")
    connection.raw(b"\x83\x00")
    wait_until(
        lambda: len(peer.heads("/ws")) == 2,
        10,
        "the connection after a reserved opcode, as recorded",
    )


def test_asked_to_stop_as_recorded(host, peer):
    """agent-close-1000; the answer to a close has no reason in ours."""
    frames = [e for e in transcript("agent-close-1000") if e.get("frame") == "close"]
    agent = start(host, peer)
    peer.agent().send("close", bytes.fromhex(frames[0]["payload"]))
    assert agent.wait(12) == 0
    ours = peer.frames("/ws", "close")
    assert [frame["close_code"] for frame in ours] == [frames[1]["close_code"]] == [1000]
    assert "asked this agent to stop" in agent.text() and len(peer.heads("/ws")) == 1


def test_the_agents_socket_carries_pings_alone(host, peer):
    """agent-ping."""
    recorded = [e for e in transcript("agent-ping") if e.get("dir") == "C->S" and e["conn"] == 1]
    assert {e["frame"] for e in recorded} == {"ping", "pong"}
    start(host, peer, ping=0.2)
    connection = peer.agent()
    connection.send("ping", b"srv-ping-payload")
    connection.send("pong", b"unsolicited")
    wait_until(lambda: len(peer.frames("/ws", "ping")) > 3, what="pings")
    ours = [(e["frame"], e["payload"], e["masked"], e["rsv"]) for e in peer.frames("/ws")]
    assert ours[0] == ("ping", "", 1, 0)
    assert set(ours) == {("ping", "", 1, 0), ("pong", "srv-ping-payload", 1, 0)}


def test_an_end_that_is_lost_is_told_when_the_workspace_is_back(host, cache, peer):
    """agent-finish-lost: Cachix's agent gives up after five attempts, ours does not."""
    attempts = [e for e in transcript("agent-finish-lost") if e.get("status") == 503]
    assert len(attempts) == 5
    path = present(
        host, cache, closures.nixos(cache, 1, after_boot=closures.wait_for("/run/go-on"))
    )
    agent = start(host, peer, backoff=0.02, slowest=0.05)
    deployment = peer.deploy(path)
    wait_until(lambda: host.boot_default() == path, what="the commit, after all checks")
    fault = peer.misbehave("/ws-deployment", "503", times=3 * len(attempts))
    peer.connection("/ws-deployment").reset()
    host.path("/run/go-on").touch()
    wait_until(lambda: fault.times <= 2, 30, "more attempts than Cachix's agent makes")
    assert peer.finished(deployment)
    wait_until(lambda: peer.log(deployment)[-1:] == [SUCCESS_LINE], what="the log's end")
    tags = [one["method"] for one in peer.messages(deployment)]
    assert (
        tags == sorted(tags, key=["DeploymentStarted", "DeploymentFinished"].index)
        and len(tags) >= 2
    )
    assert agent.process.poll() is None


# --- caches ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("host_url", "fields", "url", "key"),
    [
        ("https://cachix.org", {}, "https://mycache.cachix.org", "mycache.cachix.org-1:BASE64="),
        ("http://localhost", {}, "http://mycache.localhost", "mycache.localhost-1:BASE64="),
        (
            "http://localhost:8080",
            {},
            "http://mycache.localhost:8080",
            "mycache.localhost-1:BASE64=",
        ),
        (
            "https://a.example/deploy",
            {},
            "https://mycache.a.example",
            "mycache.a.example-1:BASE64=",
        ),
        (
            "https://joe:pw@a.example",
            {},
            "https://mycache.a.example",
            "mycache.a.example-1:BASE64=",
        ),
        (
            "https://cachix.org",
            {"uri": "http://b:1/cache/x"},
            "http://b:1/cache/x",
            "mycache.cachix.org-1:BASE64=",
        ),
        (
            "https://cachix.org",
            {"publicKey": "own-1:KEY="},
            "https://mycache.cachix.org",
            "own-1:KEY=",
        ),
    ],
)
def test_where_a_cache_is(host_url, fields, url, key):
    record = {"cacheName": "mycache", "publicKey": "BASE64=", "isPublic": True, **fields}
    peer, cache = Peer.create(host_url, TOKEN, "web"), WireCache.from_json(record)
    assert (peer.substituter(cache), peer.public_key(cache)) == (url, key)
    assert cache.to_json() == record


def deploy_from(host, cache, peer, path, **env):
    """Deploy from the cache by its `uri`; whether it has succeeded, and the log."""
    peer.cache = cache.wire()
    host.agent("web", peer.url, TOKEN, env=env)
    deployment = peer.deploy(path)
    succeeded = ended(peer, deployment)
    assert not [name for name in host.state.iterdir() if "netrc" in name.name]
    return succeeded, peer.log(deployment)


def impatient(host):
    """Let Nix try a download once, and give up a stalled one after a second; the environment for the agent."""
    with open(host.directory / "etc/nix.conf", "a") as conf:
        conf.write("download-attempts = 1\n")
    (host.directory / "bin").mkdir()
    nix_store = host.directory / "bin/nix-store"
    words = 'for word; do shift; [ "$word" != 30 ] || word=1; set -- "$@" "$word"; done'
    nix_store.write_text(f'#!/bin/sh\n{words}\nexec {shutil.which("nix-store")} "$@"\n')
    nix_store.chmod(0o755)
    return {"PATH": f"{nix_store.parent}:{host.environment['PATH']}"}


def test_a_private_cache_hears_the_token_as_a_password(host, cache, peer):
    """agent-private-cache: Basic, an empty user, the agent's token; never in the log."""
    cache.token = TOKEN
    succeeded, log = deploy_from(host, cache, peer, path := closures.plain(cache, 1))
    assert succeeded and host.profile() == path
    basic = next(e["raw"] for e in transcript("agent-private-cache") if "/nar/" in e.get("raw", ""))
    assert (
        dict(headers(basic))["Authorization"] == "Basic OnBlZXItYWdlbnQtdG9rZW4="
    )  # :peer-agent-token
    heard = {request.authorization for request in cache.requests if request.status == 200}
    assert dict(headers(basic))["Authorization"] in heard
    assert all(
        r.authorization == dict(headers(basic))["Authorization"]
        for r in cache.requests
        if "/nar/" in r.path
    )
    command = next(line for line in log if line.startswith(f"$ nix-store --realise {path}"))
    assert f"--option extra-substituters {cache.url}" in command and cache.key.public in command
    assert not [line for line in log if TOKEN in line]


def test_a_token_that_the_cache_refuses(host, cache, peer):
    """Nix takes 401 for a path that is not there, so the reason names both."""
    cache.token = "another"
    succeeded, log = deploy_from(host, cache, peer, closures.plain(cache, 1))
    assert not succeeded
    assert log[-1].endswith(
        f" is not in {cache.url}: push it there first, or let this agent's token read it"
    ), log
    assert {request.status for request in cache.requests if "narinfo" in request.path} == {401}
    assert not [line for line in log if TOKEN in line]


@pytest.mark.parametrize(
    ("how", "reason"),
    [
        ("corrupt", "{url} serves a damaged {path}, push it again"),
        ("truncated", "{url} serves a damaged {path}, push it again"),
        ("unsigned", "the signature of {path} is by none of the keys"),
        ("wrong-key", "the signature of {path} is by none of the keys"),
        ("missing", "{path} is not in {url}: push it there first"),
    ],
)
def test_damage_has_its_reason(host, cache, peer, how, reason):
    path = closures.plain(cache, 1)
    cache.damage(path, how)
    succeeded, log = deploy_from(host, cache, peer, path)
    assert not succeeded and log[-1].startswith(
        f"{FAILURE_LINE} {reason.format(url=cache.url, path=path)}"
    ), log
    assert host.profile() is None


@pytest.mark.parametrize("kind", ["503", "reset", "truncate", "stall"])
def test_a_cache_that_breaks_off_has_its_reason(host, cache, peer, kind):
    path = closures.plain(cache, 1)
    cache.misbehave("/nar/", kind)
    succeeded, log = deploy_from(host, cache, peer, path, **impatient(host))
    assert not succeeded and re.match(
        rf"{FAILURE_LINE} the download from {cache.url} broke off: .+", log[-1]
    ), log
    assert host.profile() is None


def test_a_cache_that_recovers_is_no_failure(host, cache, peer):
    path = closures.plain(cache, 1)
    cache.misbehave("/nar/", "503", times=1)
    succeeded, log = deploy_from(host, cache, peer, path)
    assert succeeded, log


def test_deployments_come_one_at_a_time_and_the_newest_counts(host, cache, peer):
    first = present(host, cache, closures.nixos(cache, 1, after=closures.wait_for("/run/go-on")))
    others = [present(host, cache, closures.nixos(cache, number)) for number in (2, 3)]
    start(host, peer)
    known = [peer.deploy(first)]
    wait_until(lambda: host.running() == first, what="the first one")
    known += [peer.deploy(path) for path in others]
    twice = peer.agent()
    contents = {"storePath": others[1], "id": known[2], "index": 3, "rollbackScript": None}
    twice.send_text(message("Deployment", contents))
    host.path("/run/go-on").touch()
    assert [peer.finished(one) for one in known] == [True, False, True]
    wait_until(lambda: peer.log(known[1]), what="the reason")
    assert peer.log(known[1])[-1] == f"{FAILURE_LINE} deployment 3 came before this one was begun"
    assert host.record() == [
        ("test", first),
        ("boot", first),
        ("test", others[1]),
        ("boot", others[1]),
    ]
