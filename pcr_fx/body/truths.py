"""Truth values that are carried from block to block, as numbers: a chain as it is solved.

States are solved as real numbers. A truth value is 1 or 0 among them, and anything but 0 is true; it has no derivative either way.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from pcr_fx.chain import Chain


def carry_numbers(chain: Chain, truths: Sequence[bool], like: int) -> Chain:
    """`chain` with numbers in place of those of its states that are truth values.

    Args:
        truths: of each state whether it is one.
        like: a state of real numbers, whose dtype they get.
    """

    def between(body: fx.GraphModule, groups: int, returned: Sequence[bool]) -> fx.GraphModule:
        return _between_numbers(body, tuple(truths) * groups, returned, like)

    head, written = chain.head, chain.as_written
    if head is not None:
        head = replace(head, body=between(head.body, 2, ()), block=between(head.block, 1, truths))
    if written is not None:
        written = carry_numbers(written[0], truths, like), written[1]
    return replace(chain, body=between(chain.body, 1, truths), head=head, as_written=written)


def number_of_truth(truth: Tensor, like: Tensor) -> Tensor:
    """1 and 0 for what is true and false, in the dtype of another tensor."""
    return truth.type_as(like)


def truth_of_number(numbers: Tensor | list[Tensor]) -> Tensor | list[Tensor]:
    """The reverse, of what a solve node returned: of a list where it returned one."""
    return [one != 0 for one in numbers] if isinstance(numbers, list) else numbers != 0


def _between_numbers(
    body: fx.GraphModule, given: Sequence[bool], returned: Sequence[bool], like: int
) -> fx.GraphModule:
    """`body` that takes and returns numbers where it is said to have truth values; behind those it has no more."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = list(body.graph.find_nodes(op="placeholder"))
    made = [graph.placeholder(str(node.target)) for node in inputs]
    more = (False,) * (len(inputs) - len(given))
    for node, new, is_truth in zip(inputs, made, (*given, *more), strict=True):
        # What nobody reads is not computed either: a head asks which of the states it reads.
        copies[node] = graph.call_function(operator.ne, (new, 0)) if is_truth and node.users else new
    results: Any = graph.graph_copy(body.graph, copies)
    more = (False,) * (len(results) - len(returned))
    pairs = zip(results, (*returned, *more), strict=True)
    graph.output(
        tuple(
            graph.call_function(number_of_truth, (one, results[like])) if is_truth else one for one, is_truth in pairs
        )
    )
    return fx.GraphModule(body, graph)
