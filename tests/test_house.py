"""The rules of the house: who may import whom, and how long files, functions and lines may be."""

import ast
import configparser
import re
import subprocess
import sys
from graphlib import TopologicalSorter

import pytest
from hosts import PROJECT

# Each module, or each module of a package, and what it may import of ours: modules, and packages
# for all modules in them. Arrows point down only.
SHARED = "activate activate.kinds"
FLOOR = "cachix_connection cachix_console cachix_protocol"
MAY_IMPORT = {
    "cachix_deploy": f"cachix_ci cachix_other cachix_spec cachix_options cachix_reports {FLOOR}"
    " cachix_reported"
    " cachix_channels cachix_push cachix_status cachix_local cachix_program"
    " cachix_check"
    " cachix_inbox cachix_postdeploy cachix_textfile cachix_source cachix_repeats cachix_gate"
    " cachix_secret cachix_report_state"
    f" {SHARED} activate.agent",
    "cachix_entry": "cachix_deploy cachix_status activate.startup activate.environment"
    " activate.lock activate.agent.single",
    "cachix_check": f"cachix_cache cachix_options cachix_secret {FLOOR} {SHARED} activate.agent",
    "cachix_local": f"cachix_leader cachix_program cachix_options cachix_secret cachix_spec"
    f" cachix_cache {FLOOR} {SHARED} activate.agent",
    "cachix_leader": f"cachix_program cachix_proxy cachix_reported {FLOOR} {SHARED} activate.agent",
    "cachix_program": "",
    "cachix_status": f"{SHARED} activate.agent",
    "cachix_ci": f"cachix_follow cachix_order cachix_rollout cachix_show cachix_spec cachix_summary"
    f" cachix_options cachix_push {FLOOR}",
    "cachix_order": f"cachix_follow cachix_rollout cachix_spec cachix_diagnosis {FLOOR}"
    " cachix_options activate.text",
    "cachix_rollout": "cachix_protocol activate.text",
    "cachix_show": "cachix_follow cachix_summary cachix_console activate.text",
    "cachix_spec": "cachix_job cachix_options cachix_rollout cachix_signed cachix_console"
    " cachix_protocol",
    "cachix_summary": "cachix_follow cachix_console cachix_protocol activate.text",
    "cachix_push": "cachix_cache cachix_diagnosis cachix_follow cachix_line cachix_narinfo"
    f" cachix_options cachix_spec cachix_upload cachix_upstream {FLOOR} {SHARED}",
    "cachix_upload": f"cachix_follow cachix_line cachix_nar cachix_narinfo {FLOOR} activate.text",
    "cachix_upstream": f"cachix_line {FLOOR}",
    "cachix_line": f"cachix_diagnosis cachix_dial {FLOOR}",
    "cachix_nar": "cachix_errors",
    "cachix_narinfo": "cachix_cache cachix_ed25519 cachix_signed cachix_protocol activate.process"
    " activate.text",
    "cachix_job": "",
    "cachix_gate": "cachix_signed cachix_ed25519 cachix_protocol activate",
    "cachix_secret": "cachix_connection cachix_errors activate",
    "cachix_inbox": "cachix_protocol",
    "cachix_postdeploy": "cachix_protocol activate",
    "cachix_textfile": f"cachix_report_state cachix_repeats {FLOOR} activate activate.agent",
    "cachix_source": "cachix_cache cachix_connection cachix_protocol cachix_proxy activate"
    " activate.agent",
    "cachix_unguessed": "",
    "cachix_signed": "cachix_cache cachix_ed25519 cachix_protocol",
    "cachix_ed25519": "",
    "cachix_state": "cachix_protocol activate.text",
    "cachix_switch": f"cachix_orphan {FLOOR} {SHARED} activate.switch",
    "cachix_orphan": f"cachix_reports cachix_reported cachix_session {FLOOR} {SHARED}",
    "cachix_cache": "cachix_protocol",
    "cachix_plain": "cachix_console cachix_protocol",
    "cachix_options": f"cachix_cache cachix_plain cachix_signed {FLOOR} {SHARED}",
    "cachix_follow": f"cachix_state cachix_diagnosis cachix_websocket {FLOOR} activate.text",
    "cachix_reported": "activate.history activate.journal",
    "cachix_reports": f"cachix_channels cachix_repeats cachix_reported {FLOOR}"
    " activate.history activate.journal activate.lock activate.logfile activate.outcomes"
    " activate.text",
    "cachix_report_state": f"{FLOOR} {SHARED} activate.agent",
    "cachix_channels": f"cachix_websocket {FLOOR}",
    "cachix_connection": "cachix_session cachix_websocket cachix_diagnosis cachix_dial cachix_proxy"
    " cachix_protocol activate.text",
    "cachix_session": "cachix_diagnosis cachix_dial cachix_proxy cachix_unguessed",
    "cachix_diagnosis": "cachix_dial cachix_proxy cachix_protocol cachix_errors activate.text",
    "cachix_dial": "cachix_proxy cachix_errors",
    "cachix_proxy": "cachix_protocol cachix_errors",
    "cachix_websocket": "",
    "cachix_repeats": "",
    "cachix_console": "cachix_protocol cachix_tokenfile cachix_usage activate.startup"
    " activate.text",
    "cachix_usage": "",
    "cachix_tokenfile": "cachix_errors",
    "cachix_other": "cachix_errors",
    "cachix_protocol": "activate.text cachix_errors cachix_wishes",
    "cachix_wishes": "activate.operation cachix_errors",
    "cachix_errors": "activate.process",
    "activate": "activate",
    "activate.kinds": SHARED,
    "activate.agent": f"{SHARED} activate.agent",
    "activate.switch": f"{SHARED} activate.switch",
    "cachix_workspace": "cachix_protocol cachix_console cachix_workspace cachix_workspace.cli"
    " cachix_workspace.pages cachix_workspace.management",
    "cachix_workspace.pyz_main": "cachix_entry",
    "cachix_workspace.management": "cachix_protocol cachix_workspace cachix_workspace.management",
    "cachix_workspace.pages": "cachix_protocol cachix_workspace cachix_workspace.pages",
    "cachix_workspace.migrations": "cachix_workspace",
    "cachix_workspace.migrations.versions": "",
    "cachix_workspace.cli": "cachix_protocol cachix_console cachix_workspace cachix_workspace.cli"
    " cachix_workspace.management",
}
BY_ALL = {"activate.values"}  # what each of them may import
STANDARD_LIBRARY_ONLY = r"activate(\.|$)|cachix_protocol$|cachix_errors$"
# Lines of a file, by its path; the first pattern that matches counts.
BUDGETS = {
    r"cachix_deploy\.py": 700,
    r"cachix_\w+\.py": 400,
    r"cachix_workspace/.*\.py": 400,
    r"activate/.*\.py": 200,
}
FUNCTION_LINES = 40  # of the program, the tools and the test harness; a test may be a longer story
COLUMNS = 100
TEXT = r".*\.(py|rst|cfg|toml|nix)|Makefile|\.ci/run"
REGISTRIES = r"\b(pypi|pythonhosted|npmjs|rubygems|crates|debian|golang|anaconda)\.(org|io|com)\b"


def files(pattern: str = ".*") -> dict[str, str]:
    """Return the contents of the project's files whose whole paths match, by their paths."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(argv, cwd=PROJECT, capture_output=True, check=True).stdout.decode()
    paths = [PROJECT / name for name in names.split("\0") if re.fullmatch(pattern, name)]
    return {
        str(path.relative_to(PROJECT)): path.read_text(errors="replace")
        for path in paths
        if path.is_file()
    }


def module_of(path: str) -> str:
    return re.sub(r"(/__init__)?\.py$", "", path).replace("/", ".")


SOURCES = {
    module_of(path): ast.parse(text)
    for path, text in files(r"cachix_\w+\.py|(activate|cachix_workspace)/.*\.py").items()
}
PACKAGES = {name.rpartition(".")[0] for name in SOURCES}


def room(module: str) -> str:
    """Return the package that a module lies in; a package lies in itself, a lone module too."""
    return module if module in PACKAGES else module.rpartition(".")[0] or module


def imports(module: str) -> set[str]:
    """Return the full names of all modules that a module imports, also inside functions."""
    names = set()
    for node in ast.walk(SOURCES[module]):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, f"{module}: relative import"
            full = {f"{node.module}.{alias.name}" for alias in node.names}
            names |= {name if name in SOURCES else str(node.module) for name in full}
    return names


@pytest.mark.parametrize("module", SOURCES)
def test_arrows_point_down(module: str) -> None:
    allowed = (MAY_IMPORT.get(module) or MAY_IMPORT[room(module)]).split()
    ours = imports(module) & set(SOURCES) - BY_ALL
    assert [name for name in sorted(ours) if not {name, room(name)} & set(allowed)] == []
    if re.match(STANDARD_LIBRARY_ONLY, module) and sys.version_info >= (3, 10):
        others = {name.split(".")[0] for name in imports(module) - ours - BY_ALL}
        assert others - set(sys.stdlib_module_names) == set()


def test_no_circles() -> None:
    graph = {module: (imports(module) & set(SOURCES)) - {module} for module in SOURCES}
    assert len(list(TopologicalSorter(graph).static_order())) == len(SOURCES)


def test_files_keep_to_their_budgets() -> None:
    long = []
    for path, text in files(r".*\.py").items():
        budget = next((most for rule, most in BUDGETS.items() if re.fullmatch(rule, path)), None)
        if budget is not None and len(text.splitlines()) > budget:
            long.append(f"{path}: {len(text.splitlines())} lines, at most {budget}")
    assert long == []


def test_functions_are_short() -> None:
    long = [
        f"{path}:{node.lineno} {node.name}"
        for path, text in files(r"(?!.*/test_).*\.py").items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        and (node.end_lineno or 0) - node.lineno >= FUNCTION_LINES
    ]
    assert long == []


def test_lines_are_short() -> None:
    long = [
        f"{path}:{number}"
        for path, text in files(TEXT).items()
        for number, line in enumerate(text.splitlines(), 1)
        if len(line) > COLUMNS
    ]
    assert long == []


def test_no_file_names_the_host_of_a_package_registry() -> None:
    assert [path for path, text in files().items() if re.search(REGISTRIES, text)] == []


def test_each_module_is_installed() -> None:
    setup = configparser.ConfigParser()
    setup.read(PROJECT / "setup.cfg")
    modules = setup["options"]["py_modules"].split()
    assert modules == sorted(
        name for name in SOURCES if name.count(".") == 0 and name not in PACKAGES
    )
