"""Facts about nodes of FX graphs, in the dialect of models and in that of aten graphs."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.experimental.proxy_tensor import make_fx

from pcr_fx.graphs.attributes import attribute, attributes_of, holder_of
from pcr_fx.graphs.effects import is_fresh, is_random, updates_statistics, writes, written_nodes
from pcr_fx.graphs.nodes import (
    argument,
    arguments_of,
    aten_name,
    declared_writes,
    is_mutable,
    nodes_in,
    op_name,
    overload_name,
    qualified_name,
    shape_of,
)

aten = torch.ops.aten


def call(target: Callable[..., Any] | str, *arguments: Any, **named: Any) -> fx.Node:
    """A node that calls `target`; arguments that are strings of one letter stand for tensors."""
    graph = fx.Graph()
    inputs = {name: graph.placeholder(name) for name in "xyzuvw"}

    def given(value: Any) -> Any:
        return inputs.get(value, value) if isinstance(value, str) else value

    make = graph.call_method if isinstance(target, str) else graph.call_function
    return make(target, tuple(map(given, arguments)), {name: given(value) for name, value in named.items()})


def title(value: object) -> str:
    """What a case is called, which is the same in every process."""
    target = value.target if isinstance(value, fx.Node) else value
    return getattr(target, "__name__", str(target)) if callable(target) else str(target)


def names(nodes: list[fx.Node]) -> list[str]:
    return [node.name for node in nodes]


@pytest.mark.parametrize(
    ("node", "author", "qualified", "overload"),
    [
        (call(aten.add.Tensor, "x", "y"), "add", "aten.add", "add.Tensor"),
        (call(aten.add_.Tensor, "x", "y"), "add_", "aten.add_", "add_.Tensor"),
        (call(aten.mm.default, "x", "y"), "mm", "aten.mm", "mm.default"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_three_names_of_an_overload(node: fx.Node, author: str, qualified: str, overload: str) -> None:
    assert (op_name(node), qualified_name(node), overload_name(node)) == (author, qualified, overload)
    assert aten_name(node) == author


@pytest.mark.parametrize(
    ("node", "name"),
    [
        (call(torch.tanh, "x"), "tanh"),
        (call(F.linear, "x", "y"), "linear"),
        (call("view", "x", 2), "view"),
        (call("relu_", "x"), "relu_"),
        (call(operator.and_, "x", "y"), "and"),
        (call(torch.lstm_cell, "x"), "lstm_cell"),
    ],
)
def test_a_captured_op_bears_its_authors_name(node: fx.Node, name: str) -> None:
    assert op_name(node) == name
    assert aten_name(node) is None


def test_an_argument_is_found_by_place_and_by_name() -> None:
    assert argument(call(F.dropout, "x", 0.25), 1, "p", 0.5) == 0.25
    assert argument(call(F.dropout, "x", p=0.25), 1, "p", 0.5) == 0.25
    assert argument(call(F.dropout, "x"), 1, "p", 0.5) == 0.5
    assert argument(call(F.dropout), 0) is None


def test_arguments_of_an_overload_have_their_defaults() -> None:
    given = arguments_of(call(aten.sum.dim_IntList, "x", [1], dtype=torch.float64))
    assert given["self"].name == "x"
    assert {name: value for name, value in given.items() if name != "self"} == {
        "dim": [1],
        "keepdim": False,
        "dtype": torch.float64,
    }


def test_nodes_are_found_in_nested_arguments() -> None:
    node = call(torch.cat, ["x", "y"], 1)
    node.args = (
        [*node.graph.find_nodes(op="placeholder")[:2]],
        slice(node.graph.find_nodes(op="placeholder")[2], None),
    )
    assert names(list(nodes_in(node.args))) == ["x", "y", "z"]


def test_the_shape_of_what_a_node_makes() -> None:
    graph = make_fx(lambda x: x @ x.T)(torch.ones(2, 3))
    assert [shape_of(node) for node in graph.graph.nodes if node.op == "call_function"] == [(3, 2), (2, 2)]


@pytest.mark.parametrize(
    ("node", "written"),
    [
        (call(torch.tanh, "x"), []),
        (call(torch.tanh, "x", out="y"), ["y"]),
        (call(torch.tanh_, "x"), ["x"]),
        (call("tanh_", "x"), ["x"]),
        (call("__setitem__", "x", 0, "y"), ["x"]),
        (call(operator.setitem, "x", 0, "y"), ["x"]),
        (call(operator.iadd, "x", "y"), ["x"]),
        (call(operator.and_, "x", "y"), []),
        (call(F.relu, "x", True), ["x"]),
        (call(F.relu, "x", inplace=True), ["x"]),
        (call(F.relu, "x"), []),
        (call(F.embedding, "x", "w", None, 1.0), ["w"]),
        (call(F.embedding, "x", "w"), []),
        (call(aten.copy_.default, "x", "y"), ["x"]),
        (call(aten.add.out, "x", "y", out="z"), ["z"]),
        (call(aten.add, "x", "y"), []),
        (call(aten.add, "x", "y", out="z"), ["z"]),
        (call(F.batch_norm, "x", "u", "v", training=True), ["u", "v"]),
        (call(F.batch_norm, "x", "u", "v"), []),
        (call(F.batch_norm, "x", None, None, training=True), []),
        (call(torch.batch_norm, "x", "y", "z", "u", "v", True, 0.1, 1e-5, True), ["u", "v"]),
        (call(F.instance_norm, "x", "u", "v"), ["u", "v"]),
        (call(F.instance_norm, "x"), []),
        (call(aten.native_batch_norm.default, "x", "y", "z", "u", "v", True, 0.1, 1e-5), ["u", "v"]),
        (call(aten.native_batch_norm.default, "x", "y", "z", "u", "v", False, 0.1, 1e-5), []),
        (call(aten._native_batch_norm_legit.no_stats, "x", "y", "z", True, 0.1, 1e-5), []),
    ],
    ids=title,
)
def test_what_an_op_writes_to(node: fx.Node, written: list[str]) -> None:
    assert names(writes(node)) == written


def test_a_schema_tells_what_its_overload_writes_to() -> None:
    assert names(declared_writes(call(aten.native_batch_norm.default, "x", "y", "z", "u", "v", True, 0.1, 1e-5))) == []
    assert names(declared_writes(call(aten.add_.Tensor, "x", "y"))) == ["x"]
    assert is_mutable(call(aten.add_.Tensor, "x", "y"))
    assert not is_mutable(call(aten.add.Tensor, "x", "y"))


def test_statistics_are_updated_in_training_only() -> None:
    assert updates_statistics(call(F.batch_norm, "x", "u", "v", training=True))
    assert not updates_statistics(call(F.batch_norm, "x", "u", "v", training=False))
    assert not updates_statistics(call(F.layer_norm, "x", (3,)))
    assert not updates_statistics(call(aten.native_layer_norm.default, "x", [3], None, None, 1e-5))


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        (call(torch.rand, 3), True),
        (call("normal_", "x"), True),
        (call(torch.tanh, "x"), False),
        (call(F.dropout, "x"), True),
        (call(F.dropout, "x", 0.5, False), False),
        (call(F.dropout, "x", p=0.0), False),
        (call(F.rrelu, "x"), False),
        (call(F.rrelu, "x", training=True), True),
        (call(F.scaled_dot_product_attention, "x", "y", "z"), False),
        (call(F.scaled_dot_product_attention, "x", "y", "z", None, 0.1), True),
        (call(aten.scaled_dot_product_attention.default, "x", "y", "z"), False),
        (call(aten.scaled_dot_product_attention.default, "x", "y", "z", None, 0.1), True),
        (call(aten._scaled_dot_product_flash_attention_for_cpu.default, "x", "y", "z"), False),
        (call(aten.native_dropout.default, "x", 0.5, True), True),
        (call(aten.bernoulli_.float, "x"), True),
        (call(aten.mm.default, "x", "y"), False),
    ],
    ids=title,
)
def test_which_ops_draw_random_numbers(node: fx.Node, expected: bool) -> None:
    assert is_random(node) is expected


def test_an_attribute_is_not_random_by_its_name() -> None:
    graph = fx.Graph()
    assert not is_random(graph.get_attr("dropout.weight"))


def test_fresh_results_share_no_memory() -> None:
    def linear(x: Tensor) -> Tensor:  # a model's author may call a view so
        return x

    assert is_fresh(call(F.linear, "x", "w"))
    assert not is_fresh(call("view", "x", 2))
    assert not is_fresh(call(linear, "x"))
    assert not is_fresh(call(F.relu, "x", inplace=True))


def test_what_is_taken_by_a_tensor_is_a_copy() -> None:
    graph = fx.Graph()
    x, index, number, unknown = map(graph.placeholder, ("x", "index", "number", "unknown"))
    index.meta["example_value"] = torch.ones(2, dtype=torch.int64)
    number.meta["example_value"] = torch.ones((), dtype=torch.int64)
    taken = {
        place: graph.call_function(operator.getitem, (x, key))
        for place, key in enumerate([index, (slice(None), index), [0, 1], number, unknown, 0, (0, slice(None))])
    }
    assert [is_fresh(node) for node in taken.values()] == [True, True, True, False, False, False, False]


def test_a_write_to_a_view_writes_to_what_it_is_a_view_of() -> None:
    graph = fx.Graph()
    x = graph.placeholder("x")
    fresh = graph.call_function(torch.tanh, (x,))
    row = graph.call_function(operator.getitem, (x, 0))
    other = graph.call_method("view", (x, -1))
    write = graph.call_method("zero_", (row,))
    assert written_nodes(graph) == dict.fromkeys([x, row, other, write], write)
    assert fresh not in written_nodes(graph)


class Nested(nn.Module):
    of_class = 3

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(2, 2)
        self.inner.register_buffer("scale", torch.ones(2))
        self.inner.stored = torch.zeros(2)


def test_attributes_are_found_wherever_modules_keep_them() -> None:
    model = Nested()
    for path, holder in (
        ("inner.weight", model.inner._parameters),
        ("inner.scale", model.inner._buffers),
        ("inner.stored", model.inner.__dict__),
        ("inner", model._modules),
        ("of_class", model),
    ):
        assert holder_of(model, path) == (holder, path.rpartition(".")[2])
    assert attribute(model, "inner.weight") is model.inner.weight
    assert attribute(model, "of_class") == 3
    graph = fx.Graph()
    graph.get_attr("inner.stored")
    assert list(attributes_of(model, graph)) == ["inner.stored"]


def test_an_attribute_that_does_not_exist_is_an_error() -> None:
    with pytest.raises(AttributeError, match="missing"):
        attribute(Nested(), "inner.missing")
