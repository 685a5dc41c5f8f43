"""The two stages of a body: together they compute what it does, and the first needs nothing that is not known before."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lowered_bodies import pullback_of, traced
from torch import Tensor

from pcr_fx.codegen import Function, lower, split
from pcr_fx.codegen.interpreter import interpret

# A state, an operand of each block, a matrix of each block, two matrices and a vector that all blocks share.
SHAPES = {"h": (1, 24), "x": (1, 20), "own": (24, 24), "into": (20, 24), "back": (24, 24), "bias": (24,)}
SHARED = [False, False, False, True, True, True]


def gated(h: Tensor, x: Tensor, own: Tensor, into: Tensor, back: Tensor, bias: Tensor) -> Tensor:
    gate = torch.sigmoid(x @ into + h @ back + bias)
    return gate * h + (1 - gate) * x[:, :1].tanh()


def own_weights(h: Tensor, x: Tensor, own: Tensor, into: Tensor, back: Tensor, bias: Tensor) -> Tensor:
    """All that is known of blocks is a product with a matrix of each, that is read once in any case."""
    return torch.tanh(h @ own + bias)


def embedded(h: Tensor, x: Tensor, own: Tensor, into: Tensor, back: Tensor, bias: Tensor) -> Tensor:
    """Two products with shared matrices of what is known, one behind the other, beside one of each block's."""
    return torch.tanh((x @ into).sin() @ back + h @ own) + h * bias


def weights(h: Tensor, x: Tensor, own: Tensor, into: Tensor, back: Tensor, bias: Tensor) -> Tensor:
    """What is computed of shared matrices alone is not handed on for each block."""
    return torch.tanh(x @ into) + h @ (back @ back.tanh())


def joined(h: Tensor, x: Tensor, own: Tensor, into: Tensor, back: Tensor, bias: Tensor) -> Tensor:
    """Of what is joined a part has to wait, and so all of it."""
    return torch.tanh(torch.cat([h, x], -1)[:, :20] @ into) + torch.cat([x @ into, h], -1)[:, 12:36] * bias


BODIES = {body.__name__: body for body in (gated, own_weights, embedded, weights, joined)}


def functions(body: Callable[..., Tensor]) -> dict[str, tuple[Function, list[bool], list[Tensor]]]:
    """A step and its pullback, with what is known of their inputs, and inputs."""
    draw = torch.Generator().manual_seed(0)
    tensors = [torch.randn(shape, generator=draw, dtype=torch.float64) / 4 for shape in (*SHAPES.values(), (1, 24))]
    varying = [True, True, False, False, False, False]
    step, back = traced(body, tensors[:-1], True), traced(pullback_of(body), tensors, True)
    sums = [False, False, True, True, True, True]
    numbers = [
        tensor.view(1, -1) if varies else tensor.view(-1) for tensor, varies in zip(tensors, varying, strict=False)
    ]
    return {
        "step": (lower(step.graph, step, varying, [False]), [False, *(True for _ in range(5))], numbers),
        "pullback": (
            lower(back.graph, back, [*varying, True], sums),
            [*(True for _ in range(6)), False],
            [*numbers, tensors[-1].view(1, -1)],
        ),
    }


@pytest.mark.parametrize(
    ("name", "direction"),
    [
        *((name, direction) for name in ("gated", "embedded", "weights") for direction in ("step", "pullback")),
        ("joined", "step"),
    ],
)
def test_stages_compute_what_the_whole_does(name: str, direction: str) -> None:
    function, known, inputs = functions(BODIES[name])[direction]
    stages = split(function, known, [*SHARED, False][: len(known)])
    assert stages is not None
    by_name = dict(zip((buffer.name for buffer in function.inputs), inputs, strict=True))
    given: list[Any] = []
    for buffer in stages.early.inputs:
        tensor = by_name[buffer.name]
        given.append(tensor.view(1, -1) if buffer.varying else tensor)
    handed = interpret(stages.early, given)
    of_function = [
        one if buffer.varying else one[0] for one, buffer in zip(handed, stages.late.inputs[len(inputs) :], strict=True)
    ]
    for ours, whole in zip(interpret(stages.late, [*inputs, *of_function]), interpret(function, inputs), strict=True):
        torch.testing.assert_close(ours, whole, rtol=0, atol=1e-14)
    assert stages.late.operations < function.operations
    unknown = {buffer.name for buffer, is_known in zip(function.inputs, known, strict=True) if not is_known}
    assert not unknown & {buffer.name for buffer in stages.early.inputs}
    assert stages.numbers <= 24 * 5  # and none of a matrix


def test_what_each_block_has_for_itself_alone_stays_where_it_is() -> None:
    for function, known, _ in functions(own_weights).values():
        assert split(function, known, [*SHARED, False][: len(known)]) is None
