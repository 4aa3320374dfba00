"""The packages of setup.cfg are pinned by requirements-*.txt: by hashes, for each Python."""

import configparser
import importlib.metadata
import re
import subprocess
import sys

import pytest
from clones import clone
from hosts import PROJECT
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name
from pins import pins

PYTHONS = ["3.9.2", "3.10.0", "3.11.0", "3.12.0", "3.13.0"]
FILES = ["build.txt", "agent.txt", "tests.txt"]
DIRECT = {"requests", "websocket-client", "docopt"}
# Which releases have a hole, and the newest of them. The pins of pytest for Python 3.9 have one.
HOLES = [
    ("cryptography", "<50", "49.0.0"),  # PKCS #7, chains of certificates, OpenSSL
    ("flask", "<3.1.3", "3.1.2"),  # CVE-2026-27205
    ("gunicorn", "<22", "21.2.0"),  # CVE-2024-1135 and CVE-2024-6827
    ("gunicorn", ">=25.2,<27", "26.2.0"),  # CVE-2026-134820 and CVE-2026-134821
    ("gunicorn", ">=25.2,<27", "25.3.0"),
    ("jinja2", "<3.1.6", "3.1.5"),  # CVE-2025-27516
    ("mako", "<1.3.12", "1.3.11"),  # CVE-2026-44307
    ("requests", "<2.32.4", "2.32.3"),  # CVE-2024-47081
    ("setuptools", "<78.1.1", "78.1.0"),  # CVE-2025-47273
    ("urllib3", "<2.6.3", "2.6.2"),  # CVE-2026-21441
    ("werkzeug", "<3.1.6", "3.1.5"),  # CVE-2026-27199
]
SETUP = configparser.ConfigParser()
SETUP.read(PROJECT / "setup.cfg")


def required(text):
    """The requirements in a value of setup.cfg."""
    return [Requirement(line) for line in text.splitlines() if line.strip()]


def all_required():
    """The requirements of the agent, of all extras, and of the build."""
    texts = [SETUP["options"]["install_requires"], *SETUP["options.extras_require"].values()]
    build = re.search(r'^requires = \["(.*)"\]$', (PROJECT / "pyproject.toml").read_text(), re.M)
    return [one for text in [*texts, build[1]] for one in required(text)]


def assert_pinned(requirements, chosen, python):
    for requirement in requirements:
        of_python = {"python_version": python.rpartition(".")[0], "python_full_version": python}
        if requirement.marker is None or requirement.marker.evaluate(of_python):
            pin = chosen[canonicalize_name(requirement.name)]
            assert pin.version in requirement.specifier, (python, pin, str(requirement))


@pytest.mark.parametrize("python", PYTHONS)
def test_each_direct_requirement_is_pinned(python):
    agent = required(SETUP["options"]["install_requires"])
    assert_pinned(agent, pins("agent.txt", python), python)
    assert_pinned(
        all_required(), {**pins("tests.txt", python), **pins("build.txt", python)}, python
    )


@pytest.mark.parametrize(("name", "releases", "newest"), HOLES)
def test_no_release_with_a_known_hole_is_pinned_or_allowed(name, releases, newest):
    for python in PYTHONS:
        pin = {**pins("tests.txt", python), **pins("build.txt", python)}[name]
        assert pin.version not in SpecifierSet(releases), python
    for requirement in all_required():
        assert requirement.name != name or newest not in requirement.specifier


def test_the_agent_requires_three_packages_and_these_only():
    assert {one.name for one in required(SETUP["options"]["install_requires"])} == DIRECT


def test_a_floor_of_what_others_need_is_in_requirements_only():
    """No extra names urllib3, Werkzeug and the like: we import all that the workspace names."""
    text = "".join(path.read_text() for path in PROJECT.glob("cachix_workspace/**/*.py"))
    for requirement in required(SETUP["options.extras_require"]["workspace"]):
        name = requirement.name.replace("-", "_")
        assert re.search(rf"^ *(import|from) {name}\b", text, re.M), name
    extras = [required(text) for text in SETUP["options.extras_require"].values()]
    assert {one.name for extra in extras for one in extra} & set(pins("agent.txt")) == set()


@pytest.mark.parametrize("file", FILES)
@pytest.mark.parametrize("python", PYTHONS)
def test_each_pin_has_hashes(file, python):
    chosen = pins(file, python)
    assert chosen and all(
        pin.hashes and all(re.fullmatch("sha256:[0-9a-f]{64}", one) for one in pin.hashes)
        for pin in chosen.values()
    )


@pytest.mark.parametrize("python", PYTHONS)
def test_the_tests_run_with_what_a_release_holds(python):
    tests = pins("tests.txt", python)
    assert {name: tests[name] for name in pins("agent.txt", python)} == pins("agent.txt", python)
    assert pins("agent.txt", python) == pins("agent.txt", PYTHONS[0])  # one file for all Pythons


def test_what_is_installed_here_is_pinned_and_needs_nothing_else():
    chosen = {**pins("tests.txt"), **pins("build.txt")}
    for name, pin in chosen.items():
        distribution = importlib.metadata.distribution(name)
        assert distribution.version == pin.version
        needs = [Requirement(text) for text in distribution.requires or []]
        names = {one.name for one in needs if not one.marker or one.marker.evaluate({"extra": ""})}
        assert {canonicalize_name(name) for name in names} <= set(chosen)


def test_make_installs_nothing_without_a_hash():
    recipe = re.search(r"^\.make/venv:.*\n((?:\t.*\n)+)", (PROJECT / "Makefile").read_text(), re.M)
    installs = re.findall(r"\$\(INSTALL\) (--[\w-]+)|pip install", recipe[1])
    assert installs == ["--require-hashes", "--require-hashes", "--no-deps"]


@pytest.mark.long
@pytest.mark.parametrize("file", ["build.txt", "tests.txt"])
def test_make_setup_refuses_a_package_with_another_hash(tmp_path, file):
    clone(tmp_path)
    path = tmp_path / f"requirements-{file}"
    path.write_text(re.sub("(--hash=sha256:)[0-9a-f]{8}", r"\g<1>00000000", path.read_text()))
    make = ["make", ".make/venv", f"PYTHON={sys.executable}"]
    result = subprocess.run(make, cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode != 0
    if "THESE PACKAGES DO NOT MATCH THE HASHES" not in result.stdout:
        assert "No matching distribution" in result.stdout, result.stdout
        pytest.skip("no package can be downloaded here")
