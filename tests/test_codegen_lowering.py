"""What is lowered computes what the graph computes, in float64, by the interpreter: each op that has a rule, and bodies."""

from collections.abc import Callable, Sequence
from typing import Any

import gpu_chains
import kernel_cases
import pytest
import random_bodies
import torch
from lowered_bodies import pullback_of, traced
from torch import Tensor, fx

from pcr_fx.codegen import Unprintable, lower
from pcr_fx.codegen.aten import RULES
from pcr_fx.codegen.functions import FUNCTIONS
from pcr_fx.codegen.interpreter import interpret
from pcr_fx.errors import BodyError
from pcr_fx.graphs.nodes import overload_name

aten = torch.ops.aten
SAMPLES = 2
SHAPE = (3, 4)

# By op, a use of it with tensors `[3, 4]`, three at the most. Those of one function of the table come by themselves.
USES: dict[str, Callable[..., Any]] = {
    # Views.
    "alias.default": lambda x: aten.alias(x),
    "detach.default": lambda x: aten.detach(x),
    "view.default": lambda x: aten.view(x, [2, 6]),
    "_unsafe_view.default": lambda x: aten._unsafe_view(x, [12]),
    "t.default": lambda x: aten.t(x),
    "transpose.int": lambda x: aten.transpose(x, 0, -1),
    "permute.default": lambda x: aten.permute(x, [1, 0]),
    "expand.default": lambda x: aten.expand(torch.tanh(x), [2, -1, -1]),
    "unsqueeze.default": lambda x: aten.unsqueeze(x, 1),
    "squeeze.default": lambda x: aten.squeeze(x[:1]),
    "squeeze.dim": lambda x: aten.squeeze(x[:1], 0),
    "squeeze.dims": lambda x: aten.squeeze(x[:1, None], [0, 1]),
    "select.int": lambda x: aten.select(x, 1, -2),
    "slice.Tensor": lambda x: aten.slice(x, 1, 1, 4, 2),
    "diagonal.default": lambda x: aten.diagonal(x, 1),
    "split.Tensor": lambda x: aten.split(x, 3, 1)[1],
    "split_with_sizes.default": lambda x: aten.split_with_sizes(x, [1, 3], 1)[1],
    "unbind.int": lambda x: aten.unbind(x, 1)[2],
    "unfold.default": lambda x: aten.unfold(x, 1, 3, 1),
    # Numbers.
    "add.Tensor": lambda x, y: aten.add(x, y[:1], alpha=2),
    "add.Scalar": lambda x: aten.add.Scalar(x, 3, 2),
    "sub.Tensor": lambda x, y: aten.sub(x, y[:, :1], alpha=2),
    "sub.Scalar": lambda x: aten.sub.Scalar(x, 3),
    "rsub.Tensor": lambda x, y: aten.rsub(x, y, alpha=2),
    "rsub.Scalar": lambda x: aten.rsub(x, 3, 2),
    "mul.Tensor": lambda x, y: aten.mul(x, y),
    "mul.Scalar": lambda x: aten.mul.Scalar(x, 3),
    "div.Tensor": lambda x, y: aten.div(x, y),
    "div.Scalar": lambda x: aten.div.Scalar(x, 3),
    "pow.Tensor_Scalar": lambda x: sum(aten.pow(x, power) for power in (2, 3, 0.5, -0.5, -1, 1, 1.7)),
    "pow.Tensor_Tensor": lambda x, y: aten.pow(x.abs(), y),
    "pow.Scalar": lambda x: aten.pow(2, x),
    "clamp.default": lambda x: aten.clamp(x, -0.2) + aten.clamp(x, None, 0.3) + aten.clamp(x, -0.4, 0.1),
    "clamp.Tensor": lambda x, y, z: aten.clamp(x, y, z),
    "clamp_min.default": lambda x: aten.clamp_min(x, 0.1),
    "clamp_max.default": lambda x: aten.clamp_max(x, 0.1),
    "remainder.Tensor": lambda x, y: x * aten.remainder(x, y),
    "remainder.Scalar": lambda x: x * aten.remainder.Scalar(x, -0.3),
    "div.Tensor_mode": lambda x, y: x * aten.div(x, y, rounding_mode="trunc") + aten.div(x, y, rounding_mode="floor"),
    "div.Scalar_mode": lambda x: x * aten.div.Scalar_mode(x, 0.3, rounding_mode="trunc"),
    "fmin.default": lambda x, y: aten.fmin(x, y),
    "fmax.default": lambda x, y: aten.fmax(x, y),
    "isnan.default": lambda x: x * aten.isnan(x),
    "copy.default": lambda x, y: aten.copy(x, y[:1] * 2),
    "where.self": lambda x, y, z: aten.where(x > 0, y, z),
    "clone.default": lambda x: aten.clone(x),
    "lift_fresh_copy.default": lambda x: aten.lift_fresh_copy(x),
    "bitwise_and.Tensor": lambda x, y: x * aten.bitwise_and(x > 0, y > 0),
    "bitwise_or.Tensor": lambda x, y: x * aten.bitwise_or(x > 0, y > 0),
    "bitwise_not.default": lambda x: x * aten.bitwise_not(x > 0),
    # Along axes.
    "mm.default": lambda x, y: aten.mm(x, y.t()),
    "bmm.default": lambda x, y: aten.bmm(x.reshape(2, 2, 3), y.reshape(2, 3, 2)),
    "addmm.default": lambda x, y: (
        aten.addmm(x[:, :3], x, y.t(), beta=2, alpha=3) + aten.addmm(x[:1, :3], x, y.t(), beta=0)
    ),
    "baddbmm.default": lambda x, y: aten.baddbmm(x[:1, :2], x.view(2, 2, 3), y.view(2, 3, 2), beta=3),
    "sum.default": lambda x: aten.sum(x),
    "sum.dim_IntList": lambda x: aten.sum(x, [-1], True),
    "mean.default": lambda x: aten.mean(x),
    "mean.dim": lambda x: aten.mean(x, [0]),
    "amax.default": lambda x: aten.amax(x, [1], True) + aten.amax(x),
    "amin.default": lambda x: aten.amin(x, [0]),
    "var.correction": lambda x: aten.var(x, [1]) + aten.var(x, [1], correction=0),
    "var_mean.correction": lambda x: aten.var_mean(x, [0], correction=2, keepdim=True),
    # Put together.
    "cat.default": lambda x, y: aten.cat([x, y[:1], x.new_empty(0)]),
    "slice_scatter.default": lambda x, y: aten.slice_scatter(x, y[:, 1:3], 1, -3, -1),
    "select_scatter.default": lambda x, y: aten.select_scatter(x, torch.tanh(y[0]), 0, -2),
    "diagonal_scatter.default": lambda x, y: aten.diagonal_scatter(x, y[0, :2] * 2, 2),
    "constant_pad_nd.default": lambda x: aten.constant_pad_nd(x, [1, -2, -1, 1], 0.5),
    "flip.default": lambda x: aten.flip(x, [-1]).reshape(2, 6).t(),
    "_to_copy.default": lambda x, y: y + (x > 0).to(x.dtype) + x.round().to(torch.bool),
    # At places that tensors name.
    "index.Tensor": lambda x: x[[2, 0, 0], [1, -1, 3]] + x[:, [3, 1, 1]] + torch.tanh(x)[[1]][:, :3],
    "_unsafe_index.Tensor": lambda x: aten._unsafe_index(x, [None, torch.tensor([3, 0])]),
    "gather.default": lambda x: x.gather(1, torch.tensor([[3, 0, 0], [1, 2, 3]])),
    "scatter.src": lambda x, y: x.scatter(0, torch.tensor([[2, 0, 1], [0, 1, 2]]), y[:2, :3] * 2),
    "scatter.value": lambda x: x.scatter(1, torch.tensor([[2, 0], [1, 3]]), 0.5),
    "scatter_add.default": lambda x, y: x.scatter_add(0, torch.tensor([[2, 0, 1], [2, 0, 1], [2, 1, 0]]), y[:, :3] * 2),
    "index_put.default": lambda x, y: x.index_put((torch.tensor([2, 0]), torch.tensor([1, 3])), y[0, :2] * 2),
    "_unsafe_index_put.default": lambda x, y: aten._unsafe_index_put(x, [None, torch.tensor([3, 3])], y[:, :2], True),
    # New.
    "eye.default": lambda x: aten.eye(3, dtype=x.dtype) @ x,
    "eye.m": lambda x: aten.eye.m(3, 4, dtype=x.dtype) * x,
    "full.default": lambda x: x + aten.full([4], 2.5, dtype=x.dtype),
    "full_like.default": lambda x: x + aten.full_like(x, 2.5),
    "new_full.default": lambda x: x + aten.new_full(x, [3, 1], 2.5),
    "scalar_tensor.default": lambda x: x + aten.scalar_tensor(2.5, dtype=x.dtype),
    "fill.Scalar": lambda x, y: y + aten.fill(x, 2.5),
    "zeros.default": lambda x: x + aten.zeros([4], dtype=x.dtype),
    "zeros_like.default": lambda x: x + aten.zeros_like(x),
    "new_zeros.default": lambda x: x + aten.new_zeros(x, [4]),
    "ones.default": lambda x: x + aten.ones([4], dtype=x.dtype),
    "ones_like.default": lambda x: x + aten.ones_like(x),
    "new_ones.default": lambda x: x + aten.new_ones(x, [4]),
    # Whose numbers are never read.
    "empty_like.default": lambda x, y: aten.where(x == x, y, aten.empty_like(x)),
    "new_empty.default": lambda x, y: aten.where(x == x, y, aten.new_empty(x, [3, 4])),
    "empty_permuted.default": lambda x, y: aten.where(x == x, y, aten.empty_permuted([3, 4], [1, 0], dtype=x.dtype)),
    "empty.memory_format": lambda x, y: aten.where(x == x, y, aten.empty([3, 4], dtype=x.dtype)),
    "new_empty_strided.default": lambda x, y: aten.where(x == x, y, aten.new_empty_strided(x, [3, 4], [4, 1])),
}
# Why others have no pullback; this one stands in graphs that were made functional after they were differentiated.
NO_PULLBACK = {"copy.default": "derivative for aten::copy is not implemented"}


def use_of(name: str) -> Callable[..., Any]:
    """A use of an op of which the pullback is not zero everywhere, if it has one."""
    if name in USES:
        return USES[name]
    base, overload = name.split(".")
    function, op = FUNCTIONS[base], getattr(getattr(aten, base), overload)
    if overload == "Scalar":
        return lambda x: x * op(x, 0.3)
    if function.arity == 1:
        return lambda x: x * op(x)
    return lambda x, y: x * op(x, y)


def inputs_of(function: Callable[..., Any], seed: int = 0) -> list[Tensor]:
    """For each argument and sample numbers between -1 and 1: `[SAMPLES, *SHAPE]`."""
    draw = torch.Generator().manual_seed(seed)
    count = function.__code__.co_argcount
    return [2 * torch.rand(SAMPLES, *SHAPE, generator=draw, dtype=torch.float64) - 1 for _ in range(count)]


def results(function: Callable[..., Any], inputs: Sequence[Tensor]) -> list[Tensor]:
    """Of one sample."""
    found = function(*inputs)
    return [tensor.double() for tensor in (found if isinstance(found, tuple | list) else [found])]


def assert_lowered(graph: fx.GraphModule, function: Callable[..., Any], inputs: Sequence[Tensor]) -> None:
    """`graph` lowered computes what `function` does, of inputs that each sample has for itself."""
    shapes = [list(one.shape) for one in results(function, [tensor[0] for tensor in inputs])]
    lowered = lower(graph.graph, graph, [True for _ in inputs], [False for _ in shapes])
    got = interpret(lowered, [tensor.reshape(SAMPLES, -1) for tensor in inputs])
    for sample in range(SAMPLES):
        expected = results(function, [tensor[sample] for tensor in inputs])
        for ours, theirs, shape in zip(got, expected, shapes, strict=True):
            torch.testing.assert_close(ours[sample].reshape(shape), theirs, rtol=1e-12, atol=1e-12, equal_nan=True)


@pytest.mark.parametrize("name", RULES)
def test_an_op_is_lowered_to_what_it_computes(name: str) -> None:
    function = use_of(name)
    inputs = inputs_of(function)
    graph = traced(function, [tensor[0] for tensor in inputs])
    assert name in map(overload_name, graph.graph.nodes)
    assert_lowered(graph, function, inputs)


@pytest.mark.parametrize("name", RULES)
def test_the_pullback_of_an_op_is_lowered_to_what_it_computes(name: str) -> None:
    function = use_of(name)
    inputs = inputs_of(function)
    first = results(function, [tensor[0] for tensor in inputs])
    one = function if len(first) == 1 else lambda *given: function(*given)[0]
    cotangent = inputs[0].new_tensor(range(1, SAMPLES * first[0].numel() + 1)).reshape(SAMPLES, *first[0].shape)
    pullback, given = pullback_of(one), [*inputs, cotangent]
    if name in NO_PULLBACK:
        with pytest.raises(BodyError, match=NO_PULLBACK[name]):
            traced(pullback, [tensor[0] for tensor in given], decomposed=True)
    else:
        assert_lowered(traced(pullback, [tensor[0] for tensor in given], decomposed=True), pullback, given)


def body_of(name: str) -> tuple[Callable[..., Tensor], list[tuple[int, ...]]]:
    """A block of one sample, of its state, a matrix and a vector, and the shapes of these."""
    if name in gpu_chains.BODIES:
        body = gpu_chains.BODIES[name]
        return body, [(1, 4), (4, 4), (4,)]
    d, native = kernel_cases.WIDTH, kernel_cases.BODIES[name]
    return lambda x, w, b: native(x, {"w": w, "b": b}), [(1, 3, 2) if name == "attention" else (1, d), (d, d), (d,)]


@pytest.mark.parametrize("name", {**gpu_chains.BODIES, **kernel_cases.BODIES})
def test_a_body_and_its_pullback_with_parameters_that_samples_share(name: str) -> None:
    """Gradients of what samples share are sums over the samples."""
    body, (state, *parameters) = body_of(name)
    draw = torch.Generator().manual_seed(0)
    x, cotangent = (torch.randn(SAMPLES, *state, generator=draw, dtype=torch.float64) for _ in range(2))
    shared = [0.5 * torch.randn(shape, generator=draw, dtype=torch.float64) for shape in parameters]
    values = torch.cat([body(one, *shared) for one in x])
    pulled = [torch.func.vjp(body, one, *shared)[1](dual) for one, dual in zip(x, cotangent, strict=True)]
    sums = [sum(gradients) for gradients in list(zip(*pulled, strict=True))[1:]]
    states = torch.stack([gradients[0] for gradients in pulled])

    graph = traced(body, [x[0], *shared], decomposed=True)
    flat = [tensor.flatten() for tensor in shared]
    step = lower(graph.graph, graph, [True, False, False], [False])
    (got,) = interpret(step, [x.reshape(SAMPLES, -1), *flat])
    torch.testing.assert_close(got.reshape(values.shape), values, rtol=1e-12, atol=1e-12)

    graph = traced(pullback_of(body), [x[0], *shared, cotangent[0]], decomposed=True)
    pullback = lower(graph.graph, graph, [True, False, False, True], [False, True, True])
    got = interpret(pullback, [x.reshape(SAMPLES, -1), *flat, cotangent.reshape(SAMPLES, -1)])
    for ours, theirs in zip(got, [states, *sums], strict=True):
        torch.testing.assert_close(ours.reshape(theirs.shape), theirs, rtol=1e-12, atol=1e-12)


# Of the first 80, those with a rule for every op of theirs, in PyTorch 2.13.
SEEDS = [1, 6, 9, 12, 14, 18, 19, 21, 23, 25, 27, 30, 34, 40, 42, 48, 50, 63, 65, 70, 73, 74, 77, 78]


@pytest.mark.parametrize("seed", SEEDS)
def test_random_bodies(seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        random_bodies, "numbers", random_bodies.numbers[:1024].clone()
    )  # as few as a kernel's constants
    shape = [(4,), (2, 3), (2, 2, 3)][seed % 3]
    draw = torch.Generator().manual_seed(seed)
    x, cotangent = (torch.randn(SAMPLES, *shape, generator=draw, dtype=torch.float64) for _ in range(2))

    def body(state: Tensor) -> Tensor:
        return random_bodies.Composer(seed)(state)[0]

    for function, inputs in ((body, [x]), (pullback_of(body), [x, cotangent])):
        graph = traced(function, [tensor[0] for tensor in inputs], decomposed=True)
        try:
            assert_lowered(graph, function, inputs)
        except Unprintable as reason:
            pytest.skip(f"traced to another op than in PyTorch 2.13: {reason}")
