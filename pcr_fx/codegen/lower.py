"""From the aten graph of one sample to the language of kernels."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.codegen.aten import RULES
from pcr_fx.codegen.check import check, is_checking
from pcr_fx.codegen.ir import (
    Apply,
    Buffer,
    Constant,
    Expression,
    Function,
    Load,
    Loop,
    Unprintable,
    Value,
    View,
    contiguous,
    in_memory,
    map_views,
    simplify,
    views,
)
from pcr_fx.codegen.whole import WholeNumbers
from pcr_fx.graphs.nodes import op_name, overload_name

# Constants of a body that are written out in its kernel's source.
_MAX_CONSTANTS = 4096
# Keyword arguments of pointwise ops that change what is computed; others are about memory.
_MEANINGFUL = ("alpha", "min", "max", "rounding_mode")


def lower(graph: fx.Graph, owner: torch.nn.Module, varying: Sequence[bool], sums: Sequence[bool]) -> Function:
    """The function that `graph` computes for one sample.

    Args:
        graph: aten ops only, none of which writes in place, with static shapes and a `meta["val"]` on every node.
        owner: holds the tensors that the graph names as attributes.
        varying: for each input, whether every sample has its own.
        sums: for each output, whether it is to be summed over the samples.

    Raises:
        Unprintable: an op or a dtype that has no form here.
    """
    function = Lowering(graph, owner, varying).function(sums)
    if is_checking():
        check(function)
    return function


class Lowering:
    def __init__(self, graph: fx.Graph, owner: torch.nn.Module, varying: Sequence[bool]) -> None:
        self.graph, self.owner = graph, owner
        self.values: dict[fx.Node, Value | list[Value]] = {}
        # What depends on no input, as PyTorch computes it.
        self.constants: dict[fx.Node, Any] = {}
        self.loops: list[Loop] = []
        self.inputs: list[Buffer] = []
        self.count = 0
        placeholders = [node for node in graph.nodes if node.op == "placeholder"]
        self.dtype = placeholders[0].meta["val"].dtype
        self.whole = WholeNumbers(self.dtype)
        for index, (node, varies) in enumerate(zip(placeholders, varying, strict=True)):
            value = node.meta["val"]
            buffer = Buffer(f"in{index}", value.numel(), varies)
            self.inputs.append(buffer)
            self.values[node] = in_memory(buffer, tuple(value.shape))
            self.whole.take(node)

    def function(self, sums: Sequence[bool]) -> Function:
        for node in self.graph.nodes:
            if self._is_constant(node):
                self.constants[node] = value = self._computed(node)
                if isinstance(value, Tensor):
                    self.whole.take_constant(node, value)
            elif node.op == "call_function":
                self.values[node] = self._keep(node, self._visit(node))
        results: Any = self.graph.output_node().args[0]
        results = results if isinstance(results, (tuple, list)) else [results]
        outputs = []
        for index, (result, summed) in enumerate(zip(results, sums, strict=True)):
            value = self.tensor(result)
            out = Buffer(f"out{index}", math.prod(value.shape), not summed)
            self.write(in_memory(out, value.shape), value)
            outputs.append(out)
        return Function(tuple(self.inputs), tuple(outputs), tuple(self.loops))

    # --- nodes ----------------------------------------------------------------------------------------------

    def _is_constant(self, node: fx.Node) -> bool:
        if node.op != "call_function":
            return node.op == "get_attr"
        return "empty" not in op_name(node) and all(given in self.constants for given in node.all_input_nodes)

    def _computed(self, node: fx.Node) -> Any:
        """What a node is that depends on no input, on the CPU."""
        if node.op == "get_attr":
            return getattr(self.owner, str(node.target)).detach().cpu()
        assert callable(node.target)
        args, kwargs = fx.map_arg((node.args, node.kwargs), lambda given: self.constants[given])  # type: ignore[misc]
        return node.target(*args, **{**kwargs, **({"device": "cpu"} if kwargs.get("device") else {})})

    def known(self, node: fx.Node) -> Tensor | None:
        """The tensor that a node is in every call, if it is the same in all."""
        return self.constants.get(node)

    def _visit(self, node: fx.Node) -> Any:
        if node.target is operator.getitem:
            parts, index = node.args
            self.whole.take(node)
            return self.values[parts][index]  # type: ignore[index]
        name = overload_name(node)
        if name not in RULES:
            raise Unprintable(f"no kernel is printed for aten.{name}")
        self.whole.check(node)
        value = RULES[name].build(self, node)
        if isinstance(value, list):
            return value
        return Value(value.shape, self.whole.kept(node, value.expression))

    def _keep(self, node: fx.Node, value: Any) -> Any:
        """The value as it is where it is used once, by an op that can compute it on the way; else put in memory."""
        if isinstance(value, list) or isinstance(value.expression, (Load, Constant)):
            return value
        users = list(node.users)
        if len(users) == 1 and _occurrences(users[0], node) == 1 and _computes_on_the_way(users[0]):
            return value
        return self.materialised(value)

    def tensor(self, argument: Any) -> Value:
        if isinstance(argument, fx.Node):
            if argument in self.constants and argument not in self.values:
                self.values[argument] = self._constant(argument)
            value = self.values[argument]
            assert isinstance(value, Value)
            return value
        if isinstance(argument, (bool, int, float)):
            return Value((), Constant(float(argument)))
        raise Unprintable(f"no kernel is printed for an argument {argument!r}")

    def broadcast(self, value: Value, shape: tuple[int, ...]) -> Expression:
        """The value over the indices of a `shape` that it broadcasts to."""
        missing = len(shape) - len(value.shape)

        def spread(view: View) -> View:
            strides = (0 if size == 1 else stride for size, stride in zip(value.shape, view.strides, strict=True))
            return View(view.buffer, (*(0 for _ in range(missing)), *strides), view.offset)

        if value.shape != shape and math.prod(value.shape) != math.prod(shape):
            value = self.loaded(value)
        return map_views(value.expression, spread)

    def loaded(self, value: Value) -> Value:
        """In memory, unless it is free to compute again."""
        return value if isinstance(value.expression, (Load, Constant)) else self.materialised(value)

    def materialised(self, value: Value) -> Value:
        varying = any(view.buffer.varying for view in views(value.expression))
        kept = in_memory(self.local(value.shape, varying), value.shape)
        self.write(kept, value)
        return kept

    def local(self, shape: Sequence[int], varying: bool) -> Buffer:
        self.count += 1
        return Buffer(f"t{self.count}", math.prod(shape), varying)

    def write(self, place: Value, value: Value) -> None:
        assert isinstance(place.expression, Load)
        if math.prod(value.shape):
            self.loops.append(simplify(Loop(place.expression.view, value.shape, value.expression)))

    def _constant(self, node: fx.Node) -> Value:
        tensor: Tensor = self.constants[node]
        self.whole.check_constant(node, tensor.dtype)
        shape, numbers = tuple(tensor.shape), tensor.to(torch.float64).reshape(-1)
        if numbers.numel() and (numbers.view(torch.int64) == numbers.view(torch.int64)[0]).all():
            return Value(shape, Constant(float(numbers[0])))
        if numbers.numel() > _MAX_CONSTANTS:
            raise Unprintable(f"no kernel is printed for a constant of {numbers.numel()} numbers")
        return self.constant(tuple(numbers.tolist()), shape)

    def constant(self, values: tuple[float, ...], shape: tuple[int, ...]) -> Value:
        self.count += 1
        return in_memory(Buffer(f"c{self.count}", len(values), False, values), shape)

    # --- kinds of ops ---------------------------------------------------------------------------------------

    def pointwise(self, node: fx.Node, build: Callable[..., Expression]) -> Value:
        """An op that computes each number of its result from one number of each argument."""
        shape = tuple(node.meta["val"].shape)
        arguments = [self._operand(argument, shape) for argument in node.args]
        options = {name: self._operand(node.kwargs[name], shape) for name in _MEANINGFUL if name in node.kwargs}
        return Value(shape, build(*arguments, **options))

    def _operand(self, argument: Any, shape: tuple[int, ...]) -> Any:
        """A tensor as an expression over `shape`, a number as a constant, anything else as it is."""
        if isinstance(argument, (fx.Node, int, float)):
            return self.broadcast(self.tensor(argument), shape)
        return argument

    def view(self, node: fx.Node, value: Value) -> Value | list[Value]:
        """A view op of `value`: PyTorch itself works out the strides, on a tensor without memory."""
        assert callable(node.target)
        # PyTorch has no negative strides, and not every version says so.
        if any(stride < 0 for view in views(value.expression) for stride in view.strides):
            value = self.materialised(value)
        try:
            return self._viewed(node.target, value, node.args[1:], node.kwargs)
        except (RuntimeError, ValueError):
            # Such as a reshape of a transpose, which is a copy.
            return self._viewed(node.target, self.materialised(value), node.args[1:], node.kwargs)

    def _viewed(self, op: Callable[..., Any], value: Value, rest: Sequence[Any], kwargs: Any) -> Any:
        def stand_in(view: View) -> Tensor:
            base = torch.empty(view.buffer.size, device="meta")
            return base.as_strided(value.shape, view.strides, view.offset)

        shapes = op(torch.empty(value.shape, device="meta"), *rest, **kwargs)
        if isinstance(shapes, Tensor):

            def change(view: View) -> View:
                result = op(stand_in(view), *rest, **kwargs)
                return View(view.buffer, tuple(result.stride()), int(result.storage_offset()))

            return Value(tuple(shapes.shape), map_views(value.expression, change))
        parts = []
        loaded = self.loaded(value)
        for index, shape in enumerate(shapes):

            def change_part(view: View, index: int = index) -> View:
                result = op(stand_in(view), *rest, **kwargs)[index]
                return View(view.buffer, tuple(result.stride()), int(result.storage_offset()))

            parts.append(Value(tuple(shape.shape), map_views(loaded.expression, change_part)))
        return parts

    def reduce(self, value: Value, dims: Sequence[int], keepdim: bool, combine: str) -> Value:
        """The value combined over `dims`, in memory."""
        rank = len(value.shape)
        gone = sorted({dim % rank for dim in dims}) if rank else []
        if not gone:
            return value
        kept = [dim for dim in range(rank) if dim not in gone]
        shape = tuple(value.shape[dim] for dim in kept)
        order = [*kept, *gone]

        def change(view: View, count: int | None = None) -> View:
            return View(view.buffer, tuple(view.strides[dim] for dim in order[:count]), view.offset)

        final = tuple(1 if dim in gone else size for dim, size in enumerate(value.shape)) if keepdim else shape
        if all(value.shape[dim] == 1 for dim in gone):
            return value if keepdim else Value(shape, map_views(value.expression, lambda view: change(view, len(kept))))
        varying = any(view.buffer.varying for view in views(value.expression))
        buffer = self.local(shape, varying)
        out = View(buffer, contiguous(shape))
        reduced = tuple(value.shape[dim] for dim in gone)
        self.loops.append(simplify(Loop(out, shape, map_views(value.expression, change), reduced, combine)))
        return in_memory(buffer, final)

    def contract(self, left: Value, right: Value) -> Value:
        """`[..., i, k] @ [..., k, j]`, with as many leading dimensions on either side."""
        left, right = self.loaded(left), self.loaded(right)
        *batch, rows, inner = left.shape
        columns = right.shape[-1]
        shape = (*batch, rows, columns)
        lead = len(batch)

        def of_left(view: View) -> View:
            return View(view.buffer, (*view.strides[:lead], view.strides[-2], 0, view.strides[-1]), view.offset)

        def of_right(view: View) -> View:
            return View(view.buffer, (*view.strides[:lead], 0, view.strides[-1], view.strides[-2]), view.offset)

        product = Apply("mul", (map_views(left.expression, of_left), map_views(right.expression, of_right)))
        return (
            self.reduce(Value((*shape, inner), product), [lead + 2], False, "add")
            if inner != 1
            else Value(shape, map_views(product, lambda view: View(view.buffer, view.strides[:-1], view.offset)))
        )


def _occurrences(user: fx.Node, node: fx.Node) -> int:
    """How often `user` names `node` among its arguments."""
    found: list[fx.Node] = []
    fx.map_arg((user.args, user.kwargs), found.append)
    return found.count(node)


def _computes_on_the_way(user: fx.Node) -> bool:
    """Whether what is used there need not be in memory before."""
    rule = RULES.get(overload_name(user))
    return user.op == "output" or (rule is not None and rule.computes_arguments)
