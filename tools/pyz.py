"""Build the agent and the CI command, with all they need, into one file for Python 3.9 or newer.

The same sources, dependencies and Python give the same bytes, wherever and whenever they are built.
"""

from __future__ import annotations

import glob
import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tempfile
import zipfile
from pathlib import Path

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OWN = ("cachix_*.py", "activate")  # patterns; an agent has no use for cachix_workspace/
# The dependencies come from the environment that the tests run in: the same versions.
PINNED = "requirements-agent.txt"
PACKAGES = (
    "requests",
    "urllib3",
    "idna",
    "certifi",
    "charset_normalizer",
    "websocket",
    "docopt.py",
)
NEVER_IMPORTED = ("__pycache__", "tests", "emscripten", "contrib")  # directories


def left_out(directory: str, names: list[str]) -> list[str]:
    """Return which files an agent has no use for: machine code, what editors leave, and so on."""
    files = [name for name in names if not os.path.isdir(os.path.join(directory, name))]
    return [*NEVER_IMPORTED, *(name for name in files if not name.endswith((".py", ".pem")))]


def copy(source: str, directory: str) -> None:
    """Copy a module or package."""
    target = os.path.join(directory, os.path.basename(source))
    if os.path.isdir(source):
        shutil.copytree(source, target, ignore=left_out)
    else:
        shutil.copy(source, target)


def compile_all(directory: str) -> None:
    """Put byte code beside each source. Pythons of another version compile the source themselves.

    Byte code is never compared with its source: both are in one file that is replaced as a whole.
    With older Pythons it depends on the strings that the process has met before, and their hashes.
    Thus one that knows nothing of its environment compiles it.
    """
    environment = {name: text for name, text in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"LC_ALL": "C", "PYTHONHASHSEED": "0"}
    argv = [sys.executable, "-S", "-W", "ignore::SyntaxWarning", "-m", "compileall", "-q", "-b"]
    argv += ["--invalidation-mode", "unchecked-hash", "-s", directory, directory]
    subprocess.run(argv, env=environment, check=True)


def write_zip(directory: str, target: str) -> None:
    """Write an application of all files in `directory`, whose times and modes do not count."""
    paths = {path.relative_to(directory).as_posix(): path for path in Path(directory).rglob("*")}
    with open(target, "wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w") as archive:
            for name in sorted(name for name, path in paths.items() if path.is_file()):
                entry = zipfile.ZipInfo(name)  # dated 1980
                entry.external_attr = 0o644 << 16
                archive.writestr(entry, paths[name].read_bytes(), zipfile.ZIP_DEFLATED)


def sources() -> list[str]:
    """Return the paths of all modules and packages that go into the file."""
    own = [path for pattern in OWN for path in glob.glob(os.path.join(ROOT, pattern))]
    own = [path for path in own if os.path.basename(path) != "cachix_workspace"]
    site = sysconfig.get_path("purelib")
    return sorted(own) + [os.path.join(site, name) for name in PACKAGES]


def check_versions() -> None:
    """End with an error if anything is not as pinned, so that nothing else is ever released."""
    try:
        with open(os.path.join(ROOT, PINNED)) as file:
            pins = re.findall(r"^([\w.-]+)==(\S+)", file.read(), re.M)
    except FileNotFoundError:  # part of the sources: nobody releases from that
        print(f"warning: {PINNED} is missing, so that no version is checked", file=sys.stderr)
        return
    for name, pinned in pins:
        try:
            version = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            version = "missing"
        if version != pinned:
            sys.exit(
                f"error: {name} is {version} here, and {PINNED} has {pinned}: run `make clean`,"
                " then `make setup`"
            )


def main(target: str) -> None:
    """Write the zip application `target`, which appears whole or not at all."""
    check_versions()
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        for source in sources():
            copy(source, directory)
        start = os.path.join(ROOT, "tools", "pyz_main.py")
        shutil.copy(start, os.path.join(directory, "__main__.py"))
        compile_all(directory)
        write_zip(directory, f"{target}.new")
    os.chmod(f"{target}.new", 0o755)
    os.rename(f"{target}.new", target)


if __name__ == "__main__":
    main(sys.argv[1])
