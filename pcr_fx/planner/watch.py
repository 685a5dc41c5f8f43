"""Looks now and then at what calls take: a plan that was made on a busy machine is not believed for ever."""

from __future__ import annotations

import itertools
import math

# Calls of which the least is compared with what was measured, and those between one look and the next: to read the clock twice
# costs a tenth of a microsecond, so that all calls together hardly notice.
CALLS, BETWEEN = 20, 1000
# How many times more, or less, the least of them may be.
OFF = 2.0


class Watch:
    """What the calls of one kind take, beside what they should.

    Args:
        seconds: what was measured; 0 where it is out in any case.
        share: samples of these calls by those measured.
    """

    def __init__(self, seconds: float, share: float = 1.0) -> None:
        self.least_expected = seconds / OFF * min(share, 1.0)
        self.most_expected = seconds * OFF * max(share, 1.0)
        self._least, self._left = math.inf, CALLS
        # Whether the call that begins is to be timed; called as it is, since all calls ask.
        self.begins = itertools.cycle((*(True for _ in range(CALLS)), *(False for _ in range(BETWEEN)))).__next__

    def ended(self, seconds: float, has_more: bool = False) -> bool:
        """Take in a call that was timed; whether it is time to measure anew.

        Args:
            has_more: whether such calls do more than was measured, so that they may well take longer.
        """
        self._least = min(self._least, seconds)
        self._left -= 1
        if self._left > 0:
            return False
        too_long = self._least > self.most_expected and not (has_more and self.most_expected)
        is_off = too_long or self._least < self.least_expected
        self._least, self._left = math.inf, CALLS
        return is_off
