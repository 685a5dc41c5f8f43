"""Read a model into an FX graph by symbolic tracing, through every module and, given inputs, with known shapes."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from pcr_fx.errors import CaptureError, UnsupportedError
from pcr_fx.passes.tracer import ADVICE, ModelTracer

# An argument that compares by value; anything else must be the same object.
_PLAIN = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class Captured:
    """A model's graph, and which calls it is for.

    Attributes:
        graph: every node has `nn_module_stack` and `stack_trace` in its meta, and where inputs were given an
            `example_value`: a fake tensor (or whatever the op returns) that holds shape, dtype and device. Its
            placeholders are the arguments that hold tensors, under their names; all others are constants in it.
        facts: what it takes for granted of its arguments.
        reads_shapes: whether they include shapes, dtypes and devices: the forward asked for some.
    """

    graph: fx.Graph
    facts: Mapping[str, Any]
    reads_shapes: bool

    def holds_for(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the graph computes the forward for these arguments, as `bind_arguments` returns them."""
        return _facts(arguments, self.reads_shapes) == self.facts

    def inputs(self, arguments: Mapping[str, Any]) -> list[Any]:
        """What the graph takes, in order."""
        return [arguments[str(node.target)] for node in self.graph.nodes if node.op == "placeholder"]


def capture_model(model: nn.Module, example_inputs: Any = None) -> Captured:
    """The graph of `model`'s forward.

    Args:
        model: the module to read. Tensors that are no attribute of any module become its `_tensor_constant...`.
        example_inputs: its arguments: a tuple or list of positional ones, a dict of named ones, or one tensor.

    Raises:
        CaptureError: the forward branches on the value of a tensor, or otherwise cannot be traced.
        UnsupportedError: `example_inputs` do not fit the forward.
    """
    arguments, known = _arguments(model, example_inputs), example_inputs is not None
    tracer = ModelTracer(model, arguments, known)
    try:
        graph = tracer.trace(model)
    except CaptureError:
        raise
    except Exception as error:
        hint = "" if known else f" (pass example_inputs if it needs the shapes of {', '.join(arguments)})"
        raise CaptureError(f"{type(model).__name__} cannot be traced{hint}: {error}; {ADVICE}") from error
    return Captured(graph, _facts(arguments, tracer.reads_shapes), tracer.reads_shapes)


def _arguments(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The arguments to trace with. Of those that nobody knows it is known that they are tensors."""
    if example_inputs is None:
        parameters = inspect.signature(model.forward).parameters.values()
        return {
            p.name: Tensor
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
    if isinstance(example_inputs, Tensor):
        return bind_arguments(model, (example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return bind_arguments(model, (), example_inputs)
    if isinstance(example_inputs, (tuple, list)):
        return bind_arguments(model, example_inputs, {})
    raise UnsupportedError(f"example_inputs must be a tuple, list, dict or tensor, got {type(example_inputs).__name__}")


def bind_arguments(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments given in a call, by name.

    Raises:
        UnsupportedError: they do not fit the forward.
    """
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedError(f"inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    return bound.arguments


def _facts(value: Any, with_shapes: bool) -> Any:
    """What a graph may take for granted: the value of a number, and of a tensor that it is one, or its shape."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device) if with_shapes else Tensor
    if isinstance(value, (tuple, list)):
        return type(value), [_facts(item, with_shapes) for item in value]
    if isinstance(value, Mapping):
        return {name: _facts(item, with_shapes) for name, item in value.items()}
    return value if value is Tensor else (type(value), value if isinstance(value, _PLAIN) else id(value))
