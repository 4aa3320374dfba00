"""Signed deployments: what an agent with deployment keys runs, with real Nix."""

import json
import os
import stat
import subprocess
import time
from dataclasses import replace

import closures
import pytest
from hosts import clean_environment, command, wait_until

from cachix_protocol import Spec, Undecodable, UsageError, Wish
from cachix_signed import SecretKey, Signature, Statement, deployment_keys, plain_host
from cachix_workspace.reports import check_signatures

TOKEN = "agent-token"
FAST = {"CACHIX_DEPLOY_WAITS": '{"backoff": 0.05}'}
KEY = SecretKey("ci-1", b"c" * 32)
OTHER = SecretKey("ci-1", b"o" * 32)
SYSTEM, SCRIPT = "x86_64-linux", "/nix/store/00000000000000000000000000000000-script"


@pytest.fixture
def site(host, cache, peer):
    """An agent that wants signatures, and two paths."""
    peer.cache = cache.wire()
    return Site(host, cache, peer)


class Site:
    def __init__(self, host, cache, peer):
        self.host, self.cache, self.peer = host, cache, peer
        self.paths = [closures.plain(cache, number) for number in range(5)]

    def start(self, *args):
        options = (f"--deployment-key={KEY.public_text()}", *args)
        return self.host.agent("web", self.peer.url, TOKEN, *options, env=FAST)

    def statement(self, path, sequence=100, **more):
        return Statement(plain_host(self.peer.url), "web", path, sequence, **more)

    def deploy(self, path, signature=None, script=None, **more):
        """Deploy; the reason of a refusal, empty if it succeeded."""
        deployment = self.peer.deploy(path, script, signature=signature, **more)
        if self.peer.finished(deployment, 30):
            return ""
        wait_until(lambda: self.peer.log(deployment), 20, "the log")
        return self.peer.log(deployment)[-1]

    def signed(self, path, sequence=100, **more):
        return self.deploy(path, KEY.sign(self.statement(path, sequence, **more)))


# --- what is signed -------------------------------------------------------------------------------


def test_the_statement_is_what_the_protocol_says():
    statement = Statement("x.example:8080", "web", "/nix/store/a", 7, {SYSTEM: "/nix/store/b"}, 9)
    assert statement.to_bytes() == (
        b'{"agent":"web","allowDowngrade":false,"expires":9,"host":"x.example:8080",'
        b'"rollbackScript":{"x86_64-linux":"/nix/store/b"},"sequence":7,'
        b'"storePath":"/nix/store/a","type":"cachix-deploy deployment 1"}'
    )


def test_the_statement_of_another_operation():
    """A plain one has the same bytes as before there were operations."""
    statement = Statement("h", "web", "/nix/store/a", 7, wish=Wish("boot", "window"))
    assert (
        b'"host":"h","options":{"operation":"boot","reboot":"window"},"rollbackScript":{}'
        in statement.to_bytes()
    )


@pytest.mark.parametrize(
    ("url", "host"),
    [
        ("https://Deploy.Example.org", "deploy.example.org"),
        ("https://deploy.example.org:443/", "deploy.example.org"),
        ("http://deploy.example.org:443", "deploy.example.org:443"),
        ("https://a.example/team", "a.example/team"),
    ],
)
def test_the_host_in_a_statement(url, host):
    assert plain_host(url) == host


@pytest.mark.parametrize(
    "change",
    [
        {"sequence": "1"},
        {"sequence": True},
        {"sequence": -1},
        {"sequence": 1 << 64},
        {"sequence": None},
        {"expires": "soon"},
        {"expires": -1},
        {"allowDowngrade": 1},
        {"rollbackScript": [SCRIPT]},
        {"rollbackScript": {SYSTEM: 1}},
        {"signature": "x"},
        {"signature": None},
        {"key": None},
    ],
)
def test_a_signature_of_the_wrong_form_is_refused(change):
    record = {**KEY.sign(Statement("h", "web", "/nix/store/a", 1)), **change}
    with pytest.raises(Undecodable):
        Signature.from_json(record, "https://h", "web", "/nix/store/a")


def test_keys_of_the_command_line():
    first, second = KEY.public_text(), SecretKey("ops-1", b"x" * 32).public_text()
    assert set(deployment_keys([first], f"{second} {first}")) == {"ci-1", "ops-1"}
    for bad in ("ci-1", "ci-1:AAAA", ":" + first.partition(":")[2], "", f"{first}x"):
        with pytest.raises(UsageError, match="--deployment-key must be a public key"):
            deployment_keys([bad], None)
    with pytest.raises(UsageError, match="two keys named ci-1"):
        deployment_keys([first, OTHER.public_text()], None)


def cachix_deploy(tmp_path, *args, **environment):
    result = subprocess.run(
        [*command("cachix-deploy"), *args],
        env={**clean_environment(tmp_path), **environment},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=60,
    )
    return result.returncode, result.stdout, result.stderr


def test_a_key_is_made_that_only_its_owner_can_read(tmp_path):
    status, out, err = cachix_deploy(tmp_path, "key", "create", "ci-1", "ci.key")
    path = tmp_path / "ci.key"
    assert status == 0 and stat.S_IMODE(path.stat().st_mode) == 0o600
    assert out.strip() == SecretKey.read(str(path)).public_text()
    secret = path.read_text().strip().partition(":")[2]
    assert secret not in out + err
    status, out, err = cachix_deploy(tmp_path, "key", "create", "ci-1", "ci.key")
    assert status == 1 and "ci.key can't be written: File exists; name a new file" in err
    status, out, err = cachix_deploy(tmp_path, "key", "create", "a:b", "other.key")
    assert status == 64 and "a key's name is such as ci-1" in err
    assert "other.key" not in os.listdir(tmp_path)


@pytest.mark.parametrize("text", ["", "ci-1", "ci-1:AAAA", "s3cr3t", "\xff"])
def test_a_file_that_holds_no_key_is_not_repeated(tmp_path, text):
    (tmp_path / "key").write_bytes(text.encode("latin-1"))
    (tmp_path / "deploy.json").write_text(json.dumps({"agents": {"web": SCRIPT}}))
    args = ["activate", "deploy.json", "--signing-key=key", "--host=http://127.0.0.1:1"]
    status, _, err = cachix_deploy(tmp_path, *args, CACHIX_ACTIVATE_TOKEN="t")
    assert status == 64 and err.startswith("error: ") and err.count("\n") == 1
    assert not text or text == "ci-1" or text not in err


def test_options_that_need_a_key_say_so(tmp_path):
    for option in ("--expires=60", "--allow-downgrade"):
        args = ["activate", "deploy.json", option, "--host=http://127.0.0.1:1"]
        status, _, err = cachix_deploy(tmp_path, *args, CACHIX_ACTIVATE_TOKEN="t")
        assert status == 64 and "give --signing-key=FILE" in err


@pytest.mark.parametrize(
    "signatures",
    [
        {"db": {}},
        {"web": 1},
        {"web": {"a": "\u00e9"}},
        {"web": {"a": "\ud800"}},
        {"web": {"a": float("nan")}},
        {"web": {"a": "x" * (1 << 16)}},
        ["web"],
    ],
)
def test_an_order_whose_signatures_can_not_be_sent_is_refused(signatures):
    with pytest.raises(Undecodable):
        check_signatures(Spec.from_json({"agents": {"web": SCRIPT}, "signatures": signatures}))


# --- what an agent runs ---------------------------------------------------------------------------


@pytest.mark.promise(13)
def test_only_what_is_signed_runs(site):
    site.start()
    one, two = site.paths[:2]
    assert site.signed(one) == ""
    assert site.host.profile() == one
    statement = site.statement(two, 200)
    good = KEY.sign(statement)
    refused = {
        "unsigned": None,
        "is not one for agent web": OTHER.sign(statement),
        "and not by ci-1": {**good, "key": "ops-1"},
        "can't be read": {**good, "signature": "AAAA"},
        "not one for agent": {**good, "sequence": 201},
        "is not one for": KEY.sign(site.statement(site.paths[2], 200)),
        "not one": KEY.sign(replace(statement, agent="db")),
        "not one for": KEY.sign(replace(statement, host="elsewhere.example")),
        "expired on": KEY.sign(replace(statement, expires=int(time.time()) - 1)),
    }
    for reason, signature in refused.items():
        line = site.deploy(two, signature)
        assert reason in line and "nothing was changed" in line, reason
    assert site.host.profile() == one and not site.host.valid(two)
    assert site.deploy(two, good) == ""
    assert site.host.profile() == two


@pytest.mark.promise(13)
@pytest.mark.parametrize("sent", [{"operation": "dry-activate"}, {"reboot": "when-needed"}])
def test_whoever_has_stolen_a_token_turns_no_operation(site, sent):
    """Neither into another one, nor into a plain one, nor into one without a signature."""
    site.start()
    path = site.paths[0]
    plain = KEY.sign(site.statement(path))
    assert "is not one for agent web" in site.deploy(path, plain, options=sent)
    wish = Wish(**sent)
    signature = KEY.sign(site.statement(path, wish=wish))
    assert "is not one for agent web" in site.deploy(path, signature)
    assert site.host.profile() is None
    # by its own signature it gets as far as the kind, which refuses it
    reason = site.deploy(path, signature, options=sent)
    assert "makes no sense for a plain path" in reason or "only NixOS is rebooted" in reason
    assert site.signed(path, 200) == ""
    assert "asks for another operation, or for a reboot" in site.deploy(path, options=sent)


def test_the_rollback_script_is_signed_too(site):
    site.start()
    path = site.paths[0]
    script = closures.script(site.cache, "check", "true")
    signature = KEY.sign(site.statement(path, rollback_scripts={SYSTEM: script}))
    for other in (None, site.paths[1]):
        assert "its rollback script is not the one" in site.deploy(path, signature, other)
    assert "its rollback script is not" in site.deploy(path, KEY.sign(site.statement(path)), script)
    assert site.deploy(path, signature, script) == ""


@pytest.mark.promise(13)
def test_an_older_order_runs_only_if_ci_allows_it(site):
    site.start()
    one, two, three = site.paths[:3]
    replay = KEY.sign(site.statement(one, 100))
    assert site.deploy(one, replay) == "" and site.deploy(one, replay) == ""
    assert "another deployment of the same" in site.signed(two, 100)
    assert site.signed(two, 200) == ""
    line = site.deploy(one, replay)
    assert "sequence 100 is older than 200" in line and "--allow-downgrade" in line
    assert site.signed(three, 150, allow_downgrade=True) == ""
    assert "is older than 200" in site.signed(one, 160)
    assert site.host.profile() == three


@pytest.mark.promise(13)
def test_a_refused_or_failed_download_uses_up_no_sequence(site):
    site.start()
    one, two = site.paths[:2]
    site.cache.misbehave("/nar/", "404")
    assert "does not exist" in site.signed(two, 300)
    site.cache.heal()
    assert site.signed(one, 200) == ""


@pytest.mark.promise(13)
@pytest.mark.parametrize("damage", ["removed", "garbage", "list"])
def test_lost_state_accepts_any_sequence_and_says_so(site, damage):
    program = site.start()
    assert site.signed(site.paths[0], 200) == ""
    assert program.stop() == 0
    file = site.host.state / "executed-web.json"
    if damage == "removed":
        file.unlink()
    else:
        file.write_text({"garbage": "{", "list": "[1]"}[damage])
    program = site.start()
    assert site.signed(site.paths[1], 100) == ""
    program.wait_for("sequence 100 is accepted: no earlier one is on record")
    assert "is older than 100" in site.signed(site.paths[0], 50)


@pytest.mark.promise(13)
def test_without_a_signature_only_the_way_back_is_open(site):
    site.start()
    one, two, three, four = site.paths[:4]
    for sequence, path in enumerate((one, two, three)):
        assert site.signed(path, sequence) == ""
    for path in (one, four):
        line = site.deploy(path)
        assert "is unsigned, and none of the last paths" in line
        assert "--unsigned-rollback=1" in line
    line = site.deploy(two, script=closures.script(site.cache, "s", "true"))
    assert "its rollback script is not the one of that time" in line
    assert site.deploy(two) == "" and site.host.profile() == two


@pytest.mark.promise(13)
@pytest.mark.parametrize("count", [0, 2])
def test_the_way_back_is_as_long_as_the_operator_says(site, count):
    site.start(f"--unsigned-rollback={count}")
    one, two, three = site.paths[:3]
    for sequence, path in enumerate((one, two, three)):
        assert site.signed(path, sequence) == ""
    assert (site.deploy(one) == "") == (count == 2)


@pytest.mark.promise(13)
def test_another_agents_or_an_unconfirmed_path_is_no_way_back(site):
    bad = closures.script(site.cache, "bad", "exit 1")
    site.start()
    one, two = site.paths[:2]
    assert site.signed(one, 1) == ""
    signature = KEY.sign(site.statement(two, 2, rollback_scripts={SYSTEM: bad}))
    assert site.deploy(two, signature, bad) != ""  # rolled back
    assert "none of the last paths" in site.deploy(two)
    assert site.deploy(one) == ""


@pytest.mark.promise(13)
def test_a_number_that_goes_back_is_executed_and_said(host, cache, peer):
    """A workspace that was restored from a backup begins with lower ones."""
    peer.cache = cache.wire()
    program = host.agent("web", peer.url, TOKEN, env=FAST)
    one, two = closures.plain(cache, 1), closures.plain(cache, 2)
    assert peer.finished(peer.deploy(one, index=7))
    assert peer.finished(peer.deploy(two, index=3)) and host.profile() == two
    program.wait_for("deployment 3 comes after deployment 7: the workspace was restored from a ")


# --- from CI to the machine -----------------------------------------------------------------------


@pytest.mark.promise(13)
def test_activate_signs_what_the_workspace_hands_on(host, make_workspace, tmp_path):
    workspace = make_workspace()
    path, other = closures.plain(workspace.files, 1), closures.plain(workspace.files, 2)
    script = closures.script(workspace.files, "check", "true")
    workspace.push(path, script, other)
    (tmp_path / "ci.key").write_text(KEY.text())
    option = f"--deployment-key={KEY.public_text()}"
    host.agent("web", workspace.url, workspace.token("agent"), option, env=FAST).wait_for(
        "connected"
    )
    spec = {"agents": {"web": path}, "rollbackScript": {SYSTEM: script, "aarch64-linux": other}}
    (tmp_path / "deploy.json").write_text(json.dumps(spec))
    ci = {"CACHIX_ACTIVATE_TOKEN": workspace.token("activate")}
    argv = ["activate", "deploy.json", f"--host={workspace.url}"]
    status, out, _ = cachix_deploy(tmp_path, *argv, **ci)
    assert status == 1 and "it is unsigned" in out and host.profile() is None
    status, out, err = cachix_deploy(tmp_path, *argv, "--signing-key=ci.key", "--expires=60", **ci)
    assert status == 0, out + err
    assert host.profile() == path
    _, answer = workspace.request("GET", "/api/v1/deploy/deployments?limit=1")
    assert answer["deployments"][0]["signature"]["key"] == "ci-1"
