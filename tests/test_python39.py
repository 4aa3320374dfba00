"""The agent's side on Python 3.9, the oldest that it is promised to run on.

The interpreter is Debian bullseye's, unpacked below build/python3.9 without being installed. These
tests are skipped if it can't be had.
"""

from __future__ import annotations

import contextlib
import fcntl
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Callable

import pytest
from builders import Builder
from closures import plain
from containers import Missing, mirror
from hosts import PROJECT, Host
from live import Workspace
from packaging.specifiers import SpecifierSet
from pins import pins

pytestmark = pytest.mark.long

DIRECTORY = PROJECT / "build" / "python3.9"
DEBS = "python3.9-minimal libpython3.9-minimal libpython3.9-stdlib libssl1.1 libffi7 libmpdec3"
# What the pure tests need besides the agent's dependencies, and what that needs.
WHEELS = (
    "pytest exceptiongroup iniconfig packaging pluggy pygments tomli pytest-timeout"
    " hypothesis attrs sortedcontainers cryptography cffi pycparser typing-extensions"
)
PURE = ("test_decisions.py", "test_nix.py", "test_process.py")
MODULES = [
    ".".join(path.relative_to(PROJECT).with_suffix("").parts)
    for path in [*PROJECT.glob("cachix_*.py"), *PROJECT.glob("activate/**/*.py")]
    if path.name != "__init__.py"
]


@dataclass(frozen=True)
class Python:
    """An interpreter, and the environment that it needs."""

    path: str
    env: dict[str, str] = field(default_factory=dict)

    def run(self, *args: object, **env: str) -> subprocess.CompletedProcess[str]:
        argv = [self.path, *map(str, args)]
        env = {**os.environ, **self.env, **env}
        return subprocess.run(argv, env=env, capture_output=True, text=True, timeout=100, cwd="/")


@contextlib.contextmanager
def made_once(directory: Path) -> Iterator[None]:
    """Hold a lock while a directory below build/ is made, as other processes may want it too."""
    directory.parent.mkdir(parents=True, exist_ok=True)
    with open(f"{directory}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def call(argv: list[str], why: str, **kw: Any) -> None:
    """Run a command that downloads something. Raises Missing with the end of its output."""
    try:
        result = subprocess.run(
            argv, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=100, **kw
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Missing(f"{why}: {error}") from None
    if result.returncode != 0:
        raise Missing(f"{why}: {result.stdout.strip()[-300:]}")


def unpack_python(root: Path) -> None:
    """Unpack bullseye's packages by an apt-get that knows nothing of this machine's own state."""
    why = "tests on Python 3.9 need Debian bullseye's packages"
    site, _ = mirror()
    if not site:
        raise Missing(f"{why}, and apt is set up for no mirror of Debian here")
    apt = root / "apt"
    (apt / "lists/partial").mkdir(parents=True)
    (apt / "status").touch()
    keyring = "/usr/share/keyrings/debian-archive-keyring.gpg"
    (apt / "sources.list").write_text(f"deb [signed-by={keyring}] {site} bullseye main\n")
    settings = {
        "Dir::Etc::SourceList": apt / "sources.list",
        "Dir::Etc::SourceParts": "/dev/null",
        "Dir::State": apt,
        "Dir::State::status": apt / "status",
        "Dir::Cache": apt,
        "APT::Sandbox::User": "root",
        "Acquire::http::Timeout": 10,
    }
    options = [word for name, value in settings.items() for word in ("-o", f"{name}={value}")]
    env = {**os.environ, "TMPDIR": str(apt)}
    call(["apt-get", *options, "update"], why, env=env)
    call(["apt-get", *options, "download", *DEBS.split()], why, env=env, cwd=apt)
    for package in apt.glob("*.deb"):
        call(["dpkg", "-x", str(package), str(root)], why)
    shutil.rmtree(apt)


def unpack_wheels(root: Path) -> None:
    """Unpack what the pure tests need for Python 3.9."""
    why = "the pure tests on Python 3.9 need pytest for it"
    version = "3.9.2"  # bullseye's: some packages run on no earlier one
    lines = [pin.line for name, pin in pins("tests.txt", version).items() if name in WHEELS.split()]
    (root / "wheels.txt").write_text("\n".join(lines))
    argv = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", str(root / "wheels")]
    argv += ["--python-version", version, "--implementation", "cp", "--only-binary", ":all:"]
    call([*argv, "--no-deps", "--require-hashes", "-r", str(root / "wheels.txt")], why)
    for wheel in (root / "wheels").glob("*.whl"):
        zipfile.ZipFile(wheel).extractall(root)
    shutil.rmtree(root / "wheels")


def provide(directory: Path, make: Any) -> Path:
    """Return a directory below build/, made if it is missing. Skips the test if it can't be had."""
    with made_once(directory):
        if not directory.is_dir():
            unfinished = directory.with_name(f"{directory.name}.new")
            shutil.rmtree(unfinished, ignore_errors=True)
            unfinished.mkdir()
            try:
                make(unfinished)
            except Missing as missing:
                pytest.skip(str(missing))
            unfinished.rename(directory)
    return directory


@pytest.fixture(scope="session")
def python39() -> Python:
    """Python 3.9: the machine's own, or Debian bullseye's."""
    probe = ("-c", "import ctypes, ssl, sys; print(sys.executable)")
    own = Python(shutil.which("python3.9") or "false").run(*probe)
    if own.returncode == 0:
        return Python(own.stdout.strip())
    root = provide(DIRECTORY, unpack_python)
    libraries = [str(path) for path in root.glob("usr/lib/*-linux-gnu*")]
    python = Python(f"{root}/usr/bin/python3.9", {"LD_LIBRARY_PATH": ":".join(libraries)})
    result = python.run(*probe)
    if result.returncode != 0:
        pytest.skip(f"Debian bullseye's Python 3.9 does not run here: {result.stderr[-300:]}")
    return python


@pytest.fixture(scope="session")
def pyz(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The agent in one file, as `make pyz` builds it."""
    path = tmp_path_factory.mktemp("pyz") / "cachix-deploy.pyz"
    subprocess.run([sys.executable, str(PROJECT / "tools/pyz.py"), str(path)], check=True)
    return path


@pytest.mark.parametrize("package", pins("agent.txt"))
def test_the_pyz_holds_packages_for_python_3_9(package: str) -> None:
    requires = importlib.metadata.metadata(package)["Requires-Python"] or ""
    assert "3.9.0" in SpecifierSet(requires), "requirements-agent.txt is for all Pythons"


def test_every_module_of_the_agent_can_be_imported(python39: Python, pyz: Path) -> None:
    code = "import importlib, sys; [importlib.import_module(name) for name in sys.argv[1:]]"
    result = python39.run("-c", code, *MODULES, PYTHONPATH=str(pyz))
    assert (result.returncode, result.stderr) == (0, "")


def test_help_and_wrong_usage_of_the_pyz(python39: Python, pyz: Path) -> None:
    result = python39.run(pyz, "--help")
    assert result.returncode == 0 and "Usage:" in result.stdout
    result = python39.run(pyz, "frobnicate")
    assert result.returncode == 64 and result.stderr.startswith("error: ")


@pytest.mark.parametrize("version", ["this", "3.9"])
def test_the_pyz_deploys(
    request: pytest.FixtureRequest, host: Host, live: Workspace, name: str, pyz: Path, version: str
) -> None:
    python = Python(sys.executable) if version == "this" else request.getfixturevalue("python39")
    argv = [python.path, str(pyz), "--host", live.url, "agent", name, f"{name}-profile"]
    agent = host.start("agent", argv, {"CACHIX_AGENT_TOKEN": live.token("agent"), **python.env})
    agent.wait_for("is connected to")
    path = plain(live.files, name)
    live.push(path)
    deployment = live.deploy(name, path)
    assert live.wait(deployment) == "Succeeded", live.text(deployment)
    assert host.profile(f"/nix/var/nix/profiles/{name}-profile") == path
    assert agent.stop() == 0


@pytest.mark.parametrize("version", ["this", "3.9"])
def test_the_pyz_pushes(
    request: pytest.FixtureRequest,
    host: Host,
    make_workspace: Callable[..., Workspace],
    pyz: Path,
    version: str,
) -> None:
    python = Python(sys.executable) if version == "this" else request.getfixturevalue("python39")
    builder = Builder(host, make_workspace())
    variables = [f"{name}={text}" for name, text in python.env.items()]
    builder.program = ["env", *variables, python.path, str(pyz)]
    path = plain(builder.built, "pushed")
    builder.have(path)
    assert builder.push(path).startswith("pushed 3 paths ")
    assert builder.push(path).startswith("pushed 0 paths ")


@pytest.mark.timeout(300)
def test_the_pure_tests_pass(python39: Python, tmp_path: Path) -> None:
    site = provide(DIRECTORY.with_name("python3.9-site"), unpack_wheels)
    own = Path(importlib.metadata.distribution("requests").locate_file(""))
    options = ["-q", "-p", "no:cacheprovider", "-p", "pytest_timeout"]
    options += [f"--basetemp={tmp_path}/tests"]
    tests = [PROJECT / "tests" / name for name in PURE]
    path = f"{PROJECT}:{site}:{own}"  # with plugins in it that need a newer Python
    env = {"PYTHONPATH": path, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    result = python39.run("-m", "pytest", *options, *tests, **env)
    assert result.returncode == 0, result.stdout + result.stderr
    assert re.search(r"\d+ passed", result.stdout)
