"""The program in one file: it runs on when the file is replaced, and however Python is started."""

import importlib.metadata
import marshal
import os
import random
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import closures
import pytest
from clones import project_files
from hosts import PROJECT, wait_until
from pins import pins

from cachix_unguessed import GUESSERS

REPLACED = {
    "cp": ["cp", "NEW", "OLD"],  # the same inode with other content
    "install": ["install", "NEW", "OLD"],
    "mv": ["mv", "NEW", "OLD"],
    "rm": ["rm", "OLD"],
    "truncate": ["truncate", "--size=0", "OLD"],  # a copy that a full disk has stopped
}


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """The file that `make pyz` builds."""
    path = tmp_path_factory.mktemp("pyz") / "cachix-deploy.pyz"
    subprocess.run([sys.executable, str(PROJECT / "tools/pyz.py"), str(path)], check=True)
    return path


def another_environment(directory):
    """Make an environment with the same dependencies that starts otherwise; return its Python."""
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(directory)], check=True)
    site = next(directory.glob("lib/python*/site-packages"))
    for name in pins("agent.txt"):
        distribution = importlib.metadata.distribution(name)
        for path in distribution.files:
            if ".." not in path.parts and path.suffix != ".pyc":
                (site / path).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path.locate(), site / path)
    words = sorted(set(re.findall(r"\w+", (PROJECT / "cachix_dial.py").read_text())))
    (site / "sitecustomize.py").write_text(f"import sys; sys.kept = [*map(sys.intern, {words})]")
    return str(directory / "bin/python")


def another_clone(directory):
    """Copy the project's files in any order, dated to any time; with leftovers beside them."""
    names = project_files()
    random.shuffle(names)
    for name in names:
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(PROJECT / name, directory / name)
        os.utime(directory / name, (0, random.randrange(1 << 31)))
    (directory / "activate/__pycache__").mkdir()
    (directory / "activate/__pycache__/nix.cpython-311.pyc").write_bytes(b"stale")
    (directory / "activate/nix.pyc").write_bytes(b"stale")
    (directory / "activate/.nix.py.swp").write_bytes(b"an editor's")


def test_every_build_gives_the_same_bytes(built, tmp_path):
    clone, target = tmp_path / "caf\u00e9 of another", tmp_path / "other.pyz"
    another_clone(clone)
    python = another_environment(tmp_path / "environment")
    for place in ("temporary", "caches"):
        (tmp_path / place).mkdir()
    environment = {
        "PATH": os.environ["PATH"],
        "PYTHONHASHSEED": "7",
        "PYTHONPYCACHEPREFIX": str(tmp_path / "caches"),
        "SOURCE_DATE_EPOCH": "1234567890",
        "TMPDIR": str(tmp_path / "temporary"),
        "TZ": "Asia/Tokyo",
    }
    command = ["sh", "-c", 'umask 077; exec "$@"', "sh", python, "-O", clone / "tools/pyz.py"]
    subprocess.run([*command, target], check=True, env=environment, cwd=tmp_path)
    assert target.read_bytes() == built.read_bytes()
    assert target.stat().st_mode == built.stat().st_mode


def test_it_is_built_of_what_is_pinned_only(tmp_path):
    python = another_environment(tmp_path / "environment")
    (metadata,) = tmp_path.glob("environment/lib/python*/site-packages/idna-*/METADATA")
    pinned = pins("agent.txt")["idna"].version
    metadata.write_text(metadata.read_text().replace(f"Version: {pinned}", "Version: 1.0", 1))
    build = [python, PROJECT / "tools/pyz.py", tmp_path / "new.pyz"]
    result = subprocess.run(build, capture_output=True, text=True)
    problem = (
        f"error: idna is 1.0 here, and requirements-agent.txt has {pinned}: run `make clean`, "
    )
    assert (result.returncode, result.stderr) == (1, f"{problem}then `make setup`\n")
    shutil.rmtree(metadata.parent)
    result = subprocess.run(build, capture_output=True, text=True)
    assert result.returncode == 1 and result.stderr.startswith("error: idna is missing here, ")
    assert not (tmp_path / "new.pyz").exists()


def test_all_that_is_pinned_is_in_it(built):
    with zipfile.ZipFile(built) as archive:
        parts = {name.partition("/")[0].removesuffix(".py") for name in archive.namelist()}
    names = {name.replace("-", "_") for name in pins("agent.txt")}
    assert parts >= names - {"websocket_client", *GUESSERS} | {"websocket"}
    assert not parts & {*GUESSERS}


def test_no_path_of_the_build_is_in_the_file(built):
    with zipfile.ZipFile(built) as archive:
        codes = {name: archive.read(name) for name in archive.namelist() if name[-4:] == ".pyc"}
        files = {Path(name).suffix for name in archive.namelist()}
    assert codes and files == {".py", ".pyc", ".pem"}
    for name, code in codes.items():
        assert marshal.loads(code[16:]).co_filename == name[:-1]
        assert str(PROJECT).encode() not in code and sys.prefix.encode() not in code


class Installed:
    """A copy of the file, and the next release beside it: the same with other offsets."""

    def __init__(self, built, directory):
        self.path, self.new = directory / "installed.pyz", directory / "new.pyz"
        shutil.copy(built, self.path)
        with zipfile.ZipFile(built) as source, zipfile.ZipFile(self.new, "w") as target:
            target.writestr("first", os.urandom(50000))
            for name in sorted(source.namelist(), reverse=True):
                target.writestr(name, source.read(name))

    def replace(self, how):
        words = {"NEW": str(self.new), "OLD": str(self.path)}
        subprocess.run([words.get(word, word) for word in REPLACED[how]], check=True)


@pytest.fixture
def installed(built, tmp_path):
    return Installed(built, tmp_path)


@pytest.fixture
def start(host, live, name):
    """Start an agent from a pyz: `start(path, flags of Python, environment)`."""

    def start(path, flags=(), env=None, words=()):
        number = len(list(host.directory.glob("agent-*.out")))
        argv = [sys.executable, *flags, str(path), f"--host={live.url}", "agent", name, *words]
        variables = {"CACHIX_AGENT_TOKEN": live.token("agent"), **(env or {})}
        agent = host.start(f"agent-{number}", argv, variables)
        agent.wait_for("is connected to")
        return agent

    return start


@pytest.mark.promise(8)
@pytest.mark.parametrize("how", list(REPLACED))
@pytest.mark.parametrize("when", ["at-first", "later"])
def test_the_file_is_replaced_while_the_agent_runs(host, live, name, installed, start, how, when):
    agent = start(installed.path)
    if when == "later":
        path = closures.plain(live.files, f"{name}-1")
        live.push(path)
        assert live.wait(live.deploy(name, path)) == "Succeeded"
    installed.replace(how)
    path = closures.plain(live.files, f"{name}-2")
    live.push(path)
    deployment = live.deploy(name, path)
    assert live.wait(deployment, 30) == "Succeeded", (live.deployment(deployment), agent.text())
    assert agent.stop() == 0 and "Traceback" not in agent.text()


@pytest.mark.promise(8)
def test_the_file_is_replaced_while_an_agent_that_cron_started_runs(
    host, live, name, installed, start
):
    """It has looked for another agent before it made its copy, and loads all from that since."""
    agent = start(installed.path, ("-v",), words=("--if-stopped",))
    loaded = re.findall(r"^import 'activate\.nix' # .*", agent.text(), re.M)
    assert len(loaded) == 1 and "/proc/self/fd/" in loaded[0]
    installed.replace("cp")
    path = closures.plain(live.files, name)
    live.push(path)
    assert live.wait(live.deploy(name, path), 30) == "Succeeded"
    assert agent.stop() == 0


@pytest.mark.promise(8)
@pytest.mark.parametrize("how", ["cp", "mv"])
def test_the_file_is_replaced_and_the_agent_too_in_mid_deployment(
    host, live, name, installed, start, how
):
    agent = start(installed.path)
    wait = f"touch /run/at; {closures.wait_for('/run/go')}"
    system = closures.nixos(live.files, name, after=wait)
    live.push(system)
    deployment = live.deploy(name, system)
    wait_until(host.path("/run/at").exists)
    installed.replace(how)
    agent.kill()  # the switch process has yet to load what a look at the workspace needs
    start(installed.path)
    host.path("/run/go").touch()
    assert live.wait(deployment) == "Succeeded" and host.running() == system


def test_the_file_is_replaced_while_activate_waits(host, live, name, installed, start, tmp_path):
    start(installed.path)
    system = closures.nixos(live.files, name, after=closures.wait_for("/run/go"))
    live.push(system)
    spec = tmp_path / "deploy.json"
    spec.write_text(f'{{"agents": {{"{name}": "{system}"}}}}')
    argv = [sys.executable, str(installed.path), "--host", live.url, "activate", str(spec)]
    command = host.start("activate", argv, {"CACHIX_ACTIVATE_TOKEN": live.token("activate")})
    command.wait_for(r"\$ .*switch-to-configuration test")
    installed.replace("cp")
    host.path("/run/go").touch()
    assert command.wait() == 0, command.text()


FLAGS = {
    "plain": ((), {}),
    "isolated": (("-I",), {"PYTHONHOME": "/nonexistent", "PYTHONPATH": "/nonexistent"}),
    "environment-ignored": (("-E", "-s"), {"PYTHONHOME": "/nonexistent"}),
    "no-site": (("-S",), {}),
    "optimized": (("-OO", "-B"), {}),
    "optimize": ((), {"PYTHONOPTIMIZE": "2"}),
    "inspect": ((), {"PYTHONINSPECT": "1"}),
    "warnings-are-errors": ((), {"PYTHONWARNINGS": "error"}),
    "home": ((), {"PYTHONHOME": f"{sys.base_prefix}:{sys.base_exec_prefix}"}),
    "home-and-inspect": ((), {"PYTHONHOME": sys.base_prefix, "PYTHONINSPECT": "1"}),
    "ascii": (
        ("-X", "utf8=0"),
        {"LC_ALL": "C", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii"},
    ),
    "latin": ((), {"LC_ALL": "en_US.ISO-8859-1", "LANG": "xx_YY.nonsense"}),
    "development": (("-X", "dev"), {"PYTHONSTARTUP": "/nonexistent", "PYTHONSAFEPATH": "1"}),
    "cache-elsewhere": ((), {"PYTHONPYCACHEPREFIX": "/dev/null/caches"}),
}


@pytest.mark.parametrize("which", list(FLAGS))
def test_however_python_is_started(host, live, name, built, tmp_path, start, which):
    """A system succeeds and one that fails is rolled back; the agent ends with status 0."""
    directory = tmp_path / "caf\u00e9 d'\u00e9t\u00e9"
    directory.mkdir()
    program = shutil.copy(built, directory)
    agent = start(program, *FLAGS[which])
    good = closures.nixos(live.files, f"{name}-1", after="printf 'caf\\303\\251 \\377\\n'")
    bad = closures.nixos(live.files, f"{name}-2", after="exit 1")
    live.push(good, bad)
    assert live.wait(live.deploy(name, good)) == "Succeeded", agent.text()
    deployment = live.deploy(name, bad)
    assert live.wait(deployment) == "Failed" and host.step(deployment) == "rolled-back"
    assert agent.stop() == 0 and "Traceback" not in agent.text(), agent.text()


def test_from_a_source_tree(host, live, name):
    """`python cachix_deploy.py` and `python -m cachix_deploy`, in any working directory."""
    for words in ([str(PROJECT / "cachix_deploy.py")], ["-m", "cachix_deploy"]):
        argv = [sys.executable, *words, "--host", live.url, "agent", name]
        variables = {"CACHIX_AGENT_TOKEN": live.token("agent"), "PYTHONPATH": str(PROJECT)}
        agent = host.start(f"agent-{len(words)}", argv, variables)
        agent.wait_for("is connected to")
        path = closures.plain(live.files, f"{name}-{len(words)}")
        live.push(path)
        assert live.wait(live.deploy(name, path)) == "Succeeded"
        assert agent.stop() == 0


@pytest.mark.parametrize("closed", ["0", "0 1 2"])
def test_its_copy_is_none_of_the_standard_descriptors(host, live, name, built, closed):
    closing = " ".join(f"{number}>&-" for number in closed.split())
    program = [sys.executable, str(built), "--host", live.url, "agent", name]
    argv = ["sh", "-c", f'exec "$@" {closing}', "sh", *program]
    agent = host.popen(argv, {"CACHIX_AGENT_TOKEN": live.token("agent")})
    wait_until(lambda: name in live.cli("agent", "list"))
    links = {number: os.readlink(f"/proc/{agent.pid}/fd/{number}") for number in closed.split()}
    assert set(links.values()) == {os.devnull}
    path = closures.plain(live.files, name)
    live.push(path)
    assert live.wait(live.deploy(name, path)) == "Succeeded"
    agent.terminate()
    assert agent.wait(12) == 0
