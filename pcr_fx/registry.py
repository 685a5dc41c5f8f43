"""Things by content, for as long as somebody holds them or they were used of late."""

from __future__ import annotations

import weakref
from collections import OrderedDict
from collections.abc import Hashable
from typing import Generic, TypeVar

from pcr_fx.locks import fork_safe_lock

Key = TypeVar("Key", bound=Hashable)
Value = TypeVar("Value")

# Values that are kept though nobody holds them: a model that is made anew finds what was made for its like.
KEPT = 256


class Registry(Generic[Key, Value]):
    """Values by key: those that are held elsewhere, and the `kept` that were used last.

    So a process that sees ever new models does not keep what it made for all of them. Safe to use from many threads.
    """

    def __init__(self, kept: int = KEPT) -> None:
        self._held: weakref.WeakValueDictionary[Key, Value] = weakref.WeakValueDictionary()
        self._latest: OrderedDict[Key, Value] = OrderedDict()
        self._kept = kept
        self._lock = fork_safe_lock()

    def __len__(self) -> int:
        return len(self._held)

    def __contains__(self, key: Key) -> bool:
        return key in self._held

    def keys(self) -> list[Key]:
        """The keys of all values there are, those used last at the end."""
        with self._lock:
            return [*(key for key in list(self._held) if key not in self._latest), *self._latest]

    def get(self, key: Key) -> Value | None:
        """The value, if there still is one."""
        with self._lock:
            return self._used(key, self._held.get(key))

    def keep(self, key: Key, value: Value) -> Value:
        """Take in a value, unless there is one already; the one that there is then."""
        with self._lock:
            value = self._held.setdefault(key, value)
            self._used(key, value)
            return value

    def clear(self) -> None:
        """Let go of every value, also of those that are held elsewhere."""
        with self._lock:
            self._held.clear()
            self._latest.clear()

    def _used(self, key: Key, value: Value | None) -> Value | None:
        if value is not None:
            self._latest[key] = value
            self._latest.move_to_end(key)
            if len(self._latest) > self._kept:
                self._latest.popitem(last=False)
        return value
