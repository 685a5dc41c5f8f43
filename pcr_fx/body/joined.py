"""A chain and its head as one, whose blocks return their outputs behind their states: what kernels compute in one sweep."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from torch import fx

from pcr_fx.chain import Chain

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Joined:
    """A chain with what its head reads among its operands.

    Attributes:
        chain: the blocks.
        operands, shared: for each of those of the head whether it is there too, behind the chain's own: a head may have
            some only to compute again what the states need as well.
    """

    chain: Chain
    operands: tuple[bool, ...]
    shared: tuple[bool, ...]

    def operands_of(self, own: Sequence[T], head: Sequence[T]) -> list[T]:
        """The per-block operands of the blocks, of those of the chain and of its head."""
        return [*own, *(one for one, is_read in zip(head, self.operands, strict=True) if is_read)]

    def shared_of(self, own: Sequence[T], head: Sequence[T]) -> list[T]:
        """Likewise the shared operands."""
        return [*own, *(one for one, is_read in zip(head, self.shared, strict=True) if is_read)]


def join(chain: Chain) -> Joined:
    """A chain that has a head, and that head, as one."""
    head = chain.head
    assert head is not None, "there is something to join"
    given = iter(head.block.graph.find_nodes(op="placeholder"))
    groups = [
        [next(given) for _ in range(count)]
        for count in (
            *(chain.num_states, chain.num_operands, len(chain.literals), chain.num_shared),
            *(head.num_operands, len(head.literals), head.num_shared),
        )
    ]
    states, operands, literals, shared, *of_head = groups
    read = [[bool(node.users) for node in group] for group in of_head]
    more = [[node for node in group if node.users] for group in of_head]
    body = _with_inputs(head.block, [*states, *operands, *more[0], *literals, *more[1], *shared, *more[2]])
    numbers = tuple(values for values, is_read in zip(head.literals, read[1], strict=True) if is_read)
    joined = Chain(
        body,
        chain.length,
        chain.num_states,
        chain.num_operands + len(more[0]),
        chain.num_shared + len(more[2]),
        (*chain.literals, *numbers),
        chain.origin,
        num_outputs=head.num_outputs,
    )
    return Joined(joined, tuple(read[0]), tuple(read[2]))


def _with_inputs(block: fx.GraphModule, inputs: Sequence[fx.Node]) -> fx.GraphModule:
    """The block with these of its inputs alone, in this order."""
    graph = fx.Graph()
    copies = {node: graph.placeholder(node.name) for node in inputs}
    for node in block.graph.nodes:
        if node.op != "placeholder":
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(block, graph)
