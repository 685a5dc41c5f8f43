"""The adjoint where its transposed reduction cannot be trusted: it is noticed, and the blocks go one after another."""

from collections.abc import Iterator, Sequence

import pytest
import torch
from node_cases import Case, D, Inputs, gradients, reference, solve
from torch import Tensor

import pcr_fx
from pcr_fx.node import SolveNode


def unstable(length: int = 64) -> tuple[Case, Inputs]:
    """Blocks that undo each other: R D, then D^-1 R^T. Products of pairs cancel 10 digits, float32 has 7."""
    generator = torch.Generator().manual_seed(0)
    stretch = torch.diag(torch.tensor([1e5, 1.0, 1e-5], dtype=torch.float64))
    matrices = []
    for _ in range(length // 2):
        rotation = torch.linalg.qr(torch.randn(D, D, dtype=torch.float64, generator=generator))[0]
        matrices += [rotation @ stretch, stretch.inverse() @ rotation.T]
    case = Case(lambda z, w: (z @ w.t(),), operands=((D, D),))
    drawn = case.inputs(length, 2, torch.float32)
    return case, Inputs(drawn.states, [torch.stack(matrices).float().requires_grad_()], [])


def gradient_error(got: Sequence[Tensor], exact: Sequence[Tensor]) -> float:
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(got, exact, strict=True))


def test_an_inaccurate_adjoint_runs_block_by_block() -> None:
    case, inputs = unstable()
    node, plain = case.node(64), case.node(64, solver="sequential")
    exact = inputs.to(torch.float64)
    expected = gradients(reference(node, exact), exact)
    own = gradient_error(gradients(reference(plain, inputs), inputs), expected)
    assert gradient_error(gradients(solve(node, inputs), inputs), expected) <= 2 * own
    assert node.record.fallbacks_backward == 1


@pytest.fixture
def overflowing() -> Iterator[tuple[SolveNode, Inputs]]:
    """Each block grows its state by half, the last forgets it: products of Jacobians overflow, the adjoint is 0."""
    case = Case(lambda z, w, gate: (torch.tanh(z @ w) * gate,), operands=((D, D), ()))
    weights = torch.eye(D).mul(1.5).repeat(400, 1, 1).requires_grad_()
    gates = torch.ones(400).index_fill(0, torch.tensor([399]), 0.0).requires_grad_()
    yield case.node(400), Inputs([torch.full((1, D), 1e-30, requires_grad=True)], [weights, gates], [])


def test_an_overflowing_adjoint_is_right(overflowing: tuple[SolveNode, Inputs]) -> None:
    node, inputs = overflowing
    final, expected = solve(node, inputs)[0][-1].sum(), reference(node, inputs)[0][-1].sum()
    for a, b in zip(torch.autograd.grad(final, inputs.every), torch.autograd.grad(expected, inputs.every), strict=True):
        torch.testing.assert_close(a, b)


def test_an_inaccurate_adjoint_raises_if_asked_to() -> None:
    case, inputs = unstable()
    with pytest.raises(pcr_fx.SolveError, match="transposed reduction"):
        gradients(solve(case.node(64, on_failure="raise", max_iterations=64), inputs), inputs)
