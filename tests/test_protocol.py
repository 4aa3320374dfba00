"""Our agent, compared with recorded sessions of Cachix's: the same frames in the same order."""

import itertools
import json
import re
import shutil
import threading
import uuid

import closures
import pytest
from caches import Key, password
from hosts import wait_until
from peer import AGENT_ID, headers, is_at, message, outline, shape, transcript

from cachix_connection import Peer, reach
from cachix_deploy import Inbox
from cachix_protocol import FAILURE_LINE, PROTOCOL_VERSION, SUCCESS_LINE, Deployment

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
    result, label = {}, ""
    for event in transcript(name):
        label = event["label"] if event.get("event") == "scenario" else label
        result.setdefault(label, []).append(event)
    return result


def client_messages(events, path):
    """The texts that a client sent to `path`, decoded."""
    texts = [e for e in events if (e.get("dir"), e.get("frame")) == ("C->S", "text")]
    return [json.loads(event["payload"]) for event in texts if is_at(event["path"], path)]


def has_succeeded(peer, deployment):
    """Wait until a deployment is reported whole, and its websockets have ended; its result."""
    result = peer.finished(deployment, 30)
    paths = ("/ws-deployment", LOG + deployment)

    def is_over():
        own = [connection for connection in peer.connections if connection.path in paths]
        return all(connection.ended.is_set() for connection in own) and peer.log(deployment)

    wait_until(is_over, 20, "the end of the deployment's sockets")
    return result


def check_messages(events, deployment):
    """Check our messages on /ws-deployment."""
    messages = client_messages(events, "/ws-deployment")
    assert len({record["id"] for record in messages}) == len(messages)
    for record in messages:
        command = record["command"]
        assert record["agent"] == AGENT_ID and record["method"] == command["tag"]
        assert UUID4.fullmatch(record["id"])
        assert command["id"] == deployment and TIME.fullmatch(command["time"])
    sizes = [record["command"]["closureSize"] for record in messages[:-1]]
    assert sizes[0] is None and all(size > 0 for size in sizes[1:])
    times = [record["command"]["time"] for record in messages]
    assert times == sorted(times)


def check_sockets(events):
    """Check our frames on the websockets of a deployment."""
    for number in {e["conn"] for e in events if "frame" in e and e["path"] != "/ws"}:
        frames = [e for e in events if e.get("conn") == number and e.get("dir") == "C->S"]
        kinds = [frame["frame"] for frame in frames]
        assert kinds[-1] == "close" and frames[-1]["close_code"] == 1000
        assert kinds.count("close") == 1
        for frame in frames:
            assert (frame["masked"], frame["rsv"], frame["fin"]) == (1, 0, 1)
        if "text" in kinds:  # ours: a ping after each batch, whose pong acknowledges the batch
            assert kinds[0] == "text" and kinds[-2] == "ping"
            assert all(len(set(part)) == 1 for _, part in itertools.groupby(kinds))


def check_report(deployment, recorded, events):
    """Compare a report with the recorded one, but for intended differences; our lines."""
    assert outline(events, "/ws-deployment") == outline(recorded, "/ws-deployment")
    check_messages(events, deployment)
    check_sockets(events)
    lines, theirs = client_messages(events, LOG), client_messages(recorded, LOG)
    assert {repr(shape(line)) for line in lines} == {repr(shape(line)) for line in theirs}
    assert all(TIME.fullmatch(line["time"]) and "\n" not in line["line"] for line in lines)
    texts = [line["line"] for line in lines]
    closing = [text for text in texts if text.startswith((SUCCESS_LINE, FAILURE_LINE))]
    assert closing == texts[-1:]
    if theirs[-1]["line"] == SUCCESS_LINE:
        assert texts[-1] == SUCCESS_LINE
    else:
        assert texts[-1].startswith(f"{FAILURE_LINE} ")
    return texts


def run(peer, label, path, rollback=None):
    """Deploy as in a recorded scenario; the result, and the checked lines of the log."""
    start = len(peer.events)
    deployment = peer.deploy(path, rollback)
    result = has_succeeded(peer, deployment)
    recorded = scenarios("agent-deployments")[label]
    return result, check_report(deployment, recorded, peer.events[start:])


def close_codes(events):
    """The codes of all close frames."""
    return [event["close_code"] for event in events if event.get("frame") == "close"]


def test_plain_paths_as_recorded(host, cache, peer):
    """agent-deployments: a success, a path that is nowhere, rollback scripts of all kinds."""
    one, two, three = (closures.plain(cache, number) for number in (1, 2, 3))
    fails = closures.script(cache, "fails", "echo to stdout; echo to stderr >&2; exit 1")
    fine = closures.script(cache, "fine", "echo all good")
    text = closures.script(cache, "text", "echo 'café ✓'")
    both = "printf 'out-%s ' $i; printf 'err-%s ' $i >&2"
    parts = closures.script(cache, "parts", f"for i in 1 2; do {both}; done; echo; echo")
    useless = closures.unusable_script(cache, "not-executable")
    present(host, cache, one, two, three, fails, fine, text, parts, useless)
    nowhere = "/nix/store/00000000000000000000000000000000-nope"
    failed = rf"the rollback script {fails} ended with status 1.*rolled back to {one}"
    agent = start(host, peer)
    peer.agent()
    for label, path, script, succeeds, profile, line in (
        ("b-success", one, None, True, one, "Success"),
        ("b2-redeploy-same", one, None, True, one, "Success"),
        ("c-nonexistent", nowhere, None, False, one, "Failed.* is not in any substituter of this"),
        ("d-rollback", two, fails, False, one, f"Failed.* {failed}"),
        ("d2-rollback-ok", two, fine, True, two, "Success"),
        ("d3-rollback-noexec", three, useless, False, two, f"Failed.*`{useless}` could not be st"),
        ("garbage-path", "not-a-path", None, False, two, "Failed.*which is not a store path"),
        ("utf8", one, text, True, one, "café ✓"),
        ("interleave", one, parts, True, one, "out-1 err-1 out-2 err-2 $"),
    ):
        result, lines = run(peer, label, path, script)
        assert result is succeeds, (label, lines)
        assert host.profile() == profile, label
        assert any(re.match(line, text) for text in lines), (label, lines)
        commands = [text for text in lines if text.startswith("$ ")]
        if script and script != useless:
            assert f"$ {script}" in commands
        if label == "b-success":  # ours: no nix-store in the log, as nothing is downloaded
            assert commands == [f"$ nix-env --profile /nix/var/nix/profiles/system --set {one}"]
        if label == "interleave":
            assert lines[lines.index("out-1 err-1 out-2 err-2 ") + 1] == ""
    assert agent.process.poll() is None and len(peer.heads("/ws")) == 1
    assert agent.stop() == 0
    assert close_codes(scenarios("agent-deployments")["sigterm"])[0] == 1000
    closes = wait_until(lambda: peer.frames("/ws", "close", ""), 10, "the agent's close")
    assert close_codes(closes)[0] == 1000


SET_PROFILE = "nix-env --profile /nix/var/nix/profiles/system --set PATH"
SWITCH = "PATH/bin/switch-to-configuration"


@pytest.mark.parametrize(
    ("label", "kind", "succeeds", "commands"),
    [
        ("nixos-ok", "nixos", True, [f"{SWITCH} test", SET_PROFILE, f"{SWITCH} boot"]),
        ("nixos-fail", "nixos", False, [f"{SWITCH} test"]),
        ("hm", "home_manager", True, ["PATH/activate"]),
        ("darwin", "darwin", True, ["PATH/sw/bin/darwin-rebuild activate", SET_PROFILE]),
    ],
)
def test_systems_as_recorded(host, cache, peer, label, kind, succeeds, commands):
    """The reports are the same, the commands our own: nothing boots before it has been checked."""
    host.path("/nix/var/nix/profiles/per-user/root").mkdir(parents=True, exist_ok=True)
    path = getattr(closures, kind)(cache, 1, after="" if succeeds else "echo failing; exit 4")
    present(host, cache, path)
    start(host, peer)
    result, lines = run(peer, label, path)
    assert result is succeeds, lines
    expected = [f"$ {command.replace('PATH', path)}" for command in commands]
    assert [line for line in lines if line.startswith("$ ")] == expected
    if not succeeds:
        assert "some units failed (status 4)" in lines[-1]


def test_each_handshake_has_the_recorded_headers(host, cache, peer):
    events = transcript("agent-deployments")
    recorded = [event["raw"] for event in events if event.get("event") == "http-request"]
    start(host, peer)
    assert has_succeeded(peer, peer.deploy(present(host, cache, closures.plain(cache, 1))))
    assert {head.split(" ")[1].rpartition("/")[0] + "/" for head in recorded} >= {"/", LOG}
    heads = [head for head in peer.heads() if "Upgrade" in head]
    assert len(heads) >= 3
    for head in heads:
        paths = [path for path in ("/ws-deployment", "/ws", LOG) if is_at(head.split(" ")[1], path)]
        theirs = dict(headers(next(raw for raw in recorded if is_at(raw.split(" ")[1], paths[0]))))
        ours = dict(headers(head))
        assert head.split(" ")[0] == "GET" and head.split("\r\n")[0].endswith(" HTTP/1.1")
        assert set(ours) - set(theirs) == {"User-Agent"} and not set(theirs) - set(ours)
        assert ours["version"] == theirs["version"] == PROTOCOL_VERSION
        assert (ours["name"], ours["system"]) == ("web", theirs["system"])
        assert ours["Authorization"] == f"Bearer {TOKEN}"
        assert len(headers(head)) == len(ours)


def test_a_path_prefix_and_the_port_of_the_host_count(peer):
    for prefix in ("", "/deploy", "/a/b/"):
        before = len(peer.heads())
        reach(Peer.create(peer.url + prefix, TOKEN, "web"), 5)
        head = peer.heads()[before]
        assert head.startswith(f"GET {prefix.rstrip('/')}/ws-deployment HTTP/1.1\r\n")
        assert dict(headers(head))["Host"] == peer.url[7:]


# --- single messages ------------------------------------------------------------------------------

SKIPPED = {"not json", "json wrong type", "unknown tag", "empty text", "null", "uuid no dashes"}
SKIPPED |= {"trailing garbage", "Deployment index float 1.5", "Deployment index string"}
SKIPPED |= {"text invalid utf8"}
REGISTERED = {"missing id", "missing agent field", "missing cache field", "missing method"}
REGISTERED |= {"wrong method right tag", "extra fields", "uuid uppercase", "leading/trailing ws"}
REGISTERED |= {"BOM", "binary frame with valid json", "fragmented"}
ELSEWHERE = {"rollbackScript key missing", "masked server frame", "reserved opcode 3"}


def test_every_recorded_odd_message_is_skipped_with_a_sentence_or_accepted(host, peer):
    agent = start(host, peer)
    connection = peer.agent()
    agent.wait_for("web is connected")
    recorded = scenarios("agent-invalid-messages")
    assert set(recorded) - {""} == SKIPPED | REGISTERED | ELSEWHERE
    for label in [label for label in recorded if label in SKIPPED | REGISTERED]:
        events = [e for e in recorded[label] if e.get("dir") == "S->C" and e["path"] == "/ws"]
        size = len(agent.text())
        for frame in [event for event in events if event["conn"] == 1]:
            kind = {"cont": "continuation"}.get(frame["frame"], frame["frame"])
            is_binary = "payload_hex" in frame
            payload = bytes.fromhex(frame["payload_hex"]) if is_binary else frame["payload"]
            connection.send(kind, payload, bool(frame["fin"]))
        skipped, registered = "skipped a message from the workspace: ", "web is connected to "
        line = skipped if label in SKIPPED else registered
        wait_until(lambda n=size, line=line: line in agent.text()[n:], 10, f"{line}after `{label}`")
        assert agent.text()[size:].count("\n") == 1, label
    deployment = json.loads(recorded["rollbackScript key missing"][1]["payload"])
    connection.send_text(json.dumps(deployment))
    contents = deployment["command"]["contents"]
    assert "rollbackScript" not in contents and not peer.finished(contents["id"])
    assert len(peer.heads("/ws")) == 1 and "Traceback" not in agent.text()
    assert not peer.messages("11111111-2222-4333-8444-555555555555")
    connection.raw(b"\x83\x00")  # a reserved opcode, as recorded
    wait_until(lambda: len(peer.heads("/ws")) == 2, 10, "the next connection")


def test_asked_to_stop_as_recorded(host, peer):
    """agent-close-1000. Our answer to a close has no reason."""
    frames = [e for e in transcript("agent-close-1000") if e.get("frame") == "close"]
    agent = start(host, peer)
    peer.agent().send("close", bytes.fromhex(frames[0]["payload"]))
    assert agent.wait(12) == 0
    ours = wait_until(lambda: peer.frames("/ws", "close"), 10, "the agent's answer")
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


def test_a_lost_end_is_reported_when_the_workspace_is_back(host, cache, peer):
    """agent-finish-lost: Cachix's agent gives up after five attempts, ours does not."""
    attempts = [e for e in transcript("agent-finish-lost") if e.get("status") == 503]
    assert len(attempts) == 5
    path = closures.nixos(cache, 1, after_boot=closures.wait_for("/run/go-on"))
    present(host, cache, path)
    agent = start(host, peer, backoff=0.02, slowest=0.05)
    deployment = peer.deploy(path)
    wait_until(lambda: host.boot_default() == path, what="the commit, after all checks")
    fault = peer.misbehave("/ws-deployment", "503", times=3 * len(attempts))
    peer.connection("/ws-deployment").reset()
    host.path("/run/go-on").touch()
    wait_until(lambda: fault.times <= 2, 30, "more attempts than Cachix's agent makes")
    assert peer.finished(deployment)
    wait_until(lambda: peer.log(deployment)[-1:] == [SUCCESS_LINE], what="the log's end")
    tags = [record["method"] for record in peer.messages(deployment)]
    starts = tags.count("DeploymentStarted")
    assert 1 <= starts < len(tags) and set(tags[starts:]) == {"DeploymentFinished"}
    assert agent.process.poll() is None


# --- caches ---------------------------------------------------------------------------------------


def deploy_from(host, cache, peer, path, **env):
    """Deploy from the cache by its `uri`; the result and the log."""
    peer.cache = cache.wire()
    host.agent("web", peer.url, TOKEN, env=env)
    deployment = peer.deploy(path)
    result = has_succeeded(peer, deployment)
    assert not [name for name in host.state.iterdir() if "netrc" in name.name]
    return result, peer.log(deployment)


def impatient(host):
    """Let Nix give up a download at once, a stalled one after a second; environment variables."""
    with open(host.directory / "etc/nix.conf", "a") as conf:
        conf.write("download-attempts = 1\n")
    (host.directory / "bin").mkdir()
    nix_store = host.directory / "bin/nix-store"
    words = 'for word; do shift; [ "$word" != 30 ] || word=1; set -- "$@" "$word"; done'
    nix_store.write_text(f'#!/bin/sh\n{words}\nexec {shutil.which("nix-store")} "$@"\n')
    nix_store.chmod(0o755)
    return {"PATH": f"{nix_store.parent}:{host.environment['PATH']}"}


def test_a_private_cache_gets_the_token_as_a_password(host, cache, peer):
    """agent-private-cache: Basic, any user, the agent's token. The log does not have it."""
    cache.token = TOKEN
    succeeded, log = deploy_from(host, cache, peer, path := closures.plain(cache, 1))
    assert succeeded and host.profile() == path
    raw = next(e["raw"] for e in transcript("agent-private-cache") if "/nar/" in e.get("raw", ""))
    assert password(dict(headers(raw))["Authorization"]) == TOKEN
    assert {password(r.authorization) for r in cache.requests if "/nar/" in r.path} == {TOKEN}
    command = next(line for line in log if line.startswith(f"$ nix-store --realise {path}"))
    assert f"--option extra-substituters {cache.url}" in command and cache.key.public in command
    assert not [line for line in log if TOKEN in line]


def test_a_token_that_the_cache_refuses(host, cache, peer):
    """To Nix, 401 means that a path is missing, so the reason names both."""
    cache.token = "another"
    succeeded, log = deploy_from(host, cache, peer, closures.plain(cache, 1))
    assert not succeeded
    hint = "push it there first, or let this agent's token read it"
    assert log[-1].endswith(f" is not in {cache.url}: {hint}"), log
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
    assert not succeeded
    assert log[-1].startswith(f"{FAILURE_LINE} {reason.format(url=cache.url, path=path)}"), log
    assert host.profile() is None


@pytest.mark.parametrize("kind", ["503", "reset", "truncate", "stall"])
def test_a_broken_download_has_its_reason(host, cache, peer, kind):
    path = closures.plain(cache, 1)
    cache.misbehave("/nar/", kind)
    succeeded, log = deploy_from(host, cache, peer, path, **impatient(host))
    assert not succeeded
    assert re.match(f"{FAILURE_LINE} the download from {cache.url} broke off: .+", log[-1]), log
    assert host.profile() is None


def test_a_cache_that_recovers_is_no_failure(host, cache, peer):
    path = closures.plain(cache, 1)
    cache.misbehave("/nar/", "503", times=1)
    succeeded, log = deploy_from(host, cache, peer, path)
    assert succeeded, log


@pytest.mark.promise(13)
def test_a_private_cache_on_another_host_gets_no_token(host, cache, peer):
    cache.token, near = TOKEN, cache.url
    cache.url = near.replace("127.0.0.1", "localhost")
    succeeded, log = deploy_from(host, cache, peer, closures.plain(cache, 1))
    assert not succeeded and "it got no token, because it is on another host" in log[-1], log
    assert cache.requests and not [request for request in cache.requests if request.authorization]


@pytest.mark.promise(13)
@pytest.mark.parametrize("by", ["option", "variable"])
def test_pinned_keys_replace_the_workspaces(host, cache, peer, by):
    """A workspace that signs with a key of its own runs nothing on a machine that pins another."""
    pinned, path = Key("pinned-1", b"p" * 32), closures.plain(cache, 1)
    options = [f"--trusted-key={pinned.public}"] if by == "option" else []
    env = {} if options else {"CACHIX_AGENT_TRUSTED_KEYS": pinned.public}
    peer.cache = cache.wire()
    host.agent("web", peer.url, TOKEN, *options, env=env)
    deployment = peer.deploy(path)
    assert not has_succeeded(peer, deployment)
    reason = f"the signature of {path} is by none of the keys"
    assert reason in peer.log(deployment)[-1] and pinned.public in peer.log(deployment)[-1]
    assert not host.valid(path) and host.profile() is None
    cache.key = pinned
    assert has_succeeded(peer, peer.deploy(closures.plain(cache, 2)))


@pytest.mark.promise(13)
def test_a_cache_that_is_refused_comes_to_nothing_but_a_reason(host, cache, peer):
    """The workspace's own mend of the cache is enough: the agent stays connected."""
    good = cache.wire()
    peer.cache = {**good, "uri": f"{cache.url}?trusted=1"}
    agent = host.agent("web", peer.url, TOKEN)
    connection = peer.agent()
    deployment = peer.deploy(closures.plain(cache, 1))
    assert not has_succeeded(peer, deployment)
    assert "names a cache that is not usable" in peer.log(deployment)[-1]
    assert cache.requests == [] and host.record() == []
    peer.register(connection, cache=good)
    assert has_succeeded(peer, peer.deploy(closures.plain(cache, 1)))
    assert agent.process.poll() is None


def order(index):
    """A deployment with this index."""
    return Deployment("/nix/store/x", str(uuid.uuid4()), index)


def test_the_inbox_hands_out_deployments_by_their_index():
    inbox = Inbox()
    for index in (3, 1, 2):
        inbox.put(order(index))
    assert inbox.has_newer(2) and not inbox.has_newer(3)
    assert [deployment.index for deployment in inbox.take_all()] == [1, 2, 3]
    assert not inbox.has_newer(0)


def test_the_inbox_waits_for_a_deployment():
    inbox, batches = Inbox(), []
    worker = threading.Thread(target=lambda: batches.append(inbox.take_all()), daemon=True)
    worker.start()
    worker.join(0.1)
    assert worker.is_alive() and not batches
    inbox.put(order(7))
    worker.join(5)
    assert [deployment.index for deployment in batches[0]] == [7]


def test_deployments_run_one_at_a_time_and_only_the_newest_of_those_that_wait(host, cache, peer):
    first = present(host, cache, closures.nixos(cache, 1, after=closures.wait_for("/run/go-on")))
    others = [present(host, cache, closures.nixos(cache, number)) for number in (2, 3)]
    start(host, peer)
    ids = [peer.deploy(first)]
    wait_until(lambda: host.running() == first, what="the first one")
    ids += [peer.deploy(path) for path in others]
    contents = {"storePath": others[1], "id": ids[2], "index": 3, "rollbackScript": None}
    peer.agent().send_text(message("Deployment", contents))  # once more
    host.path("/run/go-on").touch()
    assert [peer.finished(deployment) for deployment in ids] == [True, False, True]
    wait_until(lambda: peer.log(ids[1]), what="the reason")
    reason = "deployment 3 arrived before this one was started"
    assert peer.log(ids[1])[-1] == f"{FAILURE_LINE} {reason}"
    calls = [(action, path) for path in (first, others[1]) for action in ("test", "boot")]
    assert host.record() == calls
