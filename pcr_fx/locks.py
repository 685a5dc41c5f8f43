"""Locks that a forked process finds free."""

from __future__ import annotations

import os
import threading
import weakref
from typing import Any

_all: weakref.WeakSet[Any] = weakref.WeakSet()


def fork_safe_lock() -> threading.RLock:
    """A lock that a thread may take several times. After a fork it is free: who held it is not in the new process."""
    lock = threading.RLock()
    _all.add(lock)
    return lock


def _free() -> None:
    for lock in _all:
        lock._at_fork_reinit()  # as the standard library does with its own


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_free)
