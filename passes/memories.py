"""What a piece of memory holds while a graph goes by: values of its parts, put together where they are read."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pcr_fx.passes.cuts import Path, Step, shape_behind, value_of


class Memory:
    """What a piece of memory holds, as values: one for all of it, and later ones of parts along one dimension.

    Args:
        value: what it holds at first.
        shape: the sizes of that.
        emit: makes values of values.
    """

    def __init__(self, value: Any, shape: Sequence[int], emit: Emit) -> None:
        self.value, self.shape, self.emit = value, list(shape), emit
        self.dim = 0
        # By where they start; and whether each is one of the entries along the dimension.
        self.parts: dict[int, Part] = {}
        self.rows_only = True

    def read(self, path: Path = ()) -> Any:
        """The value of a part."""
        if not path:
            return self._whole()
        first, rest = path[0], path[1:]
        if first.dim != self.dim:
            self._whole()
        part = self._known(first)
        if part is not None:
            return part.held.read(rest)
        return functools.reduce(self.emit.cut, rest, self._cut(first))

    def write(self, path: Path, value: Any) -> None:
        """Have a part hold another value, of the same shape."""
        if not path:
            self.value, self.parts = value, {}
            return
        first, rest = path[0], path[1:]
        if first.dim != self.dim:
            self._whole()
        part = self._known(first)
        if part is None:
            held = Memory(self._cut(first) if rest else value, shape_behind(self.shape, first), self.emit)
            part = Part(first, held)
            self._make_room(first)
            self.parts[first.start] = part
            self.rows_only &= first.selects
        self.dim = first.dim
        part.held.write(rest, value)

    def _known(self, step: Step) -> Part | None:
        part = self.parts.get(step.start)
        return part if part is not None and part.step == step else None

    def _touched(self, step: Step) -> list[Part]:
        """The parts that `step` has something of, in order."""
        if self.rows_only and step.stop - step.start <= len(self.parts):
            return [self.parts[start] for start in range(step.start, step.stop) if start in self.parts]
        touched = (part for part in self.parts.values() if part.step.start < step.stop and step.start < part.step.stop)
        return sorted(touched, key=lambda part: part.step.start)

    def _make_room(self, step: Step) -> None:
        touched = self._touched(step)
        if all(step.start <= part.step.start and part.step.stop <= step.stop for part in touched):
            for part in touched:
                del self.parts[part.step.start]
        else:
            self._whole()

    def _cut(self, step: Step) -> Any:
        """What `step` cuts, along the dimension of the parts if there are any."""
        touched = self._touched(step)
        if not touched:
            return self.emit.cut(self.value, step)
        if len(touched) == step.stop - step.start and all(part.step.selects for part in touched):
            rows = self.emit.stack([part.held.read() for part in touched], self.dim)
            return self.emit.cut(rows, Step(step.dim, 0, 1, True)) if step.selects else rows
        only = touched[0].step
        if len(touched) == 1 and not only.selects and only.start <= step.start and step.stop <= only.stop:
            first = step.start - only.start
            return touched[0].held.read((Step(step.dim, first, first + step.stop - step.start, step.selects),))
        return self.emit.cut(self._whole(), step)

    def _whole(self) -> Any:
        if self.parts:
            self.value = self.emit.join(
                self.value, self.shape, self._touched(Step(self.dim, 0, self.shape[self.dim], False))
            )
            self.parts = {}
        return self.value


@dataclass(frozen=True, eq=False)
class Part:
    """What was written to a part of a memory."""

    step: Step
    held: Memory


class Emit:
    """Makes no values, and counts what would be copied."""

    def __init__(self) -> None:
        self.copies = 0

    def cut(self, whole: Any, step: Step) -> Any:
        return whole

    def stack(self, values: Sequence[Any], dim: int) -> Any:
        self.copies += len(values) > 1

    def join(self, whole: Any, shape: Sequence[int], parts: Sequence[Part]) -> Any:
        """All of a memory, of parts that lie along one dimension, in order."""
        self.copies += 1


class EmitNodes(Emit):
    """Makes nodes, in front of one of the graph."""

    def __init__(self, before: fx.Node) -> None:
        super().__init__()
        self.before = before

    def call(self, target: str | Callable[..., Any], *args: Any) -> fx.Node:
        """A call of a method by its name, or of a function."""
        graph, op = self.before.graph, "call_method" if isinstance(target, str) else "call_function"
        with graph.inserting_before(self.before):
            node = graph.create_node(op, target, args)
        run = getattr(torch.Tensor, target) if isinstance(target, str) else target
        with torch.no_grad():
            node.meta = {**self.before.meta, "example_value": run(*fx.node.map_arg(args, value_of))}
        return node

    def cut(self, whole: Any, step: Step) -> Any:
        if step.selects:
            return self.call(torch.select, whole, step.dim, step.start)
        return self.call(torch.narrow, whole, step.dim, step.start, step.stop - step.start)

    def stack(self, values: Sequence[Any], dim: int) -> Any:
        return self.call(torch.stack, list(values), dim)

    def join(self, whole: Any, shape: Sequence[int], parts: Sequence[Part]) -> Any:
        """Rows next to each other are stacked, and what no part covers is cut from `whole`."""
        dim, at, pieces = parts[0].step.dim, 0, list[Any]()
        rows: list[Any] = []
        for part in [*parts, None]:
            start = part.step.start if part is not None else shape[dim]
            if rows and (part is None or at < start or not part.step.selects):
                pieces.append(self.stack(rows, dim))
                rows = []
            if at < start:
                pieces.append(self.cut(whole, Step(dim, at, start, False)))
            if part is not None:
                (rows if part.step.selects else pieces).append(part.held.read())
                at = part.step.stop
        return pieces[0] if len(pieces) == 1 else self.call(torch.cat, pieces, dim)
