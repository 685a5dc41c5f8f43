"""One program for any batch size, of two traces at sizes that stand for it.

Where the traces differ, sizes are the reason: a number that is the same multiple of them in both is computed from those
of the first input whenever the program runs, and anything else means that the block depends on its batch size. PyTorch's
symbolic sizes would need one trace only, but several of its rules for vmap fix them: those of layer and group norm, and
before PyTorch 2.13 those of products of matrices.
"""

from __future__ import annotations

import operator
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.errors import BodyError

# For each batch dimension a size in the first trace, and one in the second: primes, so that multiples are told apart, and
# large, so that what PyTorch does for small sizes only is in neither.
STAND_INS = (
    (1409, 1423, 1427, 1429, 1433, 1439, 1447, 1451),
    (1483, 1487, 1489, 1493, 1499, 1511, 1523, 1531),
)


def generalise(first: fx.GraphModule, second: fx.GraphModule, rank: int, offset: int) -> fx.GraphModule:
    """`first`, changed in place to be right for any batch size.

    Args:
        first, second: a function traced at the sizes of either row of `STAND_INS`.
        rank: how many batch dimensions there are.
        offset: the dimension of the first input at which they begin.

    Raises:
        BodyError: the function depends on its batch size.
    """
    nodes = list(first.graph.nodes)
    others = list(second.graph.nodes)
    if [(node.op, node.target) for node in nodes] != [(node.op, node.target) for node in others]:
        raise BodyError("the block does other things at another batch size")
    merging = _Merging(first, dict(zip(others, nodes, strict=True)), rank, offset)
    for node, other in zip(nodes, others, strict=True):
        if node.op == "get_attr" and not _same_constant(getattr(first, node.target), getattr(second, node.target)):
            raise BodyError("the block has constants that depend on its batch size")
        node.args = merging.merge(node.args, other.args)
        node.kwargs = merging.merge(node.kwargs, other.kwargs)
    first.recompile()
    return first


class _Merging:
    """Arguments of two traces made one.

    Args:
        module: the first trace, whose graph gets the nodes that compute sizes.
        twins: to each node of the second trace that of the first.
    """

    def __init__(self, module: fx.GraphModule, twins: dict[fx.Node, fx.Node], rank: int, offset: int) -> None:
        self.graph, self.twins, self.rank, self.offset = module.graph, twins, rank, offset
        placeholders = self.graph.find_nodes(op="placeholder")
        self.state = placeholders[0]
        self.start = placeholders[-1].next
        self.sizes: dict[tuple[int, ...], fx.Node] = {}

    def merge(self, a: Any, b: Any) -> Any:
        if isinstance(a, fx.Node) and isinstance(b, fx.Node):
            if self.twins[b] is a:
                return a
        elif isinstance(a, (tuple, list)) and type(a) is type(b) and len(a) == len(b):
            return type(a)(self.merge(x, y) for x, y in zip(a, b, strict=True))
        elif isinstance(a, dict) and isinstance(b, dict) and a.keys() == b.keys():
            return {key: self.merge(a[key], b[key]) for key in a}
        elif type(a) is type(b) and (a == b or (a != a and b != b)):
            return a
        elif type(a) is int and type(b) is int:
            return self._multiple(a, b)
        raise BodyError("the block depends on its batch size")

    def _multiple(self, a: int, b: int) -> fx.Node:
        """What is `a` in the first trace and `b` in the second, as a product of batch sizes and a number."""
        dims = []
        for dim in range(self.rank):
            while a and a % STAND_INS[0][dim] == 0 and b % STAND_INS[1][dim] == 0:
                a, b = a // STAND_INS[0][dim], b // STAND_INS[1][dim]
                dims.append(dim)
        if a != b:
            raise BodyError("the block depends on its batch size")
        with self.graph.inserting_before(self.start):
            product = self._product(tuple(dims))
            return product if a == 1 else self.graph.call_function(operator.mul, (product, a))

    def _product(self, dims: tuple[int, ...]) -> fx.Node:
        if dims not in self.sizes:
            *rest, last = dims
            size = self.graph.call_function(torch.ops.aten.sym_size.int, (self.state, self.offset + last))
            if rest:
                size = self.graph.call_function(operator.mul, (self._product(tuple(rest)), size))
            self.sizes[dims] = size
        return self.sizes[dims]


def _same_constant(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor) and isinstance(b, Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    return a is b
