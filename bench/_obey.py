"""A helper process of a benchmark: it does what lines of JSON say, and serves in between."""

from __future__ import annotations

import contextlib
import json
import os
from collections.abc import Callable
from typing import Any

PAUSE = 0.05  # seconds that `serve` takes at most


def obey(serve: Callable[[float], None], do: Callable[[dict[str, Any]], Any]) -> None:
    """Answer each line of stdin by a line, until its end."""
    text = b""
    os.set_blocking(0, False)
    while True:
        serve(PAUSE)
        with contextlib.suppress(BlockingIOError):
            part = os.read(0, 1 << 16)
            if not part:
                return
            text += part
        while b"\n" in text:
            line, _, text = text.partition(b"\n")
            print(json.dumps(do(json.loads(line))), flush=True)
