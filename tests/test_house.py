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
    "cachix_deploy": f"cachix_ci cachix_job cachix_options cachix_reports cachix_channels {FLOOR}"
    " cachix_source cachix_repeats cachix_gate cachix_secret cachix_report_state"
    f" {SHARED} activate.agent",
    "cachix_ci": f"cachix_follow cachix_signed cachix_diagnosis {FLOOR} activate.text",
    "cachix_job": "",
    "cachix_gate": "cachix_signed cachix_ed25519 cachix_protocol activate",
    "cachix_secret": "cachix_connection cachix_errors activate",
    "cachix_source": "cachix_cache cachix_connection cachix_protocol cachix_proxy activate"
    " activate.agent",
    "cachix_signed": "cachix_cache cachix_ed25519 cachix_protocol",
    "cachix_ed25519": "",
    "cachix_state": "cachix_protocol activate.text",
    "cachix_switch": f"cachix_orphan {FLOOR} {SHARED} activate.switch",
    "cachix_orphan": f"cachix_reports cachix_session {FLOOR} {SHARED}",
    "cachix_cache": "cachix_protocol",
    "cachix_plain": "cachix_console cachix_protocol",
    "cachix_options": f"cachix_cache cachix_plain cachix_signed {FLOOR} {SHARED}",
    "cachix_follow": f"cachix_state cachix_diagnosis cachix_websocket {FLOOR} activate.text",
    "cachix_reports": f"cachix_channels cachix_repeats {FLOOR}"
    " activate.history activate.journal activate.lock activate.logfile activate.outcomes"
    " activate.text",
    "cachix_report_state": f"{FLOOR} {SHARED}",
    "cachix_channels": FLOOR,
    "cachix_connection": "cachix_session cachix_websocket cachix_diagnosis cachix_dial cachix_proxy"
    " cachix_protocol activate.text",
    "cachix_session": "cachix_diagnosis cachix_dial cachix_proxy",
    "cachix_diagnosis": "cachix_dial cachix_proxy cachix_protocol cachix_errors activate.text",
    "cachix_dial": "cachix_proxy cachix_errors",
    "cachix_proxy": "cachix_protocol cachix_errors",
    "cachix_websocket": "",
    "cachix_repeats": "",
    "cachix_console": "cachix_protocol activate.startup activate.text",
    "cachix_protocol": "activate.text cachix_errors",
    "cachix_errors": "activate.process",
    "activate": "activate",
    "activate.kinds": SHARED,
    "activate.agent": f"{SHARED} activate.agent",
    "activate.switch": f"{SHARED} activate.switch",
    "cachix_workspace": "cachix_protocol cachix_console cachix_workspace cachix_workspace.cli"
    " cachix_workspace.pages cachix_workspace.management",
    "cachix_workspace.pyz_main": "cachix_deploy",
    "cachix_workspace.management": "cachix_protocol cachix_workspace cachix_workspace.management",
    "cachix_workspace.pages": "cachix_protocol cachix_workspace cachix_workspace.pages",
    "cachix_workspace.migrations": "cachix_workspace",
    "cachix_workspace.migrations.versions": "",
    "cachix_workspace.cli": "cachix_protocol cachix_console cachix_workspace cachix_workspace.cli"
    " cachix_workspace.management",
}
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
    ours = imports(module) & set(SOURCES)
    assert [name for name in sorted(ours) if not {name, room(name)} & set(allowed)] == []
    if re.match(STANDARD_LIBRARY_ONLY, module) and sys.version_info >= (3, 10):
        others = {name.split(".")[0] for name in imports(module) - ours}
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
