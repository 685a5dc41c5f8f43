"""Native code made ready to be called: what calls of as many blocks and samples have in common is worked out once.

A call then says where its tensors lie. What may differ from call to call (an operand's dtype, its size, how it lies) is asked
at each, so that there is nothing of a call before that another could be wrong about.
"""

from __future__ import annotations

import ctypes
import struct
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import chain
from typing import Any

import torch
from torch import Tensor

from pcr_fx.call import Call
from pcr_fx.targets.cpp.memory import empty
from pcr_fx.targets.cpp.pointers import address_in
from pcr_fx.targets.cpp.results import NOWHERE, Words
from pcr_fx.targets.cpp.threads import Team, available_threads
from pcr_fx.targets.kernel import Input, LoweredBody, as_real

Run = Callable[[bytes], None]

# Where in the words of a call its fields are, in the order of `Call` in call.h.
_THREADS, _INITIAL, _TRAJECTORY, _ROWS, _COTANGENTS, _D_INITIAL, _ITERATION, _INPUTS = 2, 3, 4, 5, 6, 9, 10, 11
_COLUMN = 3  # words


class Launch:
    """One direction of a kernel, for calls of so many blocks and samples.

    Args:
        run: the compiled function.
        body: what it was printed from.
        kind: the direction, and how many blocks and samples.
        feeds: how many threads the work feeds, of however many there are.
        team: of the kernel.
        gradients: the shape of the gradient of each input, `None` where there is none; of an adjoint alone.
    """

    def __init__(
        self,
        run: Run,
        body: LoweredBody,
        kind: tuple[str, int, int],
        feeds: int,
        team: Team,
        gradients: Sequence[tuple[int, ...] | None] = (),
    ) -> None:
        self.run, self.kind, self.feeds, self.team, self.gradients = run, kind, feeds, team, tuple(gradients)
        _, self.length, samples = kind
        self.dtype = body.program.dtype
        self.operands = [_expected(one, samples, self.length) for one in body.inputs if not one.shared]
        self.shared = [_expected(one, samples, 1) for one in body.inputs if one.shared]
        self._nowhere = NOWHERE * len(body.results)
        steps = [0 if one.shared else _numbers(one, samples) * self.dtype.itemsize for one in body.inputs]
        self._words = [self.length, samples, 1, *(0 for _ in range(_INPUTS - 3))]
        self._words += chain.from_iterable((0, step, 0) for step in steps)
        count = len(self._words) + len(self._nowhere) + len(self.gradients)
        self._pack = struct.Struct(f"{count}q").pack
        self._table = ctypes.c_void_p * self.length

    def forward(
        self,
        call: Call,
        initial: Tensor,
        states: Tensor | None,
        rows: Tensor | None = None,
        results: Sequence[Words] = (),
        threads: int | None = None,
    ) -> None:
        """Go through the blocks.

        Args:
            initial: the initial state, contiguous.
            states: gets the trajectory, or the rows of it that are wanted.
            rows: which row each block's state is, -1 where nobody wants it; without it each block has its own.
            results: where each state, then each output is to be.
            threads: as many as may be used; `None` for as many as the work feeds.
        """
        words, kept = self._located(call)
        words[_INITIAL] = initial.data_ptr()
        if states is not None:
            words[_TRAJECTORY] = states.data_ptr()
        if rows is not None:
            words[_ROWS] = rows.data_ptr()
        words += chain.from_iterable(results) if results else self._nowhere
        self._go(words, kept, threads)

    def newton(self, call: Call, initial: Tensor, trajectory: Tensor, iteration: Any) -> None:
        """Solve for the trajectory.

        Args:
            iteration: the numbers that the iteration is told, and tells.
        """
        words, kept = self._located(call)
        words[_INITIAL], words[_TRAJECTORY] = initial.data_ptr(), trajectory.data_ptr()
        words[_ITERATION] = ctypes.addressof(iteration)
        self._go([*words, *self._nowhere], kept, None)

    def adjoint(
        self,
        call: Call,
        initial: Tensor,
        trajectory: Tensor,
        cotangents: Tensor | Mapping[int, Tensor],
        results: Sequence[Words] = (),
        threads: int | None = None,
    ) -> list[Tensor]:
        """The gradients of the initial state, and of the inputs that have any.

        Args:
            initial, trajectory: contiguous.
            cotangents: of all states, or of some by block.
            results: those of each state and output that is told apart from these.
            threads: as for `forward`.
        """
        words, kept = self._located(call)
        d_initial = torch.empty_like(initial)
        words[_INITIAL], words[_TRAJECTORY], words[_D_INITIAL] = (
            initial.data_ptr(),
            trajectory.data_ptr(),
            d_initial.data_ptr(),
        )
        self._tell(words, kept, cotangents)
        words += chain.from_iterable(results) if results else self._nowhere
        made = [d_initial]
        for shape in self.gradients:
            if shape is None:
                words.append(0)
            else:
                gradient = empty(initial, shape)
                made.append(gradient)
                words.append(gradient.data_ptr())
        self._go(words, kept, threads)
        return made

    def _tell(self, words: list[int], kept: list[Any], cotangents: Tensor | Mapping[int, Tensor]) -> None:
        """Where the cotangents of states lie."""
        if isinstance(cotangents, Tensor):
            dense = cotangents.contiguous()
            kept.append(dense)
            words[_COTANGENTS], words[_COTANGENTS + 1] = dense.data_ptr(), dense.stride(0) * dense.element_size()
            return
        table = self._table()
        kept.append(table)
        for block, cotangent in cotangents.items():
            cotangent = cotangent.contiguous()
            kept.append(cotangent)
            table[block] = cotangent.data_ptr()
        words[_COTANGENTS + 2] = ctypes.addressof(table)

    def _located(self, call: Call) -> tuple[list[int], list[Any]]:
        """The words of a call up to its inputs, these filled in, and what is to be kept until the call is over.

        Native code reads what it was compiled for: that much has to be there.
        """
        words, kept, dtype, at = self._words.copy(), list[Any](), self.dtype, _INPUTS
        assert call.length == self.length, "another launch is for so many blocks"
        for operand, numbers in zip(call.operands, self.operands, strict=True):
            if not isinstance(operand, Tensor):
                words[at : at + _COLUMN] = operand.words
            else:
                if operand.dtype is not dtype or not operand.is_contiguous():
                    operand = as_real(operand, dtype).contiguous()
                    kept.append(operand)
                assert operand.numel() == numbers, "another kernel is for these sizes"
                words[at] = operand.data_ptr()
            at += _COLUMN
        for tensor, numbers in zip(call.shared, self.shared, strict=True):
            tensor = as_real(tensor, dtype).contiguous()
            assert tensor.numel() == numbers, "another kernel is for these sizes"
            memory = tensor.untyped_storage()  # the tensor may get another from another thread
            words[at] = address_in(memory, tensor)
            kept += (tensor, memory)
            at += _COLUMN
        return words, kept

    def _go(self, words: list[int], kept: list[Any], threads: int | None) -> None:
        """Call native code; `kept` lives until it is done."""
        if self.feeds == 1:
            self.run(self._pack(*words))
            return
        fed = min(threads or self.feeds, available_threads(), self.feeds)
        is_shared = fed > 1 and self.team.may_share(self.kind)
        words[_THREADS] = fed if is_shared else 1
        self.team.call(partial(self.run, self._pack(*words)), self.kind, is_shared)


def _numbers(one: Input, samples: int) -> int:
    return one.size * samples if one.own else one.size


def _expected(one: Input, samples: int, length: int) -> int:
    """The numbers that an input is made of."""
    return _numbers(one, samples) * length


def gradient_shapes(body: LoweredBody, length: int, batch: Sequence[int]) -> list[tuple[int, ...] | None]:
    """The shape of the gradient of every operand, literal (which has none) and shared operand; `None` where there is none.

    Args:
        length: how many blocks.
        batch: the sizes of the dimensions that tell samples apart.
    """
    program, rank = body.program, len(body.body.batch_dims)
    operands, literals = len(program.signature.operands), len(program.literals)
    specs = [*program.signature.operands, *(None for _ in range(literals)), *program.signature.shared]
    shapes: list[tuple[int, ...] | None] = []
    for index, (one, spec) in enumerate(zip(body.inputs, specs, strict=True)):
        if spec is None or not one.differentiable:
            shapes.append(None)
            continue
        shape = (*batch, *spec.shape[rank:]) if one.own else spec.shape
        shapes.append((length, *shape) if index < operands else shape)
    return shapes
