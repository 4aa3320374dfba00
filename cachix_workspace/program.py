"""The agent and the command for CI in one file, as this workspace serves it: of its own version.

tools/pyz.py makes releases with the same functions. The same sources, dependencies and Python give
the same bytes.
"""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import threading
import zipfile
from dataclasses import dataclass
from pathlib import Path

OWN = ("cachix_*.py", "activate")  # patterns; an agent has no use for cachix_workspace/
PACKAGES = ("requests", "urllib3", "idna", "certifi", "websocket", "docopt")  # see cachix_unguessed
AT_START = ("cachix_", "activate/", "websocket/", "docopt")  # what each start loads
NEVER_IMPORTED = ("__pycache__", "tests", "emscripten", "contrib")  # directories
START = Path(__file__).with_name("pyz_main.py")
BUILD_SECONDS = 120.0


@dataclass(frozen=True)
class Program:
    """The file, and its SHA-256 in hexadecimal."""

    content: bytes
    sha256: str


_lock = threading.Lock()
_built: list[Program] = []


def program() -> Program:
    """The file, built at the first use. Raises OSError or subprocess.SubprocessError."""
    with _lock:  # nothing else waits for it
        if not _built:
            with tempfile.TemporaryDirectory() as directory:
                target = os.path.join(directory, "cachix-deploy.pyz")
                build(sources(), target)
                content = Path(target).read_bytes()
            _built.append(Program(content, hashlib.sha256(content).hexdigest()))
        return _built[0]


def sources() -> list[str]:
    """The paths of all modules and packages that go into the file. Raises OSError."""
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    own = [path for pattern in OWN for path in glob.glob(os.path.join(root, pattern))]
    paths = sorted(path for path in own if os.path.basename(path) != "cachix_workspace")
    for name in PACKAGES:
        spec = importlib.util.find_spec(name)
        if spec is None or spec.origin is None:
            raise OSError(f"the package {name} is missing")
        is_package = spec.submodule_search_locations is not None
        paths.append(os.path.dirname(spec.origin) if is_package else spec.origin)
    return paths


def build(paths: list[str], target: str) -> None:
    """Write the zip application `target` of modules and packages. Raises OSError, or
    subprocess.SubprocessError.
    """
    with tempfile.TemporaryDirectory() as directory:
        for path in paths:
            copy(path, directory)
        shutil.copy(START, os.path.join(directory, "__main__.py"))
        compile_all(directory)
        write_zip(directory, target)


def left_out(directory: str, names: list[str]) -> list[str]:
    """Whether an agent has no use for a file: machine code, backups of editors, and so on."""
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
    subprocess.run(argv, env=environment, check=True, timeout=BUILD_SECONDS)


def write_zip(directory: str, target: str) -> None:
    """Write an application of all files in `directory`, whose times and modes do not count.

    The byte code of a start is not compressed: each start would lose 9 ms.
    """
    paths = {path.relative_to(directory).as_posix(): path for path in Path(directory).rglob("*")}
    with open(target, "wb") as file:
        file.write(b"#!/usr/bin/env python3\n")
        with zipfile.ZipFile(file, "w") as archive:
            for name in sorted(name for name, path in paths.items() if path.is_file()):
                entry = zipfile.ZipInfo(name)  # dated 1980
                entry.external_attr = 0o644 << 16
                is_quick = name.endswith(".pyc") and name.startswith(AT_START)
                method = zipfile.ZIP_STORED if is_quick else zipfile.ZIP_DEFLATED
                archive.writestr(entry, paths[name].read_bytes(), method)
