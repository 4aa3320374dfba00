"""Shared by the benchmarks: the ways to run the program."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import docopt
from hosts import PROJECT, command

SYSTEM_PYTHON = "/usr/bin/python3"
PYZ = PROJECT / "dist" / "cachix-deploy.pyz"


def ways(place: Path) -> dict[str, list[str]]:
    """Return the ways to run the program, by what they are called."""
    installed = command("cachix-deploy")
    result = {"installed": [sys.executable, *installed] if len(installed) == 1 else installed}
    if not os.access(SYSTEM_PYTHON, os.X_OK):
        return result
    subprocess.run([SYSTEM_PYTHON, "-m", "venv", "--without-pip", place], check=True)
    libraries = os.path.dirname(str(docopt.__file__))  # all that an agent needs lies there
    packages = next(place.glob("lib/python3*/site-packages"))
    (packages / "bench.pth").write_text(f"{PROJECT}\n{libraries}\n")
    script = place / "bin" / "cachix-deploy"
    script.write_text("import sys\nfrom cachix_entry import main\nsys.exit(main())\n")
    result["system's Python"] = [str(place / "bin" / "python3"), str(script)]
    if PYZ.exists():
        result["pyz"] = [SYSTEM_PYTHON, str(PYZ)]
    return result
