"""Truth values and whole numbers that are carried from block to block, as real numbers: a chain as it is solved.

A truth value is 1 or 0 among its states, and anything but 0 is true. Neither has a derivative either way.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.chain import Chain


@dataclass(frozen=True)
class Whole:
    """A state of truth values or whole numbers.

    Attributes:
        size: the largest absolute value that there may be.
    """

    dtype: torch.dtype
    size: int = 1


def carry_numbers(chain: Chain, wholes: Sequence[Whole | None], like: int) -> Chain:
    """`chain` with real numbers in place of those of its states that are truth values or whole numbers.

    Args:
        wholes: of each state what it is, if it is one.
        like: a state of real numbers, whose dtype they get.
    """

    def between(body: fx.GraphModule, groups: int, returned: Sequence[Whole | None]) -> fx.GraphModule:
        return _between_numbers(body, tuple(wholes) * groups, returned, like)

    head, written = chain.head, chain.as_written
    if head is not None:
        head = replace(head, body=between(head.body, 2, ()), block=between(head.block, 1, wholes))
    if written is not None:
        written = carry_numbers(written[0], wholes, like), written[1]
    return replace(chain, body=between(chain.body, 1, wholes), head=head, as_written=written)


def number_of_whole(whole: Tensor, like: Tensor) -> Tensor:
    """The same in the dtype of another tensor: 1 and 0 for what is true and false."""
    return whole.type_as(like)


def whole_of_number(
    numbers: Tensor | list[Tensor], dtype: torch.dtype, size: int | None = None
) -> Tensor | list[Tensor]:
    """The reverse, of what a solve node returned: of a list where it returned one.

    Args:
        size: the largest absolute value that there may be, for those who want to know it beforehand.
    """
    if isinstance(numbers, list):
        return [_whole(one, dtype, size) for one in numbers]
    return _whole(numbers, dtype, size)


def _whole(numbers: Tensor, dtype: torch.dtype, size: int | None) -> Tensor:
    if dtype == torch.bool:
        return numbers != 0
    whole = numbers.to(torch.int64)
    return (whole if size is None else whole.clamp(-size, size)).to(dtype)


def _between_numbers(
    body: fx.GraphModule, given: Sequence[Whole | None], returned: Sequence[Whole | None], like: int
) -> fx.GraphModule:
    """`body` that takes and returns real numbers where it is said to have others; behind those it has no more."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = list(body.graph.find_nodes(op="placeholder"))
    made = [graph.placeholder(str(node.target)) for node in inputs]
    more = (None,) * (len(inputs) - len(given))
    for node, new, whole in zip(inputs, made, (*given, *more), strict=True):
        # What nobody reads is not computed either: a head asks which of the states it reads.
        copies[node] = (
            graph.call_function(whole_of_number, (new, whole.dtype, whole.size)) if whole and node.users else new
        )
    results: Any = graph.graph_copy(body.graph, copies)
    more = (None,) * (len(results) - len(returned))
    pairs = zip(results, (*returned, *more), strict=True)
    graph.output(
        tuple(
            one if whole is None else graph.call_function(number_of_whole, (one, results[like])) for one, whole in pairs
        )
    )
    return fx.GraphModule(body, graph)
