"""The documents: what README.rst shows of Nix is evaluated, and what the others name exists."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hosts import PROJECT
from nixmodules import evaluate

import cachix_options
from cachix_workspace.cli import usage as workspace_usage

sys.path.append(str(PROJECT / "tools"))
import options

README = (PROJECT / "README.rst").read_text()
DOCUMENTS = sorted([PROJECT / "README.rst", *(PROJECT / "docs").glob("*.rst")])
NIX = dict(
    re.findall(r"^\.\. code-block:: nix\n    :name: ([\w-]+)\n\n((?:    .*\n|\n)+)", README, re.M)
)


def test_the_readme_is_short() -> None:
    assert len(README.splitlines()) <= 250


@pytest.mark.parametrize("name", NIX)
def test_nix_is_parsed(name: str, tmp_path: Path) -> None:
    file = tmp_path / "block.nix"
    file.write_text(NIX[name])
    subprocess.run(["nix-instantiate", "--parse", str(file)], check=True, timeout=60)


def test_a_machine_with_the_blocks_of_the_readme() -> None:
    workspace = evaluate("nixos", NIX["nixos"].strip()[1:-1])
    assert workspace.failed == [] and workspace.ports == [80, 443]
    assert list(workspace.units) == ["cachix-workspace"] and workspace.nginx
    (module,) = re.findall(r"^ +\{ (services\.cachix-deploy = .*) \}$", NIX["flake"], re.M)
    agent = evaluate("nixos", 'networking.hostName = "web";', module)
    assert agent.failed == [] and agent.argv[-2:] == ["agent", "web"]
    document = (PROJECT / "docs" / "agent.rst").read_text()
    [(_, block)] = re.findall(r"code-block:: (nix)\n\n((?:    .*\n|\n)+)", document)
    user = evaluate("home-manager", block.strip()[1:-1])
    assert user.failed == [] and "alice-laptop" in user.argv


@pytest.mark.parametrize("path", DOCUMENTS, ids=lambda path: path.name)
def test_files_that_documents_name_exist(path: Path) -> None:
    names = re.findall(
        r"(?:``|image:: )((?:docs|contrib|nix|tests|tools)/[\w./-]+)", path.read_text()
    )
    assert [name for name in names if not (PROJECT / name).exists()] == []


COMMANDS = [
    (path.name, line.strip())
    for path in DOCUMENTS
    for line in path.read_text().splitlines()
    if re.match(r" {4}(?:cachix-deploy|cachix-workspace) ", line)
]


@pytest.mark.parametrize(("document", "line"), COMMANDS)
def test_command_lines_are_ones_that_the_programs_take(document: str, line: str) -> None:
    program, *words = shlex.split(re.sub(r"\$\([^)]*\)", "output", line))
    if program == "cachix-workspace":
        workspace_usage.parse(words)
    else:
        cachix_options.parse(words)


@pytest.mark.skipif(bool(os.environ.get("NIXPKGS_LIB")), reason="its types have other names")
def test_the_options_are_those_of_the_modules() -> None:
    assert options.TARGET.read_text(encoding="utf-8") == options.text(), "run `make manuals`"


def test_the_template_deploys_by_two_lines() -> None:
    yaml = pytest.importorskip("yaml", reason="its pin is for Python 3.10 and newer")
    template = PROJECT / "nix" / "template"
    workflow = yaml.safe_load((template / ".github/workflows/deploy.yml").read_text())
    job = workflow["jobs"]["deploy"]
    lines = [step["run"] for step in job["steps"] if "run" in step]
    program = "nix run .#cachix-deploy --"
    assert lines == ["nix build .#deploy", f"{program} activate --push result"]
    assert "nix build .#deploy\n    cachix-deploy activate --push result\n" in README
    names = re.search(r"They need three variables: (.*?)\. ``result``", README, re.S)
    assert names and sorted(job["env"]) == sorted(re.findall(r"``(\w+)``", names[1]))
    assert "packages.x86_64-linux.cachix-deploy =" in (template / "flake.nix").read_text()
