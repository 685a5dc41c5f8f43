"""Batch norm in training within blocks: what is normalised, its gradients, and what the running statistics become."""

import copy

import pytest
import torch
from comparison import chains_of, rewritten, value_and_gradients
from torch import Tensor, nn

import pcr_fx

LENGTH = 9


def model() -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.BatchNorm1d(4, momentum=0.3), nn.Linear(4, 4), nn.Tanh()) for _ in range(LENGTH)]
    return nn.Sequential(*blocks).double()


def results(run: nn.Module, original: nn.Module, x: Tensor) -> list[Tensor]:
    found = value_and_gradients(run, list(original.parameters()), x)
    assert not any(buffer.requires_grad for buffer in original.buffers())
    return [*found, *(buffer.clone() for buffer in original.buffers())]


@pytest.mark.parametrize(
    ("way", "solver", "kernels"),
    [(way, solver, False) for way in ("transform", "compile") for solver in ("sequential", "newton")]
    + [("transform", "sequential", True)],
)
def test_blocks_that_update_statistics(way: str, solver: str, kernels: bool) -> None:
    ours, theirs = model(), model()
    options = {"solver": solver, "kernels": kernels}
    draw = torch.Generator().manual_seed(1)
    x = torch.randn(6, 4, dtype=torch.float64, generator=draw)
    before = [buffer.clone() for buffer in ours.buffers()]
    fast = rewritten(ours, x, way, options)
    torch.testing.assert_close(before, list(ours.buffers()))
    for _ in range(3):
        x = torch.randn(6, 4, dtype=torch.float64, generator=draw)
        got, expected = results(fast, ours, x), results(theirs, theirs, x)
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-9)
    (chain,) = chains_of(fast)
    assert chain["length"] == LENGTH and chain["native_forward"] is chain["native_backward"] is kernels
    fast.eval(), theirs.eval()
    torch.testing.assert_close(fast(x), theirs(x), rtol=1e-9, atol=1e-9)


def test_where_there_is_no_chain_the_op_stays() -> None:
    alone = copy.deepcopy(model()[:3])
    fast = pcr_fx.transform(alone, torch.randn(6, 4, dtype=torch.float64))
    assert not fast.report.chains


def test_what_no_kernel_holds_keeps_its_op() -> None:
    fast = pcr_fx.transform(model(), torch.randn(1000, 4, dtype=torch.float64))
    assert not fast.report.chains and "batch_norm" in str(fast.report)
