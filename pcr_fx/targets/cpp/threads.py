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


# A call of a team was stalled that took so many times the least that one like it took, and so many seconds more.
_STALL, _STALL_SECONDS = 4.0, 1e-3
# One thread does all for so long then; twice as long each time that the team is stalled again.
_SHORTEST_PAUSE, _LONGEST_PAUSE = 0.1, 3.0
# Calls of which the least is known.
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


def may_share() -> bool:
    """Whether more than one thread may be expected to find a core."""
    return _here.insists or time.perf_counter() > _machine.until


class Team:
    """The calls of one kernel that threads share."""

    def __init__(self) -> None:
        self._least: dict[Hashable, float] = {}

    def call(self, run: Callable[[], None], kind: Hashable) -> None:
        """Call native code, and take note of whether its threads found a core each: `kind` tells what takes as long."""
        began = time.perf_counter()
        run()
        taken = time.perf_counter() - began
        least = self._least.get(kind)
        if least is None or taken < least:
            self._least[kind] = taken
            if len(self._least) > _CALLS_KNOWN:
                self._least.pop(next(iter(list(self._least))), None)  # other threads may be at it, too
        elif taken > _STALL * least and taken > least + _STALL_SECONDS:
            _machine.was_busy()
        else:
            _machine.was_free()
