"""Stretches of a graph as one op each: what stands between two ops that change how others run, and functions with derivatives
of their own.

Parts of one content are one object, so that the blocks they stand in are alike.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from pcr_fx.graphs.nodes import hashable, op_name
from pcr_fx.registry import Registry


class Part:
    """A graph as an op.

    Args:
        graph: takes what the op takes; holds no tensors of its own.
        name: what reports call it.
        with_gradients: whether gradients were on where it stood: operators that call it have switched them off.
    """

    __module__ = __name__

    def __init__(self, graph: fx.GraphModule, name: str, with_gradients: bool = True) -> None:
        self.graph, self.__name__, self.with_gradients = graph, name, with_gradients

    def __call__(self, *args: Any) -> Any:
        with torch.set_grad_enabled(self.with_gradients):
            result = self.graph.forward(*args)
        if torch.is_grad_enabled() or not self.with_gradients:
            return result
        return pytree.tree_map_only(Tensor, Tensor.detach, result)


class OwnDerivative(Part):
    """A function with a derivative of its own: `torch.autograd.Function`, as a compiler reads it.

    Args:
        graph: `(*inputs) -> (outputs, saved)`.
        backward: `(*cotangents of the outputs, *saved) -> cotangents of the inputs`.
        fixed: the outputs that have no cotangent.
    """

    def __init__(self, graph: fx.GraphModule, backward: fx.GraphModule, fixed: Sequence[int]) -> None:
        super().__init__(graph, "autograd_function")
        self.backward, self.fixed = backward, frozenset(fixed)
        outputs, saved = graph.graph.output_node().args[0]  # type: ignore[misc, str-unpack]
        inputs = {node: index for index, node in enumerate(graph.graph.find_nodes(op="placeholder"))}
        self.count = len(outputs)  # type: ignore[arg-type]
        # Of what is saved, what is an input: which one.
        self.inputs = [inputs.get(one) if isinstance(one, fx.Node) else None for one in saved]  # type: ignore[union-attr]

    def __call__(self, *args: Any) -> Any:
        return _Derived.apply(self, *args)[: self.count]

    def run(self, *args: Any) -> tuple[Any, ...]:
        """The outputs, and behind them what is saved and is no input."""
        outputs, saved = self.graph.forward(*args)
        return *outputs, *(one for one, index in zip(saved, self.inputs, strict=True) if index is None)

    def saved(self, inputs: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        """What `backward` takes, from what `run` was given and returned."""
        others = iter(results[self.count :])
        return [next(others) if index is None else inputs[index] for index in self.inputs]

    def pull(self, cotangents: Sequence[Any], saved: Sequence[Any]) -> tuple[Any, ...]:
        """The cotangents of the inputs."""
        outputs = enumerate(cotangents[: self.count])
        given = [torch.zeros_like(one) if number in self.fixed else one for number, one in outputs]
        return tuple(self.backward(*given, *saved))


class OwnFunction(Part):
    """A function with a derivative of its own as its author wrote it.

    Args:
        function: a class derived from `torch.autograd.Function`.
        arguments: of its `forward`; `HOLE` for each tensor.
    """

    def __init__(self, function: Any, arguments: Sequence[Any]) -> None:
        self.function, self.arguments, self.__name__ = function, tuple(arguments), function.__name__
        self.graph = fx.GraphModule({}, fx.Graph())  # nobody knows

    def __call__(self, *tensors: Any) -> Any:
        if torch._C._functorch.peek_interpreter_stack() is None:
            return self.function.apply(*self.filled(tensors))
        call = self.call()
        results = _Derived.apply(call, *tensors)
        return results[0] if call.is_single else results[: call.count]

    def call(self) -> _Call:
        return _Call(self)

    def filled(self, tensors: Sequence[Any]) -> tuple[Any, ...]:
        waiting = iter(tensors)
        return tuple(next(waiting) if one is HOLE else one for one in self.arguments)


HOLE = object()


class _Context:
    """What a function keeps from its forward to its backward."""

    def __init__(self, needs_input_grad: tuple[bool, ...]) -> None:
        self.needs_input_grad = needs_input_grad
        self.saved_tensors: tuple[Any, ...] = ()
        self._fixed: tuple[Any, ...] = ()

    def save_for_backward(self, *tensors: Any) -> None:
        self.saved_tensors = tensors

    def save_for_forward(self, *tensors: Any) -> None:
        """Nothing: tangents are taken of the ops."""

    def mark_non_differentiable(self, *tensors: Any) -> None:
        self._fixed = tensors

    def set_materialize_grads(self, value: bool) -> None:
        """Nothing: all cotangents are known."""


class _Call:
    """One call of an `OwnFunction`, as `_Derived` wants it."""

    def __init__(self, own: OwnFunction) -> None:
        self.own = own

    def run(self, *tensors: Any) -> tuple[Any, ...]:
        """The outputs, and behind them what is kept and is neither input nor output."""
        function, args = self.own.function, self.own.filled(tensors)
        context = self.context = _Context(tuple(isinstance(one, Tensor) and one.is_floating_point() for one in args))
        if function.setup_context is torch.autograd.Function.setup_context:
            found = function.forward(context, *args)
        else:
            found = function.forward(*args)
            function.setup_context(context, args, found)
        self.is_single = isinstance(found, Tensor)
        outputs = [found] if self.is_single else list(found)
        self.count, self.fixed = len(outputs), _places(context._fixed, outputs)
        self.names = [name for name, value in vars(context).items() if isinstance(value, Tensor)]
        kept = [*context.saved_tensors, *(getattr(context, name) for name in self.names)]
        known = [*tensors, *outputs]
        known += [one for one in kept if isinstance(one, Tensor) and not _places([one], known)]
        self.kept = [_places([one], known)[0] if isinstance(one, Tensor) else one for one in kept]
        self.is_place = [isinstance(one, Tensor) for one in kept]
        return tuple(known[len(tensors) :])

    def saved(self, inputs: Sequence[Any], results: Sequence[Any]) -> list[Any]:
        known = [*inputs, *results]
        return [known[one] if is_place else one for one, is_place in zip(self.kept, self.is_place, strict=True)]

    def pull(self, cotangents: Sequence[Any], saved: Sequence[Any]) -> tuple[Any, ...]:
        context, count = copy.copy(self.context), len(saved) - len(self.names)
        context.saved_tensors = tuple(saved[:count])
        vars(context).update(zip(self.names, saved[count:], strict=True))
        outputs = enumerate(cotangents[: self.count])
        given = [torch.zeros_like(one) if number in self.fixed else one for number, one in outputs]
        found = self.own.function.backward(context, *given)
        every = found if isinstance(found, tuple) else (found,)
        return tuple(one for one, argument in zip(every, self.own.arguments, strict=False) if argument is HOLE)


def _places(tensors: Sequence[Any], among: Sequence[Any]) -> list[int]:
    """Where these very tensors stand first among others, as far as they do."""
    found = (next((place for place, other in enumerate(among) if other is one), None) for one in tensors)
    return [place for place in found if place is not None]


class _Derived(torch.autograd.Function):
    """Such a function, made so that transforms can look into it: what its backward reads is among its inputs and outputs."""

    generate_vmap_rule = True

    @staticmethod
    def forward(own: OwnDerivative | _Call, *args: Any) -> tuple[Any, ...]:
        return own.run(*args)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Any, ...]) -> None:
        ctx.own, *given = inputs
        saved = inputs[0].saved(given, output)
        ctx.numbers = [None if isinstance(one, Tensor) else one for one in saved]
        ctx.is_tensor = [isinstance(one, Tensor) for one in saved]
        ctx.save_for_backward(*(one for one in saved if isinstance(one, Tensor)))

    @staticmethod
    def backward(ctx: Any, *cotangents: Any) -> tuple[Any, ...]:
        tensors = iter(ctx.saved_tensors)
        saved = [next(tensors) if is_one else number for is_one, number in zip(ctx.is_tensor, ctx.numbers, strict=True)]
        return None, *ctx.own.pull(cotangents, saved)


_parts: Registry[Hashable, Part] = Registry()


def part(graph: fx.Graph, name: str, with_gradients: bool) -> Part:
    """The part that has this content.

    Raises:
        TypeError: an argument of its ops cannot be compared.
    """
    key = name, with_gradients, content_of(graph)
    known = _parts.get(key)
    return known if known is not None else _parts.keep(key, Part(fx.GraphModule({}, graph), name, with_gradients))


def own_derivative(forward: fx.Graph, backward: fx.Graph, fixed: Sequence[int]) -> Part:
    """As `part`."""
    key = "derivative", content_of(forward), content_of(backward), tuple(fixed)
    known = _parts.get(key)
    if known is None:
        graphs = fx.GraphModule({}, forward), fx.GraphModule({}, backward)
        known = _parts.keep(key, OwnDerivative(*graphs, fixed))
    return known


def own_function(function: Any, arguments: Sequence[Any]) -> Part:
    """As `part`; of arguments that cannot be compared, one that is like no other."""
    made = OwnFunction(function, arguments)
    try:
        return _parts.keep(("function", function, hashable(made.arguments)), made)
    except TypeError:
        return made


def holds_derivatives(graph: fx.Graph) -> bool:
    """Whether any op is a function with a derivative of its own, or is made of such."""
    targets = [node.target for node in graph.nodes if isinstance(node.target, Part)]
    return any(isinstance(one, OwnDerivative | OwnFunction) or holds_derivatives(one.graph.graph) for one in targets)


def shows_pullback(graph: fx.Graph) -> bool:
    """Whether the ops of a graph say what its cotangents are: no function brings a derivative, and none is cut off by a mode."""
    parts = [node.target for node in graph.nodes if isinstance(node.target, Part)]
    switches = any(node.op == "call_function" and op_name(node) == "set_grad_enabled" for node in graph.nodes)
    return not (
        switches
        or holds_derivatives(graph)
        or any(not one.with_gradients or not shows_pullback(one.graph.graph) for one in parts)
    )


def say_call(usual: Any, odd: Any) -> str:
    """What one of two functions with derivatives of their own is called with in place of the other's arguments, in words."""
    if not isinstance(odd, OwnFunction):
        return "a function with a derivative of its own computes otherwise than in the other blocks"
    for ours, theirs in zip(odd.arguments, usual.arguments, strict=False):
        if ours is not theirs and hashable(ours) != hashable(theirs):
            return f"{odd.__name__} is called with {_said(ours)} where the other blocks have {_said(theirs)}"
    return f"{odd.__name__} is called with other arguments than in the other blocks"


def _said(argument: Any) -> str:
    return "a tensor" if argument is HOLE else repr(argument)


def content_of(graph: fx.Graph, literal: Callable[[Any], Any] = lambda one: one) -> Hashable:
    """What a graph computes, as a key; whatever its nodes are called.

    Args:
        literal: what stands for whatever is no node.
    """
    number = {node: index for index, node in enumerate(graph.nodes)}

    def key(value: Any) -> Hashable:
        return _Place(number[value]) if isinstance(value, fx.Node) else literal(value)

    return tuple(
        (
            node.op,
            None if node.op in ("placeholder", "output") else node.target,
            hashable(node.args, key),
            hashable(node.kwargs, key),
        )
        for node in graph.nodes
    )


class _Place(int):
    """A node by its number, which is no number among arguments."""
