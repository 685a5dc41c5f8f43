"""What happened at a solve node so far: on a GPU as far as somebody asked."""

from __future__ import annotations

import itertools
import logging
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from pcr_fx.body.isolation import isolated
from pcr_fx.planner import Plan
from pcr_fx.solvers import Outcome, SolveStats

log = logging.getLogger(__name__)

_records: weakref.WeakValueDictionary[int, SolveRecord] = weakref.WeakValueDictionary()
_record_ids = itertools.count()


@dataclass(frozen=True)
class Pending:
    """How solves on a GPU went, not read yet.

    It is kept in memory of its own, made before the first solve: what a solve allocates while a CUDA graph is warmed up
    or captured belongs to that graph, and a replay writes here without any of this being called.

    Attributes:
        worst: `[3]` on the device, as a row of `Solution.queued`: the largest of all samples and
            solves since somebody asked; negative if there was none.
        raises: whether samples that failed are left as they are, and not evaluated block by block.
    """

    worst: Tensor
    raises: bool

    @classmethod
    def on(cls, device: torch.device, raises: bool) -> Pending:
        if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            return cls(_nothing().to(device, non_blocking=True), raises)
        return cls(_lasting(device), raises)

    def note(self, samples: Tensor) -> None:
        """Take in `[samples, 3]`, when the device gets there."""
        if len(samples):
            torch.maximum(self.worst, samples[0] if len(samples) == 1 else samples.amax(0), out=self.worst)

    def take(self) -> SolveStats | None:
        """Wait for the device, and tell what it noted since the last time."""
        if self.worst.is_cuda:
            torch.cuda.synchronize(self.worst.device)  # graphs are replayed on any stream
        outcome, iterations, residual = self.worst.tolist()
        if outcome < 0:
            return None
        self.worst.fill_(-1)
        worst = list(Outcome)[int(outcome)]
        if worst.success or self.raises:
            return SolveStats(worst, int(iterations), residual)
        return SolveStats(Outcome.SEQUENTIAL, int(iterations), 0.0, fallback=worst)


def _nothing() -> Tensor:
    return torch.full((3,), -1.0, dtype=torch.float64, device="cpu")


@isolated
def _lasting(device: torch.device) -> Tensor:
    """A real tensor, whoever traces or transforms here. Copied from the host, it is there whatever the stream."""
    return _nothing().to(device)


# Calls that go block by block after a solve that failed, before another is tried; twice as many after each in a row.
_FIRST_REST = 16
_LONGEST_REST = 1024


@dataclass
class Rest:
    """Keeps a chain from being tried in vain at every call.

    A failed attempt costs a few iterations; this spreads them over 16 calls, then 32, and so on up to 1,024.

    Attributes:
        calls: those left to go before the next attempt.
    """

    calls: int = 0
    _latest: int = 0

    def passes(self) -> bool:
        """Whether this call may try; one that may not is counted off."""
        self.calls = max(self.calls - 1, 0)
        return self.calls == 0

    def failed(self) -> None:
        self._latest = min(2 * self._latest or _FIRST_REST, _LONGEST_REST)
        self.calls = self._latest

    def succeeded(self) -> None:
        self._latest = 0


@dataclass(eq=False)
class SolveRecord:
    """What happened at one solve node so far.

    Attributes:
        name: how the log calls it.
        left_alone: whether the latest call ran in the model's own ops, which were the fastest.
        is_differentiated_twice: whether gradients of it were differentiated in turn where the model's own ops do that faster.
        trajectories: the last one, by what a state must have to start from it, where it is kept.
    """

    name: str
    forward_calls: int = 0
    backward_calls: int = 0
    solver_forward: str | None = None
    solver_backward: str | None = None
    latest: SolveStats | None = None
    pending: dict[torch.device, Pending] = field(default_factory=dict)
    fallbacks: int = 0
    fallbacks_backward: int = 0
    left_alone: bool = False
    is_differentiated_twice: bool = False
    rest: Rest = field(default_factory=Rest)
    rest_backward: Rest = field(default_factory=Rest)
    trajectories: dict[Any, Tensor] = field(default_factory=dict, repr=False)
    id: int = field(default_factory=lambda: next(_record_ids))

    def __post_init__(self) -> None:
        _records[self.id] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy is another record, perhaps in another process.
        self.__dict__.update(state, id=next(_record_ids), trajectories={}, pending={})
        self.__post_init__()

    @property
    def last(self) -> SolveStats | None:
        """The latest solve. Those on a GPU are waited for, and the worst since somebody asked is told.

        Solves that a CUDA graph replays are among them, though not among the calls.
        """
        for pending in self.pending.values():
            stats = pending.take()
            self.latest = stats or self.latest
            if stats is not None and stats.fallback is not None:
                self.fallbacks += 1
                log.warning("%s: Newton did not solve all samples: %s", self.name, stats.fallback)
        return self.latest

    def prepare(self, plan: Plan, device: torch.device) -> None:
        """Make what a solve on a GPU writes to, before there may be a CUDA graph around."""
        if plan.queues and device not in self.pending:
            self.pending[device] = Pending.on(device, plan.options.on_failure == "raise")

    def forward(self, solver: str, stats: SolveStats) -> None:
        self.forward_calls += 1
        self.solver_forward, self.latest, self.left_alone = solver, stats, False
        if stats.fallback is not None:
            self.fallbacks += 1
        log.debug(
            "%s: forward by %s, %d iterations, residual %.2e", self.name, solver, stats.iterations, stats.residual
        )

    def queued(self, solver: str, samples: Tensor) -> None:
        """A forward on a GPU, whose stats `[samples, 3]` are not read."""
        self.forward_calls += 1
        self.left_alone = False
        self.solver_forward, self.latest = solver, None if len(samples) else SolveStats(Outcome.CONVERGED)
        if samples.device in self.pending:
            self.pending[samples.device].note(samples)
        log.debug("%s: forward by %s, on its way", self.name, solver)

    def remember(self, trajectory: Tensor) -> None:
        """Keep `[L, *batch, d]` for the next solve of such states to start from."""
        self.trajectories = {place_of(trajectory[0]): trajectory}

    def backward(self, solver: str, fallback: bool) -> None:
        self.backward_calls += 1
        self.solver_backward = solver
        self.fallbacks_backward += fallback
        log.debug("%s: backward by %s", self.name, solver)


def place_of(initial: Tensor) -> Any:
    """What a trajectory from `initial` must have in common with another to start from it."""
    return initial.shape, initial.dtype, initial.device


def record_of(record: int) -> SolveRecord:
    """The node's record; a throw-away one when the node is gone but its compiled code still runs."""
    return _records.get(record) or SolveRecord("a chain whose module is gone")
