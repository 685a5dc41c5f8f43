"""Chains that carry truth values and whole numbers beside real ones: done flags, counters, tokens.

They are solved as real numbers, where these hold them exactly, and are what they were again where they are read.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx
from torch._subclasses import FakeTensor, FakeTensorMode

from pcr_fx.body.decompositions import DECOMPOSITIONS
from pcr_fx.body.isolation import isolated
from pcr_fx.body.tracer import trace
from pcr_fx.body.wholes import Whole, carry_numbers, number_of_whole
from pcr_fx.codegen.whole import sizes_of
from pcr_fx.errors import PcrFxError
from pcr_fx.graphs.nodes import argument, op_name
from pcr_fx.passes.assembly import FoundChain

Value = Callable[[fx.Node], Any]

# After so many blocks numbers are taken to grow in each as in the last one.
_BLOCKS = 32
# Ops that make tensors of one number.
_MADE = {"zeros": 0, "zeros_like": 0, "new_zeros": 0, "ones": 1, "ones_like": 1, "new_ones": 1}
_FILLED = {"full": 1, "full_like": 1, "new_full": 2}
# Up to how large numbers ops make of whole ones, by how large these are.
_SIZES: dict[str, Callable[[Sequence[float]], float]] = {
    **dict.fromkeys(("add", "sub"), sum),
    "mul": math.prod,
    **dict.fromkeys(("clamp", "neg", "where"), max),
    **dict.fromkeys(
        "clone contiguous detach expand getitem int long narrow select to unsqueeze view".split(),
        lambda sizes: sizes[0],
    ),
}


def carry_wholes(found: FoundChain, value: Value, guarded: bool) -> FoundChain | str:
    """The chain with real numbers in place of the truth values and whole numbers among its states; or why it cannot be solved so.

    Args:
        value: that of a node, as far as it is known.
        guarded: as `find_chains` has it.
    """
    if not any(found.wholes):
        return found
    like = next(index for index, node in enumerate(found.initial) if _is_real(value(node)))
    real = value(found.initial[like]).dtype
    sizes = _Sizes(found, value, real, guarded).everywhere()
    wholes = []
    for dtype, size in zip(found.wholes, sizes, strict=True):
        if dtype is not None and size > 2 / torch.finfo(real).eps:
            return f"the whole numbers that it carries, {dtype}, may not be exact as {real}, in which chains are solved"
        wholes.append(None if dtype is None else Whole(dtype, int(size)))
    initial = tuple(
        node if dtype is None else _as_number(node, found.initial[like], value)
        for node, dtype in zip(found.initial, found.wholes, strict=True)
    )
    return replace(found, chain=carry_numbers(found.chain, wholes, like), initial=initial)


def _is_real(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


# --- how large whole numbers get -------------------------------------------------------------------------------------------------


class _Sizes:
    """Up to how large the states of a chain get, by what the blocks compute of them.

    Args:
        real: the dtype that they are to be exact in.
    """

    def __init__(self, found: FoundChain, value: Value, real: torch.dtype, guarded: bool) -> None:
        self.found, self.value, self.real, self.guarded = found, value, real, guarded
        self.exact = 2 / torch.finfo(real).eps
        self.largest = [0.0 if dtype is None else _largest(dtype) for dtype in found.wholes]

    def everywhere(self) -> list[float]:
        """0 for states that are real, and all of its dtype for one of which nothing is known that holds for all tensors."""
        graph = self._aten() if max(self.largest) > 1 else None
        sizes = self.largest if graph is None else self._of(graph)
        if sizes == self.largest:
            return sizes
        for size in self._open_sizes():
            other = self._aten(size)
            if other is not None and self._of(other) != sizes:
                return self.largest
        return sizes

    def _of(self, graph: fx.GraphModule) -> list[float]:
        wholes, length = self.found.wholes, self.found.chain.length
        firsts = (
            0.0 if dtype is None else self._first(node) for node, dtype in zip(self.found.initial, wholes, strict=True)
        )
        sizes = list(map(min, firsts, self.largest))
        for _ in range(min(length, _BLOCKS)):
            before, sizes = sizes, self._after(graph, sizes)
            if max(sizes) > self.exact:
                return self.largest
            if sizes == before:
                return sizes
        growth = [new - old for old, new in zip(before, sizes, strict=True)]
        last = [size + length * more for size, more in zip(sizes, growth, strict=True)]
        # What grows by as much from there is convex, and grows by no more on the way.
        is_steady = all(
            new <= old + more for old, new, more in zip(last, self._after(graph, last), growth, strict=True)
        )
        return last if is_steady else self.largest

    def _after(self, graph: fx.GraphModule, sizes: Sequence[float]) -> list[float]:
        """Up to how large they are behind a block, or before it."""
        given = [None if dtype is None else size for dtype, size in zip(self.found.wholes, sizes, strict=True)]
        made = sizes_of(graph, self.real, given)
        return [0.0 if size is None else max(size, new) for size, new in zip(given, made, strict=True)]

    def _first(self, node: Any) -> float:
        """The largest absolute value that there is in a tensor, by the ops that made it."""
        if not isinstance(node, fx.Node):
            return abs(float(node)) if isinstance(node, (int, float)) else math.inf
        known, name = self.value(node), op_name(node)
        if isinstance(known, Tensor) and known.dtype == torch.bool:
            return 1.0
        if name in _MADE:
            return _MADE[name]
        if name in _FILLED:
            return self._first(argument(node, _FILLED[name], "fill_value", math.inf))
        if name in ("argmax", "argmin"):
            return self._places(self.value(node.all_input_nodes[0]), argument(node, 1, "dim"))
        if not isinstance(known, Tensor) or known.is_floating_point() or name not in _SIZES or "alpha" in node.kwargs:
            return math.inf
        given = (*node.args, *node.kwargs.values())
        return float(_SIZES[name]([self._first(one) for one in given if isinstance(one, (fx.Node, int, float))]))

    def _places(self, tensor: Any, dim: Any) -> float:
        """How many places there are in a dimension, if that is one of the model's."""
        if not isinstance(tensor, Tensor) or type(dim) is not int or type(tensor.shape[dim]) is not int:
            return math.inf
        shapes = [self.value(node).shape for node in self._nodes() if self._is_fixed(node)]
        is_fixed = self.guarded or any(tensor.shape[dim] in shape for shape in shapes)
        return float(tensor.shape[dim]) if is_fixed else math.inf

    # --- traces for some sizes ---------------------------------------------------------------------------------------------

    def _nodes(self) -> list[fx.Node]:
        return [*self.found.initial, *(column[0] for column in self.found.operands), *self.found.shared]

    def _is_fixed(self, node: fx.Node) -> bool:
        """Whether all calls have a tensor of this shape."""
        return node.op == "get_attr"

    def _open_sizes(self) -> list[int]:
        """Those that may be others in another call."""
        sizes = [size for node in self._nodes() if not self._is_fixed(node) for size in self.value(node).shape]
        return sorted({_number(size) for size in sizes if not self.guarded or type(size) is not int})

    @isolated
    def _aten(self, other: int | None = None) -> fx.GraphModule | None:
        """A block as an aten graph, of whole numbers as they are; `None` where it cannot be traced, which is told later.

        Args:
            other: a size in place of which another one stands.
        """
        chain, values = self.found.chain, [self.value(node) for node in self._nodes()]
        if not all(isinstance(one, Tensor) for one in values):
            return None
        with FakeTensorMode(), torch.no_grad():
            tensors = [self._example(node, one, other) for node, one in zip(self._nodes(), values, strict=True)]
            numbers = [torch.empty((), dtype=torch.float64) for _ in chain.literals]
            count = chain.num_states + chain.num_operands
            try:
                given = [*tensors[:count], *numbers, *tensors[count:]]
                return trace(lambda *inputs: chain.body.forward(*inputs), given, DECOMPOSITIONS)
            except PcrFxError:
                return None

    def _example(self, node: fx.Node, value: Tensor, other: int | None) -> Tensor:
        sizes = [_number(size) for size in value.shape]
        if not self._is_fixed(node):
            sizes = [size + 7 if size == other else size for size in sizes]
        return torch.empty(sizes, dtype=value.dtype)


def _number(size: Any) -> int:
    """A size, or what it is for now: nothing is asked of one that is left open."""
    return size if type(size) is int else int(size.node.hint)


def _largest(dtype: torch.dtype) -> float:
    return 1.0 if dtype == torch.bool else -float(torch.iinfo(dtype).min)


def _as_number(whole: fx.Node, like: fx.Node, value: Value) -> fx.Node:
    """A node behind both, and behind all inputs."""
    graph, at = whole.graph, max(whole, like)
    if at.op == "placeholder":
        at = list(graph.find_nodes(op="placeholder"))[-1]
    with graph.inserting_after(at):
        made = graph.call_function(number_of_whole, (whole, like))
    values = value(whole), value(like)
    made.meta = dict(whole.meta)
    with next((one.fake_mode for one in values if isinstance(one, FakeTensor)), contextlib.nullcontext()):
        made.meta["example_value"] = number_of_whole(*values)
    return made
