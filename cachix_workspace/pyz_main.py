"""The start of the one-file program: its `__main__.py`."""

import contextlib
import os
import re
import sys
import warnings

OURS = re.compile(r"activate(\.|$)|cachix_")


def run_from_memory() -> None:
    """Import from a copy of the file, which may be replaced or removed while we run.

    Python reads the directory of the file only once, so that later imports from another file in
    its place would fail. A switch process inherits the copy, see `cachix_program.files`.
    """
    import fcntl

    with open(sys.path[0], "rb") as file:
        memory = os.memfd_create("cachix-deploy")
        copy = fcntl.fcntl(memory, fcntl.F_DUPFD_CLOEXEC, 3)  # one of 0, 1 and 2 may be closed
        os.close(memory)
        while os.sendfile(copy, file.fileno(), None, 1 << 24):
            pass
    path = f"/proc/self/fd/{copy}"
    if os.path.exists(path):
        sys.path[0] = path
        for name in [name for name in sys.modules if OURS.match(name)]:
            del sys.modules[name]  # it came from the file


import cachix_entry  # noqa: E402

if (status := cachix_entry.answer(sys.argv[1:])) is not None:
    sys.exit(status)
with contextlib.suppress(AttributeError, OSError):  # this system has no memfds: not Linux
    run_from_memory()
# Newer Pythons warn about docopt's source, which they compile at every start.
warnings.filterwarnings("ignore", category=SyntaxWarning)

from cachix_entry import main  # noqa: E402

sys.exit(main())
