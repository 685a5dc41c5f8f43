"""What is timed in rounds, made of a call of a chain: the model's own ops, what ways need beside them, and ways."""

from __future__ import annotations

import contextlib
import inspect
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from pcr_fx.call import Call
from pcr_fx.planner.choice import ADAM, FUSED_ADAM, HANDING, NODE_SECONDS, STACKING
from pcr_fx.planner.rounds import Entrant, Series, once
from pcr_fx.solvers import Settings, blocks
from pcr_fx.ways import EAGER, Backward, Case, Forward

# Bytes of gradients from which on it matters whether they are added to those that there are: caches hold no more.
_LARGE_GRADIENTS = 2**23
# Past the hooks that others have on the steps of all optimizers, and past what turns gradients off.
_STEP = inspect.unwrap(torch.optim.Adam.step)
# In place of a direction: the way back where gradients are added.
ADDING = "backward, adding"


@contextlib.contextmanager
def _as_in_training() -> Iterator[None]:
    """As an optimizer steps: where a model is being compiled it would take other ops, which a compiler can read."""
    flag = "_is_compiling_flag"
    before = getattr(torch.compiler, flag, False)
    setattr(torch.compiler, flag, False)
    try:
        with torch.no_grad():
            yield
    finally:
        setattr(torch.compiler, flag, before)


class Entrants:
    """Makes them.

    Args:
        call: of the shapes and on the device that matter.
        needs_gradient: whether there is a way back.
        are_stacked: whether operands came from the blocks' own tensors, which each call has to stack again.
    """

    def __init__(self, case: Case, settings: Settings, call: Call, needs_gradient: bool, are_stacked: bool) -> None:
        self.case, self.settings = case, settings
        operands, shared = ([tensor.detach() for tensor in group] for group in (call.operands, call.shared))
        self.call = call._replace(initial=call.initial.detach(), operands=operands, shared=shared)
        self.needs_gradient, self.are_stacked = needs_gradient, are_stacked
        program = case.program
        # Whose gradients are asked for, of operands, numbers that blocks differ by, and shared operands.
        self.asked = [*program.differentiable_operands, *(False for _ in program.literals)]
        self.asked_shared = program.differentiable_shared
        self.directions = ("forward", "backward") if needs_gradient else ("forward",)

    def _series(self, fixed: float = 0.0) -> Series:
        return Series(self.case.program.length, fixed)

    def eager(self) -> Entrant:
        series = {(EAGER, direction): self._series() for direction in self.directions}
        if self._adds:
            series[EAGER, ADDING] = self._series()
        entrant = Entrant(self._eager_call, series)
        program = self.case.program
        if program.chain.own_op is not None:  # of which a few blocks tell nothing
            entrant.take(program.length)
        return entrant

    @property
    def _adds(self) -> bool:
        """Whether there are so many gradients that it costs something to add them to others."""
        pairs = [*zip(self.call.shared, self.asked_shared, strict=True)]
        pairs += zip(self.call.operands, self.asked, strict=True) if self.are_stacked else ()
        return self.needs_gradient and sum(one.nbytes for one, asked in pairs if asked) > _LARGE_GRADIENTS

    def _eager_call(self, count: int) -> Callable[[], dict[Any, float]]:
        forward = self._eager_forward(count)

        def call() -> dict[Any, float]:
            began = self._clock()
            out, leaves = forward()
            taken = {(EAGER, "forward"): self._clock() - began}
            moved = [one for one in out if one.requires_grad]
            if self.needs_gradient:
                taken |= {(EAGER, way): seconds for way, seconds in self._backwards(moved, leaves).items()}
            return taken

        return call

    def _backwards(self, outputs: list[Tensor], leaves: list[Tensor], gradients: Any = None) -> dict[str, float]:
        """The seconds of a backward as training has it: of gradients that there were none of, or that are added to others."""
        gradients = [torch.ones_like(one) for one in outputs] if gradients is None else gradients
        taken = {}
        for mode in ("backward", *((ADDING,) if self._adds else ())):
            if mode == ADDING:
                for leaf in leaves:
                    leaf.grad = torch.zeros_like(leaf)
            began = self._clock()
            if mode == "backward":
                for leaf in leaves:
                    leaf.grad = None
            if outputs:
                torch.autograd.backward(outputs, gradients, retain_graph=self._adds)
            taken[mode] = self._clock() - began
        return taken

    def _clock(self) -> float:
        if self.call.initial.device.type == "cuda":
            torch.cuda.synchronize(self.call.initial.device)
        return time.perf_counter()

    def _eager_forward(self, count: int) -> Callable[[], tuple[Any, list[Tensor]]]:
        program, call = self.case.program, self.call.first(count)
        if program.chain.own_op is not None:
            return self._own_op_forward(program.chain.own_op, count)
        each = [tuple(map(self._leaf, block, self.asked)) for block in blocks(call.operands, count)]
        states = [self._leaf(state) for state in program.layout.unflatten(call.initial)]
        shared = list(map(self._leaf, call.shared, self.asked_shared))
        inputs = [t for group in (states, shared, *each) for t in group if t.requires_grad]

        def run() -> tuple[Any, list[Tensor]]:
            present: Any = states
            with torch.set_grad_enabled(self.needs_gradient):
                for block in each:
                    present = program.chain.body.forward(*present, *block, *shared)
            return present, inputs

        return run

    def _own_op_forward(self, own_op: Callable[..., Any], count: int) -> Callable[[], tuple[Any, list[Tensor]]]:
        call = self.call.first(count)
        states = [self._leaf(state) for state in self.case.program.layout.unflatten(call.initial)]
        operands = list(map(self._leaf, call.operands, self.asked))
        shared = list(map(self._leaf, call.shared, self.asked_shared))
        inputs = [tensor for tensor in (*states, *operands, *shared) if tensor.requires_grad]

        def run() -> tuple[Any, list[Tensor]]:
            with torch.set_grad_enabled(self.needs_gradient):
                return own_op(states, operands, shared), inputs

        return run

    def stacking(self) -> Entrant:
        """What it costs that operands are the blocks' own tensors, beside any solver."""
        series = {(STACKING, "forward"): self._series()}
        if self.needs_gradient:
            series[HANDING, "backward"] = self._series()
        if self._adds:
            series[HANDING, ADDING] = self._series()
        return Entrant(self._stacking_call, series)

    def _stacking_call(self, count: int) -> Callable[[], dict[Any, float]]:
        pairs = zip(self.call.first(count).operands, self.asked, strict=True)
        parts = [[self._leaf(part, asked) for part in operand.unbind(0)] for operand, asked in pairs]
        leaves = [part for operand in parts for part in operand if part.requires_grad]
        gradients: list[Tensor] = []

        def call() -> dict[Any, float]:
            began = self._clock()
            with torch.set_grad_enabled(self.needs_gradient):
                stacked = [torch.stack(part) for part in parts]
            taken = {(STACKING, "forward"): self._clock() - began}
            if self.needs_gradient:
                outputs = [operand for operand in stacked if operand.requires_grad]
                gradients[:] = gradients or [torch.ones_like(operand) for operand in outputs]
                taken |= {(HANDING, way): s for way, s in self._backwards(outputs, leaves, gradients).items()}
            return taken

        return call

    def optimizing(self) -> Entrant:
        """What an optimizer's step over the blocks' own tensors costs."""
        return Entrant(self._optimizing_call, {(name, "backward"): self._series() for name in (ADAM, FUSED_ADAM)})

    def _optimizing_call(self, count: int) -> Callable[[], dict[Any, float]]:
        pairs = zip(self.call.first(count).operands, self.asked, strict=True)
        operands = [operand for operand, asked in pairs if asked]
        leaves = [part.clone().requires_grad_() for operand in operands for part in operand.unbind(0)]
        for leaf in leaves:
            leaf.grad = torch.zeros_like(leaf)
        optimizers = {ADAM: torch.optim.Adam(leaves), FUSED_ADAM: torch.optim.Adam(leaves, fused=True)}
        with _as_in_training():
            for optimizer in optimizers.values():
                _STEP(optimizer)  # which makes the moments

        def call() -> dict[Any, float]:
            device = self.call.initial.device
            with _as_in_training():
                return {(name, "backward"): once(partial(_STEP, one), device) for name, one in optimizers.items()}

        return call

    def _leaf(self, tensor: Tensor, asked: bool = True) -> Tensor:
        # An inference tensor's copy is none.
        plain = tensor.clone() if tensor.is_inference() else tensor.detach()
        return plain.requires_grad_(self.needs_gradient and asked and tensor.is_floating_point())

    def simple(
        self, way: Forward | Backward, direction: str, make: Callable[[int], Callable[[], Any]], scales: bool = False
    ) -> Entrant:
        """An entrant that does one thing; to be timed on some of the blocks, or else on all of them."""
        device, length = self.call.initial.device, self.case.program.length

        def timed(count: int) -> Callable[[], dict[Any, float]]:
            run = make(count)
            return lambda: {(way.name, direction): once(run, device)}

        series = {(way.name, direction): self._series(NODE_SECONDS[direction])}
        is_shared = way.is_shared(self.case, direction)
        entrant = Entrant(
            timed,
            series,
            is_shared,
            is_alone=bool(way.kind) and not way.iterates and not is_shared,
            adds_nothing=way.adds_nothing,
        )
        if not scales:
            entrant.take(length)
        return entrant

    def by(self, way: Forward | Backward, direction: str, count: int) -> Callable[[], Any]:
        """What goes by a way through the first `count` blocks."""
        call = self.call if count == self.call.length else self.call.first(count)
        if direction == "forward":
            assert isinstance(way, Forward)
            return partial(way.solve, self.case.program, call, self.settings)
        assert isinstance(way, Backward)
        trajectory = call.initial.unsqueeze(0).repeat(count, *(1 for _ in call.initial.shape))
        ones = torch.ones_like(trajectory)
        return partial(way.solve_adjoint, self.case.program, call, trajectory, ones, self.settings)
