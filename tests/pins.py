"""The pins of requirements-*.txt: the packages of a release and of the tests, with hashes."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Optional

from hosts import PROJECT
from packaging.markers import Marker
from packaging.utils import canonicalize_name

ENTRY = r"^([\w.-]+)(?:\[[\w,.-]+\])?==(\S+)(?: ; (.+?))? \\\n((?: +--hash=\S+(?: \\)?\n)+)"


@dataclass(frozen=True)
class Pin:
    """One version of a package, and for which Pythons and systems it is."""

    name: str
    version: str
    marker: Optional[Marker]
    hashes: tuple[str, ...]

    def is_for(self, python: str = "") -> bool:
        """Whether it is for this Python, or for another version of it, such as 3.9.2."""
        of_python = {"python_version": python.rpartition(".")[0], "python_full_version": python}
        return self.marker is None or self.marker.evaluate(of_python if python else None)

    @property
    def line(self) -> str:
        """The line of a requirements file for pip."""
        return " ".join([f"{self.name}=={self.version}", *map("--hash={}".format, self.hashes)])


def pins(file: str, python: str = "") -> dict[str, Pin]:
    """Return what one of these files has for this Python, or another one, by names."""
    text = (PROJECT / f"requirements-{file}").read_text()
    read = [
        Pin(canonicalize_name(name), version, Marker(marker) if marker else None, hashes)
        for name, version, marker, lines in re.findall(ENTRY, text, re.M)
        for hashes in [tuple(re.findall(r"--hash=(\S+)", lines))]
    ]
    assert len(read) == len(re.findall(r"^[^#\s]", text, re.M)), f"{file}: a line is not understood"
    chosen = [pin for pin in read if pin.is_for(python)]
    # A package may be there once more, with an extra, for some Pythons.
    by_name = {pin.name: pin for pin in sorted(chosen, key=lambda pin: pin.marker is None)}
    versions = {(pin.name, pin.version) for pin in chosen}
    assert len(versions) == len(by_name), f"{file}: two versions of a package"
    return by_name
