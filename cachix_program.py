"""Other processes of this program: switch processes, and leaders of what is done by hand."""

from __future__ import annotations

import os
import sys


def command(module: str) -> list[str]:
    """The command that starts another process of this program: this Python once more, at `module`.

    It skips the `site` module, and takes over our module search path. Otherwise a switch process
    would not be ready when a small download is complete. It ignores the variables of Python, but
    for a PYTHONHOME that we have found the standard library by.
    """
    path = [os.path.abspath(entry) for entry in sys.path]
    code = f"import gc, sys; gc.disable(); sys.path[:] = {path!a}"
    code += f"; import {module}; sys.exit({module}.main())"
    own_home = "PYTHONHOME" in os.environ and not sys.flags.ignore_environment
    flags = ["-s" if own_home else "-I", "-S", "-X", f"utf8={sys.flags.utf8_mode}"]
    flags += ["-B"] if sys.dont_write_bytecode else []
    flags += ["-X", f"pycache_prefix={sys.pycache_prefix}"] if sys.pycache_prefix else []
    return [sys.executable, *flags, "-c", code, os.path.abspath(sys.argv[0])]


def files() -> tuple[int, ...]:
    """The descriptors that our module search path names: see cachix_workspace/pyz_main.py."""
    entries = [entry.partition("/proc/self/fd/") for entry in sys.path]
    return tuple(int(number) for head, _, number in entries if not head and number.isdigit())
