"""How views are cut from what they are views of: by integers, slices, `select` and `narrow`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx

from pcr_fx.graphs.nodes import is_pytorchs, op_name


@dataclass(frozen=True)
class Step:
    """`x.select(dim, start)`, or `x.narrow(dim, start, stop - start)`."""

    dim: int
    start: int
    stop: int
    selects: bool


# How a view is cut from a memory; () is all of it.
Path = tuple[Step, ...]


def value_of(node: Any) -> Any:
    return node.meta.get("example_value") if isinstance(node, fx.Node) else None


def known_sizes(value: torch.Tensor) -> tuple[int, ...] | None:
    """The shape of a tensor, if a compiler leaves none of it open."""
    return tuple(value.shape) if all(type(size) is int for size in value.shape) else None


def is_view(node: fx.Node) -> bool:
    known = node.op == "call_method" or (node.op == "call_function" and is_pytorchs(node.target))
    return known and op_name(node) in ("getitem", "select", "narrow") and not node.kwargs and len(node.args) > 1


def cut_of(node: fx.Node) -> Path | None:
    """How a view is cut from its input; `None` where that is not known."""
    whole, *rest = node.args
    value, where = value_of(whole), [*rest]
    if not isinstance(value, torch.Tensor):
        return None
    if op_name(node) == "getitem":
        return cut_by(where[0], value)
    numbers = [number for number in where if type(number) is int]
    if len(numbers) < len(where) or known_sizes(value) is None:
        return None
    dim, index, *lengths = numbers
    dim %= value.dim()
    start = index + value.shape[dim] if index < 0 else index
    if op_name(node) == "select" and not lengths:
        return (Step(dim, start, start + 1, True),)
    if op_name(node) == "narrow" and len(lengths) == 1:
        return (Step(dim, start, start + lengths[0], False),)
    return None


def cut_by(index: Any, value: Any) -> Path | None:
    """What `x[index]` cuts: integers, and slices without a step."""
    items = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(value, torch.Tensor) or (shape := known_sizes(value)) is None:
        return None
    if any(item is Ellipsis for item in items):
        at = next(number for number, item in enumerate(items) if item is Ellipsis)
        items[at : at + 1] = [slice(None)] * (len(shape) - len(items) + 1)
    steps, dim, size = [], 0, iter(shape)
    for item in items:
        length = next(size, 0)
        if type(item) is int:
            start = item + length if item < 0 else item
            steps.append(Step(dim, start, start + 1, True))
            continue
        if not isinstance(item, slice) or not all(
            part is None or type(part) is int for part in (item.start, item.stop, item.step)
        ):
            return None
        start, stop, step = item.indices(length)
        if step != 1 or stop < start:
            return None
        if (start, stop) != (0, length):
            steps.append(Step(dim, start, stop, False))
        dim += 1
    return tuple(steps)


def shape_behind(shape: Sequence[int], step: Step) -> list[int]:
    middle = [] if step.selects else [step.stop - step.start]
    return [*shape[: step.dim], *middle, *shape[step.dim + 1 :]]
