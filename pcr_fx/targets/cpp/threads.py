"""How many threads native code may use: one, where a fork has left a team of them behind.

OpenMP keeps its threads from call to call. A forked process has none of them, and would wait for them for ever.
"""

from __future__ import annotations

import os
import threading

import torch


class _Team:
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


_team = _Team()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(before=_team.look, after_in_child=_team.leave_behind)


def available_threads() -> int:
    """As many as PyTorch may use, or one."""
    return 1 if _team.is_left_behind else torch.get_num_threads()
