"""The proof of batch dimensions: what it claims must hold in numbers, and ordinary blocks must be claimed.

A claim is checked by changing one index along the dimension, to other numbers and to NaN: nothing may move at
the others.
"""

import operator
import random
from collections.abc import Sequence
from functools import cache
from typing import Any

import pytest
import torch
from batch_bodies import BODIES, TABLES, Function, Shape, W, graph_of, record, rows, tensors, trace, write_into_buffer
from random_bodies import SHAPES, Composer
from torch import Tensor, fx, nn

from pcr_fx.body import batch_rules
from pcr_fx.body.batch import BatchDimensions, prove_batch_dimensions
from pcr_fx.body.batch_layouts import Layout, align
from pcr_fx.body.batch_rules import RULES, OpCall, Rule
from pcr_fx.graphs.nodes import aten_name

aten = torch.ops.aten

# Float64. Elsewhere nothing may move, but kernels may sum in another order.
TOLERANCE = 1e-10


def prove(graph: fx.GraphModule, shapes: Sequence[Shape]) -> BatchDimensions:
    """The proof for a body, with each of its claims checked in numbers."""
    result = prove_batch_dimensions(graph, len(shapes))
    assert set(result.dims) | set(result.reasons) == set(range(len(shapes[0])))
    check_claims(graph, tensors(*shapes), result.dims)
    return result


def check_claims(graph: fx.GraphModule, states: Sequence[Tensor], dims: Sequence[int]) -> None:
    def run(*inputs: Tensor) -> tuple[Tensor, ...]:
        result = graph(*(tensor.clone() for tensor in inputs))  # a body may write
        return result if isinstance(result, tuple) else (result,)

    plain = run(*states)
    for dim in dims:
        for index in range(states[0].shape[dim]):
            others = torch.tensor([i for i in range(states[0].shape[dim]) if i != index], dtype=torch.long)
            for value in (None, torch.nan):
                changed = run(*(change(state, dim, index, value) for state in states))
                for before, after in zip(plain, changed, strict=True):
                    assert torch.allclose(
                        before.index_select(dim, others),
                        after.index_select(dim, others),
                        rtol=TOLERANCE,
                        atol=TOLERANCE,
                        equal_nan=bool(before.isnan().any()),
                    ), f"dimension {dim} is claimed, but index {index} moves others"


def change(state: Tensor, dim: int, index: int, value: float | None) -> Tensor:
    """`state` with other numbers at one index: `value`, or some that are far from what was there."""
    changed = state.clone()
    part = changed.select(dim, index)
    part.copy_(-3 * part + 1.7 if value is None else torch.full_like(part, value))
    return changed


@pytest.mark.parametrize(("table", "name"), BODIES)
def test_dimensions_of(table: str, name: str) -> None:
    _, shapes, dims = TABLES[table][name]
    result = prove(graph_of(table, name), shapes)
    assert result.dims == dims, dict(result.reasons)


# --- the tests themselves -----------------------------------------------------------------------------------

# Ops of accelerators, which are not traced here: see test_ops_of_accelerators.
ELSEWHERE = {
    "_scaled_dot_product_cudnn_attention",
    "_scaled_dot_product_efficient_attention",
    "_scaled_dot_product_flash_attention",
    "_scaled_dot_product_fused_attention_overrideable",
    "_thnn_fused_gru_cell",
    "_thnn_fused_lstm_cell",
    "cudnn_batch_norm",
    "miopen_batch_norm",
}
PLACES = {rule.place: op for op, rule in RULES.items() if op not in ELSEWHERE}


def careless(call: OpCall) -> list[Layout]:
    """What every op would do if all were elementwise."""
    return [align(layout[max(len(layout) - call.rank, 0) :], call.rank) for layout in call.operands]


@cache
def bodies_by_op() -> dict[str, list[tuple[str, str]]]:
    """The bodies with each op that has a rule and is not tagged as pointwise anyway."""
    found: dict[str, list[tuple[str, str]]] = {}
    for key in BODIES:
        for node in graph_of(*key).graph.nodes:
            op = aten_name(node)
            if op in RULES and torch.Tag.pointwise not in node.target.tags:
                found.setdefault(op, []).append(key)
    return found


def is_noticed(op: str) -> bool:
    """Whether a body with `op` comes out with other dimensions than its table says."""
    return any(
        prove_batch_dimensions(graph_of(table, name), len(shapes)).dims != dims
        for table, name in bodies_by_op()[op]
        for _, shapes, dims in [TABLES[table][name]]
    )


@pytest.mark.parametrize("op", sorted(set(RULES) - ELSEWHERE - {"dot"}))  # dot keeps nothing
def test_a_missing_rule_is_noticed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    overloads = [getattr(getattr(aten, op), overload) for overload in getattr(aten, op).overloads()]
    if op not in bodies_by_op() and any(torch.Tag.pointwise in overload.tags for overload in overloads):
        pytest.skip("tagged as pointwise in this release of PyTorch")
    bodies_by_op()
    monkeypatch.delitem(RULES, op)
    assert is_noticed(op)


@pytest.mark.parametrize("op", sorted(set(PLACES.values()) - {"dot", PLACES[batch_rules._elementwise]}))
def test_a_careless_rule_is_noticed(op: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place = RULES[op].place
    ops = [each for each, rule in RULES.items() if rule.place is place and each in bodies_by_op()]
    for each in ops:
        monkeypatch.setitem(RULES, each, Rule(careless, "is careless with it"))
    assert any(is_noticed(each) for each in ops)


# --- random bodies ------------------------------------------------------------------------------------------


def random_claims(seed: int) -> int:
    """How many dimensions of more than one index are proved for a random body; each claim is checked."""
    chooser = random.Random(-seed - 1)
    shape, count = chooser.choice(SHAPES), chooser.choice([1, 1, 1, 2])
    shapes = [shape] * count
    graph = trace(lambda *states: Composer(seed)(*states), *shapes)
    return sum(shape[dim] > 1 for dim in prove(graph, shapes).dims)


@pytest.mark.parametrize("block", range(4))
def test_claims_for_random_bodies_hold(block: int) -> None:
    claims = [random_claims(seed) for seed in range(50 * block, 50 * (block + 1))]
    assert sum(claims) >= 5, "hardly anything is proved, so hardly anything is tested"


# --- what is not traced here, and what is refused -----------------------------------------------------------


def hand_built(op: Any, arguments: Sequence[Any], results: Sequence[Shape | None], taken: int = 0) -> fx.GraphModule:
    """A body of one op with several results, one of them the new state. `"x"` in `arguments` is the state."""
    graph = fx.Graph()
    state = graph.placeholder("x")
    call = graph.call_function(op, tuple(state if argument == "x" else argument for argument in arguments))
    call.meta["val"] = tuple(None if shape is None else torch.empty(shape, device="meta") for shape in results)
    result = graph.call_function(operator.getitem, (call, taken))
    state.meta["val"] = result.meta["val"] = call.meta["val"][taken]
    graph.output((result,))
    return fx.GraphModule(nn.Module(), graph)


IMAGE, HEADS = (3, 4, 5, 5), (2, 3, 5, 8)


@pytest.mark.parametrize(
    ("op", "arguments", "shape", "dims"),
    [
        (aten.cudnn_batch_norm, ["x", None, None, None, None, False, 0.1, 1e-5], IMAGE, (0, 1, 2, 3)),
        (aten.miopen_batch_norm, ["x", None, None, None, None, True, 0.1, 1e-5], IMAGE, (1,)),
        (aten._scaled_dot_product_flash_attention, ["x", "x", "x"], HEADS, (0, 1)),
        (aten._scaled_dot_product_flash_attention, ["x", "x", "x", 0.1], HEADS, ()),
        (aten._scaled_dot_product_efficient_attention, ["x", "x", "x", None, False], HEADS, (0, 1)),
        (aten._scaled_dot_product_efficient_attention, ["x", "x", "x", "x", False], HEADS, ()),
        (aten._scaled_dot_product_cudnn_attention, ["x", "x", "x", None, False], HEADS, (0, 1)),
        (aten._scaled_dot_product_fused_attention_overrideable, ["x", "x", "x"], HEADS, (0, 1)),
        (aten._thnn_fused_gru_cell, ["x", "x", "x"], (3, 4), (0,)),
        (aten._thnn_fused_gru_cell, ["x", "x", "x", "x"], (3, 4), ()),
        (aten._thnn_fused_lstm_cell, ["x", "x", "x"], (3, 4), (0,)),
    ],
    ids=str,
)
def test_ops_of_accelerators(op: Any, arguments: list[Any], shape: Shape, dims: Shape) -> None:
    graph = hand_built(op.default, arguments, [shape, shape, shape])
    assert prove_batch_dimensions(graph, 1).dims == dims


def test_only_the_results_that_a_rule_describes_have_dimensions() -> None:
    for taken, dims in enumerate([(0,), (0,), ()]):
        graph = hand_built(aten._thnn_fused_lstm_cell.default, ["x", "x", "x"], [(3, 4)] * 3, taken)
        assert prove_batch_dimensions(graph, 1).dims == dims


def test_a_result_that_is_not_used_couples_nothing() -> None:
    graph = trace(lambda x: (torch.cdist(x, x), x.tanh())[1], (3, 4))
    assert prove_batch_dimensions(graph, 1).dims == (0, 1)


@pytest.mark.parametrize(
    ("function", "shapes", "reasons"),
    [
        (lambda x: x @ W, [(3, 4)], {1: "aten.mm contracts it"}),
        (lambda x: x + x.mean(0), [(3, 4)], {0: "aten.mean reduces over it"}),
        (lambda x: x + x.t(), [(4, 4)], dict.fromkeys((0, 1), "aten.add pairs it with another dimension")),
        (lambda x: x.t(), [(4, 4)], dict.fromkeys((0, 1), "the new state has it in another dimension")),
        (lambda x: x[:1] + x, [(3, 4)], {0: "aten.slice takes a part of it"}),
        (lambda x: (x + rows)[:1], [(1, 4)], {0: "aten.add broadcasts it"}),
        (
            lambda x: x.view(4, 3).sin().view(3, 4),
            [(3, 4)],
            dict.fromkeys((0, 1), "aten.view cuts through it, or drops it"),
        ),
        (lambda x: x[[2, 0, 1]], [(3, 4)], {0: "aten.index gathers along it"}),
        (lambda x: x * x.sum(), [(3, 4)], dict.fromkeys((0, 1), "aten.sum reduces over it")),
        (
            write_into_buffer,
            [(3, 4)],
            {0: "aten.mean reduces over it", 1: "aten.copy_ has no dimension rule for what it writes"},
        ),
        (
            lambda x: x.clone().cumsum_(0),
            [(3,)],
            {0: "aten.cumsum_ has no dimension rule for what it writes"},
        ),
        (nn.RReLU().eval(), [(3,)], {0: "aten.rrelu_with_noise draws random numbers"}),
        (nn.Dropout(), [(3,)], {0: "aten.bernoulli_ draws random numbers"}),
        (lambda x: x + torch.rand(3), [(3,)], {0: "aten.rand draws random numbers"}),
        (
            lambda x: aten.native_dropout(x, 0.5, True)[0],
            [(3,)],
            {0: "aten.native_dropout draws random numbers"},
        ),
        (lambda x: x * 2, [(0,)], {0: "the states have no elements"}),
        (lambda x, y: (x, y), [(3, 4), (3, 2)], {1: "the states differ in size there"}),
        (lambda x, y: (x, y), [(3, 4), (3,)], {1: "the states differ in size there"}),
    ],
)
def test_reasons(function: Function, shapes: list[Shape], reasons: dict[int, str]) -> None:
    result = prove_batch_dimensions(trace(function, *shapes), len(shapes))
    assert result.reasons == reasons
    assert set(result.dims) == set(range(len(shapes[0]))) - set(reasons)


def test_an_op_of_another_library_has_no_rule() -> None:
    with torch.library._scoped_library("batch_dimensions_test", "FRAGMENT") as library:
        library.define("same(Tensor x) -> Tensor", tags=(torch.Tag.pointwise,))
        library.impl("same", lambda x: x.flip(0), "CompositeExplicitAutograd")
        same = torch.ops.batch_dimensions_test.same.default
        result = prove_batch_dimensions(record(lambda x: same(x), (3, 4)), 1)
    assert result.dims == ()
    assert result.reasons[0] == "batch_dimensions_test.same has no dimension rule"


def test_a_number_taken_out_of_a_state_couples_everything() -> None:
    graph = fx.symbolic_trace(lambda x: aten.select.int(rows, 0, aten._local_scalar_dense.default(x)))
    for node in graph.graph.nodes:
        node.meta["val"] = torch.empty((), device="meta")
    graph.graph.find_nodes(op="placeholder")[0].meta["val"] = torch.empty(4, device="meta")
    graph.graph.output_node().args[0].meta["val"] = torch.empty(4, device="meta")
    result = prove_batch_dimensions(graph, 1)
    assert result.reasons == {0: "aten._local_scalar_dense has no dimension rule"}


def test_operands_do_not_couple() -> None:
    """Whatever happens to tensors that do not depend on the states."""
    graph = trace(lambda x, w, b: x + (w.flip(0) @ w.cumsum(0).t()).sum() + b[[1, 0, 2]], (3, 4), (5, 4), (3, 1))
    assert prove_batch_dimensions(graph, 1).dims == (0, 1)


def test_graphs_that_are_not_bodies_are_refused() -> None:
    graph = trace(lambda x: x * 2, (3, 4))
    with pytest.raises(ValueError, match=r"from 1 to 1, .* got 0"):
        prove_batch_dimensions(graph, 0)
    with pytest.raises(ValueError, match="got 2"):
        prove_batch_dimensions(graph, 2)
    with pytest.raises(ValueError, match=r"new states of shapes \[\(3, 4\)\], but returns \[\(4, 3\)\]"):
        prove_batch_dimensions(trace(lambda x: x.t(), (3, 4)), 1)
    with pytest.raises(ValueError, match='no meta\\["val"\\]'):
        prove_batch_dimensions(fx.symbolic_trace(lambda x: x + 1), 1)


def test_the_result_can_be_compared_and_hashed() -> None:
    graph = trace(lambda x: x @ W, (3, 4))
    first, second = prove_batch_dimensions(graph, 1), prove_batch_dimensions(graph, 1)
    assert first == second
    assert hash(first) == hash(second)
