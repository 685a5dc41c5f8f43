"""The programs of a body: for which calls one trace serves, and when another is made."""

import math

import pytest
import torch
from node_cases import CASES, Case, D, Inputs, check, reference
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from pcr_fx import Options, ops
from pcr_fx.body import program
from pcr_fx.body.generalise import STAND_INS, generalise
from pcr_fx.chain import Chain
from pcr_fx.errors import BodyError
from pcr_fx.node import SolveNode
from pcr_fx.planner import plan
from pcr_fx.registry import Registry


def programs(node: SolveNode) -> set[str]:
    return {route.plan.program.key for route in node.routes.known.values()}  # type: ignore[union-attr]


PER_SAMPLE = Case(lambda z, m: (torch.tanh(z * m),), states=(("B", D),), operands=((5, D),))


@pytest.mark.parametrize("first", [1, 2, 5])
@pytest.mark.parametrize("name", CASES)
def test_one_program_serves_every_batch_size(name: str, first: int, monkeypatch: pytest.MonkeyPatch) -> None:
    # Equal content would share the programs of other tests.
    monkeypatch.setattr(program, "_of_block", Registry())
    monkeypatch.setattr(plan, "_of_block", {})
    node = CASES[name].node(4)
    for batch in (first, 1, 2, 3, 7):
        check(node, CASES[name].inputs(4, batch))
    assert len(programs(node)) == 1
    assert node.outcome.program.generality.any_batch  # type: ignore[union-attr]


def test_operands_may_follow_the_batch() -> None:
    case = Case(lambda z, m, s: (torch.tanh(z @ s) * m,), operands=((1, D),), shared=((D, D),))
    node = case.node(6)
    for batch in (4, 5, 2):
        drawn = case.inputs(6, batch)
        masks = torch.rand(6, batch, D, dtype=torch.float64).requires_grad_()
        check(node, Inputs(drawn.states, [masks], drawn.shared))
    assert len(programs(node)) == 1


@pytest.mark.parametrize("order", [(5, 1), (1, 5)])
def test_an_operand_of_size_one_broadcasts(order: tuple[int, ...]) -> None:
    """Its cotangent is summed over the batch, that of an operand with the batch's size is not."""
    node = PER_SAMPLE.node(6)
    for size in order:
        state = torch.randn(5, D, dtype=torch.float64).requires_grad_()
        masks = torch.randn(6, size, D, dtype=torch.float64).requires_grad_()
        check(node, Inputs([state], [masks], []))
        plan = node.plan_for([state], [masks], [])
        flat = state.detach().unsqueeze(-1)
        trajectory = ops.solve(flat, [masks.detach()], [], plan.key, -1)  # type: ignore[union-attr]
        arguments = flat, trajectory, [masks.detach()], [], torch.ones_like(trajectory), plan.key, -1, []  # type: ignore[union-attr]
        assert [part.shape for part in ops.adjoint(*arguments)] == [flat.shape, masks.shape]


def test_a_batch_size_that_cannot_be_told_from_a_width_gets_its_own_program() -> None:
    case = Case(lambda z, m, v: (torch.tanh(z @ v) * m,), operands=((1, D),), shared=((D, D),))
    node = case.node(6)
    for batch in (D, D + 1, D + 2, D):
        drawn = case.inputs(6, batch)
        masks = torch.rand(6, batch, D, dtype=torch.float64).requires_grad_()
        check(node, Inputs(drawn.states, [masks], drawn.shared))
    assert len(programs(node)) == 2
    fixed = node.plan_for(drawn.states, [masks], drawn.shared).program  # type: ignore[union-attr]
    assert not fixed.generality.any_batch


def test_a_batch_size_written_in_the_body_is_kept() -> None:
    case = Case(lambda z, w: (torch.tanh(z.view(3, D) @ w).view(3, 1, D),), states=(("B", 1, D),), operands=((D, D),))
    node = case.node(5)
    check(node, case.inputs(5, 3))
    assert not node.outcome.program.generality.any_batch  # type: ignore[union-attr]


@pytest.mark.parametrize("batch", [1, 2])
def test_sizes_of_one(batch: int) -> None:
    """Ops that treat a size of one apart, in the batch and in the length."""
    squeezing = Case(lambda z, w: (z + 0.1 * torch.tanh(z.squeeze() @ w),), operands=((D, D),))
    for length in (1, 4):
        check(squeezing.node(length), squeezing.inputs(length, batch))


def test_constants_of_the_body_tell_programs_apart() -> None:
    def body(number: float) -> fx.GraphModule:
        graph = fx.Graph()
        z = graph.placeholder("z")
        scale = graph.call_function(torch.tensor, ([number, 0.5, -0.5],), {"dtype": torch.float64})
        graph.output((graph.call_function(torch.sin, (graph.call_function(torch.mul, (z, scale)),)),))
        return fx.GraphModule({}, graph)

    inputs = Inputs([torch.ones(2, 3, dtype=torch.float64, requires_grad=True)], [], [])
    for number in (0.25, 0.75):
        check(SolveNode(Chain(body(number), 6), Options(solver="newton")), inputs)


def generalised(function, rank: int, offset: int, *others: int) -> fx.GraphModule:
    """`function` of one tensor `[*offset sizes, *batch, *others]`, traced twice."""
    shapes = [(3,) * offset + sizes[:rank] + others for sizes in STAND_INS]
    first, second = (make_fx(function)(torch.zeros(shape, device="meta")) for shape in shapes)
    return generalise(first, second, rank, offset)


def rearranged(x: Tensor) -> Tensor:
    """Sizes by themselves, multiplied with each other and with a number, repeated, and 1409, which is a width here."""
    a, b, c = x.shape[-3:]
    flat = x.reshape(-1, a * b * c).expand(2, -1, -1).reshape(-1, a, b, c)
    rest = x.new_zeros(x.numel() // (a * b * c), a, b, 1409)
    return torch.cat([2 * flat[: len(rest)] + a, rest], -1).reshape(-1, b * (c + 1409))


@pytest.mark.parametrize("offset", [0, 1])
@pytest.mark.parametrize("batch", [(1, 1), (7, 1), (2, 5), (1409, 2)])
def test_numbers_that_follow_the_batch_are_computed_from_it(batch: tuple[int, int], offset: int) -> None:
    graph = generalised(rearranged, 2, offset, 3)
    x = torch.randn((3,) * offset + (*batch, 3))
    torch.testing.assert_close(graph(x), rearranged(x))


@pytest.mark.parametrize(
    "function",
    [
        lambda x: x * math.sqrt(x.shape[0]),
        lambda x: x.sin() if x.shape[0] == STAND_INS[0][0] else x.cos(),
        lambda x: x.sin() + 1 if x.shape[0] == STAND_INS[0][0] else x.sin() + 2,
        lambda x: x[: x.shape[0] - 1],
        lambda x: torch.cat([x] * (x.shape[0] % 5)),
    ],
)
def test_what_depends_on_the_batch_size_otherwise_is_not_made_general(function) -> None:
    with pytest.raises(BodyError, match="batch size"):
        generalised(function, 1, 0, 3)


MASKED = {
    "operator": lambda z, m, k: (torch.tanh(z + m + (m > 0) * k),),
    "method": lambda z, m, k: (torch.tanh(z + m + (m > 0).mul(k)),),
}


@pytest.mark.parametrize("name", MASKED)
def test_a_number_times_a_mask_has_the_default_dtype(name: str) -> None:
    """Whatever the state's is, so that a tensor may not stand for it."""
    case = Case(MASKED[name], operands=((D,),), literals=1)
    node, inputs = case.node(6), case.inputs(6, 2)
    got = node(inputs.states, inputs.operands, inputs.shared)
    assert isinstance(node.outcome, BodyError) and "mul" in str(node.outcome)
    torch.testing.assert_close(got, reference(node, inputs), rtol=0, atol=0)
    check(case.node(6), inputs.to(torch.float32))
