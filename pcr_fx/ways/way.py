"""What a way through a chain is to all who choose, time, run or describe one.

A way is one manner to go through a chain: forward, from the initial state to the trajectory; or backward, from the
cotangents of all states to those of all inputs. Some can do both. Ways know nothing of each other, and nobody else asks
what kind a way is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, NamedTuple

from torch import Tensor

from pcr_fx.body import Program
from pcr_fx.call import Call
from pcr_fx.solvers import Outcome, Settings, SolveStats
from pcr_fx.ways.case import Case
from pcr_fx.ways.costs import Bounds

IN_SEQUENCE = SolveStats(Outcome.SEQUENTIAL)


@dataclass(frozen=True)
class Refused:
    """A way that there is not, or that is not worth timing: its name, and why."""

    name: str
    reason: str


class Solution(NamedTuple):
    """What a way forward returns.

    Attributes:
        trajectory: `[L, *batch, d]`.
        stats: how it went; what a queue has not told yet is not in it.
        queued: for ways that iterate in a queue, `[samples, 3]` on the device: outcome in the order of `Outcome`,
            iterations and relative residual of each sample.
    """

    trajectory: Tensor
    stats: SolveStats = IN_SEQUENCE
    queued: Tensor | None = None


class Way(ABC):
    """One manner to go through a chain. Ways are immutable and compare by content.

    Attributes:
        solver: "sequential" or an iterative solver; backward, where the adjoint is linear, "newton" is one transposed
            reduction.
        kind: whose generated code runs it, as the report calls that; nothing for PyTorch's ops.
        window: blocks whose linear systems are held at a time; `None` for the whole chain.
        in_place: whether it reads blocks' tensors where they lie, so that they need not be stacked.
        queues: whether it returns before the device is done.
        adds_nothing: whether it does what the model's own ops do.
        scales: whether fewer blocks take it as much less time, so that it can be timed on some.
    """

    solver: str
    kind: ClassVar[str] = ""
    window: int | None = None
    in_place: ClassVar[bool] = False
    queues: ClassVar[bool] = False
    adds_nothing: ClassVar[bool] = False
    scales: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """As the report has it."""
        kernel = f" ({self.kind} kernel)" if self.kind else ""
        return self.solver + kernel + (f" in windows of {self.window}" if self.window else "")

    @property
    def iterates(self) -> bool:
        """Whether it may end without a result that can be used."""
        return self.solver != "sequential"

    @property
    def failure(self) -> str | None:
        """Why it cannot be used after all, which may turn out when it is first called; `None` while it can."""
        return None

    def is_ready(self, direction: str, initial: Tensor, wanted: tuple[bool, ...] | None = None) -> bool:
        """Whether it can be called for states like `initial`; what it needs is compiled now, if it is not yet.

        Args:
            wanted: whose gradients it is to compute, as a program has it; of a way back alone.
        """
        return True

    def fault(self, program: Program) -> str:
        """Why it would not compute what the model does, or nothing; found out when it is first asked of a program."""
        return ""

    def is_shared(self, case: Case, direction: str) -> bool:
        """Whether it needs several threads to find a core each at the same time."""
        return False

    def hopeless(self, case: Case, direction: str) -> str:
        """Why it is not worth timing in this direction, or nothing."""
        return ""

    @abstractmethod
    def bounds(self, case: Case, direction: str) -> Bounds:
        """The least and the most seconds that a call can cost."""

    def memory(self, program: Program, samples: int, settings: Settings) -> int:
        """Bytes that linear systems take at a time."""
        return 0

    def depth(self, program: Program, samples: int, iterations: int, settings: Settings) -> int:
        """Steps one after another of a solve that took so many iterations."""
        return program.length


class Forward(Way):
    """A way to the trajectory."""

    @abstractmethod
    def solve(
        self, program: Program, call: Call, settings: Settings, start: Tensor | None = None, fall_back: bool = True
    ) -> Solution:
        """The trajectory of the blocks that `call` has the operands of.

        Args:
            start: a trajectory `[L, *batch, d]` to start from, for ways that iterate.
            fall_back: whether samples that an iteration did not solve are evaluated block by block, by ways that queue:
                others leave that to the caller.
        """


class Backward(Way):
    """A way to the cotangents of all inputs."""

    @abstractmethod
    def solve_adjoint(
        self, program: Program, call: Call, trajectory: Tensor, cotangents: Tensor, settings: Settings
    ) -> tuple[Sequence[Tensor], bool]:
        """Cotangents `(d_initial, *d_operands, *d_shared)` of what is differentiable, and whether they are accurate.

        Args:
            trajectory: what the call was solved to, `[L, *batch, d]`.
            cotangents: of every state, `[L, *batch, d]`.
        """
