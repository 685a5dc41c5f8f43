"""Kernels without a compiler: what native code is printed from, evaluated by its readable twin in PyTorch.

So a case takes some hundredths of a second in place of the seconds of a compiler, and all but the printer is tried.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pcr_fx.call import Call
from pcr_fx.codegen.interpreter import interpret
from pcr_fx.sweeps import Sweeps
from pcr_fx.targets import CppKernel
from pcr_fx.targets.cpp.launches import gradient_shapes
from pcr_fx.targets.kernel import as_real


@contextlib.contextmanager
def interpreted() -> Iterator[None]:
    """Native kernels go block by block through the interpreter; outputs, which they write by address, come behind them."""
    replaced = {
        "solve": _solve,
        "solve_states": _solve_states,
        "solve_adjoint": _solve_adjoint,
        "is_ready": _is_ready,
    }
    with contextlib.ExitStack() as stack:
        for name, function in replaced.items():
            stack.enter_context(mock.patch.object(CppKernel, name, function))
        stack.enter_context(mock.patch.object(Sweeps, "of", lambda *_: None))
        yield


def _is_ready(self: CppKernel, direction: str, initial: Tensor, wanted: Any = None) -> bool:
    return direction != "newton"


def _solve_states(self: CppKernel, call: Call, blocks: Sequence[int], threads: int | None = None) -> Sequence[Tensor]:
    trajectory = _solve(self, call)
    return [trajectory[block].clone() for block in blocks]


def _solve(self: CppKernel, call: Call, threads: int | None = None) -> Tensor:
    state = call.initial.reshape(-1, self.body.dimension)
    trajectory = []
    for block in range(call.length):
        (state,) = interpret(self.lowered.step, [state, *_inputs(self, call, block, len(state))])
        trajectory.append(state.reshape(call.initial.shape))
    return torch.stack(trajectory)


def _solve_adjoint(
    self: CppKernel,
    call: Call,
    trajectory: Tensor,
    cotangents: Tensor | Mapping[int, Tensor],
    threads: int | None = None,
    results: Sequence[Any] = (),
    wanted: tuple[bool, ...] | None = None,
) -> list[Tensor]:
    body = self._body_for(wanted)
    previous = torch.cat([call.initial.unsqueeze(0), trajectory[:-1]]).reshape(call.length, -1, self.body.dimension)
    adjoint = torch.zeros_like(previous[0])
    shapes = gradient_shapes(body, call.length, call.initial.shape[: len(self.body.batch_dims)])
    gradients = [None if shape is None else call.initial.new_zeros(shape) for shape in shapes]
    for block in reversed(range(call.length)):
        given = cotangents[block] if isinstance(cotangents, Tensor) else cotangents.get(block)
        adjoint = adjoint if given is None else adjoint + given.reshape(adjoint.shape)
        inputs = _inputs(self, call, block, len(adjoint))
        adjoint, *parts = interpret(body.pullback, [previous[block], *inputs, adjoint])
        waiting = iter(parts)
        for one, gradient in zip(body.inputs, gradients, strict=True):
            if gradient is not None:
                place = gradient if one.shared else gradient[block]
                place += next(waiting).reshape(place.shape)
    return [adjoint.reshape(call.initial.shape), *(gradient for gradient in gradients if gradient is not None)]


def _inputs(self: CppKernel, call: Call, block: int, samples: int) -> list[Tensor]:
    """Of one block: `[samples, size]` where each sample has its own, else `[size]`."""
    tensors: list[Any] = [*((o if isinstance(o, Tensor) else o.tensors)[block] for o in call.operands), *call.shared]
    shapes = [(samples, -1) if one.own else (-1,) for one in self.lowered.inputs]
    return [as_real(tensor, self.program.dtype).reshape(shape) for tensor, shape in zip(tensors, shapes, strict=True)]
