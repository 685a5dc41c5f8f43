"""A step of a loop between operators that mark what goes in and what comes out, as the body of a higher-order operator.

Dynamo refuses side effects in such a body, and the marks tell the step apart from what belongs to its loop.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.variables import higher_order_ops
from torch._ops import HigherOrderOperator
from torch.utils import _pytree as pytree

from pcr_fx.errors import UnsupportedError
from pcr_fx.loop_step import Step
from pcr_fx.loops import Loop
from pcr_fx.options import Options
from pcr_fx.registry import Registry

_DEFAULT = Options()
_SYMBOLIC = (torch.SymInt, torch.SymFloat, torch.SymBool)
# In place of a length: a step by itself.
ALONE = -1
# Numbers that a block was called with of which it is remembered what step it then is.
_FOUND = 256


class NotCaptured(Exception):
    """A step has to run as it is; the message is the reason."""


# --- what marks a step in a graph ---------------------------------------------------------------------------------------


def _enter(tensor: Tensor, moving: Tensor, index: int, is_x: bool, is_stacked: bool) -> Tensor:
    raise AssertionError("it marks what a step is given, and is never run")


def _enter_fake(tensor: Tensor, moving: Tensor, index: int, is_x: bool, is_stacked: bool) -> Tensor:
    return torch.empty_like(tensor[0] if is_stacked else tensor)


def _leave(tensor: Tensor, index: int, is_y: bool, length: int) -> Tensor:
    raise AssertionError("it marks what a step returns, and is never run")


def _leave_fake(tensor: Tensor, index: int, is_y: bool, length: int) -> Tensor:
    if not is_y or length == ALONE:
        return torch.empty_like(tensor)
    return tensor.new_empty((length, *tensor.shape))


# A carry has gradients after some steps, if not before the first: without, Dynamo would leave out derivatives of a function's own.
_MOVING = torch.zeros((), device="cpu", requires_grad=True)
enter = torch.library.custom_op("pcr_fx::enter_step", _enter, mutates_args=())
leave = torch.library.custom_op("pcr_fx::leave_step", _leave, mutates_args=())
enter.register_fake(_enter_fake)
leave.register_fake(_leave_fake)


class ScanOp(HigherOrderOperator):
    """A loop in a graph of Dynamo's: `(block, *tensors)`, with a step between its marks as the block.

    Whatever compiles the graph runs or traces this as it is, down to the operators of the solve node.
    """

    def __init__(self) -> None:
        super().__init__("pcr_fx_scan")

    def __call__(self, block: Any, *tensors: Any) -> Any:
        if not isinstance(block, fx.GraphModule):  # Dynamo broke the graph here
            return _in_sequence(*tensors)
        try:
            framed = block_of(block).framed(tensors)
        except NotCaptured as reason:
            raise UnsupportedError(f"combine_fn of a scan that is compiled cannot be run: {reason}") from None
        _held.keep(id(framed), framed)
        return framed.run(tensors)


scan_op = ScanOp()
# Dynamo traces the block as that of its own operator which does no more than call it.
_known: dict[str, Any] = getattr(higher_order_ops, "_hop_name_to_variable_class", {})
_known[scan_op.__name__] = higher_order_ops.WrapHigherOrderVariable


def _in_sequence(combine_fn: Callable[..., Any], carry: Any, xs: Any, length: int, is_alone: bool) -> Any:
    """What a step that `torch.compile` cannot capture makes of the arguments of `step_between_marks`."""
    if is_alone:
        raise NotCaptured("nothing is compiled here")
    each = []
    for index in range(int(length)):
        result = combine_fn(carry, pytree.tree_map_only(Tensor, operator.itemgetter(index), xs))
        if not isinstance(result, tuple) or len(result) != 2:
            raise UnsupportedError(f"combine_fn must return a pair, the new carry and ys, got {type(result).__name__}")
        carry, y = result
        each.append(pytree.tree_flatten(y))
    columns = zip(*(leaves for leaves, _ in each), strict=True)
    stacked = [torch.stack(parts) if isinstance(parts[0], Tensor) else parts[0] for parts in columns]
    return carry, pytree.tree_unflatten(stacked, each[0][1])


def step_between_marks(combine_fn: Callable[..., Any], carry: Any, xs: Any, length: int, is_alone: bool) -> Any:
    """One step as Dynamo traces it: `(carry, ys)`, the latter `[length, ...]` unless it is alone."""
    carry = _marked(carry, functools.partial(_mark_in, False, False))
    result = combine_fn(carry, _marked(xs, functools.partial(_mark_in, True, not is_alone)))
    if not isinstance(result, tuple) or len(result) != 2:
        raise NotCaptured("it returns no pair")
    new, ys = result
    count = ALONE if is_alone else length
    return _marked(new, functools.partial(_mark_out, False, count)), _marked(
        ys, functools.partial(_mark_out, True, count)
    )


def _mark_in(is_x: bool, is_stacked: bool, tensor: Tensor, index: int) -> Tensor:
    return torch.ops.pcr_fx.enter_step(tensor, _MOVING, index, is_x, is_stacked)


def _mark_out(is_y: bool, length: int, tensor: Tensor, index: int) -> Tensor:
    return torch.ops.pcr_fx.leave_step(tensor, index, is_y, length)


def _marked(tree: Any, mark: Callable[[Tensor, int], Tensor]) -> Any:
    leaves, spec = pytree.tree_flatten(tree)
    marked, index = [], 0
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            leaf = mark(leaf, index)
            index += 1
        marked.append(leaf)
    return pytree.tree_unflatten(marked, spec)


# --- from a graph with marks to a step ----------------------------------------------------------------------------------

_ENTER = (torch.ops.pcr_fx.enter_step, torch.ops.pcr_fx.enter_step.default)
_LEAVE = (torch.ops.pcr_fx.leave_step, torch.ops.pcr_fx.leave_step.default)


# By what their steps compute: captures that differ in nothing else, as with gradients and without, share what was learnt.
_loops: Registry[Any, Loop] = Registry()


@dataclass(eq=False)
class Framed:
    """A step that was found between its marks.

    Attributes:
        step: itself.
        carry, xs: which input of the graph each is; `None` where the graph has none, since it is not read.
        shared: likewise of what the step gets whole.
        results: for each result of the graph which of the step's it is: outputs are counted behind the carry.
        length: of the loop, where the graph says so; or the input of it that does.
        is_checked: whether what the step returns was found to be of the form that it should be.
    """

    step: Step
    carry: list[int | None]
    xs: list[int | None]
    shared: list[int]
    results: list[int]
    length: Any
    is_checked: bool = False
    loops: dict[Options, Loop] = field(default_factory=dict)

    def loop(self, options: Options) -> Loop:
        """The loop of this step."""
        loop = self.loops.get(options)
        if loop is None:
            content = self.step.content
            # What ops make of numbers depends on the default dtype, for which Dynamo has captured the step.
            key = content, options, torch.get_default_dtype()
            known = None if content is None else _loops.get(key)
            loop = known or Loop(self.step, options)
            if content is not None:
                loop = _loops.keep(key, loop)
            self.loops[options] = loop
        return loop

    def run(self, tensors: Sequence[Any], options: Options = _DEFAULT) -> tuple[Tensor, ...]:
        """What the operator in a graph returns."""
        xs = [tensors[at] for at in self.xs if at is not None]
        length = xs[0].shape[0] if xs else tensors[self.length[0]] if isinstance(self.length, tuple) else self.length
        final, ys = self.loop(options).run(
            [tensors[at] for at in self.carry],  # type: ignore[index]
            xs,
            [tensors[at] for at in self.shared],
            length if torch.compiler.is_exporting() else int(length),
        )
        every = [*final, *ys]
        return tuple(every[index] for index in self.results)


def find_step(
    graph_module: fx.GraphModule,
    num_carry: int,
    num_xs: int,
    values: Sequence[Any] = (),
    name: str = "",
    source: str = "",
) -> Framed:
    """The step in a graph with marks.

    Args:
        values: what the graph is given, for inputs that are numbers.

    Raises:
        NotCaptured: there is something in the graph that is no step.
    """
    given = graph_module.graph.find_nodes(op="placeholder")
    graph = fx.Graph()
    copies: dict[fx.Node, Any] = {}
    inputs = [graph.placeholder(f"carry_{index}") for index in range(num_carry)]
    inputs += [graph.placeholder(f"x_{index}") for index in range(num_xs)]
    places: list[int | None] = [None] * len(inputs)
    shared, results, order = [], dict[int, fx.Node](), []
    length: Any = None
    handed_on = 0
    for node in graph_module.graph.nodes:
        if node.op == "call_function" and node.target in _ENTER:
            tensor, _, index, is_x, _ = node.args
            at = index + num_carry * is_x
            places[at] = given.index(tensor)
            inputs[at].meta = dict(node.meta)
            copies[node] = inputs[at]
    for number, node in enumerate(given):
        value = node.meta.get("example_value")
        if all(_is_mark_beside(user, node) for user in node.users):
            continue
        if isinstance(value, Tensor):
            copies[node] = graph.placeholder(f"shared_{number}")
            copies[node].meta = dict(node.meta)
            shared.append(number)
        else:
            copies[node] = as_number(values[number])
    for node in graph_module.graph.nodes:
        if node in copies or node.op in ("placeholder", "output"):
            continue
        if node.op == "call_function" and node.target in _LEAVE:
            tensor, index, is_y, length = node.args
            handed_on += not is_y
            index += num_carry * is_y
            results[index] = copies[tensor]
            copies[node] = index
        else:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    for result in flat(graph_module.graph.output_node().args[0]):
        index = copies.get(result)
        if type(index) is not int:
            raise NotCaptured("it returns what is not its own")
        order.append(index)
    if handed_on != num_carry or sorted(results) != list(range(len(results))):
        raise NotCaptured("it returns another carry than it is given")
    graph.output(tuple(results[index] for index in range(len(results))))
    if isinstance(length, fx.Node):
        length = (given.index(length),) if length.op == "placeholder" else None
    step = Step.of(fx.GraphModule(graph_module, graph), num_carry, num_xs, name, source)
    return Framed(step, places[:num_carry], places[num_carry:], shared, order, length)


def _is_mark_beside(user: fx.Node, node: fx.Node) -> bool:
    """Whether this user is a mark that does not return the node as a result of the step."""
    return user.target in _ENTER or (user.target in _LEAVE and user.args[0] is not node)


def as_number(value: Any) -> Any:
    """A number that a graph is given, as it is now."""
    if isinstance(value, _SYMBOLIC):
        kinds = {torch.SymInt: int, torch.SymFloat: float, torch.SymBool: bool}
        return kinds[type(value)](value)
    return value


def flat(results: Any) -> list[Any]:
    return list(results) if isinstance(results, (tuple, list)) else [results]


def count_marks(block: fx.GraphModule) -> tuple[int, int]:
    """How many tensors of the carry and of `xs` a block is given."""
    marks = [node.args[3] for node in block.graph.nodes if node.op == "call_function" and node.target in _ENTER]
    return sum(not is_x for is_x in marks), sum(bool(is_x) for is_x in marks)


class Block:
    """The step in a block of a graph, which may depend on numbers that the block is given, such as sizes.

    Args:
        graph_module: the block.
        find: finds the step, of all that the block is given.
    """

    def __init__(self, graph_module: fx.GraphModule, find: Callable[[Sequence[Any]], Framed]) -> None:
        self.find = find
        self.numbers = [
            number
            for number, node in enumerate(graph_module.graph.find_nodes(op="placeholder"))
            if not isinstance(node.meta.get("example_value"), Tensor)
            and any(user.target not in (*_ENTER, *_LEAVE) for user in node.users)
        ]
        self.found: dict[Any, Framed] = {}

    def framed(self, given: Sequence[Any]) -> Framed:
        """The step for what the block is given now."""
        key = tuple([as_number(given[at]) for at in self.numbers])
        framed = self.found.get(key)
        if framed is None:
            framed = self.found[key] = self.find(given)
            if len(self.found) > _FOUND:
                self.found.pop(next(iter(list(self.found))), None)  # other threads may be at it, too
        return framed


def block_of(graph_module: fx.GraphModule) -> Block:
    """A block between marks."""
    known: Any = graph_module.__dict__.get("_pcr_fx_block")
    if known is None:
        find = functools.partial(find_step, graph_module, *count_marks(graph_module), name="scan")
        known = graph_module.__dict__["_pcr_fx_block"] = Block(graph_module, lambda given: find(values=given))
    return known


# Those that compilers have traced: what they make names plans, which live as long as their loops.
_held: Registry[int, Framed] = Registry(kept=1024)
