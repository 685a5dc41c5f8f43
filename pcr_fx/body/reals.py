"""Complex numbers as pairs of real ones: a chain as it is solved, and the graphs that its kernels are made of.

States are solved as real numbers, and the derivative of a complex function is that of its real and imaginary parts. PyTorch's
cotangent of a complex number is that of these two, so that pulling back pairs is pulling back complex numbers.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx

from pcr_fx.body.complex_numbers import Pair, parted
from pcr_fx.body.complex_ops import FILLED, OF_EACH_PART, RULES, filled, of_each_part
from pcr_fx.chain import Chain, Complex, Head
from pcr_fx.errors import BodyError
from pcr_fx.graphs.nodes import aten_name, nodes_in, overload_name

# --- a chain ------------------------------------------------------------------------------------------------------------


def to_complex(pairs: Tensor) -> Tensor:
    """Of `[..., 2]`, which may lie anyhow in memory."""
    return torch.complex(pairs.select(-1, 0), pairs.select(-1, 1))


def to_real(tensor: Tensor) -> Tensor:
    """The real and imaginary parts of a complex tensor, `[..., 2]`."""
    return torch.view_as_real(tensor.resolve_conj())


def carry_reals(chain: Chain, which: Complex) -> Chain:
    """`chain` with pairs of real numbers in place of its complex tensors.

    Args:
        which: its complex tensors.
    """
    numbers = (False,) * len(chain.literals)
    given = (*which.states, *which.operands, *numbers, *which.shared)
    body = _between_reals(chain.body, given, (*which.states, *which.outputs[: chain.num_outputs]))
    head = None if chain.head is None else _head(chain.head, which, given)
    return replace(chain, body=body, head=head, as_written=(chain, which))


def _head(head: Head, which: Complex, given: Sequence[bool]) -> Head:
    more = (*which.head_operands, *(False for _ in head.literals), *which.head_shared)
    body = _between_reals(head.body, (*which.states, *which.states, *more), which.outputs)
    block = _between_reals(head.block, (*given, *more), (*which.states, *which.outputs))
    return replace(head, body=body, block=block)


def _between_reals(body: fx.GraphModule, given: Sequence[bool], returned: Sequence[bool]) -> fx.GraphModule:
    """`body` that takes and returns pairs where it is said to have complex numbers."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    inputs = list(body.graph.find_nodes(op="placeholder"))
    made = [graph.placeholder(str(node.target)) for node in inputs]
    for node, new, is_complex in zip(inputs, made, given, strict=True):
        # What nobody reads is not computed either: a head asks which of the states it reads.
        copies[node] = graph.call_function(to_complex, (new,)) if is_complex and node.users else new
    results: Any = graph.graph_copy(body.graph, copies)
    pairs = zip(results, returned, strict=True)
    graph.output(tuple(graph.call_function(to_real, (one,)) if is_complex else one for one, is_complex in pairs))
    return fx.GraphModule(body, graph)


# --- a graph ------------------------------------------------------------------------------------------------------------


def holds_complex(graph: fx.Graph) -> bool:
    """Whether an aten graph has complex numbers in it."""
    return any(map(_is_complex, graph.nodes))


def _is_complex(node: fx.Node) -> bool:
    value = node.meta.get("val")
    values = value if isinstance(value, (list, tuple)) else (value,)
    return any(isinstance(one, Tensor) and one.is_complex() for one in values)


def by_parts(graph: fx.GraphModule) -> Callable[..., Any]:
    """What an aten graph of real inputs and results computes, with complex numbers by their parts on the way.

    Raises, when it is called:
        BodyError: an op of complex numbers has no rule.
    """
    return _ByParts(graph).run


class _ByParts(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self.present: fx.Node | None = None
        self.held = {name: _parts(value) for name, value in _tensors(graph).items() if value.is_complex()}

    def run_node(self, n: fx.Node) -> Any:
        self.present = n
        return super().run_node(n)

    def get_attr(self, target: Any, args: Any, kwargs: Any) -> Any:
        if target in self.held:
            return Pair(*self.held[target])
        return super().get_attr(target, args, kwargs)

    def call_function(self, target: Any, args: Any, kwargs: Any) -> Any:
        node = self.present
        assert node is not None
        if target is operator.getitem:
            return target(*args)
        if not _is_complex(node) and not any(map(_is_complex, nodes_in((node.args, node.kwargs)))):
            return target(*args, **kwargs)
        args, kwargs = fx.node.map_aggregate((args, kwargs), parted)  # type: ignore[misc]
        result = _of_complex(node, target, args, kwargs)
        if result is NotImplemented:
            raise BodyError(f"no kernel is printed for aten.{overload_name(node)} of complex numbers")
        return _in_tensors(node, result)


def _in_tensors(node: fx.Node, result: Any) -> Any:
    """A result with tensors for those parts that are numbers."""
    if not isinstance(result, Pair):
        return result
    value = node.meta["val"]
    if isinstance(result.real, Tensor) and isinstance(result.imag, Tensor):
        # A part may have been broadcast without the other.
        return Pair(
            *(one if one.shape == value.shape else one.expand(value.shape) for one in (result.real, result.imag))
        )
    if value.dim() == 0 and _is_number(result):
        return result  # a number yields to the dtype of what it meets
    options = {"dtype": value.real.dtype, "device": value.device}
    parts = (result.real, result.imag)
    return Pair(*(one if isinstance(one, Tensor) else torch.full(value.shape, one, **options) for one in parts))


def _tensors(graph: fx.GraphModule) -> dict[str, Tensor]:
    return {**dict(graph.named_parameters()), **dict(graph.named_buffers())} | {
        name: value for name, value in vars(graph).items() if isinstance(value, Tensor)
    }


def _parts(value: Tensor) -> tuple[Any, Any]:
    """Of one number as numbers."""
    if value.dim() == 0:
        number = value.detach().item()
        return number.real, number.imag
    real, imag = torch.view_as_real(value.detach().resolve_conj()).unbind(-1)
    return real.clone(), imag.clone()


def _of_complex(node: fx.Node, target: Any, args: Any, kwargs: Any) -> Any:
    name = aten_name(node) or ""
    if name == "_to_copy":
        return _converted(node, args[0])
    if name in FILLED:
        return filled(node, name, args, kwargs)
    if name in OF_EACH_PART:
        if _is_number(args[0]):
            if node.meta["val"].dim() == 0:
                return args[0]
            args = (_held_number(node, args[0]), *args[1:])
        return of_each_part(name, target, args, kwargs)
    kwargs = {key: value for key, value in kwargs.items() if key != "dtype"}
    return RULES[name](*args, **kwargs) if name in RULES else NotImplemented


def _is_number(value: Any) -> bool:
    return isinstance(value, Pair) and not isinstance(value.real, Tensor) and not isinstance(value.imag, Tensor)


def _held_number(node: fx.Node, number: Pair) -> Pair:
    """A number as tensors without dimensions, of the dtype of an op's result."""
    value = node.meta["val"]
    options = {"dtype": value.real.dtype, "device": value.device}
    return Pair(torch.full((), number.real, **options), torch.full((), number.imag, **options))


def _converted(node: fx.Node, value: Any) -> Any:
    """Another dtype: complex numbers that become real ones lose their imaginary parts."""
    result = node.meta["val"]
    dtype = result.real.dtype if result.is_complex() else result.dtype
    if not result.is_complex():
        if _is_number(value):
            return torch.full((), value.real, dtype=dtype, device=result.device)
        if dtype is torch.bool and isinstance(value, Pair):
            return (value.real != 0) | (value.imag != 0)
        return (value.real if isinstance(value, Pair) else value).to(dtype)
    if _is_number(value):
        return value
    real = value.real if isinstance(value, Pair) else value
    imag = value.imag if isinstance(value, Pair) else torch.zeros_like(value, dtype=dtype)
    return Pair(real.to(dtype), imag.to(dtype))
