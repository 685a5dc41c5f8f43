"""Functions of the language of kernels with less in them that compute the same."""

from __future__ import annotations

from collections.abc import Sequence

from pcr_fx.codegen.check import check, is_checking
from pcr_fx.codegen.ir import Apply, Buffer, Constant, Expression, Function, Load, Loop, views


def with_constants(loop: Loop) -> Loop:
    """The loop with a constant tensor whose numbers are all the same as that number."""
    return Loop(loop.out, loop.shape, _folded(loop.value), loop.reduced, loop.combine)


def _folded(value: Expression) -> Expression:
    if isinstance(value, Load):
        values = value.view.buffer.values
        return Constant(values[0]) if values and len(set(values)) == 1 else value
    if isinstance(value, Apply):
        return Apply(value.function, tuple(map(_folded, value.arguments)))
    return value


def restricted(function: Function, outputs: Sequence[Buffer]) -> Function:
    """The function of these outputs alone: without the loops that only others need."""
    needed, loops = {buffer.name for buffer in outputs}, []
    for loop in reversed(function.loops):
        if loop.out.buffer.name in needed:
            loops.append(loop)
            needed.update(view.buffer.name for view in views(loop.value))
    part = Function(function.inputs, tuple(outputs), tuple(reversed(loops)))
    if is_checking():
        check(part)
    return part
