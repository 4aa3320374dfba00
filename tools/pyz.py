"""Build the agent and the CI command, with all they need, into one file for Python 3.9 or newer."""

from __future__ import annotations

import glob
import os
import py_compile
import shutil
import sys
import sysconfig
import tempfile
import zipapp

ROOT = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
OWN = ("cachix_*.py", "activate")  # patterns; an agent has no use for cachix_workspace/
# The dependencies come from the environment that the tests run in: the same versions.
PACKAGES = (
    "requests",
    "urllib3",
    "idna",
    "certifi",
    "charset_normalizer",
    "websocket",
    "docopt.py",
)
LEFT_OUT = shutil.ignore_patterns(
    "*.so", "*.pyi", "py.typed", "__pycache__", "tests", "emscripten", "contrib"
)


def copy(source: str, directory: str) -> None:
    """Copy a module or package, without machine code and whatever an agent never imports."""
    target = os.path.join(directory, os.path.basename(source))
    if os.path.isdir(source):
        shutil.copytree(source, target, ignore=LEFT_OUT)
    else:
        shutil.copy(source, target)


def compile_all(directory: str) -> None:
    """Put byte code beside each source. Pythons of another version compile the source themselves.

    Byte code is never compared with its source: both are in one file that is replaced as a whole.
    """
    for parent, _, files in os.walk(directory):
        for name in [name for name in files if name.endswith(".py")]:
            path = os.path.join(parent, name)
            shown = os.path.relpath(path, directory)
            mode = py_compile.PycInvalidationMode.UNCHECKED_HASH
            py_compile.compile(path, path + "c", dfile=shown, doraise=True, invalidation_mode=mode)


def sources() -> list[str]:
    """Return the paths of all modules and packages that go into the file."""
    own = [path for pattern in OWN for path in glob.glob(os.path.join(ROOT, pattern))]
    own = [path for path in own if os.path.basename(path) != "cachix_workspace"]
    site = sysconfig.get_path("purelib")
    return sorted(own) + [os.path.join(site, name) for name in PACKAGES]


def main(target: str) -> None:
    """Write the zip application `target`, which appears whole or not at all."""
    os.makedirs(os.path.dirname(os.path.abspath(target)), exist_ok=True)
    with tempfile.TemporaryDirectory() as directory:
        for source in sources():
            copy(source, directory)
        start = os.path.join(ROOT, "tools", "pyz_main.py")
        shutil.copy(start, os.path.join(directory, "__main__.py"))
        compile_all(directory)
        zipapp.create_archive(
            directory, f"{target}.new", interpreter="/usr/bin/env python3", compressed=True
        )
    os.chmod(f"{target}.new", 0o755)
    os.rename(f"{target}.new", target)


if __name__ == "__main__":
    main(sys.argv[1])
