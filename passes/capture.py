"""Read a model into an FX graph by symbolic tracing, through every module and, given inputs, with known shapes."""

from __future__ import annotations

import contextlib
import inspect
import random
import sys
from collections.abc import Iterator, Mapping, Sequence, Set
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from pcr_fx.body.isolation import tracing
from pcr_fx.errors import CaptureError, UnsupportedError
from pcr_fx.passes.contents import describe
from pcr_fx.passes.facts import Facts
from pcr_fx.passes.reading import Reading
from pcr_fx.passes.shapes import Answers
from pcr_fx.passes.stand_ins import ADVICE
from pcr_fx.passes.tracer import ModelTracer
from pcr_fx.watched import Changes

# How often a model is traced while random numbers are drawn that may be another thread's.
_TRIES = 4
# An argument of these types compares by value; any other must be the same object.
_COMPARED_BY_VALUE = (bool, int, float, str, type(None), torch.dtype, torch.device)


@dataclass(frozen=True, eq=False)
class Captured:
    """A model's graph, and which calls it is for.

    Attributes:
        graph: every node has `nn_module_stack` and `stack_trace` in its meta, and where inputs were given an
            `example_value`: a fake tensor (or whatever the op returns) that holds shape, dtype and device. Its
            placeholders are the arguments that hold tensors, under their names; all others are constants in it.
        facts: what it takes for granted of its arguments, but for sizes.
        answers: what it takes for granted of their sizes; `None` where the forward asked for no shape, dtype or device.
        model_facts: what it takes for granted of the model.
        found_elsewhere: parameters and buffers, by path, that the forward came by otherwise than as attributes of modules.
        names: the arguments that the graph takes, in order.
        notes: what there is to say of what it does not do as the forward does.
        gradients: what it takes for granted to require gradients, or not to: see `ModelTracer`.
    """

    graph: fx.Graph
    facts: Mapping[str, Any]
    answers: Answers | None
    model_facts: Facts
    found_elsewhere: Set[str]
    names: Sequence[str]
    notes: Sequence[str]
    gradients: Sequence[tuple[Mapping[str, Any] | None, str, bool]]

    def holds_for(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the graph computes the forward for these arguments, as `bind_arguments` returns them."""
        if _facts(arguments, self.answers is not None) != self.facts:
            return False
        for holder, name, answer in self.gradients:
            if (arguments if holder is None else holder)[name].requires_grad != answer:
                return False
        return self.answers is None or self.answers.hold_for(arguments)

    @classmethod
    def of_nothing(cls, model: nn.Module, changes: Changes) -> Captured:
        """Of a model that was not read."""
        return cls(fx.Graph(), {}, None, Facts(Reading(model), False, changes), frozenset(), (), (), ())

    def without_graph(self) -> Captured:
        """All but the graph, once another was made of it: it weighs a kilobyte an op."""
        return replace(self, graph=fx.Graph())

    def inputs(self, arguments: Mapping[str, Any]) -> list[Any]:
        """What the graph takes, in order."""
        return [arguments[name] for name in self.names]


def capture_model(model: nn.Module, example_inputs: Any = None, changes: Changes | None = None) -> Captured:
    """The graph of `model`'s forward.

    Args:
        model: the module to read. Tensors that are no attribute of any module become its `_tensor_constant...`.
        example_inputs: its arguments: a tuple or list of positional ones, a dict of named ones, one tensor, or bound ones.
        changes: what counts the changes of its modules, if they are watched.

    Raises:
        CaptureError: the forward branches on the value of a tensor, or otherwise cannot be traced.
        UnsupportedError: `example_inputs` do not fit the forward.
    """
    arguments, known = _arguments(model, example_inputs), example_inputs is not None
    try:
        # What records reads patches a class, as FX does.
        with tracing():
            tracer, graph = _trace(model, arguments, known)
    except CaptureError:
        raise
    except Exception as error:
        hint = "" if known else f" (pass example_inputs if it needs the shapes of {', '.join(arguments)})"
        what = str(error).strip().rstrip(".;")
        if "_wrap_for_grad" in what or "_add_batch_dim" in what:
            what = "it transforms functions (torch.func), of which only their results would be read"
        if "PackedSequence" in what or "_pack_padded_sequence" in what:
            what = "a packed sequence, whose batch shrinks from step to step, is not read; pad the sequences"
        raise CaptureError(f"{type(model).__name__} cannot be traced{hint}: {what}. If it runs, {ADVICE}") from error
    answers = tracer.answers(graph)
    model_facts = Facts(tracer.read, answers is not None, changes or Changes())
    names = [str(node.target) for node in graph.find_nodes(op="placeholder")]
    return Captured(
        graph,
        _facts(arguments, answers is not None),
        answers,
        model_facts,
        tracer.found_elsewhere,
        names,
        list(tracer.notes),
        tracer.gradients,
    )


def _trace(model: nn.Module, arguments: dict[str, Any], known: bool) -> tuple[ModelTracer, fx.Graph]:
    """A tracer, and what it made. Numbers that the forward draws of Python or NumPy would be the same ever after.

    Other threads may draw some at the same time. Those that this one draws of Python are seen; as to NumPy, a forward draws some
    each time that it is traced.
    """
    for attempt in range(_TRIES):
        before, tracer = _states_of_random_numbers(), ModelTracer(model, arguments, known)
        with _draws_of_this_thread(bool(attempt)) as drawn:
            graph = tracer.trace(model)
        pythons, numpys = (now != then for now, then in zip(_states_of_random_numbers(), before, strict=True))
        if not numpys and not (drawn if attempt else pythons):
            return tracer, graph
        if drawn:
            break
    raise CaptureError(f"the forward draws random numbers of Python or NumPy, which would never change; {ADVICE}")


def _states_of_random_numbers() -> tuple[Any, Any]:
    """That of Python's, and NumPy's."""
    return random.getstate(), str(np.random.get_state(legacy=False))


@contextlib.contextmanager
def _draws_of_this_thread(looks: bool) -> Iterator[list[str]]:
    """The names of those functions that draw random numbers of Python, as they are called; looking for them takes time."""
    before, drawn = sys.getprofile(), list[str]()

    def look(frame: Any, event: str, called: Any) -> None:
        if event == "c_call" and isinstance(getattr(called, "__self__", None), random.Random):
            drawn.append(called.__name__)

    if looks:
        sys.setprofile(look)
    try:
        yield drawn
    finally:
        if looks:
            sys.setprofile(before)


def _arguments(model: nn.Module, example_inputs: Any) -> dict[str, Any]:
    """The arguments to trace with. Of those that nobody knows it is known that they are tensors."""
    if example_inputs is None:
        parameters = inspect.signature(model.forward).parameters.values()
        return {
            p.name: Tensor
            for p in parameters
            if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)
        }
    if isinstance(example_inputs, inspect.BoundArguments):
        return example_inputs.arguments
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
    return bind_to(inspect.signature(model.forward), type(model).__name__, args, kwargs)


def bind_to(signature: inspect.Signature, name: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """`bind_arguments` for the signature of a forward, which costs more to make than all the rest."""
    try:
        return signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise UnsupportedError(f"inputs do not fit {name}.forward{signature}: {error}") from error


class _Held:
    """Keeps a value alive, so that its id is its own, and says nothing of it."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Held)

    __hash__ = None  # type: ignore[assignment]


def _facts(value: Any, with_kinds: bool) -> Any:
    """What a graph may take for granted: the value of a number, and of a tensor that it is one, or of what kind."""
    if isinstance(value, Tensor):
        return (value.dim(), value.dtype, value.device) if with_kinds else Tensor
    if isinstance(value, (tuple, list)):
        return type(value), [_facts(item, with_kinds) for item in value]
    if isinstance(value, Mapping):
        return {name: _facts(item, with_kinds) for name, item in value.items()}
    if value is Tensor:
        return value
    return type(value), value if isinstance(value, _COMPARED_BY_VALUE) else (describe(value), _Held(value))
