"""Other places with this project's files."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from hosts import PROJECT


def project_files() -> list[str]:
    """Return the paths of all files of the project, those that are not yet committed too."""
    argv = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    names = subprocess.run(argv, cwd=PROJECT, capture_output=True, check=True).stdout.decode()
    return [name for name in names.split("\0") if (PROJECT / name).is_file()]


def clone(directory: Path) -> None:
    """Copy the project into a directory."""
    for name in project_files():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(PROJECT / name, directory / name)
