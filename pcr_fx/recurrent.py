"""PyTorch's recurrent networks (`torch.rnn_tanh`, `rnn_relu`, `gru`, `lstm`) with a chain for each layer and direction."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from pcr_fx.body import written_out
from pcr_fx.body.isolation import is_plain_call, is_undisturbed
from pcr_fx.chain import Chain, Leaving, Origin
from pcr_fx.node import SolveNode
from pcr_fx.options import Options
from pcr_fx.planner.rounds import least_in_turn, once


@dataclass(frozen=True)
class Cell:
    """A step of a layer.

    Attributes:
        step: `(x, states, *weights) -> new states`; where it has but one, that.
        states: how many it carries.
    """

    name: str
    step: Callable[..., Any]
    states: int


# By PyTorch's op for the whole network.
CELLS = {
    torch.rnn_tanh: Cell("rnn_tanh_cell", written_out.rnn_tanh_cell, 1),
    torch.rnn_relu: Cell("rnn_relu_cell", written_out.rnn_relu_cell, 1),
    torch.gru: Cell("gru_cell", written_out.gru_cell, 1),
    torch.lstm: Cell("lstm_cell", written_out.lstm_cell, 2),
}
# Numbers of steps that a network has chains for: each is traced and measured, and who has more is served by the op itself.
_LENGTHS = 8
_DTYPES = (torch.float32, torch.float64)
# Sizes of which it is remembered what is the fastest for them.
_LOOKS = 256
# After so many calls it is asked again, and each time after four times as many as the time before.
_AGAIN, _RARER = 16, 4
# Calls of either, which take turns; and what chains have to gain.
_ROUNDS, _WORTHWHILE = 5, 0.95


@dataclass(frozen=True)
class Form:
    """What a network is but for its weights, as its op takes it behind them."""

    op: Any
    has_biases: bool
    num_layers: int
    dropout: float
    training: bool
    bidirectional: bool
    batch_first: bool
    projects: bool

    @property
    def cell(self) -> Cell:
        return CELLS[self.op]

    @property
    def directions(self) -> int:
        return 1 + self.bidirectional

    @property
    def weights_each(self) -> int:
        """Weights of one layer in one direction."""
        return 2 + 2 * self.has_biases + self.projects

    def run(self, x: Tensor, hx: Any, weights: Sequence[Tensor]) -> Any:
        """The op itself."""
        flags = self.has_biases, self.num_layers, self.dropout, self.training, self.bidirectional, self.batch_first
        return self.op(x, hx, list(weights), *flags)


@dataclass(frozen=True)
class OwnOp:
    """PyTorch's op for one layer in one direction, as `Chain.own_op`."""

    form: Form

    @property
    def __name__(self) -> str:
        return f"{self.form.op.__name__} {self.form.training}"

    def __call__(self, states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor]) -> Any:
        given = tuple(one.unsqueeze(0) for one in states)
        flags = self.form.has_biases, 1, 0.0, self.form.training, False, False
        steps, _, *cells = self.form.op(operands[0], given if len(given) > 1 else given[0], list(shared), *flags)
        return steps, *(one[0] for one in cells)


@dataclass
class Known:
    """What was found out of calls that look alike.

    Attributes:
        alone: whether PyTorch's op for the whole network is the fastest.
        until: the call at which that is asked again.
        times: how often it was asked.
    """

    alone: bool
    until: int
    times: int


class Layer:
    """One layer in one direction.

    Attributes:
        nodes: its solve nodes, by the number of steps.
        followers: what tells of the one that was called last, as `chain` and `node`.
    """

    def __init__(self, form: Form, origin: Origin, options: Options) -> None:
        self.form, self.origin, self.options = form, origin, options
        self.nodes: dict[int, SolveNode] = {}
        self.followers: list[Any] = []

    def node(self, length: int) -> SolveNode | None:
        """The one for so many steps; `None` where there are too many of them."""
        if length not in self.nodes:
            if len(self.nodes) >= _LENGTHS:
                return None
            self.nodes[length] = self._made(length)
        node = self.nodes[length]
        for follower in self.followers:
            follower.chain, follower.node = node.chain, node
        return node

    def _made(self, length: int) -> SolveNode:
        states, each = self.form.cell.states, self.form.weights_each
        body = _body(self.form.cell, self.form.has_biases, self.form.projects)
        chain = Chain(body, length, states, 1, each, origin=self.origin, own_op=OwnOp(self.form))
        # The output is the first state of all steps; of a cell's state the last one is wanted.
        return SolveNode(
            chain, self.options, leaving=Leaving(tuple((one, length - 1) for one in range(1, states)), (0,))
        )


@functools.lru_cache(maxsize=32)
def _body(cell: Cell, has_biases: bool, projects: bool) -> fx.GraphModule:
    """A step as a chain's body: `(*states, x, *weights) -> states`."""
    graph = fx.Graph()
    tracer = fx.proxy.GraphAppendingTracer(graph)

    def inputs(*names: str) -> list[Any]:
        return [fx.Proxy(graph.placeholder(name), tracer) for name in names]

    states = inputs(*("hidden", "cell")[: cell.states])
    (x,) = inputs("x")
    weights = inputs("w_ih", "w_hh", *(("b_ih", "b_hh") if has_biases else ()))
    found = cell.step(x, states[0] if cell.states == 1 else tuple(states), *weights)
    new = [found] if cell.states == 1 else list(found)
    if projects:
        new[0] = F.linear(new[0], *inputs("w_hr"))
    graph.output(tuple(one.node for one in new))
    return fx.GraphModule({}, graph)


class Recurrent(nn.Module):
    """A recurrent network in a rewritten graph, called as `(x, hx, weights)`.

    Layers one after another, each a chain, or PyTorch's op for it; or its op for all, where no chain is faster.

    Args:
        form: what it is.
        origin: where it stands.
        length: steps of the input that it was met with.
    """

    def __init__(self, form: Form, origin: Origin, options: Options, length: int) -> None:
        super().__init__()
        self.form, self.options = form, options
        self.layers = [
            Layer(form, _named(origin, form, index), options) for index in range(form.num_layers * form.directions)
        ]
        for layer in self.layers:
            layer.node(length)
        self._known: dict[Any, Known] = {}
        self._calls = 0

    def forward(self, x: Tensor, hx: Any, weights: Sequence[Tensor]) -> Any:
        if not self._may_be_chains(x, hx):
            return self.form.run(x, hx, weights)
        look = x.shape, x.device, x.dtype, torch.is_grad_enabled()
        self._calls += 1
        # In a checkpoint, which compares what is saved, the way stays what it is.
        known, may_change = self._known.get(look), is_undisturbed()
        is_due = may_change and (known is None or self._calls >= known.until)
        if known is not None and known.alone and not is_due:
            return self.form.run(x, hx, weights)
        every = [layer.node(self._steps(x)) for layer in self.layers]
        nodes = [node for node in every if node is not None]
        if len(nodes) < len(every):
            return self.form.run(x, hx, weights)
        found = self._by_layers(x, hx, weights, nodes)
        if is_due:
            self._note(look, self._is_faster_alone(x, hx, weights, nodes))
        return found

    def _note(self, look: Any, alone: bool) -> None:
        known = self._known.get(look)
        times = 0 if known is None else known.times + 1
        others = [(key, one) for key, one in self._known.items() if key != look][: _LOOKS - 1]
        self._known = {look: Known(alone, self._calls + _AGAIN * _RARER**times, times), **dict(others)}

    def _is_faster_alone(self, x: Tensor, hx: Any, weights: Sequence[Tensor], nodes: Sequence[SolveNode]) -> bool:
        """Whether PyTorch's op for the whole network is no slower than its layers: what lies between their chains counts, too.

        A call of either is timed, with its backward where gradients are on.
        """
        records = [node.record for node in nodes]
        if all(record.left_alone for record in records):
            return True
        if self.options.solver != "auto" or self.options.planning != "measured":
            return False
        own = [
            one.detach().requires_grad_(one.requires_grad and torch.is_grad_enabled())
            for one in (x, *_states_in(hx), *weights)
        ]
        runs: dict[bool, Callable[..., Any]] = {
            True: self.form.run,
            False: functools.partial(self._by_layers, nodes=nodes),
        }
        timed = {
            alone: functools.partial(once, functools.partial(_call, run, own, hx), x.device)
            for alone, run in runs.items()
        }
        with torch.random.fork_rng([x.device] if x.device.type == "cuda" else []):
            taken = least_in_turn(timed, _ROUNDS, self.options.planning_budget)
        alone = taken[False] > _WORTHWHILE * taken[True]
        for record in records:
            record.left_alone |= alone
        return alone

    def _steps(self, x: Tensor) -> int:
        return x.shape[int(self.form.batch_first)]

    def _may_be_chains(self, x: Tensor, hx: Any) -> bool:
        """Whether nothing looks on, and the op would take these tensors, but for sizes that any product checks."""
        if not is_plain_call() or x.dim() != 3 or x.dtype not in _DTYPES or not math.prod(x.shape):
            return False
        batch = x.shape[1 - int(self.form.batch_first)]
        fits = all(
            one.dim() == 3 and one.shape[:2] == (len(self.layers), batch) and one.dtype == x.dtype
            for one in _states_in(hx)
        )
        return fits and self._steps(x) >= self.options.min_length

    def _by_layers(self, x: Tensor, hx: Any, weights: Sequence[Tensor], nodes: Sequence[SolveNode]) -> Any:
        form = self.form
        steps = x.transpose(0, 1).contiguous() if form.batch_first else x
        given = _states_in(hx)
        last: list[list[Tensor]] = [[] for _ in given]
        for first in range(0, len(nodes), form.directions):
            outputs = []
            for index in range(first, first + form.directions):
                backwards, own = index > first, weights[index * form.weights_each : (index + 1) * form.weights_each]
                states = [one[index] for one in given]
                whole, *others = nodes[index](states, [steps.flip(0) if backwards else steps], own)
                for kept, state in zip(last, (whole[-1], *others), strict=True):
                    kept.append(state)
                outputs.append(whole.flip(0) if backwards else whole)
            # PyTorch's op gives memory of its own, and a compiler relies on its strides; a trajectory has all states in one row.
            steps = outputs[0].contiguous() if len(outputs) == 1 else torch.cat(outputs, -1)
            if form.training and form.dropout and first + form.directions < len(nodes):
                steps = F.dropout(steps, form.dropout)
        return (steps.transpose(0, 1) if form.batch_first else steps), *map(torch.stack, last)


def _states_in(hx: Any) -> tuple[Tensor, ...]:
    """The states of all layers as PyTorch's op takes them, of which a cell of one has no tuple."""
    return (hx,) if isinstance(hx, Tensor) else tuple(hx)


def _call(run: Callable[..., Any], given: Sequence[Tensor], hx: Any) -> None:
    """A call of a network, and its backward if anything asks for gradients."""
    x, states, weights = given[0], given[1 : 1 + len(_states_in(hx))], given[1 + len(_states_in(hx)) :]
    results = [
        one for one in run(x, states[0] if isinstance(hx, Tensor) else tuple(states), weights) if one.requires_grad
    ]
    leaves = [one for one in given if one.requires_grad]
    if results and leaves:
        torch.autograd.grad(results, leaves, [torch.ones_like(one) for one in results], allow_unused=True)


def _named(origin: Origin, form: Form, index: int) -> Origin:
    """Where one of its layers stands."""
    layer, direction = divmod(index, form.directions)
    words = [f"layer {layer}"] if form.num_layers > 1 else []
    words += ["reverse"] if direction else []
    return Origin(" ".join([origin.modules, *words]), origin.source, (form.cell.name,))
