"""How many threads native code may use: one, where a fork has left a team of them behind, or the machine is busy.

OpenMP keeps its threads from call to call. A forked process has none of them, and would wait for them for ever. Where other
processes are at work a team waits for whichever of its threads has no core: what takes it 0.08 ms otherwise took 56.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Hashable, Iterator

import torch


class _Threads:
    """What is known of this process's threads that Python has not started.

    Attributes:
        is_left_behind: whether there were some in the process that this one was forked from.
    """

    is_left_behind = False
    _is_there = False

    def look(self) -> None:
        """Before a fork."""
        try:
            count = len(os.listdir("/proc/self/task"))
        except OSError:
            self._is_there = True  # for all that is known
        else:
            self._is_there = count > threading.active_count()

    def leave_behind(self) -> None:
        """In the new process."""
        self.is_left_behind |= self._is_there


_threads = _Threads()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_threads.look, after_in_child=_threads.leave_behind)


def available_threads() -> int:
    """As many as PyTorch may use, or one."""
    return 1 if _threads.is_left_behind else torch.get_num_threads()


# A call of a team was stalled that took so many times what one thread takes at the least, and so many seconds more.
_STALL, _STALL_SECONDS = 1.5, 1e-3
# One thread does all for so long then; twice as long each time that the team is stalled again.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0
# Kinds of calls of which it is known what one thread takes.
_CALLS_KNOWN = 64


class _Machine:
    """Whether threads find a core each, as the latest calls of teams had it.

    Attributes:
        until: when a team may be tried again.
    """

    def __init__(self) -> None:
        self.until, self._pause = 0.0, 0.0

    def was_busy(self) -> None:
        self._pause = min(max(2 * self._pause, _SHORTEST_PAUSE), _LONGEST_PAUSE)
        self.until = time.perf_counter() + self._pause

    def was_free(self) -> None:
        self._pause /= 2


_machine = _Machine()


class _Here(threading.local):
    insists = False


_here = _Here()


@contextlib.contextmanager
def insisting() -> Iterator[None]:
    """Teams are called in this thread whatever happened: to measure what they take."""
    before, _here.insists = _here.insists, True
    try:
        yield
    finally:
        _here.insists = before


class Team:
    """The calls of one kernel that threads may share: what one of them takes is known before others are asked to help."""

    def __init__(self) -> None:
        self._alone: dict[Hashable, float] = {}

    def may_share(self, kind: Hashable) -> bool:
        """Whether threads may be expected to find a core each; `kind` tells what takes as long.

        How many share decides how sums of gradients are rounded: where algorithms are to be deterministic, they always do.
        """
        if _here.insists or torch.are_deterministic_algorithms_enabled():
            return True
        return kind in self._alone and time.perf_counter() > _machine.until

    def call(self, run: Callable[[], None], kind: Hashable, is_shared: bool) -> None:
        """Call native code, and take note of what that took."""
        began = time.perf_counter()
        run()
        taken, alone = time.perf_counter() - began, self._alone.get(kind)
        if not is_shared:
            self._alone[kind] = taken if alone is None else min(alone, taken)
            if len(self._alone) > _CALLS_KNOWN:
                self._alone.pop(next(iter(list(self._alone))), None)  # other threads may be at it, too
        elif alone is not None and taken > _STALL * alone + _STALL_SECONDS:
            _machine.was_busy()
        elif alone is not None:
            _machine.was_free()
