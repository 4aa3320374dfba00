"""requests without what guesses encodings: 2 MiB, for texts that nobody reads here.

It would load charset_normalizer, or chardet, for `Response.text` alone. All that our processes do
with requests begins with the import of this module.
"""

from __future__ import annotations

import contextlib
import sys
import types
from collections.abc import Iterator

GUESSERS = ("chardet", "charset_normalizer")


@contextlib.contextmanager
def _no_guesser() -> Iterator[None]:
    """Let requests, if it is imported meanwhile for the first time, find one that knows nothing."""
    if "requests" in sys.modules:
        yield
        return
    kept = {name: sys.modules.get(name) for name in GUESSERS}
    stand_in = types.ModuleType("chardet")
    stand_in.__version__ = "5.2.0"  # type: ignore[attr-defined]  # requests warns without one
    stand_in.detect = lambda data: {"encoding": None}  # type: ignore[attr-defined]
    sys.modules.update({"chardet": stand_in, "charset_normalizer": None})  # type: ignore[dict-item]
    try:
        yield
    finally:
        for name, module in kept.items():
            if module is None:
                del sys.modules[name]
            else:
                sys.modules[name] = module


with _no_guesser():
    import requests as requests
