"""Values that are remembered, up to a size."""

from __future__ import annotations

import threading
from typing import Generic, TypeVar

MOST = 8 << 20  # bytes

Key = TypeVar("Key")
Value = TypeVar("Value")


class Memory(Generic[Key, Value]):
    """Values of a limited size together: when they reach it, all are forgotten."""

    def __init__(self, most: int = MOST) -> None:
        self._most = most
        self._values: dict[Key, Value] = {}
        self._sizes: dict[Key, int] = {}
        self._size = 0
        self._lock = threading.Lock()

    def get(self, key: Key) -> Value | None:
        """The value of a key."""
        return self._values.get(key)

    def put(self, key: Key, value: Value, size: int) -> None:
        """Remember a value of so many bytes."""
        with self._lock:
            self._size += size - self._sizes.get(key, 0)
            if self._size > self._most:
                self._values.clear()
                self._sizes.clear()
                self._size = size
            self._values[key], self._sizes[key] = value, size

    def forget(self, key: Key) -> None:
        """Forget the value of a key."""
        with self._lock:
            self._values.pop(key, None)
            self._size -= self._sizes.pop(key, 0)
