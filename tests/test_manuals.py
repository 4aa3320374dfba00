"""The completions and man pages: made from the usage texts, and read by shells and man."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parent.parent / "tools"))
import manuals

FILES = manuals.files()
COMPLETIONS = manuals.ROOT / "contrib" / "completions"
# The words before the cursor, and some words that are offered, in bash and in fish.
COMPLETED = [
    ("cachix-deploy ", {"agent", "activate", "--host="}, {"--batch="}),
    ("cachix-deploy act", {"activate"}, {"agent"}),
    ("cachix-deploy activate --ba", {"--batch="}, {"--bootstrap"}),
    ("cachix-deploy deploy agent --if", {"--if-stopped"}, set()),
    ("cachix-deploy activate --offline=", {"wait", "skip", "fail"}, {"--batch="}),
    ("cachix-deploy key ", {"create"}, {"agent"}),
    ("cachix-workspace token ", {"create", "list", "rotate", "revoke"}, {"serve"}),
    ("cachix-workspace token create ", {"agent", "activate", "admin", "metrics"}, {"list"}),
    ("cachix-workspace token create admin --ex", {"--expires="}, set()),
    ("cachix-workspace person add anna --role=", {"viewer", "operator", "admin"}, set()),
    ("cachix-workspace cache key ", {"rotate", "retire"}, {"show"}),
]
LIST = """
. "$0"; COMP_WORDS=(); line=$1; IFS=$' '
for word in ${line//=/ = }; do COMP_WORDS+=("$word"); done
[[ $line == *" " ]] && COMP_WORDS+=("")
compopt() { :; }
COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); IFS=$' \\t\\n'
_${COMP_WORDS[0]//-/_}; printf '%s\\n' "${COMPREPLY[@]}"
"""


def need(program: str) -> None:
    if shutil.which(program) is None:
        pytest.skip(f"no {program} here: `make test` installs it as root on Debian")


def run(*argv: str) -> str:
    result = subprocess.run(argv, capture_output=True, text=True, timeout=60, check=False)
    assert (result.returncode, result.stderr) == (0, "")
    return result.stdout


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_files_are_those_of_the_usage_texts(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == FILES[path], "run `make manuals`"


@pytest.mark.parametrize(("line", "offered", "others"), COMPLETED)
def test_bash_completes(line: str, offered: set[str], others: set[str]) -> None:
    file = COMPLETIONS / f"{line.split()[0]}.bash"
    words = set(run("bash", "-c", LIST, str(file), line).split("\n"))
    assert offered <= words and not words & others


def test_bash_completes_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "deploy.json").touch()
    (tmp_path / "directory").mkdir()
    monkeypatch.chdir(tmp_path)
    file = str(COMPLETIONS / "cachix-deploy.bash")
    assert "deploy.json\n" in run("bash", "-c", LIST, file, "cachix-deploy activate dep")
    assert run("bash", "-c", LIST, file, "cachix-deploy agent --token-file=dep") == "deploy.json\n"
    file = str(COMPLETIONS / "cachix-workspace.bash")
    assert run("bash", "-c", LIST, file, "cachix-workspace serve --data=d") == "directory\n"


@pytest.mark.parametrize(("line", "offered", "others"), COMPLETED)
def test_fish_completes(line: str, offered: set[str], others: set[str]) -> None:
    need("fish")
    file = COMPLETIONS / f"{line.split()[0]}.fish"
    asks_for_options = f"{line}--" if line.endswith(" ") else line
    lists = [
        run("fish", "--no-config", "-c", f"source {file}; complete -C '{one}'")
        for one in (line, asks_for_options)
    ]
    lines = [word.partition("\t")[0] for text in lists for word in text.split("\n")]
    words = {word.rpartition("=")[2] for word in lines}
    names = {word.rstrip("=") for word in lines}
    names = {word.partition("\t")[0].rstrip("=") for text in lists for word in text.split("\n")}
    wanted = {word.rstrip("=") for word in offered}
    assert wanted <= words | names and not names & {word.rstrip("=") for word in others}


@pytest.mark.parametrize("name", ["_cachix-deploy", "_cachix-workspace"])
def test_zsh_reads_its_file(name: str) -> None:
    need("zsh")
    run("zsh", "-n", str(COMPLETIONS / name))


@pytest.mark.parametrize("name", ["cachix-deploy", "cachix-workspace"])
def test_man_reads_its_page(name: str) -> None:
    need("groff")
    text = run("groff", "-ww", "-man", "-Tascii", "-P-cbou", f"{manuals.ROOT}/contrib/man/{name}.1")
    program = next(
        manuals.read(name, usage)
        for usage in (manuals.cachix_options.USAGE, manuals.usage.USAGE)
        if f"  {name} " in usage
    )
    for option in program.options:
        assert option in text
    for title in ("SYNOPSIS", "COMMANDS", "OPTIONS", "EXIT STATUS"):
        assert f"\n{title}\n" in text
