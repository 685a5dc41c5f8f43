"""A body without loops: every number is a scalar with a name, and is computed once.

Where a thread holds all numbers of one block there is nothing to index. What is known of the numbers can then be used,
such as that most of a unit vector's are zero: a Jacobian from pulled-back unit vectors costs as little as one that was
derived by hand.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence

from pcr_fx.codegen.functions import FUNCTIONS, REDUCTIONS
from pcr_fx.codegen.ir import Apply, Constant, Expression, Function, Load, Loop, Unprintable, View
from pcr_fx.targets.triton.assignments import Assignment, Known, Scalar, number

# The most scalar operations that compilers get through in seconds.
MAX_OPERATIONS = 6000


class Scalars:
    """Assignments under way, in order; equal ones are made once.

    Args:
        prefix: of the names given.
    """

    def __init__(self, prefix: str = "s") -> None:
        self.prefix = prefix
        self.assignments: list[Assignment] = []
        self._made: dict[tuple[str, tuple[Scalar, ...]], str] = {}

    def run(self, function: Function, inputs: Sequence[Sequence[Scalar]]) -> list[list[Scalar]]:
        """The numbers of every output of `function`, given those of every input.

        An output that is a sum over samples is this sample's part of it.

        Raises:
            Unprintable: the body is too large to be written out.
        """
        memory: dict[str, list[Scalar]] = {}
        for buffer in (*function.outputs, *function.locals):
            memory[buffer.name] = [0.0] * buffer.size
        for buffer, numbers in zip(function.inputs, inputs, strict=True):
            memory[buffer.name] = list(numbers)
        for buffer in function.constants:
            memory[buffer.name] = list(buffer.values or ())
        for loop in function.loops:
            self._run_loop(loop, memory)
        return [memory[buffer.name] for buffer in function.outputs]

    def _run_loop(self, loop: Loop, memory: Mapping[str, list[Scalar]]) -> None:
        results = []
        for indices in itertools.product(*map(range, loop.shape)):
            inner = itertools.product(*map(range, loop.reduced))
            values = [self._evaluate(loop.value, (*indices, *reduced), memory) for reduced in inner]
            results.append((_place(loop.out, indices), self._combined(loop.combine, values)))
        for place, value in results:
            memory[loop.out.buffer.name][place] = value

    def _combined(self, combine: str | None, values: Sequence[Scalar]) -> Scalar:
        if combine is None:
            return values[0]
        if not values:
            return Known.ZERO if combine == "add" else REDUCTIONS[combine].start
        total = values[0]
        for value in values[1:]:
            total = self.apply(combine, total, value)
        return total

    def _evaluate(self, value: Expression, indices: Sequence[int], memory: Mapping[str, list[Scalar]]) -> Scalar:
        if isinstance(value, Load):
            return memory[value.view.buffer.name][_place(value.view, indices)]
        if isinstance(value, Constant):
            return value.value
        assert isinstance(value, Apply)
        return self.apply(value.function, *(self._evaluate(argument, indices, memory) for argument in value.arguments))

    def apply(self, function: str, *arguments: Scalar) -> Scalar:
        """`function(*arguments)`, by name if it has to be computed."""
        simple = _simplified(function, arguments)
        if simple is not None:
            return simple
        key = function, arguments
        if key not in self._made:
            if len(self.assignments) == MAX_OPERATIONS:
                raise Unprintable(f"a block written out has more than {MAX_OPERATIONS} scalar operations")
            self._made[key] = f"{self.prefix}{len(self.assignments)}"
            self.assignments.append(Assignment(self._made[key], function, arguments))
        return self._made[key]

    def dot(self, left: Sequence[Scalar], right: Sequence[Scalar], start: Scalar = Known.ZERO) -> Scalar:
        """`start + sum(left * right)`."""
        for a, b in zip(left, right, strict=True):
            start = self.apply("add", start, self.apply("mul", a, b))
        return start


def _place(view: View, indices: Sequence[int]) -> int:
    return view.offset + sum(index * stride for index, stride in zip(indices, view.strides, strict=True))


def _simplified(function: str, arguments: tuple[Scalar, ...]) -> Scalar | None:
    """The result where it need not be computed."""
    zero, one = Known.ZERO, Known.ONE
    if function == "copy":
        return arguments[0]
    if function in ("neg", "abs") and arguments[0] is zero:
        return zero
    if function == "mul":
        a, b = arguments
        if a is zero or b is zero:
            return zero
        if a is one or b is one:
            return b if a is one else a
    if function == "add" and zero in arguments:
        return arguments[1] if arguments[0] is zero else arguments[0]
    if function == "sub" and arguments[1] is zero:
        return arguments[0]
    if function == "div" and (arguments[0] is zero or arguments[1] is one):
        return arguments[0]
    if function == "where" and arguments[1] == arguments[2] and not isinstance(arguments[1], float):
        return arguments[1]
    fold = FUNCTIONS[function].fold
    if fold is not None and not any(isinstance(argument, str) for argument in arguments):
        return fold(*map(number, arguments))
    return None
