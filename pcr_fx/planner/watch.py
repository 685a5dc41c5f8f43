"""Looks now and then at what calls take: a plan that was made on a busy machine is not believed for ever."""

from __future__ import annotations

import math

# Calls of which the least is compared with what was measured, and those between one look and the next: to read the clock twice
# costs a tenth of a microsecond, so that all calls together hardly notice.
CALLS, BETWEEN = 20, 1000
# How many times more, or less, the least of them may be.
OFF = 2.0


class Watch:
    """What the calls of one kind take, beside what they should.

    Args:
        seconds: what was measured.
        share: samples of these calls by those measured.
        calls: before the first look.
    """

    __slots__ = ("_least", "_left", "least_expected", "most_expected")

    def __init__(self, seconds: float, share: float = 1.0, calls: int = CALLS) -> None:
        self.least_expected = seconds / OFF * min(share, 1.0)
        self.most_expected = seconds * OFF * max(share, 1.0)
        self._least, self._left = math.inf, calls

    def begins(self) -> bool:
        """Whether the call that begins is to be timed."""
        self._left -= 1
        return self._left < CALLS

    def ended(self, seconds: float) -> bool:
        """Take in a call that was timed; whether it is time to measure anew."""
        if seconds < self._least:
            self._least = seconds
        if self._left > 0:
            return False
        is_off = not self.least_expected <= self._least <= self.most_expected
        self._least, self._left = math.inf, CALLS + BETWEEN
        return is_off
