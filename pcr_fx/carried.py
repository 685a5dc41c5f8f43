"""Chains in programs that leave the process: one operator, which is given a chain as a text.

`torch.ops.pcr_fx.chain(states, operands, shared, text)` is what an exported program calls in place of a chain's blocks. A
process that loads it and imports `pcr_fx` makes a solve node of the text at the first call, and plans and kernels as ever.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._guards import detect_fake_mode
from torch._subclasses.fake_tensor import FakeTensorMode
from torch._subclasses.functional_tensor import FunctionalTensorMode
from torch.fx.experimental.proxy_tensor import ProxyTorchDispatchMode, make_fx
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from pcr_fx.body import Signature
from pcr_fx.body.isolation import apart, isolated
from pcr_fx.body.purity import check_pure
from pcr_fx.body.written_out import may_raise, write_out_fused
from pcr_fx.chain import Chain, Leaving
from pcr_fx.errors import BodyError, TextError
from pcr_fx.graphs.effects import hides_ops, is_barrier, is_of_transform
from pcr_fx.graphs.parts import Part
from pcr_fx.looks import autocast_dtype, refuse_mixed, refuse_unusual
from pcr_fx.node import Family, SolveNode
from pcr_fx.operands import Given
from pcr_fx.ops import owned
from pcr_fx.options import Options
from pcr_fx.planner import Plan, make_plan
from pcr_fx.registry import Registry
from pcr_fx.switches import is_disabled
from pcr_fx.texts import Described, read_text, write_text

log = logging.getLogger(__name__)

_COMPILERS = (ProxyTorchDispatchMode, FunctionalTensorMode, FakeTensorMode)

# --- chains by their texts ---------------------------------------------------------------------------------------------


class Told:
    """What a text says of chains on one device, with a solve node for each length that it was called with."""

    def __init__(self, described: Described) -> None:
        self.described = described
        self.nodes: Registry[int, SolveNode] = Registry()
        self._family = Family(self._plan)
        self._plans: Registry[Signature, Plan] = Registry()

    def _plan(self, chain: Chain, signature: Signature, options: Options) -> Plan:
        """That of the first length, for another."""
        known = self._plans.get(signature)
        if known is None:
            first = self.described.chain.of_length(max(chain.length, 2))
            known = self._plans.keep(signature, make_plan(first, signature, options))
        return known.for_chain(chain)

    def length(self, operands: Sequence[Tensor]) -> Any:
        """How many blocks there are.

        Raises:
            TextError: the text and the operands do not agree on that.
        """
        expected = self.described.length
        if expected is None:
            return operands[0].shape[0]
        for operand in operands:
            if operand.shape[0] != expected:
                raise TextError(f"a chain of {expected} blocks was given operands of {operand.shape[0]}")
        return expected

    def node(self, length: int) -> SolveNode:
        node = self.nodes.get(length)
        if node is None:
            chain = self.described.chain.of_length(length)
            leaving = self.described.leaving_of(length)
            family = self._family if self.described.length is None else None
            made = SolveNode(chain, self.described.options, leaving=leaving, family=family)
            node = self.nodes.keep(length, made)
        return node

    def groups(
        self, states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor]
    ) -> tuple[Sequence[Tensor], ...]:
        """Operands and shared operands of the chain, then those of its head.

        Raises:
            TextError: there are more tensors than the text says, or fewer.
        """
        chain, head = self.described.chain, self.described.chain.head
        first, second = chain.num_operands, chain.num_shared
        beside = (0, 0) if head is None else (head.num_operands, head.num_shared)
        expected = chain.num_states, first + beside[0], second + beside[1]
        got = len(states), len(operands), len(shared)
        if got != expected:
            raise TextError(f"a chain of {expected} states, operands and shared operands was given {got}")
        return operands[:first], shared[:second], operands[first:], shared[second:]


_told: Registry[tuple[str, torch.device], Told] = Registry()


def told(text: str, device: torch.device) -> Told:
    """What a text says, read once in a process.

    Raises:
        TextError: it cannot be read.
    """
    key = text, device
    found = _told.get(key)
    return _told.keep(key, Told(read_text(text, device))) if found is None else found


def _told_of(text: str, states: Sequence[Tensor]) -> Told:
    return told(text, states[0].device if states else torch.device("cpu"))


# --- the operator ------------------------------------------------------------------------------------------------------

_library = torch.library.Library("pcr_fx", "FRAGMENT")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.cudagraph_unsafe)
_library.define("chain(Tensor[] states, Tensor[] operands, Tensor[] shared, str text) -> Tensor[]", tags=_TAGS)
_library.define(
    "chain_pullback(Tensor[] states, Tensor[] operands, Tensor[] shared, Tensor?[] cotangents, str text) -> Tensor[]",
    tags=_TAGS,
)


def _run(states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor], text: str) -> list[Tensor]:
    """What leaves the chain, as its solve node returns it."""
    if is_disabled():
        return _block_by_block(states, operands, shared, text)
    chain = _told_of(text, states)
    own, common, further, more = chain.groups(states, operands, shared)
    node = chain.node(int(chain.length(operands)))
    return _together(node(states, own, common, further, more))


def _together(leaves: Sequence[Any]) -> list[Tensor]:
    """Each leaf as one tensor; of a chain that ran in the model's own ops they are lists."""
    return [torch.stack(leaf) if isinstance(leaf, list) else leaf for leaf in leaves]


def _block_by_block(
    states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor], text: str
) -> list[Tensor]:
    """`_run` in PyTorch's ops alone, which every transform can push batches and tangents through."""
    chain = _told_of(text, states)
    own, common, further, more = chain.groups(states, operands, shared)
    node = chain.node(int(chain.length(operands)))
    return _together(node.as_written(Given(states, own, common, further, more)))


def _differentiable(
    states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor], text: str
) -> list[Tensor]:
    # AOTInductor's code hands over nothing for an empty list.
    operands, shared = operands or [], shared or []
    if _is_compiled():
        return list(_Carried.apply(text, len(states), len(operands), *states, *operands, *shared))
    if torch._C._functorch.peek_interpreter_stack() is not None:
        return _block_by_block(states, operands, shared, text)
    return _run(states, operands, shared, text)


def _is_compiled() -> bool:
    """Whether a compiler or an exporter looks on, and nothing else does."""
    modes = _get_current_dispatch_mode_stack()
    return bool(modes) and all(isinstance(mode, _COMPILERS) for mode in modes)


def _below(states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor], text: str) -> list[Tensor]:
    operands, shared = operands or [], shared or []
    with torch.no_grad():
        return owned(_run(states, operands, shared, text), [*states, *operands, *shared])


def _fake(states: Sequence[Tensor], operands: Sequence[Tensor], shared: Sequence[Tensor], text: str) -> list[Tensor]:
    chain = _told_of(text, states)
    own, common, further, more = chain.groups(states, operands, shared)
    record, length = chain.described.chain, chain.length(operands)
    values = list(states)
    if record.head is not None:
        parts, beside = [operand[0] for operand in own], [operand[0] for operand in further]
        numbers, others = [each[0] for each in record.literals], [each[0] for each in record.head.literals]
        values = list(record.head.block.forward(*states, *parts, *numbers, *common, *beside, *others, *more))
    leaving = chain.described.leaving
    whole = [values[index].new_empty((length, *values[index].shape)) for index in leaving.whole]
    return [*whole, *(values[index].new_empty(values[index].shape) for index, _ in leaving.taps)]


class _Carried(torch.autograd.Function):
    """The operator in what a compiler makes of it, forward and backward."""

    @staticmethod
    def forward(ctx: Any, text: str, num_states: int, num_operands: int, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]
        ctx.text, ctx.splits = text, (num_states, num_states + num_operands)
        ctx.set_materialize_grads(False)
        ctx.save_for_backward(*tensors)
        with torch._C._AutoDispatchBelowAutograd():
            found = tuple(torch.ops.pcr_fx.chain(*_groups(tensors, ctx.splits), text))
        ctx.mark_non_differentiable(*(one for one in found if not one.is_floating_point()))
        return found

    @staticmethod
    def backward(ctx: Any, *cotangents: Tensor | None) -> tuple[Any, ...]:
        tensors = ctx.saved_tensors
        pulled = iter(torch.ops.pcr_fx.chain_pullback(*_groups(tensors, ctx.splits), list(cotangents), ctx.text))
        return None, None, None, *(next(pulled) if one.is_floating_point() else None for one in tensors)


def _groups(tensors: Sequence[Tensor], splits: tuple[int, int]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    first, second = splits
    return list(tensors[:first]), list(tensors[first:second]), list(tensors[second:])


def _pulled(
    states: Sequence[Tensor],
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    text: str,
) -> list[Tensor]:
    """The cotangents of all inputs that are floating, in order."""
    given = [*states, *operands, *shared]
    with torch.enable_grad():
        leaves = [one.detach().requires_grad_(one.is_floating_point()) for one in given]
        splits = len(states), len(states) + len(operands)
        found = _run(*_groups(leaves, splits), text)
        pairs = [(one, cotangent) for one, cotangent in zip(found, cotangents, strict=True) if cotangent is not None]
        pairs = [(one, cotangent) for one, cotangent in pairs if one.requires_grad]
        moving = [leaf for leaf in leaves if leaf.requires_grad]
        results, seeds = [one for one, _ in pairs], [cotangent for _, cotangent in pairs]
        gradients = torch.autograd.grad(results, moving, seeds, allow_unused=True) if pairs else [None] * len(moving)
    whole = [torch.zeros_like(leaf) if one is None else one for one, leaf in zip(gradients, moving, strict=True)]
    return owned(whole, [*given, *seeds])


def _pulled_by_autograd(*args: Any) -> list[Tensor]:
    if _is_compiled():
        with torch._C._AutoDispatchBelowAutograd():
            found: list[Tensor] = torch.ops.pcr_fx.chain_pullback(*args)
            return found
    return _pulled(*args)


def _pulled_below(*args: Any) -> list[Tensor]:
    return apart(_pulled)(*args)  # in a thread where autograd is not left out


def _fake_pulled(
    states: Sequence[Tensor],
    operands: Sequence[Tensor],
    shared: Sequence[Tensor],
    cotangents: Sequence[Tensor | None],
    text: str,
) -> list[Tensor]:
    return [one.new_empty(one.shape) for one in (*states, *operands, *shared) if one.is_floating_point()]


_library.impl("chain", _differentiable, "Autograd")
_library.impl("chain", _block_by_block, "FuncTorchBatched")
_library.impl("chain", _below, "CompositeExplicitAutograd")
_library.impl("chain_pullback", _pulled_by_autograd, "Autograd")
_library.impl("chain_pullback", _pulled_below, "CompositeExplicitAutograd")
torch.library.register_fake("pcr_fx::chain", _fake, lib=_library)
torch.library.register_fake("pcr_fx::chain_pullback", _fake_pulled, lib=_library)


# --- from a solve node to the operator ---------------------------------------------------------------------------------


class Carrier(nn.Module):
    """In place of a solve node: calls the operator, which others carry, or runs the blocks as the model wrote them."""

    def __init__(self, node: SolveNode) -> None:
        super().__init__()
        self.node = node

    def forward(self, *tensors: Any) -> tuple[Any, ...]:
        """As `SolveNode.forward`."""
        node, given = self.node, Given(*tensors)
        try:
            found = carry(node.chain, node.leaving, node.options, given.stacked())
        except (BodyError, TextError) as reason:
            log.info("%s is exported block by block: %s", node.record.name, reason)
            return node.as_written(given)
        return node.placed(found) if node.has_places else tuple(found)


def carry(chain: Chain, leaving: Leaving, options: Options, given: Given, is_open: bool = False) -> list[Tensor]:
    """What leaves a chain, by the operator.

    Args:
        is_open: whether there are as many blocks as the operands have parts; taps then count from the last one, -1.

    Raises:
        BodyError, TextError: there is no saying in a text what the blocks do.
    """
    every: list[Tensor] = [tensor for group in given for tensor in group]  # type: ignore[misc]
    device = given.states[0].device
    refusal = refuse_unusual(every) or refuse_mixed([one.dtype for one in every], device.type)
    if refusal is not None:
        raise refusal
    if any(one.is_complex() for one in every):
        raise BodyError("the operator has gradients of real tensors alone")
    if autocast_dtype(device.type) is not None:
        raise BodyError("autocast decides the dtypes of its ops")
    check_says_all(chain)
    specs = [
        [(tuple(one.shape[first:]), one.dtype, one.device) for one in group]
        for first, group in zip((0, 1, 0, 1, 0), given, strict=True)
    ]
    graphs = traced_graphs(chain, specs, detect_fake_mode(every) or FakeTensorMode())
    text = write_text(chain, graphs, Leaving(leaving.taps, leaving.whole), options, device, is_open)
    told(text, device)  # what cannot be read is not written
    operands, shared = [*given.operands, *given.head_operands], [*given.shared, *given.head_shared]
    found: list[Tensor] = torch.ops.pcr_fx.chain(list(given.states), operands, shared, text)
    return found


def check_says_all(chain: Chain) -> None:
    """Whether the ops of a block say all that it does.

    Raises:
        BodyError: they do not.
    """
    if chain.own_op is not None:
        raise BodyError("it is one op of PyTorch's")
    if may_raise(chain.body):
        raise BodyError("its blocks may raise errors")
    for graph in (chain.body, *(() if chain.head is None else (chain.head.block,))):
        for one in graph.graph.nodes:
            if isinstance(one.target, Part) or hides_ops(one) or is_barrier(one) or is_of_transform(one):
                raise BodyError(f"{one.target} does more than its ops say")


@isolated
def traced_graphs(chain: Chain, specs: Sequence[Sequence[Any]], mode: FakeTensorMode) -> dict[str, fx.Graph]:
    """The body as an aten graph, with those of its head, for tensors of sizes that may be symbols."""

    def fake(spec: tuple[Any, ...]) -> Tensor:
        shape, dtype, device = spec
        return torch.empty(shape, dtype=dtype, device=device)

    with mode, torch.no_grad(), sdpa_kernel(SDPBackend.MATH):
        states, operands, shared, further, more = ([fake(spec) for spec in group] for group in specs)
        number = torch.float64
        numbers = [torch.empty((), dtype=number, device=states[0].device) for _ in chain.literals]
        given = [*states, *operands, *numbers, *shared]
        graphs = {"body": _aten(chain.body, given, states)}
        head = chain.head
        if head is not None:
            others = [torch.empty((), dtype=number, device=states[0].device) for _ in head.literals]
            after = [fake(spec) for spec in specs[0]]
            graphs["head"] = _aten(head.body, [*states, *after, *further, *others, *more])
            graphs["block"] = _aten(head.block, [*given, *further, *others, *more], states)
    return graphs


def _aten(body: fx.GraphModule, given: Sequence[Tensor], states: Sequence[Tensor] = ()) -> fx.Graph:
    written_out = write_out_fused(body)
    try:
        traced = make_fx(lambda *tensors: tuple(written_out.forward(*tensors)))(*given)
    except Exception as error:
        raise BodyError(f"it cannot be traced: {error}") from error
    check_pure(traced)
    results: Any = traced.graph.output_node().args[0]
    for state, result in zip(states, results, strict=False):
        found = result.meta["val"]
        if found.shape != state.shape or found.dtype != state.dtype:
            raise BodyError("a block changes the shape or dtype of its state")
    traced.graph.eliminate_dead_code()
    return traced.graph
