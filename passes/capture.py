"""Read a model into an FX graph by symbolic tracing, through every module and, given inputs, with known shapes."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from torch import Tensor, fx, nn

from pcr_fx.errors import CaptureError, UnsupportedError
from pcr_fx.passes.tracer import ModelTracer, attribute

__all__ = ["Captured", "attribute", "bind_inputs", "capture_model"]


@dataclass(frozen=True, eq=False)
class Captured:
    """A model's graph, and which calls it holds for.

    Attributes:
        graph: every node has `nn_module_stack` and `stack_trace` in its meta and, where inputs were given, an
            `example_value`: a fake tensor (or whatever the op returns) that holds shape, dtype and device. It has a
            placeholder for each parameter of the forward that holds a tensor.
        facts: what the graph takes for granted, as `facts_of` says it of a call's arguments.
        reads_shapes: whether the forward asked for the shape, dtype or device of a tensor.
    """

    graph: fx.Graph
    facts: Any
    reads_shapes: bool

    def inputs(self, arguments: Mapping[str, Any]) -> list[Any] | None:
        """The values of the placeholders for a call with these arguments; `None` if the graph is not for them."""
        if facts_of(arguments, self.reads_shapes) != self.facts:
            return None
        return [arguments[str(node.target)] for node in self.graph.nodes if node.op == "placeholder"]


def capture_model(model: nn.Module, example_inputs: Any = None) -> Captured:
    """The graph of `model`'s forward.

    Args:
        model: the module to read. Constants of its forward that are tensors become attributes of it.
        example_inputs: its arguments: a tuple or list of positional ones, a dict of named ones, or one tensor.

    Raises:
        CaptureError: the forward branches on the value of a tensor, or otherwise cannot be traced.
        UnsupportedError: `example_inputs` do not fit the forward.
    """
    arguments = None if example_inputs is None else bind_inputs(model, *_as_call(model, example_inputs))
    tracer = ModelTracer(model, arguments)
    try:
        with _left_untouched(model):
            graph = tracer.trace(model)
    except CaptureError:
        raise
    except Exception as error:
        known = "" if arguments is not None else " (pass example_inputs if it needs the shapes of its inputs)"
        raise CaptureError(
            f"{type(model).__name__} cannot be traced{known}: {error}. "
            'torch.compile(model, backend="deeppcr") reads models with such control flow.'
        ) from error
    return Captured(graph, facts_of(tracer.assumed, tracer.reads_shapes), tracer.reads_shapes)


def bind_inputs(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """The arguments of a call of `model` by name, defaults included."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs)
    except TypeError as error:
        raise UnsupportedError(f"inputs do not fit {type(model).__name__}.forward{signature}: {error}") from error
    bound.apply_defaults()
    return dict(bound.arguments)


def _as_call(model: nn.Module, example_inputs: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    if isinstance(example_inputs, Tensor):
        return (example_inputs,), {}
    if isinstance(example_inputs, Mapping):
        return (), example_inputs
    if isinstance(example_inputs, (tuple, list)):
        return example_inputs, {}
    raise UnsupportedError(
        f"example_inputs must be a tuple, list, dict or tensor, got {type(example_inputs).__name__}"
    )


def facts_of(value: Any, with_shapes: bool) -> Any:
    """What a graph may take for granted of an argument: a number's value, and a tensor's shape, dtype and device."""
    if isinstance(value, Tensor):
        return (value.shape, value.dtype, value.device) if with_shapes else Tensor
    if isinstance(value, (tuple, list)):
        return type(value), [facts_of(item, with_shapes) for item in value]
    if isinstance(value, Mapping):
        return type(value), {name: facts_of(item, with_shapes) for name, item in value.items()}
    return type(value), value


@contextmanager
def _left_untouched(model: nn.Module) -> Iterator[None]:
    """Undo what the forward stores in its modules while it is traced: stand-ins for tensors are of no use there."""
    before = [(module, {name: _copied(value) for name, value in module.__dict__.items()}) for module in model.modules()]
    try:
        yield
    finally:
        ...
