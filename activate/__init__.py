"""All that changes the machine, with the standard library alone.

A kind is a module with the same names as all others: NAME, detect, profile_path, running_path, and the pairs of do and
undo: activate and commit, rollback.
"""

from __future__ import annotations

from types import ModuleType

from activate import darwin, home_manager, nixos, profile

KINDS: tuple[ModuleType, ...] = (nixos, darwin, home_manager, profile)  # in order of detection


def detect(path: str) -> ModuleType:
    """The kind of a store path, by the markers in it."""
    return next(kind for kind in KINDS if kind.detect(path))


def kind_named(name: str) -> ModuleType:
    """The kind that a journal names. Raises KeyError for one that this version does not have."""
    return {kind.NAME: kind for kind in KINDS}[name]
