"""`push` and `activate --push`: real Nix, a real workspace, a second cache as the upstream."""

import functools
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import urllib.request

import closures
import pytest
from builders import Builder, names
from caches import SELF, Cache, Key, Link
from hosts import PROJECT, wait_until
from live import Workspace
from servers import Proxy
from test_workspace_tls import make as make_certificate

from cachix_workspace import blocks

NOTHING = r"pushed 0 paths \(0 bytes\) in [0-9.]+ s"


@pytest.fixture
def builder(make_host, make_workspace):
    return Builder(make_host("builder"), make_workspace())


@pytest.fixture
def upstream(tmp_path):
    """A cache that has what a builder gives it."""
    cache = Cache(tmp_path / "upstream", Key("built-1"))
    yield cache
    cache.close()


def spec_of(builder, agents, scripts=None):
    """Build a deploy.json; its store path."""
    record = {"agents": agents, **({"rollbackScript": scripts} if scripts else {})}
    return builder.built.add("deploy.json", json.dumps(record))


def link(builder, path, name="result"):
    """Make a link to a path, as `nix build` does; the directory that it is in."""
    os.symlink(path, builder.host.directory / name)
    return str(builder.host.directory)


# --- what is pushed -------------------------------------------------------------------------------


def test_a_closure(builder):
    path = closures.nixos(builder.built, 1)
    builder.have(path)
    assert re.fullmatch(r"pushed 5 paths \([0-9.]+ KiB\) in [0-9.]+ s", builder.push(path))
    assert builder.pushed() == names(builder.built.closure(path)) and not builder.dangling()
    assert re.fullmatch(rf"{NOTHING}, 5 are in the cache already", builder.push(path))


def test_all_that_arguments_name(builder):
    built = builder.built
    first, second, third = (closures.plain(built, number) for number in range(3))
    script = closures.script(built, "check", "exit 0")
    spec = spec_of(builder, {"web": first}, {"x86_64-linux": script})
    builder.have(second, third, spec, first, script)
    directory = link(builder, spec)
    link(builder, second, "second")
    builder.push("result", "second", f"{third}/parts/..", cwd=directory)
    assert builder.pushed() == names(built.closure(first, second, third, script))
    other = built.add("other.json", '{"a": 1}\n')
    builder.have(other)
    assert builder.push(other).startswith("pushed 1 path ")
    (builder.host.directory / "deploy.json").write_text(json.dumps({"agents": {"web": other}}))
    assert ", 1 is in the cache already" in builder.push("deploy.json", cwd=directory)
    (builder.host.directory / "deploy.json").write_text("{}")
    assert "can't be deployed" in builder.refused("deploy.json", cwd=directory)[1]
    for argument in ("/nowhere", "/etc/passwd"):
        status, sentence = builder.refused(argument)
        assert status == 64 and argument in sentence


def test_a_path_that_is_only_in_the_cache_need_not_be_here(builder):
    there, here = (closures.plain(builder.built, number) for number in range(2))
    builder.have(there)
    builder.push(there)
    builder.host.output("nix-store", "--delete", there)
    builder.have(here)
    assert builder.push(there, here).startswith("pushed 2 paths ")
    nowhere = f"/nix/store/{'a' * 32}-nowhere"
    status, sentence = builder.refused(nowhere, here)
    assert (status, sentence) == (
        1,
        f"error: neither this machine nor the cache has {nowhere}: build it first",
    )


def test_every_kind_of_file(builder):
    tree = {
        "empty": "",
        "self": f"{SELF}\n",
        "tool": closures.Executable("#!/bin/sh\n"),
        "link": Link(f"{SELF}/tool"),
        "dangling": Link("/nowhere"),
        "caf\u00e9 au lait": {"A": "1", "a": "2", "a.b": "3", "a-b": "4", "none": {}},
        "eight": "12345678",
    }
    path = builder.built.add("kinds", tree)
    builder.have(path)
    builder.push(path)
    (info,) = builder.directory().glob("*.narinfo")
    assert f"\nReferences: {os.path.basename(path)}\n" in info.read_text()


# --- upstreams ------------------------------------------------------------------------------------


def test_an_upstream_keeps_what_it_has(builder, upstream):
    base = closures.chain(builder.built, 30, name="base")
    builder.give(upstream)
    own = builder.built.add("own", f"{base}\n")
    top = builder.built.add("top", f"{own}\n")
    builder.have(top)
    line = builder.push(top, upstream=upstream.url)
    place = upstream.url.partition("://")[2]
    assert re.fullmatch(rf"pushed 2 paths \(.*\) in .* s, 31 are in {place}", line)
    assert builder.pushed() == names([own, top])
    assert all(request.authorization is None for request in upstream.requests)
    asked = upstream.count("narinfo")
    line = builder.push(top, upstream=upstream.url)
    assert re.fullmatch(rf"{NOTHING}, 2 are in the cache already, 31 are in {place}", line)
    assert asked == 32  # not for the path itself
    builder.push(base, upstream=upstream.url)  # agents take a system from our cache only
    assert builder.pushed() == names([own, top, base])


@pytest.mark.parametrize("kind", ["gone", "500", "reset", "truncate", "garbage", "401"])
def test_an_upstream_that_cannot_be_asked_has_nothing(builder, upstream, kind):
    base = closures.chain(builder.built, 3, name="base")
    builder.give(upstream)
    top = builder.built.add("top", f"{base}\n")
    builder.have(top)
    if kind == "gone":
        upstream.close()
    elif kind == "garbage":
        for file in upstream.directory.glob("*.narinfo"):
            file.write_text("<html>sign in</html>\n")
    else:
        upstream.misbehave("narinfo", kind)
    result = builder.run("push", top, upstream=upstream.url)
    assert result.returncode == 0 and result.stdout.startswith("pushed 5 paths "), result
    (line,) = result.stderr.splitlines()
    problem = "warning: the upstream cache can't be asked, 4 paths are pushed that it may have: "
    assert line.startswith(problem) and upstream.url in line


def test_an_upstream_that_fails_once(builder, upstream):
    base = closures.chain(builder.built, 3, name="base")
    builder.give(upstream)
    top = builder.built.add("top", f"{base}\n")
    builder.have(top)
    upstream.misbehave("narinfo", "503", times=1)
    assert builder.push(top, upstream=upstream.url).startswith("pushed 1 path ")


@pytest.mark.long
def test_tls_and_a_proxy(make_host, tmp_path, upstream):
    """The token goes through the proxy's tunnel, as everything does."""
    certificate, key = make_certificate(tmp_path / "tls")
    workspace = Workspace(tmp_path / "workspace")
    workspace.serve(f"--certificate={certificate}", f"--key={key}")
    proxy = Proxy()
    try:
        workspace.cache()
        builder = Builder(make_host("builder"), workspace)
        base = builder.built.add("base", "")
        builder.give(upstream)
        top = builder.built.add("top", f"{base}\n")
        builder.have(top)
        variables = {
            "SSL_CERT_FILE": str(certificate),
            "all_proxy": f"http://127.0.0.1:{proxy.port}",
        }
        assert "127.0.0.1" in builder.push(top, upstream=upstream.url, **variables)
        assert builder.pushed() == names([top]) and proxy.asked
        assert "certificate verify failed" in builder.refused(top)[1]
    finally:
        proxy.close()
        workspace.kill()


# --- refusals: nothing is uploaded ----------------------------------------------------------------


def test_keys(builder, tmp_path):
    path = closures.plain(builder.built, 1)
    builder.have(path)
    other = Key("main.127.0.0.1-1", b"x" * 32)
    wrong = "is not that of the cache"
    for key, status, words in (
        (None, 64, "no key to sign with: set CACHIX_SIGNING_KEY, or give --cache-key=FILE"),
        ("", 64, "no key to sign with"),
        (other.secret, 64, wrong),
        (other.secret.partition(":")[2], 64, wrong),
        ("garbage", 64, "CACHIX_SIGNING_KEY holds no secret key of a cache"),
        (builder.workspace.files.key.public, 64, "CACHIX_SIGNING_KEY holds no secret key"),
    ):
        result = builder.refused(path, CACHIX_SIGNING_KEY=key)
        assert result[0] == status and words in result[1], result
        assert not key or key.rpartition(":")[2] not in result[1]
    assert builder.refused(path, "--cache-key=/nowhere")[0] == 64
    assert not builder.directory().exists()
    (tmp_path / "key").write_text(f"{builder.key}\n")
    bare = builder.key.partition(":")[2]
    builder.push(path, f"--cache-key={tmp_path / 'key'}", CACHIX_SIGNING_KEY=None)
    builder.push(path, CACHIX_SIGNING_KEY=bare)
    assert len(builder.pushed()) == 3


@pytest.mark.long
def test_a_key_that_is_being_replaced(builder):
    first, second = (closures.plain(builder.built, number) for number in range(2))
    builder.have(first, second)
    new = builder.workspace.cli("cache", "key", "rotate", "main")
    builder.push(first)
    builder.push(second, CACHIX_SIGNING_KEY=new)
    builder.workspace.cli("cache", "key", "retire", "main")
    assert "is not that of the cache" in builder.refused(first)[1]
    # only the new key counts, so that all that the old one has signed is pushed again
    assert builder.push(first, CACHIX_SIGNING_KEY=new).startswith("pushed 3 paths ")


@pytest.mark.long
def test_tokens_and_caches(builder):
    path = closures.plain(builder.built, 1)
    builder.have(path)
    workspace, main = builder.workspace, builder.key
    workspace.cache("other", private=True)
    other = workspace.files.key.secret
    for token, words in (
        ("activate-unknown", "this token is unknown here"),
        (workspace.token("agent"), "yours is an agent token"),
    ):
        status, sentence = builder.refused(path, CACHIX_ACTIVATE_TOKEN=token)
        assert status == 77 and words in sentence
    only = workspace.token("activate", "--cache=other")
    status, sentence = builder.refused(path, "--cache=main", CACHIX_ACTIVATE_TOKEN=only)
    assert status == 77 and "this token is for another cache" in sentence
    builder.push(path, CACHIX_ACTIVATE_TOKEN=only, CACHIX_SIGNING_KEY=other)
    assert len(builder.pushed("other")) == 3 and not builder.directory("main").exists()
    builder.push(path, "--cache=main", CACHIX_SIGNING_KEY=main)
    assert len(builder.pushed("main")) == 3
    status, sentence = builder.refused(path, "--cache=none")
    assert status == 1 and "there is no cache none" in sentence


def test_the_hosted_workspace(builder):
    path = closures.plain(builder.built, 1)
    builder.have(path)
    status, sentence = builder.refused(path, CACHIX_HOST=None)
    assert status == 64 and "push with `cachix push NAME PATH`" in sentence


# --- faults ---------------------------------------------------------------------------------------


def test_a_push_that_is_killed_goes_on_where_it_was(builder):
    leaf = closures.chain(builder.built, 150, name="leaf")
    chain = [leaf]
    for number in range(100):
        chain.append(builder.built.add(f"link-{number}", f"{chain[-1]}\n"))
    builder.have(chain[-1])
    counts = []

    def has(number):
        return len(list(builder.directory().glob("*.narinfo"))) >= number

    for least in (20, 140, 190):
        program = builder.start(chain[-1])
        wait_until(functools.partial(has, least))
        program.kill()
        counts.append(len(builder.pushed()))
        assert not builder.dangling()
    assert counts[-1] < 251, "the push was over too soon"
    line = builder.push(chain[-1])
    there = int(re.search(r"s, ([0-9]+) are in the cache already", line)[1])
    assert counts[-1] <= there <= counts[-1] + 24  # the server may have finished some
    assert re.match(f"pushed {251 - there} path", line)
    assert len(builder.pushed()) == 251 and not builder.dangling()


def test_a_path_whose_contents_have_changed(builder):
    path = closures.plain(builder.built, 1)
    builder.have(path)
    part = next(one for one in builder.built.closure(path) if "part-0" in one)
    file = builder.host.path(f"{part}/share")
    os.chmod(file, 0o644)
    file.write_text("something else\n")
    status, sentence = builder.refused(path)
    assert status == 1 and sentence.startswith(f"error: {part} is damaged: its contents on this")
    assert not builder.pushed() & names([part, path])
    file.unlink()
    os.chmod(builder.host.path(part), 0o755)
    builder.host.path(part).joinpath("share").unlink(missing_ok=True)
    assert "is damaged" in builder.refused(path)[1]
    subprocess.run(["rm", "-r", str(builder.host.path(part))], check=True)
    assert f"{part} can't be packed: " in builder.refused(path)[1]


@pytest.mark.long
def test_a_full_disk(builder):
    path = closures.plain(builder.built, 1)
    builder.have(path)
    builder.workspace.stop()
    builder.workspace.serve("--keep-free=1000000")
    status, sentence = builder.refused(path)
    assert status == 1 and "could not be pushed: " in sentence and "of its disk free" in sentence
    assert not builder.pushed()


@pytest.mark.long
def test_a_path_that_is_too_large(builder):
    path = builder.built.add("large", os.urandom(24 << 20))
    builder.have(path)
    builder.workspace.stop()
    builder.workspace.serve("--max-nar=0.01")
    status, sentence = builder.refused(path)
    assert status == 1 and "a NAR has at most 0.01 GiB here" in sentence


@pytest.mark.long
def test_a_huge_path_is_not_held_in_memory(builder):
    size = 300 << 20
    file = builder.host.directory / "huge"
    with open(file, "wb") as sparse:
        sparse.truncate(size)
    path = builder.host.output("nix-store", "--add", str(file)).strip()
    program = builder.start(path)
    peak = 0

    def has_ended():
        nonlocal peak
        if program.process.poll() is None:
            peak = max(
                peak, program.memory("VmHWM") if os.path.exists(f"/proc/{program.pid}") else 0
            )
            return False
        return True

    wait_until(has_ended, 60)
    assert program.wait() == 0 and "pushed 1 path " in program.text()
    assert 0 < peak < 100 << 20


def test_progress_on_a_terminal(builder):
    path = closures.chain(builder.built, 200)
    builder.have(path)
    argv = builder.host.enter() + [*builder.program, "push", path, "--upstream=none"]
    variables = {**builder.host.environment, **builder.environment()}
    argv = ["script", "--quiet", "--return", "--command", shlex.join(argv), "/dev/null"]
    result = subprocess.run(argv, env=variables, capture_output=True, timeout=60)
    parts = re.findall(r"\r\x1b\[K([^\r\x1b]*)", result.stdout.decode())
    assert result.returncode == 0 and len(parts) >= 2, result.stdout
    assert re.fullmatch(r"pushing: [0-9]+ of 201 paths, [0-9.]+ (bytes|KiB)", parts[0])
    assert parts[-1].startswith("pushed 201 paths ")


# --- a workspace that misbehaves ------------------------------------------------------------------


@pytest.fixture
def scripted(make_host, peer):
    """A builder with a scripted workspace, which has a cache."""

    class Scripted(Builder):
        def __init__(self):
            self.host, self.workspace, self.url = make_host("builder"), peer, peer.url
            self.built = closures.Files(self.host.directory / "built", Key("built-1"))
            self.signer = Key("tests-1")
            self.key, self.token = self.signer.secret, "token-of-ci"
            self.program = [sys.executable, str(PROJECT / "cachix_deploy.py")]
            self.path = closures.plain(self.built, 1)
            self.have(self.path)
            self.puts = []
            peer.answer("GET /api/v1/deploy/cache", lambda _: (200, self.cache()))
            peer.answer("POST /api/v1/deploy/cache/missing", self.missing)
            peer.answer("PUT /cache/", self.take)

        def cache(self, **changes):
            fixed = {"cacheName": "main", "publicKey": self.signer.public, "isPublic": True}
            return {**fixed, "uri": f"{peer.url}/cache/main", **changes}

        def missing(self, request):
            return 200, {"missing": request.json()}

        def take(self, request):
            self.puts.append(request)
            return 201, {}

    return Scripted()


def test_requests(scripted):
    scripted.push(scripted.path)
    paths = [request.path for request in scripted.puts]
    assert len(paths) == 6 and paths[-1] == f"/cache/main/{scripted.path[11:43]}.narinfo"
    assert {request.headers["authorization"] for request in scripted.puts} == {
        "Basic eDp0b2tlbi1vZi1jaQ=="
    }


ELSEWHERE = "error: the cache is at http://elsewhere.test/cache: another host than the workspace"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"uri": "http://elsewhere.test/cache"}, ELSEWHERE),
        ({"uri": "file:///tmp"}, "its `uri` is not http"),
        ({"publicKey": ""}, "`publicKey` holds"),
        ({"publicKey": None}, "`publicKey` is missing or of the wrong type"),
    ],
)
def test_descriptions_of_a_cache_that_are_not_usable(scripted, change, words):
    cache = scripted.cache(**change)
    scripted.workspace.answer("GET /api/v1/deploy/cache", lambda _: (200, cache))
    assert words in scripted.refused(scripted.path)[1] and not scripted.puts


@pytest.mark.parametrize(
    "answer",
    [
        (200, b"<html>sign in</html>"),
        (200, []),
        (200, {"missing": "all"}),
        (200, {"missing": ["a" * 32]}),
        (200, {"missing": [{}]}),
    ],
)
def test_garbage_in_place_of_what_is_missing(scripted, answer):
    scripted.workspace.answer("POST /api/v1/deploy/cache/missing", lambda _: answer)
    status, sentence = scripted.refused(scripted.path)
    assert status == 69 and "is this a Cachix Deploy workspace?" in sentence
    assert not scripted.puts


def test_an_old_workspace(scripted):
    for body in (b"<html></html>", {"error": "GET /api/v1/deploy/cache: not found"}):
        scripted.workspace.answer("GET /api/v1/deploy/cache", lambda _, body=body: (404, body))
        assert "is it an older workspace?" in scripted.refused(scripted.path)[1]


@pytest.mark.parametrize("kind", ["503", "429", "reset"])
@pytest.mark.long
def test_an_upload_is_tried_three_times(scripted, kind):
    tries = {}

    def put(request):
        if request.path.endswith(".narinfo"):
            return scripted.take(request)
        tries[request.path] = tries.get(request.path, 0) + 1
        if tries[request.path] < least:
            return int(kind), {"error": "not now"}
        return scripted.take(request)

    if kind == "reset":
        scripted.workspace.misbehave("/cache/main/nar/", "reset", 1)
        scripted.push(scripted.path)
        return
    scripted.workspace.answer("PUT /cache/", put)
    least = 3
    assert scripted.push(scripted.path).startswith("pushed 3 paths ")
    tries.clear()
    least = 4
    status, sentence = scripted.refused(scripted.path)
    assert status == 1 and f"answered HTTP {kind}: not now" in sentence
    assert max(tries.values()) == 3


def test_no_token_goes_where_a_redirect_points(scripted):
    scripted.workspace.answer("PUT /cache/", lambda _: (302, {}))
    assert "which is not followed" in scripted.refused(scripted.path)[1]


# --- deployments ----------------------------------------------------------------------------------


def connected(machine, workspace, name, upstream):
    """Let a machine trust an upstream, and start its agent."""
    with open(machine.directory / "etc/nix.conf", "a") as conf:
        conf.write(f"substituters = {upstream.url}\n")
        conf.write(f"trusted-public-keys = {upstream.key.public}\n")
    agent = machine.agent(name, workspace.url, workspace.token("agent"))
    agent.wait_for("is connected to")
    return machine


@pytest.mark.long
@pytest.mark.parametrize("private", [False, True])
def test_a_machine_runs_what_was_pushed(make_host, make_workspace, upstream, name, private):
    builder = Builder(make_host("builder"), make_workspace(private=private))
    base = closures.chain(builder.built, 10, name="base")
    builder.give(upstream)
    system = closures.nixos(builder.built, 1, extra={"base": Link(base)})
    spec = spec_of(builder, {name: system})
    builder.have(spec, system)
    machine = connected(make_host("machine"), builder.workspace, name, upstream)
    directory = link(builder, spec)
    result = builder.run("activate", "--push", "result", upstream=upstream.url, cwd=directory)
    assert result.returncode == 0, (result.stdout, result.stderr)
    assert re.match(r"pushed 5 paths .*, 11 are in 127.0.0.1:[0-9]+\n", result.stdout)
    assert machine.running() == system
    machine.output("nix-store", "--verify", "--check-contents")


def test_nothing_is_deployed_if_a_push_fails(builder, name):
    path = closures.plain(builder.built, 1)
    builder.have(path)
    nowhere = f"/nix/store/{'a' * 32}-nowhere"
    for arguments in ([f"{name}={path}", f"db={nowhere}"], [f"{name}={path}", "--cache=none"]):
        result = builder.run("activate", "--push", *arguments)
        assert result.returncode == 1 and result.stdout == "", result
    answer = builder.workspace.request("GET", "/api/v1/deploy/deployments")
    assert answer == (200, {"deployments": []})


def test_stdout_is_json_alone_for_programs(builder, make_host, upstream):
    path = closures.plain(builder.built, 1)
    builder.have(path)
    connected(make_host("machine"), builder.workspace, "web", upstream)
    result = builder.run("activate", "--push", "--json", f"web={path}")
    assert result.returncode == 0 and "pushed 3 paths " in result.stderr, result
    assert all(isinstance(json.loads(line), dict) for line in result.stdout.splitlines())


@pytest.mark.long
@pytest.mark.slow
def test_two_lines_on_a_machine_with_only_nix_and_the_program(
    builder, make_host, upstream, tmp_path
):
    """Two thousand paths, of which forty are own. The program is the file of `make pyz`."""
    pyz = tmp_path / "cachix-deploy"
    subprocess.run([sys.executable, str(PROJECT / "tools/pyz.py"), str(pyz)], check=True)
    base = closures.chain(builder.built, 1959, name="base")
    builder.give(upstream)
    own = [builder.built.add(f"own-{i}", f"{i} uses {base}\n") for i in range(39)]
    system = builder.built.add("system", "".join(f"{path}\n" for path in own))
    spec = spec_of(builder, {"web": system})
    builder.have(spec)
    machine = connected(make_host("machine"), builder.workspace, "web", upstream)
    variables = {**builder.environment(), "NIX_CONF_DIR": str(builder.host.directory / "etc")}
    words = [f"{name}={text}" for name, text in variables.items()]
    builder.program = ["env", "-i", "PATH=/usr/bin:/bin", "HOME=/tmp", *words]
    builder.program += ["/usr/bin/python3", "-I", str(pyz)]
    directory = link(builder, spec)
    result = builder.run("activate", "--push", "result", upstream=upstream.url, cwd=directory)
    assert result.returncode == 0, result.stderr
    assert re.match(r"pushed 40 paths .* 1,960 are in 127.0.0.1:[0-9]+\n", result.stdout)
    assert len(builder.pushed()) == 40 and machine.profile() == system


FLAKE = """{
  outputs = _: {
    packages.x86_64-linux.deploy =
      let
        build = name: script: derivation {
          inherit name;
          system = "x86_64-linux";
          builder = "/bin/sh";
          args = [ "-c" script ];
        };
        system = build "hello" "echo hello > $out";
      in
      build "deploy.json" "echo '{\\"agents\\": {\\"web\\": \\"${system}\\"}}' > $out";
  };
}
"""


@pytest.mark.long
@pytest.mark.skipif(platform.machine() != "x86_64", reason="the flake is for x86_64-linux")
@pytest.mark.parametrize("service", [blocks.github, blocks.gitlab])
def test_the_script_of_the_ci_page_deploys(builder, make_host, upstream, tmp_path, service):
    workspace = builder.workspace
    with urllib.request.urlopen(f"{workspace.url}/get/cachix-deploy.pyz.sha256") as answer:
        digest = answer.read().decode().split()[0]
    text = service(blocks.CiFacts(workspace.url, digest))
    script = re.sub("^ +", "", text[text.index("curl -fsS") :], flags=re.M)
    script = script.replace("/tmp/cachix-deploy", str(tmp_path / "cachix-deploy"))
    machine = connected(make_host("machine"), workspace, "web", upstream)
    (tmp_path / "flake.nix").write_text(FLAKE)
    assert f"CACHIX_HOST: {workspace.url}\n" in text
    argv = ["/bin/sh", "-euc", script]
    result = builder.host.run(argv, 100, builder.environment(), cwd=tmp_path)
    assert result.returncode == 0, (script, result.stdout, result.stderr)
    assert re.search("^pushed 1 path ", result.stdout, re.M)
    assert machine.path(machine.profile()).read_text() == "hello\n"
