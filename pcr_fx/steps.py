"""Steps of loops as Dynamo captures them: once for each code and form of arguments, with all that they close over as inputs.

Dynamo guards what a step was traced for: the code, numbers and flags that it closes over, which tensors there are and of what
form. So a capture is used again where, and only where, tracing anew would give the same; the values of tensors are read at
each call.
"""

from __future__ import annotations

import functools
import operator
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from types import CodeType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from pcr_fx.body.isolation import is_watched_by_a_mode
from pcr_fx.errors import UnsupportedError
from pcr_fx.locks import fork_safe_lock
from pcr_fx.marks import ALONE, Framed, NotCaptured, find_step, flat, scan_op, step_between_marks
from pcr_fx.operands import is_ordinary

# Codes and forms of arguments that captures are kept for.
_STEPS = 256
# What Dynamo guards while it captures: hooks too, and all numbers and sizes by their values.
_CAREFULLY = {
    "skip_nnmodule_hook_guards": False,
    "specialize_float": True,
    "capture_scalar_outputs": False,
    "automatic_dynamic_shapes": False,
    "assume_static_by_default": True,
}
# How often a step is captured again because of what it closes over.
_LIMIT = 8


class _Acts(threading.local):
    """What calls of captured steps do, innermost last."""

    def __init__(self) -> None:
        self.present: list[Callable[[Framed, Sequence[Any]], Sequence[Any]]] = []


_acts = _Acts()


def _one_step(combine_fn: Callable[..., Any], carry: Any, xs: Any) -> Any:
    """What Dynamo captures; run by itself, where nothing may be compiled, it says so."""
    if not torch.compiler.is_dynamo_compiling():
        raise NotCaptured("nothing is compiled here")
    return scan_op(step_between_marks, combine_fn, carry, xs, ALONE, True)


class Captures:
    """The captures of steps of one code, for arguments of one form.

    Args:
        carry, xs: trees of stand-ins for what one step is given.
        name, source: of the step.
        limit: how often it is captured again because of what it closes over.

    Attributes:
        failure: why such steps cannot be captured; nothing while they can.
    """

    def __init__(self, carry: Any, xs: Any, name: str, source: str, limit: int = _LIMIT) -> None:
        self.name, self.source, self.failure = name, source, ""
        self.latest: Framed | None = None
        self.carry, self.xs = carry, xs
        self.counts = _count(carry), _count(xs)
        context: Any = torch._dynamo.optimize(self._compile, nopython=True)
        context.enter_exit_hooks.append(torch._dynamo.config._make_closure_patcher(**_CAREFULLY, recompile_limit=limit))
        # A code of its own, since captures are kept and counted by code.
        code = _one_step.__code__.replace(co_name=f"step_{name}" if name.isidentifier() else "step")
        self._run = context(FunctionType(code, _one_step.__globals__))

    def _compile(self, graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
        """Dynamo's backend: what it returns hands each call's tensors to whoever calls."""
        framed = self._found(graph_module)
        self.latest = framed
        return lambda *inputs: _acts.present[-1](framed, inputs)

    def _found(self, graph_module: fx.GraphModule) -> Framed:
        calls = [node for node in graph_module.graph.nodes if node.target is scan_op]
        if len(calls) != 1:
            raise NotCaptured("nothing is computed in it")
        # What Dynamo keeps outside, as views of what a step closes over, belongs to each step.
        return find_step(_written_out(graph_module, calls[0]), *self.counts, (), self.name, self.source)

    def __call__(
        self, combine_fn: Callable[..., Any], act: Callable[[Framed, Sequence[Any]], Sequence[Any]]
    ) -> tuple[Any, Any]:
        """`(carry, ys)` of a step, with what `act` returns in place of its tensors.

        Args:
            act: is given the capture and the inputs of its graph.

        Raises:
            NotCaptured: the step has to run as it is.
        """
        began = False

        def noting(framed: Framed, inputs: Sequence[Any]) -> Sequence[Any]:
            nonlocal began
            began = True
            return act(framed, inputs)

        _acts.present.append(noting)
        try:
            carry, ys = self._run(combine_fn, self.carry, self.xs)
        except NotCaptured:
            raise
        except Exception as error:
            if began:
                raise
            cause = getattr(error, "inner_exception", error)
            if isinstance(cause, UnsupportedError):
                raise cause from None
            self.failure = str(cause) if isinstance(cause, NotCaptured) else _in_words(cause)
            raise NotCaptured(self.failure) from error
        finally:
            _acts.present.pop()
        if not began:
            raise NotCaptured("nothing is computed in it")
        return carry, ys


def _count(tree: Any) -> int:
    """The tensors of a tree."""
    return sum(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(tree))


def _written_out(graph_module: fx.GraphModule, call: fx.Node) -> fx.GraphModule:
    """The graph with a step in place of the call of it."""
    at: Any = call.args[0]
    block: Any = getattr(graph_module, at.target)
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    for node in graph_module.graph.nodes:
        if node is call:
            inner = dict(
                zip(block.graph.find_nodes(op="placeholder"), (copies[one] for one in call.args[1:]), strict=True)
            )
            for each in block.graph.nodes:
                if each.op not in ("placeholder", "output"):
                    inner[each] = graph.node_copy(each, inner.__getitem__)
                    if each.op == "get_attr":
                        inner[each].target = f"{at.target}.{each.target}"
            copies[node] = [inner[one] for one in flat(block.graph.output_node().args[0])]
        elif node.target is operator.getitem and node.args[0] is call:
            copies[node] = copies[call][node.args[1]]
        elif node.op == "output":
            graph.output(tuple(copies[one] for one in flat(node.args[0])))
        elif node is not at:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    return fx.GraphModule(graph_module, graph)


def _in_words(error: Exception) -> str:
    """The first lines of what Dynamo says, which go on for pages."""
    if isinstance(error, torch._dynamo.exc.FailOnRecompileLimitHit):
        return "what it closes over was another at each of many calls; a number that changes may be a tensor"
    lines = [line.strip() for line in str(error).strip().splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Set TORCHDYNAMO", "from user code"))]
    return f"{type(error).__name__}: {' '.join(lines[:2])}" if lines else type(error).__name__


_captures: OrderedDict[tuple[Any, Hashable], Captures] = OrderedDict()
_lock = fork_safe_lock()


def captures_of(
    combine_fn: Callable[..., Any], form: Hashable, stand_ins: Callable[[], tuple[Any, Any]], limit: int = _LIMIT
) -> Captures:
    """The captures of steps of this one's code, for such arguments.

    Args:
        form: all that tells arguments apart, but for their values.
        stand_ins: makes arguments of that form.
        limit: as `Captures` has it.
    """
    key = code_of(combine_fn), form
    found = _captures.get(key)
    if found is None:
        with _lock:
            found = _captures.setdefault(key, Captures(*stand_ins(), *described(combine_fn), limit))
            while len(_captures) > _STEPS:
                _captures.popitem(last=False)
    return found


def may_be_captured(tensors: Sequence[Tensor]) -> bool:
    """Whether nothing looks on that has to see each op of each step."""
    return not (
        torch._C._functorch.peek_interpreter_stack() is not None
        or torch._C._len_torch_dispatch_stack()
        or torch.jit.is_tracing()
        or forward_ad._current_level >= 0
        or (torch._C._is_torch_function_mode_enabled() and is_watched_by_a_mode())
        or not all(map(is_ordinary, tensors))
    )


def latest_of(combine_fn: Callable[..., Any]) -> list[Captures]:
    """All captures of steps of this one's code."""
    code = code_of(combine_fn)
    return [found for (known, _), found in list(_captures.items()) if known is code]


def code_of(function: Any) -> Any:
    """What functions of the same code have in common; what is none stands for itself."""
    while isinstance(function, functools.partial):
        function = function.func
    if isinstance(function, MethodType):
        function = function.__func__
    if isinstance(function, FunctionType):
        return function.__code__
    if isinstance(function, nn.Module):
        return type(function).forward
    call = getattr(type(function), "__call__", None)  # noqa: B004
    return call.__code__ if isinstance(call, FunctionType) else function


def described(function: Any) -> tuple[str, str]:
    """The name of a step, and where it is written."""
    code = code_of(function)
    code = getattr(code, "__code__", code)
    name = getattr(function, "__name__", type(function).__name__)
    source = f"{code.co_filename.rpartition('/')[2]}:{code.co_firstlineno}" if isinstance(code, CodeType) else ""
    return name, source
