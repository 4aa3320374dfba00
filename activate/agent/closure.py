"""A closure as it lies on the disk: Nix may take for valid what is not there any more."""

from __future__ import annotations

import os
import threading
from typing import Optional

from activate import kinds, logfile, nix
from activate.agent.download import DownloadFailed
from activate.process import Error, run, say
from activate.text import last_lines, one_line

QUESTION_TIMEOUT = 20.0  # seconds; the switch process waits for the answer, see `steps`


class Closure:
    """The paths in the closures of `roots`, all of them valid, and which of them are gone.

    Nix takes a while to name thousands of paths: it is asked while the switch process starts.
    """

    def __init__(self, roots: list[str]) -> None:
        self.roots = roots
        self.gone: list[str] = []
        self.problem: Optional[Error] = None
        self.thread = threading.Thread(target=self.look, name="closure", daemon=True)
        self.thread.start()

    def look(self) -> None:
        """Look for each path."""
        try:
            paths = nix.requisites(self.roots, QUESTION_TIMEOUT)
            self.gone = [path for path in paths if not os.path.lexists(path)]
        except Error as error:
            self.problem = error

    def missing(self) -> list[str]:
        """The paths that are gone. Raises CommandFailed if Nix does not answer."""
        self.thread.join()
        if self.problem is not None:
            raise self.problem
        return self.gone

    def lacks_roots(self) -> bool:
        """Whether one of the roots itself is gone, so that nothing can be known of it."""
        return not all(map(os.path.lexists, self.roots))


def complete(whole: Closure, source: nix.Source, log: int, timeout: float) -> Closure:
    """Download again whatever is gone. Raises Error if it can't be had."""
    missing = whole.missing()
    if not missing:
        return whole
    say(log, f"gone from the disk, downloading again: {' '.join(missing)}")
    start = os.fstat(log).st_size
    nix.repair(missing, source, lambda argv: run(argv, log, timeout))
    whole = Closure(whole.roots)
    missing = whole.missing()
    if missing:
        output = logfile.read_since(log, start)
        cause = one_line(last_lines(output, 1))
        raise DownloadFailed(
            f"{missing[0]} is gone from the disk, although Nix takes it for valid, and could not "
            f"be downloaded again ({cause}): push it to the cache, or run as root "
            f"`nix-store --repair-path {missing[0]}`; nothing was changed",
            output,
        )
    return whole


def check_programs(path: str, script: Optional[str]) -> None:
    """Raise Error if the program that activates or the rollback script has lost its contents.

    A path that has lost those may have lost more, so that it is not repaired by the way.
    """
    program = kinds.detect(path).PROGRAM
    for file in (script, f"{path}/{program}" if program else None):
        if file is not None and is_empty(file):
            remedy = f"run as root `nix-store --repair-path {nix.store_path_of(file)}`"
            raise Error(f"{file} is empty: {remedy}; nothing was changed")


def is_empty(file: str) -> bool:
    """Whether a file has no contents; False if it is missing."""
    try:
        return os.stat(file).st_size == 0
    except OSError:
        return False
