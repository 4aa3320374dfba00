"""The files in contrib/ that start agent and workspace, and `make install`."""

from __future__ import annotations

import json
import os
import plistlib
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import PROJECT

from cachix_workspace.cli import usage

sys.path.append(str(PROJECT / "tools"))
from test_modules import workspace as evaluated

import contrib

CONTRIB = PROJECT / "contrib"
FILES = contrib.files()
WORKSPACE_UNIT = CONTRIB / "systemd" / "cachix-workspace.service"
UNITS = sorted(CONTRIB.glob("systemd/**/*.service"))
UNTRIED = ["docker/Dockerfile", "docker/compose.yaml", "openrc/cachix-deploy"]
UNTRIED += ["launchd/org.cachix-deploy.agent.plist"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_those_of_the_blocks(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == FILES[path], "run `make manuals`"


@pytest.mark.parametrize("name", UNTRIED)
def test_files_that_were_not_tried_say_so(name: str) -> None:
    assert "not tried" in (CONTRIB / name).read_text().partition("\n\n")[0]


# --- command lines --------------------------------------------------------------------------------


def fields(unit: str) -> dict[str, list[str]]:
    """The settings of a unit, by their names; those that are repeated come in order."""
    settings: dict[str, list[str]] = {}
    for name, value in re.findall(r"^(\w+)=(.*)", unit, flags=re.M):
        settings.setdefault(name, []).append(value)
    return settings


def agents_of() -> list[list[str]]:
    """The command lines by which files start an agent."""
    lines = [fields(path.read_text()).get("ExecStart", [""])[0] for path in UNITS]
    argvs = [shlex.split(line) for line in lines if "cachix-deploy agent" in line]
    argvs.append(plistlib.loads((CONTRIB / UNTRIED[3]).read_bytes())["ProgramArguments"])
    script = (CONTRIB / "openrc" / "cachix-deploy").read_text()
    words = dict(re.findall(r'^(command|command_args)="(.*)"', script, flags=re.M))
    argvs.append([words["command"], *words["command_args"].split()])
    line = re.search(r"^\* \* \* \* \*  (.*)", (CONTRIB / "cron/cachix-deploy").read_text(), re.M)
    assert line
    argvs.append(line[1].split())
    return argvs


def test_agents_are_started_as_the_usage_text_allows() -> None:
    import cachix_options

    argvs = agents_of()
    assert len(argvs) == 5
    for argv in argvs:
        options = cachix_options.parse(argv[1:])
        assert options["agent"] and options["NAME"] == "web", argv


def test_the_workspace_is_started_as_the_usage_text_allows() -> None:
    yaml = pytest.importorskip("yaml")
    compose = yaml.safe_load((CONTRIB / "docker" / "compose.yaml").read_text())
    dockerfile = (CONTRIB / "docker" / "Dockerfile").read_text()
    entry, default = (
        json.loads(text) for text in re.findall(r"^(?:ENTRYPOINT|CMD) (.*)", dockerfile, re.M)
    )
    assert entry == ["cachix-workspace"]
    line = fields(WORKSPACE_UNIT.read_text())["ExecStart"][0]
    for argv in (compose["services"]["workspace"]["command"], default, shlex.split(line)[1:]):
        assert usage.parse(argv)["serve"]
    assert set(compose["services"]["caddy"]["depends_on"]) < set(compose["services"])


def test_ci_is_yaml() -> None:
    yaml = pytest.importorskip("yaml")
    for name in ("github", "gitlab"):
        text = yaml.safe_load((CONTRIB / "ci" / f"{name}.yml").read_text())
        assert "cachix-deploy activate" in str(text)


def test_the_script_of_openrc_is_shell() -> None:
    subprocess.run(["sh", "-n", str(CONTRIB / "openrc" / "cachix-deploy")], check=True)


# --- systemd --------------------------------------------------------------------------------------


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="needs systemd-analyze")
@pytest.mark.parametrize("path", UNITS, ids=lambda path: str(path.relative_to(CONTRIB)))
def test_units_are_right(path: Path, tmp_path: Path) -> None:
    file = tmp_path / path.name
    file.write_text(re.sub(r"ExecStart=\S+", "ExecStart=/bin/true", path.read_text()))
    kind = ["--user"] if path.parent.name == "user" else []
    argv = ["systemd-analyze", *kind, "verify", "--man=no", str(file)]
    environment = {**os.environ, "XDG_RUNTIME_DIR": str(tmp_path)}
    result = subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=60)
    assert (result.returncode, result.stdout) == (0, ""), result
    assert path.name not in result.stderr, result.stderr


def test_the_unit_of_the_workspace_is_that_of_the_module() -> None:
    """Also what it may not do; the user and the addresses are this file's own."""
    ours = fields(WORKSPACE_UNIT.read_text())
    module = fields(evaluated("").units["cachix-workspace"])
    own = {"ExecStart", "User", "DynamicUser", "Environment", "Description", "UMask"}
    own |= {"SystemCallFilter", "LimitNOFILE", "WantedBy", "After", "Wants"}
    yes = {"true": "yes", "false": "no"}
    theirs = {
        name: [yes.get(value, value) for value in values]
        for name, values in module.items()
        if name not in own
    }
    for name, values in theirs.items():
        assert " ".join(ours[name]).split() == " ".join(values).split(), name
    assert {name for name in ours if name not in own} <= set(theirs)


# --- make install ---------------------------------------------------------------------------------


@pytest.mark.slow
def test_install(tmp_path: Path) -> None:
    argv = ["make", "-o", ".make/venv", "install", "PREFIX=/opt/tools", f"DESTDIR={tmp_path}"]
    subprocess.run(argv, cwd=PROJECT, check=True, capture_output=True, timeout=110)
    place = tmp_path / "opt" / "tools"
    program = place / "bin" / "cachix-deploy"
    argv = [sys.executable, str(program), "--version"]
    assert subprocess.run(argv, capture_output=True, text=True, check=True).stdout
    share = place / "share"
    for name in (
        "man/man1/cachix-deploy.1",
        "bash-completion/completions/cachix-deploy",
        "zsh/site-functions/_cachix-deploy",
        "fish/vendor_completions.d/cachix-deploy.fish",
    ):
        assert (share / name).is_file(), name
    unit = (share / "cachix-deploy" / "systemd" / "cachix-deploy.service").read_text()
    assert "ExecStart=/opt/tools/bin/cachix-deploy agent" in unit
    assert not list(place.rglob("*.orig"))
