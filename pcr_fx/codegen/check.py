"""Whether a function of the language of kernels keeps the rules that all printers take for granted."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence

import numpy as np

from pcr_fx.codegen.functions import FUNCTIONS, REDUCTIONS
from pcr_fx.codegen.ir import Apply, Buffer, Expression, Function, Loop, View, places, views


class MalformedFunction(AssertionError):
    """A mistake in what made the function: no body may lead to it."""


def is_checking() -> bool:
    """Whether everything that is lowered is to be checked: `PCR_FX_CHECK=1`."""
    return os.environ.get("PCR_FX_CHECK") == "1"


def check(function: Function) -> None:
    """Check a function.

    Raises:
        MalformedFunction: a loop has views of another rank than its own, or past the end of a buffer; it reads what is
            written later, or by itself; it writes to an input, to a constant, or twice to a number at once; it applies
            an unknown function, or one with a wrong number of arguments; a buffer that all samples share is computed
            from what each sample has; two buffers have one name; or an output is not written, each number once.
    """
    _Check(function).run()


class _Check:
    """Goes through the loops in order.

    Attributes:
        writes: by the name of a local or an output, how often each number of it has been written.
    """

    def __init__(self, function: Function) -> None:
        self.function = function
        self.writes = {
            buffer.name: np.zeros(buffer.size, dtype=np.int64) for buffer in (*function.locals, *function.outputs)
        }

    def run(self) -> None:
        self._names()
        for number, loop in enumerate(self.function.loops):
            try:
                self._loop(loop)
            except MalformedFunction as error:
                raise MalformedFunction(f"loop {number}, which writes {loop.out.buffer.name}: {error}") from None
        for buffer in self.function.outputs:
            if (self.writes[buffer.name] != 1).any():
                raise MalformedFunction(f"{buffer.name} is not written once, but {self.writes[buffer.name].tolist()}")

    def _names(self) -> None:
        used = {view.buffer for loop in self.function.loops for view in (loop.out, *views(loop.value))}
        names = [buffer.name for buffer in used.union(self.function.inputs, self.function.outputs)]
        if len(set(names)) < len(names):
            raise MalformedFunction(f"two buffers have one name among {sorted(names)}")

    def _loop(self, loop: Loop) -> None:
        if loop.combine not in (REDUCTIONS if loop.reduced else [None]):
            raise MalformedFunction(f"over {loop.reduced} it combines by {loop.combine}")
        _check_functions(loop.value)
        for view in views(loop.value):
            self._read(view, (*loop.shape, *loop.reduced), loop.out.buffer)
        self._write(loop.out, loop.shape)

    def _read(self, view: View, space: Sequence[int], out: Buffer) -> None:
        buffer, place = view.buffer, _places(view, space)
        if buffer.name == out.name:
            raise MalformedFunction("it reads what it writes")
        if buffer.varying and not out.varying and out not in self.function.outputs:
            raise MalformedFunction(f"all samples share it, and each has its own {buffer.name}")
        if buffer.values is not None or buffer in self.function.inputs:
            return
        if buffer.name not in self.writes or (self.writes[buffer.name][place] == 0).any():
            raise MalformedFunction(f"it reads {buffer.name} before that is written")

    def _write(self, out: View, shape: Sequence[int]) -> None:
        buffer, place = out.buffer, _places(out, shape)
        if buffer.values is not None or buffer in self.function.inputs:
            raise MalformedFunction("it writes to an input or a constant")
        written = np.bincount(place.ravel(), minlength=buffer.size)
        if place.size < math.prod(shape) or (written > 1).any():
            raise MalformedFunction("it writes more than once to a number")
        self.writes[buffer.name] += written


def _places(view: View, space: Sequence[int]) -> np.ndarray:
    """Where a view is in its buffer: each place once along axes that it does not move on."""
    if len(view.strides) != len(space):
        raise MalformedFunction(f"a view of {view.buffer.name} has the strides {view.strides} over {tuple(space)}")
    moving = [min(size, 1) if stride == 0 else size for size, stride in zip(space, view.strides, strict=True)]
    place = places(view, moving)
    if place.size and not 0 <= int(place.min()) <= int(place.max()) < view.buffer.size:
        raise MalformedFunction(f"a view of {view.buffer.name} leaves its {view.buffer.size} numbers")
    return place


def _check_functions(value: Expression) -> None:
    for one in _applications(value):
        if one.function not in FUNCTIONS:
            raise MalformedFunction(f"there is no function {one.function}")
        if len(one.arguments) != FUNCTIONS[one.function].arity:
            raise MalformedFunction(f"{one.function} takes {FUNCTIONS[one.function].arity} arguments: {one.arguments}")


def _applications(value: Expression) -> Iterator[Apply]:
    if isinstance(value, Apply):
        yield value
        for argument in value.arguments:
            yield from _applications(argument)
